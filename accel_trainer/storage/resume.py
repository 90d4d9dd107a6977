"""How a run goes on from a checkpoint: which one, from which disk, and what is announced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from ..base.codec import pack, unpack
from ..base.console import warn
from ..base.dtensors import num_bytes
from ..callbacks import Callback, listens
from ..config import TrainConfig
from ..data.order import is_stream
from ..devices.hardware import Hardware
from ..errors import CheckpointError
from ..history import History
from ..run import Run, Training
from .across_hosts import at_hand, bring_newest
from .capture import buffer_owners, layout_and_choices, restore, schedule_state, stateful, under
from .checkpoints import MODEL, PROGRESS, Snapshot, read_checkpoint, read_json, understood
from .identity import check_identity
from .optimizer_state import names_by_group, optimizer_state
from .run_folder import RunFolder
from .saver import finish_writes
from .shards import whole
from .weights import FrozenWeights, check_fit, check_left_out, checked_digests, plain_name, plain_state


class Found(NamedTuple):
    """The run folder, on the main process, and what a run goes on from, on all."""

    folder: RunFolder | None = None
    snapshot: Snapshot | None = None
    history: History | None = None
    source: str | None = None


def find(
    config: TrainConfig, hardware: Hardware, identity: Mapping[str, Any], announce: Callable[[str], None]
) -> Found:
    """Return where a run goes on from, or raise as `Trainer.fit`; every process calls it, the main process decides."""
    if config.run_dir is None:
        return Found()
    finish_writes()
    run_dir = Path(config.run_dir).expanduser().absolute()
    folder: RunFolder | None = None

    def open_folder() -> None:
        nonlocal folder
        folder = RunFolder(run_dir, config.resume, config.keep_checkpoints)

    def check(state: Mapping[str, Any], source: str) -> Mapping[str, Any]:
        with understood(source):
            check_identity(unpack(state["identity"], {}), unpack(pack(dict(identity), {}, "identity"), {}), source)
        return identity

    def look() -> tuple[Path, History] | None:
        source = None if folder is None else folder.start()
        if source is None:
            return None
        with understood(source):
            state, history = read_json(source / "state.json"), History.load(source)
            check(state, str(source))
            history.load_steps(run_dir, state["run"]["step"])
        return source, history

    hardware.from_main(open_folder)
    if config.resume and hardware.num_processes > 1:
        bring_newest(run_dir, folder, hardware, check, announce)
    seen = hardware.from_main(look)
    if folder is not None and folder.passed_over:
        warn(f"Passed over in {folder.path}: {'; '.join(folder.passed_over)}.", stacklevel=2)
    if seen is None:
        return Found(folder)
    source, history = seen
    with at_hand(source, run_dir, hardware, announce) as path, understood(source):
        snapshot = read_checkpoint(path)
    return Found(folder, snapshot, history, str(source))


def begin(run: Run, found: Found, identity: Mapping[str, Any], callbacks: Sequence[Callback]) -> None:
    """Make the folder ready, and put the run where it goes on from."""
    training, folder, snapshot = run.training, found.folder, found.snapshot
    source = str(found.source)
    left_out: dict[str, str] = {}
    if snapshot is not None:
        with understood(source):
            left_out = checked_digests(unpack(snapshot.state.get("left_out", {})))
    frozen = FrozenWeights(training.prepared.user_model if _keeps_weights(training) else None, left_out)
    if snapshot is not None:
        with understood(source):
            _check_parts(run, snapshot, left_out)
            run.history.restore(found.history)  # type: ignore[arg-type]
            restore(training, run.history, snapshot, run.announce)
            before, now = unpack(snapshot.state["told"], {}), layout_and_choices(training)
            changes = [f"{name} {before[name]} -> {new}" for name, new in now.items() if before.get(name, new) != new]
            if changes:
                run.announce(f"Changed since the checkpoint: {', '.join(changes)}.")
            progress = {name: whole(value) for name, value in snapshot.tensors.get(PROGRESS, {}).items()}
            states = dict(unpack(snapshot.state["callbacks"], progress))
        _restore_callbacks(states, callbacks)
    pack(schedule_state(training), {}, "scheduler")
    if training.config.run_dir is not None:
        optimizer_state(training.prepared.optimizer, training.prepared.user_model, {})  # type: ignore[arg-type]
    best = training.hardware.from_main(lambda: None if folder is None else folder.open(identity))
    beside: dict[str, Tensor] = {}
    if folder is not None and folder.aside is not None:
        told = " has no checkpoint: this is a new run" if snapshot is None else " had no checkpoint"
        run.announce(f"{folder.path}{told}. What was there is in {folder.aside.name}.")
    if snapshot is not None:
        state = training.state
        within = f", {state.position} batches of pass {state.data_pass} over the data done"
        run.announce(f"Going on from {source}: step {state.step}, epoch {state.epoch}{within}.")
        with understood(source):
            if _take_best(run, best):
                beside = under("best/", snapshot.tensors.get(PROGRESS, {}))
        if state.epoch > run.history.num_epochs:
            _announce_epoch_start(run, callbacks)
        stream = training.loader.sharded
        can_seek = stream is not None and stream.knows(state.data_pass, state.position)
        if is_stream(training.loader.data_loader) and state.position and not can_seek:
            run.announce(f"train_loader is a stream: {state.position} batches are read to be passed over.")
    if folder is not None:
        _check_room(run, folder)
    run.saver.start(training, beside, frozen)


def _keeps_weights(training: Training) -> bool:
    """Return whether this process keeps weights: the frozen ones then, as the user's program has made them."""
    takes_part = training.hardware.is_main or training.prepared.is_divided
    return takes_part and (training.config.run_dir is not None or training.config.restore_best)


def check_states(callbacks: Sequence[Callback]) -> None:
    """Refuse (TypeError) at once a state of a callback that could not be saved; after `on_fit_start`."""
    for name, callback in stateful(callbacks).items():
        pack(callback.state_dict(), {}, f"callback {name}")


def _announce_epoch_start(run: Run, callbacks: Sequence[Callback]) -> None:
    """Name the callbacks without a state whose `on_epoch_start` was called for the epoch under way before."""
    keep_a_state = list(stateful(callbacks).values())
    stateless = [callback for callback in callbacks if callback not in keep_a_state]
    names = [type(callback).__name__ for callback in stateless if listens(callback, "on_epoch_start")]
    if names:
        run.announce(
            f"Going on within an epoch: on_epoch_start of {', '.join(names)} is not called again. What it sets beside "
            "weights, optimizer and modes is lost unless state_dict and load_state_dict keep it."
        )


def _take_best(run: Run, best: Mapping[str, Any] | None) -> bool:
    """Go on with the best weights that are whole on the disk, and return whether they are the checkpoint's own."""
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


def _check_parts(run: Run, snapshot: Snapshot, left_out: Mapping[str, str]) -> None:
    """Refuse a checkpoint of another model or optimizer, before anything is changed."""
    model = run.training.prepared.user_model
    buffers = {name: module._buffers[attribute] for name, (module, attribute) in buffer_owners(model).items()}
    # A buffer may have been filled, or have grown, when the checkpoint was made: its shape is not compared.
    weights = {name: buffers.get(name, tensor) for name, tensor in snapshot.tensors[MODEL].items()}
    try:
        known = {name: tensor for name, tensor in weights.items() if tensor is not None}
        check_fit(known, model, "The checkpoint", left_out)
        if run.training.prepared.is_divided:  # all processes compute the digests
            check_left_out(left_out, plain_state(model), "The checkpoint")
        else:
            run.training.hardware.from_main(lambda: check_left_out(left_out, plain_state(model), "The checkpoint"))
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
    """Warn beforehand of a disk that is too small; the size of the optimizer's state is a guess."""
    parameters = sum(map(num_bytes, run.training.gradients.parameters))
    weights = sum(map(num_bytes, plain_state(run.training.prepared.user_model).values()))
    try:
        folder.check_room((weights + 2 * parameters) * (run.training.config.keep_checkpoints + 1))
    except OSError as error:
        warn(f"The checkpoints may find no room in {folder.path}: {error.strerror}.", stacklevel=2)


def _restore_callbacks(states: Mapping[str, Any], callbacks: Sequence[Callback]) -> None:
    found = stateful(callbacks)
    for name, state in states.items():
        if name in found:
            found[name].load_state_dict(state)
        else:
            warn(f"The checkpoint has a state of callback {name}, which this run does not have.", stacklevel=2)
