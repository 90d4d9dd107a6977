"""When the best weights and checkpoints are saved, and how: the training waits for a copy, a thread writes it."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .checkpoints import RunFolder, Snapshot
from .config import TrainConfig
from .history import History
from .reductions import share_from_main
from .state import RunState
from .stopping import Stopping
from .weights import copy_into, plain_state, split_aliases

__all__ = ["Saver", "finish_writes"]

_Tensors = dict[str, dict[str, Tensor]]
_MODEL = "model.safetensors"
_in_flight: set[Future[Any]] = set()  # writes of this process, those of a run left by a second Ctrl-C too


class Saver:
    """Save the best weights and checkpoints of a run.

    All processes call its methods at the same places; the main process writes. At most one write is under way. One
    that fails is told before the next batch, and the next save tries again.

    Args:
        config: When to save.
        model: The user's model.
        folder: The run folder, on the main process and if there is one.
        is_main: Whether this is the main process.
        stopping: Where the processes agree on saves by the clock.
        state: Where the run stands ...
        history: ... and what it has recorded.

    Attributes:
        capture: Returns what a checkpoint of this moment holds; `None` if that should not be saved.
        num_saved: Checkpoints written.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        folder: RunFolder | None,
        is_main: bool,
        stopping: Stopping,
        state: RunState,
        history: History,
    ) -> None:
        self.capture: Callable[[], Snapshot | None] = _nothing
        self.num_saved = 0
        self._model, self._folder, self._is_main = model, folder, is_main
        self._stopping, self._state, self._history = stopping, state, history
        self._enabled = config.run_dir is not None
        self._every, self._seconds = _interval(config.checkpoint_every)
        self._problem: str | None = None
        self._best: dict[str, Any] | None = None  # what to write beside the best weights, as long as that is to be done
        self._copy: dict[str, Tensor] | None = None  # the best weights, where no file has them
        self._buffers = _HostBuffers()
        self._executor: ThreadPoolExecutor | None = None
        self._write: Future[list[tuple[str, Exception | None]]] | None = None

    def start(self, capture: Callable[[], Snapshot | None]) -> None:
        """Begin to count, from where the run stands now."""
        self.capture = capture
        self._next = time.monotonic() + (self._seconds or 0)
        self._last_step, self._last_moment = self._state.step, self._moment  # of the last checkpoint

    # --- when ---------------------------------------------------------------------------------------------------------

    def before_batch(self) -> None:
        """Save if it is time to; tell of a write that has failed. Costs less than a microsecond if not."""
        if self._write is not None and self._write.done():
            self._see_to_the_end()
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

    def keep_best(self, metadata: dict[str, Any]) -> None:
        """Note that the present weights are the best; the end of the epoch saves them."""
        self._best = metadata

    def after_epoch(self) -> None:
        """Save what is due at the end of an epoch."""
        if self._enabled and (self._is_due() or (self._every is None and self._seconds is None)):
            self.save()
        elif self._best is not None and self._is_main:
            self._hand_over(None)

    @property
    def _moment(self) -> tuple[int, int, str | None]:
        return self._state.num_batches, self._history.num_epochs, self._state.finished

    def save_last(self) -> None:
        """Save a checkpoint after which there shall be none."""
        self.save()
        self._enabled = False

    def save(self) -> None:
        """Save a checkpoint, unless this very moment has one."""
        if not self._enabled or self._last_moment == self._moment:
            return
        self._last_step, self._last_moment = self._state.step, self._moment
        self._stopping.save_is_due = False
        self._next = time.monotonic() + (self._seconds or 0)
        snapshot = self.capture()
        if self._is_main:
            self._hand_over(snapshot)

    # --- how ----------------------------------------------------------------------------------------------------------

    def _hand_over(self, snapshot: Snapshot | None) -> None:
        """Copy what is to be written, and let the thread write it."""
        self.finish()  # one at a time
        best, self._best = self._best, None
        if snapshot is None and best is None:
            return
        weights, aliases = split_aliases(plain_state(self._model))
        tensors = snapshot.tensors if snapshot is not None else {_MODEL: weights}
        copies = self._buffers.copy(tensors)
        if self._folder is None:
            self._copy = _under_all_names(copies[_MODEL] if copies else _cloned(tensors[_MODEL]), aliases)
            return
        job = partial(
            self._job,
            self._folder,
            copies or tensors,
            None if best is None else best | {"aliases": aliases},
            snapshot,
            self._folder.history,
        )
        if copies is None:
            warnings.warn(
                "There is no room in memory for a copy of what is saved: the training waits for the write.",
                stacklevel=2,
            )
            self._told(job())
            return
        self._executor = self._executor or ThreadPoolExecutor(1, "accel_trainer save")
        self._write = self._executor.submit(job)
        _in_flight.add(self._write)

    def _job(
        self,
        folder: RunFolder,
        tensors: _Tensors,
        best: Mapping[str, Any] | None,
        snapshot: Snapshot | None,
        history: bytes,
    ) -> list[tuple[str, Exception | None]]:
        """Write; return the name of each thing written, with its error."""
        outcome: list[tuple[str, Exception | None]] = []
        if best is not None:
            error = _error_of(partial(folder.save_best, tensors[_MODEL], best))
            self._copy = None if error is None else _under_all_names(_cloned(tensors[_MODEL]), best["aliases"])
            outcome.append(("best/model.safetensors", error))
        if snapshot is not None:
            copied = replace(snapshot, tensors=tensors)
            outcome.append(("checkpoints", _error_of(partial(folder.save_checkpoint, copied, history))))
        return outcome

    def _told(self, outcome: list[tuple[str, Exception | None]]) -> None:
        for name, error in outcome:
            self._folder.note(name, error)  # type: ignore[union-attr]
            if name == "checkpoints":
                self.num_saved += error is None
                self._problem = None if error is None else str(error)

    def _see_to_the_end(self) -> None:
        if self._write is not None:
            _in_flight.discard(self._write)
            outcome, self._write = self._write.result(), None
            self._told(outcome)

    def finish(self) -> None:
        """Wait for the write under way."""
        self._see_to_the_end()

    @property
    def lost(self) -> str | None:
        """Why no checkpoint of this run could be written; `None` if one was, or none was to be."""
        return self._problem if not self.num_saved else None

    def restore_best(self, num_processes: int) -> None:
        """Give the model the weights kept last, on every process.

        Where the file is gone the model keeps the weights it has, and a warning says so.
        """
        self.finish()
        if self._is_main:
            try:
                kept = self._copy
                copy_into(self._model, kept if kept is not None else self._folder.read_best())  # type: ignore[union-attr]
            except (OSError, SafetensorError) as error:
                warnings.warn(f"The best weights are gone, the model keeps the last ones: {error}", stacklevel=2)
        if num_processes > 1:
            share_from_main(self._model.state_dict().values())

    def close(self, at_once: bool = False) -> None:
        """End the thread, after the write under way; the interpreter waits for that too.

        Args:
            at_once: Return without waiting.
        """
        if self._executor is not None:
            self._executor.shutdown(wait=not at_once)
        if not at_once:
            self.finish()


def _nothing() -> Snapshot | None:
    return None


def _interval(checkpoint_every: int | str | None) -> tuple[int | None, float | None]:
    """Return the steps or the seconds between two checkpoints; both `None` for one after each epoch."""
    if isinstance(checkpoint_every, str):
        return None, 60 * float(re.sub("min$", "", checkpoint_every))
    return checkpoint_every, None


def _error_of(write: Callable[[], Path | None]) -> Exception | None:
    try:
        write()
    except (OSError, SafetensorError) as error:
        return error
    return None


def finish_writes() -> None:
    """Wait for the writes that a second Ctrl-C has left behind in this process."""
    wait(_in_flight)
    _in_flight.clear()


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _under_all_names(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    return {**tensors, **{name: tensors[kept] for name, kept in aliases.items()}}


class _HostBuffers:
    """Host memory that is kept between saves: the first write into fresh memory costs as much as the disk."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: _Tensors) -> _Tensors | None:
        """Return copies in host memory, overwritten by the next call; `None` if there is no room for them."""
        flat = {(file, name): tensor.detach() for file, own in tensors.items() for name, tensor in own.items()}
        fresh = {key: tensor for key, tensor in flat.items() if not _fits(self._buffers.get(key), tensor)}
        if sum(tensor.nbytes for tensor in fresh.values()) > 0.9 * _free_memory():
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


def _free_memory() -> float:
    """Return the bytes of memory to be had, a container's limit considered."""
    free = float(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text()
        used = Path("/sys/fs/cgroup/memory.current").read_text()
        cache = re.search(r"^inactive_file (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        return min(free, float(limit) - float(used) + float(cache[1] if cache else 0))
    except (OSError, ValueError):  # no container, or no limit
        return free
