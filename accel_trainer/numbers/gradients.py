"""The exact gradient of the whole batch: on one process, over several, or in the order of one tree.

Backward runs on weight x loss; the sum over micro-batches and processes is divided by the total weight. Where all
micro-batches are of one size the weights are left out, and the sum is divided by their number: whether that is so does
not depend on the number of processes. One process and one micro-batch is bit for bit a plain loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.cut import Layout
from ..data.micro_batches import Batch, MicroBatch
from .forward import Forward
from .objective import usable
from .reductions import TreeSum, add_over_processes
from .scalars import on_device

_NOTHING = nullcontext()


class _Gradients:
    """What all kinds of gradients share: the trained parameters, one backward, one division.

    With `copies` gradients are copied after a backward, since the next one writes to their memory (CUDA graphs).
    """

    _batch: Batch  # the present batch
    _weight_is_num_samples = False
    _is_unweighted = False
    _weight: Any = 0  # sum over the micro-batches so far, where it is not known beforehand

    def __init__(self, model: nn.Module, accelerator: Accelerator, copies: bool = False) -> None:
        self._model, self._accelerator, self._copies = model, accelerator, copies
        self._names, self.parameters = _trainable(model)

    def start_epoch(self) -> None:
        """Drop old gradients, and find which parameters are trained now."""
        self._names, self.parameters = _trainable(self._model)
        for parameter in self._model.parameters():
            parameter.grad = None

    def start_batch(self, batch: Batch, weight_is_num_samples: bool) -> None:
        """Begin to add up; `weight_is_num_samples` says that every process knows the weight of the batch."""
        self._batch, self._weight_is_num_samples, self._weight = batch, weight_is_num_samples, 0
        are_equal = weight_is_num_samples and batch.is_even
        self._is_unweighted = are_equal or batch.layout.num_processes == batch.layout.num_micro_batches == 1

    def context(self, micro_batch: MicroBatch, is_deferred: bool) -> AbstractContextManager[Any]:
        """Return the context for forward and backward of a micro-batch.

        With `is_deferred` nothing is sent before `finish`, since the batch may have to be computed again.
        """
        return _NOTHING

    def clear(self) -> None:
        """Drop the gradients of a step, those of parameters outside the optimizer too."""
        for parameter in self.parameters:
            parameter.grad = None

    def _run_backward(self, loss: Tensor, micro_batch: MicroBatch) -> None:
        scaler = self._accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        if self._copies and not micro_batch.piece.is_last:
            for parameter in self.parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    def _divide(self, total: float | Tensor) -> None:
        if not isinstance(total, Tensor) and total == 1:
            return
        gradients = self._own_gradients()
        if gradients:
            torch._foreach_div_(gradients, total)

    def _own_gradients(self) -> list[Tensor]:
        """Return the gradients that there are."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _refuse_missing(self, names: Sequence[str]) -> None:
        """Refuse a batch in which parameters of these names have no gradient, as they had in the first step."""
        if names:
            raise RuntimeError(
                f"No gradient for {', '.join(names)} in this batch on process {self._accelerator.process_index}, "
                "though the first step gave every parameter one. Set find_unused_parameters=True in TrainConfig."
            )

    def _as_weight(self, weight: Any) -> Tensor:
        is_double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        dtype = torch.float64 if is_double else torch.float32
        return on_device(weight, self._accelerator.device, dtype).reshape(())


class LocalGradients(_Gradients):
    """The gradient on one process, or the part of one process."""

    def backward(self, forward: Forward, micro_batch: MicroBatch) -> None:
        """Add the gradient of one micro-batch."""
        self._run_backward(self._weighted_loss(forward, micro_batch), micro_batch)

    def _weighted_loss(self, forward: Forward, micro_batch: MicroBatch) -> Tensor:
        if self._is_unweighted and not micro_batch.piece.is_padding:
            return forward.loss
        weight = usable(forward.weight)
        self._weight = self._weight + weight
        return weighted(forward.loss, weight)

    def finish(self) -> None:
        """Make the gradients those of the mean over the batch, on every process."""
        self._divide(self._divisor())

    def _divisor(self) -> float | Tensor:
        if self._is_unweighted:
            return self._batch.layout.num_micro_batches
        return self._batch.size if self._weight_is_num_samples else never_zero(self._total_weight())

    def _total_weight(self) -> Tensor:
        total = self._as_weight(self._weight)
        if self._batch.layout.num_processes > 1:
            torch.distributed.all_reduce(total := total.clone())
        return total


class SummedGradients(LocalGradients):
    """The gradient over several processes, added after the backward; `wrapped` is the prepared model."""

    def __init__(self, model: nn.Module, accelerator: Accelerator, copies: bool, wrapped: nn.Module) -> None:
        super().__init__(model, accelerator, copies)
        self._wrapped = wrapped

    def context(self, micro_batch: MicroBatch, is_deferred: bool) -> AbstractContextManager[Any]:
        """Return a context in which nothing is sent."""
        local: AbstractContextManager[Any] = self._accelerator.no_sync(self._wrapped)
        return local

    def finish(self) -> None:
        """Make the gradients those of the mean over the batch, on every process."""
        self._add_over_processes()
        super().finish()

    def _add_over_processes(self) -> int:
        """Sum the gradients; one that no process has stays `None`. Return on how many processes each is, at least."""
        present = torch.tensor([parameter.grad is not None for parameter in self.parameters], dtype=torch.int32)
        counts = on_device(present, self._accelerator.device)
        torch.distributed.all_reduce(counts)
        num_present: list[int] = counts.tolist()
        for parameter, count in zip(self.parameters, num_present, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        add_over_processes(self._own_gradients())
        return min(num_present)


class OverlappedGradients(SummedGradients):
    """The gradient over several processes, added by `DistributedDataParallel` while the last backward still runs.

    It needs every parameter to get a gradient on every process. The first step shows whether that is so; where it is
    not, or where parameters are frozen or unfrozen later, and in batches that may have to be computed again, the
    gradients are added after the backward.
    """

    _can_overlap: bool | None = None  # not known before the first step
    _overlaps = False  # in this batch
    _exchange: tuple[Tensor, Any] | None = None  # the sum of the weights, under way

    def start_epoch(self) -> None:
        """Drop old gradients, and find which parameters are trained now."""
        names = self._names
        super().start_epoch()
        if names != self._names:
            self._can_overlap = False  # it waits for gradients of the parameters it was made with
        self._exchange = None

    def context(self, micro_batch: MicroBatch, is_deferred: bool) -> AbstractContextManager[Any]:
        """Return a context in which gradients are sent during the last backward only, with `is_deferred` never."""
        self._overlaps = self._can_overlap is True and not is_deferred
        if self._overlaps and micro_batch.piece.is_last:
            return _NOTHING
        return super().context(micro_batch, is_deferred)

    def backward(self, forward: Forward, micro_batch: MicroBatch) -> None:
        """Add the gradient of one micro-batch."""
        loss = self._weighted_loss(forward, micro_batch)
        if self._overlaps and micro_batch.piece.is_last and not self._weight_is_num_samples:
            total = self._as_weight(self._weight).clone()
            self._exchange = total, torch.distributed.all_reduce(total, async_op=True)  # while the backward runs
        self._run_backward(loss, micro_batch)

    def finish(self) -> None:
        """Make the gradients those of the mean over the batch, on every process."""
        if self._overlaps:
            named = zip(self._names, self.parameters, strict=True)
            self._refuse_missing([name for name, weight in named if weight.grad is None])
            self._divide(self._divisor() / self._batch.layout.num_processes)
            return
        num_present = self._add_over_processes()
        if self._can_overlap is None:
            self._can_overlap = num_present == self._batch.layout.num_processes
        self._divide(self._divisor())

    def _total_weight(self) -> Tensor:
        if self._exchange is None:
            return super()._total_weight()
        (total, exchange), self._exchange = self._exchange, None
        exchange.wait()
        return total


class TreeGradients(_Gradients):
    """The same gradient to the last bit on any number of processes: summed in the order of one tree.

    The model is not wrapped; nothing is sent before the last backward.
    """

    def __init__(
        self, model: nn.Module, accelerator: Accelerator, copies: bool, layout: Layout, is_compiled: bool
    ) -> None:
        super().__init__(model, accelerator, copies)
        self._sum = TreeSum(layout)
        # A function that first runs under a mode that compilers do not look past is not compiled later either.
        self._is_watched = not is_compiled or hasattr(TorchDispatchMode, "ignore_compile_internals")

    def start_batch(self, batch: Batch, weight_is_num_samples: bool) -> None:
        """Begin to add up; `weight_is_num_samples` says that every process knows the weight of the batch."""
        super().start_batch(batch, weight_is_num_samples)
        self._sum.clear()

    def context(self, micro_batch: MicroBatch, is_deferred: bool) -> AbstractContextManager[Any]:
        """Return a context that refuses layers that communicate, in the first batch."""
        return _NoCommunication() if self._is_watched else _NOTHING  # type: ignore[no-untyped-call]

    def backward(self, forward: Forward, micro_batch: MicroBatch) -> None:
        """Add the gradient of one micro-batch to the tree; refuse (ValueError) a sparse one."""
        if micro_batch.piece.is_padding:
            return
        weight = usable(forward.weight)
        self._run_backward(weighted(forward.loss, weight), micro_batch)
        leaf: list[Tensor | None] = [parameter.grad for parameter in self.parameters]
        for name, gradient in zip(self._names, leaf, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise ValueError(
                    f"bitwise=True needs dense gradients; {name} has a sparse one: use sparse=False there."
                )
        if not self._weight_is_num_samples:
            leaf.append(self._as_weight(weight).clone())
        self._sum.add(micro_batch.piece.index, leaf)
        self.clear()

    def finish(self) -> None:
        """Make the gradients those of the mean over the batch, on every process."""
        self._is_watched = False
        like: list[Tensor] = [*self.parameters]
        if not self._weight_is_num_samples:
            like.append(self._as_weight(0))
        total = self._sum.total(self._batch.num_micro_batches, like)
        weight = self._batch.size if self._weight_is_num_samples else never_zero(total.pop())  # type: ignore[arg-type]
        give_zeros_one_sign([gradient for gradient in total if gradient is not None])
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient
        self._divide(weight)


class _NoCommunication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse a model that communicates by itself: what it computes would depend on the number of processes."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return that a model may be compiled under this mode; older torch than 2.13 does not ask."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise ValueError(
                f"The model or the loss communicates between processes by itself ({func}), so the run would depend on "
                "their number: bitwise=True cannot promise anything of it. Remove that layer, or use bitwise=False."
            )
        return func(*args, **(kwargs or {}))


def _trainable(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name, _ in named], [parameter for _, parameter in named]


def weighted(loss: Tensor, weight: Any) -> Tensor:
    """Return weight x loss; a loss of weight 0 may be nan without harm."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, loss * weight)
    return loss * weight if weight else torch.nan_to_num(loss) * 0


def give_zeros_one_sign(sums: list[Tensor]) -> None:
    """Make each -0 a 0: whether a sum is the one or the other depends on whether zeros were added or left out."""
    if sums:
        torch._foreach_add_(sums, 0.0)


def never_zero(total: Tensor) -> Tensor:
    """Return what a sum of gradients is divided by: 1 where nothing weighs."""
    return torch.where(total == 0, 1, total)  # a batch of weight 0 has a gradient of zeros
