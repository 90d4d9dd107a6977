"""When the best weights and checkpoints are saved, and how: the training waits for a copy, a thread writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..base.console import warn
from ..base.exchange import share_object
from ..callbacks import Callback
from ..config import TrainConfig
from ..devices.environment import free_memory
from ..history import History
from ..numbers.reductions import share_from_main
from ..run import Training
from ..state import TrainState
from .capture import capture
from .checkpoints import Snapshot
from .run_folder import RunFolder
from .weights import buffers_beside, check_fit, copy_beside, copy_into, plain_state, split_aliases

_Tensors = dict[str, dict[str, Tensor]]
_Moment = tuple[int, int, str | None]
_Best = tuple[dict[str, Tensor], dict[str, Any]]  # weights and what to write beside them
_BEST, _CHECKPOINT = "best/model.safetensors", "checkpoints"
_in_flight: set[Future[Any]] = set()  # writes of this process, those of a run left by a second Ctrl-C too


class Saver:
    """Save the best weights and checkpoints of a run.

    All processes call its methods at the same places; the main process writes. At most one write is under way. One
    that fails is told at the next save, which tries again.

    Args:
        config: When to save.
        folder: The run folder, on the main process and if there is one.
        is_main: Whether this is the main process.
        history: What the run has recorded.
        identity: What makes the run the one that it is.
        callbacks: The user's.

    Attributes:
        next_step: The step after which the next checkpoint is due; infinity if that does not depend on steps.
        beside: The buffers of the best epoch that its file leaves out; on each process.
        num_saved: Checkpoints written.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder | None,
        is_main: bool,
        history: History,
        identity: Mapping[str, Any],
        callbacks: Sequence[Callback],
    ) -> None:
        self.next_step, self.num_saved = math.inf, 0
        self.beside: dict[str, Tensor] = {}
        self._folder, self._is_main, self._history = folder, is_main, history
        self._identity, self._callbacks = identity, callbacks
        self._enabled = config.run_dir is not None
        self._keeps_best = self._enabled or config.restore_best
        self._every = config.checkpoint_every
        self._problem: str | None = None
        self._best: _Best | None = None
        self._best_is_on_disk = True
        self._buffers, self._best_buffers = _HostBuffers(), _HostBuffers()
        self._executor: ThreadPoolExecutor | None = None
        self._writes: dict[str, Future[Exception | None]] = {}  # what is written -> the write under way

    def start(self, training: Training, beside: Mapping[str, Tensor]) -> None:
        """Begin to count, from where the run stands now.

        Args:
            training: The run, where it begins or goes on.
            beside: The buffers of the best epoch so far that its file leaves out.
        """
        self.beside = dict(beside)
        self._last_moment: _Moment | None = self._moment(
            training.state
        )  # of the last checkpoint that was to be made ...
        self._saved_moment = self._last_moment if training.state.num_batches else None  # ... and the last that was
        self._set_next_step(training.state)

    def _set_next_step(self, state: TrainState) -> None:
        if isinstance(self._every, int):
            self.next_step = (state.step // self._every + 1) * self._every

    # --- when ---------------------------------------------------------------------------------------------------------

    def after_epoch(self, training: Training) -> None:
        """Save what is due at the end of an epoch."""
        is_due = training.state.step >= self.next_step or training.stopping.save_is_due
        if self._enabled and (is_due or self._every is None):
            self.save(training)

    def save_last(self, training: Training) -> None:
        """Save a checkpoint after which there shall be none."""
        self.save(training)
        self._enabled = False

    def _moment(self, state: TrainState) -> _Moment:
        return state.num_batches, self._history.num_epochs, state.finished

    def is_saved(self, state: TrainState) -> bool:
        """Return whether a checkpoint of this very moment is on the disk; on the main process."""
        return self._saved_moment == self._moment(state)

    # --- how ----------------------------------------------------------------------------------------------------------

    def save(self, training: Training) -> None:
        """Save a checkpoint, unless this very moment has one."""
        with training.clock.measured("saving_seconds"):
            self._save(training)

    def _save(self, training: Training) -> None:
        self._finish(_CHECKPOINT)  # one at a time
        moment = self._moment(training.state)
        self._set_next_step(training.state)
        training.stopping.note_save()
        if not self._enabled or self._last_moment == moment:
            return
        self._last_moment = moment
        snapshot = capture(training, self._history, self.beside, self._identity, self._callbacks)
        if snapshot is None or self._folder is None:
            return
        copies = self._buffers.copy(snapshot.tensors)
        copied = snapshot if copies is None else replace(snapshot, tensors=copies)
        write = partial(self._write_checkpoint, self._folder, copied, self._folder.history, moment, self._best)
        self._hand_over(_CHECKPOINT, write, at_once=copies is None)

    def keep_best(self, training: Training, metadata: dict[str, Any]) -> None:
        """Keep the present weights as the best so far."""
        if not self._keeps_best:
            return
        model = training.prepared.user_model
        beside = buffers_beside(model, training.objective.modules)
        self.beside = {name: buffer.detach().clone() for name, buffer in beside.items()}
        if self._is_main:
            with training.clock.measured("saving_seconds"):
                self._keep_best(model, metadata)

    def _keep_best(self, model: nn.Module, metadata: dict[str, Any]) -> None:
        self._finish(_BEST)
        if not self._best_is_on_disk:  # the write of a checkpoint may try it once more, from these same buffers
            self._finish(_CHECKPOINT)
        weights, aliases = split_aliases(plain_state(model))
        copies = self._best_buffers.copy({_BEST: weights})
        own = copies[_BEST] if copies else {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        self._best, self._best_is_on_disk = (own, metadata | {"aliases": aliases}), False
        if self._folder is not None:
            self._hand_over(_BEST, partial(self._write_best, self._folder, self._best), at_once=copies is None)

    def _hand_over(self, name: str, write: Callable[[], None], at_once: bool) -> None:
        """Let the thread write."""
        if at_once:
            self._finish(_BEST)
            warn("There is no room in memory for a copy of what is saved: the training waits for the write.", 4)
            self._note(name, _error_of(write))
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
            self._note(name, error)

    def _note(self, name: str, error: Exception | None) -> None:
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

    def restore_best(self, model: nn.Module, losses: Sequence[nn.Module], num_processes: int) -> bool:
        """Give the model the weights kept last, and return whether they were there; on every process.

        Where they are gone, or do not fit any more, the model keeps what it has, and a warning says so.
        """
        self.finish()
        is_there = True
        if self._is_main:
            try:
                best = self._best_weights()
                check_fit(best, model, "What was best")
                copy_into(model, best)
            except (OSError, ValueError, SafetensorError) as error:
                is_there = False
                warn(f"The best weights cannot be restored, the model keeps the last ones: {error}", stacklevel=2)
        if num_processes > 1:
            share_from_main(model.state_dict().values())
            is_there = share_object(is_there)
        if is_there:
            copy_beside(model, losses, self.beside)
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
        if self._executor is not None and self._folder is not None and at_once:
            _in_flight.add(self._executor.submit(self._folder.close))
            self._executor.shutdown(wait=False)
            return
        if self._executor is not None:
            self._executor.shutdown()
        self.finish()
        if self._folder is not None:
            self._folder.close()


def seconds_between_saves(checkpoint_every: int | str | None) -> float | None:
    """Return the seconds between two checkpoints; `None` where they go by steps or epochs."""
    return 60 * float(re.sub("min$", "", checkpoint_every)) if isinstance(checkpoint_every, str) else None


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
