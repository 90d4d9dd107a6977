"""What a forward gives: loss, weight, outputs, targets and scalars of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .loss_functions import Weight
from .scalars import on_device


class Loss(NamedTuple):
    """What `compute_loss` returns where it has more to say than the loss.

    Attributes:
        loss: Scalar, the mean over the micro-batch.
        weight: What it counts in the mean over all micro-batches, at least 0, a number or scalar tensor; `None` for the
            number of samples.
        outputs: What metrics are given as outputs, one entry per sample in its first dimension ...
        targets: ... and as targets.
        scalars: Name -> number or scalar tensor: parts of the loss, or metrics of the training. Their means over the
            epoch, weighted as the loss is, are in `History.train_metrics`, and those over the test set in
            `History.metrics`. Each micro-batch gives the same names.

    Example:
        >>> from torch.nn import functional as F
        >>> def compute_loss(model, batch):
        ...     outputs = model(batch["features"])
        ...     fit, size = F.mse_loss(outputs, batch["value"]), outputs.square().mean()
        ...     return Loss(fit + 0.1 * size, None, outputs, batch["value"], {"fit": fit, "size": size})
    """

    loss: Tensor
    weight: Weight | None = None
    outputs: Any = None
    targets: Any = None
    scalars: Mapping[str, Weight] | None = None


@dataclass(slots=True)
class Forward:
    """The result of one forward; `outputs` of the model and `targets` are `None` where `compute_loss` keeps them."""

    loss: Tensor  # scalar mean over the micro-batch
    weight: Weight  # a number, or a scalar on the device
    outputs: Any = None
    targets: Any = None
    scalars: Mapping[str, Weight] | None = None  # with `compute_loss` only

    def check_weight(self) -> None:
        """Refuse a weight that is no number of at least 0; what is wrong in a tensor is refused when it is read."""
        self.weight = _checked_weight(self.weight, self.loss)

    def leave_out(self) -> None:
        """Let it count nothing, as padding."""
        self.weight = 0

    def mute(self, outputs: Iterable[Tensor]) -> None:
        """Give a micro-batch of weight 0 a loss and a gradient of zero, whatever the loss divides by.

        `outputs` are all tensors that the model has returned.
        """
        if not isinstance(self.loss, Tensor) or self.loss.ndim != 0:
            return  # refused a moment later
        if not isinstance(self.weight, Tensor) and self.weight > 0:
            return
        is_empty = ~(on_device(self.weight, self.loss.device) > 0)
        self.loss = torch.where(is_empty, 0, self.loss)
        for output in outputs:
            if output.requires_grad:
                output.register_hook(lambda gradient: torch.where(is_empty, 0, gradient))  # type: ignore[no-untyped-call]


def forward_of(result: Any, weight: Weight) -> Forward:
    """Return what `compute_loss` has returned as a `Forward`; `weight` is that of a loss that comes without one."""
    if isinstance(result, Mapping) or (isinstance(result, tuple) and not 1 <= len(result) <= len(Loss._fields)):
        held = f" of {', '.join(map(str, result))}" if isinstance(result, Mapping) else f" of {len(result)}"
        raise TypeError(
            "compute_loss must return a loss, (loss, weight) or accel_trainer.Loss, got a "
            f"{type(result).__name__}{held}. Other numbers than the loss go into the scalars of Loss."
        )
    if not isinstance(result, tuple):
        return Forward(result, weight, scalars={})
    given = Loss(*result)
    scalars = {name: _checked_scalar(name, value) for name, value in (given.scalars or {}).items()}
    return Forward(given.loss, weight if given.weight is None else given.weight, given.outputs, given.targets, scalars)


def _checked_scalar(name: Any, value: Any) -> Weight:
    if not isinstance(name, str):
        raise TypeError(f"The name of a scalar of compute_loss must be a text, got {name!r}.")
    if name in ("loss", "train_loss", "test_loss"):
        raise ValueError(f"The name {name!r} of a scalar is taken by the trainer's own numbers.")
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(())
    if isinstance(value, Real) and not isinstance(value, Tensor):
        return float(value)
    held = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise TypeError(f"The scalar {name!r} of compute_loss must be one real number, got {held}.")


def _checked_weight(weight: Any, loss: Any) -> Weight:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(f"The weight of a micro-batch must be one number, got shape {tuple(weight.shape)}.")
        if weight.is_complex():
            raise ValueError(f"The weight of a micro-batch must be a real number, got {weight.dtype}.")
        weight = weight.detach().reshape(())
        weight = weight.float() if weight.element_size() < 4 else weight  # a sum of small types would overflow
        weight = on_device(weight, loss.device) if isinstance(loss, Tensor) else weight
        return torch.where((weight >= 0) & (weight < _LARGEST_WEIGHT), weight, -1)  # refused when it is read
    if not isinstance(weight, Real) or not 0 <= float(weight) < _LARGEST_WEIGHT:
        raise ValueError(f"The weight of a micro-batch must be a number of at least 0 and below 1e30, got {weight!r}.")
    return float(weight)


_LARGEST_WEIGHT = 1e30  # sums of it times a loss still are finite in single precision
