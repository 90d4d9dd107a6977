"""Fine-tuning on texts: a tiny model of the family, from local files; lengths vary from batch to batch."""

import csv
import json
import random

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)
from transformers.utils import logging

from accel_trainer import History
from support import ROOT, run_here, torchrun

SCRIPT = str(ROOT / "scripts" / "finetune_text.py")
GOOD, BAD = ["fine", "great", "lovely", "warm"], ["awful", "cold", "dull", "poor"]
WORDS = ["the", "film", "was", "very", "and", "a", "story", "long"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A table of texts whose label is told by their words, and a model that knows these."""
    draw = random.Random(0)
    with open(tmp_path / "texts.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        for _ in range(240):
            label = draw.choice(["good", "bad"])
            words = draw.choices(WORDS, k=draw.randint(2, 12)) + draw.choices(GOOD if label == "good" else BAD, k=2)
            draw.shuffle(words)
            table.writerow([" ".join(words), label])
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *GOOD, *BAD]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tiny")
    torch.manual_seed(0)
    choices = {"n_layers": 2, "dim": 32, "hidden_dim": 64, "n_heads": 2, "max_position_embeddings": 32}
    config = DistilBertConfig(
        vocab_size=len(vocabulary), dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, **choices
    )
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


OPTIONS = ["--data", "texts.csv", "--model", "tiny", "--learning_rate", "0.003", "--batch_size", "16"]


def run(monkeypatch, capsys, *arguments):
    return run_here(monkeypatch, capsys, SCRIPT, *OPTIONS, *arguments)


def accuracy_in(printed):
    return float(next(line for line in printed.splitlines() if line.startswith("Final")).split()[-1])


def test_it_learns_and_saves_what_transformers_reads(files, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, "--num_epochs", "16", "--steps_per_epoch", "10", "--run_dir", "run")
    assert code == 0, printed
    assert accuracy_in(printed) > 0.9
    rates = History.load("run").learning_rates
    assert len(rates) == 16 and rates[0] < rates[1] and rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(0.003 / 144)  # one step before it would be 0: 160 steps, 16 of them to warm up
    model = AutoModelForSequenceClassification.from_pretrained("run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    logits = model(
        **tokenizer(["the film was great and warm", "a dull and awful story"], return_tensors="pt", padding=True)
    ).logits
    assert [model.config.id2label[int(place)] for place in logits.argmax(1)] == ["good", "bad"]


def test_the_cut_and_its_padding_do_not_matter(files, monkeypatch, capsys):
    for pieces in ("1", "3"):
        more = ["--num_epochs", "2", "--run_dir", pieces, "--num_micro_batches", pieces, "--warmup", "0.5"]
        code, printed = run(monkeypatch, capsys, *more)
        assert code == 0, printed
    one, three = History.load("1"), History.load("3")
    assert one.train_losses == pytest.approx(three.train_losses, rel=1e-4)
    assert one.learning_rates == three.learning_rates


@pytest.mark.distributed
def test_two_processes_are_one(files, monkeypatch, capsys):
    _, alone = run(monkeypatch, capsys, "--num_epochs", "2", "--run_dir", "one")
    done = torchrun(SCRIPT, *OPTIONS, "--num_epochs", "2", "--run_dir", "two", forks=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert accuracy_in(done.stdout) == accuracy_in(alone)
    assert History.load("one").train_losses == pytest.approx(History.load("two").train_losses, rel=1e-4)


@pytest.mark.distributed
def test_a_divided_model_has_the_losses_of_one_process_and_transformers_reads_it(files, monkeypatch, capsys):
    more = ["--num_epochs", "2", "--num_micro_batches", "8", "--bitwise"]
    _, alone = run(monkeypatch, capsys, *more, "--run_dir", "one")
    done = torchrun(SCRIPT, *OPTIONS, "--sharding", "full", *more[:2], "--bitwise", "--run_dir", "two", forks=True)
    assert done.returncode == 0, done.stderr
    assert accuracy_in(done.stdout) == accuracy_in(alone)
    one, two = History.load("one"), History.load("two")
    assert one.train_losses == two.train_losses and one.test_losses == two.test_losses
    assert "For from_pretrained: two/best" in done.stdout and len(list((files / "two/best").glob("model-*"))) == 2
    whole, parts = (AutoModelForSequenceClassification.from_pretrained(path) for path in ("one/model", "two/best"))
    assert all(torch.equal(weight, parts.state_dict()[name]) for name, weight in whole.state_dict().items())
    assert AutoTokenizer.from_pretrained("two/best") is not None


def test_a_run_that_has_ended_does_not_go_on_with_other_labels(files, monkeypatch, capsys):
    more = ["--num_epochs", "1", "--max_steps", "2", "--run_dir", "run"]
    assert run(monkeypatch, capsys, *more)[0] == 0
    code, printed = run(monkeypatch, capsys, *more)
    assert code == 2 and "holds a run already" in printed and "Traceback" not in printed
    assert run(monkeypatch, capsys, *more, "--resume", "auto")[0] == 0
    (files / "other.csv").write_text((files / "texts.csv").read_text().replace(",good", ",all right"))
    code, printed = run(monkeypatch, capsys, *more, "--resume", "auto", "--data", "other.csv")
    assert code == 2 and "has the labels ['bad', 'good'], --data has ['all right', 'bad']" in printed
    assert json.loads((files / "run/model/config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}


def test_what_is_wrong_is_told_by_name(files, monkeypatch, capsys):
    rows = {
        "empty.jsonl": [{"text": "a film", "label": 1}, {"text": " ", "label": 0}],
        "one.jsonl": [{"text": "a film", "label": "x"}] * 5,
    }
    for name, lines in rows.items():
        (files / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for arguments, told in (
        (["--data", "nowhere.csv"], "There is no file 'nowhere.csv'"),
        (["--text_column", "txt"], "has no column 'txt'; did you mean 'text'?"),
        (["--data", "empty.jsonl"], "empty.jsonl, row 2: 'text' is empty"),
        (["--data", "one.jsonl"], "one label only, 'x'"),
        (["--batch_size", "0"], "--batch_size must be >0, got 0"),
        (["--patience", "0"], "patience must be at least 1"),
    ):
        code, printed = run(monkeypatch, capsys, *arguments)
        assert code == 2 and told in printed and "Traceback" not in printed, printed
