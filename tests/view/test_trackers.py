"""Experiment trackers: each one's own files say what the history says, a resumed run stays one run, failures pass."""

import json
import math
import os
import sqlite3
import struct
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from packaging.version import Version
from torch import nn

from accel_trainer import Callback, History, Trainer
from accel_trainer.config import TRACKER_NAMES, check_tracker_names
from accel_trainer.view.trackers import Trackers, _plain
from support import correct, loader_of, make_data, make_model, quiet

pytestmark = pytest.mark.usefixtures("drawn_once")

STEPS = 4  # of an epoch
CONFIG = {"asked": {"num_epochs": 3, "patience": None, "trackers": ["a", "b"], "lr": 0.1}, "bitwise": True, "name": "x"}
FLAT = {
    "asked.num_epochs": 3,
    "asked.patience": "None",
    "asked.trackers": "['a', 'b']",
    "asked.lr": 0.1,
    "bitwise": True,
    "name": "x",
}


def trackio_is_new():
    try:
        return Version(version("trackio")) >= Version("0.20")  # older ones cannot resume
    except PackageNotFoundError:
        return False


class Watch(Callback):
    """Note what the trackers should be told, and break the run off after a step."""

    def __init__(self, breaks_at=None):
        self.breaks_at, self.losses = breaks_at, {}

    def on_step_end(self, trainer):
        if trainer.state.step % 2 == 0:
            self.losses[trainer.state.step] = trainer.state.recent_loss
        if trainer.state.step == self.breaks_at:
            raise RuntimeError("power cut")


def fit(run_dir, *names, num_epochs=3, is_resumed=False, breaks_at=None, project="digits", metric="accuracy"):
    """Train with trackers; return history, reported losses and the trackers."""
    model, watch = make_model(), Watch(breaks_at)
    trackers = Trackers(names, project, run_dir, CONFIG, is_resumed)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        scheduler=lambda optimizer, num_steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, num_steps),
        metrics={metric: correct},
        callbacks=[trackers, watch],
        config=quiet(num_epochs=num_epochs, report_every=2, run_dir=run_dir, resume="auto" if run_dir else False),
    )
    try:
        trainer.fit(loader_of(make_data(16 * STEPS)), loader_of(make_data(29), 8, shuffle=False))
    except RuntimeError:
        assert breaks_at is not None
        trackers.close()
    return trainer.history, watch.losses, trackers


def fit_in_two_pieces(run_dir, name):
    """Train, lose power in the third epoch after three steps of it, and go on from the second; return the whole."""
    _, before, _ = fit(run_dir, name, breaks_at=2 * STEPS + 3)
    ids = json.loads((run_dir / "trackers.json").read_text())
    history, after, _ = fit(run_dir, name, is_resumed=True)
    assert json.loads((run_dir / "trackers.json").read_text()) == ids and set(ids) == {name}
    losses = before | after
    assert list(losses) == list(range(2, 3 * STEPS + 1, 2)) and history.num_epochs == 3
    return history, losses, ids[name]


def by_step(rows):
    """Return the last value of each step; the steps after a checkpoint are told twice, and must say the same."""
    rows = list(rows)
    values = dict(rows)
    assert all(value == values[step] for step, value in rows)
    return values


def expected(history):
    """Return the series of the history as the trackers should have them."""
    series = {name: getattr(history, name_of_all) for name, name_of_all in PER_EPOCH.items()}
    series |= {f"metrics/{name}": values for name, values in history.metrics.items()}
    series["epoch"] = list(range(1, history.num_epochs + 1))
    return {
        name: {STEPS * number: value for number, value in enumerate(values, start=1)}
        for name, values in series.items()
        if values
    }


PER_EPOCH = {
    "train_loss": "train_losses",
    "test_loss": "test_losses",
    "learning_rate": "learning_rates",
    "samples_per_second": "samples_per_second",
    "epoch_seconds": "epoch_seconds",
}


# --- what their own readers find --------------------------------------------------------------------------------------


def test_tensorboard_finds_the_history_and_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history, losses, run_id = fit_in_two_pieces(tmp_path / "run", "tensorboard")
    folder = tmp_path / "run" / "trackers" / run_id
    reader = EventAccumulator(str(folder)).Reload()
    wanted = {"step/train_loss": losses, **expected(history)}
    for name, values in wanted.items():
        events = reader.Scalars(name)
        assert [event.step for event in events] == list(values), name
        assert [event.value for event in events] == pytest.approx(list(values.values()), rel=1e-6, abs=0.0), name
    assert len(reader.Scalars("step/learning_rate")) == len(losses)
    assert reader.Scalars("best_epoch")[-1].value == history.best_epoch
    text = reader.Tensors("stop_reason/text_summary")[-1].tensor_proto.string_val[0]
    assert text.decode() == history.stop_reason == "all 3 epochs done"
    assert len(list(folder.glob("*/hparams.yml"))) == 1  # the config is told once
    config = next(folder.glob("*/hparams.yml")).read_text()
    assert "asked.num_epochs: 3" in config and "asked.patience: None" in config


def test_tensorboard_shows_nothing_of_a_run_that_began_anew(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    fit(run_dir, "tensorboard", breaks_at=3)  # before the first checkpoint
    history, _, _ = fit(run_dir, "tensorboard", num_epochs=1)
    reader = EventAccumulator(str(run_dir / "trackers" / "digits")).Reload()
    assert [event.step for event in reader.Scalars("step/train_loss")] == [2, 4]
    assert history.num_epochs == 1


@pytest.mark.filterwarnings("ignore")  # of sqlalchemy and alembic, while mlflow makes its tables
def test_mlflow_finds_the_history_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    history, losses, run_id = fit_in_two_pieces(tmp_path / "run", "mlflow")
    assert "MLFLOW_TRACKING_URI" not in os.environ and os.listdir(tmp_path) == ["run"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'trackers' / 'mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'digits'")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == run_id and run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in FLAT.items()}
    assert run.data.tags["stop_reason"] == history.stop_reason
    assert run.data.metrics["best_epoch"] == history.best_epoch
    for name, values in {"step/train_loss": losses, **expected(history)}.items():
        found = client.get_metric_history(run_id, name)
        assert by_step((one.step, one.value) for one in found) == values, name


@pytest.mark.filterwarnings("ignore")
def test_mlflow_takes_a_metric_of_any_name(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)  # a client leaves a file where it is made
    history, _, _ = fit(tmp_path / "run", "mlflow", num_epochs=1, metric="top-1 (%)")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'trackers' / 'mlflow.db'}")
    run_id = json.loads((tmp_path / "run/trackers.json").read_text())["mlflow"]
    [found] = client.get_metric_history(run_id, "metrics/top-1 ___")
    assert found.value == history.metrics["top-1 (%)"][0]


def records_of(path):
    """Return the records of a .wandb file: those of a log of LevelDB, in blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # full, or the last part
            yield Record.FromString(whole)
            whole = b""


def tensor_source_of(records):
    for record in records:
        if record.HasField("history"):
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


@pytest.mark.filterwarnings("ignore")  # of pydantic, while wandb is imported
def test_wandb_offline_finds_the_history_under_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    history, losses, run_id = fit_in_two_pieces(tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2  # pieces of the same run
    records = [record for path in files for record in records_of(path)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {(run_id, "digits", "run")}
    rows = list(tensor_source_of(records))
    for name, values in {"step/train_loss": losses, **expected(history)}.items():
        assert by_step((row["step"], row[name]) for row in rows if name in row) == values, name
    assert rows[-1]["stop_reason"] == history.stop_reason and rows[-1]["best_epoch"] == history.best_epoch
    metrics = [record.metric for record in records if record.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)
    sources = [record.config.update for record in records] + [run.config.update for run in runs]
    config = {"/".join(item.nested_key) or item.key: item.value_json for updates in sources for item in updates}
    assert {name: json.loads(config[name]) for name in FLAT} == FLAT


@pytest.mark.skipif(not trackio_is_new(), reason="trackio 0.20 or newer is not installed")
@pytest.mark.filterwarnings("ignore")  # of what trackio imports
def test_trackio_finds_the_history_in_one_run(tmp_path, monkeypatch):
    assert "trackio" not in sys.modules  # it reads where to write when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    history, losses, name = fit_in_two_pieces(tmp_path / "run", "trackio")
    from trackio.api import Api
    from trackio.sqlite_storage import SQLiteStorage

    [run] = Api().runs("digits")
    assert run.name == name and name.startswith("run-")
    assert FLAT.items() <= run.config.items()
    rows = SQLiteStorage.get_logs("digits", name)
    for key, values in {"step/train_loss": losses, **expected(history)}.items():
        assert by_step((row["step"], row[key]) for row in rows if key in row) == values, key
    assert rows[-1]["stop_reason"] == history.stop_reason
    with sqlite3.connect(tmp_path / "trackio" / "digits.db") as database:
        assert database.execute("SELECT COUNT(DISTINCT run_name) FROM metrics").fetchone() == (1,)


# --- what they are told, and what they may do -------------------------------------------------------------------------


def fake(told, fails_in=None, error=RuntimeError):
    """Return a class of Accelerate's kind that notes what it is told."""

    def note(what, *args):
        told.append((what, *args))
        if what == fails_in:
            raise error("no network")

    class Fake(GeneralTracker):
        name, requires_logging_directory = "fake", False
        tracker = SimpleNamespace(
            define_metric=lambda *args, **kwargs: None,
            info=SimpleNamespace(run_id="chosen"),
            hash="chosen",
            id="chosen",
        )

        def __init__(self, project, **options):
            super().__init__()
            note("make", project, options)

        def start(self):
            note("start")

        def store_init_configuration(self, values):
            note("config", values)

        def log(self, values, step=None):
            note("log", values, step)

        def finish(self):
            note("finish")

    return Fake


def words(told):
    return [what for what, *_ in told]


@pytest.mark.parametrize("place", ["make", "start", "config", "log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_changes_nothing(place, monkeypatch):
    alone, _, _ = fit(None)
    told, of_other = [], []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "swanlab", fake(told, place))
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", fake(of_other))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history, _, trackers = fit(None, "swanlab", "trackio")
        trackers.close()
    assert [str(one.message) for one in caught] == [
        "The tracker swanlab failed (RuntimeError: no network); the training goes on without it."
    ]
    assert history.train_losses == alone.train_losses and history.test_losses == alone.test_losses
    assert history.stop_reason == alone.stop_reason == "all 3 epochs done"
    assert words(told).count(place) == 1 and words(told).count("finish") == (place not in ("make", "start"))
    assert words(of_other) == ["make", "start", "config", *["log"] * (6 + 3 + 1), "finish"]


def test_one_that_is_not_installed_is_told_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.warns(UserWarning, match="tracker comet_ml failed .*comet_ml.* goes on without it"):
        history, _, _ = fit(None, "comet_ml")
    assert history.num_epochs == 3


@pytest.mark.parametrize("place", ["start", "log", "finish"])
def test_ctrl_c_passes(place, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", fake([], place, KeyboardInterrupt))
    state = SimpleNamespace(step=1, epoch=1, recent_loss=0.5)
    trainer = SimpleNamespace(state=state, history=History(stop_reason="done"))
    trackers = Trackers(["trackio"], "digits", None, {}, False)
    with pytest.raises(KeyboardInterrupt):
        trackers.on_fit_start(trainer)
        trackers.on_fit_end(trainer)


def test_an_error_of_the_run_finishes_them_once(monkeypatch):
    told = []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", fake(told))
    _, _, trackers = fit(None, "trackio", breaks_at=3)
    trackers.close()
    trackers.close()
    assert words(told) == ["make", "start", "config", "log", "finish"]


def test_every_report_is_told_once_and_only_reports(monkeypatch):
    told = []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", fake(told))
    history, losses, _ = fit(None, "trackio")
    logged = [(values, step) for what, *(values, step) in [one for one in told if one[0] == "log"]]
    steps = [(step, values) for values, step in logged if "step/train_loss" in values]
    assert {step: values["step/train_loss"] for step, values in steps} == losses and len(steps) == len(losses)
    assert steps[0][1]["step/learning_rate"] == pytest.approx(0.1 * (1 - 0.9 * 1 / (3 * STEPS)))  # of the second update
    outcome, at = logged[-1]
    assert at == 3 * STEPS and outcome == {
        "best_epoch": history.best_epoch,
        "best_value": history.best_value,
        "stop_reason": history.stop_reason,
    }
    epochs = [(values, step) for values, step in logged if "epoch" in values]
    assert [step for _, step in epochs] == [4, 8, 12]
    assert [values["metrics/accuracy"] for values, _ in epochs] == history.metrics["accuracy"]
    assert set(epochs[-1][0]) == {"epoch", *history.last(), "metrics/accuracy"} - {"metrics", "train_metrics"}


RESUMED = {
    "aim": "run_hash",
    "clearml": "continue_last_task",
    "comet_ml": "experiment_key",
    "mlflow": "run_id",
    "swanlab": "id",
    "trackio": "name",
    "wandb": "id",
}


@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_a_resumed_run_is_asked_for_by_its_id(name, tmp_path, monkeypatch):
    told, ids = [], []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, fake(told))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    trainer = SimpleNamespace(state=SimpleNamespace(step=7, recent_loss=math.nan))
    for is_resumed in (False, True, False):
        trackers = Trackers([name], "digits", tmp_path, CONFIG, is_resumed)
        trackers.on_fit_start(trainer)
        trackers.close()
        ids.append(json.loads((tmp_path / "trackers.json").read_text()))
    assert set(ids[0]) == {name} and ids[0] == ids[1]
    (_, new), (_, resumed), (_, anew) = [one[1:] for one in told if one[0] == "make"]
    assert words(told).count("config") == (2 if name in ("mlflow", "tensorboard") else 3)
    if name in RESUMED:
        of_new, of_resumed, of_anew = (options.get(RESUMED[name]) for options in (new, resumed, anew))
        assert of_resumed and of_new in (None, of_resumed) and of_anew != of_resumed
    if name == "dvclive":
        assert (new["resume"], resumed["resume"]) == (False, True) and new["dir"] == resumed["dir"]
    if name == "tensorboard":
        assert (new["purge_step"], resumed["purge_step"]) == (0, 8)
        assert new["logging_dir"] == resumed["logging_dir"] == tmp_path / "trackers"
    if name == "wandb":
        assert resumed["dir"] == str(tmp_path / "trackers") and resumed["name"] == tmp_path.name
    assert os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///elsewhere.db"


def test_a_tracker_that_cannot_resume_today_is_not_forgotten(tmp_path, monkeypatch):
    (tmp_path / "trackers.json").write_text('{"trackio": "run-1"}')
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", fake([], "start"))
    with pytest.warns(UserWarning, match="trackio"):
        trainer = SimpleNamespace(state=SimpleNamespace(step=7, recent_loss=math.nan))
        Trackers(["trackio"], "digits", tmp_path, {}, True).on_fit_start(trainer)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"trackio": "run-1"}


@pytest.mark.parametrize("content", ["", "[1]", '{"trackio"'])
def test_a_spoilt_file_of_ids_begins_a_new_run(content, tmp_path, monkeypatch):
    (tmp_path / "trackers.json").write_text(content)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", fake([]))
    trainer = SimpleNamespace(state=SimpleNamespace(step=7, recent_loss=math.nan))
    Trackers(["trackio"], "digits", tmp_path, {}, True).on_fit_start(trainer)
    assert set(json.loads((tmp_path / "trackers.json").read_text())) == {"trackio"}


# --- names and values -------------------------------------------------------------------------------------------------


def test_the_names_are_those_of_accelerate():
    assert set(LOGGER_TYPE_TO_CLASS) <= set(TRACKER_NAMES)  # an older one has fewer
    if Version(version("accelerate")) >= Version("1.15"):
        assert set(LOGGER_TYPE_TO_CLASS) == set(TRACKER_NAMES)
    check_tracker_names(TRACKER_NAMES)
    check_tracker_names(())


@pytest.mark.parametrize(
    "names, message",
    [
        (["tensorbord"], "got 'tensorbord'. Did you mean 'tensorboard'?"),
        (["wandb", "ml_flow"], "got 'ml_flow'. Did you mean 'mlflow'?"),
        (["all"], "trackers must be among aim, .*, got 'all'"),
        ("wandb", "must be a list of names"),
        ([None], "must be a list of names"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(names, message):
    with pytest.raises(ValueError, match=message):
        check_tracker_names(names)


def test_values_are_flattened_to_what_every_tracker_takes():
    assert _plain(CONFIG) == FLAT
    assert [type(value) for value in _plain({"a": True, "b": 1, "c": torch.float32, "d": (1, None)}).values()] == [
        bool,
        int,
        str,
        str,
    ]


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_the_config_names_the_trackers_and_the_trainer_finishes_them(tmp_path, ends):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Boom(Callback):
        def on_epoch_end(self, trainer):
            if ends != "well" and trainer.state.epoch == 2:
                raise RuntimeError("boom")

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(run_dir=tmp_path / "run", trackers=["tensorboard"], project="mine", report_every=2)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Boom()], config=config)
    try:
        trainer.fit(loader_of(make_data(40), 8), loader_of(make_data(11), 4))
    except RuntimeError:
        assert ends != "well"
    events = EventAccumulator(str(tmp_path / "run/trackers/mine")).Reload()
    seen = [event.value for event in events.Scalars("test_loss")]
    assert seen == pytest.approx(trainer.history.test_losses[: len(seen)], rel=1e-6)
    assert len(seen) == (2 if ends == "well" else 1)
    assert not trainer._trackers._trackers  # finished
