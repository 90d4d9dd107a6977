"""Models that are divided over the processes: the losses of one process, the same bits, the same files."""

import hashlib
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import (
    Callback,
    HardwareError,
    TrainConfig,
    Trainer,
    WeightAverage,
    evaluate_model,
    train_model,
)
from accel_trainer.base.dtensors import is_cut, local, whole
from accel_trainer.devices.divisible import check_by_element
from accel_trainer.devices.sharding import Sharding
from accel_trainer.devices.units import units_of
from support import LAYOUTS, TWO_BY_TWO, on_fork, on_processes, put_together

pytestmark = pytest.mark.distributed
VOCABULARY = 29


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width + 3), nn.Linear(2 * width + 3, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs):
        return inputs + self.dropout(self.narrow(torch.nn.functional.gelu(self.wide(self.norm(inputs)))))


class Language(nn.Module):
    """Everything that is awkward in a small model: tied, frozen and unused weights, BatchNorm, dropout, odd sizes."""

    def __init__(self, width=16, num_blocks=3, dropout=0.1, norm=True):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))
        self.batch_norm = nn.BatchNorm1d(width) if norm else None
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(width, 5)
        self.blocks[0].requires_grad_(False)
        self.blocks[1].wide.bias.requires_grad_(False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        if self.batch_norm is not None:
            hidden = self.batch_norm(hidden.transpose(1, 2)).transpose(1, 2)
        return self.head(hidden)


def loss_fn(outputs, targets):
    return nn.functional.cross_entropy(outputs.reshape(-1, VOCABULARY), targets.reshape(-1))


def data(number=61):
    tokens = torch.randint(0, VOCABULARY, (number, 6), generator=torch.Generator().manual_seed(1))
    return TensorDataset(tokens, (3 * tokens + 1) % VOCABULARY)


def digest(tensors):
    hashed = hashlib.sha256()
    for name, tensor in sorted(put_together(tensors).items()):
        hashed.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def choices(**other):
    fixed = {"num_epochs": 2, "num_micro_batches": 8, "max_grad_norm": 0.5, "verbose": False}
    return TrainConfig(**{**fixed, **other})


def trainer_of(model, make_optimizer=torch.optim.AdamW, callbacks=(), **other):
    return Trainer(
        model, make_optimizer(model.parameters(), lr=1e-2), loss_fn, callbacks=callbacks, config=choices(**other)
    )


def train(environment=None, dtype=torch.float32, make_optimizer=torch.optim.AdamW, **other):
    """Train, evaluate and predict; return what must be the same on any layout."""
    os.environ.update(environment or {})
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)  # 0 on the main one
    model = Language().to(dtype)
    trainer = trainer_of(model, make_optimizer, **other)
    tests = DataLoader(torch.utils.data.Subset(data(), range(21)), batch_size=8)
    history = trainer.fit(DataLoader(data(), batch_size=16, shuffle=True), tests)
    outputs, scores = trainer.predict(tests), trainer.evaluate(tests)
    weights = {name: tensor.detach().clone() for name, tensor in put_together(model.state_dict()).items()}
    losses = [history.train_losses, history.test_losses, history.grad_norms]
    return {"losses": losses, "scores": scores, "weights": weights, "outputs": outputs, "best": history.best_epoch}


def train_on(layout, *how, **other):
    """Return what `train` gives on each process of a layout."""
    number, sharding, environment = LAYOUTS[layout]
    return on_processes(number, lambda: train(environment, *how, sharding=sharding, **other))


def bits_of(result):
    outputs = {} if result["outputs"] is None else {"outputs": result["outputs"]}
    return result["losses"], result["scores"], result["best"], digest(result["weights"]), digest(outputs)


# --- the promise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_bitwise_gives_the_bits_of_one_process(layout, make_optimizer):
    how = torch.float32, make_optimizer
    expected = bits_of(train({}, *how, bitwise=True))
    found = train_on(layout, *how, bitwise=True)
    assert bits_of(found[0]) == expected
    assert all(bits_of(other)[:4] == expected[:4] for other in found[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_default_agrees_with_one_process_to_rounding(layout):
    expected, found = train({}, torch.float64), train_on(layout, torch.float64)[0]
    for before, after in zip(expected["losses"], found["losses"], strict=True):
        assert after == pytest.approx(before, rel=1e-12)
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).double().norm() <= 1e-12 * weight.double().norm(), name


def train_adding_each(monkeypatch, **other):
    monkeypatch.setattr("accel_trainer.devices.divided._LARGEST_SHARE", 0.0)
    return train({}, torch.float64, sharding="full", **other)


def test_gradients_may_be_added_after_each_micro_batch_or_wait_for_the_last(monkeypatch):
    waiting = train_on("2", torch.float64)[0]
    adding = on_processes(2, train_adding_each, monkeypatch)[0]
    for before, after in zip(waiting["losses"], adding["losses"], strict=True):
        assert after == pytest.approx(before, rel=1e-12)


def test_lower_precision_is_the_same_on_any_number_of_processes_too():
    alone = on_fork(lambda: bits_of(train({}, sharding="full", bitwise=True, mixed_precision="bf16")))
    found = train_on("3", bitwise=True, mixed_precision="bf16")[0]
    assert bits_of(found) == alone
    assert all(weight.dtype == torch.float32 for name, weight in found["weights"].items() if "tracked" not in name)
    assert found["outputs"].dtype == torch.float32
    full = train({}, bitwise=True)
    assert found["losses"][0] == pytest.approx(full["losses"][0], rel=0.05)


def test_one_process_alone_has_the_whole_model_and_its_bits():
    result = train(sharding="full", bitwise=True)
    assert bits_of(result) == bits_of(train(bitwise=True))
    assert not torch.distributed.is_initialized()


# --- what a model may have --------------------------------------------------------------------------------------------


def memory_of(model):
    return sum(local(weight).numel() for weight in model.parameters())


def look_inside():
    """Train and return the model's weights by name, whether each is divided, and the modules that are units."""
    torch.manual_seed(0)
    model = Language()
    before, number = id(model), memory_of(model)
    trainer = trainer_of(model, sharding="full", num_epochs=1)
    trainer.fit(DataLoader(data(), batch_size=16))
    units = [name for name, module in model.named_modules() if "FSDP" in type(module).__name__]
    tied = model.head.weight is model.embedding.weight
    held = [
        trainer.optimizer.param_groups[0]["params"][index] is weight for index, weight in enumerate(model.parameters())
    ]
    state = {id(weight) for weight in trainer.optimizer.state}
    unused = [id(weight) in state for weight in model.unused.parameters()]
    divided = all(map(is_cut, model.parameters()))
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    again = trainer.evaluate(DataLoader(data(3), batch_size=3))  # the model stays divided
    return (
        id(model) == before,
        number / memory_of(model),
        units,
        tied,
        all(held),
        unused,
        divided,
        frozen,
        again["loss"],
    )


def test_blocks_are_units_and_each_process_has_its_share():
    found = on_processes(2, look_inside)
    for same, share, units, tied, held, unused, divided, frozen, _ in found:
        assert same and tied and held and divided
        assert 1.8 < share < 2.2
        assert units == ["", "blocks.0", "blocks.1", "blocks.2"]
        assert unused == [False, False]  # no gradient, so no state and no decay
        assert {name.split(".")[1] for name in frozen} == {"0", "1"}
    assert len({result[-1] for result in found}) == 1


def test_units_without_blocks_are_parts_that_nothing_else_uses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight
            self.attention = nn.MultiheadAttention(4, 2)  # uses the weights of its parts without calling them

    model = Tied()
    assert units_of(model) == [model.middle, model.attention, model]
    with pytest.raises(ValueError, match="blocks of the class Layer, and the model has none"):
        units_of(model, ("Layer",))
    assert units_of(model, ("Linear",)) == [model.middle, model]
    sequence = nn.Sequential(nn.Linear(4, 400), nn.Sequential(nn.Linear(400, 400), nn.ReLU()), nn.LayerNorm(400))
    assert units_of(sequence) == [sequence[1][0], sequence]  # the others are too small


def gradients(env, dropout=0.3):
    """Return the gradients of a batch with dropout."""
    os.environ.update(env)
    torch.manual_seed(0)
    model, found = Language(dropout=dropout, norm=False), {}

    class Note(Callback):
        def on_fit_start(self, trainer):
            trainer.optimizer.register_step_pre_hook(
                lambda *_: found.update({n: whole(w.grad) for n, w in model.named_parameters() if w.grad is not None})
            )

    config = {"max_grad_norm": None, "max_steps": 1, "sharding": "full", "num_micro_batches": 2}
    trainer_of(model, torch.optim.SGD, [Note()], **config).fit(DataLoader(data(16), batch_size=16))
    recomputing = [name for name, module in model.named_modules() if "forward" in vars(module)]
    return found, recomputing, list(model.state_dict())


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize("option", ["ACTIVATION_CHECKPOINTING", "OFFLOAD_PARAMS"])
def test_recomputed_activations_keep_their_dropout_and_an_offload_changes_nothing(option):
    plain, _, names = on_processes(2, gradients, FSDP2)[0]
    found, recomputing, same_names = on_processes(2, gradients, {**FSDP2, f"FSDP_{option}": "true"})[0]
    assert plain.keys() == found.keys() and not recomputing and names == same_names
    for name, gradient in plain.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-7), name


class Sometimes(nn.Module):
    """A part that only some samples use, within a unit."""

    def __init__(self):
        super().__init__()
        self.often, self.seldom = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, inputs):
        outputs = self.often(inputs)
        return outputs + self.seldom(inputs) if inputs[0, 0] > 0 else outputs


def train_sometimes(sharding, model, **other):
    torch.manual_seed(0)
    model = model()
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    config = choices(sharding=sharding, num_micro_batches=4, max_grad_norm=None, **other)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    trainer = Trainer(model, optimizer, nn.MSELoss(), config=config)
    history = trainer.fit(DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=8))
    return history.train_losses, {name: whole(weight).detach().clone() for name, weight in model.named_parameters()}


def within_a_unit():
    return nn.Sequential(Sometimes(), nn.Linear(6, 1))


@pytest.mark.parametrize("bitwise", [False, True])
def test_what_only_some_samples_use_has_its_true_gradient(bitwise):
    how = {"bitwise": bitwise, "find_unused_parameters": not bitwise}
    losses, weights = train_sometimes(None, within_a_unit, **how)
    for number in (2, 3):
        found, other = on_processes(number, lambda: train_sometimes("full", within_a_unit, **how))[0]
        assert found == (losses if bitwise else pytest.approx(losses, rel=1e-5))
        for name, weight in weights.items():
            assert torch.equal(other[name], weight) if bitwise else torch.allclose(other[name], weight, atol=1e-6), name


def as_a_unit():
    class Outer(Sometimes):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 1)

        def forward(self, inputs):
            return self.last(super().forward(inputs))

    return Outer()


def refused(function, *args, **how):
    try:
        function(*args, **how)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refused_fit(model, **how):
    return refused(lambda: trainer_of(model, **how).fit(DataLoader(data(), batch_size=16)))


@pytest.mark.timeout(30)
def test_a_unit_that_only_some_processes_call_is_refused_and_hangs_nobody(capfd):
    for text in on_processes(2, refused, lambda: train_sometimes("full", as_a_unit)):
        assert "Process 0 calls" in text and "must be used by all processes" in text


def patch_of_two():
    """Train from weights that differ between the processes; return the first loss."""
    torch.manual_seed(torch.distributed.get_rank())
    return trainer_of(Language(), sharding="full", num_epochs=1, max_steps=1).fit(DataLoader(data(8), batch_size=8))


def test_all_begin_with_the_weights_of_the_main_process():
    torch.manual_seed(0)
    expected = trainer_of(Language(), num_epochs=1, max_steps=1).fit(DataLoader(data(8), batch_size=8))
    for history in on_processes(2, patch_of_two):
        assert history.train_losses == pytest.approx(expected.train_losses, rel=1e-6)


class Own(nn.Module):
    """Has a weight and a buffer of its own, and knows their first values."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(6))
        self.register_buffer("shift", torch.empty(6), persistent=False)

    def reset_parameters(self):
        nn.init.ones_(self.scale)
        nn.init.constant_(self.shift, 0.5)

    def forward(self, inputs):
        return inputs * self.scale + self.shift


def on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6), Own(), nn.Linear(6, 1))
    model[1].weight = nn.Parameter(torch.empty(6, 12, device="meta"))
    return model


def test_a_model_on_the_meta_device_gets_the_same_first_weights_everywhere():
    losses, weights = train_sometimes(None, on_meta, bitwise=True)
    for number in (2, 3):
        found, other = on_processes(number, lambda: train_sometimes("full", on_meta, bitwise=True))[0]
        assert found == losses and digest(other) == digest(weights)
    assert train_sometimes(None, on_meta, bitwise=True, seed=1)[0] != losses

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(6, device="meta"))

    with pytest.raises(ValueError, match="meta device, and 1 cannot be given first weights there: add a method reset"):
        train_sometimes(None, lambda: nn.Sequential(nn.Linear(6, 1), Bare()))


def by_hand(trainer):
    """Train on the whole model by a loop of one's own, so that the optimizer has a state."""
    for inputs, targets in DataLoader(data(), batch_size=16):
        loss_fn(trainer.model(inputs), targets).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


LOADER = DataLoader(data(21), batch_size=8)
BEFORE = {
    "nothing": lambda trainer: None,
    "evaluate": lambda trainer: trainer.evaluate(LOADER),
    "predict": lambda trainer: trainer.predict(LOADER),
    "by hand": by_hand,
}


def train_after(before, sharding, make_model=Language):
    """Train by two optimizers that have been made before; return all losses and the weights."""
    torch.manual_seed(0)
    model = make_model()
    trainers = [trainer_of(model, sharding=sharding, bitwise=True, num_epochs=1) for _ in range(2)]
    BEFORE[before](trainers[0])
    held = trainers[0].optimizer.param_groups[0]["params"]
    assert list(map(id, held)) == list(map(id, model.parameters()))  # nothing old stays in memory
    losses = [trainer.fit(LOADER).train_losses for trainer in trainers]
    return losses, digest(model.state_dict())


@pytest.mark.parametrize("before", BEFORE)
def test_an_optimizer_from_before_the_division_trains_the_parts(before):
    expected = train_after(before, None)
    assert on_processes(2, train_after, before, "full") == [expected, expected]
    assert expected[0][1] < expected[0][0]


def language_on_meta():
    with torch.device("meta"):
        return Language()


@pytest.mark.parametrize("number, sharding", [(1, None), (2, None), (2, "full")])
def test_an_optimizer_from_before_the_model_had_memory_trains_it(number, sharding):
    losses, weights = train_after("nothing", None, language_on_meta)
    assert losses[1] < losses[0]
    for before in ("evaluate", "predict"):
        for found in on_processes(number, train_after, before, sharding, language_on_meta):
            assert found == (losses, weights)


def call_functions(environment):
    os.environ.update(environment)
    torch.manual_seed(0)
    model = Language(dropout=0.0, norm=False)  # the functions cut by the number of processes
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for _ in range(2)]
    losses = [evaluate_model(LOADER, model, loss_fn)]
    losses += [train_model(LOADER, model, loss_fn, optimizer) for optimizer in optimizers]
    return [*losses, evaluate_model(LOADER, model, loss_fn)]


def test_the_two_functions_divide_too():
    expected = call_functions({})
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for found in on_processes(2, call_functions, asked):
        assert found == pytest.approx(expected, rel=1e-5)


def adafactor_after_a_run():
    model = Language()
    trainer_of(model, sharding="full", num_epochs=1, max_steps=1).fit(LOADER)
    return refused_fit(model, make_optimizer=torch.optim.Adafactor, sharding="full")


def test_what_divides_an_optimizer_is_asked_of_a_model_divided_before_too(capfd):
    for text in on_processes(2, adafactor_after_a_run):
        assert "use an optimizer that works by element" in text


def train_average(sharding):
    torch.manual_seed(0)
    trainer = trainer_of(Language(norm=False), callbacks=[WeightAverage(0.9)], sharding=sharding, bitwise=True)
    history = trainer.fit(DataLoader(data(), batch_size=16), DataLoader(data(20), batch_size=8))
    return history.train_losses, history.test_losses, digest(trainer.model.state_dict())


def test_an_average_of_divided_weights():
    assert on_processes(3, train_average, "full")[0] == train_average(None)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own insides
def test_compiled_blocks_have_the_losses_of_one_process():
    """Compiled dropout draws other numbers than that of the undivided model does without a compiler."""
    expected = train({}, bitwise=True, compile="regional")
    assert bits_of(train_on("2", bitwise=True, compile="regional")[0]) == bits_of(expected)


class Thaw(Callback):
    """Train from the second epoch on what was frozen, as gradual unfreezing does."""

    def on_epoch_start(self, trainer):
        if trainer.state.epoch == 2:
            trainer.model.blocks[0].requires_grad_(True)


@pytest.mark.parametrize("bitwise", [False, True])
def test_weights_may_be_unfrozen_between_epochs(bitwise):
    how = {"num_epochs": 3, "bitwise": bitwise, "callbacks": [Thaw()]}
    expected, found = train({}, torch.float64, **how), train_on("2", torch.float64, **how)[0]
    for before, after in zip(expected["losses"], found["losses"], strict=True):
        assert after == (before if bitwise else pytest.approx(before, rel=1e-12))
    start = train({}, torch.float64, num_epochs=1, bitwise=bitwise)["weights"]["blocks.0.wide.weight"]
    assert not torch.equal(found["weights"]["blocks.0.wide.weight"], start)


class Translation(nn.Module):
    """Several ways in which autograd and a divided model could add up in another order.

    Blocks that are given the same tensor and use it twice, as a decoder the output of an encoder; a block that is
    called twice; a block that is twice in a list; a list of lists.
    """

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 7)
        self.decoder = nn.ModuleList(Cross() for _ in range(3))
        self.decoder.append(self.decoder[0])
        self.last = nn.ModuleList(nn.ModuleList([nn.Linear(7, 7), nn.Tanh()]) for _ in range(2))
        self.head = nn.Linear(7, 1)

    def forward(self, inputs):
        memory = torch.tanh(self.encoder(inputs))
        outputs = memory
        for block in (*self.decoder, self.decoder[1]):
            outputs = block(outputs, memory=memory)
        for linear, activation in self.last:
            outputs = activation(linear(outputs))
        return self.head(outputs)


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.keys, self.values = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, inputs, memory):
        return inputs + torch.sigmoid(self.keys(memory)) * self.values(memory)


def train_pairs(sharding, **other):
    """Train with a loss that calls the model twice."""
    torch.manual_seed(0)
    inputs = torch.randn(45, 6, generator=torch.Generator().manual_seed(3))
    model = Translation()

    def compute_loss(model, batch):
        return (model(batch[0]) - 0.5 * model(batch[0].flip(1)) - batch[1]).square().mean()

    config = choices(sharding=sharding, num_micro_batches=6, bitwise=True, **other)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, compute_loss=compute_loss, config=config)
    losses = trainer.fit(DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=10)).train_losses
    return losses, digest(model.state_dict())


@pytest.mark.parametrize("layout", ["2", "3", "2x2"])
def test_what_is_used_several_times_has_the_same_bits(layout):
    number, sharding, environment = LAYOUTS[layout]
    found = on_processes(number, lambda: os.environ.update(environment) or train_pairs(sharding))
    assert found == [train_pairs(None)] * number


class OneRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(6, 1, bias=False)

    def forward(self, inputs):
        return self.only(inputs)


def norms_of_one_row():
    torch.manual_seed(0)
    model = OneRow().double()
    inputs = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    config = choices(sharding="full", num_micro_batches=4, max_grad_norm=0.1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), config=config)
    return trainer.fit(DataLoader(TensorDataset(inputs, inputs[:, :1]), batch_size=8)).grad_norms


def test_a_process_without_rows_knows_the_same_norm():
    first, *others = on_processes(3, norms_of_one_row)
    assert all(other == first for other in others)


def differently_built(kind, monkeypatch):
    rank = torch.distributed.get_rank()
    model = Language(num_blocks=4 if kind == "blocks" and rank else 3)
    if kind == "frozen" and rank:
        model.blocks[2].requires_grad_(False)
    if kind == "memory" and rank:
        monkeypatch.setattr("accel_trainer.devices.divided._LARGEST_SHARE", 0.0)
    return refused_fit(model, sharding="full")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "kind, message",
    [
        ("blocks", "process 1 has (16,) float32 where process 0 has nothing, in blocks.3.norm.weight"),
        ("frozen", "process 1 has (16,) float32, frozen where process 0 has (16,) float32, in blocks.2.norm.weight"),
        ("memory", None),
    ],
)
def test_processes_that_differ_are_told_and_none_waits_for_ever(kind, message, monkeypatch, capfd):
    for text in on_processes(2, differently_built, kind, monkeypatch):
        assert text is None if message is None else message in text


class OtherRate(Callback):
    """Lowers the learning rate on the main process only."""

    def on_epoch_end(self, trainer):
        if trainer.is_main_process:
            trainer.optimizer.param_groups[0]["lr"] *= 0.5


GIVEN_APART = {  # what is said on both processes, and what process 1 is given
    "num_epochs is 2 on process 0 and 3 on process 1": {"num_epochs": 3},
    "seed is 0 on process 0 and 5 on process 1": {"seed": 5},
    "run_dir is None on process 0 and 'given' on process 1": {"run_dir": "runs/other"},
    "num_micro_batches is 4 on process 0 and 2 on process 1": {"num_micro_batches": 2},
    "sharding is 'full' on process 0 and None on process 1": {"sharding": None},
    "max_grad_norm is None on process 0 and 1.0 on process 1": {"max_grad_norm": 1.0},
    "restore_best is True on process 0 and False on process 1": {"restore_best": False},
    "the optimizer's lr (group 0) is 0.01 on process 0 and 0.02 on process 1": {
        "make_optimizer": lambda weights, lr: torch.optim.AdamW(weights, lr=2 * lr)
    },
}


def given_apart():
    rank = torch.distributed.get_rank()
    common = {"sharding": "full", "num_epochs": 2, "num_micro_batches": 4, "max_grad_norm": None}
    texts = [refused_fit(Language(), **common | (apart if rank else {})) for apart in GIVEN_APART.values()]
    own = {"time_limit_seconds": 1000.0 + rank, "heartbeat_seconds": 30.0 + rank, "num_threads": 1 + rank}
    texts.append(refused_fit(Language(), **common, **own))
    return [*texts, refused_fit(Language(), **common, callbacks=[OtherRate()])]


@pytest.mark.timeout(60)
def test_processes_that_are_given_other_choices_or_settings_are_told_by_name(capfd):
    for *found, own, changed in on_processes(2, given_apart):
        for expected, text in zip(GIVEN_APART, found, strict=True):
            assert text is not None and expected in text, text
        assert own is None
        assert "the optimizer's lr (group 0) is 0.005 on process 0 and 0.01 on process 1" in changed


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate_few(number):
    torch.manual_seed(0)
    trainer = trainer_of(Language(), sharding="full")
    loader = DataLoader(data(number), batch_size=16)
    outputs = trainer.predict(loader)
    return trainer.evaluate(loader)["loss"], None if outputs is None else tuple(outputs.shape)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("number", [1, 2, 5])
def test_an_evaluation_of_fewer_samples_than_processes_does_not_hang(number):
    torch.manual_seed(0)
    expected = trainer_of(Language()).evaluate(DataLoader(data(number), batch_size=16))["loss"]
    (loss, shape), *others = on_processes(4, evaluate_few, number)
    assert loss == pytest.approx(expected, rel=1e-6) and shape == (number, 6, VOCABULARY)
    assert all(other == (loss, None) for other in others)


class Poison(Callback):
    """Make a weight of one process nan."""

    def on_step_end(self, trainer):
        if trainer.state.step == 2 and torch.distributed.get_rank() == 1:
            with torch.no_grad():
                local(trainer.model.blocks[2].wide.weight)[-1] = float("nan")


def poisoned(on_nonfinite):
    torch.manual_seed(0)
    config = {"sharding": "full", "on_nonfinite": on_nonfinite, "max_steps": 2}
    return refused(
        lambda: trainer_of(Language(), callbacks=[Poison()], **config).fit(DataLoader(data(), batch_size=16))
    )


def test_a_weight_that_is_not_finite_on_one_process_ends_all_alike():
    first, second = on_processes(2, poisoned, "raise")
    assert first == second and "NonFiniteError" in first and "Not finite by now: blocks.2.wide.weight." in first


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, message",
    [
        ({**FSDP2, "FSDP_VERSION": "1"}, "FSDP version 1, which is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1, which is not supported"),
        ({**TWO_BY_TWO, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism .tp_size=2., which is not supported"),
        ({**TWO_BY_TWO, "PARALLELISM_CONFIG_CP_SIZE": "2"}, "context parallelism"),
        ({**TWO_BY_TWO, "PARALLELISM_CONFIG_SP_SIZE": "2"}, "sequence parallelism"),
        (TWO_BY_TWO, "a parallelism config without FSDP"),
        (
            {**TWO_BY_TWO, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "two"},
            "_DP_SHARD_SIZE must be a whole number.* got 'two'",
        ),
        ({**TWO_BY_TWO, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "-2"}, "_DP_REPLICATE_SIZE must be a whole number"),
        ({**FSDP2, "FSDP_VERSION": "two"}, "FSDP version two, which is not supported"),
        ({**FSDP2, "FSDP_STATE_DICT_TYPE": "ONE"}, "cannot read the launch's settings of FSDP .*: 'ONE'"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "1", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "1"}, "Leave it out"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed.*sharding='full'"),
    ],
)
def test_other_kinds_of_parallelism_are_refused_by_name(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HardwareError, match=message):
        trainer_of(Language()).fit(DataLoader(data(), batch_size=16))


class Scalar(Language):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))


class Empty(Language):
    def __init__(self):
        super().__init__()
        self.nothing = nn.Linear(4, 4)
        self.nothing.weight = nn.Parameter(torch.empty(0, 4))


class Mixed(Language):
    def __init__(self):
        super().__init__()
        self.blocks[2].norm.double()


class Sparse(Language):
    def __init__(self):
        super().__init__()
        self.other = nn.Embedding(4, 4, sparse=True)


class SharingData(Language):
    def __init__(self):
        super().__init__()
        self.blocks[2].norm.weight.data = self.blocks[0].norm.weight.data


class Hooked(Language):
    def __init__(self):
        super().__init__()
        self.blocks[1].norm.weight.register_hook(lambda gradient: 0.5 * gradient)


class Filling(Language):
    """Its blocks fill a list."""

    class Block(Block):
        def forward(self, inputs, found):
            found.append(super().forward(inputs))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Filling.Block(16, 0.1) for _ in range(3))

    def forward(self, tokens):
        found = [2.0 * self.embedding(tokens)]
        for block in self.blocks:
            block(found[-1], found)
        return self.head(sum(found[1:]))


class InPlace(Language):
    def forward(self, tokens):
        found = 2.0 * self.embedding(tokens)
        for block in self.blocks:
            found = block(found)
        return self.head(found)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(16, 16)) for _ in range(3))


class Keeping(Language):
    def __init__(self):
        super().__init__()
        self.kept = [self.embedding.weight]

    def forward(self, tokens):
        return super().forward(tokens) + self.kept[0].sum()


def muon(weights, lr):
    return torch.optim.Muon([weight for weight in weights if weight.ndim == 2], lr=lr)


class Idle(torch.optim.SGD):
    def step(self, closure=None):
        pass


REFUSED = {
    "num_micro_batches must be given": {"num_micro_batches": None},
    "only the repeated blocks can be compiled": {"compile": True},
    "temperature is a single number": {"model": Scalar},
    "nothing.weight has the shape (0, 4)": {"model": Empty},
    "Block that are trained are float32 and float64": {"model": Mixed},
    "other has sparse gradients": {"model": Sparse},
    "blocks.0.norm.weight and blocks.2.norm.weight share memory": {"model": SharingData},
    "blocks.1.norm.weight has a hook of its own": {"model": Hooked},
    "blocks.0 fills a list or dictionary": {"model": Filling},
    "Let it make a new tensor (inplace=False)": {"model": InPlace},
    "embedding.weight was listed before the model was divided": {"model": Keeping},
    "on a part of a weight": {"make_optimizer": torch.optim.Rprop},
    "does not train a weight of its param_groups": {"make_optimizer": Idle},
    "Muon looks at a whole weight": {"make_optimizer": muon},
    "its state 'row_var' has the shape": {"make_optimizer": torch.optim.Adafactor},
    "Leave out fused=True": {
        "make_optimizer": lambda weights, lr: torch.optim.AdamW(weights, lr=lr, fused=True),
        "bitwise": True,
    },
}


def refuse_all():
    return [
        refused_fit(**{"sharding": "full", **case, "model": case.get("model", Language)()}) for case in REFUSED.values()
    ]


def test_what_cannot_be_divided_is_refused_by_name(capfd):
    for found in on_processes(2, refuse_all):
        for expected, text in zip(REFUSED, found, strict=True):
            assert text is not None and expected in text, text


@pytest.mark.parametrize("model", [Filling, InPlace])
def test_a_block_may_change_what_it_is_given_where_the_model_is_whole(model):
    losses = []
    for bitwise in (False, True):
        torch.manual_seed(0)
        history = trainer_of(model(), bitwise=bitwise).fit(DataLoader(data(), batch_size=16))
        losses.append(history.train_losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Several(torch.optim.Optimizer):
    """Steps two others, each with half of the weights; a weight says how much of its gradient it wants."""

    def __init__(self, weights, lr):
        weights = list(weights)
        for weight in weights:
            weight.scale = 0.5
        super().__init__(weights, {"lr": lr})
        self.inner = [torch.optim.SGD(weights[::2], lr=lr), torch.optim.AdamW(weights[1::2], lr=lr)]

    def step(self, closure=None):
        for group in (group for optimizer in self.inner for group in optimizer.param_groups):
            for weight in group["params"]:
                weight.grad = None if weight.grad is None else weight.scale * weight.grad
        for optimizer in self.inner:
            optimizer.step()


class Renamed(Language):
    def state_dict(self, *args, **kwargs):
        return {f"its.{name}": tensor for name, tensor in super().state_dict(*args, **kwargs).items()}


@pytest.mark.parametrize("how", [{"make_optimizer": Several}, {"make_model": Renamed}])
def test_what_is_the_users_own_is_as_on_one_process(how):
    def run(sharding):
        torch.manual_seed(0)
        model = how.get("make_model", Language)()
        trainer = trainer_of(model, how.get("make_optimizer", torch.optim.AdamW), bitwise=True, sharding=sharding)
        history = trainer.fit(DataLoader(data(), batch_size=16), DataLoader(data(21), batch_size=8))
        return history.train_losses, digest(dict(model.named_parameters()))

    expected = run(None)
    assert expected[0][1] < expected[0][0]
    assert on_processes(2, run, "full") == [expected, expected]


def test_replicas_are_refused_where_processes_are_not_numbered_host_by_host(monkeypatch):
    place = SimpleNamespace(hosts=((0, 2), (1, 3)))
    monkeypatch.setattr("accel_trainer.devices.sharding.place_of", lambda process: place)
    with pytest.raises(HardwareError, match=r"host by host: the first has \[0, 2\].*--distribution=block"):
        Sharding("hybrid", "argument").mesh_sizes(0, 4)
    place.hosts = ((0, 1), (2, 3))
    assert Sharding("hybrid", "argument").mesh_sizes(0, 4) == (2, 2)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta"])
def test_optimizers_that_work_by_element_are_taken_and_stay_as_they_are(kind):
    layer = nn.Linear(4, 4)
    optimizer = getattr(torch.optim, kind)([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.0}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = repr(optimizer.state_dict())
    check_by_element(optimizer, torch.device("cpu"), bitwise=True)
    assert repr(optimizer.state_dict()) == before


def test_a_divided_model_is_for_runs_that_divide(capfd):
    def again():
        trainer = trainer_of(Language(), sharding="full", num_epochs=1)
        trainer.fit(DataLoader(data(), batch_size=16))
        history = Trainer(trainer.model, trainer.optimizer, loss_fn, config=choices(sharding="full", num_epochs=1)).fit(
            DataLoader(data(), batch_size=16)
        )
        return history.train_losses, refused(lambda: trainer_of(trainer.model))

    losses, text = on_processes(2, again)[0]
    assert losses[0] > 0 and "model is divided over the processes already" in text
