"""Nothing on the disk is taken on trust: damaged files are refused or replaced, and what is said comes from them."""

import errno
import hashlib
import json
import random
import re
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from accel_trainer import Callback, CheckpointError, TrainConfig, Trainer, load_best
from accel_trainer.base.codec import checked, with_checksum
from accel_trainer.history import History
from accel_trainer.storage.checkpoints import fault_of, steps_in
from accel_trainer.storage.run_folder import RunFolder
from accel_trainer.storage.saver import Saver, finish_writes
from accel_trainer.storage.tensor_files import metadata_of
from accel_trainer.tools.cli import main
from accel_trainer.view import report
from accel_trainer.view.report import RunFiles, render
from support import loader_of, make_data, quiet

pytestmark = pytest.mark.usefixtures("drawn_once")

BEST = "best/model.safetensors"


class Scripted(nn.Module):
    """A model whose weight counts the steps, under a loss that is told by epoch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(300))

    def forward(self, inputs):
        return self.weight.sum() + 0 * inputs.sum()


def scripted(losses, run_dir, callbacks=(), **choices):
    """Train so that each epoch adds 1 to the weight and has the given test loss."""
    model = Scripted()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def loss_fn(outputs, targets):
        if torch.is_grad_enabled():
            return -outputs
        return outputs.detach() * 0 + losses[trainer.state.epoch - 1]

    config = quiet(**{"num_epochs": len(losses), "run_dir": run_dir, "keep_checkpoints": 3, **choices})
    trainer = Trainer(model, optimizer, loss_fn, callbacks=callbacks, config=config)
    loader = loader_of(make_data(4), 4)
    return trainer.fit(loader, loader), trainer


def weight_of(model):
    return float(model.weight.detach()[0])


def flip(path, dice):
    content = bytearray(path.read_bytes())
    place = dice.randrange(len(content) * 8)
    content[place // 8] ^= 1 << place % 8
    path.unlink()  # not through the other names of the file
    path.write_bytes(content)


# --- single bits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    _, trainer = scripted([5.0, 4.0, 4.5, 4.25], run_dir)
    trainer.evaluate(loader_of(make_data(4), 4))
    with pytest.MonkeyPatch.context() as patch:  # of no use here, and slow
        patch.setattr(report, "draw_assessment", lambda path, details: path.write_bytes(b""))
        for kind, loss_fn, data in (
            ("classification", nn.CrossEntropyLoss(), make_data(12)),
            ("regression", nn.MSELoss(), TensorDataset(torch.ones(3, 5), torch.ones(3, 3))),
        ):
            model = nn.Linear(5, 3)
            Trainer(model, None, loss_fn).evaluate(loader_of(data, 4), kind, run_dir=run_dir)
    return run_dir


def test_no_flipped_bit_of_the_best_weights_is_loaded(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    content, dice = (whole / BEST).read_bytes(), random.Random(0)
    for _ in range(400):
        (tmp_path / "run" / BEST).write_bytes(content)
        flip(tmp_path / "run" / BEST, dice)
        with pytest.raises(ValueError, match="is damaged"):
            load_best(Scripted(), tmp_path / "run")
    assert weight_of(load_best(Scripted(), whole)) == 2.0


@pytest.mark.parametrize("bit", range(8))
def test_a_damaged_end_of_the_last_line_is_no_write_that_was_broken_off(bit, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    content = bytearray((whole / "history.jsonl").read_bytes())
    content[-1] ^= 1 << bit
    (tmp_path / "run" / "history.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="is no line of a history"):
        History.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["history.jsonl", "config.json", "environment.json", "evaluations.json"])
def test_no_flipped_bit_of_a_record_is_shown(name, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    content, dice = (whole / name).read_bytes(), random.Random(1)
    expected = vars(RunFiles.load(whole)) | {"path": None, "changed": None, "name": None, "state": None}
    refused = 0
    for _ in range(400):
        (tmp_path / "run" / name).write_bytes(content)
        flip(tmp_path / "run" / name, dice)
        try:
            found = vars(RunFiles.load(tmp_path / "run"))
        except ValueError as error:
            assert name in str(error)
            refused += 1
        else:  # another spelling of the same, such as a small letter of an escape
            assert found | {"path": None, "changed": None, "name": None, "state": None} == expected
    assert refused > 380


def test_no_flipped_bit_of_a_history_is_read(whole, tmp_path):
    content, dice, expected = (whole / "history.jsonl").read_bytes(), random.Random(2), History.load(whole)
    for _ in range(400):
        (tmp_path / "history.jsonl").write_bytes(content)
        flip(tmp_path / "history.jsonl", dice)
        try:
            assert History.load(tmp_path) == expected or not (tmp_path / "history.jsonl").read_bytes().endswith(b"\n")
        except ValueError as error:
            assert "history.jsonl, line" in str(error)


def files_of(run_dir):
    return [path.relative_to(run_dir) for path in sorted(run_dir.rglob("*")) if path.is_file() and path.name != ".lock"]


@pytest.mark.filterwarnings("ignore:Passed over")
@pytest.mark.filterwarnings("ignore:The best weights")
def test_no_flipped_bit_of_any_file_changes_how_a_run_goes_on(tmp_path):
    losses = [5.0, 4.0, 4.5, 4.25]
    scripted(losses, tmp_path / "whole")
    outcomes = set()
    dice = random.Random(3)
    for _ in range(2):
        for name in files_of(tmp_path / "whole"):
            shutil.copytree(tmp_path / "whole", tmp_path / "run")
            flip(tmp_path / "run" / name, dice)
            history, trainer = scripted([*losses, 3.0, 3.5], tmp_path / "run", resume=True)
            outcomes.add((tuple(history.test_losses), weight_of(trainer.model)))
            assert history.best_epoch == 5 and weight_of(load_best(Scripted(), tmp_path / "run")) == 5.0
            shutil.rmtree(tmp_path / "run")
    assert outcomes == {((5.0, 4.0, 4.5, 4.25, 3.0, 3.5), 5.0)}


# --- content of the wrong shape ---------------------------------------------------------------------------------------

ESCAPE = "\x1b[2J"
SHAPES = [None, True, -1, 2.5, 10**400, "nan", ESCAPE, [], {}, [[None]], {ESCAPE: ESCAPE}]
RECORDS = ("config.json", "environment.json", "evaluations.json", "history.jsonl")


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(value, path, shape):
    """Return plain data with another thing at a place in it; without what is there, for an `Ellipsis`."""
    if not path:
        return None if shape is ... else shape
    if path[1:] or shape is not ...:
        new = {path[0]: put(value[path[0]], path[1:], shape)}
        return value | new if isinstance(value, dict) else [new.get(key, item) for key, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if key != path[0]}
    return [item for key, item in enumerate(value) if key != path[0]]


def sealed(content):
    if isinstance(content, list):
        return [with_checksum(one) if isinstance(one, dict) else one for one in content]
    return with_checksum(content) if isinstance(content, dict) else content


def senseless(path, dice, number):
    """Yield the text of a file with something else in one place each time, under a right checksum."""
    parts = path.read_text().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_text()]
    cases = []
    for line in {0, len(parts) - 1}:
        content = json.loads(parts[line])
        if path.name != "manifest.json":
            content = list(map(checked, content)) if isinstance(content, list) else checked(content)
        cases += [(line, put(content, place, shape)) for place in places(content) for shape in (*SHAPES, ...)]
    for line, changed in dice.sample(cases, min(number, len(cases))):
        changed = changed if path.name == "manifest.json" else sealed(changed)
        yield "".join([*parts[:line], json.dumps(changed) + "\n", *parts[line + 1 :]])


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_any_shape_is_shown_or_refused_by_its_name(name, whole, tmp_path, capsys):
    for run in ("bad", "good"):
        shutil.copytree(whole, tmp_path / run)
    shown = 0
    for number, text in enumerate(senseless(whole / name, random.Random(4), 300)):
        (tmp_path / "bad" / name).write_text(text)
        try:
            record = RunFiles.load(tmp_path / "bad")
        except ValueError as error:
            assert name in str(error)
        else:
            render([record])
            render([record, RunFiles.load(whole)])
            shown += 1
        if number % 5 == 0 or name == "history.jsonl":
            assert main(["runs", str(tmp_path)]) == 0
            printed = capsys.readouterr()
            assert "good" in printed.out and ("bad" in printed.out or "bad is left out: " in printed.err)
            assert ESCAPE not in printed.out + printed.err
    assert 0 < shown < 300


def test_a_line_of_a_history_needs_a_train_loss_and_nothing_else(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    row = checked(json.loads((whole / "history.jsonl").read_text().splitlines()[0]))
    for names, is_taken in ((["samples_per_second"], True), (["train_loss"], False), ([*row][3:-2], True)):
        left = {name: value for name, value in row.items() if name not in names or name == "metrics"}
        left |= {"epoch_seconds": "nan"} if "epoch_seconds" in left else {}
        (tmp_path / "run/history.jsonl").write_text(json.dumps(with_checksum(left)) + "\n")
        if is_taken:
            assert RunFiles.load(tmp_path / "run").history.train_losses == [row["train_loss"]]
            render([RunFiles.load(tmp_path / "run")])
        else:
            with pytest.raises(ValueError, match="history.jsonl, line 1 is no line of a history: KeyError"):
                RunFiles.load(tmp_path / "run")


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("text", ["", "[" * 10**5, '{"a":' * 900 + "1" + "}" * 900, "\0", '"' + "9" * 5000, "9" * 5000])
def test_a_record_that_no_json_reads_is_refused_by_its_name(name, text, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / name).write_text(text + "\n" if text else "\n")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run" / name))):
        RunFiles.load(tmp_path / "run")


def test_a_run_with_senseless_choices_is_evaluated_under_no_others(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "runs.py").write_text(RUNS)
    config = checked(json.loads((whole / "config.json").read_text()))
    for choice, value in (("num_epochs", ESCAPE), ("mode", [[]]), ("trackers", {"a": 1}), ("project", None)):
        changed = with_checksum(put(config, ("asked", choice), value))
        (tmp_path / "run/config.json").write_text(json.dumps(changed))
        assert main(["evaluate", f"{tmp_path / 'runs.py'}:run", str(tmp_path / "run")]) == 2
        told = capsys.readouterr().err
        assert "run/config.json cannot be used: " in told and choice in told and ESCAPE not in told


def test_what_another_run_calls_itself_is_told_without_its_escapes(whole, tmp_path):
    (tmp_path / "run").mkdir()
    config = checked(json.loads((whole / "config.json").read_text()))
    changed = with_checksum(config | {"identity": {ESCAPE: 1}})
    (tmp_path / "run/config.json").write_text(json.dumps(changed))
    with pytest.raises(FileExistsError, match=r"another run, without a checkpoint \(\?\[2J differ\)"):
        scripted([5.0], tmp_path / "run", resume="auto")


def test_what_is_wrong_with_a_checkpoint_is_told_without_escapes(whole, tmp_path):
    checkpoint = tmp_path / "step_00000004"
    shutil.copytree(whole / "checkpoints/step_00000004", checkpoint)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for place in places(manifest):
        for changed in (put(manifest, place, ESCAPE), put(manifest, place, {ESCAPE: ESCAPE})):
            (checkpoint / "manifest.json").write_text(json.dumps(changed))
            assert ESCAPE not in (fault_of(checkpoint) or "")


@pytest.mark.parametrize("name", ["manifest.json", "history.jsonl"])
def test_a_checkpoint_of_any_shape_is_gone_on_from_or_refused(name, whole, tmp_path):
    checkpoint = "checkpoints/step_00000004"
    refused = 0
    for text in senseless(whole / checkpoint / name, random.Random(5), 60):
        shutil.copytree(whole, tmp_path / "run")
        for step in (2, 3):
            shutil.rmtree(tmp_path / f"run/checkpoints/step_0000000{step}")
        (tmp_path / "run" / checkpoint / name).write_text(text)
        if name != "manifest.json":
            manifest = json.loads((whole / checkpoint / "manifest.json").read_text())
            manifest["files"][name] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            (tmp_path / "run" / checkpoint / "manifest.json").write_text(json.dumps(manifest))
        try:
            scripted([5.0, 4.0, 4.5, 4.25, 4.1], tmp_path / "run", resume=True)
        except CheckpointError as error:
            assert ESCAPE not in str(error)
            refused += 1
        shutil.rmtree(tmp_path / "run")
    assert 10 < refused < 60


# --- the best weights -------------------------------------------------------------------------------------------------


def test_a_damaged_best_is_replaced_by_its_copy(tmp_path):
    for damaged in (BEST, "checkpoints/step_00000004/" + BEST):
        scripted([5.0, 4.0, 4.5, 4.25], tmp_path / "run")
        flip(tmp_path / "run" / damaged, random.Random(0))
        history, trainer = scripted([5.0, 4.0, 4.5, 4.25, 4.1], tmp_path / "run", resume="auto")
        assert history.best_epoch == 2 and weight_of(trainer.model) == 2.0
        assert weight_of(load_best(Scripted(), tmp_path / "run")) == 2.0
        shutil.rmtree(tmp_path / "run")


def test_where_all_copies_are_damaged_an_older_best_takes_their_place_aloud(tmp_path):
    scripted([5.0, 4.0, 3.0, 4.25], tmp_path / "run", keep_checkpoints=4)
    for name in (BEST, *(f"checkpoints/step_0000000{step}/{BEST}" for step in (3, 4))):
        flip(tmp_path / "run" / name, random.Random(0))
    with pytest.warns(
        UserWarning, match="The best weights, of epoch 3, are damaged: those of epoch 2 take their place"
    ):
        history, trainer = scripted([5.0, 4.0, 3.0, 4.25, 4.5], tmp_path / "run", resume=True)
    assert (history.best_epoch, history.best_value) == (2, 4.0) and weight_of(trainer.model) == 2.0
    assert json.loads((tmp_path / "run/history.jsonl").read_text().splitlines()[-1])["best_epoch"] == 2


@pytest.mark.parametrize("how", [lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: None])
def test_where_no_best_is_whole_the_next_epoch_is_the_best_so_far(how, tmp_path):
    scripted([5.0, 4.0, 3.0], tmp_path / "run", keep_checkpoints=1)
    for name in (BEST, f"checkpoints/step_00000003/{BEST}"):
        flip(tmp_path / "run" / name, random.Random(0))
        how(tmp_path / "run" / name)
    with pytest.warns(UserWarning, match="The best weights, of epoch 3, are damaged: there are none from here on"):
        history, trainer = scripted([5.0, 4.0, 3.0, 6.0], tmp_path / "run", resume="auto")
    assert (history.best_epoch, history.best_value) == (4, 6.0) and weight_of(trainer.model) == 4.0


def test_best_weights_of_another_program_are_refused(tmp_path):
    from safetensors.torch import save_file

    scripted([5.0, 4.0], tmp_path / "run")
    save_file(load_file(tmp_path / "run" / BEST), tmp_path / "run" / BEST)
    with pytest.raises(ValueError, match="is damaged: it carries no checksum"):
        load_best(Scripted(), tmp_path / "run")


# --- a run that was there before --------------------------------------------------------------------------------------


def test_a_run_that_has_ended_is_never_begun_anew(tmp_path):
    scripted([5.0, 4.0, 3.0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files_of(tmp_path / "run")}
    for resume in ("auto", True, False):
        with pytest.raises(FileExistsError, match="Give another\\s+run_dir, or remove the folder|give another"):
            scripted([5.0, 4.0, 3.0], tmp_path / "run", resume=resume)
        assert {name: (tmp_path / "run" / name).read_bytes() for name in files_of(tmp_path / "run")} == before


def test_what_a_run_cut_short_has_left_is_set_aside(tmp_path, capsys):
    class Dies(Callback):
        def on_epoch_end(self, trainer):
            if trainer.state.epoch == 2:
                raise ZeroDivisionError

    for number in (1, 2):
        with pytest.raises(ZeroDivisionError):
            scripted([5.0, 4.0, 3.0], tmp_path / "run", [Dies()], checkpoint_every=100, resume="auto")
        earlier = [path.name for path in sorted((tmp_path / "run").glob("earlier_*"))]
        assert earlier == [f"earlier_{one}" for one in range(1, number)]
    capsys.readouterr()
    history, _ = scripted([5.0, 4.0, 3.0], tmp_path / "run", resume="auto", verbose=True)
    assert "has no checkpoint: this is a new run. What was there is in earlier_2." in capsys.readouterr().out
    assert history.num_epochs == 3
    for number in (1, 2):
        assert weight_of(load_best(Scripted(), tmp_path / f"run/earlier_{number}")) == 2.0
        assert History.load(tmp_path / f"run/earlier_{number}").test_losses == [5.0, 4.0]


# --- a disk that is full ----------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch):
    """Return what fills the disk for files whose path contains a word."""
    words = []
    original = RunFolder.save_best, RunFolder.save_checkpoint

    def refuse(word, write):
        def attempt(self, *args, **kwargs):
            if word in words:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, *args, **kwargs)

        return attempt

    monkeypatch.setattr(RunFolder, "save_best", refuse("best", original[0]))
    monkeypatch.setattr(RunFolder, "save_checkpoint", refuse("checkpoints", original[1]))
    return words.extend


def test_the_end_tells_what_is_on_a_full_disk(tmp_path, full, capsys):
    class Fills(Callback):
        def on_epoch_start(self, trainer):
            if trainer.state.epoch == 3:
                finish_writes()
                full(["best", "checkpoints"])

    with pytest.warns(UserWarning, match="No space left on device"):
        history, trainer = scripted([5.0, 4.0, 3.0, 2.0], tmp_path / "run", [Fills()], verbose=True)
    said = capsys.readouterr().out
    assert history.best_epoch == 4 and weight_of(trainer.model) == 4.0  # from memory
    assert "Best epoch 4: test_loss 2.0000; the model holds its weights." in said
    assert re.search(r"Files in \S*run: report.html, losses.png, history.jsonl\.\n", said)
    assert "Not written, so older or missing there: best/model.safetensors, checkpoints." in said
    assert "The best weights on the disk are those of epoch 2." in said
    assert (
        metadata_of(tmp_path / "run" / BEST)["epoch"] == 2 and weight_of(load_best(Scripted(), tmp_path / "run")) == 2
    )


RUNS = """
import torch
from torch.utils.data import DataLoader, TensorDataset
def run(config):
    model = torch.nn.Linear(1, 1)
    loader = DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "loss_fn": torch.nn.MSELoss(),
            "train_loader": loader, "test_loader": loader}
"""


def test_evaluate_names_the_epoch_of_the_file_that_it_reads(tmp_path, full, capsys):
    class Fills(Callback):
        def on_epoch_start(self, trainer):
            if trainer.state.epoch == 3:
                finish_writes()
                full(["best"])

    (tmp_path / "runs.py").write_text(RUNS)
    namespace = {}
    exec(RUNS, namespace)
    arguments = namespace["run"](None)
    loaders = arguments.pop("train_loader"), arguments.pop("test_loader")
    config = TrainConfig(num_epochs=4, run_dir=tmp_path / "run", verbose=False)
    with pytest.warns(UserWarning, match="No space left on device"):
        history = Trainer(**arguments, config=config, callbacks=[Fills()]).fit(*loaders)
    assert history.best_epoch == 4
    assert main(["evaluate", f"{tmp_path / 'runs.py'}:run", str(tmp_path / "run")]) == 0
    assert "test_loader with the weights of epoch 2: loss" in capsys.readouterr().out


def test_a_write_that_failed_never_ends_up_under_another_header(tmp_path, monkeypatch):
    """The best is tried again while a checkpoint is written; the next best must not come into that."""
    begun, may_end = threading.Event(), threading.Event()
    save_best, tries = RunFolder.save_best, []

    def slow(self, tensors, metadata):
        tries.append(metadata["epoch"])
        if tries == [1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        if len(tries) == 2:  # with the checkpoint of epoch 1
            begun.set()
            may_end.wait(1.0)
        save_best(self, tensors, metadata)

    monkeypatch.setattr(RunFolder, "save_best", slow)
    keep = Saver.keep_best

    def release(self, training, metadata):
        threading.Timer(0.3, may_end.set).start()
        keep(self, training, metadata)

    monkeypatch.setattr(Saver, "keep_best", release)
    with pytest.warns(UserWarning, match="No space left on device"):
        scripted([5.0, 4.0, 3.0], tmp_path / "run")
    files = [tmp_path / "run" / BEST, *(path / BEST for _, path in steps_in(tmp_path / "run/checkpoints"))]
    held = [(metadata_of(file)["epoch"], float(load_file(file)["weight"][0])) for file in files]
    assert held == [(3, 3.0), (3, 3.0), (2, 2.0), (1, 1.0)]
