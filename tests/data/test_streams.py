"""Streams read by shards: the same batches on any number of processes, wherever they are killed."""

import json
import os
import random
import signal

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from accel_trainer import Callback, CheckpointError, TrainConfig, Trainer
from accel_trainer.data import streams
from accel_trainer.data.cut import Layout
from accel_trainer.data.micro_batches import MicroBatchLoader
from accel_trainer.devices import board
from support import on_processes, quiet

pytestmark = [  # `datasets` closes no loop of events
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
datasets.disable_progress_bars()
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # five seconds at the end of each shuffled pass
SIZES = [31, 1, 26, 27, 40, 22, 13, 44]  # samples of the shards
NUM_SAMPLES = sum(SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Parquet files of different lengths."""
    folder, first = tmp_path_factory.mktemp("parquet"), 0
    for number, size in enumerate(SIZES):
        index = numpy.arange(first, first + size)
        inputs = pyarrow.array([[float(k % 7), k / NUM_SAMPLES, 1.0] for k in index], pyarrow.list_(pyarrow.float32()))
        table = pyarrow.table({"index": index, "inputs": inputs, "target": pyarrow.array(index % 3, pyarrow.int64())})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=8)
        first += size
    return folder


def parquet(folder):
    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    return datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache")
    )


def noisy(row):
    return {"inputs": [value + 0.1 * torch.rand(()).item() for value in row["inputs"]]}


def noisy_batch(rows):
    return {"inputs": [[value + random.random() for value in inputs] for inputs in rows["inputs"]]}


async def noisy_later(row):
    return noisy(row)


def noisy_table(table):
    target = (table["target"].to_numpy() + numpy.random.randint(0, 3)) % 3
    return table.set_column(table.column_names.index("target"), "target", pyarrow.array(target))


def is_kept(row):
    return random.random() < 0.7


def is_odd(row):
    return row["index"] % 2 == 1


def generated(shards):
    for shard in shards:
        for number in range(SIZES[shard]):
            index = sum(SIZES[:shard]) + number
            yield {"index": index, "inputs": [index % 7, index / NUM_SAMPLES, numpy.random.rand()], "target": index % 3}


PIPELINES = {  # and whether they go on without reading again
    "torch": (lambda folder: parquet(folder).with_format("torch"), True),
    "rows": (lambda folder: parquet(folder).map(noisy), True),
    "batched map": (lambda folder: parquet(folder).map(noisy_batch, batched=True, batch_size=10), False),
    "filtered": (lambda folder: parquet(folder).filter(is_odd).with_format("torch"), True),
    "buffer": (lambda folder: parquet(folder).shuffle(seed=1, buffer_size=17).with_format("torch"), False),
    "generator": (
        lambda folder: datasets.IterableDataset.from_generator(
            generated, gen_kwargs={"shards": list(range(len(SIZES)))}
        ),
        False,
    ),
    "columns": (
        lambda folder: parquet(folder).select_columns(["index", "inputs", "target"]).with_format("numpy"),
        True,
    ),
    "drawn filter": (lambda folder: parquet(folder).filter(is_kept), False),
    "async map": (lambda folder: parquet(folder).map(noisy_later), False),
    "arrow map": (lambda folder: parquet(folder).with_format("arrow").map(noisy_table).with_format(None), False),
    "repeated": (lambda folder: parquet(folder).with_format("torch").repeat(2), True),
}


def collate(rows):
    inputs = torch.tensor(numpy.array([row["inputs"] for row in rows]), dtype=torch.float32)
    return {
        "index": torch.tensor([int(row["index"]) for row in rows]),
        "inputs": inputs + 0.01 * torch.rand(len(rows), 1),
        "target": torch.tensor([int(row["target"]) for row in rows]),
    }


class Die(Callback):
    """Kills the process that trains as one of some, at a step."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_step_end(self, trainer):
        if trainer.state.step == self.step and torch.distributed.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder, pipeline, log=None, callbacks=(), num_workers=0, drop_last=False, **choices):
    """Train; return losses, weights, and what the log has: the samples of each batch, by its number."""
    dataset = PIPELINES[pipeline][0](folder)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    seen = {}

    def compute_loss(model, batch):
        if torch.is_grad_enabled() and log is not None:
            number, data_pass, samples = trainer.state.num_batches, trainer.state.data_pass, batch["index"].tolist()
            is_padding = any(seen.setdefault((data_pass, sample), number) != number for sample in samples)
            with open(f"{log}.{rank}", "a") as file:
                file.write("" if is_padding else json.dumps([number, samples]) + "\n")
        return nn.functional.cross_entropy(model(batch["inputs"]), batch["target"])

    config = quiet(**{"num_epochs": 3, "num_micro_batches": 4, "bitwise": True, "stream_by_shards": True, **choices})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = Trainer(model, optimizer, compute_loss=compute_loss, config=config, callbacks=list(callbacks))
    kept = {} if pipeline in ("torch", "filtered", "buffer", "repeated") else {"collate_fn": collate}
    loader = DataLoader(dataset, 12, num_workers=num_workers, drop_last=drop_last, **kept)
    test = DataLoader(parquet(folder).with_format("torch"), 24)
    history = trainer.fit(loader, test)
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return history.train_losses, history.test_losses, weights


def samples_in(log):
    """Return the samples of each batch of a run."""
    batches = {}
    for path in sorted(log.parent.glob(f"{log.name}.*")):
        for line in path.read_text().splitlines():
            number, samples = json.loads(line)
            batches.setdefault(number, set()).update(samples)
    return batches


# --- any number of processes ------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_batches_and_bits_are_the_same_on_any_number_of_processes(tmp_path, folder, pipeline):
    expected = fit(folder, pipeline, tmp_path / "log 1")
    batches = samples_in(tmp_path / "log 1")
    for num_processes in (2, 3, 4) if pipeline == "torch" else (3,):
        log = tmp_path / f"log {num_processes}"
        assert on_processes(num_processes, fit, folder, pipeline, log) == [expected] * num_processes
        assert samples_in(log) == batches or pipeline == "repeated"
    if pipeline == "repeated":  # twice in a pass
        return
    per_epoch = len(batches) // 3
    for epoch in range(3 if pipeline != "drawn filter" else 0):
        of_epoch = [batches[1 + epoch * per_epoch + number] for number in range(per_epoch)]
        everything = range(1, NUM_SAMPLES, 2) if pipeline == "filtered" else range(NUM_SAMPLES)
        assert sorted(sample for batch in of_epoch for sample in batch) == list(everything)


@pytest.mark.distributed
def test_more_processes_than_micro_batches_and_loader_workers_change_nothing(folder):
    expected = fit(folder, "rows")
    assert on_processes(5, fit, folder, "rows") == [expected] * 5
    assert fit(folder, "rows", num_workers=2) == expected
    assert on_processes(2, fit, folder, "rows", None, (), 2) == [expected] * 2


def test_drop_last_leaves_out_every_smaller_batch(folder, tmp_path):
    fit(folder, "torch", tmp_path / "log", drop_last=True, num_epochs=1)
    assert {len(batch) for batch in samples_in(tmp_path / "log").values()} == {12}


class Reckless:
    """A loss that takes the batch apart, and writes into it."""

    def __call__(self, model, batch):
        target = batch.pop("target")
        batch["inputs"].mul_(1e20)
        return nn.functional.cross_entropy(model(batch["inputs"] / 1e20), target)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch["inputs"]), batch["target"])


def train_on(dataset, compute_loss=loss_of, collate_fn=None, **choices):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    config = quiet(**{"num_micro_batches": 4, "stream_by_shards": True, **choices})
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.05), compute_loss=compute_loss, config=config)
    kept = {} if collate_fn is None else {"collate_fn": collate_fn}
    history = trainer.fit(DataLoader(dataset, 12, **kept), DataLoader(dataset, 12, **kept))
    return history.train_losses, history.test_losses, trainer.state.num_skipped, trainer.state.step


def reckless(folder):
    return train_on(parquet(folder).with_format("torch"), Reckless())


def with_a_hole(folder):
    def pierce(row):
        return {"inputs": [float("nan")] * 3} if row["index"] == 31 else row

    return train_on(parquet(folder).map(pierce).with_format("torch"), on_nonfinite="skip")


def some_left_out(folder):
    def collate(rows):
        return {name: torch.stack([row[name] for row in rows if row["index"] % 3]) for name in rows[0]}

    return train_on(parquet(folder).filter(lambda row: row["index"] < 100).with_format("torch"), loss_of, collate)


@pytest.mark.distributed
@pytest.mark.parametrize("case", [reckless, with_a_hole, some_left_out])
def test_what_a_process_without_samples_computes_counts_nothing(folder, case):
    expected = case(folder)
    for result in on_processes(4, case, folder):
        assert result[:2] == tuple(pytest.approx(losses, rel=1e-5, nan_ok=True) for losses in expected[:2])
        assert result[2:] == expected[2:]


def other_files(folder):
    files = [str(path) for path in sorted(folder.glob("*.parquet"), reverse=torch.distributed.get_rank() == 1)]
    dataset = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache")
    )
    return refused(folder, dataset, ValueError, "train_loader has other samples on each process", num_micro_batches=4)


@pytest.mark.distributed
def test_files_in_another_order_on_a_process_are_refused(folder):
    assert on_processes(2, other_files, folder) == [True, True]


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize(
    "pipeline, num_kills", [("torch", 8), ("rows", 5), ("buffer", 3), ("batched map", 2), ("generator", 2)]
)
def test_a_run_that_is_killed_goes_on_exactly_on_other_numbers(tmp_path, folder, pipeline, num_kills, monkeypatch):
    monkeypatch.setattr(board, "_GONE_SECONDS", 0.1)
    monkeypatch.setattr(board, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(board, "_GRACE_SECONDS", 0.3)
    expected = fit(folder, pipeline, tmp_path / "alone")
    dice, last = random.Random(pipeline), max(samples_in(tmp_path / "alone"))
    for number in range(num_kills):
        num_processes = dice.randint(2, 4)
        die = Die(
            dice.randrange(num_processes),
            dice.randint(number * last // num_kills + 1, (number + 1) * last // num_kills),
        )
        with pytest.raises(torch.multiprocessing.ProcessExitedException):
            on_processes(num_processes, go_on, tmp_path, folder, pipeline, [die], dice.choice([0, 0, 2]))
    results = on_processes(dice.randint(1, 4), go_on, tmp_path, folder, pipeline)
    assert all(result == expected for result in results)
    assert samples_in(tmp_path / "log") == samples_in(tmp_path / "alone")


def go_on(tmp_path, folder, pipeline, callbacks=(), num_workers=0):
    kept = {"run_dir": tmp_path / "run", "resume": "auto", "checkpoint_every": 3}
    return fit(folder, pipeline, tmp_path / "log", callbacks, num_workers, **kept)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_nothing_is_read_again_where_the_stream_can_seek(tmp_path, folder, pipeline, capsys):
    expected = fit(folder, pipeline)
    kept = {"run_dir": tmp_path / "run", "resume": "auto", "verbose": True}
    for max_steps in (1, 9, 10, 16, 22, None):  # within an epoch, at its tail, at its end
        result = fit(folder, pipeline, max_steps=max_steps, **kept)
        told = capsys.readouterr().out
        if max_steps in (9, 10):
            assert ("read to be passed over" in told) == (not PIPELINES[pipeline][1])
    assert result == expected


def test_what_a_map_has_computed_is_not_computed_again(tmp_path, folder, monkeypatch):
    counts = tmp_path / "counts"

    def counted(row):
        with open(counts, "a") as file:
            file.write(f"{row['index']}\n")
        return row

    monkeypatch.setitem(PIPELINES, "counted", (lambda folder: parquet(folder).map(counted), True))
    kept = {"run_dir": tmp_path / "run", "resume": "auto", "num_epochs": 1}
    fit(folder, "counted", max_steps=7, **kept)
    counts.unlink()
    fit(folder, "counted", **kept)
    assert len(counts.read_text().split()) == NUM_SAMPLES - 7 * 12


def test_by_shards_or_not_and_the_number_of_groups_are_parts_of_the_run(tmp_path, folder):
    kept = {"run_dir": tmp_path / "run", "resume": "auto"}
    fit(folder, "torch", max_steps=2, **kept)
    for other, told in (
        ({"stream_by_shards": False}, "stream_by_shards was 4 and is None"),
        ({"num_micro_batches": 3}, "stream_by_shards was 4 and is 3"),
        ({"pipeline": "rows"}, r"stream was 'Arrow, 8 shards, \w+' and is 'Arrow .*> Mapped, 8 shards"),
        ({"drop_last": True}, "drop_last was False and is True"),
    ):
        with pytest.raises(CheckpointError, match=told):
            fit(folder, **{"pipeline": "torch", **kept, **other})


def test_a_shuffle_without_a_seed_cannot_go_on(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(PIPELINES, "unseeded", (lambda folder: parquet(folder).shuffle(buffer_size=9), False))
    kept = {"run_dir": tmp_path / "run", "resume": "auto"}
    fit(folder, "unseeded", max_steps=2, **kept)
    with pytest.raises(CheckpointError, match="stream was"):
        fit(folder, "unseeded", **kept)


def test_epochs_within_a_pass_read_nothing_again(folder, monkeypatch, tmp_path):
    counts = tmp_path / "counts"

    def counted(row):
        with open(counts, "a") as file:
            file.write("x\n")
        return row

    monkeypatch.setitem(
        PIPELINES, "counted", (lambda folder: parquet(folder).map(counted).shuffle(seed=0, buffer_size=5), False)
    )
    fit(folder, "counted", num_epochs=5, steps_per_epoch=2)
    assert len(counts.read_text().split()) < NUM_SAMPLES


def samples_received():
    """Read a stream on the main process; return how many samples each other process has been sent."""
    received, scatter = [], streams.scatter_from_main

    def noted(parts):
        received.append(scatter(parts))
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in received[-1])
        return received[-1]

    streams.scatter_from_main = noted
    process = torch.distributed.get_rank()
    loader = MicroBatchLoader(DataLoader(Own(), 7), Layout(process, 3, 5), 0)
    mine = [micro_batch.data.tolist() for micro_batch in loader.micro_batches(1)]
    assert mine == [part.tolist() for parts in received for part in parts]
    return mine


@pytest.mark.distributed
def test_the_main_process_sends_each_process_its_own_samples_only():
    assert on_processes(3, samples_received) == [
        [[0, 1], [2, 3], [7], [8]],
        [[4], [5], [9]],
        [[6], [7]],  # of the last batch of three it has none: padding
    ]


# --- what is refused --------------------------------------------------------------------------------------------------


class Own(IterableDataset):
    def __iter__(self):
        yield from range(10)


def refused(folder, dataset, error, message, batch_size=12, num_micro_batches=8):
    model = nn.Linear(3, 3)
    config = quiet(num_micro_batches=num_micro_batches, stream_by_shards=True)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=config)
    with pytest.raises(error, match=message):
        trainer.fit(DataLoader(dataset, batch_size))
    return True


def test_what_cannot_be_read_by_shards_is_refused_with_the_remedy(folder):
    refused(folder, Own(), TypeError, "reads a datasets.IterableDataset, .*; train_loader has a Own")
    refused(folder, datasets.Dataset.from_dict({"x": [1] * 9}), TypeError, "train_loader has a Dataset")
    few = parquet(folder).shard(2, 0)
    refused(folder, few, ValueError, r"num_micro_batches=8; train_loader has 4. .* or dataset.reshard\(\)")
    refused(folder, parquet(folder), ValueError, "needs a batch_size of at least num_micro_batches=8", 4)
    refused(folder, parquet(folder).with_format("arrow"), ValueError, "gives whole tables")
    refused(folder, parquet(folder).skip(3), ValueError, r"has a take\(\) or skip\(\)")
    refused(
        folder, split_dataset_by_node(parquet(folder), 0, 2), ValueError, "is a part of a stream", num_micro_batches=4
    )
    with pytest.raises(ValueError, match="stream_by_shards needs num_micro_batches"):
        TrainConfig(stream_by_shards=True)


def refuse_a_part(folder):
    rank = torch.distributed.get_rank()
    part = split_dataset_by_node(parquet(folder), rank, 2)
    return refused(folder, part, ValueError, "split_dataset_by_node", num_micro_batches=4)


@pytest.mark.distributed
def test_a_stream_that_is_divided_already_is_refused(folder):
    assert on_processes(2, refuse_a_part, folder) == [True, True]


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_micro_batches_are_those_that_a_loader_makes_of_the_rows(folder, kind):
    dataset = parquet(folder) if kind is None else parquet(folder).with_format(kind)
    for index in range(4):
        shard = dataset.shard(4, index)
        loader = MicroBatchLoader(DataLoader(dataset, 12), Layout(index, 4, 4), 0, by_shards=True)

        def alone(parts, index=index):
            (part,) = parts
            return [[count if place == index else 0 for place in range(4)] for count in (part.num_rows, part.size)]

        loader.sharded._everywhere = alone
        loader.sharded._own = lambda parts, sizes: [(part, False) for part in parts if part.size]
        found = [micro_batch.data for micro_batch in loader.micro_batches(1)]
        expected = list(DataLoader(shard, 3))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            assert all(one[name].data_ptr() % 64 == 0 for name in one if isinstance(one[name], torch.Tensor))
            for name in one:
                pairs = (
                    zip(one[name], other[name], strict=True)
                    if isinstance(one[name], list)
                    else [(one[name], other[name])]
                )
                assert all(torch.equal(left, right) and left.dtype == right.dtype for left, right in pairs)
