"""What fits in memory: the data, as tensors; and a batch, in how many micro-batches, found out as the run goes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Literal

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.optim import Optimizer

from .batches import Feed, Layout, MicroBatch, tensors_in
from .environment import free_memory
from .errors import ProcessFailedError
from .exchange import gather_objects
from .hardware import Hardware

__all__ = ["Memory", "TrainingMemory", "keep_data", "until_it_fits"]

# What data may take of the memory that is free at the start; the model and its activations are to come.
_SHARE_OF_HOST, _SHARE_OF_DEVICE = 0.4, 0.15


def keep_data(feed: Feed, hardware: Hardware, choice: bool | Literal["auto"], name: str) -> str | None:
    """Keep data that is rows of numbers as tensors, on the device where it fits there; on all processes alike.

    Args:
        feed: Whose data.
        hardware: Of the run.
        choice: `data_in_memory` of the config.
        name: How the user calls the loader.

    Returns:
        What to tell the user; `None` where nothing has changed.

    Raises:
        ValueError: The user insists, and the data is not rows of numbers.
    """
    rows = feed.rows
    if choice is True and (rows is None or rows.row_nbytes is None):
        raise ValueError(
            f"data_in_memory=True needs data that is rows of numbers of one shape (a TensorDataset, or a "
            f"datasets.Dataset in torch or numpy format, with the default collate function), and {name} has a "
            f"{type(feed.loader.dataset).__name__} that is not. Use 'auto'."
        )
    is_cuda = hardware.device.type == "cuda"
    if choice is False or rows is None or rows.row_nbytes is None:
        return None
    if rows.in_memory and (not is_cuda or all(tensor.is_cuda for tensor in tensors_in(rows.columns))):
        return None
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE") or hardware.num_processes)
    in_host = choice is True or rows.in_memory or rows.nbytes * processes_here < _SHARE_OF_HOST * free_memory()
    on_device = is_cuda and rows.nbytes < _SHARE_OF_DEVICE * torch.cuda.mem_get_info(hardware.device)[0]
    too_large_for_host, too_large_for_device = hardware.any_process(not in_host, not on_device)
    if too_large_for_host or (too_large_for_device and rows.in_memory):
        return None
    feed.rows = rows.loaded() if too_large_for_device else rows.loaded().to(hardware.device)
    place = "host memory" if too_large_for_device else f"the memory of {hardware.device}"
    return (
        f"{name}: {len(feed.loader.dataset):,} samples are kept as tensors in {place} "  # type: ignore[arg-type]
        f"({rows.nbytes / 2**20:,.1f} MiB; data_in_memory=False would leave them where they are)."
    )


_NOTHING = nullcontext()


class Memory:
    """Try micro-batches, and note that one does not fit in place of its error.

    Use `attempt` as a context manager around a forward. Where the cut is fixed, by the user or by `bitwise`, the error
    comes, and names the number to set.

    Args:
        hardware: Of the run.
        feed: Where the micro-batches come from.
    """

    def __init__(self, hardware: Hardware, feed: Feed) -> None:
        self.exceeded = False
        self._hardware, self._feed = hardware, feed
        self._single: str | None = None  # what to say of a single sample that does not fit
        self._single_anywhere = False
        self._micro_batch: MicroBatch | None = None

    def attempt(self, micro_batch: MicroBatch) -> Memory:
        """Return what the forward of this micro-batch runs under."""
        self._micro_batch = micro_batch
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if error is None or not _is_out_of_memory(error):
            return False
        if self._may_recut and self._may_try_again():
            self.exceeded = True
            if self._num_samples == 1:
                self._single = self._advice(error)
            return True
        raise torch.OutOfMemoryError(self._advice(error)) from error

    @property
    def layout(self) -> Layout:
        """The cut in force."""
        return self._feed.layout

    @property
    def _may_recut(self) -> bool:
        return self._feed.on_recut is not None

    @property
    def has_tried(self) -> bool:
        """Whether this process has had a micro-batch."""
        return self._micro_batch is not None

    def _may_try_again(self) -> bool:
        return True

    def exceeded_anywhere(self, *flags: bool) -> list[bool]:
        """Return whether any process has noted a micro-batch that does not fit, and likewise for further flags.

        Every process calls it at the same place: a small exchange between the hosts.
        """
        is_single = self._single is not None
        exceeded, self._single_anywhere, *others = self._hardware.any_process(self.exceeded, is_single, *flags)
        return [exceeded, *others]

    def finer(self) -> Layout:
        """Return a layout with twice as many micro-batches.

        Raises:
            torch.OutOfMemoryError: On all processes, when one of them cannot hold a single sample.
        """
        if self._single_anywhere:
            told = gather_objects(self._single)
            raise torch.OutOfMemoryError(next(text for text in told if text is not None))
        clear_device_cache(garbage_collection=True)
        self.exceeded = False
        return self.layout._replace(num_micro_batches=2 * self.layout.num_micro_batches)

    @property
    def _num_samples(self) -> int:
        piece = self._micro_batch.piece  # type: ignore[union-attr]
        return piece.stop - piece.start

    def _advice(self, error: BaseException) -> str:
        # Not the error itself: its traceback would hold the tensors of the forward.
        said = _first_line(error)
        if self._num_samples == 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(self._micro_batch.data))  # type: ignore[union-attr]
            return (
                f"Out of memory: a single sample does not fit (shapes {shapes}). No cut of the batch helps: use a "
                f"smaller model, smaller samples, lower precision, or recompute activations. ({said})"
            )
        number = self.layout.num_micro_batches
        return (
            f"Out of memory with num_micro_batches={number}: {self._num_samples} samples of a batch of "
            f"{self._micro_batch.batch_size} do not fit at a time. "  # type: ignore[union-attr]
            f"Set num_micro_batches={2 * number} in TrainConfig. ({said})"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_ON_UPDATES = (
    "Out of memory while the weights were updated: the model, its gradients and the state of the optimizer do not fit "
    "together, which no cut of the batch changes. Use an optimizer that keeps less (SGD, foreach=False), a smaller "
    "model, or train less of it. ({})"
)


# What the driver, CUDA's libraries and Triton say of memory that they could not get, past torch's own allocator.
_FOREIGN = re.compile(r"out of memory|CU\w*_ALLOC\w*_FAILED", re.IGNORECASE)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, ProcessFailedError):
        return False
    # Accelerate counts that status too, which a wrong argument of a convolution gives as well.
    is_other = "CUDNN_STATUS_NOT_SUPPORTED" in str(error)
    return not is_other and bool(_FOREIGN.search(str(error)) or should_reduce_batch_size(error))


def until_it_fits(hardware: Hardware, feed: Feed) -> Iterator[Memory]:
    """Yield what to try an evaluation with; again, in smaller micro-batches, while some process exceeds its memory."""
    is_again = False
    while True:
        memory = Memory(hardware, feed)
        yield memory
        if is_again and not memory.has_tried:
            raise RuntimeError(
                "A batch did not fit in memory, and the stream cannot be read again. Give it smaller batches, or set "
                "num_micro_batches in TrainConfig."
            )
        if feed.on_recut is None or not memory.exceeded_anywhere()[0]:
            return
        is_again = memory.has_tried
        feed.recut(memory.finer())


class TrainingMemory(Memory):
    """Try batches whose gradients the processes add while the backward runs.

    A batch that may have to be done again must be held back: nothing is sent before all processes have agreed that it
    fits, which costs an exchange between the hosts and the overlap of communication and backward. So that is done only
    while something about its memory is new: in the first few batches, in a larger batch, and in a micro-batch that is
    the largest so far on some process. For the last of these the processes ask each other before the last micro-batch
    of each batch: during the first pass over the data, and afterwards only if its samples vary in size.

    Attributes:
        holds: Whether the batch under way is held back.
    """

    _TRIALS = 2  # batches; the optimizer takes its memory at the end of the first

    def __init__(self, hardware: Hardware, feed: Feed) -> None:
        super().__init__(hardware, feed)
        self._alone = self.layout.num_processes == 1
        self.holds = self._alone and self._may_recut  # nobody has to be asked, and nothing is sent
        self._varies = False  # whether samples differ in size, on any process
        self._sizes_of_samples: set[float] = set()
        self._has_updated = self._has_redone_update = False
        self.follow(feed)

    def follow(self, feed: Feed) -> None:
        """Take the batches of this feed from here on."""
        self._feed = feed
        self._watches = not self._alone and not feed.is_uniform
        self._begin_trial()

    def _begin_trial(self) -> None:
        self._num_trials = self._TRIALS
        self._largest_batch = self._largest = 0
        self._last_batch = -1

    def attempt(self, micro_batch: MicroBatch) -> Memory:
        """Decide whether the batch is held back; return what its forward and backward run under."""
        self._micro_batch = micro_batch
        if self._alone:
            self.exceeded = self.exceeded and not micro_batch.piece.is_first
        elif self._may_recut:
            if micro_batch.piece.is_first:
                self._begin_batch(micro_batch)
            if self._watches:
                self._measure(micro_batch)
        return self

    def _begin_batch(self, micro_batch: MicroBatch) -> None:
        self.exceeded = False
        self.holds = self._num_trials > 0 or micro_batch.batch_size > self._largest_batch
        self._largest_batch = max(self._largest_batch, micro_batch.batch_size)
        if micro_batch.batch_number <= self._last_batch:  # the first pass is over
            self._watches = self._watches and self._varies
        self._last_batch = micro_batch.batch_number

    def _measure(self, micro_batch: MicroBatch) -> None:
        size = sum(tensor.numel() for tensor in tensors_in(micro_batch.data))
        self._sizes_of_samples.add(size / self._num_samples)
        if micro_batch.piece.is_last and not self.holds:
            self._ask(size > self._largest)
        self._largest = max(self._largest, size)

    def _ask(self, is_larger: bool) -> None:
        self.holds, varies = self._hardware.any_process(is_larger, len(self._sizes_of_samples) > 1)
        self._varies = self._varies or varies

    def _may_try_again(self) -> bool:
        is_early = self._watches and not self._micro_batch.piece.is_last  # type: ignore[union-attr]
        return self.holds or is_early

    def update(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Return what an update of the weights runs under."""
        return _NOTHING if self._has_updated else self._first_update(optimizer)

    @contextmanager
    def _first_update(self, optimizer: Optimizer) -> Iterator[None]:
        """Note that the first update, which allocates the optimizer's state, does not fit; the batch then comes again.

        Nothing else is held by then, and a batch that is cut finer leaves more room: memory is given back in the pieces
        that it was taken in. Tried once, on one process, and if nothing has been changed yet.
        """
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        before, is_new = [parameter._version for parameter in held], not optimizer.state
        try:
            yield
            self._has_updated = True
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            may_redo = self._alone and self._may_recut and self._num_samples > 1 and not self._has_redone_update
            may_redo = may_redo and self._hardware.accelerator.scaler is None  # which would be half through
            is_unchanged = is_new and before == [parameter._version for parameter in held]
            if not (may_redo and is_unchanged):
                raise torch.OutOfMemoryError(_ON_UPDATES.format(_first_line(error))) from error
            optimizer.state.clear()
            self.exceeded = self._has_redone_update = True

    def must_redo(self) -> bool:
        """Return whether the batch has to be done again, on all processes alike; asked after each micro-batch.

        A process whose micro-batch does not fit leaves out the rest of the batch.
        """
        if not self.exceeded and (self._alone or not (self.holds and self._micro_batch.piece.is_last)):  # type: ignore[union-attr]
            return False
        if not self.holds:
            self._ask(True)  # where the others ask, before their last micro-batch
        self._num_trials = max(self._num_trials - 1, 0)
        exceeded, varies = self.exceeded_anywhere(len(self._sizes_of_samples) > 1)
        self._varies = self._varies or varies
        return exceeded

    def finer(self) -> Layout:
        """Return a layout with twice as many micro-batches, whose memory is new."""
        self._begin_trial()
        return super().finer()
