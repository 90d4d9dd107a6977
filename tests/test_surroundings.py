"""A training that went well does not end badly for what stands around it: screen, pictures, folders, numbers."""

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings

import numpy
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from accel_trainer import Callback, TrainConfig, Trainer, load_best
from accel_trainer.cli import main
from accel_trainer.console import complain, is_terminal, show, warn
from accel_trainer.environment import masked
from accel_trainer.history import History
from support import ROOT, correct, loader_of, make_data, make_model, quiet

# --- the screen -------------------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A terminal that has been closed at the other end."""

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(5, "Input/output error")


class Bare:
    """What some tools put in place of a stream."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Strange(io.StringIO):
    encoding = "no-such-alphabet"

    def write(self, text):
        text.encode("ascii")
        return super().write(text)


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def shown_on_stderr(*what):
    """Show a warning as Python does where nothing collects it."""
    if sys.stderr is not None:
        sys.stderr.write(warnings.formatwarning(*what[:4]))


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    "latin": lambda: io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
    "gone": Gone,
    "bare": Bare,
    "strange": Strange,
}


def fit(callbacks=(), **choices):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = TrainConfig(**{"num_epochs": 2, **choices})
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, config=config)
    return trainer, trainer.fit(loader_of(make_data(24), 8), loader_of(make_data(24), 8))


@pytest.mark.parametrize("name", STREAMS)
def test_no_stream_ends_a_training(name, tmp_path, monkeypatch):
    class Warns(Callback):
        def on_epoch_end(self, trainer):
            warn("größe 損失 \udcf6")

    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", shown_on_stderr)
        patch.setattr(sys, "stdout", STREAMS[name]())
        patch.setattr(sys, "stderr", STREAMS[name]())
        _, history = fit([Warns()], run_dir=tmp_path / "größe 損失")
    assert history.num_epochs == 2


@pytest.mark.parametrize("name", ["ascii", "latin", "strange"])
def test_letters_that_a_stream_does_not_know_become_question_marks(name, monkeypatch):
    stream = STREAMS[name]()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        show("Files in größe 損失 \udcf6")
    stream.flush()
    written = stream.getvalue() if isinstance(stream, io.StringIO) else stream.buffer.getvalue().decode("ascii")
    assert written == "Files in gr??e ?? ?\n"


def test_what_a_stream_takes_arrives_whole(monkeypatch):
    for function, name in ((show, "stdout"), (complain, "stderr")):
        bare = Bare()
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, bare)
            function("größe")
        assert bare.text == "größe\n" and not is_terminal(bare)


def test_warnings_stay_warnings():
    with pytest.warns(UserWarning, match="careful") as caught:
        warn("careful", stacklevel=1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="careful"):
            warn("careful")


def test_a_name_that_cannot_be_written_in_utf8_is_shown_as_far_as_it_can(tmp_path, capsys):
    name = os.fsdecode(b"gr\xf6\xdfe")
    trainer, _ = fit(run_dir=tmp_path / name, verbose=False)
    trainer.evaluate(loader_of(make_data(24), 8))
    assert "gr??e" in (tmp_path / name / "report.html").read_text(encoding="utf-8")
    assert load_best(make_model(), tmp_path / name) is not None
    assert main(["runs", str(tmp_path)]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_command_line_in_another_alphabet(tmp_path):
    """As a container without a locale runs it."""
    script = (
        "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "from accel_trainer import Trainer, TrainConfig\n"
        "model = torch.nn.Linear(1, 1)\nloader = DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), 2)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        f"config = TrainConfig(num_epochs=1, run_dir={str(tmp_path / 'größe')!r})\n"
        "Trainer(model, optimizer, torch.nn.MSELoss(), config=config).fit(loader)\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py"), "größe 損失"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "gr??e" in done.stdout


# --- pictures and folders ---------------------------------------------------------------------------------------------


def test_a_picture_needs_no_latex(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setenv("PATH", "/usr/nowhere")
    with matplotlib.rc_context({"text.usetex": True}):
        fit(run_dir=tmp_path / "run", verbose=False)
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "run" / "losses.png").stat().st_size > 1000


@pytest.mark.parametrize("error", [RuntimeError("no font"), ValueError("no style"), AttributeError("no backend")])
def test_a_picture_that_cannot_be_drawn_is_a_warning(error, tmp_path, monkeypatch):
    def refuse(*_):
        raise error

    monkeypatch.setattr(History, "plot", refuse)
    with pytest.warns(UserWarning, match=f"Could not write .*losses.png: {error}"):
        _, history = fit(run_dir=tmp_path / "run", verbose=False)
    assert history.num_epochs == 2 and (tmp_path / "run" / "report.html").is_file()


def test_the_working_folder_may_go(tmp_path, monkeypatch, capsys):
    class Leaves(Callback):
        def on_epoch_end(self, trainer):
            scratch = tmp_path / f"scratch{trainer.state.epoch}"
            scratch.mkdir()
            monkeypatch.chdir(scratch)
            scratch.rmdir()

    fit([Leaves()], run_dir=tmp_path / "run")
    assert f"Files in {tmp_path / 'run'}: " in capsys.readouterr().out


def test_a_run_dir_of_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fit(run_dir="~/runs/first", verbose=False)
    assert (tmp_path / "runs" / "first" / "history.jsonl").is_file() and not (tmp_path / "~").exists()
    _, history = fit(run_dir="~/runs/first", verbose=False, resume=True, num_epochs=3)
    assert history.num_epochs == 3 and History.load("~/runs/first").num_epochs == 3
    load_best(make_model(), "~/runs/first")
    assert main(["runs", "~/runs"]) == 0 and "first" in capsys.readouterr().out


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, plain",
    [
        ("num_epochs", numpy.int64(3), 3),
        ("num_micro_batches", numpy.uint8(2), 2),
        ("seed", numpy.int64(1), 1),
        ("seed", torch.tensor(5), 5),
        ("max_grad_norm", numpy.float32(0.5), 0.5),
        ("min_delta", numpy.array(0.25), 0.25),
        ("time_limit_seconds", torch.tensor(1.5), 1.5),
        ("bitwise", numpy.bool_(True), True),
        ("checkpoint_every", numpy.int32(7), 7),
    ],
)
def test_numbers_of_other_libraries_are_taken_where_pythons_are(name, value, plain, tmp_path):
    config = TrainConfig(**{name: value, "run_dir": tmp_path})
    assert getattr(config, name) == plain and type(getattr(config, name)) is type(plain)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_epochs", 10**400),
        ("seed", 10**5000),
        ("max_grad_norm", 10**400),
        ("min_delta", 10**400),
        ("time_limit_seconds", 10**400),
        ("checkpoint_every", 10**400),
        ("num_epochs", numpy.float64(3)),
        ("num_epochs", numpy.array([3])),
        ("seed", numpy.int64(-1)),
        ("bitwise", numpy.int64(1)),
        ("min_delta", numpy.float32("nan")),
    ],
    ids=map(str, range(11)),  # not the numbers, which Python does not write
)
def test_numbers_out_of_all_range_name_the_field(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrainConfig(**{name: value, "run_dir": tmp_path})


@pytest.mark.parametrize("names", [("WORLD_SIZE",), ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")])
def test_a_launchers_variable_that_is_empty_is_none(names, monkeypatch, capsys):
    for name in names:
        monkeypatch.setenv(name, "")
    fit()
    assert "1 process (default)" in capsys.readouterr().out
    assert all(os.environ[name] == "" for name in names)


# --- which is better --------------------------------------------------------------------------------------------------


def best_of(values, metrics=None, **choices):
    """Return the best epoch when a metric takes these values."""

    def metric(outputs, targets):
        return values[min(trainer.state.epoch, len(values)) - 1]

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = quiet(num_epochs=len(values), **choices)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics or {"score": metric}, config=config)
    return trainer.fit(loader_of(make_data(8), 4), loader_of(make_data(8), 4)).best_epoch


def test_whether_more_or_less_of_a_metric_is_better_has_to_be_said():
    with pytest.raises(ValueError, match="monitor='score' needs a mode in TrainConfig: 'max' where more is better"):
        best_of([0.2, 0.9, 0.5], monitor="score")
    assert best_of([0.2, 0.9, 0.5], monitor="score", mode="max") == 2
    assert best_of([0.2, 0.9, 0.5], monitor="score", mode="min") == 1
    assert best_of([0.2, 0.9, 0.5]) is not None  # of the loss it is known


@pytest.mark.parametrize("metric, mode", [(MulticlassAccuracy(3), "max"), (MeanSquaredError(), "min")])
def test_a_metric_that_says_what_is_better_is_believed(metric, mode, tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    one_hot = nn.functional.one_hot(make_data(24).tensors[1], 3).float()
    data = torch.utils.data.TensorDataset(make_data(24).tensors[0], one_hot)
    is_error = isinstance(metric, MeanSquaredError)
    trainer = Trainer(
        model,
        optimizer,
        nn.MSELoss() if is_error else nn.CrossEntropyLoss(),
        metrics={"score": metric},
        config=quiet(num_epochs=4, monitor="score", run_dir=tmp_path / "run"),
    )
    loader = loader_of(data if is_error else make_data(24), 8)
    history = trainer.fit(loader, loader)
    values = history.metrics["score"]
    assert values[history.best_epoch - 1] == (max if mode == "max" else min)(values)


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_copied_trainer_trains_alike(copied, is_trained, tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    how = {"metrics": {"accuracy": correct}, "config": quiet()}
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(ignore_index=1), **how)
    loader = loader_of(make_data(24), 8)
    if is_trained:
        trainer.fit(loader, loader)
    twin = copied(trainer)
    assert twin.model is not model and twin.history == trainer.history
    mine, theirs = (one.fit(loader, loader) for one in (trainer, twin))
    assert mine.train_losses == theirs.train_losses and mine.metrics == theirs.metrics


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, shown",
    [
        (["train.py", "--token", "abc", "--lr", "0.1"], ["train.py", "--token", "***", "--lr", "0.1"]),
        (["train.py", "--wandb_api_key=abc"], ["train.py", "--wandb_api_key=***"]),
        (["train.py", "--hub-token=abc", "secret=def"], ["train.py", "--hub-token=***", "secret=***"]),
        (["train.py", "--password", "--verbose"], ["train.py", "--password", "--verbose"]),
        (["train.py", "s3://me:word@host/data", "host/path"], ["train.py", "s3://***@host/data", "host/path"]),
        (["train.py", "hf_" + "a" * 30], ["train.py", "***"]),
        (["train.py", "--key", "ghp_" + "A1" * 15], ["train.py", "--key", "***"]),
        (["-c", "login('sk-" + "b" * 20 + "')"], ["-c", "login('***')"]),
        (["train.py", "--num_epochs=3", "me@host"], ["train.py", "--num_epochs=3", "me@host"]),
    ],
)
def test_what_nobody_else_should_know_is_masked(command, shown):
    assert masked(command) == shown


def test_no_secret_reaches_the_files_that_one_sends_around(tmp_path, monkeypatch):
    secrets = ["hf_" + "q" * 24, "word-of-a-password", "word-of-the-launch"]
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "train.py", "--token", secrets[0], f"--db=sql://me:{secrets[1]}@h/x"]
    )
    monkeypatch.setenv("ACCELERATE_HUB_TOKEN", secrets[2])
    fit(run_dir=tmp_path / "run", verbose=False)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    assert "sql://***@h/x" in (tmp_path / "run" / "environment.json").read_text()
