"""The command line on one's own code: train, evaluate, check, and wrong arguments."""

import json
import re

import pytest

from accel_trainer import History
from accel_trainer.tools.cli import main
from support import ROOT, on_processes, torchrun

pytestmark = pytest.mark.usefixtures("drawn_once")

RUNS = str(ROOT / "tests" / "faulty_runs.py")

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader
from accel_trainer import Callback
from support import correct, loader_of, make_data, make_model

def make_run(config):
    model = make_model()
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "loss_fn": nn.CrossEntropyLoss(),
        "metrics": {"accuracy": correct},
        "train_loader": loader_of(make_data(48)),
        "test_loader": loader_of(make_data(20), 4, shuffle=False),
        "final_loader": loader_of(make_data(11), 4, shuffle=False),
    }

def differs(config):  # one process trains on other data
    import os
    run = make_run(config)
    run["loss_fn"] = lambda outputs, targets: outputs.sum() * float("nan")
    return run

class Initialise(Callback):  # when a run goes on, too
    def on_fit_start(self, trainer):
        nn.init.ones_(next(trainer.model.parameters()))

def forgets(config):
    return make_run(config) | {"callbacks": [Initialise()]}

def pairs(config):  # each sample against all others of its micro-batch
    return make_run(config) | {"loss_fn": lambda outputs, targets: (outputs @ outputs.T).logsumexp(1).mean()}

def fails(config):
    return make_run(config) | {"loss_fn": int("none")}

def takes_too_little(config):
    return make_run(config) | {"loss_fn": lambda outputs: outputs.sum()}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return f"{tmp_path}/mine.py:make_run"


def test_train_and_evaluate_give_the_same_scores_as_the_run(module, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("num_epochs: 2\nrun_dir: from_yaml\n")
    assert main(["train", module, "--config", "run.yaml", "--run_dir", "run", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "Epoch 2/2 - Train Loss" in printed
    final = re.search(r"Final evaluation: (loss [\d.]+, accuracy [\d.]+)", printed)[1]
    assert not (tmp_path / "from_yaml").exists() and History.load("run").num_epochs == 2
    assert json.loads((tmp_path / "run/config.json").read_text())["asked"]["seed"] == 3
    assert main(["evaluate", module, "run"]) == 0
    assert final in capsys.readouterr().out
    assert main(["evaluate", module, "run", "--loader", "test_loader", "--format", "json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    history = History.load("run")
    assert scores["loss"] == pytest.approx(history.test_losses[history.best_epoch - 1], rel=1e-6)
    kept = json.loads((tmp_path / "run/evaluations.json").read_text())
    assert [one["num_samples"] for one in kept] == [11, 20]


def test_print_config_and_help_tell_every_field(module, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", module, "--patience", "3", "--print_config"])
    assert exit.value.code == 0 and "patience: 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Epochs in a row without improvement" in printed and "--keep_checkpoints" in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "Did you mean train?"),
        (["train", "mine.py:make_run", "--patiance", "3"], "Did you mean --patience?"),
        (["train", "mine.py:make_run", "--num_epochs", "many"], "num_epochs"),
        (["train", "mine.py:make_run", "--num_epochs", "0"], "num_epochs must be at least 1, got 0"),
        (["train", "mine.py:make_rum"], "Did you mean 'make_run'?"),
        (["train", "mine_:make_run"], "Did you mean 'mine'?"),
        (["train", "mine.py:make_run", "--monitor", "acuracy"], "one of test_loss, train_loss, accuracy"),
        (["train", "mine.py:make_run", "--run_dir", "run", "--resume", "true"], "no checkpoint to go on from"),
        (["train", "mine.py:make_run", "--mixed_precision", "fp8"], "This machine can do"),
        (["evaluate", "mine.py:make_run", "nowhere"], "No history.jsonl in"),
        (["runs", "nowhere"], "There is no folder"),
        (["check", "mine.py:make_run", "--monitor", "acuracy"], "monitor must be one of"),
    ],
)
def test_a_wrong_argument_gets_one_line(module, capsys, arguments, told):
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    text = printed.err + printed.out
    assert code in (1, 2) and told in text and len(text.strip().splitlines()) == 1 and "Traceback" not in text


def test_an_error_of_the_users_code_keeps_its_traceback(module):
    with pytest.raises(ValueError, match="invalid literal for int"):
        main(["train", module.replace("make_run", "fails")])
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        main(["train", module.replace("make_run", "takes_too_little")])


@pytest.mark.distributed
def test_check_tells_on_one_page_and_on_two_processes(module, tmp_path, capfd):
    assert main(["check", module, "--num_epochs", "7"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[1].strip() or line for line in lines]
    assert [line.split()[0] for line in lines] == ["ok"] * 8
    assert "16 tensors of model and optimizer come back bit for bit" in lines[3]
    assert re.search(r"about [\d.]+ m?s an epoch of 3 steps", lines[7])
    assert re.search(r"model  .* MiB whole, .* with sharding='full' .* on each of 2; .* of 4; .* of 8", lines[4])
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}
    done = torchrun("accel_trainer", "check", module, options=["-m"], cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2: their weights are equal bit for bit") == 1
    (tmp_path / "runs").mkdir()
    divided = [*("--num_micro_batches", "2"), *("--sharding", "full"), *("--run_dir", str(tmp_path / "runs/run"))]
    assert on_processes(2, main, ["check", module, *divided]) == [0, 0]
    told = capfd.readouterr().out
    assert re.search(r"with sharding='full' [\d.]+ on each of 2 \(as here\)", told)
    assert "tensors of model and optimizer come back bit for bit" in told
    assert "2: each has a part of the weights, and all train them with the same settings" in told
    assert not list((tmp_path / "runs").iterdir())


def test_check_fails_where_the_run_would(module, capsys):
    assert main(["check", module.replace("make_run", "differs")]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("FAILED") and "nan" in printed
    assert main(["check", module.replace("make_run", "pairs")]) == 1
    assert re.search(r"FAILED +means +loss_fn is no mean over samples", capsys.readouterr().out)
    assert main(["check", module.replace("make_run", "forgets")]) == 1
    assert re.search(r"FAILED +save, load +.* came back different", capsys.readouterr().out)
