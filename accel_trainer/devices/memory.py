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

from ..base.exchange import gather_objects
from ..data.collated import tensors_in
from ..data.micro_batches import Batch, MicroBatch, MicroBatchLoader
from ..errors import ProcessFailedError
from .environment import free_memory
from .hardware import Hardware

# What data may take of the memory that is free at the start; the model and its activations are to come.
_SHARE_OF_HOST, _SHARE_OF_DEVICE = 0.4, 0.15


def keep_data(loader: MicroBatchLoader, hardware: Hardware, choice: bool | Literal["auto"], name: str) -> str | None:
    """Keep data that is rows of numbers as tensors, on the device where it fits there; on all processes alike.

    Returns:
        What to tell the user; `None` where nothing has changed.

    Raises:
        ValueError: The user insists, and the data is not rows of numbers.
    """
    source = loader.source
    if choice is True and (source is None or source.sample_nbytes is None):
        raise ValueError(
            f"data_in_memory=True needs data that is rows of numbers of one shape (a TensorDataset, or a "
            f"datasets.Dataset in torch or numpy format, with the default collate function), and {name} has a "
            f"{type(loader.data_loader.dataset).__name__} that is not. Use 'auto'."
        )
    is_cuda = hardware.device.type == "cuda"
    if choice is False or source is None or source.sample_nbytes is None:
        return None
    if source.in_memory and (not is_cuda or all(tensor.is_cuda for tensor in tensors_in(source.columns))):
        return None
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE") or hardware.num_processes)
    in_host = choice is True or source.in_memory or source.nbytes * processes_here < _SHARE_OF_HOST * free_memory()
    on_device = is_cuda and source.nbytes < _SHARE_OF_DEVICE * torch.cuda.mem_get_info(hardware.device)[0]
    too_large_for_host, too_large_for_device = hardware.any_process(not in_host, not on_device)
    if too_large_for_host or (too_large_for_device and source.in_memory):
        return None
    tensors = source.loaded()
    loader.use_source(tensors if too_large_for_device else tensors.to(hardware.device))
    place = "host memory" if too_large_for_device else f"the memory of {hardware.device}"
    return (
        f"{name}: {len(loader.data_loader.dataset):,} samples are kept as tensors in {place} "  # type: ignore[arg-type]
        f"({source.nbytes / 2**20:,.1f} MiB; data_in_memory=False would leave them where they are)."
    )


_NOTHING = nullcontext()


class Memory:
    """Try micro-batches, and note that one does not fit in place of its error.

    Where the cut is fixed, by the user or by `bitwise`, the error comes, and names the number to set.

    Attributes:
        exceeded: Whether a micro-batch of this process did not fit.
    """

    def __init__(self, hardware: Hardware, loader: MicroBatchLoader) -> None:
        self.exceeded = False
        self._hardware, self._loader = hardware, loader
        self._single: str | None = None  # what to say of a single sample that does not fit
        self._single_anywhere = False
        self._micro_batch: MicroBatch | None = None

    def trying(self, micro_batch: MicroBatch) -> Memory:
        """Return a context manager for the forward of this micro-batch."""
        self._micro_batch = micro_batch
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if error is None or not _is_out_of_memory(error):
            return False
        if self._loader.may_recut and self._may_try_again():
            self.exceeded = True
            if self._num_samples == 1:
                self._single = self._advice(error)
            return True
        raise torch.OutOfMemoryError(self._advice(error)) from error

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

    def halve(self) -> None:
        """Let the loader cut the batch under way, and all that follow, into twice as many micro-batches.

        Raises:
            torch.OutOfMemoryError: On all processes, when one of them cannot hold a single sample.
        """
        if self._single_anywhere:
            messages = gather_objects(self._single)
            raise torch.OutOfMemoryError(next(text for text in messages if text is not None))
        clear_device_cache(garbage_collection=True)
        self.exceeded = False
        layout = self._loader.layout
        self._loader.recut(layout._replace(num_micro_batches=2 * layout.num_micro_batches))

    @property
    def _num_samples(self) -> int:
        piece = self._micro_batch.piece  # type: ignore[union-attr]
        return piece.stop - piece.start

    def _advice(self, error: BaseException) -> str:
        # Not the error itself: its traceback would hold the tensors of the forward.
        said = _first_line(error)
        micro_batch: MicroBatch = self._micro_batch  # type: ignore[assignment]
        if self._num_samples == 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(micro_batch.data))
            return (
                f"Out of memory: a single sample does not fit (shapes {shapes}). No cut of the batch helps: use a "
                f"smaller model, smaller samples, lower precision, or recompute activations. ({said})"
            )
        number = self._loader.layout.num_micro_batches
        return (
            f"Out of memory with num_micro_batches={number}: {self._num_samples} samples of a batch of "
            f"{micro_batch.batch.size} do not fit at a time. "
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


def until_it_fits(hardware: Hardware, loader: MicroBatchLoader) -> Iterator[Memory]:
    """Yield what to try an evaluation with; again, in smaller micro-batches, while some process exceeds its memory."""
    is_again = False
    while True:
        memory = Memory(hardware, loader)
        yield memory
        if is_again and not memory.has_tried:
            raise RuntimeError(
                "A batch did not fit in memory, and the stream cannot be read again. Give it smaller batches, or set "
                "num_micro_batches in TrainConfig."
            )
        if not loader.may_recut or not memory.exceeded_anywhere()[0]:
            return
        is_again = memory.has_tried
        memory.halve()


class TrainingMemory(Memory):
    """Try batches whose gradients the processes add while the backward runs.

    A batch that may have to be done again must be deferred: nothing is sent before all processes have agreed that it
    fits, which costs an exchange between the hosts and the overlap of communication and backward. So that is done only
    while something about its memory is new: in the first few batches, in a larger batch, and in a micro-batch that is
    the largest so far on some process. For the last of these the processes ask each other before the last micro-batch
    of each batch: during the first pass over the data, and afterwards only if its samples vary in size.

    Attributes:
        is_deferred: Whether nothing of the batch under way is sent before all have agreed that it fits.
    """

    def __init__(self, hardware: Hardware, loader: MicroBatchLoader) -> None:
        super().__init__(hardware, loader)
        self._is_alone = loader.layout.num_processes == 1
        self.is_deferred = self._is_alone and loader.may_recut  # nobody has to be asked, and nothing is sent
        self._sizes = _Sizes(loader)
        self._first_update: _FirstUpdate | None = _FirstUpdate()

    def use_loader(self, loader: MicroBatchLoader) -> None:
        """Take the batches of this loader from here on."""
        self._loader = loader
        self._sizes = _Sizes(loader, self._sizes)

    def start_batch(self, batch: Batch) -> None:
        """Decide whether the batch is deferred."""
        self.exceeded = False
        if not self._is_alone and self._loader.may_recut:
            self.is_deferred = self._sizes.is_new(batch)

    def measure(self, micro_batch: MicroBatch) -> None:
        """Look whether a micro-batch is the largest so far: before the last one the processes may ask each other."""
        if not self._is_alone and self._loader.may_recut and self._sizes.are_watched:
            is_larger = self._sizes.add(micro_batch)
            if micro_batch.piece.is_last and not self.is_deferred:
                self._ask(is_larger)

    def _ask(self, is_larger: bool) -> None:
        self.is_deferred, vary = self._hardware.any_process(is_larger, self._sizes.vary_here)
        self._sizes.note(vary)

    def _may_try_again(self) -> bool:
        is_early = self._sizes.are_watched and not self._micro_batch.piece.is_last  # type: ignore[union-attr]
        return self.is_deferred or (is_early and not self._is_alone)

    def must_redo(self) -> bool:
        """Return whether the batch has to be done again, on all processes alike; asked after its last micro-batch.

        A process whose micro-batch does not fit leaves out the rest of the batch.
        """
        if self._is_alone or not (self.exceeded or self.is_deferred):
            return self.exceeded and self.exceeded_anywhere()[0]
        if not self.is_deferred:
            self._ask(True)  # where the others ask, before their last micro-batch
        self._sizes.end_trial()
        exceeded, vary = self.exceeded_anywhere(self._sizes.vary_here)
        self._sizes.note(vary)
        return exceeded

    def halve(self) -> None:
        """Let the loader cut the batch under way into twice as many micro-batches, whose memory is new."""
        self._sizes.start_trials()
        super().halve()

    def trying_update(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Return what an update of the weights runs under."""
        return _NOTHING if self._first_update is None else self._trying_first_update(optimizer, self._first_update)

    @contextmanager
    def _trying_first_update(self, optimizer: Optimizer, first: _FirstUpdate) -> Iterator[None]:
        may_redo = self._is_alone and self._loader.may_recut and self._num_samples > 1
        may_redo = may_redo and self._hardware.accelerator.scaler is None  # which would be half through
        with first.trying(optimizer, may_redo):
            yield
        self.exceeded = first.has_failed and not first.has_succeeded
        self._first_update = None if first.has_succeeded else first


class _Sizes:
    """What is new about the memory that a batch takes.

    Attributes:
        are_watched: Whether micro-batches are measured.
    """

    _TRIALS = 2  # batches; the optimizer takes its memory at the end of the first

    def __init__(self, loader: MicroBatchLoader, before: _Sizes | None = None) -> None:
        self.are_watched = not loader.is_uniform
        self._of_samples: set[float] = set() if before is None else before._of_samples
        self._vary: bool = before is not None and before._vary  # on any process
        self.start_trials()

    def start_trials(self) -> None:
        """Take the memory of the batches that follow as not known."""
        self._num_trials = self._TRIALS
        self._largest_batch = self._largest = 0
        self._last_number = -1

    def end_trial(self) -> None:
        """Count a batch that was deferred."""
        self._num_trials = max(self._num_trials - 1, 0)

    def is_new(self, batch: Batch) -> bool:
        """Take in a batch, and return whether it is one of the first, or larger than all before."""
        is_new = self._num_trials > 0 or batch.size > self._largest_batch
        self._largest_batch = max(self._largest_batch, batch.size)
        if batch.number <= self._last_number:  # the first pass is over
            self.are_watched = self.are_watched and self._vary
        self._last_number = batch.number
        return is_new

    def add(self, micro_batch: MicroBatch) -> bool:
        """Take in a micro-batch, and return whether it is larger than all before."""
        size = sum(tensor.numel() for tensor in tensors_in(micro_batch.data))
        self._of_samples.add(size / (micro_batch.piece.stop - micro_batch.piece.start))
        is_larger = size > self._largest
        self._largest = max(self._largest, size)
        return is_larger

    @property
    def vary_here(self) -> bool:
        """Whether samples of this process differ in size."""
        return len(self._of_samples) > 1

    def note(self, vary: bool) -> None:
        """Take in whether samples differ in size on any process."""
        self._vary = self._vary or vary


class _FirstUpdate:
    """The first update, which allocates the optimizer's state.

    Where it does not fit, nothing else is held by then, and a batch that is cut finer leaves more room: memory is given
    back in the pieces that it was taken in. Tried once more, on one process, and if nothing has been changed yet.
    """

    def __init__(self) -> None:
        self.has_succeeded = self.has_failed = False

    @contextmanager
    def trying(self, optimizer: Optimizer, may_redo: bool) -> Iterator[None]:
        """Note that an update does not fit, in place of its error."""
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        before, is_new = [parameter._version for parameter in held], not optimizer.state
        try:
            yield
            self.has_succeeded = True
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            is_unchanged = is_new and before == [parameter._version for parameter in held]
            if self.has_failed or not (may_redo and is_unchanged):
                raise torch.OutOfMemoryError(_ON_UPDATES.format(_first_line(error))) from error
            optimizer.state.clear()
            self.has_failed = True
