"""Records what a run computes, step by step, so that two runs can be compared: where do they first differ?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.codec import flattened
from ..base.dtensors import whole
from ..callbacks import Callback
from ..data.collated import tensors_in
from ..data.micro_batches import MicroBatch
from ..numbers.forward import Forward
from ..numbers.objective import Objective
from ..storage.weights import copy_into, plain_name, plain_state
from ..trainer import Trainer

# In the order in which one follows from the other within a step.
KINDS = ("batch", "module", "loss", "gradient", "buffer", "weights", "test batch", "test loss")


class Mark(NamedTuple):
    """Tensors in three numbers: their exact bits, their norm, and their product with fixed random signs.

    The last two tell how far two marks are apart without keeping the tensors: a difference of norm d changes the
    product by about d.
    """

    bits: str
    norm: float
    product: float


class Position(NamedTuple):
    """What a mark belongs to."""

    step: int  # 1-based; 0 before the first
    kind: str  # one of KINDS
    micro_batch: int  # 0-based; -1 for the whole batch
    name: str  # of the module, parameter or buffer


Trace = dict[Position, Mark]


def digest(state: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that depend on every bit of the tensors of a state dict, and on their names."""
    hashed = blake2b(digest_size=8)
    for name, tensor in sorted(flattened(state).items()):
        if isinstance(tensor, Tensor):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            hashed.update(_on_host(tensor).reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _on_host(tensor: Tensor) -> Tensor:
    """Return a dense, contiguous copy of a tensor on the CPU, of its own storage."""
    tensor = whole(tensor)
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return dense.cpu().clone(memory_format=torch.contiguous_format)


def mark(tensors: Iterable[Tensor]) -> Mark:
    """Return the mark of some tensors together; waits for their device."""
    on_host = [_on_host(tensor) for tensor in tensors]
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in on_host]
    numbers = torch.cat([torch.zeros(0, dtype=torch.float64), *(tensor.double().reshape(-1) for tensor in real)])
    bits = digest({str(index): tensor for index, tensor in enumerate(real)})
    return Mark(bits, float(numbers.norm()), float(numbers @ _signs(len(numbers))))


@lru_cache(maxsize=64)
def _signs(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 2, (length,), generator=generator, dtype=torch.float64) * 2 - 1


@dataclass(eq=False)
class Recorder(Callback):
    """Record the steps of a training; `puts` is all that changes it."""

    look_at: int | None = None  # a step (1-based) in which the output of every module is marked too
    keeps: Container[int] = ()  # steps after which weights and buffers are kept
    puts: Mapping[int, bytes] = field(default_factory=dict)  # step -> what to go on with after it, kept by another run
    trace: Trace = field(default_factory=dict)
    kept: dict[int, bytes] = field(default_factory=dict)  # step -> weights and buffers, as a safetensors file
    num_calls: Counter[Position] = field(default_factory=Counter)

    def add(self, position: Position, tensors: Iterable[Tensor]) -> None:
        """Add the mark of some tensors to the trace."""
        self.num_calls[position] += 1
        if self.num_calls[position] > 1:  # a module called several times in a forward
            position = position._replace(name=f"{position.name} (call {self.num_calls[position]})")
        self.trace[position] = mark(tensors)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Record from here on."""
        model, state = trainer.model, trainer.state
        optimizer: Optimizer = trainer.optimizer  # type: ignore[assignment]
        self._after_update(0, model)
        optimizer.register_step_pre_hook(lambda *_: self._before_update(state.num_batches, model))
        optimizer.register_step_post_hook(lambda *_: self._after_update(state.num_batches, model))

    def _before_update(self, step: int, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            gradient = [] if parameter.grad is None else [parameter.grad]
            self.add(Position(step, "gradient", -1, plain_name(name)), gradient)
        for name, buffer in model.named_buffers():
            self.add(Position(step, "buffer", -1, plain_name(name)), [buffer])

    def _after_update(self, step: int, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            self.add(Position(step, "weights", -1, plain_name(name)), [parameter])
        if step in self.keeps:
            self.kept[step] = safetensors.torch.save({name: _on_host(one) for name, one in plain_state(model).items()})
        if step in self.puts:
            copy_into(model, safetensors.torch.load(self.puts[step]))


class _RecordedObjective:
    """An objective that marks what goes into each micro-batch and what comes out."""

    def __init__(self, inner: Objective, recorder: Recorder, trainer: Trainer) -> None:
        self._inner, self._recorder, self._trainer = inner, recorder, trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, model: nn.Module, micro_batch: MicroBatch, is_even: bool, joined: Any = None) -> Forward:
        if micro_batch.piece.is_padding:
            return self._inner(model, micro_batch, is_even)
        recorder, step, index = self._recorder, self._trainer.state.num_batches, micro_batch.piece.index
        test = "" if torch.is_grad_enabled() else "test "
        if test:
            index += micro_batch.batch.number * micro_batch.batch.layout.num_micro_batches
        recorder.add(Position(step, f"{test}batch", index, ""), tensors_in(micro_batch.data))
        with ExitStack() as hooks:
            if step == recorder.look_at and not test:
                for name, module in self._trainer.model.named_modules():
                    position = Position(step, "module", index, plain_name(name + ".")[:-1])
                    hook = module.register_forward_hook(
                        lambda module, inputs, outputs, position=position: recorder.add(position, tensors_in(outputs))
                    )
                    hooks.enter_context(hook)
            forward = self._inner(model, micro_batch, is_even)
        recorder.add(Position(step, f"{test}loss", index, ""), [forward.loss, torch.as_tensor(forward.weight)])
        return forward


class RecordedTrainer(Trainer):
    """A trainer whose steps are recorded."""

    def __init__(self, recorder: Recorder, callbacks: Iterable[Callback] = (), **arguments: Any) -> None:
        super().__init__(callbacks=[*callbacks, recorder], **arguments)
        self._objective = _RecordedObjective(self._objective, recorder, self)  # type: ignore[assignment]


class Divergence(NamedTuple):
    """Where two runs first differ."""

    position: Position
    num_others: int  # positions of this step and kind that differ too
    difference: float  # the greatest of them, relative


def first_divergence(one: Trace, other: Trace, tolerance: float, same_cut: bool) -> Divergence | None:
    """Return where two traces first differ by more than a tolerance; `None` if they do not.

    The tolerance is relative to the norm of what is compared; 0 compares bits. Unless both runs cut their batches
    alike, only what belongs to whole batches is compared.
    """

    def order(position: Position) -> tuple[int, int]:  # in which a fault would spread
        return position.step, KINDS.index(position.kind)

    compared = [position for position in {**one, **other} if same_cut or position.micro_batch == -1]
    compared.sort(key=lambda position: (*order(position), position.micro_batch))
    for (_, kind), group in groupby(compared, order):
        positions = list(group)
        norms = [one[position].norm for position in positions if position in one]
        scale = math.hypot(*norms) if kind == KINDS.index("gradient") else 0.0
        differences = {position: _difference(one.get(position), other.get(position), scale) for position in positions}
        differing = [position for position in positions if differences[position] > tolerance]
        if differing:
            return Divergence(differing[0], len(differing) - 1, max(differences.values()))
    return None


def gradient_differences(one: Trace, other: Trace, step: int) -> dict[str, float]:
    """Return how far the gradient of each parameter differs in a step, relative to itself; under "" that of all."""
    shared = [position for position in one if position[:2] == (step, "gradient") and position in other]
    differences = {position.name: _difference(one[position], other[position]) for position in shared}
    norms = {position.name: max(one[position].norm, other[position].norm) for position in shared}
    total = math.hypot(*(differences[name] * norms[name] for name in norms))
    return {**differences, "": total / max(math.hypot(*norms.values()), 1e-300)}


def _difference(one: Mark | None, other: Mark | None, scale: float = 0.0) -> float:
    """Return how far apart two marks are, relative to the larger of norm and scale; infinity if not comparable."""
    if one is None or other is None:
        return math.inf
    if one.bits == other.bits:
        return 0.0
    distance = max(abs(one.norm - other.norm), abs(one.product - other.product))
    if not math.isfinite(distance):
        return math.inf
    return max(distance / max(one.norm, other.norm, scale, 1e-300), 1e-300)  # more than nothing
