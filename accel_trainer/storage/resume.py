"""How a run goes on from a checkpoint: which one, from which disk, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..base.codec import pack, unpack
from ..base.console import warn
from ..base.exchange import gather_objects, host_group, share_object
from ..callbacks import Callback, listens
from ..config import TrainConfig
from ..data.order import is_stream
from ..devices.hardware import Hardware
from ..errors import CheckpointError
from ..history import History
from ..numbers.reductions import share_from_main
from ..run import Run
from .capture import PROGRESS, layout_and_choices, restore, schedule_state, stateful, under, unfilled_buffers
from .checkpoints import Snapshot
from .identity import check_identity
from .optimizer_state import names_by_group, optimizer_state
from .run_folder import RunFolder, newest_step
from .saver import finish_writes
from .weights import check_fit, plain_name, plain_state


@dataclass(frozen=True)
class Found:
    """The run folder, on the main process, and what a run goes on from, on all."""

    folder: RunFolder | None = None
    snapshot: Snapshot | None = None
    history: History | None = None
    source: str | None = None


def find(
    config: TrainConfig, hardware: Hardware, identity: Mapping[str, Any], announce: Callable[[str], None]
) -> Found:
    """Return where a run goes on from; every process calls it, and the main process decides.

    Raises:
        CheckpointError: There are checkpoints, and none can be used, or they are of another run.
        FileExistsError: The folder holds a run already.
        FileNotFoundError: There is nothing to go on from.
    """
    if config.run_dir is None:
        return Found()
    finish_writes()
    run_dir = config.run_dir
    opened: list[Found] = []

    def look() -> str | None:
        folder = RunFolder(run_dir, config.resume, config.keep_checkpoints)
        if folder.resumed is None:
            opened.append(Found(folder))
            return None
        source = str(folder.resumed.path)
        with _understood(source):
            snapshot = folder.resumed.read()
            before = unpack(snapshot.state["identity"], {})
            check_identity(before, unpack(pack(dict(identity), {}, "identity"), {}), source)
            opened.append(Found(folder, snapshot, History.load(source), source))
        return source

    seen = newest_step(run_dir) if config.resume else None
    source = hardware.from_main(look)
    found = opened[0] if opened else Found(source=source)
    if found.folder is not None and found.folder.passed_over:
        warn(f"Passed over in {found.folder.path}: {'; '.join(found.folder.passed_over)}.", stacklevel=2)
    if config.resume and hardware.num_processes > 1:
        _tell_of_disks(gather_objects(seen), source, announce)
    if source is None:
        return found
    snapshot, history = _shared(found, hardware)
    return Found(found.folder, snapshot, history, source)


@contextmanager
def _understood(source: str) -> Iterator[None]:
    """Turn what comes of content that is whole but makes no sense into the documented error."""
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, AttributeError, TypeError, ArithmeticError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source} makes no sense: {error!r}.") from error


def _tell_of_disks(seen: list[int | None], source: str | None, announce: Callable[[str], None]) -> None:
    """Say what the processes do not see alike, where the hosts share no disk."""
    others = [process for process, step in enumerate(seen) if step != seen[0]]
    ahead = {process: step for process, step in enumerate(seen) if step is not None and step > (seen[0] or 0)}
    if others:
        begins = "sends its checkpoint to all" if source is not None else "has none and begins anew"
        announce(f"Processes {others} do not see the main process's checkpoints; the main process {begins}.")
    for process, step in ahead.items():
        announce(f"Process {process} sees a checkpoint of step {step}, which the main process does not have.")


def _shared(found: Found, hardware: Hardware) -> tuple[Snapshot | None, History | None]:
    """Return on every process what the main process has read: no other needs to see the disk."""
    snapshot, outline = found.snapshot, None
    if hardware.num_processes == 1:
        return snapshot, found.history
    if snapshot is not None:
        shapes = {
            file: {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
            for file, own in snapshot.tensors.items()
        }
        outline = (snapshot.step, shapes, snapshot.state, found.history)
    step, shapes, state, history = share_object(outline)
    if snapshot is None:
        tensors = {
            file: {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in own.items()}
            for file, own in shapes.items()
        }
        snapshot = Snapshot(step, tensors, {}, state)
    everything = [tensor for own in snapshot.tensors.values() for tensor in own.values()]
    share_from_main(everything, host_group())
    return snapshot, history


def begin(run: Run, found: Found, identity: Mapping[str, Any], callbacks: Sequence[Callback]) -> None:
    """Make the folder ready, and put the run where it goes on from."""
    training, folder = run.training, found.folder
    if found.snapshot is not None:
        with _understood(str(found.source)):
            _check_parts(run, found.snapshot)
            run.history.restore(found.history)  # type: ignore[arg-type]
            restore(training, run.history, found.snapshot, run.announce)
            before = unpack(found.snapshot.state["told"], {})
            _announce_changes(before, layout_and_choices(training), run.announce)
        _restore_callbacks(found.snapshot, callbacks)
    for name, callback in stateful(callbacks).items():
        pack(callback.state_dict(), {}, f"callback {name}")  # refuses at once what could not be saved
    pack(schedule_state(training), {}, "scheduler")
    if training.config.run_dir is not None:
        optimizer_state(training.prepared.optimizer, training.prepared.user_model, {})  # type: ignore[arg-type]

    def open_folder() -> dict[str, Any] | None:
        if folder is None:
            return None
        folder.open(identity)
        return folder.best

    best = training.hardware.from_main(open_folder)
    beside = {} if found.snapshot is None else under("best/", found.snapshot.tensors.get(PROGRESS, {}))
    if folder is not None and folder.aside is not None:
        run.announce(f"{folder.path} has no checkpoint: this is a new run. What was there is in {folder.aside.name}.")
    if found.snapshot is not None:
        done = training.state
        within = f", {done.position} batches of pass {done.data_pass} over the data done"
        run.announce(f"Going on from {found.source}: step {done.step}, epoch {done.epoch}{within}.")
        with _understood(str(found.source)):
            beside = beside if _take_best(run, best) else {}
        if done.epoch > run.history.num_epochs:
            _tell_of_epoch_start(run, callbacks)
        if is_stream(training.loader.data_loader) and done.position:
            run.announce(f"train_loader is a stream: {done.position} batches are read to be passed over.")
    if folder is not None:
        _check_room(run, folder)
    run.saver.start(training, beside)


def _tell_of_epoch_start(run: Run, callbacks: Sequence[Callback]) -> None:
    """Name the callbacks whose `on_epoch_start` has been called for the epoch under way, and leaves nothing here."""
    keep_a_state = list(stateful(callbacks).values())
    listening = [one for one in callbacks if listens(one, "on_epoch_start")]
    names = [type(one).__name__ for one in listening if one not in keep_a_state]
    if names:
        run.announce(
            f"Going on within an epoch: on_epoch_start of {', '.join(names)} is not called again. What it sets beside "
            "weights, optimizer and modes is lost unless state_dict and load_state_dict keep it."
        )


def _take_best(run: Run, best: Mapping[str, Any] | None) -> bool:
    """Go on with the best weights that are whole on the disk, and return whether those are the checkpoint's.

    They are older ones if those of the checkpoint are damaged.
    """
    state = run.training.state
    epoch, value = (None, None) if best is None else (int(best["epoch"]), float(best[run.monitor]))
    if epoch == state.best_epoch:
        return True
    if run.training.hardware.is_main:
        instead = "there are none from here on" if epoch is None else f"those of epoch {epoch} take their place"
        warn(f"The best weights, of epoch {state.best_epoch}, are damaged: {instead}.", stacklevel=2)
    state.note_best(epoch, value)
    run.history.note_best(epoch, value)
    return False


def _check_parts(run: Run, snapshot: Snapshot) -> None:
    """Refuse a checkpoint of another model or optimizer, before anything is changed."""
    model: nn.Module = run.training.prepared.user_model
    weights = snapshot.tensors["model.safetensors"]
    caches = {plain_name(name): buffer for name, buffer in model.named_buffers()}  # may have grown
    try:
        unfilled = unfilled_buffers(model)
        known = {name: caches.get(name, tensor) for name, tensor in weights.items() if name not in unfilled}
        check_fit(known, model, "The checkpoint")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    optimizer: Optimizer = run.training.prepared.optimizer  # type: ignore[assignment]
    before = [group["params"] for group in snapshot.state["optimizer"]["param_groups"]]
    now = names_by_group(optimizer, model)
    added = {name for group in before[len(now) :] for name in group}  # by a callback, during the run
    if before[: len(now)] != now or not added <= {plain_name(name) for name, _ in model.named_parameters()}:
        raise CheckpointError(
            f"The checkpoint's optimizer has other parameters in its {len(before)} groups than this one in its "
            f"{len(optimizer.param_groups)}: build both alike."
        )


def _check_room(run: Run, folder: RunFolder) -> None:
    """Warn beforehand of a disk that is too small; the state of the optimizer is not known yet."""
    parameters = sum(one.nbytes for one in run.training.gradients.parameters)
    one = sum(tensor.nbytes for tensor in plain_state(run.training.prepared.user_model).values()) + 2 * parameters
    try:
        folder.check_room(one * (run.training.config.keep_checkpoints + 1))
    except OSError as error:
        warn(f"The checkpoints may find no room in {folder.path}: {error.strerror}.", stacklevel=2)


def _restore_callbacks(snapshot: Snapshot, callbacks: Sequence[Callback]) -> None:
    with _understood(f"The checkpoint of step {snapshot.step}"):
        states = dict(unpack(snapshot.state["callbacks"], snapshot.tensors.get(PROGRESS, {})))
    own = stateful(callbacks)
    for name, state in states.items():
        if name in own:
            own[name].load_state_dict(state)
        else:
            warn(f"The checkpoint has a state of callback {name}, which this run does not have.", stacklevel=2)


def _announce_changes(before: Mapping[str, Any], now: Mapping[str, Any], announce: Callable[[str], None]) -> None:
    changes = [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    if changes:
        announce(f"Changed since the checkpoint: {', '.join(changes)}.")
