"""When the best weights and checkpoints are saved, and how: the training waits for a copy, a thread writes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..base.console import warn
from ..base.dtensors import is_cut, local
from ..base.exchange import gather_objects, share_object
from ..callbacks import Callback
from ..config import TrainConfig
from ..devices.environment import free_memory
from ..history import History
from ..numbers.reductions import share_from_main
from ..run import Training
from ..state import TrainState
from .capture import capture
from .checkpoints import BEST, EPOCHS, Snapshot
from .run_folder import RunFolder
from .shards import Tensors
from .shared_folder import SharedFolder, gathered
from .weight_files import check, read_weights
from .weights import (
    FrozenWeights,
    buffers_beside,
    check_fit,
    check_left_out,
    copy_beside,
    copy_into,
    copy_rows_into,
    left_out_of,
    plain_state,
    split_aliases,
    without,
)

_Moment = tuple[int, int, str | None]


class _Best(NamedTuple):
    """Weights that are kept.

    Attributes:
        weights: In host memory, to go back to: of a divided model the own rows.
        file: What this process writes of them.
        metadata: Of the file.
    """

    weights: dict[str, Tensor]
    file: dict[str, Tensor]
    metadata: dict[str, Any]


_CHECKPOINT = "checkpoints"
_in_flight: set[Future[Any]] = set()  # writes of this process, those of a run left by a second Ctrl-C too


class Saver:
    """Save the best weights and checkpoints of a run.

    All processes call its methods at the same places; the main process writes, or all do where the model is divided.
    At most one write is under way. One that fails is a warning at the next save, which tries again. `folder` is `None`
    without a run folder, and on processes that do not write.

    Attributes:
        next_step: The step after which the next checkpoint is due; infinity if that does not depend on steps.
        beside: The buffers of the best epoch that its file leaves out; on each process.
        lost: Why no checkpoint of this run could be written; `None` if one was, or none was to be.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder | SharedFolder | None,
        is_main: bool,
        history: History,
        identity: Mapping[str, Any],
        callbacks: Sequence[Callback],
        on_checkpoint: Callable[[Path], None] = lambda path: None,
        is_divided: bool = False,
    ) -> None:
        self.next_step, self._num_saved = math.inf, 0
        self.lost: str | None = None
        self.beside: dict[str, Tensor] = {}
        self._folder, self._is_main, self._history = folder, is_main, history
        self._takes_part = is_main or is_divided
        self._identity, self._callbacks, self._on_checkpoint = identity, callbacks, on_checkpoint
        self._enabled = config.run_dir is not None
        self._keeps_best = self._enabled or config.restore_best
        self._every = config.checkpoint_every
        self._best: _Best | None = None
        self._best_is_on_disk = True
        self._buffers, self._best_buffers, self._epoch_buffers = _HostBuffers(), _HostBuffers(), _HostBuffers()
        self._executor: ThreadPoolExecutor | None = None
        self._writes: dict[str, Future[Path | None]] = {}  # what is written -> the write under way

    def start(self, training: Training, beside: Mapping[str, Tensor], frozen: FrozenWeights) -> None:
        """Begin to count from where the run stands now.

        `beside` is as the attribute, of the best epoch so far; `frozen` are the weights that may be left out.
        """
        self.beside, self._frozen = dict(beside), frozen
        # The moments of the last checkpoint that was due, and of the last that was written.
        self._last_moment: _Moment | None = self._moment(training.state)
        self._saved_moment = self._last_moment if training.state.num_batches else None
        self._set_next_step(training.state)

    def _set_next_step(self, state: TrainState) -> None:
        if isinstance(self._every, int):
            self.next_step = (state.step // self._every + 1) * self._every

    def after_epoch(self, training: Training) -> None:
        """Save what is due at the end of an epoch."""
        if _CHECKPOINT in self._writes and self._writes[_CHECKPOINT].done():
            self._finish(_CHECKPOINT)
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

    def save(self, training: Training) -> None:
        """Save a checkpoint, unless this very moment has one."""
        with training.clock.measured("saving_seconds"):
            self._finish(_CHECKPOINT)  # one at a time
            moment = self._moment(training.state)
            self._set_next_step(training.state)
            training.stopping.note_save()
            if not self._enabled or self._last_moment == moment:
                return
            self._last_moment = moment
            snapshot = capture(training, self._history, self.beside, self._identity, self._callbacks, self._frozen)
            if snapshot is None or self._folder is None:
                return
            copies = self._buffers.copy(snapshot.tensors)
            copied = replace(snapshot, tensors=copies or snapshot.tensors)
            write = partial(self._write_checkpoint, self._folder, copied, self._folder.history, moment, self._best)
            self._hand_over(_CHECKPOINT, write, at_once=copies is None)

    def keep_best(self, training: Training, metadata: dict[str, Any]) -> None:
        """Keep the present weights as the best so far."""
        if not self._keeps_best:
            return
        model = training.prepared.user_model
        beside = buffers_beside(model, training.objective.modules)
        self.beside = {name: buffer.detach().clone() for name, buffer in beside.items()}
        if not self._takes_part:
            return
        with training.clock.measured("saving_seconds"):
            self._finish(BEST)
            if not self._best_is_on_disk:  # the write of a checkpoint may try it once more, from these same buffers
                self._finish(_CHECKPOINT)
            weights, parts = self._weights_of(model)
            copies = self._best_buffers.copy({BEST: weights})
            kept = copies[BEST] if copies else {name: local(one).cpu().clone() for name, one in weights.items()}
            self._best = None  # before others are gathered
            file = kept if self._folder is None else self._to_write(weights, kept)
            self._best, self._best_is_on_disk = _Best(kept, file, metadata | parts), False
            if self._folder is not None:
                self._hand_over(BEST, partial(self._write_best, self._folder, self._best), at_once=copies is None)

    def keep_epochs(self, training: Training, epochs: Sequence[int], metadata: dict[str, Any]) -> None:
        """Keep the present weights if their epoch is among the best ones, and no other than those of the best ones."""
        if self._folder is None or metadata["epoch"] not in epochs:
            return
        with training.clock.measured("saving_seconds"):
            self._finish(EPOCHS)
            weights, parts = self._weights_of(training.prepared.user_model)
            copies = self._epoch_buffers.copy({EPOCHS: weights})
            kept = self._to_write(weights, (copies or {EPOCHS: weights})[EPOCHS])
            write = partial(self._folder.save_epoch, kept, metadata | parts, epochs)
            self._hand_over(EPOCHS, write, at_once=copies is None)

    def _weights_of(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights that are saved, no copies, and what their file says of tied and frozen ones."""
        left_out = self._frozen.digests(model)
        weights, aliases = split_aliases(without(plain_state(model), left_out), model)
        return weights, {"aliases": aliases, "left_out": left_out}

    def _to_write(self, weights: Mapping[str, Tensor], copies: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what this process writes of the weights, of which it has copies: whole tensors that it is dealt."""
        return gathered(weights) if isinstance(self._folder, SharedFolder) else copies

    def _hand_over(self, name: str, write: Callable[[], Path | None], at_once: bool) -> None:
        """Let the thread write; with `at_once` wait for it."""
        if at_once:
            warn("There is no room in memory for a copy of what is saved: the training waits for the write.", 4)
        self._executor = self._executor or ThreadPoolExecutor(1, "accel_trainer save")
        self._writes[name] = self._executor.submit(write)
        _in_flight.add(self._writes[name])
        if at_once:
            self.finish()

    def _write_best(self, folder: RunFolder | SharedFolder, best: _Best) -> None:
        folder.save_best(best.file, best.metadata)
        self._best_is_on_disk = self._best is best

    def _write_checkpoint(
        self, folder: RunFolder | SharedFolder, snapshot: Snapshot, history: bytes, moment: Any, best: _Best | None
    ) -> Path | None:
        is_there = self._best_is_on_disk and folder.holds_best  # read before the next line: that may be newer
        if best is not None and self._best is best and not is_there:
            self._write_best(folder, best)  # a checkpoint with an older best would go back to that
        path = folder.save_checkpoint(snapshot, history)
        self._saved_moment = moment
        return path

    def _finish(self, name: str) -> None:
        """Wait for a write, and warn if it has failed."""
        write = self._writes.pop(name, None)
        if write is not None:
            error = write.exception()
            _in_flight.discard(write)
            if error is not None and not isinstance(error, (OSError, SafetensorError)):
                raise error
            self._note(name, error)
            path = None if error is not None else write.result()
            if path is not None:
                self._on_checkpoint(path)

    def _note(self, name: str, error: Exception | None) -> None:
        self._folder.note(name, error)  # type: ignore[union-attr]
        if name == _CHECKPOINT:
            self._num_saved += error is None
            self.lost = None if error is None or self._num_saved else str(error)
            self._last_moment = self._last_moment if error is None else None  # the next save tries again

    def finish(self) -> None:
        """Wait for the writes under way."""
        for name in list(self._writes):
            self._finish(name)

    def restore_best(self, model: nn.Module, losses: Sequence[nn.Module], num_processes: int) -> bool:
        """Give the model the weights kept last, and return whether they were there; on every process.

        Where they were removed, or do not fit any more, the model keeps what it has, and a warning says so.
        """
        self.finish()
        fault = self._put_best_into(model) if self._takes_part else None
        if any(map(is_cut, model.parameters())):
            fault = next(filter(None, gather_objects(fault)), None)
        elif num_processes > 1:
            share_from_main(model.state_dict().values())
            fault = share_object(fault)
        if fault is None:
            copy_beside(model, losses, self.beside)
        elif self._is_main:
            warn(f"The best weights cannot be restored, the model keeps the last ones: {fault}", stacklevel=2)
        return fault is None

    def _put_best_into(self, model: nn.Module) -> str | None:
        """Give the model the best weights, of a divided one the own rows, and return why that cannot be."""
        try:
            if self._best is None:
                path = self._folder.best_path  # type: ignore[union-attr]
                check(path)
                best: dict[str, Any] = read_weights(path)
                left_out = left_out_of(path)
                check_left_out(left_out, self._frozen.values, "Its file")
                check_fit(best, model, "What was best", left_out)
                copy_into(model, best)
            else:
                aliases, left_out = self._best.metadata["aliases"], self._best.metadata["left_out"]
                best = self._best.weights | {name: self._best.weights[kept] for name, kept in aliases.items()}
                check_fit(best, model, "What was best", left_out, local)
                copy_rows_into(model, best)
            copy_rows_into(model, {name: self._frozen.values[name] for name in left_out})
        except (OSError, ValueError, SafetensorError) as error:
            return str(error)
        return None

    def close(self, at_once: bool = False) -> None:
        """End the thread, after the writes under way, and leave the folder to others.

        With `at_once` it returns without waiting: the thread does the rest, and the interpreter waits for it.
        """
        if self._folder is None:
            return
        if self._executor is not None and at_once:
            _in_flight.add(self._executor.submit(self._folder.close))
            self._executor.shutdown(wait=False)
            return
        if self._executor is not None:
            self._executor.shutdown()
        self.finish()
        self._folder.close()


def seconds_between_saves(checkpoint_every: int | str | None) -> float | None:
    """Return the seconds between two checkpoints; `None` where they go by steps or epochs."""
    return 60 * float(checkpoint_every.removesuffix("min")) if isinstance(checkpoint_every, str) else None


def finish_writes(timeout: float | None = None) -> None:
    """Wait at most `timeout` seconds for the writes of this process, those left by a second Ctrl-C too."""
    wait(list(_in_flight), timeout)


class _HostBuffers:
    """Host memory that is kept between saves: the first write into fresh memory costs as much as the disk."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Tensors) -> Tensors | None:
        """Return copies in host memory, overwritten by the next call; `None` if there is no room for them.

        Of tensors that are divided over the processes only the own rows are copied.
        """
        named = ((file, name, tensor) for file, content in tensors.items() for name, tensor in content.items())
        flat = {(file, name): local(tensor).detach() for file, name, tensor in named}
        forms = {key: (buffer.shape, buffer.dtype) for key, buffer in self._buffers.items()}
        fresh = {key: tensor for key, tensor in flat.items() if forms.get(key) != (tensor.shape, tensor.dtype)}
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
        return {file: {name: self._buffers[file, name] for name in content} for file, content in tensors.items()}
