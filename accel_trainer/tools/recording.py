"""What a run does, step by step, in a form that two runs can be compared by: where did they first part?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..callbacks import Callback
from ..data.collated import tensors_in
from ..data.micro_batches import MicroBatch
from ..numbers.objective import Forward, Objective
from ..storage.weights import copy_into, plain_name, plain_state
from ..trainer import Trainer

# In the order in which one follows from the other within a step.
KINDS = ("batch", "module", "loss", "gradient", "buffer", "weights", "test batch", "test loss")


class Mark(NamedTuple):
    """A tensor in three numbers: its exact bits, its norm, and its product with fixed random signs.

    The last two tell how far two tensors are apart without keeping either: a difference of norm d changes the product
    by about d.
    """

    bits: str
    norm: float
    product: float


class Place(NamedTuple):
    """What a mark is of: a step (1-based; 0 before the first), a kind, a micro-batch (-1 for all), and a name."""

    step: int
    kind: str
    micro_batch: int
    name: str


Trace = dict[Place, Mark]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that depend on every bit of the tensors and on their names."""
    hashed = blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        hashed.update(_memory(tensor))
    return hashed.hexdigest()


def _on_host(tensor: Tensor) -> Tensor:
    return (tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()).cpu()


def _memory(tensor: Tensor) -> bytes:
    return bytes(_on_host(tensor).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _from_memory(dtype: torch.dtype, shape: torch.Size, memory: bytes) -> Tensor:
    return torch.frombuffer(bytearray(memory), dtype=dtype).view(shape) if memory else torch.empty(shape, dtype=dtype)


def mark(tensor: Tensor) -> Mark:
    """Return the mark of a tensor; waits for its device."""
    values = _on_host(tensor)
    values = torch.view_as_real(values) if values.is_complex() else values
    numbers = values.double().reshape(-1)
    bits = blake2b(_memory(values), digest_size=8).hexdigest()
    return Mark(bits, float(numbers.norm()), float(numbers @ _signs(numbers.numel())))


@lru_cache(maxsize=64)
def _signs(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 2, (length,), generator=generator, dtype=torch.float64) * 2 - 1


class Recorder(Callback):
    """Watch the steps of a training; it changes nothing but what it is told to.

    Args:
        look_at: A step (1-based) in which the output of every module is marked too.
        keeps: Steps after which weights and buffers are kept.
        puts: Step -> what was kept so, to go on with after it.

    Attributes:
        trace: The marks.
        kept: Step -> name of a weight or buffer -> dtype, shape and bytes.
    """

    def __init__(
        self,
        look_at: int | None = None,
        keeps: Container[int] = (),
        puts: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        self.trace: Trace = {}
        self.kept: dict[int, dict[str, Any]] = {}
        self._num_calls: Counter[Place] = Counter()
        self._look_at, self._keeps, self._puts = look_at, keeps, puts or {}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Watch from here on."""
        model, state = trainer.model, trainer.state
        optimizer: Optimizer = trainer.optimizer  # type: ignore[assignment]
        self._after_update(0, model)
        optimizer.register_step_pre_hook(lambda *_: self._before_update(state.num_batches, model))
        optimizer.register_step_post_hook(lambda *_: self._after_update(state.num_batches, model))

    def forward(
        self, objective: RecordedObjective, model: nn.Module, micro_batch: MicroBatch, is_even: bool
    ) -> Forward:
        """Run an objective on a micro-batch and mark what goes in and comes out."""
        inner, trainer, index = objective.inner, objective.trainer, micro_batch.piece.index
        step = trainer.state.num_batches
        if micro_batch.piece.is_padding:
            return inner(model, micro_batch, is_even)
        is_test = not torch.is_grad_enabled()
        if is_test:
            index += micro_batch.batch.number * micro_batch.batch.layout.num_micro_batches
        self._add(Place(step, "test batch" if is_test else "batch", index, ""), tensors_in(micro_batch.data))
        with ExitStack() as hooks:
            if step == self._look_at and not is_test:
                for name, module in trainer.model.named_modules():
                    hooks.callback(module.register_forward_hook(self._watch(step, index, name)).remove)
            forward = inner(model, micro_batch, is_even)
        self._add(
            Place(step, "test loss" if is_test else "loss", index, ""), [forward.loss, torch.as_tensor(forward.weight)]
        )
        return forward

    def _watch(self, step: int, micro_batch: int, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self._add(Place(step, "module", micro_batch, plain_name(name + ".")[:-1]), tensors_in(outputs))

        return hook

    def _before_update(self, step: int, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            gradient = [] if parameter.grad is None else [parameter.grad]
            self._add(Place(step, "gradient", -1, plain_name(name)), gradient)
        for name, buffer in model.named_buffers():
            self._add(Place(step, "buffer", -1, plain_name(name)), [buffer])

    def _after_update(self, step: int, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self._add(Place(step, "weights", -1, plain_name(name)), [parameter])
        if step in self._keeps:
            self.kept[step] = {name: (one.dtype, one.shape, _memory(one)) for name, one in plain_state(model).items()}
        if step in self._puts:
            copy_into(model, {name: _from_memory(*kept) for name, kept in self._puts[step].items()})

    def _add(self, place: Place, tensors: Iterable[Tensor]) -> None:
        marks = [mark(tensor) for tensor in tensors]
        self._num_calls[place] += 1
        if self._num_calls[place] > 1:  # a module called several times in a forward
            place = place._replace(name=f"{place.name} (call {self._num_calls[place]})")
        self.trace[place] = Mark(
            " ".join(one.bits for one in marks),
            math.hypot(*(one.norm for one in marks)),
            sum(one.product for one in marks),
        )


class RecordedObjective:
    """An objective that tells a recorder what it does."""

    def __init__(self, inner: Objective, recorder: Recorder, trainer: Trainer) -> None:
        self.inner, self.trainer, self._recorder = inner, trainer, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, model: nn.Module, micro_batch: MicroBatch, is_even: bool, joined: Any = None) -> Forward:
        """Run the objective, and let it be recorded."""
        return self._recorder.forward(self, model, micro_batch, is_even)


class Divergence(NamedTuple):
    """Where two runs first part: the place, how many of its kind differ there, and by how much at most (relative)."""

    place: Place
    num_others: int
    difference: float


def first_divergence(one: Trace, other: Trace, tolerance: float, same_cut: bool) -> Divergence | None:
    """Return where two traces first differ by more than a tolerance; `None` if they do not.

    Args:
        one: Of the reference.
        other: Of the run in question.
        tolerance: Relative to the norm of what is compared; 0 compares bits.
        same_cut: Whether both cut their batches alike; otherwise only what belongs to whole batches is compared.
    """
    for kind, places in _groups(one, other, same_cut):
        norms = [one[place].norm for place in places if place in one]
        scale = math.hypot(*norms) if kind == "gradient" else 0.0
        differing = {
            place: difference
            for place in places
            if (difference := _difference(one.get(place), other.get(place), tolerance, scale)) > tolerance
        }
        if differing:
            return Divergence(next(iter(differing)), len(differing) - 1, max(differing.values()))
    return None


def apart(one: Trace, other: Trace, step: int) -> dict[str, float]:
    """Return how far the gradient of each parameter differs in a step, relative to itself; under "" that of all."""
    names = [place.name for place in one if place[:2] == (step, "gradient") and place in other]
    pairs = {name: (one[place], other[place]) for name in names for place in [Place(step, "gradient", -1, name)]}
    differences = {name: _difference(*pair, 1.0, 0.0) for name, pair in pairs.items()}
    norms = {name: max(mark.norm for mark in pair) for name, pair in pairs.items()}
    total = math.hypot(*(differences[name] * norms[name] for name in names))
    return {**differences, "": total / max(math.hypot(*norms.values()), 1e-300)}


def _groups(one: Trace, other: Trace, same_cut: bool) -> Iterator[tuple[str, list[Place]]]:
    """Yield the places of each step and kind, in the order in which a fault would spread."""
    grouped: dict[tuple[int, int], list[Place]] = {}
    for place in dict.fromkeys([*one, *other]):
        if same_cut or place.micro_batch == -1:
            grouped.setdefault((place.step, KINDS.index(place.kind)), []).append(place)
    for (_, kind), places in sorted(grouped.items()):
        yield KINDS[kind], sorted(places, key=lambda place: place.micro_batch)


def _difference(one: Mark | None, other: Mark | None, tolerance: float, scale: float) -> float:
    """Return how far apart two marks are, relative to the larger of norm and scale; infinity if not comparable."""
    if one is None or other is None:
        return math.inf
    if one.bits == other.bits:
        return 0.0
    apart = max(abs(one.norm - other.norm), abs(one.product - other.product))
    if not math.isfinite(apart):
        return math.inf
    relative = apart / max(one.norm, other.norm, scale, 1e-300)
    return max(relative, 1e-300) if tolerance == 0 else relative
