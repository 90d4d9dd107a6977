"""The folder for the Hub: weights that other libraries read, a model card, and an upload by the real client."""

import base64
import http.server
import json
import runpy
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn
from torch.utils.data import DataLoader

from accel_trainer import Callback, History, Trainer, load_best
from accel_trainer.tools.cli import main
from accel_trainer.tools.export import export
from support import correct, loader_of, make_data, make_model, quiet

pytestmark = pytest.mark.usefixtures("drawn_once")

MODULE = """
import torch
from dataclasses import dataclass
from torch import nn
from support import correct, loader_of, make_data, make_model
from transformers import DistilBertConfig, DistilBertForSequenceClassification

@dataclass
class Shape:
    width: int = 5

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Shape()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(self.first(inputs))

def run_of(model, **more):
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": loader_of(make_data(48)),
        "test_loader": loader_of(make_data(20), 4, shuffle=False),
    } | more

def tied(config):
    return run_of(Tied())

def other(config):
    return run_of(nn.Linear(5, 3))

def frozen(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return run_of(model)

SIZES = {"n_layers": 1, "dim": 8, "hidden_dim": 8, "n_heads": 2, "max_position_embeddings": 4}

def texts(config):
    rows = [{"input_ids": torch.randint(0, 9, (4,)), "labels": torch.tensor(row % 2)} for row in range(16)]
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    model = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=9, **SIZES))
    more = {"compute_loss": lambda model, batch: model(**batch).loss, "loss_fn": None}
    return run_of(model, **more) | {"train_loader": loader, "test_loader": loader}

def adapters(config):
    from peft import LoraConfig, get_peft_model

    run = texts(config)
    torch.manual_seed(0)
    base = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=9, **SIZES))
    base.config.name_or_path = "someone/tiny"
    model = get_peft_model(base, LoraConfig(target_modules=["q_lin"], task_type="SEQ_CLS"))
    return run | {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return "mine.py:"


def fit(run_dir):
    model = make_model()
    config = quiet(num_epochs=3, patience=2, run_dir=run_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"accuracy|1": correct}, config=config)
    trainer.fit(loader_of(make_data(64), 16), loader_of(make_data(20), 8))
    return trainer.evaluate(loader_of(make_data(11), 4))


def test_what_the_folder_of_a_run_holds_becomes_one_for_the_hub(tmp_path, capsys):
    scores = fit(tmp_path / "secret place" / "digits")
    assert main(["export", str(tmp_path / "secret place/digits"), "--output", str(tmp_path / "new/model")]) == 0
    folder = tmp_path / "new/model"
    assert capsys.readouterr().out == f"{folder}\n"
    assert {path.name for path in folder.iterdir()} == {"README.md", "model.safetensors", "losses.png"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    best = load_best(make_model(), tmp_path / "secret place/digits").state_dict()
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == best.keys() and all(torch.equal(weights[name], best[name]) for name in best)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

    card, history = ModelCard.load(folder / "README.md"), History.load(tmp_path / "secret place/digits")
    told = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    place = history.best_epoch - 1
    assert told == {("final", name): value for name, value in scores.items()} | {
        ("test", "loss"): history.test_losses[place],
        ("test", "accuracy|1"): history.metrics["accuracy|1"][place],
    }
    assert card.data.model_name == "digits" and card.data.tags == ["accel_trainer"]
    for line in (
        "# digits",
        f"weights of epoch {history.best_epoch} of 3, the best by `test_loss`",
        "![losses](losses.png)",
        "| data | samples | loss | accuracy\\|1 |\n| --- | --- | --- | --- |\n",
        f"| final | 11 | {scores['loss']:.4g} | {scores['accuracy|1']:.4g} |\n| test (chose the epoch) | 20 |",
        "| length of train_loader's dataset | 64 |",
        "| learning rates | 0.02 |",
        "| patience | 2 |",
        f"| torch | {torch.__version__} |",
    ):
        assert line in card.text, card.text
    assert "secret place" not in card.text and "git_commit | None" not in card.text


def test_a_model_of_ones_own_comes_with_its_config_and_tied_weights(module, tmp_path):
    assert main(["train", f"{module}tied", "--run_dir", "run", "--num_epochs", "2", "--verbose", "false"]) == 0
    assert main(["export", f"{module}tied", "run"]) == 0
    folder = tmp_path / "run/export"
    assert json.loads((folder / "config.json").read_text()) == {"width": 5}
    namespace = runpy.run_path("mine.py")
    model, best = namespace["Tied"](), load_best(namespace["Tied"](), "run")
    load_model(model, folder / "model.safetensors")
    assert torch.equal(model.first.bias, best.first.bias) and torch.equal(model.second.weight, best.first.weight)
    main(["export", "run", "--output", "plain"])
    load_model(model, "plain/model.safetensors")


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(8).reshape(2, 4)).logits


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("kind", ["texts", "adapters"])
def test_a_model_with_save_pretrained_comes_back_by_its_own_library(module, kind):
    peft = pytest.importorskip("peft") if kind == "adapters" else None
    assert main(["train", f"{module}{kind}", "--run_dir", "run", "--num_epochs", "1", "--verbose", "false"]) == 0
    assert main(["export", f"{module}{kind}", "run", "--output", "out"]) == 0
    namespace = runpy.run_path("mine.py")
    best = load_best(namespace[kind](None)["model"], "run")
    if peft is None:
        again = namespace["DistilBertForSequenceClassification"].from_pretrained("out")
    else:
        torch.manual_seed(0)
        config = namespace["DistilBertConfig"](vocab_size=9, **namespace["SIZES"])
        again = peft.PeftModel.from_pretrained(namespace["DistilBertForSequenceClassification"](config), "out")
        assert ModelCard.load("out/README.md").data.base_model == "someone/tiny"
    assert torch.equal(logits_of(again), logits_of(best))
    assert "from_pretrained(...)" in ModelCard.load("out/README.md").text


def test_weights_that_are_not_whole_are_not_exported_without_the_model(module, capsys):
    assert main(["train", f"{module}frozen", "--run_dir", "run", "--num_epochs", "1", "--verbose", "false"]) == 0
    capsys.readouterr()
    assert main(["export", "run"]) == 2
    told = capsys.readouterr().err
    assert "leaves out 2 weights that were frozen, such as 0.weight" in told and "export my_module:make_run" in told
    assert main(["export", f"{module}frozen", "run"]) == 0
    model = runpy.run_path("mine.py")["frozen"](None)["model"]
    best = load_best(runpy.run_path("mine.py")["frozen"](None)["model"], "run")
    load_model(model, "run/export/model.safetensors")
    assert torch.equal(model[1].weight, best[1].weight)


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_an_adapter_is_exported_without_the_model_as_long_as_it_is_that_of_the_best_weights(module, capsys):
    peft = pytest.importorskip("peft")
    train = ["train", f"{module}adapters", "--run_dir", "run", "--verbose", "false"]
    assert main([*train, "--num_epochs", "1"]) == 0
    old = {path.name: path.read_bytes() for path in Path("run/best").glob("adapter_*")}
    assert main(["export", "run", "--output", "out"]) == 0
    namespace = runpy.run_path("mine.py")
    best = load_best(namespace["adapters"](None)["model"], "run")
    torch.manual_seed(0)
    config = namespace["DistilBertConfig"](vocab_size=9, **namespace["SIZES"])
    base = namespace["DistilBertForSequenceClassification"](config)
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(base, "out")), logits_of(best))
    card = ModelCard.load("out/README.md")
    assert card.data.base_model == "someone/tiny" and "PeftModel.from_pretrained" in card.text
    assert {path.name for path in Path("out").iterdir()} == {*old, "README.md", "losses.png"}
    card.data.base_model, card.data.tags = "", ["base_model:adapter:", "lora"]  # of a model without a name
    card.save("run/best/README.md")
    assert main(["export", "run", "--output", "nameless"]) == 0
    assert "base_model:" not in Path("nameless/README.md").read_text()

    assert main([*train, "--num_epochs", "3", "--resume", "auto"]) == 0
    for name, content in old.items():  # as if the run had been killed
        (Path("run/best") / name).write_bytes(content)
    capsys.readouterr()
    assert main(["export", "run", "--output", "again"]) == 2 and "Give the run function" in capsys.readouterr().err


@pytest.mark.parametrize(
    "monitor, chosen", [("test_loss", "val"), ("ood/accuracy", "ood"), ("train_loss", None), ("val/loss", "val")]
)
def test_each_test_set_is_a_data_set_of_the_card(tmp_path, monitor, chosen):
    model, sets = make_model(), {"val": loader_of(make_data(20), 8), "ood": loader_of(make_data(29), 8)}
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        metrics={"accuracy": correct},
        config=quiet(run_dir=tmp_path / "run", monitor=monitor, mode="max" if "acc" in monitor else "min"),
    )
    history = trainer.fit(loader_of(make_data(16), 8), sets)
    finals = [trainer.evaluate(loader_of(make_data(size), 8)) for size in (11, 12)]
    export(tmp_path / "run", tmp_path / "out", name="two")
    trainer.evaluate(sets["ood"])
    trainer.evaluate(sets["val"], name="test/val")  # as the command calls it
    export(tmp_path / "run", tmp_path / "evaluated")
    place = history.best_epoch - 1
    of_sets = {(of, score): history.metrics[f"{of}/{score}"][place] for of in sets for score in ("loss", "accuracy")}
    of_finals = {
        (of, name): value
        for of, scores in zip(("final", "final (2)"), finals, strict=True)
        for name, value in scores.items()
    }
    for folder, called in (("out", {}), ("evaluated", {"val": "test/val"})):
        card = ModelCard.load(tmp_path / folder / "README.md")
        told = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
        assert told == pytest.approx(
            of_finals | {(called.get(of, of), name): one for (of, name), one in of_sets.items()}
        )
        assert len(card.data.eval_results) == 8
        for of, size in (("val", 20), ("ood", 29)):
            said = called.get(of, of) + " (chose the epoch)" * (of == chosen)
            assert f"| {said} | {size} | {of_sets[of, 'loss']:.4g} |" in card.text, card.text
        assert card.text.count("chose the epoch") == (chosen is not None)
        assert "| final | 11 |" in card.text and "| final (2) | 12 |" in card.text
    page = (tmp_path / "run/report.html").read_text()
    assert "<th>final</th>" in page and "<th>final (2)</th>" in page


def test_an_error_with_letters_that_nobody_can_write_ends_on_the_card_too(tmp_path):
    class Fails(Callback):
        def on_epoch_end(self, trainer):
            if trainer.state.epoch == 2:
                raise ValueError("half a letter: \ud800")

    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        callbacks=[Fails()],
        config=quiet(run_dir=tmp_path / "run"),
    )
    with pytest.raises(ValueError, match="half a letter"):
        trainer.fit(loader_of(make_data(16)), loader_of(make_data(12)))
    folder = export(tmp_path / "run", tmp_path / "out")
    assert "failed: ValueError: half a letter: ?." in ModelCard.load(folder / "README.md").text
    assert (folder / "losses.png").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """What the Hub answers to an upload; keeps what it was sent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen[self.path] = body
        answer = {"status": "ok", "commitUrl": f"{constants.ENDPOINT}/me/digits/commit/1", "commitOid": "1" * 40}
        if self.path.endswith("/create"):
            answer = {"url": f"{constants.ENDPOINT}/me/digits", "name": "me/digits", "id": "me/digits"}
        elif "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            answer = {"files": [one | {"shouldIgnore": False, "oid": None} for one in files]}
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine in place of the Hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.status = {}, 200
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_push_uploads_the_folder_by_the_clients_own_way(hub, tmp_path, monkeypatch, capsys):
    fit(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", "--push", "me/digits", "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("/me/digits")
    asked = json.loads(hub.seen["/api/repos/create"])
    assert (asked["organization"], asked["name"], asked["visibility"]) == ("me", "digits", "private")
    lines = [json.loads(line) for line in hub.seen["/api/models/me/digits/commit/main"].splitlines()]
    sent = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"}
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "run/export").iterdir()}
    assert ModelCard(sent["README.md"].decode()).data.model_name == "digits"
    hub.status = 401
    assert main(["export", "run", "--output", "again", "--push", "me/digits"]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: not uploaded (") and len(told.splitlines()) == 1
    assert told.endswith(f"hf upload me/digits {tmp_path / 'again'}") and (tmp_path / "again/README.md").exists()
    assert main(["export", "run", "--output", "third one", "--push", "bad name"]) == 2
    assert capsys.readouterr().err.strip().endswith(f"hf upload NAME '{tmp_path / 'third one'}'")


def test_what_cannot_be_exported_is_refused_in_one_line(module, tmp_path, capsys):
    fit(tmp_path / "run")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/README.md").write_text("mine")
    weights = tmp_path / "run/best/model.safetensors"

    def refused(*arguments):
        assert main(["export", *arguments]) == 2
        return capsys.readouterr().err.strip()

    assert refused("run", "--output", "taken") == f"error: {tmp_path / 'taken'} is there already: " + (
        "give another --output, or remove it."
    )
    assert refused("nowhere").startswith(f"error: No history.jsonl in {tmp_path / 'nowhere'}")
    assert "does not fit the model: missing weight" in refused(f"{module}other", "run")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert refused("run") == f"error: {weights} is damaged: its checksum does not match."
    assert "is damaged" in refused(f"{module}other", "run")
    weights.unlink()
    assert refused("run") == f"error: {tmp_path / 'run'} has no best weights to export."
    assert {path.name for path in tmp_path.iterdir()} == {"run", "taken", "mine.py"} | {
        path.name for path in tmp_path.glob("__pycache__")
    }
    assert (tmp_path / "taken/README.md").read_text() == "mine" and not (tmp_path / "run/export").exists()


def test_a_run_without_a_test_set_and_with_nan_has_a_card_too(tmp_path):
    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        config=quiet(num_epochs=1, run_dir=tmp_path / "run"),
    )
    trainer.fit(loader_of(make_data(16)))
    assert main(["export", str(tmp_path / "run")]) == 0
    assert "## Results" not in ModelCard.load(tmp_path / "run/export/README.md").text
    trainer.evaluate(DataLoader(make_data(5), sampler=[]))
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "again")]) == 0
    card = ModelCard.load(tmp_path / "again/README.md")
    assert "| final | 0 | nan |" in card.text and not card.data.eval_results
