"""A training that went well does not end badly for what stands around it: screen, pictures, folders, numbers."""

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from accel_trainer import Callback, ProcessFailedError, TrainConfig, Trainer, launch, load_best
from accel_trainer.base.console import complain, is_terminal, pass_on, show, warn
from accel_trainer.base.tracebacks import ends_in_users_lines
from accel_trainer.devices.environment import describe_environment, masked
from accel_trainer.history import History
from accel_trainer.storage.checkpoints import read_checkpoint, steps_in
from accel_trainer.storage.run_folder import RunFolder
from accel_trainer.tools.cli import main
from accel_trainer.view.notebook import LiveCurve
from accel_trainer.view.screen import in_green
from support import ROOT, correct, loader_of, make_data, make_model, quiet

# --- the screen -------------------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A terminal that has been closed at the other end."""

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(5, "Input/output error")


class Busy(io.StringIO):
    """A terminal that takes no more for now."""

    def isatty(self):
        return True

    def write(self, text):
        raise BlockingIOError(11, "write could not complete without blocking")


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
    "busy": Busy,
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


def test_a_text_steers_no_terminal_but_by_our_own_colours(monkeypatch, capsys):
    text = "a\tb\x1b[2J\x1b]0;title\x07\r\x9b31m"
    plain = "a\tb?[2J?]0;title???31m\n"
    show(text)
    complain(text)
    assert tuple(capsys.readouterr()) == (plain, plain)
    with pytest.warns(UserWarning) as caught:
        warn(text)
    assert str(caught[0].message) == plain.strip()
    pass_on(text)
    assert capsys.readouterr().out == text
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    show(in_green(text))
    assert terminal.getvalue() == f"\x1b[32m{plain.strip()}\x1b[0m\n"


def test_warnings_stay_warnings():
    with pytest.warns(UserWarning, match="careful") as caught:
        warn("careful", stacklevel=1)
        ends_in_users_lines(lambda: warn("careful", stacklevel=2))()
    assert [one.filename for one in caught] == [__file__] * 2
    assert caught[1].lineno == caught[0].lineno + 1
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


def test_names_that_no_tracker_can_write_reach_them_as_far_as_they_can(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = os.fsdecode(b"gr\xf6\xdfe")
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(run_dir=tmp_path / "run", trackers=("tensorboard",), project=name)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={name: correct}, config=config)
    history = trainer.fit(loader_of(make_data(24), 8), loader_of(make_data(24), 8))
    reader = EventAccumulator(str(tmp_path / "run/trackers/gr??e")).Reload()
    told = [event.value for event in reader.Scalars("metrics/gr??e")]
    assert told == pytest.approx(history.metrics[name])


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


@pytest.mark.skipif(os.name != "posix", reason="as a shell closes it")
def test_a_signal_writes_into_no_file_that_has_taken_the_place_of_the_screen(tmp_path):
    script = (
        "import os, signal, torch\nmine = open('mine.txt', 'w')\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from accel_trainer import Callback, Trainer, TrainConfig\n"
        "class Leaves(Callback):\n    def on_step_end(self, trainer):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "model = torch.nn.Linear(1, 1)\nloader = DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), 2)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "trainer = Trainer(model, optimizer, torch.nn.MSELoss(), callbacks=[Leaves()], config=TrainConfig())\n"
        "try:\n    trainer.fit(loader)\nexcept SystemExit:\n    mine.write(str(mine.fileno()))\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = f"exec {sys.executable} script.py 2>&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 0 and (tmp_path / "mine.txt").read_text() == "2"


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
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("accel_trainer.view.reporter.draw_losses", refuse)
    with pytest.warns(UserWarning, match=f"Could not write .*losses.png: {error}"):
        _, history = fit(run_dir=tmp_path / "run", verbose=False)
    assert history.num_epochs == 2 and (tmp_path / "run" / "report.html").is_file()


def test_a_curve_that_cannot_be_drawn_is_a_warning(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr("accel_trainer.view.notebook.draw_losses", refuse)
    with pytest.warns(UserWarning, match="Could not draw the losses: RuntimeError.'no font'"):
        _, history = fit([LiveCurve()], verbose=False)
    assert history.num_epochs == 2


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


def test_what_is_written_by_the_side_may_be_in_the_home_folder_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _, history = fit(run_dir="~/run", verbose=False)
    history.plot("~/losses.png")
    assert main(["report", "~/run", "--output=~/page.html"]) == 0
    assert {"losses.png", "page.html"} <= {path.name for path in tmp_path.iterdir()} and not Path("~").exists()
    assert main(["runs", "~"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("run ")


@pytest.mark.parametrize("is_gone", [True, False])
def test_runs_are_listed_and_put_side_by_side_from_a_folder_that_is_gone_or_on_another_drive(
    is_gone, tmp_path, monkeypatch, capsys
):
    def another_drive(*_):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    runs = [str(tmp_path / name / "run") for name in ("one", "two")]
    for run_dir in runs:
        fit(run_dir=run_dir, verbose=False)
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path / "scratch")
    if is_gone:
        (tmp_path / "scratch").rmdir()
    else:
        monkeypatch.setattr(os.path, "relpath", another_drive)
    assert main(["runs", str(tmp_path)]) == 0
    assert main(["report", *runs, "--output", str(tmp_path / "page.html")]) == 0
    assert "two" in capsys.readouterr().out and "two" in (tmp_path / "page.html").read_text()


def test_git_may_speak_another_alphabet(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x", *arguments], check=True)

    (tmp_path / os.fsdecode(b"gr\xf6\xdfe")).write_text("one")
    git("init", "-q")
    git("config", "core.quotePath", "false")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    (tmp_path / os.fsdecode(b"gr\xf6\xdfe")).write_text("two")
    monkeypatch.chdir(tmp_path)
    assert describe_environment("CPU")["git_commit"].endswith(" with changes")


# --- files of others --------------------------------------------------------------------------------------------------

OF_OTHERS = (
    "environment.json",
    "losses.png",
    "report.html",
    "evaluations.json",
    "preempted.json",
    "nonfinite.json",
    "failed.json",
)


@pytest.mark.parametrize("resume", [False, "auto"])
@pytest.mark.parametrize(
    "name", [*OF_OTHERS, "config.json", "history.jsonl", "trackers.json", "best/model.safetensors"]
)
def test_no_run_writes_over_a_file_that_was_there(name, resume, tmp_path, monkeypatch):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="Give it a folder of its own|holds (a run already|another run)"):
        fit(run_dir=".", resume=resume, verbose=False)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == ["mine\n"]


@pytest.mark.parametrize("resume", [False, "auto"])
def test_a_run_that_fails_at_once_leaves_the_folder_as_it_was(resume, tmp_path, monkeypatch):
    class Fails(Callback):
        def on_step_end(self, trainer):
            raise ZeroDivisionError

    monkeypatch.chdir(tmp_path)
    for name in (".lock", "notes.txt", "report.html.part"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ZeroDivisionError):
            fit([Fails()], run_dir=".", resume=resume, verbose=False)
        assert [path.name for path in tmp_path.rglob("*")] == [name] and (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    with pytest.raises(ZeroDivisionError):
        fit([Fails()], run_dir=".", resume=resume, verbose=False)
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        fit([Fails()], run_dir="own", resume=resume, verbose=False)
    assert not (tmp_path / "own").exists()


def test_a_job_that_is_killed_at_its_first_file_begins_again(tmp_path):
    fit(run_dir=tmp_path / "whole", verbose=False)
    for names in ([], ["environment.json"]):
        (tmp_path / "run" / "best").mkdir(parents=True)
        (tmp_path / "run" / "history.jsonl").touch()
        for name in names:
            shutil.copy(tmp_path / "whole" / name, tmp_path / "run")
        _, history = fit(run_dir=tmp_path / "run", resume="auto", verbose=False)
        assert history.num_epochs == 2
        shutil.rmtree(tmp_path / "run")


def test_a_checkpoint_that_goes_leaves_what_others_have_put_into_it(tmp_path):
    class Adds(Callback):
        def on_epoch_start(self, trainer):
            for _, path in steps_in(tmp_path / "run/checkpoints"):
                (path / ".DS_Store").touch()
                (path / "@eaDir").mkdir(exist_ok=True)
                (path / "@eaDir" / "model.safetensors").touch()
                (path / "best" / "._model.safetensors").touch()
                if path.name == "step_00000006":
                    (path / "scores.txt").write_text("mine")

    fit([Adds()], run_dir=tmp_path / "run", num_epochs=6, keep_checkpoints=1, verbose=False)
    names = [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert names == ["step_00000006_others_1", "step_00000018"]
    others = tmp_path / "run/checkpoints" / names[0]
    assert [path.name for path in others.iterdir()] == ["scores.txt"] and (others / "scores.txt").read_text() == "mine"
    (tmp_path / "run/checkpoints/step_00000018/scores.txt").write_text("mine too")
    folder = RunFolder(tmp_path / "run", resume=True, keep=1)
    folder.save_checkpoint(read_checkpoint(folder.resumed), folder.history)  # once more, of the same step
    assert (tmp_path / "run/checkpoints/step_00000018_others_1/scores.txt").read_text() == "mine too"


def test_what_a_kill_leaves_of_a_file_is_cleaned_up(tmp_path):
    fit(run_dir=tmp_path / "run", verbose=False)
    names = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    (tmp_path / "run/checkpoints/.step_00000009.part").mkdir()
    for name in ("best/.tmpAb1xYz", "best/.model.safetensors.part", ".losses.png.part", ".nonfinite.json.part"):
        (tmp_path / "run" / name).touch()
    for name in (".tmpAb1xYz", "model.safetensors"):
        (tmp_path / "run/checkpoints/.step_00000009.part" / name).touch()
    fit(run_dir=tmp_path / "run", resume=True, verbose=False)
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == names


def test_a_page_of_several_runs_takes_the_place_of_no_other_file(tmp_path, monkeypatch, capsys):
    for name in ("one", "two"):
        fit(run_dir=tmp_path / name, verbose=False)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["report", "one", "two"]) == 0
    Path("report.html").write_text("mine")
    assert main(["report", "one", "two"]) == 2
    assert Path("report.html").read_text() == "mine" and "--output" in capsys.readouterr().err


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
        (["--auth", "me:word", "--db_pass=x", "--pat", "x"], ["--auth", "***", "--db_pass=***", "--pat", "***"]),
        (["--password=my pass word", "--hf.token=x"], ["--password=***", "--hf.token=***"]),
        (["--header", "Authorization: Bearer abc.def"], ["--header", "Authorization: ***"]),
        (["https://h/x?y=1&token=abc&sig=d%3D&z=2"], ["https://h/x?y=1&token=***&sig=***&z=2"]),
        (['{"password": "my word", "lr": 0.1}'], ['{"password": ***, "lr": 0.1}']),
        (["-c", "login(token='abc', lr=3); train()"], ["-c", "login(token=***, lr=3); train()"]),
        (["sql://me:p@ss@h/x", "redis://:p/w@h/0", "me:word@h/x"], ["sql://***@h/x", "redis://***@h/0", "***@h/x"]),
        (["Account=me;AccountKey=abc==;Suffix=x"], ["Account=me;AccountKey=***;Suffix=x"]),
        (["https://hooks.slack.com/services/T0/B0/xyz"], ["https://hooks.slack.com/services/***"]),
        *[(words, words) for words in (["--tokenizer", "gpt2", "--max_tokens=5"], ["--author", "me", "--sigma=0.5"])],
        *[([word], [word]) for word in ("git@github.com:a/b.git", "https://h:80/path@v1", "--image_key=x")],
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


def test_a_long_command_line_is_masked_at_once():
    started = time.perf_counter()
    masked(["x" * 10**5, "token" * 20_000, "a.b-" * 25_000, "a:" * 50_000, "://" * 30_000, "eyJ-" * 25_000])
    assert time.perf_counter() - started < 5


# --- the command line -------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "config, told",
    [
        (BOMB, "references such as *a are not taken"),
        (f"trackers: {BOMB.splitlines()[0][3:]}\nmonitor: *a\n", "references such as *a are not taken"),
        ("trackers: &a [*a]", "references such as *a are not taken"),
        ("trackers: " + "[" * 50_000, "nested more than 10 deep"),
        ("num_epochs: 1" + ":59" * 100_000, "more than 65536 characters"),
        ("monitor: gr\udcf6\udcdfe", "is not text"),
    ],
    ids=["bomb", "reference", "circle", "deep", "large", "bytes"],
)
def test_a_config_that_would_take_for_ever_is_refused(config, told, tmp_path):
    (tmp_path / "run.yaml").write_bytes(config.encode(errors="surrogateescape"))
    command = [sys.executable, "-m", "accel_trainer", "train", "mine:run", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


# --- processes --------------------------------------------------------------------------------------------------------


def one_is_missing(how, note):
    if os.environ["RANK"] == "1":
        note.write_text(str(time.time()))
        if how == "killed":
            os.kill(os.getpid(), 9)
        raise ZeroDivisionError("before the group")
    fit(verbose=False)  # where it waits for the other


@pytest.mark.distributed
@pytest.mark.parametrize("how, told", [("fails", "before the group"), ("killed", "killed by signal 9")])
def test_nobody_waits_for_a_process_that_failed_before_all_have_met(how, told, tmp_path):
    with pytest.raises(ProcessFailedError, match=told):
        launch(one_is_missing, how, tmp_path / "note", num_processes=2)
    assert time.time() - float((tmp_path / "note").read_text()) < 8


def addresses():
    """Return the addresses where this process can be reached, once the group is formed."""
    import psutil
    from accelerate import Accelerator

    Accelerator(cpu=True)
    torch.distributed.barrier()
    found = {one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN}
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, found)
    return set().union(*everyone), os.environ["GLOO_SOCKET_IFNAME"]


@pytest.mark.distributed
def test_launched_processes_can_be_reached_from_this_machine_only():
    found, interface = launch(addresses, num_processes=2)
    assert found == {"127.0.0.1"} and interface in ("lo", "lo0")  # where another machine's name leads elsewhere, too


KILLED = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from accel_trainer import TrainConfig, Trainer

def item(index):
    if index == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.ones(2), torch.ones(1)

class Table(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return item(index)

class Stream(IterableDataset):
    def __iter__(self):
        return map(item, range(64))

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader({"table": Table, "stream": Stream}[sys.argv[1]](), batch_size=4, num_workers=2)
Trainer(model, optimizer, torch.nn.MSELoss(), config=TrainConfig(num_epochs=2)).fit(loader)
"""


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_process_whose_loader_worker_was_killed_leaves_soon(kind):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", KILLED, kind], capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert time.monotonic() - started < 18  # one sheltered worker alone would hold it for 20 seconds
