"""Buffers that do not depend on the process that computed them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from ..data.micro_batches import Batch, MicroBatch
from .reductions import ChainSum, TreeSum, share_from_main


class Buffers:
    """Let every micro-batch of a step start from the same buffers, and average their changes.

    A chain of updates, as in a loop that accumulates gradients, would depend on how many processes share the batch.
    Here BatchNorm's running statistics move once per step, by the mean of their changes in the non-empty micro-batches;
    whole-number buffers, such as its counter, advance once per step. A buffer that changes its shape is a cache: each
    process keeps its own.

    All buffers of a kind go through each operation together: a kernel for each buffer would cost more than the layers
    that the buffers belong to.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        changes: ChainSum | TreeSum,
        num_processes: int,
        any_process: Callable[..., list[bool]],
    ) -> None:
        self._roots, self._sum, self._num_processes, self._any_process = roots, changes, num_processes, any_process
        self._found = _Found(roots)
        self._batch: Batch | None = None  # the batch at whose start these copies were taken:
        self._start, self._start_of_counted, self._counted_after = _Copies(), _Copies(), _Copies()

    def start_epoch(self) -> None:
        """Find the buffers of modules that a callback has added, and forget a batch that was left unfinished."""
        self._found = _Found(self._roots, self._found)
        self._forget()

    def _forget(self) -> None:
        self._batch = None
        self._sum.clear()

    def start_batch(self, batch: Batch, can_undo: bool) -> None:
        """Copy the buffers, where that is needed."""
        self._batch = None
        if self._found.owners and (can_undo or not self._is_whole(batch)):
            self._batch = batch
            self._start.take(self._found.averaged())
            self._start_of_counted.take(self._found.counted())

    def _is_whole(self, batch: Batch) -> bool:
        # One micro-batch on one process moves the buffers as a loop without micro-batches does.
        return self._num_processes == 1 and batch.layout.num_micro_batches == 1

    def start_micro_batch(self, micro_batch: MicroBatch) -> None:
        """Set the buffers to those at the start of the batch."""
        if not micro_batch.piece.is_first:
            self._go_back()

    def undo(self) -> None:
        """Set the buffers to those at the start of the present batch, or of the last one."""
        self._go_back()
        self._forget()

    def _go_back(self) -> None:
        if self._batch is not None:
            _copy_all(self._found.averaged(), self._start.tensors)
            _copy_all(self._found.counted(), self._start_of_counted.tensors)

    def end_micro_batch(self, micro_batch: MicroBatch) -> None:
        """Add the changes of the buffers in a micro-batch."""
        if self._batch is None or self._is_whole(self._batch):
            return
        if micro_batch.piece.is_first:
            if self._num_processes > 1:
                self._check_counted()
            self._counted_after.take(self._found.counted())
        if not micro_batch.piece.is_padding and self._found.are_averaged:
            self._sum.add(micro_batch.piece.index, self._changes())

    def _check_counted(self) -> None:
        for (module, name), buffer in zip(self._found.are_counted, self._found.counted(), strict=True):
            first = self._found.shapes[module, name]
            if buffer.shape != first:
                raise RuntimeError(
                    f"The whole-number buffer {name!r} of {type(module).__name__} changes its shape from "
                    f"{tuple(first)} to {tuple(buffer.shape)}, so that the processes cannot share it. "
                    "Keep it as an attribute that is no buffer, or give it its largest shape from the start."
                )

    @torch.no_grad()
    def _changes(self) -> list[Tensor | None]:
        """Return how far each averaged buffer has moved; `None` for a cache."""
        now, bases = self._found.averaged(), self._start.finite()
        is_steady = [self._found.is_steady(owner) for owner in self._found.are_averaged]
        moved = iter(_together(torch._foreach_sub, list(compress(now, is_steady)), list(compress(bases, is_steady))))
        return [next(moved) if has_moved else None for has_moved in is_steady]

    def finish(self) -> None:
        """Set the buffers to the average over the micro-batches of the whole batch."""
        if self._batch is None or self._is_whole(self._batch):
            return
        if self._found.are_averaged:
            self._average(self._batch)
        counted = self._counted_after.tensors
        if self._num_processes > 1 and self._found.has_foreign_modules and counted:
            counted = [tensor.clone() for tensor in counted]
            share_from_main(counted)  # from the process of the first micro-batch
        _copy_all(self._found.counted(), counted)

    @torch.no_grad()
    def _average(self, batch: Batch) -> None:
        owners = self._found.are_averaged
        shapes = [self._found.shapes[owner] for owner in owners]
        # Every process sends equally many elements: zeros of the first shape where a buffer has changed its own.
        like = [
            start if start.shape == shape else start.new_zeros(shape)
            for start, shape in zip(self._start.tensors, shapes, strict=True)
        ]
        total = self._sum.total(batch.num_micro_batches, like)
        moved = [
            (buffer, base, change)
            for owner, buffer, base, change in zip(
                owners, self._found.averaged(), self._start.finite(), total, strict=True
            )
            if change is not None and self._found.is_steady(owner)
        ]
        if moved:
            buffers, bases, changes = zip(*moved, strict=True)
            means = _together(lambda group: torch._foreach_div(group, batch.num_filled), changes)
            _copy_all(buffers, _together(torch._foreach_add, bases, means))

    def share(self) -> None:
        """Copy the buffers of the main process, except caches, to all; called before an evaluation and a save."""
        owners = self._found.owners
        if self._num_processes > 1 and owners:
            are_caches = self._any_process(*(not self._found.is_steady(owner) for owner in owners))
            share_from_main(_now(owner) for owner, is_cache in zip(owners, are_caches, strict=True) if not is_cache)


class _Found:
    """The buffers of some modules, each by its owner: its module and its name there.

    `shapes` has the first shape of each, `None` where it could not be averaged then, and `owners` those that can be:
    `are_averaged` of them have floating-point buffers, `are_counted` the others. A buffer whose shape has changed since
    `before`, the buffers found earlier, is a cache.
    """

    def __init__(self, roots: Sequence[nn.Module], before: _Found | None = None) -> None:
        modules = {module for root in roots for module in root.modules()}
        self._settled = set() if before is None else modules  # buffers that they make in a forward are their own
        self.shapes: dict[_Owner, Any] = {} if before is None else before.shapes
        found = _owners_of_buffers(roots)
        for module, name in found:
            if before is None or module not in before._settled:
                buffer = module._buffers[name]
                shape = buffer.shape if buffer is not None and is_plain(buffer) else None
                self.shapes.setdefault((module, name), shape)
        self.owners = [owner for owner in found if self.shapes.get(owner) is not None]
        self.are_averaged = [owner for owner in self.owners if _is_averaged(_now(owner))]
        self.are_counted = [owner for owner in self.owners if not _is_averaged(_now(owner))]
        self.has_foreign_modules = any(not type(module).__module__.startswith("torch.nn.") for module, _ in self.owners)

    def averaged(self) -> list[Tensor]:
        """Return the floating-point buffers as they are now."""
        return [_now(owner) for owner in self.are_averaged]

    def counted(self) -> list[Tensor]:
        """Return the other buffers as they are now."""
        return [_now(owner) for owner in self.are_counted]

    def is_steady(self, owner: _Owner) -> bool:
        """Return whether a buffer has its first shape."""
        return bool(_now(owner).shape == self.shapes[owner])


_MISSING = torch.empty(0)  # in place of a buffer that has been set to None


def _now(owner: _Owner) -> Tensor:
    module, name = owner
    buffer = module._buffers[name]
    return _MISSING if buffer is None else buffer


class _Copies:
    """Copies of tensors, in memory that is kept from batch to batch: all of one dtype and device in one piece."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._pieces: list[Tensor] = []
        self._finite: list[Tensor] = []
        self._finite_pieces: list[Tensor] = []
        self._is_new = False  # whether tensors were copied since the finite ones were computed

    @torch.no_grad()
    def take(self, tensors: list[Tensor]) -> None:
        """Copy tensors, in place of those copied before."""
        if list(map(_form, tensors)) != list(map(_form, self.tensors)):
            self.tensors, self._pieces = _like(tensors)
            self._finite, self._finite_pieces = [], []
        _copy_all(self.tensors, tensors)
        self._is_new = True

    @torch.no_grad()
    def finite(self) -> list[Tensor]:
        """Return the values that changes start from: zero for an infinity, whose difference would be nan."""
        if len(self._finite) != len(self.tensors):
            self._finite, self._finite_pieces = _like(self.tensors)
        if self._is_new:
            for piece, finite in zip(self._pieces, self._finite_pieces, strict=True):
                torch.nan_to_num(piece, nan=0.0, posinf=0.0, neginf=0.0, out=finite)
            self._is_new = False
        return self._finite


def _like(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return new tensors like these, and the pieces of memory that they are views of."""
    pieces: list[Tensor] = []

    def views(group: list[Tensor]) -> list[Tensor]:
        sizes = [tensor.numel() for tensor in group]
        pieces.append(group[0].new_empty(sum(sizes)))
        parts = torch.split(pieces[-1], sizes)
        return [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)]

    return _together(views, tensors), pieces


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


@torch.no_grad()
def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Overwrite tensors with others of their shape, in one operation; a tensor that has changed its shape stays."""
    pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target.shape == source.shape]
    _together(torch._foreach_copy_, [target for target, _ in pairs], [source for _, source in pairs])


def _together(operation: Callable[..., Any], first: Sequence[Tensor], *others: Sequence[Tensor]) -> list[Tensor]:
    """Apply one of torch's operations on lists to tensors of one dtype and device at a time: mixed lists are slow."""
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(first):
        groups.setdefault((tensor.dtype, tensor.device), []).append(index)
    results: list[Tensor] = list(first)
    for indices in groups.values():
        of_group = operation(*([tensors[index] for index in indices] for tensors in (first, *others)))
        for index, result in zip(indices, of_group or (), strict=False):
            results[index] = result
    return results


class FixedBuffers:
    """Let every micro-batch of an evaluation start from the same buffers; its changes are dropped."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._kept = [
            (module, name, buffer, buffer._version, buffer.clone())
            for module, name in _owners_of_buffers(roots)
            if (buffer := module._buffers[name]) is not None and is_plain(buffer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo changes; without any this costs a look at each buffer. A cache that has grown stays."""
        for index, (module, name, buffer, version, values) in enumerate(self._kept):
            now = module._buffers[name]
            is_same = now is buffer and buffer._version == version
            if not is_same and now is not None and now.shape == values.shape:
                module._buffers[name] = buffer.copy_(values) if buffer.shape == values.shape else values.clone()
                self._kept[index] = module, name, buffer, buffer._version, values


_Owner = tuple[nn.Module, str]


def _owners_of_buffers(roots: Iterable[nn.Module]) -> list[_Owner]:
    """Return module and name of each buffer, also of those that are still `None`; of a shared buffer once."""
    owners: dict[Any, _Owner] = {}
    for module in (module for root in roots for module in root.modules()):
        for name, buffer in module._buffers.items():
            owners[(module, name) if buffer is None else id(buffer)] = module, name
    return list(owners.values())


def is_plain(buffer: Tensor | None) -> bool:
    """Return whether a buffer has memory of its own to write to: not a view that repeats elements, not sparse."""
    if buffer is None or buffer.layout != torch.strided:
        return False
    return all(stride != 0 or size <= 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def _is_averaged(buffer: Tensor) -> bool:
    return (buffer.is_floating_point() and buffer.element_size() > 1) or buffer.is_complex()  # 8 bits know no sums
