"""What fits in memory: whether the data does, as tensors, and in how many micro-batches a batch does."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Literal

import torch
from accelerate.utils.memory import clear_device_cache
from torch.optim import Optimizer

from ..base.exchange import gather_objects
from ..data.collated import tensors_in
from ..data.micro_batches import Batch, MicroBatch, MicroBatchLoader
from ..errors import ProcessFailedError
from .environment import free_memory
from .hardware import Hardware

# The share of the free memory that data may take at the start; the model and its activations need the rest.
_SHARE_OF_HOST, _SHARE_OF_DEVICE = 0.4, 0.15


def keep_data(loader: MicroBatchLoader, hardware: Hardware, choice: bool | Literal["auto"], name: str) -> str | None:
    """Keep data that is rows of numbers as tensors, on the device where it fits there; on all processes alike.

    Returns:
        A message to the user; `None` where nothing has changed.

    Raises:
        ValueError: The user insists, and the data is not rows of numbers.
    """
    source = loader.source
    if choice is True and not loader.is_uniform:
        raise ValueError(
            f"data_in_memory=True needs data that is rows of numbers of one shape (a TensorDataset, or a "
            f"datasets.Dataset in torch or numpy format, with the default collate function), and {name} has a "
            f"{type(loader.data_loader.dataset).__name__} that is not. Use 'auto'."
        )
    if choice is False or source is None or not loader.is_uniform:
        return None
    is_cuda = hardware.device.type == "cuda"
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
    where = "host memory" if too_large_for_device else f"the memory of {hardware.device}"
    return (
        f"{name}: {len(loader.data_loader.dataset):,} samples are kept as tensors in {where} "  # type: ignore[arg-type]
        f"({source.nbytes / 2**20:,.1f} MiB; data_in_memory=False would leave them where they are)."
    )


_NOTHING = nullcontext()


class Memory(AbstractContextManager["Memory"]):
    """Try micro-batches; where one does not fit, note that and suppress its error.

    Where the cut is fixed, by the user or by `bitwise`, the error is raised, and names the number to set.

    Attributes:
        exceeded: Whether a micro-batch of this process did not fit.
    """

    def __init__(self, hardware: Hardware, loader: MicroBatchLoader) -> None:
        self.exceeded = False
        self._hardware, self._loader = hardware, loader
        self._single: str | None = None  # the message on a single sample that does not fit
        self._micro_batch: MicroBatch | None = None

    def trying(self, micro_batch: MicroBatch) -> Memory:
        """Return a context manager for the forward of this micro-batch."""
        self._micro_batch = micro_batch
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if error is None or not _is_out_of_memory(error):
            return False
        message = self._advice(error)  # not the error itself: its traceback would hold the tensors of the forward
        if not (self._loader.may_recut and self._may_try_again()):
            raise torch.OutOfMemoryError(message) from error
        self.exceeded = True
        if self._num_samples == 1:
            self._single = message
        return True

    @property
    def has_tried(self) -> bool:
        """Whether this process has had a micro-batch."""
        return self._micro_batch is not None

    def _may_try_again(self) -> bool:
        return True

    def halve(self) -> None:
        """Let the loader cut the present batch, and all that follow, into twice as many micro-batches.

        Raises:
            torch.OutOfMemoryError: On all processes, when one of them cannot hold a single sample.
        """
        message = next(filter(None, gather_objects(self._single)), None)
        if message is not None:
            raise torch.OutOfMemoryError(message)
        clear_device_cache(garbage_collection=True)
        self.exceeded = False
        layout = self._loader.layout
        self._loader.recut(layout._replace(num_micro_batches=2 * layout.num_micro_batches))

    @property
    def _num_samples(self) -> int:
        piece = self._micro_batch.piece  # type: ignore[union-attr]
        return piece.stop - piece.start

    def _advice(self, error: BaseException) -> str:
        cause = _first_line(error)
        micro_batch: MicroBatch = self._micro_batch  # type: ignore[assignment]
        if self._num_samples == 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(micro_batch.data))
            return (
                f"Out of memory: a single sample does not fit (shapes {shapes}). No cut of the batch helps: use a "
                f"smaller model, smaller samples, lower precision, or recompute activations. ({cause})"
            )
        number = self._loader.layout.num_micro_batches
        return (
            f"Out of memory with num_micro_batches={number}: {self._num_samples} samples of a batch of "
            f"{micro_batch.batch.size} do not fit at a time. "
            f"Set num_micro_batches={2 * number} in TrainConfig. ({cause})"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# The messages of the driver, CUDA's libraries, Triton and the allocators of CPUs and HPUs.
_MESSAGES = re.compile(
    r"out of memory|CU\w*_ALLOC\w*_FAILED|CPUAllocator: can't allocate memory|PT_DEVMEM Allocation failed",
    re.IGNORECASE,
)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    is_of_torch = isinstance(error, RuntimeError) and not isinstance(error, ProcessFailedError)
    return is_of_torch and _MESSAGES.search(str(error)) is not None


def until_it_fits(hardware: Hardware, loader: MicroBatchLoader) -> Iterator[Memory]:
    """Yield a `Memory` for each try of an evaluation: in smaller micro-batches while a process exceeds its memory."""
    is_again = False
    while True:
        memory = Memory(hardware, loader)
        yield memory
        if is_again and not memory.has_tried:
            raise RuntimeError(
                "A batch did not fit in memory, and the stream cannot be read again. Give it smaller batches, or set "
                "num_micro_batches in TrainConfig."
            )
        if not loader.may_recut or not hardware.any_process(memory.exceeded)[0]:
            return
        is_again = memory.has_tried
        memory.halve()


class TrainingMemory(Memory):
    """Try batches whose gradients the processes add while the backward runs.

    A batch that may have to be repeated must be deferred: nothing is sent before all processes have agreed that it
    fits, which costs an exchange between the hosts and the overlap of communication and backward. So a batch is
    deferred only if its memory is not known: the first few batches, a larger batch, and one with a micro-batch that is
    the largest so far on some process. To find the last of these, the processes ask each other before the last
    micro-batch of each batch: during the first pass over the data, and afterwards only if samples vary in size.

    Attributes:
        is_deferred: Whether nothing of the present batch is sent before all have agreed that it fits.
    """

    def __init__(self, hardware: Hardware, loader: MicroBatchLoader) -> None:
        super().__init__(hardware, loader)
        self._is_alone = loader.layout.num_processes == 1
        self.is_deferred = self._is_alone and loader.may_recut  # no process has to be asked, and nothing is sent
        self._sizes = _Sizes()
        self.use_loader(loader)
        self._has_updated = self._has_failed_update = False

    def use_loader(self, loader: MicroBatchLoader) -> None:
        """Take the batches of this loader from here on."""
        self._loader = loader
        self._sizes.start(are_watched=not loader.is_uniform)

    def start_batch(self, batch: Batch) -> None:
        """Decide whether the batch is deferred."""
        self.exceeded = False
        if not self._is_alone and self._loader.may_recut:
            self.is_deferred = self._sizes.is_new(batch)

    def measure(self, micro_batch: MicroBatch) -> None:
        """Note the size of a micro-batch: before the last of a batch the processes may ask each other."""
        if not self._is_alone and self._loader.may_recut and self._sizes.are_watched:
            is_larger = self._sizes.add(micro_batch)
            if micro_batch.piece.is_last and not self.is_deferred:
                self.is_deferred = self._any_process(is_larger)

    def _any_process(self, flag: bool) -> bool:
        """Return whether the flag is set on any process; the processes also share whether their samples vary."""
        answer, vary = self._hardware.any_process(flag, len(self._sizes.of_samples) > 1)
        self._sizes.vary |= vary
        return answer

    def _may_try_again(self) -> bool:
        is_early = self._sizes.are_watched and not self._micro_batch.piece.is_last  # type: ignore[union-attr]
        return self.is_deferred or (is_early and not self._is_alone)

    def must_redo(self) -> bool:
        """Return whether all processes have to repeat the batch; called after the last micro-batch of each process.

        A process whose micro-batch does not fit leaves out the rest of the batch.
        """
        if self._is_alone or not (self.exceeded or self.is_deferred):
            return self.exceeded
        if not self.is_deferred:
            self.is_deferred = self._any_process(True)  # the other processes ask before their last micro-batch
        self._sizes.num_trials -= 1
        return self._any_process(self.exceeded)

    def halve(self) -> None:
        """Let the loader cut the present batch into twice as many micro-batches, whose memory is not known."""
        self._sizes.start(self._sizes.are_watched)
        super().halve()

    def trying_update(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Return a context manager for an update of the weights."""
        return _NOTHING if self._has_updated else self._trying_first_update(optimizer)

    @contextmanager
    def _trying_first_update(self, optimizer: Optimizer) -> Iterator[None]:
        """Note that the first update, which allocates the optimizer's state, does not fit, and suppress its error.

        All other memory is released by then, in the pieces in which it was allocated, so smaller micro-batches leave
        more room. Tried once more, on one process without a scaler, which would have done half of its work, and if
        nothing has been changed yet.
        """
        may_redo = self._is_alone and self._loader.may_recut and self._num_samples > 1
        may_redo = may_redo and self._hardware.accelerator.scaler is None and not self._has_failed_update
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        before, is_new = [parameter._version for parameter in parameters], not optimizer.state
        try:
            yield
            self._has_updated = True
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            is_unchanged = is_new and before == [parameter._version for parameter in parameters]
            if not (may_redo and is_unchanged):
                raise torch.OutOfMemoryError(
                    "Out of memory while the weights were updated: the model, its gradients and the state of the "
                    "optimizer do not fit together, which no cut of the batch changes. Use an optimizer that keeps "
                    f"less (SGD, foreach=False), a smaller model, or train less of it. ({_first_line(error)})"
                ) from error
            optimizer.state.clear()
            self._has_failed_update = self.exceeded = True


class _Sizes:
    """The largest batch and micro-batch so far, and whether samples vary in size.

    Attributes:
        are_watched: Whether micro-batches are measured.
        num_trials: Batches to come whose memory counts as not known.
        of_samples: Sizes of the samples of this process: numbers in all tensors of a micro-batch, per sample.
        vary: Whether samples are known to differ in size, on any process.
    """

    def __init__(self) -> None:
        self.of_samples: set[float] = set()
        self.vary = False

    def start(self, are_watched: bool) -> None:
        """Take the memory of the batches that follow as not known."""
        self.are_watched = are_watched
        self.num_trials = 2  # the optimizer allocates its memory at the end of the first
        self._largest_batch = self._largest = 0
        self._last_number = -1

    def is_new(self, batch: Batch) -> bool:
        """Note a batch, and return whether it is one of the first, or larger than all before."""
        is_new = self.num_trials > 0 or batch.size > self._largest_batch
        self._largest_batch = max(self._largest_batch, batch.size)
        if batch.number <= self._last_number:  # the first pass is over
            self.are_watched = self.are_watched and self.vary
        self._last_number = batch.number
        return is_new

    def add(self, micro_batch: MicroBatch) -> bool:
        """Note a micro-batch, and return whether it is larger than all before."""
        size = sum(tensor.numel() for tensor in tensors_in(micro_batch.data))
        self.of_samples.add(size / (micro_batch.piece.stop - micro_batch.piece.start))
        is_larger = size > self._largest
        self._largest = max(self._largest, size)
        return is_larger
