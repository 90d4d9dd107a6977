"""The exact gradient of the whole batch, and buffers that do not depend on who computed them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from .batches import Layout, MicroBatch
from .losses import Forward

__all__ = ["Buffers", "Gradients", "share_from_main"]


class Gradients:
    """Turn the losses of micro-batches into the gradient of the weighted mean over the whole batch.

    Backward runs on weight x loss; the sum over micro-batches and processes is divided by the total weight. With one
    process and one micro-batch both are left out, so the gradient is bit for bit that of a plain loop.

    Over several processes `DistributedDataParallel` adds the gradients while the backward still runs. It needs every
    parameter to get a gradient on every process; where the first step shows that this is not so (or the user says
    that it may change), the gradients are added here, after the backward.

    Args:
        model: The user's model.
        prepared: What `Accelerator.prepare` made of it.
        accelerator: The accelerator that prepared it.
        layout: This process and the cut.
        weighs_samples: Whether the weight of a batch is its number of samples, known everywhere.
        find_unused: Whether a later step can leave parameters without gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: nn.Module,
        accelerator: Accelerator,
        layout: Layout,
        weighs_samples: bool,
        find_unused: bool = False,
    ) -> None:
        self._model = model
        self._names, self.parameters = _trainable(model)
        self._prepared, self._accelerator, self._layout = prepared, accelerator, layout
        self._weighs_samples = weighs_samples
        self._alone = layout.num_processes == 1
        self._plain = self._alone and layout.num_micro_batches == 1
        self._probed = find_unused
        self._overlaps = False  # whether DistributedDataParallel adds the gradients
        self._weight: Any = 0

    def begin(self) -> None:
        """Begin an epoch: drop old gradients, and take in what was frozen or unfrozen since the last."""
        names, self.parameters = _trainable(self._model)
        if names != self._names:
            # DistributedDataParallel waits for the gradients of those it was made with.
            self._names, self._probed, self._overlaps = names, True, False
        for parameter in self._model.parameters():
            parameter.grad = None
        self._weight = 0

    def context(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        """Return what forward and backward of a micro-batch run under: gradients are sent after the last one only."""
        if self._alone or (self._overlaps and micro_batch.piece.is_last):
            return nullcontext()
        later: AbstractContextManager[Any] = self._accelerator.no_sync(self._prepared)
        return later

    def backward(self, forward: Forward) -> None:
        """Add the gradient of one micro-batch."""
        loss = forward.loss
        if not self._plain:
            self._weight = self._weight + forward.weight
            loss = _weighted(loss, forward.weight)
        scaler = self._accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def finish(self, batch_size: int) -> None:
        """Make the gradients those of the mean over the batch, on every process.

        Raises:
            RuntimeError: A parameter has no gradient that had one in the first step, on several processes.
        """
        if self._plain:
            return
        if self._overlaps:
            self._check_all_present()
        total: float | Tensor = batch_size if self._weighs_samples else self._total_weight()
        if self._overlaps:
            total = total / self._layout.num_processes  # DistributedDataParallel has taken the mean over the processes
        elif not self._alone:
            self._add_over_processes()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, total)

    def clear(self) -> None:
        """Drop the gradients of a step, those of parameters outside the optimizer too."""
        self._weight = 0
        for parameter in self.parameters:
            parameter.grad = None

    def _total_weight(self) -> Tensor:
        device = self._accelerator.device
        is_double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        dtype = torch.float64 if is_double else torch.float32
        total = torch.as_tensor(self._weight, dtype=dtype, device=device).reshape(())
        if not self._alone:
            torch.distributed.all_reduce(total)
        return torch.where(total == 0, 1, total)  # a batch that weighs nothing has a gradient of zeros

    def _check_all_present(self) -> None:
        missing = [name for name, parameter in zip(self._names, self.parameters, strict=True) if parameter.grad is None]
        if missing:
            raise RuntimeError(
                f"No gradient for {', '.join(missing)} in this batch on process {self._layout.process}, though the "
                "first step gave every parameter one. Set find_unused_parameters=True in TrainConfig."
            )

    def _add_over_processes(self) -> None:
        """Sum the gradients over the processes; a parameter without any on all of them keeps none."""
        device = self._accelerator.device
        present = torch.tensor([parameter.grad is not None for parameter in self.parameters], dtype=torch.int32)
        counts = present.to(device)
        torch.distributed.all_reduce(counts)
        num_present = counts.tolist()
        if not self._probed:
            self._probed = True
            self._overlaps = min(num_present) == self._layout.num_processes
        for parameter, count in zip(self.parameters, num_present, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        add_over_processes([parameter.grad for parameter in self.parameters if parameter.grad is not None])


def _trainable(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name, _ in named], [parameter for _, parameter in named]


def _weighted(loss: Tensor, weight: Any) -> Tensor:
    """Return weight x loss; a loss that weighs nothing may be nan without harm."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, loss * weight)
    return loss * weight if weight else torch.nan_to_num(loss) * 0


_BUCKET = 2**23  # elements sent together: large enough to hide latency, small against the model


def add_over_processes(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over the processes, in place, many in one message."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided:  # embeddings with sparse=True
            torch.distributed.all_reduce(tensor)
        else:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        for bucket in _buckets(group):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat)
            for tensor, summed in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(summed.view(tensor.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@torch.no_grad()
def share_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor, in place, with the main process's."""
    for tensor in tensors:
        contiguous = tensor.contiguous()
        torch.distributed.broadcast(contiguous, src=0)
        if contiguous is not tensor:
            tensor.copy_(contiguous)


class Buffers:
    """Let every micro-batch of a step start from the same buffers, and average what they leave.

    A chain of updates, as a plain accumulation loop makes it, would depend on how many processes share the batch.
    Here BatchNorm's running statistics move once per step, by the mean of what the non-empty micro-batches would
    make of them; whole-number buffers, such as its counter, advance once per step.

    Args:
        model: The user's model.
        layout: This process and the cut.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._layout = layout
        owners = {id(buffer): (module, name) for module in model.modules() for name, buffer in module._buffers.items()}
        self._owners = [owner for owner in owners.values() if _is_plain(owner[0]._buffers[owner[1]])]
        # One micro-batch on one process moves the buffers as a plain loop does.
        self._idle = not self._owners or (layout.num_processes == 1 and layout.num_micro_batches == 1)
        self._start: list[Tensor] = []
        self._moved: dict[int, Tensor] = {}  # place of a float buffer -> sum of its changes
        self._whole: dict[int, Tensor] = {}  # place of a whole-number buffer -> what the first micro-batch made of it

    def _now(self) -> list[Tensor]:
        return [module._buffers[name] for module, name in self._owners]  # type: ignore[misc]

    @torch.no_grad()
    def before(self, micro_batch: MicroBatch) -> None:
        """Begin a micro-batch."""
        if self._idle:
            return
        if micro_batch.piece.is_first:
            self._start = [buffer.clone() for buffer in self._now()]
            self._moved = {
                place: torch.zeros_like(start) for place, start in enumerate(self._start) if _averages(start)
            }
        else:
            for now, start in zip(self._now(), self._start, strict=True):
                if now.shape == start.shape:  # a cache that has grown stays
                    now.copy_(start)

    @torch.no_grad()
    def after(self, micro_batch: MicroBatch) -> None:
        """Take in what a micro-batch has made of the buffers."""
        if self._idle:
            return
        now = self._now()
        if micro_batch.piece.is_first:
            self._whole = {place: now[place].clone() for place in range(len(now)) if place not in self._moved}
        if micro_batch.piece.counts:
            for place, moved in self._moved.items():
                if now[place].shape == moved.shape:
                    moved += now[place] - _finite(self._start[place])

    @torch.no_grad()
    def finish(self, num_micro_batches: int) -> None:
        """Set the buffers to the average over the micro-batches of the whole batch.

        Args:
            num_micro_batches: Those with samples, over all processes.
        """
        if self._idle:
            return
        if self._layout.num_processes > 1:
            add_over_processes(list(self._moved.values()))
        now = self._now()
        for place, moved in self._moved.items():
            if now[place].shape == moved.shape:
                torch.add(_finite(self._start[place]), moved / num_micro_batches, out=now[place])
        for place, whole in self._whole.items():
            if now[place].shape == whole.shape:
                now[place].copy_(whole)

    def share(self) -> None:
        """Make the buffers those of the main process, before an evaluation and a save."""
        if self._layout.num_processes > 1:
            share_from_main(self._now())


def _is_plain(buffer: Tensor | None) -> bool:
    """Return whether a buffer has memory of its own to write to: not a view that repeats elements, not sparse."""
    if buffer is None or buffer.layout != torch.strided:
        return False
    return all(stride != 0 or size <= 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def _averages(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


def _finite(start: Tensor) -> Tensor:
    """Return what changes are counted from: infinities, which a difference would turn into nan, count from zero."""
    return torch.where(start.isfinite(), start, 0)
