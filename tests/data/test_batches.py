"""Order, cut and fetch: every sample once, the same data whatever the path."""

import random
import re

import datasets
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)
from torch.utils.data.distributed import DistributedSampler

from accel_trainer import Trainer
from accel_trainer.data.cut import Layout, cut, describe_batch
from accel_trainer.data.micro_batches import MicroBatchLoader
from accel_trainer.data.order import check_loader, index_batches
from accel_trainer.data.randomness import derive_seed, generators_kept
from accel_trainer.data.sources import tensor_source_of
from support import launch, loader_of, make_data, on_processes, quiet

ALONE = Layout(0, 1, 1)


# --- the cut ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 12))
def test_the_cut_gives_each_sample_to_one_process_once_in_order(num_samples, num_processes, num_micro_batches):
    samples, indices = [], []
    for process in range(num_processes):
        pieces = cut(num_samples, Layout(process, num_processes, num_micro_batches))
        assert pieces[0].is_first and pieces[-1].is_last
        assert sum(piece.is_last for piece in pieces) == 1
        for piece in pieces:
            assert 0 <= piece.start < piece.stop <= num_samples  # never empty: a stand-in is made of real samples
            if not piece.is_padding:
                samples += range(piece.start, piece.stop)
                indices.append(piece.index)
            else:
                assert len(pieces) == 1 and (piece.index, piece.start) == (0, 0)
    assert samples == list(range(num_samples))
    assert indices == list(range(min(num_samples, num_micro_batches)))


@given(st.integers(1, 200), st.integers(1, 12))
def test_the_cut_is_that_of_tensor_split(num_samples, num_micro_batches):
    pieces = cut(num_samples, Layout(0, 1, num_micro_batches))
    sizes = [len(part) for part in torch.arange(num_samples).tensor_split(num_micro_batches) if len(part)]
    assert [piece.stop - piece.start for piece in pieces] == sizes


@pytest.mark.parametrize(
    "num_samples, layout, text",
    [
        (64, Layout(0, 2, 4), "batch 64 = 2 processes x 2 micro-batches x 16"),
        (32, Layout(0, 1, 1), "batch 32 = 1 process x 1 micro-batch x 32"),
        (10, Layout(0, 2, 3), "batch 10 = 2 processes x 2 or 1 micro-batches x 4 or 3"),
    ],
)
def test_the_arithmetic_of_a_batch_in_words(num_samples, layout, text):
    assert describe_batch(num_samples, layout) == text


# --- order ------------------------------------------------------------------------------------------------------------


def order_of(loader, seed=0, epoch=1):
    return [[int(index) for index in batch] for batch in index_batches(loader, seed, epoch)]


class GlobalShuffle(Sampler):
    """Draws from Python's, NumPy's and torch's global generators, as users' samplers do."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        order = list(range(self.length))
        random.shuffle(order)
        numpy.random.shuffle(order)
        for place in torch.randperm(self.length).tolist():
            random.random()
            yield order[place]


class VaryingBatches:
    """Batches of growing size, without a length."""

    def __iter__(self):
        yield from ([0, 1], [2], [3, 4, 5], [6, 7, 8, 9, 10])


DATA = TensorDataset(torch.arange(11.0).reshape(-1, 1))
LOADERS = {
    "in order": lambda: DataLoader(DATA, batch_size=4),
    "shuffle": lambda: DataLoader(DATA, batch_size=4, shuffle=True),
    "drop_last": lambda: DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True),
    "own generator": lambda: DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7)),
    "with replacement": lambda: DataLoader(DATA, 4, sampler=RandomSampler(DATA, replacement=True, num_samples=9)),
    "weighted": lambda: DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 11, 11)),
    "subset": lambda: DataLoader(DATA, 4, sampler=SubsetRandomSampler([3, 5, 7, 9, 10])),
    "custom": lambda: DataLoader(DATA, 4, sampler=GlobalShuffle(11)),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=VaryingBatches()),
    "custom in batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(GlobalShuffle(11), 3, False)),
    "batch_size=None": lambda: DataLoader(DATA, batch_size=None, sampler=BatchSampler(RandomSampler(DATA), 4, False)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_order_is_a_pure_function_of_seed_and_epoch_and_leaves_no_trace(name):
    loader = LOADERS[name]()
    first = order_of(loader)
    torch.rand(3), random.random(), numpy.random.rand()
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert order_of(loader) == first
    assert order_of(LOADERS[name]()) == first
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())
    if name not in ("in order", "batch sampler"):
        assert order_of(loader, epoch=2) != first
        assert order_of(loader, seed=1) != first
    if name in ("in order", "shuffle", "own generator", "custom", "batch_size=None", "batch sampler"):
        for epoch in (1, 2):
            assert sorted(sum(order_of(loader, epoch=epoch), [])) == list(range(11))


def test_a_users_generator_has_its_say():
    orders = [
        order_of(DataLoader(DATA, 4, shuffle=True, generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_set_epoch_is_called_with_numbers_from_0():
    class ByEpoch(Sampler):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([self.epoch] * 3)

    loader = DataLoader(DATA, 2, sampler=ByEpoch())
    assert order_of(loader, epoch=1) == [[0, 0], [0]]
    assert order_of(loader, epoch=3) == [[2, 2], [2]]


def seen_samples(name, num_micro_batches, num_workers=0):
    """Return, for each epoch, the samples this process trained on."""
    seen = []

    def compute_loss(model, batch):
        if model.training and not torch.is_inference_mode_enabled():
            seen.append(batch[0].flatten().tolist())
        return model(batch[0]).mean()

    loader = LOADERS[name]()
    if num_workers:
        loader = DataLoader(DATA, batch_sampler=loader.batch_sampler, num_workers=num_workers)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = quiet(num_micro_batches=num_micro_batches)
    Trainer(model, optimizer, compute_loss=compute_loss, config=config).fit(loader)
    return sum(seen, [])


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in LOADERS if name != "subset"])
def test_every_kind_of_sampler_is_divided_without_loss(name):
    one = seen_samples(name, None)
    expected = [float(index) for epoch in (1, 2) for batch in order_of(LOADERS[name](), epoch=epoch) for index in batch]
    assert one == expected
    sizes = [len(batch) for epoch in (1, 2) for batch in order_of(LOADERS[name](), epoch=epoch)]
    for process, seen in enumerate(on_processes(2, seen_samples, name, 4)):
        runs = [cut(size, Layout(process, 2, 4)) for size in sizes]
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        places = [
            start + place
            for start, pieces in zip(starts, runs, strict=True)
            for piece in pieces
            for place in range(piece.start, piece.stop)
        ]
        assert seen == [expected[place] for place in places]


def test_loader_workers_get_the_same_micro_batches():
    assert seen_samples("custom", 3, num_workers=2) == seen_samples("custom", 3)


# --- what datasets draw -----------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Every item carries draws of Python, NumPy and torch."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        draws = [random.random(), numpy.random.rand(), torch.rand(()).item()]
        return torch.tensor([float(index), *draws], dtype=torch.float64), 0


def drawn(num_workers, context=None):
    """Return what this process saw in two epochs."""
    seen = []

    def compute_loss(model, batch):
        seen.append(batch[0])
        return model(batch[0]).mean()

    loader = DataLoader(
        Augmented(), batch_size=8, shuffle=True, num_workers=num_workers, multiprocessing_context=context
    )
    with generators_kept():
        model = nn.Linear(4, 1).double()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.0), compute_loss=compute_loss, config=quiet(num_micro_batches=4)
    )
    trainer.fit(loader)
    return torch.cat(seen)


@pytest.mark.distributed
def test_augmentation_differs_everywhere_and_repeats_exactly_under_every_layout():
    one = drawn(0)
    assert len(one) == 48
    for column in (1, 2, 3):
        assert one[:, column].unique().numel() == 48  # over samples, micro-batches and epochs
    assert torch.equal(one, drawn(2))
    for num_workers in (0, 2):
        two = torch.cat(on_processes(2, drawn, num_workers))
        assert torch.equal(two[two[:, 1].argsort()], one[one[:, 1].argsort()])


def test_loader_workers_may_be_spawned():
    assert torch.equal(drawn(1, "spawn"), drawn(0))


def test_seeds_are_the_same_on_every_machine_and_differ():
    assert derive_seed(0, 3, 1, 0) == 5249869861515054762
    assert len({derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}) == 1000


def test_a_run_leaves_the_generators_as_they_were():
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    drawn(0)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())
    with generators_kept():
        random.random()
    assert state[1] == random.getstate()


# --- the whole fetch --------------------------------------------------------------------------------------------------


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


def tables():
    columns = {
        "image": numpy.random.default_rng(0).random((20, 3, 2)).astype("float32"),
        "double": numpy.random.default_rng(1).random(20),
        "label": list(range(20)),
        "flag": [index % 2 == 0 for index in range(20)],
    }
    plain = datasets.Dataset.from_dict(columns)
    texts = datasets.Dataset.from_dict({"x": list(range(20)), "text": [f"t{index}" for index in range(20)]})
    one_of_each = TensorDataset(torch.randn(20, 4), torch.arange(20), torch.rand(20) > 0.5)
    return {
        "tensors": one_of_each,
        "torch table": plain.with_format("torch"),
        "numpy table": plain.with_format("numpy"),
        "some columns": plain.with_format("torch", columns=["label", "image"]),
        "shuffled table": plain.with_format("torch").shuffle(seed=1).select(range(15)),
        "text": texts.with_format("torch"),
        "subset": Subset(one_of_each, [5, 3, 3, 19, 0, 7, 8]),
        "subset of subset": Subset(Subset(plain.with_format("torch"), list(range(19, 4, -1))), [2, 0, 9, 9, 4]),
        "split": random_split(one_of_each, [0.5, 0.5], generator=torch.Generator().manual_seed(0))[1],
    }


@settings(max_examples=20, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", tables())
def test_the_whole_fetch_is_identical_to_the_default_one(name, data):
    dataset = tables()[name]
    indices = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=7))
    fetch = tensor_source_of(dataset)
    same(fetch(torch.tensor(indices)), next(iter(DataLoader(dataset, batch_sampler=[indices]))))


def test_the_whole_fetch_hands_out_copies():
    data = TensorDataset(torch.zeros(4, 1))
    tensor_source_of(data)(torch.arange(4))[0].add_(1)
    assert data.tensors[0].sum() == 0


def test_the_whole_fetch_keeps_away_from_what_it_does_not_know():
    class Mine(TensorDataset):
        def __getitem__(self, index):
            return [-tensor for tensor in super().__getitem__(index)]

    table = datasets.Dataset.from_dict({"x": [1, 2]})
    transformed = table.with_transform(lambda batch: {"x": [-x for x in batch["x"]]})
    for dataset in (Mine(torch.ones(4)), Subset(Mine(torch.ones(4)), [0]), table, transformed, Augmented()):
        assert tensor_source_of(dataset) is None
    feed = MicroBatchLoader(DataLoader(Mine(torch.ones(4)), 2), ALONE, 0)
    assert next(feed.micro_batches(1)).data[0].tolist() == [-1, -1]
    loader = DataLoader(TensorDataset(torch.ones(4)), 2, collate_fn=lambda items: len(items))
    assert next(MicroBatchLoader(loader, ALONE, 0).micro_batches(1)).data == 2


def test_items_are_fetched_by_getitems_where_the_dataset_has_it():
    class Many(Dataset):
        def __len__(self):
            return 5

        def __getitems__(self, indices):
            return [torch.tensor(index * 10) for index in indices]

    batches = [
        micro_batch.data.tolist() for micro_batch in MicroBatchLoader(DataLoader(Many(), 2), ALONE, 0).micro_batches(1)
    ]
    assert batches == [[0, 10], [20, 30], [40]]


# --- streams ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Samples of every kind of field; how many, may depend on the process that reads."""

    def __init__(self, lengths=(10, 10)):
        self.lengths = lengths

    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for index in range(self.lengths[rank]):
            yield {"x": torch.tensor([float(index)]), "name": f"s{index}", "draw": random.random()}


def with_an_int(items):
    return default_collate(items) | {"count": len(items)}


def train_on_stream(lengths=(10, 10)):
    seen = []

    def compute_loss(model, batch):
        assert batch["count"] == 4 or batch["count"] == 2
        assert batch["name"] == [f"s{int(x)}" for x in batch["x"]]
        seen.extend(batch["x"].flatten().tolist())
        return (batch["x"] + 0 * model(batch["x"])).mean()

    model = nn.Linear(1, 1)
    loader = DataLoader(Stream(lengths), batch_size=4, collate_fn=with_an_int)
    config = quiet(num_epochs=2)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), compute_loss=compute_loss, config=config)
    history = trainer.fit(loader, loader)
    return history.train_losses, history.test_losses, trainer.state.step, sorted(set(seen))


@pytest.mark.distributed
def test_a_stream_gives_each_sample_once_even_if_processes_would_read_different_ones():
    one = train_on_stream()
    assert one[0] == one[1] == [4.5, 4.5] and one[2] == 6
    for lengths in [(10, 10), (10, 7), (10, 13)]:
        results = on_processes(2, train_on_stream, lengths)
        assert [result[:3] for result in results] == [one[:3]] * 2
        assert sorted(results[0][3] + results[1][3]) == [float(index) for index in range(10)]


def test_a_table_stream_is_reshuffled_every_epoch():
    table = datasets.Dataset.from_dict({"x": [float(index) for index in range(20)]}).to_iterable_dataset()
    loader = DataLoader(table.shuffle(seed=1, buffer_size=20).with_format("torch"), batch_size=5)
    feed = MicroBatchLoader(loader, ALONE, 0)
    first, second, again = ([x for m in feed.micro_batches(e) for x in m.data["x"].tolist()] for e in (1, 2, 1))
    assert sorted(first) == sorted(second) == [float(index) for index in range(20)]
    assert first == again != second


# --- what is refused --------------------------------------------------------------------------------------------------


def test_loaders_that_cannot_be_divided_are_refused():
    data = make_data(8)
    with pytest.raises(TypeError, match=r"train_loader must be a torch.utils.data.DataLoader, got TensorDataset"):
        check_loader(data, "train_loader")
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    for loader in (
        DataLoader(data, 4, sampler=sampler),
        DataLoader(data, batch_sampler=BatchSampler(sampler, 4, False)),
    ):
        with pytest.raises(ValueError, match="has a DistributedSampler, but the trainer divides"):
            check_loader(loader, "train_loader")
    with pytest.raises(ValueError, match="test_loader yields no batch: its dataset has 0 samples"):
        check_loader(DataLoader(TensorDataset(torch.zeros(0, 1)), 4), "test_loader")
    with pytest.raises(ValueError, match="8 samples and drop_last=True with batch_size 16"):
        check_loader(DataLoader(data, 16, drop_last=True), "train_loader")


def test_a_loader_prepared_by_accelerate_is_refused():
    from accelerate import Accelerator

    with pytest.raises(TypeError, match="already prepared by Accelerate. Give the plain DataLoader"):
        check_loader(Accelerator().prepare(loader_of(make_data(8))), "train_loader")


def test_single_indices_without_batches_are_refused():
    loader = DataLoader(make_data(8), batch_size=None)
    with pytest.raises(TypeError, match="With batch_size=None the sampler must yield lists of indices, got int"):
        next(MicroBatchLoader(loader, ALONE, 0).micro_batches(1))


def data_by_rank(kind):
    rank = torch.distributed.get_rank()
    data = make_data(20 + rank if kind == "length" else 20)
    if kind == "rows":
        data = random_split(data, [10, 10], generator=torch.Generator().manual_seed(rank))[0]
    model = nn.Linear(5, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    try:
        trainer.fit(loader_of(data, 4))
    except ValueError as error:
        return str(error)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind, message", [("length", r"different lengths on the processes: [20, 21]"), ("rows", "other samples on each")]
)
def test_data_that_differs_between_the_processes_is_refused(kind, message):
    assert all(message in told for told in on_processes(2, data_by_rank, kind))


def test_an_empty_stream_is_an_error_and_no_endless_loop():
    class Empty(IterableDataset):
        def __iter__(self):
            return iter(())

    model = nn.Linear(5, 3)
    for steps_per_epoch in (None, 3):
        config = quiet(steps_per_epoch=steps_per_epoch)
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=config)
        with pytest.raises(ValueError, match="train_loader yields no batch"):
            trainer.fit(DataLoader(Empty(), batch_size=4))


@pytest.mark.distributed
def test_a_tiny_dataset_under_a_real_launcher_needs_no_environment():
    script = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from accel_trainer import TrainConfig, Trainer
data = TensorDataset(torch.ones(1, 2), torch.ones(1, 1))
model = torch.nn.Linear(2, 1)
torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = Trainer(model, optimizer, torch.nn.MSELoss(), config=TrainConfig(num_epochs=2))
print(trainer.fit(DataLoader(data, batch_size=4), DataLoader(data, batch_size=4)).train_losses)
"""
    done = launch(script, num_processes=2)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"\[1\.0, [\d.]+\]", done.stdout)  # two processes may print into one line
    assert len(losses) == 2 and losses[0] == losses[1] and losses[0].startswith("[1.0, 0.1")
    assert done.stdout.count("2 processes (launcher)") == 1


def test_indices_of_every_kind_are_fetched_whole():
    data = TensorDataset(torch.arange(8.0))
    for indices in ([-1, -2, 0], numpy.arange(3).astype("int16"), torch.tensor([1, 2]), range(4)):
        expected = [float(data[int(index)][0]) for index in indices]
        fetched = [
            x
            for m in MicroBatchLoader(DataLoader(Subset(data, indices), 2), ALONE, 0).micro_batches(1)
            for x in m.data[0]
        ]
        assert fetched == expected
    backwards = DataLoader(data, batch_sampler=[[-1, 0], [], [-8]])
    assert [m.data[0].tolist() for m in MicroBatchLoader(backwards, ALONE, 0).micro_batches(1)] == [[7.0, 0.0], [0.0]]


class Stateful(Sampler):
    """Keeps a generator of its own, which the trainer cannot know."""

    def __init__(self):
        self.rng = numpy.random.default_rng(0)

    def __iter__(self):
        return iter(self.rng.permutation(20).tolist())


def train_stateful():
    model = nn.Linear(5, 3).double()
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    loader = DataLoader(make_data(20, torch.float64), 4, sampler=Stateful())
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    return trainer.fit(loader).train_losses


@pytest.mark.distributed
def test_a_sampler_with_a_state_of_its_own_is_drawn_as_often_on_several_processes():
    one = train_stateful()
    for losses in on_processes(2, train_stateful):
        assert losses == pytest.approx(one, rel=1e-10)


class Boxes(dict):
    """A dictionary of its own kind, as tokenizers return."""


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_batches_of_a_stream_are_cut_by_samples_only(num_micro_batches):
    class Detection(IterableDataset):
        def __iter__(self):
            return (
                {"text": f"s{index}", "x": torch.ones(2) * index, "boxes": torch.ones(index, 4)} for index in range(8)
            )

    def collate(items):
        columns = {key: [item[key] for item in items] for key in items[0]}
        return Boxes(columns | {"x": torch.stack(columns["x"]), "n": 3})

    feed = MicroBatchLoader(
        DataLoader(Detection(), batch_size=4, collate_fn=collate), Layout(0, 1, num_micro_batches), 0
    )
    seen = []
    for micro_batch in feed.micro_batches(1):
        data = micro_batch.data
        assert type(data) is Boxes and data["n"] == 3
        assert len(data["text"]) == len(data["boxes"]) == len(data["x"]) == micro_batch.num_samples
        assert [len(boxes) for boxes in data["boxes"]] == [int(x[0]) for x in data["x"]]
        seen += data["text"]
    assert seen == [f"s{index}" for index in range(8)]


def test_a_tensor_of_a_stream_that_is_not_per_sample_is_refused():
    class Side(IterableDataset):
        def __iter__(self):
            return iter([torch.ones(2)] * 4)

    loader = DataLoader(Side(), batch_size=4, collate_fn=lambda items: (torch.stack(items), torch.ones(3)))
    with pytest.raises(TypeError, match=r"3 samples holds a tensor of shape \(4, 2\): it cannot be cut"):
        list(MicroBatchLoader(loader, Layout(0, 1, 2), 0).micro_batches(1))
    assert len(list(MicroBatchLoader(loader, ALONE, 0).micro_batches(1))) == 1
