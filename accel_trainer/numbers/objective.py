"""The user's loss over one micro-batch, and what it weighs."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed
from torch import Tensor, nn

from ..data.collated import TARGET_NAMES, tensors_in
from ..data.micro_batches import MicroBatch
from ..data.sources import TensorSource
from .loss_functions import Weight, check_reduction, divisor_of, form_of, unwrap_partial
from .scalars import on_device


@dataclass(slots=True)
class Forward:
    """What one forward gave.

    Attributes:
        loss: Scalar mean over the micro-batch.
        weight: How much it counts; a number, or a scalar on the device.
        outputs: What the model returned; `None` with `compute_loss`.
        targets: Second half of the batch; `None` with `compute_loss`.
    """

    loss: Tensor
    weight: Weight
    outputs: Any = None
    targets: Any = None


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch: a pair, or a dictionary of two with one entry named label(s) or target(s).

    Raises:
        TypeError: The batch is neither; the message says what it holds.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and len(batch) == 2:
        for name in TARGET_NAMES:
            if name in batch:
                first, second = batch
                return batch[second if first == name else first], batch[name]
    held = f"the keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    if isinstance(batch, (tuple, list)):
        held += f" of {len(batch)}"
    raise TypeError(
        "loss_fn needs batches of (inputs, targets), or dictionaries of two entries one of which is named "
        f"{', '.join(TARGET_NAMES)}; got {held}. Give compute_loss(model, batch) for any other batch."
    )


def inputs_of(batch: Any) -> Any:
    """Return what the model is called with: the first of a pair or single, the unlabelled entry, or the batch."""
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise TypeError(f"predict calls the model with the first of a pair or single; a batch has {len(batch)}.")
        return batch[0]
    if isinstance(batch, Mapping) and not (len(batch) == 2 and any(name in batch for name in TARGET_NAMES)):
        return batch
    return split_batch(batch)[0] if isinstance(batch, Mapping) else batch


class Objective:
    """The user's loss and what it weighs.

    Args:
        loss_fn: `(outputs, targets) -> scalar` mean over the samples.
        compute_loss: `(model, batch) -> loss` or `(loss, weight)`, instead of `loss_fn`.
        weight_fn: `(batch) -> weight` of a micro-batch, called before the forward.

    Raises:
        ValueError: A loss that does not take the mean, or both or neither of `loss_fn` and `compute_loss`.
        TypeError: Something that cannot be called.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        compute_loss: Callable[[nn.Module, Any], Tensor | tuple[Tensor, Weight]] | None = None,
        weight_fn: Callable[[Any], Weight] | None = None,
    ) -> None:
        if (loss_fn is None) == (compute_loss is None):
            raise ValueError("Give either loss_fn or compute_loss (then loss_fn=None), not both and not none.")
        for name, function in (("loss_fn", loss_fn), ("compute_loss", compute_loss), ("weight_fn", weight_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}.")
        if isinstance(loss_fn, type):
            raise TypeError(f"loss_fn is the class {loss_fn.__name__}; give an instance: {loss_fn.__name__}().")
        check_reduction(loss_fn)
        self.loss_fn, self.compute_loss, self.weight_fn = loss_fn, compute_loss, weight_fn
        self._divisor = divisor_of(loss_fn) if weight_fn is None else None
        self._known: WeakKeyDictionary[TensorSource, tuple[Any, bool]] = WeakKeyDictionary()  # version of data, answer
        weight = None if self._divisor is None else self._divisor.keywords["weight"]
        # torch's gradient of a micro-batch of no other class is nan.
        self._has_weightless_class = weight is not None and bool((weight == 0).any())

    def __reduce__(self) -> Any:
        return type(self), (self.loss_fn, self.compute_loss, self.weight_fn)  # without what it knows of the data

    def with_loss(self, loss_fn: Callable[[Any, Any], Tensor]) -> Objective:
        """Return the same with a copy of its loss."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, loss_fn=loss_fn)
        return other

    @property
    def may_leave_out(self) -> bool:
        """Whether it depends on the data if each sample weighs the same."""
        return self._divisor is not None and self.compute_loss is None

    def weighs_evenly(self, rows: TensorSource | None, may_hold_others: bool = False) -> bool:
        """Return whether each sample weighs as much as any other, so that all processes know the weight of a batch.

        Args:
            rows: The data, where it is known. A loss that leaves targets out does so in some data only, and whether in
                this is looked up if it is in memory (one read-back).
            may_hold_others: Whether a micro-batch may hold more samples, or fewer, than it has indices.
        """
        if self.compute_loss is not None or self.weight_fn is not None or may_hold_others:
            return False
        if self._divisor is None:
            return True
        if (
            rows is None
            or rows.sample_nbytes is None
            or not rows.in_memory
            or self._divisor.keywords["weight"] is not None
        ):
            return False
        if rows not in self._known or self._known[rows][0] != rows.version:
            _, targets = split_batch(rows.columns)
            left_out = not targets.is_floating_point() and (targets == self._divisor.keywords["ignore_index"]).any()
            self._known[rows] = rows.version, not left_out
        return self._known[rows][1]

    @property
    def functions(self) -> list[Any]:
        """The user's functions that run in a forward."""
        given = (self.loss_fn, self.compute_loss, self.weight_fn)
        return [unwrap_partial(function)[0] for function in given if function is not None]

    def state_outside(self) -> dict[str, str]:
        """Return what these functions keep as plain attributes, by name: no process knows that of another."""
        owners = [getattr(function, "__self__", function) for function in self.functions]
        parts = [part for one in owners for part in (one.modules() if isinstance(one, nn.Module) else [one])]
        return {
            f"{type(part).__name__}.{name}": repr(value.tolist() if isinstance(value, Tensor) else value)
            for part in parts
            for name, value in getattr(part, "__dict__", {}).items()
            if name != "training" and _is_small(value)
        }

    @property
    def modules(self) -> list[nn.Module]:
        """Those of them that are modules, whose buffers change as those of the model do."""
        return [function for function in self.functions if isinstance(function, nn.Module)]

    def to(self, device: torch.device) -> None:
        """Move what is a module, with its class weights and buffers, to where the model is."""
        for module in self.modules:
            module.to(device)

    @property
    def form(self) -> Hashable | None:
        """What the loss does, where it may be compiled together with the model: it looks at nothing, and keeps nothing.

        `None` where it may not. Losses of one form differ in nothing that compiled code depends on.
        """
        if self.compute_loss is not None or self.weight_fn is not None or self._has_weightless_class:
            return None
        function, keywords = unwrap_partial(self.loss_fn)
        form = form_of(function)
        settings = tuple(sorted((name, repr(value)) for name, value in keywords.items()))
        return None if form is None else (form, settings)

    def __call__(
        self,
        model: nn.Module,
        micro_batch: MicroBatch,
        is_even: bool,
        joined: Callable[[Any, Any], Tensor] | None = None,
    ) -> Forward:
        """Run the model on a micro-batch and return its loss and weight (0 for a stand-in).

        Args:
            model: What to call.
            micro_batch: On the device.
            is_even: Whether each sample is known to weigh the same.
            joined: Computes the loss of inputs and targets in place of model and `loss_fn`, if it has a `form`.
        """
        if joined is not None:
            return self._joined(joined, micro_batch, is_even)
        if self.compute_loss is None and self.weight_fn is None:
            forward = self._forward(model, micro_batch, is_even)
            if self._has_weightless_class:
                _mute(forward, list(tensors_in(forward.outputs)))
        else:
            with _watch_outputs(model) as outputs:
                forward = self._forward(model, micro_batch, is_even)
            forward.weight = _checked_weight(forward.weight, forward.loss)
            _mute(forward, outputs)
        if micro_batch.piece.is_padding:
            forward.weight = 0
        return forward

    def _forward(self, model: nn.Module, micro_batch: MicroBatch, is_even: bool) -> Forward:
        batch = micro_batch.data
        weight: Weight = micro_batch.num_samples if self.weight_fn is None else self.weight_fn(batch)
        if self.compute_loss is not None:
            result = self.compute_loss(model, batch)
            return Forward(*result) if isinstance(result, tuple) else Forward(result, weight)
        inputs, targets = split_batch(batch)
        outputs = call_model(model, inputs)
        loss = self.loss_fn(outputs, targets)  # type: ignore[misc]
        return Forward(loss, self._divided_by(targets, weight, is_even), outputs, targets)

    def _joined(self, joined: Callable[[Any, Any], Tensor], micro_batch: MicroBatch, is_even: bool) -> Forward:
        inputs, targets = split_batch(micro_batch.data)
        loss = joined(inputs, targets)
        is_real = not micro_batch.piece.is_padding
        return Forward(loss, self._divided_by(targets, micro_batch.num_samples, is_even) if is_real else 0)

    def _divided_by(self, targets: Any, weight: Weight, is_even: bool) -> Weight:
        return weight if self._divisor is None or is_even else self._divisor(targets)


def _is_small(value: Any) -> bool:
    """Return whether a value is a number, or a few of them: what a loss may count, or average."""
    if isinstance(value, Tensor):
        return value.numel() < 1000
    if isinstance(value, (list, tuple, deque)):
        return len(value) < 1000 and all(map(_is_small, value))
    return type(value) in (bool, int, float)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model with what it takes: a tensor, or a dictionary of arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def usable(weight: Weight) -> Weight:
    """Return a weight to compute with; one that is refused when it is read, negative until then, counts as 0."""
    return weight.clamp_min(0) if isinstance(weight, Tensor) else weight


def check_loss(loss: object, needs_grad: bool) -> None:
    """Refuse what is not a scalar loss to differentiate.

    Raises:
        TypeError: Not a tensor.
        ValueError: Not a scalar, or without a gradient to compute.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"The loss must be a tensor, got {type(loss).__name__}.")
    if loss.ndim != 0:
        raise ValueError(f"The loss must be a scalar (a mean over the samples), got shape {tuple(loss.shape)}.")
    if needs_grad and not loss.requires_grad:
        raise ValueError(
            "The loss does not require grad: nothing connects it with the model's parameters. Compute it from the "
            "model's outputs, without detach(), item() or torch.no_grad()."
        )


def _checked_weight(weight: Any, loss: Any) -> Weight:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(f"The weight of a micro-batch must be one number, got shape {tuple(weight.shape)}.")
        if weight.is_complex():
            raise ValueError(f"The weight of a micro-batch must be a real number, got {weight.dtype}.")
        weight = weight.detach().reshape(())
        weight = weight.float() if weight.element_size() < 4 else weight  # a sum of such would overflow
        weight = on_device(weight, loss.device) if isinstance(loss, Tensor) else weight
        return torch.where((weight >= 0) & (weight < _LARGEST_WEIGHT), weight, -1)  # found when it is read
    if not isinstance(weight, Real) or not 0 <= float(weight) < _LARGEST_WEIGHT:
        raise ValueError(f"The weight of a micro-batch must be a number of at least 0 and below 1e30, got {weight!r}.")
    return float(weight)


_LARGEST_WEIGHT = 1e30  # times a loss, and summed, that is still a number in single precision


@contextmanager
def _watch_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that fills with the tensors that the model returns."""
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, inputs, outputs: seen.extend(tensors_in(outputs)))
    try:
        yield seen
    finally:
        handle.remove()


def _zero_where(is_empty: Tensor, gradient: Tensor) -> Tensor:
    return torch.where(is_empty, 0, gradient)


def _mute(forward: Forward, outputs: list[Tensor]) -> None:
    """Let a micro-batch that weighs nothing have a loss and a gradient of zero, whatever it divides by."""
    if not isinstance(forward.loss, Tensor) or forward.loss.ndim != 0:
        return  # refused a moment later
    if not isinstance(forward.weight, Tensor) and forward.weight > 0:
        return
    is_empty = ~(on_device(forward.weight, forward.loss.device) > 0)
    forward.loss = torch.where(is_empty, 0, forward.loss)
    for output in outputs:
        if output.requires_grad:
            output.register_hook(functools.partial(_zero_where, is_empty))  # type: ignore[no-untyped-call]
