"""Files of divided models: shards that any number of processes reads, best weights in parts, all or nothing."""

import contextlib
import errno
import json
import os
import pickletools
import re
import shutil
import signal
import sys
import warnings
import weakref

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader, Subset

import accel_trainer.storage.checkpoints as checkpoints
import accel_trainer.storage.shared_folder as shared_folder
import accel_trainer.storage.weight_files as weight_files
from accel_trainer import Callback, WeightAverage, load_best
from accel_trainer.base.codec import with_checksum
from accel_trainer.base.dtensors import rows_of
from accel_trainer.storage.checkpoints import fault_of, steps_in
from accel_trainer.storage.saver import finish_writes
from accel_trainer.storage.shards import Parts, deal, fill
from accel_trainer.tools.cli import main
from support import LAYOUTS, ROOT, on_processes

sys.path.insert(0, str(ROOT / "tests" / "devices"))
from test_sharding import VOCABULARY, Language, choices, data, digest, refused, trainer_of

LAYOUTS = {"1": (1, None, {}), **LAYOUTS}


def run(run_dir, layout="1", callbacks=(), **other):
    """Train with files, in one process of a layout; return what must be the same on any."""
    _, sharding, environment = LAYOUTS[layout]
    os.environ.update(environment)
    torch.manual_seed(0)
    files = {"run_dir": run_dir, "checkpoint_every": 1, "keep_best": 2}
    config = {"bitwise": True, "num_epochs": 4, "sharding": sharding, **files, **other}
    trainer = trainer_of(Language(), callbacks=callbacks, **config)
    history = trainer.fit(DataLoader(data(), batch_size=16, shuffle=True), DataLoader(Subset(data(), range(21)), 8))
    return history.train_losses, history.test_losses, history.best_epoch, digest(trainer.model.state_dict())


def run_on(layout, run_dir, *args, **other):
    return on_processes(LAYOUTS[layout][0], lambda: run(run_dir, layout, *args, **other))[0]


def weights_in(run_dir, epoch=None):
    """Return the digest of the best weights of a run, or of those of an epoch."""
    torch.manual_seed(0)  # of the frozen weights, which files leave out
    return digest(load_best(Language(), run_dir, epoch).state_dict())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one process, and its folder."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return run(folder), folder


def kept_steps(run_dir):
    return [step for step, _ in steps_in(run_dir / "checkpoints")]


# --- any number reads any other's -------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize("writer, readers", [("4", ["1", "2", "3", "2x2"]), ("2x2", ["4", "1"]), ("1", ["3", "2x2"])])
def test_any_layout_goes_on_from_the_files_of_any_other(writer, readers, tmp_path, alone):
    expected, folder = alone
    run_on(writer, tmp_path / "first", max_steps=10)
    path = tmp_path / "first" / "checkpoints" / "step_00000010"
    assert json.loads((path / "manifest.json").read_text())["format"] == (1 if writer == "1" else 2)
    assert fault_of(path) is None
    for reader in readers:
        shutil.copytree(tmp_path / "first", tmp_path / reader)
        assert run_on(reader, tmp_path / reader, resume=True) == expected, reader
        assert weights_in(tmp_path / reader) == expected[-1] == weights_in(folder)
        assert weights_in(tmp_path / reader, 3) == weights_in(folder, 3)
        best = sorted(file.name for file in (tmp_path / reader / "best").glob("model*"))
        number = {"1": 1, "2x2": 2}.get(reader, LAYOUTS[reader][0])
        parts = [f"model-{index + 1:05d}-of-{number:05d}.safetensors" for index in range(number)]
        assert best == (["model.safetensors"] if number == 1 else [*parts, "model.safetensors.index.json"])


@pytest.mark.parametrize("num_rows, number", [(1, 3), (2, 4), (5, 4), (7, 2), (8, 8), (16, 3)])
def test_rows_are_those_of_torch_and_any_of_them_are_read(num_rows, number):
    value = torch.randn(num_rows, 3)
    chunks = [*torch.chunk(value, number), *[value[:0]] * number][:number]
    bounds = [rows_of(num_rows, index, number) for index in range(number)]
    assert [value[start:stop].tolist() for start, stop in bounds] == [chunk.tolist() for chunk in chunks]
    parts = Parts([value[start:stop] for start, stop in bounds], value.shape)
    assert torch.equal(parts.whole(), value)
    for start in range(num_rows):
        for stop in range(start, num_rows + 1):
            target = torch.full((stop - start, 3), -1.0)
            parts.copy_rows(target, start, stop)
            assert torch.equal(target, value[start:stop])
    target = torch.empty_like(value)
    fill(target, parts)
    assert torch.equal(target, value)
    with pytest.raises(ValueError, match="a part has the shape"):
        Parts([value[:0], *[value] * number], value.shape)


def test_tensors_are_dealt_in_order_and_evenly():
    sizes = {str(index): 1 + index % 3 for index in range(40)}
    for number in (1, 2, 3, 7, 40, 100):
        owners = deal(sizes, number)
        assert list(owners.values()) == sorted(owners.values())
        assert set(owners.values()) == set(range(len({*owners.values()})))
        loads = [sum(sizes[name] for name, owner in owners.items() if owner == one) for one in {*owners.values()}]
        assert max(loads) <= sum(sizes.values()) / number + max(sizes.values())


@pytest.mark.distributed
@pytest.mark.parametrize("writer, reader", [("3", "2"), ("2", "1"), ("1", "3")])
def test_an_average_of_the_weights_goes_on_in_any_layout(writer, reader, tmp_path):
    average = [WeightAverage(0.9)]
    expected = run(tmp_path / "alone", callbacks=average)
    run_on(writer, tmp_path / "run", average, max_steps=10)
    assert run_on(reader, tmp_path / "run", average, resume=True) == expected


# --- what the files are -----------------------------------------------------------------------------------------------


def is_pickle(content):
    with contextlib.suppress(ValueError, EOFError, UnicodeDecodeError):
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(content))
    return False


@pytest.mark.distributed
def test_nothing_in_the_files_can_execute_and_no_file_holds_much_more_than_its_share(tmp_path):
    run_on("3", tmp_path / "run", max_steps=10)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".png", ".html", ".lock", ""}
    for path in files:
        assert not is_pickle(path.read_bytes()), path
        if path.suffix == ".safetensors":
            load_file(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
    sizes = {name: one.numel() * 4 for name, one in Language().state_dict().items()}
    for path in (tmp_path / "run/best").glob("model-*"):
        held = {name: tensor.nbytes for name, tensor in load_file(path).items()}
        assert sum(held.values()) <= sum(sizes.values()) / 3 + max(sizes.values())
    shards = sorted((tmp_path / "run").rglob("step_00000010/model-*"))
    assert [len(load_file(path)["blocks.1.wide.weight"]) for path in shards] == [12, 12, 11]


def live_bytes_of_saves(run_dir):
    """Return the most bytes of gathered weights that were alive on this process, and those of the whole model."""
    alive, most, gather = set(), [0], shared_folder.gather_rows

    def counted(*args):
        whole = gather(*args)
        if whole is not None:
            key = (id(whole), whole.nbytes)
            alive.add(key)
            weakref.finalize(whole, alive.discard, key)
            most[0] = max(most[0], sum(size for _, size in alive))
        return whole

    shared_folder.gather_rows = counted
    run(run_dir, "4", num_epochs=2, keep_best=1)
    return most[0], sum(tensor.nbytes for tensor in Language().state_dict().values())


@pytest.mark.distributed
def test_no_process_ever_gathers_a_whole_model(tmp_path):
    for most, whole in on_processes(4, live_bytes_of_saves, tmp_path / "run"):
        assert 0 < most < 0.6 * whole  # the best of this epoch, and that of the one before until it is replaced


def pretrained_model():
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **small), add_pooling_layer=False)


def train_pretrained(run_dir, sharding):
    from accel_trainer import Trainer

    model = pretrained_model()
    config = choices(num_epochs=1, run_dir=run_dir, sharding=sharding, bitwise=True)

    def compute_loss(model, batch):
        return model(batch[0]).last_hidden_state.square().mean()

    trainer = Trainer(model, torch.optim.AdamW(model.parameters()), compute_loss=compute_loss, config=config)
    trainer.fit(DataLoader(data(16), batch_size=8))
    return digest(model.state_dict())


@pytest.mark.distributed
def test_transformers_reads_the_best_weights(tmp_path):
    from transformers import AutoModel

    expected = train_pretrained(tmp_path / "alone", None)
    assert on_processes(2, train_pretrained, tmp_path / "run", "full")[0] == expected
    assert len(list((tmp_path / "run/best").glob("model-0000?-of-00002.safetensors"))) == 2
    model = AutoModel.from_pretrained(tmp_path / "run/best", add_pooling_layer=False)
    assert digest(model.state_dict()) == expected


# --- all or nothing ---------------------------------------------------------------------------------------------------


class KilledInWrite(Callback):
    """Kill one process in the write of the checkpoint of a step."""

    def __init__(self, process, step):
        self.process, self.step = process, step

    def on_fit_start(self, trainer):
        if torch.distributed.get_rank() == self.process:
            save = checkpoints.save_tensors

            def save_or_die(path, *args, **how):
                if f"step_{self.step:08d}" in str(path) and "optimizer" in path.name:
                    os.kill(os.getpid(), signal.SIGKILL)
                return save(path, *args, **how)

            checkpoints.save_tensors = save_or_die


@pytest.mark.distributed
@pytest.mark.parametrize("process", [0, 2])
def test_a_kill_of_one_writer_leaves_the_older_checkpoints(process, tmp_path, alone):
    expected, _ = alone
    with pytest.raises(ProcessExitedException):
        run_on("3", tmp_path / "run", [KilledInWrite(process, 6)])
    assert kept_steps(tmp_path / "run") == [5, 4]
    assert run_on("2", tmp_path / "run", resume=True) == expected
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


@pytest.mark.distributed
@pytest.mark.parametrize("damage", ["a bit", "shorter", "gone", "index"])
def test_a_damaged_shard_is_passed_over(damage, tmp_path, alone):
    expected, _ = alone
    run_on("2", tmp_path / "run", max_steps=10)
    newest = tmp_path / "run/checkpoints/step_00000010"
    shard = newest / ("index.json" if damage == "index" else "optimizer-00002-of-00002.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content[:-1] if damage == "shorter" else content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_on("1", tmp_path / "run", resume=True) == expected
    (text,) = [str(warning.message) for warning in caught if "Passed over" in str(warning.message)]
    assert f"step_00000010: {'' if damage != 'gone' else shard.name}" in text and shard.name in text


class FullDisk(Callback):
    """Let no write of one process succeed from a step to another."""

    def __init__(self, process, first, last):
        self.process, self.steps = process, range(first, last + 1)

    def on_fit_start(self, trainer):
        if torch.distributed.get_rank() == self.process:
            for module in (checkpoints, weight_files):
                module.save_tensors = self._failing(module.save_tensors, trainer)

    def _failing(self, save, trainer):
        def failing(*args, **how):
            if trainer.state.step in self.steps:
                raise OSError(28, "No space left on device")
            return save(*args, **how)

        return failing


def run_with_full_disk(run_dir, process):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(run_dir, "2", [FullDisk(process, 3, 5)])
    return result, [str(warning.message) for warning in caught]


@pytest.mark.distributed
@pytest.mark.parametrize("process", [0, 1])
def test_a_full_disk_of_one_process_ends_nothing_and_the_next_save_tries_again(process, tmp_path, alone):
    expected, _ = alone
    (result, texts), (other, none) = on_processes(2, run_with_full_disk, tmp_path / "run", process)
    assert result == other == expected and not none
    assert texts and all("Could not write" in text and "No space left on device" in text for text in texts)
    assert max(kept_steps(tmp_path / "run")) == 16 and weights_in(tmp_path / "run") == expected[-1]
    assert all(fault_of(path) is None for _, path in steps_in(tmp_path / "run/checkpoints"))


class Crash(BaseException):
    pass


def counting(original, calls):
    """Return a function that calls another as often as there are calls left, and then ends the program, as it were."""

    def counted(*args, **how):
        if next(calls, None) is None:
            raise Crash
        return original(*args, **how)

    return counted


@pytest.mark.parametrize("old", ["one file", "parts", "more parts"])
def test_a_crash_between_any_two_renames_loses_neither_old_nor_new_weights(old, tmp_path, monkeypatch):
    """The weights are the old ones up to one moment and the new ones from then on, once the crash is made good."""
    tensors = {name: torch.full((3,), 1.0) for name in "abcd"}

    def write(folder, value, number):
        path = folder / "model.safetensors"
        named = {name: tensor * value for name, tensor in tensors.items()}
        if number == 1:
            weight_files.save_weights(path, named, {"epoch": value})
            return
        owners = deal(dict.fromkeys(named, 12), number)
        dealt = [{name: one for name, one in named.items() if owners[name] == index} for index in range(number)]
        parts = [weight_files.write_part(path, index, number, part) for index, part in enumerate(dealt)]
        weight_files.put_parts_in_place(path, parts, {"epoch": value})

    seen = []
    for moment in range(60):
        folder = tmp_path / f"{old} {moment}"
        folder.mkdir()
        write(folder, 1, {"one file": 1, "parts": 2, "more parts": 4}[old])
        calls = iter(range(moment))
        with monkeypatch.context() as patched:
            for module, name in ((os, "replace"), (os, "fsync"), (type(folder), "unlink")):
                patched.setattr(module, name, counting(getattr(module, name), calls))
            try:
                write(folder, 2, 3)
                is_done = True
            except Crash:
                is_done = False
        path = folder / "model.safetensors"
        weight_files.clean(path)
        weight_files.check(path)
        epoch = weight_files.metadata_of(path)["epoch"]
        assert all(torch.equal(one, tensors[name] * epoch) for name, one in weight_files.read_weights(path).items())
        assert len(weight_files.read_weights(path)) == 4
        files = sorted(file.name for file in folder.iterdir())
        assert files == sorted(file.name for file in weight_files.files_of(path)), moment
        seen.append(epoch)
        if is_done:
            break
    assert seen == sorted(seen) and set(seen) == {1, 2} and is_done


def test_an_index_that_is_damaged_before_the_last_rename_leaves_the_old_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    weight_files.save_weights(path, {"a": torch.tensor([1.0])}, {"epoch": 1})
    weight_files.write_part(path, 0, 2, {"a": torch.tensor([2.0])})
    (tmp_path / ".model.safetensors.index.json.next").write_text("{ damaged")
    weight_files.clean(path)
    weight_files.check(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert weight_files.read_weights(path)["a"] == 1


class Damage(Callback):
    """Damage the best weights after the third epoch."""

    def __init__(self, file):
        self.file = file

    def on_epoch_end(self, trainer):
        if trainer.state.epoch == 3 and torch.distributed.get_rank() == 0:
            finish_writes()
            self.file.unlink() if self.file.suffix == ".safetensors" else self.file.write_text("{}")


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_best_weights_that_are_damaged_meanwhile_do_not_keep_checkpoints_from_being_written(name, tmp_path, alone):
    how = {"monitor": "train_loss", "mode": "max", "restore_best": False}  # no better ones come
    damage = [Damage(tmp_path / "run/best" / name)]
    losses, *_ = run_on("2", tmp_path / "run", damage, keep_best=1, **how)
    assert losses == alone[0][0] and not weight_files.are_complete(tmp_path / "run/best/model.safetensors")
    assert [fault_of(path) for _, path in steps_in(tmp_path / "run/checkpoints")] == [None, None]
    assert kept_steps(tmp_path / "run")[0] == 16


def test_parts_of_other_weights_are_found(tmp_path):
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "model.safetensors"
        parts = [weight_files.write_part(path, 0, 2, {"a": torch.tensor([value])})]
        parts.append(weight_files.write_part(path, 1, 2, {"b": torch.tensor([value])}))
        weight_files.put_parts_in_place(path, parts, {"epoch": 1})
    path = tmp_path / "one/model.safetensors"
    weight_files.check(path)
    shutil.copy(tmp_path / "two/model-00002-of-00002.safetensors", tmp_path / "one")
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors belongs to other weights"):
        weight_files.check(path)
    save_file({"b": torch.tensor([3.0])}, tmp_path / "one/model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="carries no checksum"):
        weight_files.check(path)


def run_apart(tmp_path, kind):
    rank, touch = torch.distributed.get_rank(), type(tmp_path).touch
    if kind == "unseen" and rank:
        type(tmp_path).is_file = lambda path: False
    if kind == "read only" and rank:
        type(tmp_path).touch = fail_with_read_only
    if kind == "of main" and not rank:
        type(tmp_path).touch = fail_with_read_only
    try:
        return refused(run, tmp_path / (f"disk {rank}" if kind == "elsewhere" else "disk"), "2")
    finally:
        type(tmp_path).touch = touch


def fail_with_read_only(path):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.distributed
def test_a_folder_that_not_all_processes_see_is_refused(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(shared_folder, "_SECONDS_TO_BE_SEEN", 0.5)
    for text in on_processes(2, run_apart, tmp_path, "unseen"):
        assert "Processes [1] do not see" in text and "on a disk that all hosts share" in text
    for text in on_processes(2, run_apart, tmp_path, "elsewhere"):
        assert f"Process 1 was given the run_dir {tmp_path}/disk 1, and the main process {tmp_path}/disk 0" in text
    for text in on_processes(2, run_apart, tmp_path, "read only"):
        assert f"Processes [1] cannot write in run_dir {tmp_path}/disk: Read-only file system" in text
    assert not list(tmp_path.iterdir())
    for text in on_processes(2, run_apart, tmp_path, "of main"):
        assert f"run_dir {tmp_path}/disk cannot be written: Read-only file system. Give a run_dir" in text


@pytest.mark.distributed
def test_damage_of_all_checkpoints_is_told_on_all_processes(tmp_path, capfd):
    run_on("2", tmp_path / "run", max_steps=8)
    for _, checkpoint in steps_in(tmp_path / "run/checkpoints"):
        flip(checkpoint / PART)
    for text in on_processes(2, refused, lambda: run(tmp_path / "run", "2", resume=True)):
        assert "the checksum of model-00002-of-00002.safetensors does not match" in text and "has ended" not in text


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


PART = "model-00002-of-00002.safetensors"
DAMAGES = {
    f"{PART}: its checksum does not match": lambda best: flip(best / PART),
    f"{PART} is not a file": lambda best: (best / PART).unlink() or (best / PART).mkdir(),
    f"{PART} is missing": lambda best: (best / PART).unlink(),
    "model.safetensors.index.json: maximum recursion": lambda best: index_of(best).write_text("[" * 10**5),
    "model.safetensors.index.json: it carries no checksum": lambda best: index_of(best).write_text("{}"),
    "model.safetensors.index.json: 'NoneType'": lambda best: write_index(best, {"metadata": None}),
    "model.safetensors.index.json: 'list'": lambda best: write_index(best, {"metadata": {"sha256": []}}),
    "model.safetensors.index.json names files": lambda best: write_index(best, {"metadata": {"sha256": {PART: 3}}}),
    "the metadata of the index make no sense": lambda best: drop_metadata(best),
}


def index_of(best):
    return best / "model.safetensors.index.json"


def write_index(best, content):
    index_of(best).write_text(json.dumps(with_checksum(content)))


def drop_metadata(best):
    content = json.loads(index_of(best).read_text())
    del content["metadata"]["accel_trainer"], content["checksum"]
    write_index(best, content)


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """The folder of a run on two processes, its frozen weights not left out."""
    folder = tmp_path_factory.mktemp("divided") / "run"
    on_processes(2, lambda: run(folder, "2"))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("told", DAMAGES)
def test_what_is_damaged_of_the_best_weights_is_named(told, divided, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(divided, folder)
    DAMAGES[told](folder / "best")
    with pytest.raises(ValueError, match=re.escape(f"{folder}/best is damaged: {told}")):
        load_best(Language(), folder)
    assert main(["export", str(folder)]) == 2
    assert f"{folder}/best is damaged: {told}" in capsys.readouterr().err


@pytest.mark.distributed
def test_the_best_epoch_is_restored_and_patience_ends_the_run_as_on_one_process(tmp_path):
    how = {"num_epochs": 12, "patience": 2, "keep_best": 1, "checkpoint_every": None}
    losses, tests, best, weights = expected = run(tmp_path / "alone", monitor="train_loss", mode="max", **how)
    assert best < len(losses) < 12  # it is not the last
    assert run_on("3", tmp_path / "run", monitor="train_loss", mode="max", **how) == expected
    assert run_on("2", None, monitor="train_loss", mode="max", **{**how}) == expected
