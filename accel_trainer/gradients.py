"""The exact gradient of the whole batch, and buffers that do not depend on who computed them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .batches import Layout, MicroBatch
from .console import warn
from .exchange import gather_objects
from .losses import Forward, on_device, usable
from .reductions import ChainSum, TreeSum, add_over_processes, share_from_main

__all__ = ["Buffers", "FixedBuffers", "Gradients", "TreeGradients", "is_plain"]


_NOTHING = nullcontext()


class Gradients:
    """Turn the losses of micro-batches into the gradient of the weighted mean over the whole batch.

    Backward runs on weight x loss; the sum over micro-batches and processes is divided by the total weight. Where all
    micro-batches are of one size the weights are left out, and the sum is divided by their number: whether that is so
    does not depend on the number of processes. One process and one micro-batch is bit for bit a plain loop.

    Over several processes `DistributedDataParallel` adds the gradients while the backward still runs. It needs every
    parameter to get a gradient on every process; where the first step shows that this is not so (or the user says
    that it may change), the gradients are added here, after the backward.

    Args:
        model: The user's model.
        prepared: What `Accelerator.prepare` made of it.
        accelerator: The accelerator that prepared it.
        layout: This process and the cut.
        find_unused: Whether a later step can leave parameters without gradient.
        copies: Whether the next backward writes to the memory that gradients are in (CUDA graphs).

    Attributes:
        weighs_samples: Whether the weight of a batch is its number of samples, known everywhere without an exchange.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: nn.Module,
        accelerator: Accelerator,
        layout: Layout,
        *,
        find_unused: bool = False,
        copies: bool = False,
    ) -> None:
        self.layout, self._copies = layout, copies
        self._model = model
        self._names, self.parameters = _trainable(model)
        self._prepared, self._accelerator = prepared, accelerator
        self.weighs_samples = False
        self._alone = layout.num_processes == 1
        self._probed = find_unused
        self._overlaps = False  # whether DistributedDataParallel can add the gradients ...
        self._overlapped = False  # ... and does so in this batch
        self._is_mean = False  # whether its micro-batches weigh the same
        self._weight: Any = 0
        self._total: tuple[Tensor, Any] | None = None  # that of all processes, and its exchange

    @property
    def _plain(self) -> bool:
        return self._alone and self.layout.num_micro_batches == 1

    def begin(self) -> None:
        """Begin an epoch: drop old gradients, and take in what was frozen or unfrozen since the last."""
        names, self.parameters = _trainable(self._model)
        if names != self._names:
            # DistributedDataParallel waits for the gradients of those it was made with.
            self._names, self._probed, self._overlaps = names, True, False
        for parameter in self._model.parameters():
            parameter.grad = None
        self._weight, self._total = 0, None

    def context(self, micro_batch: MicroBatch, hold: bool) -> AbstractContextManager[Any]:
        """Return what forward and backward of a micro-batch run under: gradients are sent after the last one only.

        Args:
            micro_batch: Which it is.
            hold: Send nothing before `finish`, since the batch may have to be done again.
        """
        self._is_mean = self.weighs_samples and micro_batch.batch_size % self.layout.num_micro_batches == 0
        if self._alone:
            return _NOTHING
        self._overlapped = self._overlaps and not hold
        if self._overlapped and micro_batch.piece.is_last:
            return _NOTHING
        later: AbstractContextManager[Any] = self._accelerator.no_sync(self._prepared)
        return later

    def backward(self, forward: Forward, micro_batch: MicroBatch) -> None:
        """Add the gradient of one micro-batch."""
        loss = forward.loss
        is_one_of_equals = self._is_mean and micro_batch.piece.counts  # a stand-in weighs nothing
        if not self._plain and not is_one_of_equals:
            weight = usable(forward.weight)
            self._weight = self._weight + weight
            loss = _weighted(loss, weight)
            if self._overlapped and micro_batch.piece.is_last and not self.weighs_samples:
                self._begin_total()  # under way while the backward runs
        self._run_backward(loss, micro_batch)

    def _run_backward(self, loss: Tensor, micro_batch: MicroBatch) -> None:
        scaler = self._accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        if self._copies and not micro_batch.piece.is_last:
            for parameter in self.parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    def finish(self, batch_size: int) -> None:
        """Make the gradients those of the mean over the batch, on every process.

        Raises:
            RuntimeError: A parameter has no gradient that had one in the first step, on several processes.
        """
        if self._plain:
            return
        if self._overlapped:
            self._check_all_present()
        elif not self._alone:
            self._add_over_processes()
        if self._is_mean:
            total: float | Tensor = self.layout.num_micro_batches
        else:
            total = batch_size if self.weighs_samples else self._total_weight()
        self._divide(total / self.layout.num_processes if self._overlapped else total)

    def _divide(self, total: float | Tensor) -> None:
        if not isinstance(total, Tensor) and total == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, total)

    def clear(self) -> None:
        """Drop the gradients of a step, those of parameters outside the optimizer too."""
        self._weight = 0
        for parameter in self.parameters:
            parameter.grad = None

    def _begin_total(self) -> None:
        total = self._as_weight(self._weight).clone()
        self._total = total, torch.distributed.all_reduce(total, async_op=True)

    def _total_weight(self) -> Tensor:
        if self._alone:
            return _never_zero(self._as_weight(self._weight))
        if self._total is None:
            self._begin_total()
        (total, exchange), self._total = self._total, None  # type: ignore[misc]
        exchange.wait()
        return _never_zero(total)

    def _as_weight(self, weight: Any) -> Tensor:
        is_double = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        dtype = torch.float64 if is_double else torch.float32
        return on_device(weight, self._accelerator.device, dtype).reshape(())

    def _check_all_present(self) -> None:
        missing = [name for name, parameter in zip(self._names, self.parameters, strict=True) if parameter.grad is None]
        if missing:
            raise RuntimeError(
                f"No gradient for {', '.join(missing)} in this batch on process {self.layout.process}, though the "
                "first step gave every parameter one. Set find_unused_parameters=True in TrainConfig."
            )

    def _add_over_processes(self) -> None:
        """Sum the gradients over the processes; a parameter without any on all of them keeps none."""
        present = torch.tensor([parameter.grad is not None for parameter in self.parameters], dtype=torch.int32)
        counts = on_device(present, self._accelerator.device)
        torch.distributed.all_reduce(counts)
        num_present = counts.tolist()
        if not self._probed:
            self._probed = True
            self._overlaps = min(num_present) == self.layout.num_processes
        for parameter, count in zip(self.parameters, num_present, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        add_over_processes([parameter.grad for parameter in self.parameters if parameter.grad is not None])


class TreeGradients(Gradients):
    """The same gradient to the last bit on any number of processes: summed in the order of one tree.

    The model is not wrapped; nothing is sent before the last backward.

    Args:
        model: The user's model.
        accelerator: The accelerator that prepared it.
        layout: This process and the cut.
        copies: Whether the next backward writes to the memory that gradients are in (CUDA graphs).
        is_compiled: Whether the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        layout: Layout,
        *,
        copies: bool = False,
        is_compiled: bool = False,
    ) -> None:
        super().__init__(model, model, accelerator, layout, copies=copies)
        self._sum = TreeSum(layout)
        # What is met under a mode that compilers do not look past is never compiled, in later batches neither.
        self._watches = not is_compiled or hasattr(TorchDispatchMode, "ignore_compile_internals")

    def begin(self) -> None:
        """Begin an epoch: drop old gradients, and take in what was frozen or unfrozen since the last."""
        super().begin()
        self._sum.clear()

    def context(self, micro_batch: MicroBatch, hold: bool) -> AbstractContextManager[Any]:
        """Return what forward and backward run under: in the first batch, a look for layers that communicate."""
        return _NoCommunication() if self._watches else _NOTHING  # type: ignore[no-untyped-call]

    def backward(self, forward: Forward, micro_batch: MicroBatch) -> None:
        """Add the gradient of one micro-batch to the tree.

        Raises:
            ValueError: A sparse gradient.
        """
        if not micro_batch.piece.counts:
            return
        weight = usable(forward.weight)
        self._run_backward(_weighted(forward.loss, weight), micro_batch)
        leaf: list[Tensor | None] = [parameter.grad for parameter in self.parameters]
        for name, gradient in zip(self._names, leaf, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise ValueError(
                    f"bitwise=True needs dense gradients; {name} has a sparse one: use sparse=False there."
                )
        if not self.weighs_samples:
            leaf.append(self._as_weight(weight).clone())
        self._sum.add(micro_batch.piece.index, leaf)
        self.clear()

    def finish(self, batch_size: int) -> None:
        """Make the gradients those of the mean over the batch, on every process."""
        self._watches = False
        like: list[Tensor] = [*self.parameters]
        if not self.weighs_samples:
            like.append(self._as_weight(0))
        total = self._sum.total(min(batch_size, self.layout.num_micro_batches), like)
        weight = batch_size if self.weighs_samples else _never_zero(total.pop())  # type: ignore[arg-type]
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


def _weighted(loss: Tensor, weight: Any) -> Tensor:
    """Return weight x loss; a loss that weighs nothing may be nan without harm."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, loss * weight)
    return loss * weight if weight else torch.nan_to_num(loss) * 0


def _never_zero(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1, total)  # a batch that weighs nothing has a gradient of zeros


class Buffers:
    """Let every micro-batch of a step start from the same buffers, and average what they leave.

    A chain of updates, as a plain accumulation loop makes it, would depend on how many processes share the batch.
    Here BatchNorm's running statistics move once per step, by the mean of what the non-empty micro-batches would
    make of them; whole-number buffers, such as its counter, advance once per step. A buffer that has changed its shape
    since the beginning is a cache: each process keeps its own until the end of the epoch, when all get the largest.

    All buffers of a kind go through each operation together: a kernel for each of them would cost more than the
    layers that they belong to.

    Args:
        roots: The user's model, and his loss if it is a module.
        layout: This process and the cut.
        changes: Adds up what the micro-batches have changed: in the order of a tree, or as they come.
        any_process: Returns for each flag whether it is set on any process.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module],
        layout: Layout,
        changes: ChainSum | TreeSum,
        any_process: Callable[..., list[bool]],
    ) -> None:
        self.layout = layout
        self._roots, self._sum, self._any_process = roots, changes, any_process
        self._shapes: dict[_Owner, torch.Size | None] = {}  # of each buffer at first; `None` where it is not plain
        self._settled: set[nn.Module] = set()  # what they make in a forward is their own
        self._late: dict[_Owner, Tensor] = {}  # those that a forward has made, as they were
        self._missing = torch.empty(0)  # in place of a buffer that has been set to None
        self._has_begun = False  # a batch, whose start these are:
        self._start, self._start_of_counted, self._counted_after = _Copies(), _Copies(), _Copies()
        self._base: list[Tensor] = []  # what changes are counted from
        self._look()

    def _look(self) -> None:
        """Find the buffers that there are, those of modules that a callback has added too."""
        found = _owners_of_buffers(self._roots)
        for module, name in found:
            if module not in self._settled:
                buffer = module._buffers[name]
                shape = buffer.shape if buffer is not None and is_plain(buffer) else None
                self._shapes.setdefault((module, name), shape)
        self._owners = [owner for owner in found if self._shapes.get(owner) is not None]
        self._averaged = [place for place, buffer in enumerate(self._now()) if _averages(buffer)]
        self._counted = [place for place, buffer in enumerate(self._now()) if not _averages(buffer)]
        may_grow = any(not type(module).__module__.startswith("torch.nn.") for module, _ in self._owners)
        self._tells_of_caches = may_grow and self.layout.num_processes > 1  # one process alone knows its own

    @property
    def _idle(self) -> bool:
        # One micro-batch on one process moves the buffers as a plain loop does.
        return not self._owners or (self.layout.num_processes == 1 and self.layout.num_micro_batches == 1)

    def _at(self, place: int) -> Tensor:
        module, name = self._owners[place]
        buffer = module._buffers[name]
        return self._missing if buffer is None else buffer

    def _now(self, places: Iterable[int] | None = None) -> list[Tensor]:
        return [self._at(place) for place in (range(len(self._owners)) if places is None else places)]

    def begin(self) -> None:
        """Begin an epoch: take in what is new, and forget a batch that an interrupt has left unfinished."""
        self._look()
        self._settled = {module for root in self._roots for module in root.modules()}
        self._forget()

    def _tell_of_late_ones(self) -> None:
        """Warn of running statistics that a forward has made where there was `None`: each process has its own."""
        for module, name in _owners_of_buffers(self._roots):
            buffer = module._buffers[name]
            is_late = (module, name) in self._shapes and self._shapes[module, name] is None
            if is_late and is_plain(buffer) and _averages(buffer):  # type: ignore[arg-type]
                before, now = self._late.get((module, name)), buffer.clone()  # type: ignore[union-attr]
                self._late[module, name] = now
                if before is not None and before.shape == now.shape and not torch.equal(before, now):
                    warn(
                        f"The buffer {name!r} of {type(module).__name__} is None at first and changes as the run goes "
                        "on: every process has its own. Register it with values from the start, and it is shared."
                    )

    def _forget(self) -> None:
        self._has_begun = False
        self._sum.clear()

    def before(self, micro_batch: MicroBatch, hold: bool) -> None:
        """Begin a micro-batch.

        Args:
            micro_batch: Which it is.
            hold: Be ready to go back to the start of the batch.
        """
        if not self._owners or (self._idle and not hold):
            return
        if not micro_batch.piece.is_first:
            self._go_back()
            return
        self._has_begun = True
        self._start.take(self._now(self._averaged))
        self._base = self._start.finite()
        self._start_of_counted.take(self._now(self._counted))

    def undo(self) -> None:
        """Go back to the start of the batch under way, or of the last one."""
        self._go_back()
        self._forget()

    def _go_back(self) -> None:
        if self._has_begun:
            _copy_all(self._now(self._averaged), self._start.tensors)
            _copy_all(self._now(self._counted), self._start_of_counted.tensors)

    def after(self, micro_batch: MicroBatch) -> None:
        """Take in what a micro-batch has made of the buffers."""
        if self._idle or not self._has_begun:
            return
        if micro_batch.piece.is_first:
            self._counted_after.take(self._now(self._counted))
        if micro_batch.piece.counts and self._averaged:
            self._sum.add(micro_batch.piece.index, self._changes())

    @torch.no_grad()
    def _changes(self) -> list[Tensor | None]:
        """Return how far each averaged buffer has moved, `None` for a cache; then which are caches, if need be."""
        steady = {place: base for place, base in zip(self._averaged, self._base, strict=True) if self._is_steady(place)}
        moved = _together(torch._foreach_sub, self._now(steady), list(steady.values()))
        by_place = dict(zip(steady, moved, strict=True))
        changes: list[Tensor | None] = [by_place.get(place) for place in self._averaged]
        return [*changes, self._caches(self._averaged)] if self._tells_of_caches else changes

    def finish(self, num_micro_batches: int) -> None:
        """Set the buffers to the average over the micro-batches of the whole batch.

        Args:
            num_micro_batches: Those with samples, over all processes.
        """
        if not self._idle and self._has_begun:
            self._settle(num_micro_batches)

    @torch.no_grad()
    def _settle(self, num_micro_batches: int) -> None:
        if self._averaged:
            self._average(num_micro_batches)
        counted = self._counted_after.tensors
        if self._tells_of_caches and counted:
            counted = self._shared(counted)  # those of torch's own layers are counters, equal everywhere
        _copy_all(self._now(self._counted), counted)

    def _average(self, num_micro_batches: int) -> None:
        like = [self._slot(start, place) for place, start in zip(self._averaged, self._start.tensors, strict=True)]
        if self._tells_of_caches:
            like.append(self._caches(self._averaged))
        total = self._sum.total(num_micro_batches, like)
        are_caches = total.pop() if self._tells_of_caches else None
        moved = [
            (index, self._at(place), base, change)
            for index, (place, base, change) in enumerate(zip(self._averaged, self._base, total, strict=True))
            if change is not None and self._is_steady(place)
        ]
        if not moved:
            return
        indices, buffers, bases, changes = zip(*moved, strict=True)
        means = _together(lambda own: torch._foreach_div(own, num_micro_batches), changes)
        averages = _together(torch._foreach_add, bases, means)
        if are_caches is not None:  # on some process, which has no average then
            averages = [
                torch.where(are_caches[index] == 0, average, buffer)
                for index, average, buffer in zip(indices, averages, buffers, strict=True)
            ]
        _copy_all(buffers, averages)

    def _shared(self, mine: list[Tensor]) -> list[Tensor]:
        """Return what the first micro-batch of all, the main process's, has made of the whole-number buffers."""
        are_caches = self._caches(self._counted)
        slots = [self._slot(own, place).clone() for place, own in zip(self._counted, mine, strict=True)]
        share_from_main([*slots, are_caches])
        return [
            torch.where(is_cache == 0, slot, own) if slot.shape == own.shape else own
            for is_cache, slot, own in zip(are_caches, slots, mine, strict=True)
        ]

    def _is_steady(self, place: int) -> bool:
        return self._at(place).shape == self._shapes[self._owners[place]]

    def _slot(self, value: Tensor, place: int) -> Tensor:
        """Return the values of a buffer, or zeros where it is a cache: every process sends as much as the others."""
        shape = self._shapes[self._owners[place]]
        return value if shape is None or value.shape == shape else value.new_zeros(shape)

    def _caches(self, places: Iterable[int]) -> Tensor:
        """Return for each of these places 1 where the buffer is a cache by now, on the device."""
        flags = torch.tensor([not self._is_steady(place) for place in places], dtype=torch.float32)
        return on_device(flags, self._at(0).device)

    def share(self) -> None:
        """Make the buffers those of the main process, before an evaluation and a save."""
        if max(self.layout.num_processes, self.layout.num_micro_batches) > 1:
            self._tell_of_late_ones()
        if self.layout.num_processes > 1 and self._owners:
            are_caches = self._any_process(*(not self._is_steady(place) for place in range(len(self._owners))))
            share_from_main([now for now, is_cache in zip(self._now(), are_caches, strict=True) if not is_cache])
            for (module, name), is_cache in zip(self._owners, are_caches, strict=True):
                if is_cache:
                    self._share_cache(module, name)

    def _share_cache(self, module: nn.Module, name: str) -> None:
        mine = module._buffers[name]
        copies = gather_objects(None if mine is None else mine.cpu())
        largest = max((copy for copy in copies if copy is not None), key=Tensor.numel, default=None)
        if largest is not None and (mine is None or largest.numel() > mine.numel()):
            module._buffers[name] = largest.to(
                next(module.parameters(), largest).device if mine is None else mine.device
            )


class _Copies:
    """Copies of tensors, in memory that is kept from batch to batch: all of one dtype and device in one piece."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._pieces: list[Tensor] = []
        self._finite: list[Tensor] = []
        self._finite_pieces: list[Tensor] = []

    @torch.no_grad()
    def take(self, tensors: list[Tensor]) -> None:
        """Copy tensors, in place of those copied before."""
        if list(map(_form, tensors)) != list(map(_form, self.tensors)):
            self.tensors, self._pieces = _like(tensors)
            self._finite, self._finite_pieces = [], []
        _copy_all(self.tensors, tensors)

    @torch.no_grad()
    def finite(self) -> list[Tensor]:
        """Return what changes are counted from: infinities, which a difference would turn into nan, count from zero."""
        if len(self._finite) != len(self.tensors):
            self._finite, self._finite_pieces = _like(self.tensors)
        for piece, finite in zip(self._pieces, self._finite_pieces, strict=True):
            torch.nan_to_num(piece, nan=0.0, posinf=0.0, neginf=0.0, out=finite)
        return self._finite


def _like(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return new tensors like these, and the pieces of memory that they are views of."""
    pieces: list[Tensor] = []

    def views(own: list[Tensor]) -> list[Tensor]:
        piece = own[0].new_empty(sum(tensor.numel() for tensor in own))
        pieces.append(piece)
        parts = torch.split(piece, [tensor.numel() for tensor in own])
        return [part.view(tensor.shape) for part, tensor in zip(parts, own, strict=True)]

    return _together(views, tensors), pieces


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


@torch.no_grad()
def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Overwrite tensors with others of their shape, in one operation; one that has changed its shape stays."""
    pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target.shape == source.shape]
    _together(torch._foreach_copy_, [target for target, _ in pairs], [source for _, source in pairs])


def _together(operation: Callable[..., Any], first: Sequence[Tensor], *others: Sequence[Tensor]) -> list[Tensor]:
    """Apply one of torch's operations on lists to tensors of one dtype and device at a time: to mixed ones it is slow.

    Args:
        operation: Takes lists and returns one.
        first: The first list.
        *others: Further ones, with tensors like those of the first.
    """
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(first):
        groups.setdefault((tensor.dtype, tensor.device), []).append(index)
    results: list[Tensor] = list(first)
    for indices in groups.values():
        own = operation(*([tensors[index] for index in indices] for tensors in (first, *others)))
        for index, result in zip(indices, own or (), strict=False):
            results[index] = result
    return results


class FixedBuffers:
    """Let every micro-batch of an evaluation start from the same buffers; what it changes in them is dropped.

    Args:
        roots: The user's model, and his loss if it is a module.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._kept = [
            (module, name, buffer, buffer._version, buffer.clone())
            for module, name in _owners_of_buffers(roots)
            if (buffer := module._buffers[name]) is not None and is_plain(buffer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo changes; costs a look at each buffer where there are none. A cache that has grown stays."""
        for place, (module, name, buffer, version, values) in enumerate(self._kept):
            now = module._buffers[name]
            is_same = now is buffer and buffer._version == version
            if not is_same and now is not None and now.shape == values.shape:
                module._buffers[name] = buffer.copy_(values) if buffer.shape == values.shape else values.clone()
                self._kept[place] = module, name, buffer, buffer._version, values


_Owner = tuple[nn.Module, str]


def _owners_of_buffers(roots: Iterable[nn.Module]) -> list[_Owner]:
    """Return where each buffer hangs, those that are `None` yet too; one that several modules share, once."""
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


def _averages(buffer: Tensor) -> bool:
    return (buffer.is_floating_point() and buffer.element_size() > 1) or buffer.is_complex()  # 8 bits know no sums
