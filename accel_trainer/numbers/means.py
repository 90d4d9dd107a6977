"""Whether the user's functions are what they are taken for: means over the samples."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..base.console import warn
from ..base.exchange import gather_objects
from ..data.collated import TARGET_NAMES, take
from ..data.micro_batches import MicroBatch
from ..data.randomness import generators_kept
from .loss_functions import may_leave_traces
from .metrics import Metrics, total_of
from .objective import Forward, Objective, split_batch
from .scalars import column_of

# What a function gives over the samples of a micro-batch, of which the model returned the second: value and weight.
_Function = Callable[[MicroBatch, Any], tuple[float | Tensor, float | Tensor]]


class _Measured(NamedTuple):
    """What a function gave over some samples, twice, and over their halves; and what those weigh."""

    name: str
    num_samples: int
    tolerance: float
    hint: str
    values: tuple[Any, ...]
    weights: tuple[Any, ...]


class MeanProbe:
    """Find functions that are no means over samples.

    A loss, its gradient and a metric are put together from micro-batches. So they are what they are called only if the
    value over some samples is the mean of the values over two parts of them; otherwise they depend on how batches are
    cut, and on the number of processes. The first few micro-batches of the first evaluation are looked at, whole and
    in halves. Of what keeps a state, or draws at random, nothing can be said.

    Attributes:
        is_done: Whether all has been looked at.
        wants_training: Whether a micro-batch of the training is still to be looked at.
        doubts: Name of a function -> what is to be said of it; the same on all processes.
    """

    _NUM_LOOKS = 8  # micro-batches

    def __init__(self) -> None:
        self.is_done = False
        self.doubts: dict[str, str] = {}
        self.wants_training = True
        self._num_looks = 0
        self._measured: list[_Measured] = []
        self._left_out: list[Tensor] = []  # whether labels hold -100, which weigh nothing to most losses

    def look(
        self,
        objective: Objective,
        metrics: Metrics,
        model: nn.Module,
        uncompiled: Callable[[], AbstractContextManager[Any]],
        micro_batch: MicroBatch,
        forward: Forward,
    ) -> None:
        """Look at loss and metrics over a micro-batch of an evaluation.

        Args:
            objective: The loss.
            metrics: Maybe none.
            model: What `compute_loss` is called with, for one micro-batch only, since it costs forwards.
            uncompiled: Returns what such a forward runs under: halves are worth no graphs of their own.
            micro_batch: On the device.
            forward: What it gave.
        """
        if not self._is_due(micro_batch):
            return
        if objective.compute_loss is None:
            self._look_at_loss(objective, micro_batch, forward)
            for name, metric in metrics.functions.items():
                if _leaves_no_trace(metric):
                    self._measure(name, partial(_mean_of, name, metric), micro_batch, forward)
        else:
            self._look_at_labels(micro_batch, forward)
            if self._num_looks == 1 and not may_leave_traces(objective.compute_loss):
                with uncompiled():
                    self._measure(_COMPUTED, partial(_computed, objective, model), micro_batch, forward)

    def look_within_training(self, objective: Objective, micro_batch: MicroBatch, forward: Forward) -> None:
        """Look at the loss over the first micro-batch that is trained on."""
        if self.is_done or micro_batch.num_samples < 2:
            return
        self.wants_training = False
        if objective.compute_loss is not None:
            self._look_at_labels(micro_batch, forward)
        elif forward.outputs is not None:
            self._look_at_loss(objective, micro_batch, forward)

    def _is_due(self, micro_batch: MicroBatch) -> bool:
        is_due = not self.is_done and micro_batch.num_samples > 1 and self._num_looks < self._NUM_LOOKS
        self._num_looks += is_due
        return is_due

    def _look_at_loss(self, objective: Objective, micro_batch: MicroBatch, forward: Forward) -> None:
        def make() -> _Function:
            own = objective.with_loss(_copy_of(objective.loss_fn))
            return lambda part, outputs: _pair(own(_Answers(outputs), part, False))

        leaves_by_weight = objective.weight_fn is not None and may_leave_traces(objective.weight_fn)
        if _leaves_no_trace(objective.loss_fn) and not leaves_by_weight:
            self._measure(_LOSS, make, micro_batch, forward)

    def _look_at_labels(self, micro_batch: MicroBatch, forward: Forward) -> None:
        is_weighed = isinstance(forward.weight, Tensor) or forward.weight != micro_batch.num_samples
        if is_weighed or not isinstance(micro_batch.data, Mapping):
            return
        labels = [micro_batch.data[name] for name in TARGET_NAMES if name in micro_batch.data]
        self._left_out += [
            (one == -100).any() for one in labels if isinstance(one, Tensor) and not one.is_floating_point()
        ]

    @torch.no_grad()
    def _measure(self, name: str, make: Callable[[], _Function], micro_batch: MicroBatch, forward: Forward) -> None:
        """Note what a function gives over a micro-batch and its halves; nothing if it takes no other samples."""
        number = micro_batch.num_samples
        halves = [(0, number // 2), (number // 2, number)]
        try:
            parts = [_part(micro_batch, forward.outputs, *half, number) for half in halves]
            with generators_kept(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the user has been told already
                function = make()
                pairs = [(micro_batch, forward.outputs)] * 2 + parts
                whole, again, *pieces = (function(*_copied(*pair)) for pair in pairs)
        except Exception:
            return
        values, weights = zip(whole, again, *pieces, strict=True)
        told = number, _tolerance_of(forward, *values), _hint_of(forward) if name == _LOSS else ""
        self._measured.append(_Measured(name, *told, values, weights))

    def settle(self, device: torch.device, is_main: bool) -> None:
        """Come to a verdict, on all processes alike, and warn; all call it at the same place. One read-back."""
        if self.is_done:
            return
        first_last = reversed(_read(self._measured, device))
        found = {one.name: text for one in first_last if (text := _doubt(one)) is not None}
        if self._left_out and torch.stack(self._left_out).any():
            found.setdefault(_COMPUTED, _ON_LABELS)
        self._measured, self._left_out = [], []
        have_looked, founds = zip(*gather_objects((self._num_looks > 0 or not self.wants_training, found)), strict=True)
        self.is_done = any(have_looked)  # of single samples nothing can be said
        for of_process in reversed(founds):
            self.doubts |= of_process
        if is_main:
            for text in self.doubts.values():
                warn(text, stacklevel=4)


_LOSS, _COMPUTED = "loss_fn", "compute_loss"
_ON_LABELS = (
    "Labels hold -100, which losses leave out, and compute_loss returns the loss alone: each sample weighs the same. "
    "If it is a mean over labels, let it return (loss, number of labels that count), or give weight_fn."
)
_ON_LOSSES = (
    "losses and gradients depend on how batches are cut, and without num_micro_batches on the number of processes."
)
_REMEDIES = {
    _LOSS: f"{_ON_LOSSES} If it divides by something else than samples, give weight_fn, or compute_loss that returns "
    "(loss, weight); if it is no mean at all, fix num_micro_batches.",
    _COMPUTED: f"{_ON_LOSSES} If it divides by something else than samples, such as tokens, let it return "
    "(loss, weight); if it is no mean at all, fix num_micro_batches.",
}
_OF_METRICS = (
    "its value depends on how batches are cut. Give it as one of whole_metrics, which are computed of all outputs at "
    "once."
)


def _doubt(one: _Measured) -> str | None:
    """Return what is to be said of a function that is no mean, `None` of one that may be."""
    whole, again, *values = one.values
    *_, first, second = one.weights
    is_repeatable = math.isclose(whole, again, rel_tol=one.tolerance / 10)
    if not (is_repeatable and all(map(math.isfinite, one.values)) and first + second > 0):
        return None
    mean = (values[0] * first + values[1] * second) / (first + second)
    scale = max(map(abs, one.values))
    if abs(mean - whole) <= one.tolerance * scale:
        return None
    what = one.name if one.name in _REMEDIES else f"The metric {one.name!r}"
    return (
        f"{what} is no mean over samples: over {one.num_samples} samples it is {whole:.4g}, but over their halves "
        f"{mean:.4g} in the mean.{one.hint} So {_REMEDIES.get(one.name, _OF_METRICS)}"
    )


def _read(measured: list[_Measured], device: torch.device) -> list[_Measured]:
    """Return the same with plain numbers."""
    numbers = column_of([number for one in measured for number in (*one.values, *one.weights)], device).view(-1, 2, 4)
    return [
        one._replace(values=values, weights=weights)
        for one, (values, weights) in zip(measured, numbers.tolist(), strict=True)
    ]


def _part(micro_batch: MicroBatch, outputs: Any, start: int, stop: int, number: int) -> tuple[MicroBatch, Any]:
    data = take(micro_batch.data, start, stop, number)
    of_part = None if outputs is None else take(outputs, start, stop, number)
    return replace(micro_batch, data=data, num_held=stop - start), of_part


def _copied(micro_batch: MicroBatch, outputs: Any) -> tuple[MicroBatch, Any]:
    """Return copies, in case that a function writes to what it is given."""
    copy_of = partial(recursively_apply, torch.clone)
    return replace(micro_batch, data=copy_of(micro_batch.data)), copy_of(outputs)


class _Answers(nn.Module):
    """A model whose outputs are known."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._outputs


def _pair(forward: Forward) -> tuple[float | Tensor, float | Tensor]:
    return forward.loss, forward.weight


def _computed(objective: Objective, model: nn.Module) -> _Function:
    return lambda part, outputs: _pair(objective(model, part, False))


def _mean_of(name: str, metric: Callable[[Any, Any], Any]) -> _Function:
    own = _copy_of(metric)

    def measured(part: MicroBatch, outputs: Any) -> tuple[float | Tensor, float | Tensor]:
        total = total_of(name, own(outputs, split_batch(part.data)[1]), part.num_samples)
        return total / part.num_samples, part.num_samples

    return measured


def _leaves_no_trace(function: Any) -> bool:
    """Return whether a function may be called more often than the user has it called; of an object its copy is."""
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    return _is_copied(inner) or not may_leave_traces(inner)


def _copy_of(function: Any) -> Any:
    """Return a function whose calls leave no trace in the user's, as far as that can be."""
    return copy.deepcopy(function) if _is_copied(function) else function


def _is_copied(function: Any) -> bool:
    """Return whether a function is an object that can have a copy; a whole model has none."""
    return not isinstance(function, (FunctionType, BuiltinFunctionType, MethodType)) and not _has_parameters(function)


def _has_parameters(function: Any) -> bool:
    return isinstance(function, nn.Module) and next(function.parameters(), None) is not None


def _tolerance_of(forward: Forward, *values: Any) -> float:
    """Return how far apart rounding may bring two values, relative: more where a model is asked once more."""
    tensors = [
        one for one in (forward.loss, forward.outputs, *values) if isinstance(one, Tensor) and one.is_floating_point()
    ]
    if any(one.element_size() < 4 for one in tensors):
        return 0.05
    return 1e-4 if forward.outputs is not None else 1e-2


def _hint_of(forward: Forward) -> str:
    outputs, targets = forward.outputs, forward.targets
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or outputs.shape == targets.shape:
        return ""
    try:
        joined = torch.broadcast_shapes(outputs.shape, targets.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return ""
    if joined.numel() <= max(outputs.numel(), targets.numel()):
        return ""
    return (
        f" Outputs have the shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}: compared as they are, "
        "each output meets each target. Give both one shape."
    )
