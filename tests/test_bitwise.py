"""Not one bit differs between any numbers of processes: random small models, and the places where bits get lost."""

import hashlib
import os
import random
import time

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import TrainConfig, Trainer
from accel_trainer.data.cut import Layout, process_of, run_of
from accel_trainer.devices.arithmetic import fixed_arithmetic
from accel_trainer.numbers.reductions import Node, TreeSum, _nodes_of, _plan_of, push
from support import (
    LAYOUTS,
    Items,
    correct,
    loader_of,
    make_data,
    make_model,
    on_fork,
    on_processes,
    put_together,
    quiet,
)

pytestmark = pytest.mark.timeout(300)
NUM_PROCESSES = (2, 3, 4, 5, 8)


def bits(tensors):
    """Return a digest of the exact bits of named tensors; of one that is divided over the processes, of the whole."""
    digest = hashlib.sha256()
    for name, tensor in sorted(put_together(tensors).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def optimizer_tensors(optimizer):
    return {
        f"{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def outcome(trainer, history):
    """Return everything that must be equal to the last bit."""
    return {
        "weights": bits(trainer.model.state_dict()),
        "buffers": bits(dict(trainer.model.named_buffers())),
        "optimizer": bits(optimizer_tensors(trainer.optimizer)),
        "history": [history.train_losses, history.test_losses, history.grad_norms, history.metrics],
        "best": [history.best_epoch, history.best_value],
    }


# --- random small models ----------------------------------------------------------------------------------------------


class Augmented(Items):
    """Draws from all three generators for every item."""

    def __getitem__(self, index):
        inputs, target = self.data[index]
        noise = random.random() + numpy.random.rand() + torch.rand(inputs.shape)
        return inputs + 0.1 * noise.to(inputs.dtype), target


class Branches(nn.Module):
    """A network with a frozen, an unused, a tied and a sometimes used part."""

    def __init__(self, width, sometimes):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.unused, self.rare = nn.Linear(width, width), nn.Linear(width, width)
        self.sometimes = sometimes
        self.register_buffer("seen", torch.zeros(width))
        self.register_buffer("positive", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        outputs = self.second(torch.tanh(self.first(inputs))) + self.frozen(inputs)
        if self.sometimes and inputs[0, 0] > 0:
            outputs = outputs + self.rare(inputs)
        if self.training:
            self.seen += inputs.detach().mean(dim=0).to(self.seen.dtype)
            self.positive += (inputs > 0).sum()
        return outputs + 0.01 * self.seen + 1e-4 * self.positive


def random_model(draw, dtype):
    width = draw.choice([4, 8, 13])
    layers = [nn.Linear(5, width)]
    if draw.random() < 0.3:
        channels = draw.choice([3, 4])
        layers = [
            nn.Unflatten(1, (1, 5)),
            nn.Conv1d(1, channels, 3, padding=1),
            nn.Flatten(),
            nn.Linear(5 * channels, width),
        ]
    for _ in range(draw.randint(1, 3)):
        layers += draw.choice(
            [
                [nn.BatchNorm1d(width), nn.ReLU()],
                [nn.BatchNorm1d(width, momentum=None), nn.Tanh()],
                [nn.Dropout(0.4), nn.GELU()],
                [nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU()],
                [Branches(width, sometimes=draw.random() < 0.5)],
                [nn.Linear(width, width), nn.Softplus()],
            ]
        )
    return nn.Sequential(*layers, nn.Linear(width, 3)).to(dtype)


def by_tokens(batch):
    return batch[1].sum() + 1.5  # weights that no power of two divides


def random_case(seed, sharding=None):
    """Train a random small model on random data in a random way; return all its bits."""
    AcceleratorState._reset_state()  # the precision may change
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = torch.float64 if draw.random() < 0.2 else torch.float32
    model = random_model(draw, dtype)
    make_optimizer = draw.choice(
        [
            lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
            lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
            lambda parameters: torch.optim.SGD(parameters, lr=0.05, weight_decay=0.1, foreach=False),
        ]
    )
    loss_fn = draw.choice(
        [
            nn.CrossEntropyLoss(),
            nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.1, 0.7], dtype=dtype)),
            nn.CrossEntropyLoss(label_smoothing=0.1),
        ]
    )
    # BatchNorm needs two samples in each micro-batch; a last batch of fewer than M leaves some micro-batches empty.
    cut = draw.choice([None, 8, 5, 3, 6])
    pieces = cut or 8
    has_norm = any(isinstance(layer, nn.BatchNorm1d) for layer in model)
    batch_size = 2 * pieces + draw.randint(0, 5) if has_norm else draw.randint(1, 2 * pieces)
    num_batches = draw.randint(1, 2)
    rest = 0 if has_norm else draw.randint(0, batch_size - 1)
    data = make_data(num_batches * batch_size + rest, dtype)
    if draw.random() < 0.4:
        data = Augmented(data)
    config = quiet(
        bitwise=True,
        num_micro_batches=cut,
        seed=seed,
        num_epochs=2,
        max_grad_norm=draw.choice([None, 0.3]),
        mixed_precision="bf16" if dtype == torch.float32 and draw.random() < 0.3 else "no",
        sharding=sharding,
    )
    trainer = Trainer(
        model,
        make_optimizer([parameter for parameter in model.parameters()]),
        loss_fn,
        metrics={"accuracy": correct},
        weight_fn=by_tokens if draw.random() < 0.3 else None,
        config=config,
    )
    history = trainer.fit(loader_of(data, batch_size), loader_of(make_data(11, dtype), 7, shuffle=False))
    return outcome(trainer, history)


def random_cases(seeds):
    return [random_case(seed) for seed in seeds]


@pytest.mark.distributed
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:loss_fn is no mean")  # not with these weights
def test_random_small_models_have_the_same_bits_on_any_number_of_processes(request):
    seeds = range(request.config.getoption("--cases"))
    references = random_cases(seeds)
    assert random_cases(seeds[:5]) == references[:5], "a rerun differs"
    for place, num_processes in enumerate(NUM_PROCESSES):
        # Every case runs on one of the numbers; the first ones on all.
        chosen = [seed for seed in seeds if seed < 5 or place == seed % 5]
        for results in on_processes(num_processes, random_cases, chosen):
            for seed, result in zip(chosen, results, strict=True):
                assert result == references[seed], f"case {seed} differs on {num_processes} processes"


@pytest.mark.distributed
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:loss_fn is no mean")
def test_random_small_models_have_the_same_bits_divided_over_processes(request):
    seeds = range(request.config.getoption("--cases") * 2 // 5)

    def divided(chosen, sharding, environment):
        os.environ.update(environment)
        return [random_case(seed, sharding) for seed in chosen]

    references = on_fork(lambda: divided(seeds, "full", {}))  # not divided but in bf16, where torch rounds more of it
    assert sum(one == random_case(seed) for seed, one in zip(seeds, references, strict=True)) > 0.7 * len(seeds)
    for place, (layout, (number, *how)) in enumerate(LAYOUTS.items()):
        # Every case runs in one of the layouts; the first ones in all.
        chosen = [seed for seed in seeds if seed < 4 or place == seed % 4]
        for results in on_processes(number, divided, chosen, *how):
            for seed, result in zip(chosen, results, strict=True):
                assert result == references[seed], f"case {seed} differs on {layout} processes"


# --- the tree ---------------------------------------------------------------------------------------------------------


def by_recursion(values, size):
    """Add up in the order of the tree, by its definition: halves of the next power of two."""
    if len(values) == 1:
        return values[0]
    half = size // 2
    if len(values) <= half:
        return by_recursion(values, half)
    return by_recursion(values[:half], half) + by_recursion(values[half:], half)


def leaves_of(num_leaves, sizes=(7, 1, 300)):
    generator = torch.Generator().manual_seed(num_leaves)
    return [[torch.randn(size, generator=generator) * 1e3 for size in sizes] for _ in range(num_leaves)]


def sum_leaves(num_processes, num_micro_batches, num_full):
    rank = torch.distributed.get_rank() if num_processes > 1 else 0
    layout = Layout(rank, num_processes, num_micro_batches)
    sums = TreeSum(layout)
    leaves = leaves_of(num_full)
    for index in run_of(layout):
        if index < num_full:
            sums.add(index, [tensor.clone() for tensor in leaves[index]])
            assert len(sums._nodes) <= num_micro_batches.bit_length() + 1
    return sums.total(num_full, leaves[0])


TREES = [(m, n) for m in (1, 2, 3, 5, 6, 7, 8, 11, 16) for n in (1, 2, 3, 5, 7, 8, 11, 16) if n <= m]


def sum_trees(num_processes):
    return [sum_leaves(num_processes, *tree) for tree in TREES]


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_the_tree_is_the_same_from_every_place(num_processes):
    for results in on_processes(num_processes, sum_trees, num_processes):
        for (_, num_full), result in zip(TREES, results, strict=True):
            leaves = leaves_of(num_full)
            for place, tensor in enumerate(result):
                expected = by_recursion([leaf[place] for leaf in leaves], 16)
                assert torch.equal(tensor, expected)


def sum_with_gaps():
    """Process 0 has nothing of the first tensor and of the third, a -0.0; nobody has the second."""
    rank = torch.distributed.get_rank()
    sums = TreeSum(Layout(rank, 2, 2))
    column = torch.arange(6.0).reshape(2, 3).t()  # strides that a flat copy would lose
    sums.add(
        rank,
        [
            column if rank else None,
            None,
            torch.tensor([-0.0]) if rank else None,
            torch.tensor([1j]),
            torch.ones(2).bfloat16(),
        ],
    )
    like = [column, torch.zeros(2), torch.zeros(1), torch.tensor([0j]), torch.zeros(2).bfloat16()]
    first, second, third, fourth, fifth = sums.total(2, like)
    return first, first.stride(), second, third.signbit().item(), fourth, fifth


@pytest.mark.distributed
def test_what_is_missing_leaves_no_trace_in_the_sum():
    for first, stride, second, is_negative, fourth, fifth in on_processes(2, sum_with_gaps):
        assert torch.equal(first, torch.arange(6.0).reshape(2, 3).t()) and stride == (1, 3)
        assert second is None and is_negative
        assert torch.equal(fourth, torch.tensor([2j])) and fifth.dtype == torch.bfloat16 and fifth.tolist() == [2, 2]


def test_a_process_sends_as_much_as_a_ring_where_its_part_is_a_subtree():
    for num_processes in (1, 2, 4, 8):
        assert [len(nodes) for nodes in _plan_of(Layout(0, num_processes, 8), 8)] == [1] * num_processes
    assert [len(nodes) for nodes in _plan_of(Layout(0, 3, 8), 8)] == [2, 2, 1]
    assert [len(nodes) for nodes in _plan_of(Layout(0, 8, 8), 3)] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_plan_is_what_the_counter_adds_up_and_takes_no_time_for_thousands_of_processes():
    for start in range(40):
        for stop in range(start, 70):
            nodes = []
            for index in range(start, stop):
                push(nodes, Node(index, 1, []))
            assert [(node.start, node.size) for node in nodes] == _nodes_of(start, stop)
    _plan_of.cache_clear()
    started = time.perf_counter()
    for _ in range(200):  # buckets of a step, the first of which makes the plan
        _plan_of(Layout(0, 2048, 4096), 4096)
    assert (time.perf_counter() - started) / 200 < 1e-3
    for num_processes in (1, 2, 3, 7, 64):
        for number in range(num_processes, 200, 11):
            layout = Layout(0, num_processes, number)
            runs = [run_of(layout._replace(process=process)) for process in range(num_processes)]
            assert [process_of(index, layout) for index in range(number)] == [
                process for process, run in enumerate(runs) for _ in run
            ]


# --- where bits get lost ----------------------------------------------------------------------------------------------


def train_plainly(data=None, num_workers=0, model=None, batch_size=16, **choices):
    torch.manual_seed(0)
    model = model() if model else make_model(kind="batchnorm")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    config = quiet(bitwise=True, num_micro_batches=4, **choices)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
    loader = loader_of(data or make_data(37), batch_size, num_workers=num_workers, drop_last=True)
    return outcome(trainer, trainer.fit(loader, loader_of(make_data(9), 4)))


@pytest.mark.distributed
def test_augmentation_in_loader_workers_has_the_same_bits():
    reference = train_plainly(Augmented(make_data(37)))
    assert train_plainly(Augmented(make_data(37)), num_workers=2) == reference
    assert on_processes(2, train_plainly, Augmented(make_data(37)), 2) == [reference] * 2
    assert train_plainly() != reference


class Shift:
    """Collate into memory that begins at an odd place, as buffers of other libraries do."""

    def __init__(self, offset):
        self.offset = offset

    def __call__(self, samples):
        inputs = torch.stack([inputs for inputs, _ in samples])
        memory = torch.empty(inputs.numel() + 16)
        shifted = memory[self.offset : self.offset + inputs.numel()].view(inputs.shape)
        return shifted.copy_(inputs), torch.stack([target for _, target in samples])


def wide():
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))


def train_shifted(offset):
    torch.manual_seed(0)
    model = wide()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet(bitwise=True)
    )
    data = TensorDataset(torch.randn(62, 64), torch.randint(0, 3, (62,)))
    return outcome(trainer, trainer.fit(DataLoader(data, 31, collate_fn=Shift(offset))))


def test_the_place_in_memory_makes_no_difference():
    assert len({str(train_shifted(offset)) for offset in (0, 1, 3, 4)}) == 1


def train_with_threads(num_threads, bitwise=True):
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 28 * 28, 3))
    data = TensorDataset(torch.randn(32, 3, 28, 28), torch.randint(0, 3, (32,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(bitwise=bitwise, num_micro_batches=4, num_epochs=1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
    return outcome(trainer, trainer.fit(DataLoader(data, 32)))["weights"], torch.get_num_threads()


def test_threads_are_fixed_for_the_run_and_put_back():
    try:
        one, threads = train_with_threads(1)
        two, threads_after = train_with_threads(2)
        assert (threads, threads_after) == (1, 2)
        assert one == two
        assert train_with_threads(1, bitwise=False) != train_with_threads(2, bitwise=False)
    finally:
        torch.set_num_threads(1)


def test_threads_and_determinism_are_recorded_and_put_back(tmp_path):
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    seen = []
    model = make_model()

    def loss_fn(outputs, targets):
        seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
        return nn.functional.cross_entropy(outputs, targets)

    for name, choices, expected in (
        ("one", dict(bitwise=True), (1, True)),
        ("two", dict(bitwise=True, num_threads=2), (2, True)),
        ("off", dict(num_threads=3), (3, False)),
    ):
        seen.clear()
        config = quiet(num_epochs=1, run_dir=tmp_path / name, **choices)
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, config=config)
        trainer.fit(loader_of(make_data(9)))
        assert set(seen) == {expected}
        text = (tmp_path / name / "config.json").read_text()
        assert f'"num_threads": {expected[0]},' in text.split('"resolved"')[1]
    assert (torch.get_num_threads(), torch.get_deterministic_debug_mode()) == before


def test_settings_are_put_back_after_an_error():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(RuntimeError, match="on purpose"), fixed_arithmetic(True, 2):
            assert torch.get_num_threads() == 2 and not torch.is_deterministic_algorithms_warn_only_enabled()
            raise RuntimeError("on purpose")
        assert torch.get_num_threads() == 1 and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def predict_and_evaluate(num_epochs=1):
    model = make_model(kind="batchnorm")
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        metrics={"confidence": lambda outputs, targets: outputs.softmax(1).amax(1)},
        config=quiet(bitwise=True, num_epochs=num_epochs),
    )
    trainer.fit(loader_of(make_data(32)))
    return trainer.evaluate(loader_of(make_data(29), 10)), trainer.predict(loader_of(make_data(29), 10))


@pytest.mark.distributed
def test_evaluation_and_prediction_have_the_same_bits():
    scores, outputs = predict_and_evaluate()
    for num_processes in (2, 3):
        results = on_processes(num_processes, predict_and_evaluate)
        assert all(result[0] == scores for result in results)
        assert torch.equal(results[0][1], outputs)


@pytest.mark.distributed
def test_bitwise_agrees_with_the_default_to_rounding():
    def losses(**choices):
        model = make_model(torch.float64, "batchnorm")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        config = quiet(num_micro_batches=4, **choices)
        data = make_data(48, torch.float64)
        return Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config).fit(loader_of(data)).train_losses

    assert losses(bitwise=True) == pytest.approx(losses(), rel=1e-10)


# --- models that place or change their memory in unusual ways ---------------------------------------------------------


class Unusual(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(5, 8), nn.Linear(8, 3)
        if kind == "buffer of a parameter":
            self.register_buffer("same", self.first.weight.detach())
        if kind == "two parameters in one memory":
            self.second = nn.Linear(5, 8)
            self.second.weight = nn.Parameter(self.first.weight.data)
        if kind == "gaps":
            self.gaps = nn.Parameter(torch.randn(8, 16)[:, ::2])
        if kind in ("counts", "sums"):
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64 if kind == "counts" else torch.float32))
        if kind == "none":
            self.register_buffer("gone", torch.zeros(1))
        if kind.startswith("grows"):
            dtype = torch.int64 if kind == "grows whole" else torch.float32
            self.register_buffer("cache", torch.zeros(0, dtype=dtype), persistent=False)

    def forward(self, inputs):
        outputs = torch.tanh(self.first(inputs))
        if self.kind == "buffer of a parameter":
            outputs = outputs + inputs @ self.same.t()
        if self.kind == "two parameters in one memory":
            outputs = outputs + self.second(inputs)
        if self.kind == "gaps":
            outputs = outputs @ self.gaps
        if self.kind in ("counts", "sums"):
            self.seen += 1
            outputs = outputs * (1 + 0.01 * self.seen)
        if self.kind == "none":
            self.gone = None if self.training else torch.zeros(1)
        if self.kind.startswith("grows"):
            length = int(inputs[:, 0].abs().max() * 10)  # another one in each micro-batch
            if length > len(self.cache):
                self.cache = torch.arange(length, dtype=self.cache.dtype)
            outputs = outputs + self.cache[:1]
        return self.last(outputs)


UNUSUAL = (
    "buffer of a parameter",
    "two parameters in one memory",
    "gaps",
    "counts",
    "sums",
    "grows",
    "none",
)


def train_unusual(bitwise=True):
    results = []
    for kind in UNUSUAL:
        torch.manual_seed(0)
        model = Unusual(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = quiet(bitwise=bitwise, num_micro_batches=6)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
        history = trainer.fit(loader_of(make_data(37)), loader_of(make_data(29), 8, shuffle=False))
        found = outcome(trainer, history)
        results.append(found)
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [2, 3])
def test_unusual_memory_has_the_same_bits(num_processes):
    reference = train_unusual()
    for results in on_processes(num_processes, train_unusual):
        for kind, one, other in zip(UNUSUAL, reference, results, strict=True):
            if kind == "grows":  # each process has a cache of its own
                one, other = (
                    {key: value for key, value in found.items() if key != "buffers"} for found in (one, other)
                )
            assert one == other, kind


def train_whole():
    model = Unusual("grows whole")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(num_micro_batches=6)).fit(loader_of(make_data(37)))


@pytest.mark.distributed
def test_a_cache_of_whole_numbers_is_refused_on_several_processes():
    train_whole()
    with pytest.raises(Exception, match="The whole-number buffer 'cache' of Unusual changes its shape from"):
        on_processes(2, train_whole)


@pytest.mark.distributed
def test_caches_of_other_sizes_on_each_process_do_no_harm_by_default_either():
    reference = train_unusual(bitwise=False)
    for results in on_processes(3, train_unusual, False):
        for kind, one, other in zip(UNUSUAL, reference, results, strict=True):
            for losses, expected in zip(other["history"][:2], one["history"][:2], strict=True):
                assert losses == pytest.approx(expected, rel=1e-5), kind


# --- what cannot be the same is refused -------------------------------------------------------------------------------


def test_metrics_that_add_up_by_themselves_are_refused():
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.MeanMetric()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="'mean' is a MeanMetric object.*bitwise=True"):
        Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"mean": metric}, config=quiet(bitwise=True))


def test_layers_over_processes_and_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Linear(5, 8), nn.SyncBatchNorm(8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(bitwise=True))
    model = nn.Sequential(nn.EmbeddingBag(7, 4, sparse=True), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(bitwise=True))
    data = TensorDataset(torch.randint(0, 7, (8, 3)), torch.randint(0, 3, (8,)))
    with pytest.raises(ValueError, match=r"0\.weight has a sparse one"):
        trainer.fit(DataLoader(data, 4))
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match="max_norm"):
        Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), config=quiet(bitwise=True))
    with pytest.raises(ValueError, match="fp8"):
        TrainConfig(bitwise=True, mixed_precision="fp8")
    with pytest.raises(ValueError, match="bitwise must be True or False"):
        TrainConfig(bitwise=1)


class Talks(nn.Module):
    """Looks at what the other processes compute."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, inputs):
        outputs = self.linear(inputs)
        if torch.distributed.is_initialized():
            mean = outputs.detach().mean(dim=0)
            torch.distributed.all_reduce(mean)
            outputs = outputs - mean
        return outputs


def train_talking():
    with pytest.raises(ValueError, match="communicates between processes by itself .*allreduce"):
        train_plainly(model=Talks)
    return True


@pytest.mark.distributed
def test_a_model_that_communicates_is_refused():
    assert on_processes(2, train_talking) == [True, True]


def test_an_operation_without_a_deterministic_kernel_is_named():
    class Undetermined(nn.Linear):
        def forward(self, inputs):
            torch.use_deterministic_algorithms(True)
            raise RuntimeError("thing_backward does not have a deterministic implementation, but ...")

    with pytest.raises(RuntimeError, match="Replace that operation") as error:
        train_plainly(model=lambda: Undetermined(5, 3))
    assert "thing_backward" in str(error.value.__cause__)


@pytest.mark.gpu
def test_one_gpu_reruns_to_the_same_bits():
    reference = gpu_case()
    assert gpu_case() == reference


def gpu_case():
    torch.manual_seed(0)
    model = make_model(kind="batchnorm")
    trainer = Trainer(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), nn.CrossEntropyLoss(), config=quiet(bitwise=True)
    )
    history = trainer.fit(loader_of(make_data(64)), loader_of(make_data(29), 8))
    return bits({name: tensor.cpu() for name, tensor in model.state_dict().items()}), history.train_losses
