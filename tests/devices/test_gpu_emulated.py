"""What a GPU would find, found without one: on an emulated device, by the CPU's scaler, by memory that is reused."""

import copy
import functools
import gc
import math
import os
import re
import warnings
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import FunctionType, SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset
from transformers.modeling_outputs import SequenceClassifierOutput

from accel_trainer import Callback, Trainer, evaluate_model, train_model
from accel_trainer.data.collated import aligned, pinned
from accel_trainer.data.cut import Layout
from accel_trainer.data.micro_batches import MicroBatchLoader
from accel_trainer.data.sources import divide
from accel_trainer.devices import prepared
from accel_trainer.devices.arithmetic import fixed_arithmetic
from accel_trainer.devices.hardware import Hardware
from accel_trainer.devices.prepared import Placement, Prepared, is_on, may_be_streamed, place_state
from accel_trainer.numbers.buffers import Buffers
from accel_trainer.numbers.gradients import LocalGradients
from accel_trainer.run import Run, Training
from accel_trainer.storage.saver import Saver
from emulated import DEVICE, EmulatedGpu
from support import Items, correct, launch, loader_of, make_data, make_model, on_processes, quiet

# --- no step waits for the host ---------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A module of the user's own, with a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(5))

    def forward(self, inputs):
        self.scale.mul_(0.9).add_(inputs.abs().mean(0), alpha=0.1)
        return self.layer(inputs * self.scale)


class Words(nn.Module):
    """What is in a batch by name, and a loss that takes names too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs, mask=None):
        return self.layer(inputs)


class Named(Items):
    def __getitem__(self, index):
        inputs, labels = self.data[index]
        return {"inputs": {"inputs": inputs, "mask": inputs > 0}, "labels": labels}


def mean_and_weight(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]), (batch[1] != 1).sum()


def mean_and_number(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]), float(len(batch[1]))


def mean_and_host_tensor(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]), torch.tensor(len(batch[1]), dtype=torch.float64)


def only_mean(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def warm_up(optimizer, num_steps):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=num_steps)


def plateau(optimizer, num_epochs):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


CONFIGURATIONS = {
    "plain": {},
    "cut": {"num_micro_batches": 4},
    "cut, batchnorm": {"num_micro_batches": 2, "model": lambda: make_model(kind="batchnorm")},
    "batchnorm": {"model": lambda: make_model(kind="batchnorm")},
    "dropout": {"model": lambda: make_model(kind="dropout")},
    "own buffers, cut": {"num_micro_batches": 4, "model": Scaled},
    "own buffers, bitwise": {"num_micro_batches": 4, "model": Scaled, "bitwise": True},
    "bitwise": {"bitwise": True, "num_micro_batches": 4},
    "bitwise, batchnorm": {"bitwise": True, "num_micro_batches": 2, "model": lambda: make_model(kind="batchnorm")},
    "clipping": {"max_grad_norm": 1.0},
    "clipping, cut": {"max_grad_norm": 1.0, "num_micro_batches": 2},
    "class weights": {"loss_fn": lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 2.0]))},
    "class weights, cut": {
        "loss_fn": lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 2.0])),
        "num_micro_batches": 2,
    },
    "ignore_index, cut": {"loss_fn": lambda: nn.CrossEntropyLoss(ignore_index=1), "num_micro_batches": 2},
    "label smoothing": {"loss_fn": lambda: functools.partial(F.cross_entropy, label_smoothing=0.1)},
    "weight_fn, device": {"weight_fn": lambda batch: (batch[1] > 0).sum(), "num_micro_batches": 2},
    "weight_fn, number": {"weight_fn": lambda batch: len(batch[1]), "num_micro_batches": 2},
    "weight_fn, host tensor": {"weight_fn": lambda batch: torch.tensor(float(len(batch[1]))), "num_micro_batches": 2},
    "weight_fn, host tensor, bitwise": {
        "weight_fn": lambda batch: torch.tensor(float(len(batch[1]))),
        "num_micro_batches": 4,
        "bitwise": True,
    },
    "compute_loss": {"compute_loss": only_mean},
    "compute_loss, cut": {"compute_loss": only_mean, "num_micro_batches": 2},
    "compute_loss, bitwise": {"compute_loss": only_mean, "bitwise": True, "num_micro_batches": 4},
    "compute_loss, number": {"compute_loss": mean_and_number, "num_micro_batches": 2},
    "compute_loss, device": {"compute_loss": mean_and_weight, "num_micro_batches": 2},
    "compute_loss, host tensor": {"compute_loss": mean_and_host_tensor, "num_micro_batches": 2},
    "bf16": {"mixed_precision": "bf16"},
    "bf16, cut, batchnorm": {
        "mixed_precision": "bf16",
        "num_micro_batches": 2,
        "model": lambda: make_model(kind="batchnorm"),
    },
    "schedule by steps": {"scheduler": warm_up},
    "schedule by plateau": {"scheduler": plateau, "schedule_every": "epoch"},
    "steps per epoch": {"steps_per_epoch": 5, "num_epochs": 2},
    "metrics": {"metrics": {"accuracy": correct, "host": lambda outputs, targets: torch.tensor(0.5)}},
    "metrics that are numbers": {"metrics": {"constant": lambda outputs, targets: 0.5, "mixed": correct}},
    "samples one by one": {"wrap": Items},
    "dictionaries": {"wrap": Named, "model": Words},
    "several in a block of the ledger": {"batch_size": 1, "compute_loss": mean_and_host_tensor, "num_samples": 1100},
    "patience": {"patience": 2, "num_epochs": 3, "restore_best": True},
}


def run_on_gpu(gpu, loader=None, test=True, **choices):
    """Train on the emulated device, test, and return the trainer, the loaders, and what waited in the steps."""
    own = {name: choices.pop(name, None) for name in ("compute_loss", "weight_fn", "scheduler", "metrics")}
    metrics = own["metrics"]
    if own["compute_loss"] is not None:
        own["metrics"] = None
    wrap, batch_size = choices.pop("wrap", lambda data: data), choices.pop("batch_size", 8)
    # Moved to a GPU, parameters stay the same objects; to this device they would not, and the optimizer held others.
    model = choices.pop("model", make_model)().to(DEVICE)
    loss_fn = choices.pop("loss_fn", nn.CrossEntropyLoss)()
    optimizer = choices.pop("optimizer", torch.optim.AdamW)(model.parameters(), lr=0.01)
    gpu.watch(optimizer)
    data = wrap(make_data(choices.pop("num_samples", 100)))

    num_steps = choices.get("steps_per_epoch") or -(-len(data) // batch_size)

    class Steps(Callback):
        def on_step_end(self, trainer):
            gpu.step = trainer.state.step % num_steps  # what is noted under it belongs to the next one; 0 to the epoch

        def on_epoch_start(self, trainer):
            gpu.step = 0

    tests = loader_of(wrap(make_data(29)), 8, shuffle=False) if test else None
    loaders = loader or loader_of(data, batch_size), tests
    config = quiet(**{"num_epochs": 1, "report_every": 10**6, "restore_best": False, **choices})
    loss_fn = None if own["compute_loss"] else loss_fn
    trainer = Trainer(model, optimizer, loss_fn, callbacks=[Steps()], config=config, **own)
    with gpu:
        trainer.fit(*loaders)
    assert all(parameter.device == DEVICE for parameter in model.parameters())
    assert metrics is None or own["metrics"] is None or set(trainer.history.metrics) == set(metrics)
    return trainer, loaders


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_step_waits_and_nothing_mixes_with_the_host(name, monkeypatch):
    gpu = EmulatedGpu(monkeypatch)
    trainer, (_, test_loader) = run_on_gpu(gpu, **CONFIGURATIONS[name])
    assert gpu.in_steps(1, trainer.state.step) == {}
    with gpu:
        scores = trainer.evaluate(test_loader)
        outputs = trainer.predict(test_loader)
    assert scores["loss"] == 1 and outputs.shape == (29, 3)


@pytest.mark.parametrize("cut", [1, 4])
def test_skipping_costs_one_read_a_step(cut, monkeypatch):
    gpu = EmulatedGpu(monkeypatch)
    trainer, _ = run_on_gpu(gpu, on_nonfinite="skip", num_micro_batches=cut)
    waits = gpu.in_steps(1, 10)
    assert [kind for kind, _ in waits] == ["read"] and list(waits.values()) == [10]


def test_the_emulation_has_teeth(monkeypatch):
    class Peeks(nn.Module):
        def forward(self, outputs, targets):
            offset = torch.tensor([0.0, 1.0, 2.0], device=outputs.device)
            copied = torch.zeros(3).to(outputs.device)
            loss = F.cross_entropy(outputs + offset + copied, targets)
            return loss if loss.item() >= 0 else -loss

    gpu = EmulatedGpu(monkeypatch)
    run_on_gpu(gpu, loss_fn=Peeks)
    assert {kind: count for (kind, _), count in gpu.in_steps(1, 10).items()} == {"construction": 20, "read": 10}

    class Mixes(nn.Module):
        def forward(self, outputs, targets):
            return F.cross_entropy(outputs + torch.zeros(3), targets)

    with pytest.raises(RuntimeError, match="device"):
        run_on_gpu(EmulatedGpu(monkeypatch), loss_fn=Mixes)


def test_a_prediction_waits_once_in_many_batches(monkeypatch):
    gpu = EmulatedGpu(monkeypatch)
    trainer, _ = run_on_gpu(gpu)
    gpu.waits.clear()
    with gpu:
        trainer.predict(loader_of(make_data(100), 2, shuffle=False))
    waits = [kind for (_, kind, place), count in gpu.waits.items() for _ in range(count) if "loop" in place or count]
    assert waits.count("synchronization") == 2 and waits.count("read") == 0  # 50 batches, 32 at a time


def test_the_tutorial_functions_and_a_second_run_work_there(monkeypatch):
    gpu = EmulatedGpu(monkeypatch)
    model = make_model(kind="batchnorm").to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader, loss_fn = loader_of(make_data(40), 8), nn.CrossEntropyLoss()
    with gpu:
        assert train_model(loader, model, loss_fn, optimizer) == 1
        assert evaluate_model(loader, model, loss_fn) == 1
    trainer = Trainer(model, optimizer, loss_fn, config=quiet())
    with gpu:
        trainer.fit(loader, loader)
        trainer.fit(loader, loader)


def test_a_run_is_saved_there_and_goes_on(tmp_path, monkeypatch):
    def run(num_epochs, resume):
        gpu = EmulatedGpu(monkeypatch)
        choices = {"run_dir": tmp_path / "run", "resume": resume, "checkpoint_every": 5, "restore_best": True}
        trainer, _ = run_on_gpu(gpu, num_epochs=num_epochs, max_steps=None if resume else 8, **choices)
        return trainer.state.step

    assert run(2, False) == 8
    assert run(2, True) == 26


# --- what comes from elsewhere ----------------------------------------------------------------------------------------


class Graph:
    """A batch that is an object, as those of graph libraries are."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def to(self, device, non_blocking=False):
        return Graph(self.inputs.to(device, non_blocking=non_blocking), self.targets.to(device, non_blocking=True))


def joined(make):
    def collate(samples):
        inputs, targets = zip(*samples, strict=True)
        return make(torch.stack(inputs), torch.stack(targets))

    return collate


def loss_of_graph(model, batch):
    graph = batch["graph"] if isinstance(batch, dict) else batch
    return F.cross_entropy(model(graph.inputs), graph.targets)


def loss_of_sparse(model, batch):
    assert batch[0].is_sparse and batch[0].device == DEVICE
    return F.cross_entropy(model(torch.ones(batch[0].shape, device=DEVICE)), batch[1])


@pytest.mark.parametrize(
    "make, compute_loss",
    [
        (Graph, loss_of_graph),
        (lambda inputs, targets: {"graph": Graph(inputs, targets), "name": "a"}, loss_of_graph),
        (lambda inputs, targets: (inputs.to_sparse(), targets), loss_of_sparse),
        (lambda inputs, targets: (inputs.to(DEVICE), targets), only_mean),  # the data set's own device
    ],
    ids=["object", "object in a dictionary", "sparse", "on the device already"],
)
def test_any_batch_reaches_the_device(make, compute_loss, monkeypatch):
    loader = loader_of(Items(make_data(24)), 8, collate_fn=joined(make))
    trainer, _ = run_on_gpu(EmulatedGpu(monkeypatch), loader, compute_loss=compute_loss, test=False)
    assert trainer.state.step == 3


class Elsewhere(torch.Tensor):
    """A tensor of the host that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = True


def on_gpu(*shape):
    return torch.zeros(shape).as_subclass(Elsewhere)


def test_only_plain_tensors_are_copied_on_another_stream():
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    plain = [torch.ones(1), {"a": torch.ones(2), "b": "text"}, (3, nn.Parameter(torch.ones(1)))]
    assert may_be_streamed(plain) and may_be_streamed([numpy.ones(1)])
    for odd in (Graph(torch.ones(1), torch.ones(1)), torch.ones(2).to_sparse(), nested, on_gpu(1)):
        assert not may_be_streamed([*plain, odd])


def test_what_is_on_its_device_is_known():
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    assert is_on([on_gpu(1), {"a": on_gpu(2)}, "text", 3, numpy.ones(1)], here)
    assert not is_on([on_gpu(1)], there) and not is_on([on_gpu(1), torch.ones(1)], here)
    assert not is_on(Graph(on_gpu(1), on_gpu(1)), here)


def test_only_dense_tensors_of_the_host_are_pinned(monkeypatch):
    asked = []

    def pin_memory(tensor):
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_nested:
            raise RuntimeError("cannot pin")
        asked.append(tensor.shape)
        return tensor.clone()

    class Graphs(Graph):
        def pin_memory(self):
            return Graphs(self.inputs.pin_memory(), self.targets.pin_memory())

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    batch = [torch.ones(1), on_gpu(2), torch.ones(2).to_sparse(), nested, "text", {"a": (torch.ones(3),)}]
    result = pinned([*batch, Graphs(torch.ones(4), torch.ones(4)), odd := Graphs(torch.ones(5), on_gpu(1))])
    assert asked == [(1,), (3,), (4,), (4,), (5,)]
    assert all(one is other for one, other in zip(result[1:5], batch[1:5], strict=True)) and result[7] is odd


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_of_every_kind_passes_the_feed_that_pins(num_workers, monkeypatch):
    """Loader workers hand over whole micro-batches, and torch's own thread would pin all that is in them."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    loader = DataLoader(Items(make_data(24)), 8, collate_fn=joined(Graph), num_workers=num_workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is nothing to pin for
        batches = [
            micro_batch.data for micro_batch in MicroBatchLoader(loader, Layout(0, 1, 1), 0, True).micro_batches(1)
        ]
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), make_data(24).tensors[0])


@pytest.mark.parametrize("make", [torch.zeros, on_gpu], ids=["host", "GPU"])
def test_parts_of_rows_begin_as_if_they_had_been_fetched_alone(make):
    size = 13  # floats of a row
    whole = make(400, size)
    alignment = 256 if whole.is_cuda else 64
    offset = next(row for row in range(1, 400) if whole[row:].data_ptr() % alignment)
    assert aligned(whole[offset:]).data_ptr() != whole[offset:].data_ptr()
    parts = divide([whole], [offset, 400 - offset])
    assert parts[1][0].data_ptr() != whole[offset:].data_ptr() and torch.equal(parts[1][0], whole[offset:])
    fitting = next(row for row in range(0, 400) if not whole[row:].data_ptr() % alignment)
    assert aligned(whole[fitting:]).data_ptr() == whole[fitting:].data_ptr()


class Custom(dict):
    """A batch of a library's own kind, which cannot be made from a dictionary."""

    def __init__(self, size, **values):
        super().__init__(values)
        self.size = size


def test_containers_of_every_kind_are_pinned_or_left_alone(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    custom = Custom(3, a=torch.ones(3))
    result = pinned(custom)
    assert type(result) is Custom and result.size == 3 and result["a"] is not custom["a"]
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    assert torch.equal(pinned(packed).data, packed.data)

    class Refuses:
        def pin_memory(self):
            raise NotImplementedError

    odd = Refuses()
    assert pinned([odd, torch.ones(1)])[0] is odd


def test_the_sizes_of_a_packed_sequence_stay_on_the_host(monkeypatch):
    """Both streams are told of what is on the device only."""
    told = []

    class Placed(torch.Tensor):
        is_cuda = True

        def record_stream(self, stream):
            told.append(self.shape)

    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    placed = packed._replace(data=packed.data.as_subclass(Placed))
    monkeypatch.setattr(prepared, "send_to_device", lambda *_, **__: placed)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    place = Placement(torch.device("cpu"))
    place._copying, place._device = object(), torch.device("cuda", 0)
    assert place(packed) is placed and told == [packed.data.shape]


# --- compiling --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.last(F.dropout(torch.tanh(self.first(inputs)), 0.2, self.training))


class Stateful(nn.Module):
    """A loss that counts its calls: in compiled code each count would be a graph of its own."""

    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def forward(self, outputs, targets):
        self.num_calls += 1
        return F.cross_entropy(outputs, targets) * (1 + 1 / self.num_calls)


class Stateless(nn.Module):
    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets)


class Half(Net):
    """A model that returns half precision by itself, which stays so unless mixed precision is asked for."""

    def forward(self, inputs):
        return super().forward(inputs).bfloat16()


class NoMoreThanHalf(nn.Module):
    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets).float() * (1.0 if outputs.dtype == torch.bfloat16 else 2.0)


class Structured(Net):
    """A model that returns what those of transformers do."""

    def forward(self, inputs):
        return SequenceClassifierOutput(logits=super().forward(inputs))


def graphs_of(choices, compile=True, backend=None):
    """Return the graphs compiled after fit, 5 evaluations, predict and 3 fits, and the losses of the first."""
    own = {name: choices.pop(name) for name in ("compute_loss", "weight_fn") if name in choices}
    loss_fn = None if "compute_loss" in own else choices.pop("loss_fn", nn.CrossEntropyLoss)()
    torch._dynamo.reset()
    counter = CompileCounter()
    original = torch.compile
    torch.compile = functools.partial(original, backend=backend or counter)
    try:
        torch.manual_seed(0)
        model = choices.pop("model", Net)()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        config = quiet(restore_best=False, compile=compile, **choices)
        trainer = Trainer(model, optimizer, loss_fn, config=config, **own)
        loaders = loader_of(make_data(37), 8), loader_of(make_data(24), 8, shuffle=False)
        history, counts = trainer.fit(*loaders), [counter.frame_count]
        for _ in range(5):
            trainer.evaluate(loaders[1])
            counts.append(counter.frame_count)
        trainer.predict(loaders[1])
        counts.append(counter.frame_count)
        for _ in range(3):
            trainer.fit(*loaders)
            counts.append(counter.frame_count)
        return counts, (history.train_losses, history.test_losses)
    finally:
        torch.compile = original
        torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own insides
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"num_micro_batches": 2},
        {"model": make_model},
        {"loss_fn": Stateful},
        {"loss_fn": Stateless},
        {"loss_fn": lambda: functools.partial(F.cross_entropy, label_smoothing=0.1)},
        {"loss_fn": lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 2.0])), "num_micro_batches": 2},
        {"compute_loss": only_mean},
        {"weight_fn": lambda batch: (batch[1] > 0).sum(), "num_micro_batches": 2},
        {"bitwise": True, "num_micro_batches": 2},
        {"model": Half, "loss_fn": NoMoreThanHalf},
        {"model": Structured, "loss_fn": lambda: lambda outputs, targets: F.cross_entropy(outputs.logits, targets)},
    ],
    ids=lambda choices: ", ".join(choices) or "plain",
)
def test_two_graphs_serve_all_runs_of_a_model_and_nothing_else_changes(choices, precision):
    counts, losses = graphs_of({**choices, "mixed_precision": precision})
    assert counts == [2] * 10
    assert losses == graphs_of({**choices, "mixed_precision": precision}, compile=False)[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compile", [False, True])
def test_a_model_that_calls_itself_leaves_no_precision_behind(compile, monkeypatch):
    class Twice(Net):
        def forward(self, inputs, again=True):
            first = self.forward(inputs, again=False) if again else 0
            assert torch.is_autocast_enabled("cpu")
            return super().forward(inputs) + first

    class Looks(Callback):
        def on_step_end(self, trainer):
            assert not torch.is_autocast_enabled("cpu")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(original, backend="eager"))
    model = Twice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(num_epochs=1, compile=compile, mixed_precision="bf16")
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Looks()], config=config)
    trainer.fit(loader_of(make_data(16), 8), loader_of(make_data(16), 8))
    assert not torch.is_autocast_enabled("cpu")


NUM_CALLS = 0


def counting_in_a_global(outputs, targets):
    global NUM_CALLS
    NUM_CALLS += 1
    return F.cross_entropy(outputs, targets)


@pytest.mark.filterwarnings("ignore")
def test_losses_with_other_settings_are_never_taken_for_each_other_nor_run_uncompiled():
    """A search over settings: each is compiled once, the same ones in another object are not."""

    def search(losses):
        torch._dynamo.reset()
        counter, original, found = CompileCounter(), torch.compile, []
        torch.compile = functools.partial(original, backend=counter)
        try:
            for loss_fn in losses:
                torch.manual_seed(0)
                model = Net()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                config = quiet(num_epochs=1, compile=True, restore_best=False)
                history = Trainer(model, optimizer, loss_fn, config=config).fit(loader_of(make_data(32), 8))
                found.append((counter.frame_count, history.train_losses[0]))
        finally:
            torch.compile = original
        return found

    settings = [0.05 * number for number in range(11)]
    for make in (
        lambda setting: nn.CrossEntropyLoss(label_smoothing=setting),
        lambda setting: functools.partial(F.cross_entropy, label_smoothing=setting),
    ):
        found = search([make(setting) for setting in settings])
        assert [count for count, _ in found] == list(range(1, 12))
        assert len({loss for _, loss in found}) == 11
        assert search([make(0.1) for _ in range(4)])[-1][0] == 1
    assert search([counting_in_a_global] * 3)[-1][0] == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compile", [False, True])
def test_a_model_in_low_precision_is_itself_wherever_it_is_called(compile, monkeypatch):
    """Copies have weights of their own; methods and callbacks that call the model get its precision and its outputs."""
    seen = {}

    def note(name):
        def hook(module, inputs, outputs):
            seen.setdefault(name, outputs.dtype)

        return hook

    class Own(Net):
        def loss_of(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    class Looks(Callback):
        def on_epoch_end(self, trainer):
            seen["inside a callback"] = trainer.model(torch.ones(2, 5)).dtype
            twin = copy.deepcopy(trainer.model)
            for parameter in twin.parameters():
                nn.init.zeros_(parameter)
            seen["copy"] = twin(torch.ones(2, 5)).abs().max().item()

    model = Own()
    model.register_forward_hook(note("root"))
    model.last.register_forward_hook(note("inner"))
    original = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(original, backend="eager"))
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        compute_loss=lambda model, batch: model.loss_of(batch),
        callbacks=[Looks()],
        config=quiet(num_epochs=1, compile=compile, mixed_precision="bf16"),
    )
    trainer.fit(loader_of(make_data(16), 8), loader_of(make_data(16), 8))
    assert seen["inner"] == torch.bfloat16
    assert seen["root"] == seen["inside a callback"] == torch.float32 and seen["copy"] == 0.0
    assert "forward" not in model.__dict__


@pytest.mark.filterwarnings("ignore")
@pytest.mark.distributed
@pytest.mark.parametrize("choices", [{}, {"model": make_model}, {"bitwise": True}], ids=["own", "torch's", "bitwise"])
def test_two_processes_compile_as_little(choices):
    choices = {**choices, "num_micro_batches": 2, "mixed_precision": "bf16"}
    counts, losses = on_processes(2, graphs_of, dict(choices))[0]
    assert counts[0] == 2 and counts[1] <= 3 and counts[1:] == [counts[1]] * 9
    expected = on_processes(2, graphs_of, dict(choices), False)[0][1]
    assert losses == expected


@pytest.mark.filterwarnings("ignore")
def test_many_models_do_not_use_up_each_others_graphs():
    counts = []
    for number in range(6):
        kind = type(f"Net{number}", (Net,), {"forward": FunctionType(Net.forward.__code__.replace(), globals())})
        counts.append(graphs_of({"model": kind, "mixed_precision": "bf16"})[0][-1])
    assert counts == [2] * 6


def replaying(graph, example):
    """Compile as CUDA graphs do: what a call returns lies in the memory that the next call writes to."""

    def compiled(graph, example):
        kept = []

        def replay(*args):
            results = graph(*args)
            if not kept:
                kept.extend(one.clone() if isinstance(one, torch.Tensor) else one for one in results)
            for own, one in zip(kept, results, strict=True):
                if isinstance(own, torch.Tensor):
                    own.detach().copy_(one)
            return [own.detach() if isinstance(own, torch.Tensor) else own for own in kept]

        return make_boxed_func(replay)

    return aot_autograd(fw_compiler=compiled, bw_compiler=compiled)(graph, example)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"num_micro_batches": 4},
        {"compute_loss": lambda model, batch: model(batch[0], batch[1]), "model": lambda: WithLoss()},
        {"compute_loss": lambda model, batch: model(batch[0], batch[1]), "model": lambda: WithLoss(), "bitwise": True},
        {"bitwise": True, "num_micro_batches": 4},
    ],
    ids=["plain", "cut", "loss inside", "loss inside, bitwise", "bitwise"],
)
def test_memory_that_is_replayed_into_is_copied_in_time(choices, monkeypatch):
    """As `accelerate launch --dynamo_mode reduce-overhead` asks for."""
    choices = {"batch": 8, **choices}
    size = choices.pop("batch")

    def losses(compiled):
        AcceleratorState._reset_state(True)
        torch._dynamo.reset()
        own = {name: choices[name] for name in ("compute_loss",) if name in choices}
        torch.manual_seed(0)
        model = choices.get("model", make_model)()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        others = {name: choices[name] for name in ("num_micro_batches", "bitwise") if name in choices}
        loss_fn = None if own else nn.CrossEntropyLoss()
        trainer = Trainer(model, optimizer, loss_fn, config=quiet(restore_best=False, **others), **own)
        with monkeypatch.context() as patch:
            if compiled:
                patch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
                patch.setenv("ACCELERATE_DYNAMO_MODE", "reduce-overhead")
                original = torch.compile
                patch.setattr(torch, "compile", lambda function, **how: original(function, backend=replaying))
            history = trainer.fit(loader_of(make_data(64), size), loader_of(make_data(32), size))
        return history.train_losses, history.test_losses

    assert losses(True) == (pytest.approx(losses(False)[0], rel=1e-5), pytest.approx(losses(False)[1], rel=1e-5))


class WithLoss(Net):
    def forward(self, inputs, targets):
        return F.cross_entropy(super().forward(inputs), targets)


# --- fp16 -------------------------------------------------------------------------------------------------------------


def scaled():
    """Return an Accelerator as it is for fp16 on a GPU, with the scaler of the CPU, and without casts."""
    accelerator = Accelerator()
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    accelerator.unscale_gradients = lambda: [scaler.unscale_(one.optimizer) for one in accelerator._optimizers]
    return accelerator


class Overflows(nn.Module):
    """A loss whose gradient overflows at some calls."""

    def __init__(self, at):
        super().__init__()
        self.at, self.num_calls = at, 0

    def forward(self, outputs, targets):
        self.num_calls += 1
        return F.cross_entropy(outputs, targets) * (torch.inf if self.num_calls in self.at else 1.0)


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW, fused": functools.partial(torch.optim.AdamW, fused=True),
    "SGD": torch.optim.SGD,
    "SGD, fused": functools.partial(torch.optim.SGD, fused=True),
}


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_the_scaler_skips_is_no_step(name, max_grad_norm):
    at = (1, 2, 5, 9)
    model, hand = make_model(), make_model()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.1)
    config = quiet(num_epochs=1, max_grad_norm=max_grad_norm, on_nonfinite="ignore", restore_best=False)
    how = {"accelerator": scaled, "scheduler": warm_up, "config": config}
    trainer = Trainer(model, optimizer, Overflows(at), **how)
    history = trainer.fit(loader_of(make_data(80), 8, shuffle=False))
    assert trainer.state.step == 10 - len(at) and trainer.state.num_batches == 10
    if "Adam" in name:
        assert {int(own["step"]) for own in optimizer.state.values()} == {10 - len(at)}

    by_hand = OPTIMIZERS[name](hand.parameters(), lr=0.1)
    schedule, loss_fn, norms = warm_up(by_hand, 10), Overflows(at), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for inputs, targets in loader_of(make_data(80), 8, shuffle=False):
        by_hand.zero_grad()
        scaler.scale(loss_fn(hand(inputs), targets)).backward()
        scale = scaler.get_scale()
        if max_grad_norm is not None:
            scaler.unscale_(by_hand)
            norms.append(nn.utils.clip_grad_norm_(hand.parameters(), max_grad_norm))
        scaler.step(by_hand)
        scaler.update()
        if scaler.get_scale() == scale:
            schedule.step()
        elif norms:
            norms.pop()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.get_last_lr()[0])
    assert all(map(torch.equal, model.parameters(), hand.parameters()))
    if norms:
        assert history.grad_norms == [pytest.approx(float(sum(norms)) / len(norms))]


class Overflow(torch.autograd.Function):
    """Return what is given; its gradient is infinite."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.inf


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_while_clipping_is_no_error(name):
    """The norm of the gradients is infinite then, and that is no fault of the run."""
    model, calls = make_model(), []

    def loss_fn(outputs, targets):
        calls.append(1)
        loss = F.cross_entropy(outputs, targets)
        return Overflow.apply(loss) if len(calls) in (1, 4, 20) else loss

    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, loss_fn, accelerator=scaled, config=quiet(max_grad_norm=1.0, report_every=3))
    history = trainer.fit(loader_of(make_data(80), 8))
    assert trainer.state.step == 17 and trainer.state.num_batches == 20
    assert all(map(math.isfinite, history.grad_norms))


def test_scaled_gradients_are_not_taken_for_others_when_memory_runs_out():
    model = make_model()
    optimizer = Starved(model.parameters(), [])
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), accelerator=scaled, config=quiet(max_grad_norm=1.0))
    with pytest.raises(torch.OutOfMemoryError, match="while the weights were updated"):
        trainer.fit(loader_of(make_data(64), 16))


def test_fp16_reads_once_a_step():
    class Reads(TorchDispatchMode):
        num = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.num += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []

    class Note(Callback):
        def on_step_end(self, trainer):
            counts.append(Reads.num)

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    how = {"accelerator": scaled, "callbacks": [Note()], "config": quiet(num_epochs=1)}
    with Reads():
        Trainer(model, optimizer, nn.CrossEntropyLoss(), **how).fit(loader_of(make_data(80), 8))
    assert {later - sooner for sooner, later in pairwise(counts)} == {1}


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("choice, tf32", [("highest", False), ("high", True), ("medium", True)])
def test_convolutions_round_as_products_do_in_every_way_of_training(choice, tf32, precision):
    precision(choice)
    torch.backends.cudnn.allow_tf32 = True
    seen = []

    class Looks(nn.Module):
        def forward(self, outputs, targets):
            seen.append(torch.backends.cudnn.allow_tf32)
            return F.cross_entropy(outputs, targets)

    model, loader, loss_fn = make_model(), loader_of(make_data(16), 8), Looks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, loss_fn, config=quiet())
    trainer.fit(loader, loader)
    trainer.evaluate(loader)
    train_model(loader, model, loss_fn, optimizer)
    evaluate_model(loader, model, loss_fn)
    assert set(seen) == {tf32} and len(seen) >= 14
    assert torch.backends.cudnn.allow_tf32  # put back


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="since torch 2.9")
def test_settings_by_torchs_newer_names_are_put_back():
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "ieee", "tf32"
        with fixed_arithmetic():
            assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) != ("ieee", "tf32")
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")
    finally:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before
        cudnn.allow_tf32 = True


def test_the_line_of_the_hardware_tells_of_tf32(precision, monkeypatch):
    hardware = Hardware()
    assert "TF32" not in hardware.describe()
    hardware.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert hardware.describe().endswith('TF32 off (set_float32_matmul_precision("high") allows it)')
    precision("high")
    assert hardware.describe().endswith("TF32 on (your choice)")


def test_bitwise_fills_no_memory_and_puts_the_setting_back():
    assert torch.utils.deterministic.fill_uninitialized_memory
    with fixed_arithmetic(bitwise=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_run_leaves_cublas_ready_for_one_that_asks_for_bits(monkeypatch):
    """cuBLAS reads the variable once in a process."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    model = make_model()
    Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet()).fit(
        loader_of(make_data(8), 8)
    )
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with fixed_arithmetic(bitwise=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own


@pytest.mark.parametrize("call", ["fit", "evaluate", "predict"])
def test_what_torch_refuses_of_cublas_has_a_remedy(call):
    class Refused(nn.Linear):
        def forward(self, inputs):
            raise RuntimeError(
                "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` ..., you "
                "must set an environment variable before running: CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8."
            )

    model = Refused(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(bitwise=True))
    with pytest.raises(RuntimeError, match=r"Start the program with CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        getattr(trainer, call)(loader_of(make_data(8), 8))


# --- memory -----------------------------------------------------------------------------------------------------------

MESSAGES = [
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "Triton Error [CUDA]: out of memory",
    "HIP out of memory. Tried to allocate 2.00 GiB.",
    "MPS backend out of memory (MPS allocated: 1.00 GB).",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_every_kind_of_out_of_memory_cuts_finer(message):
    class Hungry(nn.Linear):
        def forward(self, inputs):
            if len(inputs) > 4:
                raise RuntimeError(message)
            return super().forward(inputs)

    model = Hungry(5, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    assert trainer.fit(loader_of(make_data(32), 16)).num_epochs == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed a wrong argument."),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_come_through(error):
    class Broken(nn.Linear):
        def forward(self, inputs):
            raise error

    model = Broken(5, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    with pytest.raises(type(error), match=re.escape(str(error))):
        trainer.fit(loader_of(make_data(32), 16))


class Starved(torch.optim.AdamW):
    """AdamW that finds no memory for its state while more than some samples are in a micro-batch."""

    def __init__(self, parameters, seen, num_failures=1, too_late=False):
        super().__init__(parameters, lr=0.01)
        self.seen, self.num_failures, self.too_late = seen, num_failures, too_late

    def step(self, closure=None):
        if self.num_failures:
            self.num_failures -= 1
            parameter = self.param_groups[0]["params"][0]
            self.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
            if self.too_late:
                parameter.data.add_(1)
                parameter.detach().add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().step(closure)


@pytest.mark.parametrize("kind", ["plain", "batchnorm"])
def test_a_first_update_that_does_not_fit_is_undone_and_the_batch_comes_again(kind, capsys):
    def run(starved, **choices):
        model = make_model(kind=kind)
        parameters = model.parameters()
        optimizer = Starved(parameters, []) if starved else torch.optim.AdamW(parameters, lr=0.01)
        config = quiet(max_grad_norm=1.0, restore_best=False, **choices)
        history = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config).fit(loader_of(make_data(64), 16))
        return history.train_losses, model.state_dict()

    (losses, weights), (expected, reference) = run(True), run(False, num_micro_batches=2)
    assert losses == expected and all(torch.equal(weights[name], reference[name]) for name in weights)


@pytest.mark.parametrize(
    "starved, choices",
    [
        ({"num_failures": 2}, {}),  # again, though the batch is cut finer
        ({"too_late": True}, {}),  # weights have been written to
        ({}, {"num_micro_batches": 2}),  # the cut is the user's
    ],
)
def test_an_update_that_cannot_fit_says_what_does_not_help(starved, choices):
    model = make_model()
    optimizer = Starved(model.parameters(), [], **starved)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(**choices))
    with pytest.raises(torch.OutOfMemoryError, match=r"while the weights were updated.*no cut of the batch changes"):
        trainer.fit(loader_of(make_data(64), 16))


def test_the_state_of_an_optimizer_is_where_torch_wants_it_in_a_second_run(monkeypatch):
    """A counter of steps on the device costs two read-backs per parameter and step."""
    model = make_model().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(restore_best=False))
    for _ in range(2):
        with EmulatedGpu(monkeypatch):
            trainer.fit(loader_of(make_data(16), 8))
        for own in optimizer.state.values():
            assert own["step"].device.type == "cpu" and own["exp_avg"].device == own["exp_avg_sq"].device == DEVICE


@pytest.mark.parametrize("choices, where", [({}, "cpu"), ({"capturable": True, "foreach": True}, "meta")])
def test_a_state_that_was_loaded_moves_to_its_parameters(choices, where, monkeypatch):
    parameter = nn.Parameter(torch.ones(2, device=DEVICE))
    optimizer = torch.optim.AdamW([parameter], **choices)
    nested = {"deep": [torch.ones(2)]}
    optimizer.state[parameter] = {"step": torch.ones(()), "exp_avg": torch.ones(2), "own": nested, "number": 3}
    place_state(optimizer)
    own = optimizer.state[parameter]
    assert own["step"].device.type == where and own["number"] == 3
    assert own["exp_avg"].device == own["own"]["deep"][0].device == DEVICE
    moved = {"step": torch.ones((), device=DEVICE), "exp_avg": torch.ones(2, device=DEVICE)}  # by another trainer
    optimizer.state[parameter] = moved
    with EmulatedGpu(monkeypatch):
        place_state(optimizer)
    assert moved["step"].device.type == where
    unused = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    place_state(unused)
    assert not unused.state


class Operations(TorchDispatchMode):
    """Count operations, each of which is one kernel on a GPU or some."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += 1
        return func(*args, **(kwargs or {}))


def deep(num_layers=50):
    torch.manual_seed(0)
    layers = [layer for _ in range(num_layers) for layer in (nn.Linear(5, 5), nn.BatchNorm1d(5))]
    return nn.Sequential(*layers, nn.Linear(5, 3))


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_buffers_cost_few_operations_whatever_their_number(cut):
    """Beside a loop by hand that accumulates over as many micro-batches."""
    mode, counts = Operations(), []

    class Note(Callback):
        def on_step_end(self, trainer):
            counts.append(mode.num)

    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = quiet(num_epochs=1, num_micro_batches=cut, restore_best=False, report_every=10**6)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Note()], config=config)
    with mode:
        trainer.fit(loader_of(make_data(80), 16))
    ours = counts[2] - counts[1]

    model = deep()
    optimizer, by_hand = torch.optim.SGD(model.parameters(), lr=0.01), Operations()
    inputs, targets = make_data(16).tensors
    with by_hand:
        optimizer.zero_grad()
        for some, own in zip(inputs.chunk(cut), targets.chunk(cut), strict=True):
            (F.cross_entropy(model(some), own) / cut).backward()
        optimizer.step()
    assert ours - by_hand.num <= 20 + 40 * (cut - 1), (ours, by_hand.num)


def num_alive(kinds):
    return sum(type(one) in kinds for one in gc.get_objects())


@contextmanager
def without_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Mixed(nn.Module):
    """Buffers of several kinds beside each other, one of which becomes infinite for a while."""

    def __init__(self, at):
        super().__init__()
        self.layer, self.norm, self.at, self.num_calls = nn.Linear(5, 3), nn.BatchNorm1d(5), at, 0
        self.register_buffer("peak", torch.zeros(2))
        self.register_buffer("precise", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))

    def forward(self, inputs):
        if self.training:
            self.num_calls += 1
            self.peak.fill_(math.inf if self.num_calls in self.at else inputs.max().item())
            self.precise.add_(1)
        return self.layer(self.norm(inputs))


@pytest.mark.parametrize("bitwise", [False, True])
def test_a_buffer_that_was_infinite_recovers(bitwise):
    """Inside an epoch: the next step finds the average of what its micro-batches have left."""

    def peak_after(at, num_steps):
        model = Mixed(at)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = quiet(num_micro_batches=2, bitwise=bitwise, max_steps=num_steps, on_nonfinite="ignore")
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
        trainer.fit(loader_of(make_data(40), 8, shuffle=False))
        return model.peak[0].item(), model.precise[0].item()

    inputs = make_data(40).tensors[0]
    assert peak_after((3,), 2) == (math.inf, 2.0)
    expected = (inputs[16:20].max() + inputs[20:24].max()).item() / 2
    assert peak_after((3,), 3) == (pytest.approx(expected), 3.0)


def test_operations_on_lists_never_mix_kinds(monkeypatch):
    """A GPU falls back to a kernel for each tensor then."""
    mixed = []

    def spied(original):
        def call(first, *others, **how):
            lists = [first, *(one for one in others if isinstance(one, (list, tuple)))]
            mixed.append(len({(one.dtype, one.device) for tensors in lists for one in tensors}) > 1)
            return original(first, *others, **how)

        return call

    for name in ("_foreach_copy_", "_foreach_sub", "_foreach_add", "_foreach_div"):
        monkeypatch.setattr(torch, name, spied(getattr(torch, name)))
    model = Mixed(())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    config = quiet(num_micro_batches=4, on_nonfinite="skip")
    Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config).fit(loader_of(make_data(40), 8))
    assert mixed and not any(mixed)


def test_nothing_of_a_run_outlives_it(tmp_path):
    """In a circle it would hold copies of the data, buffers and pinned memory until the garbage is collected."""
    kinds = (Run, Training, Prepared, Hardware, MicroBatchLoader, Saver, LocalGradients, Buffers)

    def fit(**choices):
        model = make_model(kind="dropout")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Callback()], config=quiet(**choices))
        trainer.fit(loader_of(make_data(40), 10), loader_of(make_data(24), 8))
        return trainer

    fit(run_dir=tmp_path / "first")  # what libraries leave behind when they are imported
    for choices in ({}, {"run_dir": tmp_path / "run"}, {"bitwise": True}, {"on_nonfinite": "skip"}):
        with without_collector():
            before = num_alive(kinds)
            trainer = fit(**choices)
            assert num_alive(kinds) == before, choices
        del trainer


def num_left_on_two(bitwise):
    kinds = (Run, Training, nn.parallel.DistributedDataParallel, MicroBatchLoader)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = quiet(bitwise=bitwise, restore_best=False)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
    with without_collector():
        before = num_alive(kinds)
        trainer.fit(loader_of(make_data(40), 10))
        return num_alive(kinds) - before


@pytest.mark.distributed
@pytest.mark.parametrize("bitwise", [False, True])
def test_nothing_of_a_run_on_two_processes_outlives_it(bitwise):
    assert on_processes(2, num_left_on_two, bitwise) == [0, 0]


# --- several GPUs -----------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter([make_data(24)[index] for index in range(24)])


def exchanges_of_objects():
    """Train on a stream and predict, with a default group that says it is NCCL's; return where objects went."""
    names = ("broadcast_object_list", "gather_object", "all_gather_object")
    originals = {name: getattr(torch.distributed, name) for name in names}
    is_default = []

    def spied(name):
        def call(*args, group=None, **kwargs):
            is_default.append(group is None)
            return originals[name](*args, group=group, **kwargs)

        return call

    get_backend = torch.distributed.get_backend
    torch.distributed.get_backend = lambda group=None: "nccl" if group is None else get_backend(group)
    for name in names:
        setattr(torch.distributed, name, spied(name))
    model = make_model()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    history = trainer.fit(DataLoader(Stream(), 8), loader_of(make_data(24), 8))
    outputs = trainer.predict(loader_of(make_data(24), 8))
    torch.distributed.get_backend = get_backend
    return is_default, history.train_losses, None if outputs is None else outputs.shape


@pytest.mark.distributed
def test_objects_travel_from_host_to_host():
    (is_default, losses, shape), (_, others, nothing) = on_processes(2, exchanges_of_objects)
    assert is_default and not any(is_default)
    assert losses == others and shape == (24, 3) and nothing is None


GROUPS = """
import atexit, sys, torch
def look():
    print("left in order" if not torch.distributed.is_initialized() else "still there", flush=True)
atexit.register(look)
import accel_trainer
from torch.utils.data import DataLoader, TensorDataset
from accel_trainer import Trainer, TrainConfig
from accel_trainer.base import exchange
torch.distributed.get_backend = lambda group=None: "nccl"
model = torch.nn.Linear(1, 1)
loader = DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
Trainer(model, optimizer, torch.nn.MSELoss(), config=TrainConfig(num_epochs=1)).fit(loader)
assert exchange.host_group() is not None
"""


@pytest.mark.distributed
def test_the_groups_are_left_at_the_end_whatever_their_backend():
    done = launch(GROUPS, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left in order") == 2


GLOO = """
from accelerate import Accelerator, InitProcessGroupKwargs
import torch
from torch.utils.data import DataLoader, TensorDataset
from accel_trainer import Trainer
model = torch.nn.Linear(1, 1)
loader = DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), batch_size=2)
how = {"accelerator": lambda: Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])}
Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss(), **how).fit(loader)
"""


@pytest.mark.distributed
def test_processes_whose_gradients_would_not_meet_are_refused():
    if torch.accelerator.is_available():
        pytest.skip("with an accelerator device this works")
    done = launch(GLOO)
    assert done.returncode != 0
    assert 'backend="gloo" needs cpu=True beside it' in done.stderr


def test_copies_share_one_stream(monkeypatch):
    made = []
    module = type("module", (), {"Stream": lambda device: made.append(device) or object()})
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    prepared._stream_of_copies.cache_clear()
    streams = [prepared._stream_of_copies(torch.device("cuda", index)) for index in (0, 1, 0)]
    prepared._stream_of_copies.cache_clear()
    assert len(made) == 2 and streams[0] is streams[2] is not streams[1]
