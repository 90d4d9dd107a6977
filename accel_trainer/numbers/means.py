"""Whether the user's losses and metrics are means over the samples."""

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
from .forward import Forward
from .loss_functions import may_leave_traces
from .metrics import Metrics, total_of
from .objective import Objective
from .scalars import column_of

_Compute = Callable[[Any, MicroBatch, Any], Forward]  # of a function, a micro-batch and the model's `_Answers` for it


class _Measured(NamedTuple):
    """Values and weights of a function over some samples: over all of them, the same again, and over each half."""

    name: str
    num_samples: int
    tolerance: float  # relative
    hint: str
    values: list[Any]
    weights: list[Any]


class MeanProbe:
    """Find functions that are no means over samples.

    Losses, gradients and metrics are put together from micro-batches. This is right only if the value over some samples
    is the mean of the values over two parts of them; otherwise the result depends on how batches are cut, and on the
    number of processes. The probe looks at the first few micro-batches of the first evaluation, whole and in halves. It
    says nothing of functions that keep a state or draw at random.
    """

    _NUM_LOOKS = 8  # micro-batches

    def __init__(self) -> None:
        self.is_done = False  # whether there is a verdict
        self.doubts: dict[str, str] = {}  # name of a function -> why it is no mean; the same on all processes
        self.wants_training = True  # whether a micro-batch of the training is still to be looked at
        self._num_looks = 0
        self._measured: list[_Measured] = []
        self._left_out: list[Tensor] = []  # whether labels hold -100, which weigh nothing in most losses

    def look(
        self,
        objective: Objective,
        metrics: Metrics,
        model: nn.Module,
        uncompiled: Callable[[], AbstractContextManager[Any]] | None,
        micro_batch: MicroBatch,
        forward: Forward,
    ) -> None:
        """Look at loss and metrics over a micro-batch of an evaluation, which is on the device.

        `compute_loss` is called with the model for one micro-batch only, since it costs forwards, and `uncompiled`,
        since halves are not worth a graph; never where that is `None`.
        """
        if self.is_done or micro_batch.num_samples < 2 or self._num_looks == self._NUM_LOOKS:
            return
        self._num_looks += 1
        if objective.compute_loss is None:
            self._look_at_loss(objective, micro_batch, forward)
        else:
            self._look_at_labels(micro_batch, forward)
            if uncompiled is not None and self._num_looks == 1 and not may_leave_traces(objective.compute_loss):
                with uncompiled():
                    self._measure(
                        _COMPUTED, None, lambda _, part, answers: objective(model, part, False), micro_batch, forward
                    )
        for name, metric in metrics.functions.items():
            self._measure(name, metric, partial(_compute_metric, name), micro_batch, forward)

    def look_within_training(self, objective: Objective, micro_batch: MicroBatch, forward: Forward) -> None:
        """Look at the loss over the first micro-batch that is trained on."""
        if self.is_done or micro_batch.num_samples < 2:
            return
        self.wants_training = False
        if objective.compute_loss is not None:
            self._look_at_labels(micro_batch, forward)
        elif forward.outputs is not None:
            self._look_at_loss(objective, micro_batch, forward)

    def _look_at_loss(self, objective: Objective, micro_batch: MicroBatch, forward: Forward) -> None:
        def compute(loss_fn: Any, part: MicroBatch, answers: _Answers) -> Forward:
            return objective.with_loss(loss_fn)(answers, part, False)

        if objective.weight_fn is None or not may_leave_traces(objective.weight_fn):
            self._measure(_LOSS, objective.loss_fn, compute, micro_batch, forward)

    def _look_at_labels(self, micro_batch: MicroBatch, forward: Forward) -> None:
        is_weighed = isinstance(forward.weight, Tensor) or forward.weight != micro_batch.num_samples
        if is_weighed or not isinstance(micro_batch.data, Mapping):
            return
        labels = [micro_batch.data[name] for name in TARGET_NAMES if name in micro_batch.data]
        self._left_out += [
            (label == -100).any() for label in labels if isinstance(label, Tensor) and not label.is_floating_point()
        ]

    @torch.no_grad()
    def _measure(self, name: str, function: Any, compute: _Compute, micro_batch: MicroBatch, forward: Forward) -> None:
        """Compute a function over a micro-batch, twice, and over its halves; leave it out if that fails."""
        if not _leaves_no_trace(function):
            return
        number = micro_batch.num_samples
        values, weights = [], []
        try:
            with generators_kept(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the user has seen them already
                copied = _copy_of(function)
                for start, stop in ((0, number), (0, number), (0, number // 2), (number // 2, number)):
                    result = compute(copied, *_part(micro_batch, forward, start, stop))
                    values.append(result.loss)
                    weights.append(result.weight)
                    del result  # and the memory of its outputs
        except Exception:
            return
        tolerance, hint = _tolerance_of(forward, *values), _hint_of(forward) if name == _LOSS else ""
        self._measured.append(_Measured(name, number, tolerance, hint, values, weights))

    def settle(self, device: torch.device, is_main: bool) -> None:
        """Reach a verdict, on all processes alike, and warn; all call it at the same point. One read-back."""
        if self.is_done:
            return
        numbers = [number for measured in self._measured for number in (*measured.values, *measured.weights)]
        found: dict[str, str] = {}
        for measured, read in zip(self._measured, column_of(numbers, device).view(-1, 2, 4).tolist(), strict=True):
            if (text := _doubt(measured, *read)) is not None:
                found.setdefault(measured.name, text)
        if self._left_out and torch.stack(self._left_out).any():
            found.setdefault(_COMPUTED, _ON_LABELS)
        self._measured, self._left_out = [], []
        have_looked, founds = zip(*gather_objects((self._num_looks > 0 or not self.wants_training, found)), strict=True)
        self.is_done = any(have_looked)  # single samples allow no verdict
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
    "losses and gradients depend on how batches are cut, and without num_micro_batches on the number of processes. If "
    "it divides by something else than samples, such as tokens, {}; if it is no mean at all, fix num_micro_batches."
)
_REMEDIES = {
    _LOSS: _ON_LOSSES.format("give weight_fn, or compute_loss that returns (loss, weight)"),
    _COMPUTED: _ON_LOSSES.format("let it return (loss, weight)"),
}
_OF_METRICS = (
    "its value depends on how batches are cut. Give it as one of whole_metrics, which are computed of all outputs at "
    "once."
)


def _doubt(measured: _Measured, values: list[float], weights: list[float]) -> str | None:
    """Return a warning if a function is no mean by its values and weights on the host, `None` if it may be one."""
    whole, again, *halves = values
    *_, first, second = weights
    is_repeatable = math.isclose(whole, again, rel_tol=measured.tolerance / 10)
    if not (is_repeatable and all(map(math.isfinite, values)) and first + second > 0):
        return None
    mean = (halves[0] * first + halves[1] * second) / (first + second)
    if abs(mean - whole) <= measured.tolerance * max(map(abs, values)):
        return None
    name = measured.name if measured.name in _REMEDIES else f"The metric {measured.name!r}"
    return (
        f"{name} is no mean over samples: over {measured.num_samples} samples it is {whole:.4g}, but over their halves "
        f"{mean:.4g} in the mean.{measured.hint} So {_REMEDIES.get(measured.name, _OF_METRICS)}"
    )


def _part(micro_batch: MicroBatch, forward: Forward, start: int, stop: int) -> tuple[MicroBatch, _Answers]:
    """Return a copy of some samples and their outputs: a function may write to what it is given."""
    number = micro_batch.num_samples
    data, outputs, targets = (
        recursively_apply(torch.clone, take(given, start, stop, number))
        for given in (micro_batch.data, forward.outputs, forward.targets)
    )
    return replace(micro_batch, data=data, num_held=stop - start), _Answers(outputs, targets)


class _Answers(nn.Module):
    """A model whose outputs are known, and the targets of the same samples."""

    def __init__(self, outputs: Any, targets: Any) -> None:
        super().__init__()
        self.outputs, self.targets = outputs, targets

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.outputs


def _compute_metric(name: str, metric: Any, part: MicroBatch, answers: _Answers) -> Forward:
    total: Any = total_of(name, metric(answers.outputs, answers.targets), part.num_samples)
    return Forward(total / part.num_samples, part.num_samples)


def _leaves_no_trace(function: Any) -> bool:
    """Return whether extra calls of a function change nothing; of an object a copy is called."""
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    return _is_copied(inner) or not may_leave_traces(inner)


def _copy_of(function: Any) -> Any:
    """Return a copy of a function, or the function itself if it has no copy."""
    return copy.deepcopy(function) if _is_copied(function) else function


def _is_copied(function: Any) -> bool:
    """Return whether a function is an object that is copied; a whole model is not."""
    is_model = isinstance(function, nn.Module) and next(function.parameters(), None) is not None
    return not is_model and not isinstance(function, (FunctionType, BuiltinFunctionType, MethodType))


def _tolerance_of(forward: Forward, *values: Any) -> float:
    """Return how far apart rounding may bring two values, relative: further where the model runs again."""
    tensors = (value for value in (forward.loss, forward.outputs, *values) if isinstance(value, Tensor))
    if any(tensor.is_floating_point() and tensor.element_size() < 4 for tensor in tensors):
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
