"""The run folder: plain files that say what happened, and weights that load anywhere."""

import errno
import json
import math
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import accel_trainer.storage.tensor_files as tensor_files
from accel_trainer import Callback, History, Trainer, load_best
from accel_trainer.storage.checkpoints import fault_of
from accel_trainer.storage.run_folder import RunFolder
from accel_trainer.storage.weights import checked_state
from support import ROOT, correct, loader_of, make_data, make_model, on_processes, quiet

pytestmark = pytest.mark.usefixtures("drawn_once")


def fit(run_dir, model=None, **choices):
    model = model or make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        metrics={"accuracy": correct},
        config=quiet(run_dir=run_dir, **choices),
    )
    return trainer.fit(loader_of(make_data(37), 8), loader_of(make_data(11), 4)), model


def test_the_files_of_a_run(tmp_path):
    history, model = fit(tmp_path / "a" / "run", num_epochs=3)
    files = {str(path.relative_to(tmp_path / "a/run")) for path in (tmp_path / "a/run").rglob("*") if path.is_file()}
    checkpoint = {"model.safetensors", "optimizer.safetensors", "state.json", "history.jsonl", "manifest.json"}
    assert files == {
        *("config.json", "environment.json", "history.jsonl", "losses.png", "report.html"),
        *("best/model.safetensors", ".lock"),
        *(
            f"checkpoints/step_{step:08d}/{name}"
            for step in (10, 15)
            for name in {*checkpoint, "best/model.safetensors"}
        ),
    }
    config = json.loads((tmp_path / "a/run/config.json").read_text())
    assert config["asked"]["num_epochs"] == 3 and config["resolved"]["num_steps"] == 15
    environment = json.loads((tmp_path / "a/run/environment.json").read_text())
    assert environment["versions"]["torch"] == version("torch") and environment["command"]
    rows = [json.loads(line) for line in (tmp_path / "a/run/history.jsonl").read_text().splitlines()]
    assert [row.get("epoch") for row in rows] == [1, 2, 3, None]
    assert rows[1]["train_loss"] == history.train_losses[1] and rows[1]["step"] == 10
    assert rows[-1]["stop_reason"] == "all 3 epochs done"
    assert History.load(tmp_path / "a/run") == history
    picture = (tmp_path / "a/run/losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_without_a_run_dir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(None)
    assert list(tmp_path.iterdir()) == []


def test_the_best_weights_say_what_they_are_and_load_in_a_new_process(tmp_path):
    history, model = fit(tmp_path / "run", num_epochs=3)
    header = tensor_files.safe_open(tmp_path / "run/best/model.safetensors", framework="pt").metadata()
    kept = json.loads(header["accel_trainer"])
    assert kept == {"epoch": history.best_epoch, "test_loss": history.best_value, "aliases": {}, "left_out": {}}
    script = (
        "import sys, torch; sys.path[:0] = ['tests']\n"
        "from support import *\nfrom accel_trainer import load_best\n"
        f"print(load_best(make_model(), {str(tmp_path / 'run')!r})(torch.ones(1, 5)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    model.eval()
    assert done.stdout.strip() == str(model(torch.ones(1, 5)).tolist())


def test_a_history_with_nan_and_infinity_is_read_back(tmp_path):
    folder = RunFolder(tmp_path / "run")
    history = History()
    history.record(
        train_loss=math.inf, test_loss=math.nan, learning_rate=0.1, epoch_seconds=1.0, metrics={"m": -math.inf}
    )
    folder.append_history({"epoch": 1} | history.last())
    for line in (tmp_path / "run/history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    loaded = History.load(tmp_path / "run")
    assert loaded.train_losses == [math.inf] and math.isnan(loaded.test_losses[0])
    assert loaded.metrics == {"m": [-math.inf]}


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No history.jsonl in .*: is this a run_dir"):
        History.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="No best weights in"):
        load_best(make_model(), tmp_path)


# --- a run_dir that cannot be used ------------------------------------------------------------------------------------


def test_a_used_run_dir_is_refused_with_the_two_remedies_and_left_alone(tmp_path):
    fit(tmp_path / "run")
    before = (tmp_path / "run/history.jsonl").read_text()
    with pytest.raises(
        FileExistsError,
        match="holds a run already .config.json.. Continue it with resume=.auto., give another run_dir, or remove",
    ):
        fit(tmp_path / "run")
    assert (tmp_path / "run/history.jsonl").read_text() == before


def test_a_run_dir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        NotADirectoryError, match="run_dir .*file/run cannot be written: Not a directory. Give a run_dir"
    ):
        fit(tmp_path / "file" / "run")


def test_a_run_that_fails_before_its_first_epoch_leaves_the_name_free(tmp_path):
    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda outputs, targets: outputs,
        config=quiet(run_dir=tmp_path / "run"),
    )
    with pytest.raises(ValueError, match="must be a scalar"):
        trainer.fit(loader_of(make_data(37), 8))
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "run")


def used_run_dir(run_dir):
    try:
        fit(run_dir)
    except FileExistsError as error:
        return str(error)
    return "trained"


@pytest.mark.distributed
def test_a_used_run_dir_is_one_error_on_every_process(tmp_path):
    assert on_processes(2, used_run_dir, tmp_path / "run") == ["trained", "trained"]
    messages = on_processes(2, used_run_dir, tmp_path / "run")
    assert messages[0] == messages[1] and "holds a run already" in messages[0]


# --- a disk that fails ------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_warning_and_the_best_weights_stay_in_memory(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_files, "save_file", full)
    expected, plain = fit(None, num_epochs=3)
    with pytest.warns(UserWarning) as told:
        history, model = fit(tmp_path / "run", num_epochs=3)
    told = [str(one.message) for one in told]
    assert len(told) == 2 and all("No space left on device" in one for one in told)
    assert "best/model.safetensors" in told[0] and "The training goes on" in told[0]
    assert told[1].startswith("No checkpoint of this run could be written")
    assert history.train_losses == expected.train_losses
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert not list((tmp_path / "run").rglob("*.part"))


@pytest.mark.filterwarnings("ignore:Could not write")  # it may vanish in the midst of a write
def test_a_folder_that_vanishes_is_made_again(tmp_path):
    import shutil

    class Vanish(Callback):
        def on_epoch_end(self, trainer):
            while (
                trainer.state.epoch == 1 and (tmp_path / "run").exists()
            ):  # the best weights may be on their way there
                shutil.rmtree(tmp_path / "run", ignore_errors=True)

    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        callbacks=[Vanish()],
        config=quiet(num_epochs=3, run_dir=tmp_path / "run"),
    )
    history = trainer.fit(loader_of(make_data(37), 8), loader_of(make_data(11), 4))
    assert history.num_epochs == 3
    assert History.load(tmp_path / "run").train_losses == history.train_losses
    load_best(make_model(), tmp_path / "run")
    assert fault_of(tmp_path / "run/checkpoints/step_00000015") is None


# --- names and shapes of weights --------------------------------------------------------------------------------------


def best_of(model, run_dir, environment=None):
    os.environ.update(environment or {})
    fit(run_dir, model, num_epochs=1)
    return set(load_file(run_dir / "best" / "model.safetensors"))


def compiled_part():
    model = make_model()
    model[0] = torch.compile(model[0], backend="eager")
    return model


EAGER = {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}
KINDS = {
    "plain": (make_model, {}),
    "compiled by the launch": (make_model, EAGER),
    "compiled by the user": (lambda: torch.compile(make_model(), backend="eager"), {}),
    "compiled in part": (compiled_part, {}),
}


def saved_names(kind, run_dir):
    make, environment = KINDS[kind]
    names = best_of(make(), run_dir, environment)
    load_best(make(), run_dir), load_best(make_model(), run_dir)
    return names


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own insides
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_names_are_the_users_own(kind, num_processes, tmp_path):
    for names in on_processes(num_processes, saved_names, kind, tmp_path / "run"):
        assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(5, 3, bias=False)
        self.head = nn.Linear(5, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("long", torch.arange(6.0))
        self.register_buffer("view", self.long[2:4])
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(3))
        self.register_buffer("strided", torch.randn(4, 3).t())
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.register_buffer("temporary", torch.ones(1), persistent=False)

    def forward(self, inputs):
        return self.embedding(inputs) + self.head(inputs)


def test_tied_and_strided_and_shared_tensors_come_back(tmp_path):
    _, model = fit(tmp_path / "run", Tied())
    assert (
        sum(name in load_file(tmp_path / "run/best/model.safetensors") for name in ("embedding.weight", "head.weight"))
        == 1
    )
    other = load_best(Tied(), tmp_path / "run")
    assert other.head.weight is other.embedding.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    inputs = torch.randn(2, 5)
    assert torch.equal(model(inputs), other(inputs))


def test_weights_that_do_not_fit_are_named(tmp_path):
    fit(tmp_path / "run")
    other = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3), nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match=r"missing 3.weight; missing 3.bias; 0.weight is \(8, 5\) in the file and \(9, 5\)"
    ):
        load_best(other, tmp_path / "run")


def test_an_extra_state_is_refused_by_name():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match="The model's state '_extra_state' is a dict"):
        checked_state(Extra(1, 1))


def test_loaded_weights_do_not_hang_on_the_file(tmp_path):
    folder = RunFolder(tmp_path / "run")
    model = make_model()
    folder.save_best(model.state_dict(), {"epoch": 1})
    loaded = load_best(make_model(), tmp_path / "run")
    kept = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    for epoch in range(3):
        with torch.no_grad():
            model[0].weight.add_(1)
        folder.save_best(model.state_dict(), {"epoch": epoch})
    assert all(torch.equal(kept[name], tensor) for name, tensor in loaded.state_dict().items())


def one_folder(run_dir):
    history, _ = fit(run_dir)
    return {name: value for name, value in history.to_dict().items() if "second" not in name}


@pytest.mark.distributed
def test_only_the_main_process_writes_and_prints(tmp_path, capfd):
    one, two = on_processes(2, one_folder, tmp_path / "run")
    assert one == two
    rows = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert len(rows) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_broken_off_line_is_left_out_and_a_wrong_one_named(tmp_path):
    history, _ = fit(tmp_path / "run", num_epochs=3)
    path = tmp_path / "run" / "history.jsonl"
    whole = path.read_text()
    path.write_text(whole[: whole.index('"epoch": 3') + 40])
    assert History.load(tmp_path / "run").train_losses == history.train_losses[:2]
    path.write_text(whole.replace('"epoch": 2', '"epoch" 2'))
    with pytest.raises(ValueError, match=r"history.jsonl, line 2 is no line of a history"):
        History.load(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:Could not write")  # they may go in the midst of a write
def test_best_weights_that_are_gone_are_still_in_memory(tmp_path):
    class Remove(Callback):
        def on_epoch_end(self, trainer):
            if trainer.state.epoch == 3:
                (tmp_path / "run/best/model.safetensors").unlink(missing_ok=True)

    def weights(callbacks, run_dir):
        model = make_model()
        config = quiet(num_epochs=3, run_dir=run_dir, mode="max")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, config=config).fit(
            loader_of(make_data(37), 8)
        )
        assert history.best_epoch == 1
        return model.state_dict()

    expected, found = weights([], None), weights([Remove()], tmp_path / "run")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_damaged_weights_and_wrong_arguments_are_named(tmp_path):
    fit(tmp_path / "run")
    path = tmp_path / "run/best/model.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_best(make_model(), tmp_path / "run")
    with pytest.raises(TypeError, match="load_best takes a model and then a run_dir, got str first"):
        load_best("run", make_model())


def test_a_value_that_an_epoch_does_not_have_is_nan(tmp_path):
    """As of a metric that returns the classes that were predicted."""
    given = iter([{"a": 1.0}, {"a": 2.0, "b": 2.5}, {}, {"b": 4.0}])
    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        whole_metrics={"rep": lambda outputs, targets: next(given)},
        config=quiet(num_epochs=4, run_dir=tmp_path / "run"),
    )
    history = trainer.fit(loader_of(make_data(8)), loader_of(make_data(8)))
    expected = "{'rep/a': [1.0, 2.0, nan, nan], 'rep/b': [nan, 2.5, nan, 4.0]}"
    assert str(history.metrics) == str(History.load(tmp_path / "run").metrics) == expected
    assert (tmp_path / "run/report.html").exists()
