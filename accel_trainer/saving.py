"""When the best weights and checkpoints are saved, and how: the training waits for a copy, a thread writes it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .checkpoints import RunFolder, Snapshot
from .clock import Clock
from .config import TrainConfig
from .console import warn
from .environment import free_memory
from .exchange import share_object
from .history import History
from .reductions import share_from_main
from .state import RunState
from .stopping import Stopping
from .weights import buffers_beside, check_fit, copy_beside, copy_into, plain_state, split_aliases

__all__ = ["Saver", "finish_writes"]

_Tensors = dict[str, dict[str, Tensor]]
_Best = tuple[dict[str, Tensor], dict[str, Any]]  # weights and what to write beside them
_BEST, _CHECKPOINT = "best/model.safetensors", "checkpoints"
_in_flight: set[Future[Any]] = set()  # writes of this process, those of a run left by a second Ctrl-C too


class Saver:
    """Save the best weights and checkpoints of a run.

    All processes call its methods at the same places; the main process writes. At most one write is under way. One
    that fails is told before the next batch, and the next save tries again.

    Args:
        config: When to save.
        model: The user's model.
        losses: His loss, if it is a module.
        folder: The run folder, on the main process and if there is one.
        is_main: Whether this is the main process.
        stopping: Where the processes agree on saves by the clock.
        state: Where the run stands ...
        history: ... and what it has recorded.
        clock: Counts the time in which the training stands still.

    Attributes:
        capture: Returns what a checkpoint of this moment holds; `None` if that should not be saved.
        num_saved: Checkpoints written.
        beside: The buffers of the best epoch that its file leaves out; on each process.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        losses: Sequence[nn.Module],
        folder: RunFolder | None,
        is_main: bool,
        stopping: Stopping,
        state: RunState,
        history: History,
        clock: Clock,
    ) -> None:
        self.capture: Callable[[], Snapshot | None] = _nothing
        self.num_saved = 0
        self.beside: dict[str, Tensor] = {}
        self._model, self._losses, self._folder, self._is_main = model, losses, folder, is_main
        self._stopping, self._state, self._history, self._clock = stopping, state, history, clock
        self._enabled = config.run_dir is not None
        self._keeps_best = self._enabled or config.restore_best
        self._every, self._seconds = _interval(config.checkpoint_every)
        self._problem: str | None = None
        self._best: _Best | None = None
        self._best_is_on_disk = True
        self._buffers, self._best_buffers = _HostBuffers(), _HostBuffers()
        self._executor: ThreadPoolExecutor | None = None
        self._writes: dict[str, Future[Exception | None]] = {}  # what is written -> the write under way
        stopping.before_leaving(partial(finish_writes, timeout=20.0))

    def start(self, capture: Callable[[], Snapshot | None], beside: Mapping[str, Tensor]) -> None:
        """Begin to count, from where the run stands now.

        Args:
            capture: Returns what a checkpoint holds.
            beside: The buffers of the best epoch so far that its file leaves out.
        """
        self.capture, self.beside = capture, dict(beside)
        self._next = time.monotonic() + (self._seconds or 0)
        self._last_step = self._state.step  # of the last checkpoint that was to be made ...
        self._last_moment: Any = self._moment
        self._saved_moment = self._moment if self._state.num_batches else None  # ... and the last that was

    # --- when ---------------------------------------------------------------------------------------------------------

    def before_batch(self) -> None:
        """Save if it is time to; tell of a write that has failed. Costs less than a microsecond if not."""
        if self._writes:
            for name in [name for name, write in self._writes.items() if write.done()]:
                self._finish(name)
        if self._enabled and self._is_due():
            self.save()

    def _is_due(self) -> bool:
        if self._every is not None:
            return self._state.step % self._every == 0 and self._state.step != self._last_step
        if self._seconds is None:
            return False
        if self._is_main and time.monotonic() >= self._next:
            self._stopping.request_save()
            self._next = float("inf")
        return self._stopping.save_is_due and self._state.step != self._last_step

    def after_epoch(self) -> None:
        """Save what is due at the end of an epoch."""
        if self._enabled and (self._is_due() or (self._every is None and self._seconds is None)):
            self.save()

    def save_last(self) -> None:
        """Save a checkpoint after which there shall be none."""
        self.save()
        self._enabled = False

    @property
    def _moment(self) -> tuple[int, int, str | None]:
        return self._state.num_batches, self._history.num_epochs, self._state.finished

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of this very moment is on the disk; on the main process."""
        return self._saved_moment == self._moment

    # --- how ----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Save a checkpoint, unless this very moment has one."""
        with self._clock.measured("saving_seconds"):
            self._save()

    def _save(self) -> None:
        self._finish(_CHECKPOINT)  # one at a time
        if not self._enabled or self._last_moment == self._moment:
            return
        self._last_step, self._last_moment = self._state.step, self._moment
        self._stopping.save_is_due = False
        self._next = time.monotonic() + (self._seconds or 0)
        snapshot = self.capture()
        if snapshot is None or self._folder is None:
            return
        copies = self._buffers.copy(snapshot.tensors)
        copied = snapshot if copies is None else replace(snapshot, tensors=copies)
        write = partial(self._write_checkpoint, self._folder, copied, self._folder.history, self._moment, self._best)
        self._hand_over(_CHECKPOINT, write, at_once=copies is None)

    def keep_best(self, metadata: dict[str, Any]) -> None:
        """Keep the present weights as the best so far.

        Args:
            metadata: What to write beside them.
        """
        if self._keeps_best:
            beside = buffers_beside(self._model, self._losses)
            self.beside = {name: buffer.detach().clone() for name, buffer in beside.items()}
        if self._is_main and self._keeps_best:
            with self._clock.measured("saving_seconds"):
                self._keep_best(metadata)

    def _keep_best(self, metadata: dict[str, Any]) -> None:
        self._finish(_BEST)
        if not self._best_is_on_disk:  # the write of a checkpoint may try it once more, from these same buffers
            self._finish(_CHECKPOINT)
        weights, aliases = split_aliases(plain_state(self._model))
        copies = self._best_buffers.copy({_BEST: weights})
        own = copies[_BEST] if copies else {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        self._best, self._best_is_on_disk = (own, metadata | {"aliases": aliases}), False
        if self._folder is not None:
            self._hand_over(_BEST, partial(self._write_best, self._folder, self._best), at_once=copies is None)

    def _hand_over(self, name: str, write: Callable[[], None], at_once: bool) -> None:
        """Let the thread write."""
        if at_once:
            self._finish(_BEST)
            told = "There is no room in memory for a copy of what is saved: the training waits for the write."
            warn(told, stacklevel=4)
            self._told(name, _error_of(write))
            return
        self._executor = self._executor or ThreadPoolExecutor(1, "accel_trainer save")
        future = self._executor.submit(_error_of, write)
        _in_flight.add(future)
        self._writes[name] = future

    def _write_best(self, folder: RunFolder, best: _Best) -> None:
        folder.save_best(*best)
        self._best_is_on_disk = self._best is best

    def _write_checkpoint(
        self, folder: RunFolder, snapshot: Snapshot, history: bytes, moment: Any, best: _Best | None
    ) -> None:
        is_there = self._best_is_on_disk and folder.best_path.exists()  # read before the next line: that may be newer
        if best is not None and self._best is best and not is_there:
            self._write_best(folder, best)  # a checkpoint with an older best would go back to that
        folder.save_checkpoint(snapshot, history)
        self._saved_moment = moment

    def _finish(self, name: str) -> None:
        """Wait for a write, and tell if it has failed."""
        write = self._writes.pop(name, None)
        if write is not None:
            error = write.result()
            _in_flight.discard(write)
            self._told(name, error)

    def _told(self, name: str, error: Exception | None) -> None:
        self._folder.note(name, error)  # type: ignore[union-attr]
        if name == _CHECKPOINT:
            self.num_saved += error is None
            self._problem = None if error is None else str(error)
            self._last_moment = self._last_moment if error is None else None  # the next save tries again

    def finish(self) -> None:
        """Wait for the writes under way."""
        for name in list(self._writes):
            self._finish(name)

    @property
    def lost(self) -> str | None:
        """Why no checkpoint of this run could be written; `None` if one was, or none was to be."""
        return self._problem if not self.num_saved else None

    def restore_best(self, num_processes: int) -> bool:
        """Give the model the weights kept last, and return whether they were there; on every process.

        Where they are gone, or do not fit any more, the model keeps what it has, and a warning says so.
        """
        self.finish()
        is_there = True
        if self._is_main:
            try:
                best = self._best_weights()
                check_fit(best, self._model, "What was best")
                copy_into(self._model, best)
            except (OSError, ValueError, SafetensorError) as error:
                is_there = False
                warn(f"The best weights cannot be restored, the model keeps the last ones: {error}", stacklevel=2)
        if num_processes > 1:
            share_from_main(self._model.state_dict().values())
            is_there = share_object(is_there)
        if is_there:
            copy_beside(self._model, self._losses, self.beside)
        return is_there

    def _best_weights(self) -> dict[str, Tensor]:
        if self._best is None:
            return self._folder.read_best()  # type: ignore[union-attr]
        weights, metadata = self._best
        return {**weights, **{name: weights[kept] for name, kept in metadata["aliases"].items()}}

    def close(self, at_once: bool = False) -> None:
        """End the thread, after the writes under way, and leave the folder to others.

        Args:
            at_once: Return without waiting; the thread does the rest, and the interpreter waits for it.
        """
        self.capture = _nothing  # which held the run, and the run holds this
        if self._executor is not None and self._folder is not None and at_once:
            _in_flight.add(self._executor.submit(self._folder.close))
            self._executor.shutdown(wait=False)
            return
        if self._executor is not None:
            self._executor.shutdown()
        self.finish()
        if self._folder is not None:
            self._folder.close()


def _nothing() -> Snapshot | None:
    return None


def _interval(checkpoint_every: int | str | None) -> tuple[int | None, float | None]:
    """Return the steps or the seconds between two checkpoints; both `None` for one after each epoch."""
    if isinstance(checkpoint_every, str):
        return None, 60 * float(re.sub("min$", "", checkpoint_every))
    return checkpoint_every, None


def _error_of(write: Callable[[], None]) -> Exception | None:
    try:
        write()
    except (OSError, SafetensorError) as error:
        return error
    return None


def finish_writes(timeout: float | None = None) -> None:
    """Wait for the writes of this process, those that a second Ctrl-C has left behind too.

    Args:
        timeout: Seconds at most.
    """
    wait(list(_in_flight), timeout)


class _HostBuffers:
    """Host memory that is kept between saves: the first write into fresh memory costs as much as the disk."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: _Tensors) -> _Tensors | None:
        """Return copies in host memory, overwritten by the next call; `None` if there is no room for them."""
        flat = {(file, name): tensor.detach() for file, own in tensors.items() for name, tensor in own.items()}
        fresh = {key: tensor for key, tensor in flat.items() if not _fits(self._buffers.get(key), tensor)}
        if fresh and sum(tensor.nbytes for tensor in fresh.values()) > 0.9 * free_memory():
            return None
        try:
            for key, tensor in fresh.items():
                pinned = tensor.device.type == "cuda"
                self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        except (MemoryError, RuntimeError):
            self._buffers = {}
            return None
        for key, tensor in flat.items():
            self._buffers[key].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in flat.values() if tensor.device.type != "cpu"}:
            torch.accelerator.synchronize(device)
        copies: _Tensors = {file: {} for file in tensors}
        for file, name in flat:
            copies[file][name] = self._buffers[file, name]
        return copies


def _fits(buffer: Tensor | None, tensor: Tensor) -> bool:
    return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
