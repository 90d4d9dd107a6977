"""What a checkpoint holds of a run, and how a run goes on from it: `capture` and `restore`, side by side.

Left out is all that is a function of the position: the order of the samples and the generators.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .batches import is_stream, length_of, num_batches, sampler_of
from .callbacks import Callback, Callbacks
from .checkpoints import RunFolder, Snapshot, newest_step
from .config import TrainConfig
from .console import printable, warn
from .errors import CheckpointError
from .exchange import gather_objects, host_group, share_object
from .gradients import is_plain
from .hardware import Hardware, counts_on_device
from .history import History
from .loop import Run
from .packing import pack, same_bits, unpack
from .reductions import share_from_main
from .saving import finish_writes
from .state import RunState
from .weights import buffers_beside, check_fit, checked_state, copy_into, plain_name, plain_state, split_aliases

__all__ = ["Found", "begin", "capture", "find", "identity_of", "restore"]

_OPTIMIZER, _PROGRESS = "optimizer.safetensors", "progress.safetensors"


# --- which run it is --------------------------------------------------------------------------------------------------

_OF_THE_CONFIG = ("seed", "steps_per_epoch", "monitor", "mode", "max_grad_norm", "schedule_every")
_TOLD = ("num_micro_batches", "bitwise", "mixed_precision", "compile", "num_threads", "patience", "min_delta")


def identity_of(
    config: TrainConfig,
    model: nn.Module,
    settings: Sequence[Mapping[str, Any]],
    functions: Mapping[str, Any],
    loaders: Mapping[str, DataLoader[Any] | None],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Return what makes a run the one that it is: with another of these it could not go on.

    Args:
        config: The user's choices.
        model: The user's model.
        settings: Of the optimizer's groups of parameters, those that the run began with.
        functions: Name of the argument -> loss, weights, scheduler, optimizer.
        loaders: `train_loader` and `test_loader`.
        metrics: Their names.
    """
    train_loader = loaders["train_loader"]
    return {
        **{name: getattr(config, name) for name in _OF_THE_CONFIG},
        **_order_of(train_loader),
        **{
            f"length of {name}'s dataset": length_of(getattr(loader, "dataset", None))
            for name, loader in loaders.items()
        },
        "metrics": list(metrics),
        "model": _name_of(model),
        **{name: _name_of(function) for name, function in functions.items()},
        "learning rates": [_rate_of(group) for group in settings],
        "weight decays": [float(group.get("weight_decay") or 0) for group in settings],
    }


def _rate_of(group: Mapping[str, Any]) -> float | None:
    rate = group.get("initial_lr", group.get("lr"))
    return None if rate is None else float(rate)


def _order_of(loader: DataLoader[Any] | None) -> dict[str, Any]:
    """Return what decides the order of the samples and their batches."""
    if loader is None or is_stream(loader):
        return {"batch_size": getattr(loader, "batch_size", None)}
    outer = sampler_of(loader)
    inner = getattr(outer, "sampler", None)
    return {
        "batch_size": getattr(outer, "batch_size", None),
        "num_batches": num_batches(loader),
        "drop_last": getattr(outer, "drop_last", None),
        "sampler": " of ".join(_name_of(one) or "" for one in (outer, inner) if one is not None),
        "replacement": getattr(inner, "replacement", None),
    }


def _name_of(thing: Any) -> str | None:
    """Return the qualified name of a function or of an object's class."""
    if isinstance(thing, partial):
        return _name_of(thing.func)
    thing = getattr(thing, "_orig_mod", thing)  # compiled or not
    if thing is None:
        return None
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], source: str) -> None:
    """Refuse to go on with another run.

    Args:
        before: `identity_of` the run that was saved.
        now: That of this one.
        source: Where the first comes from, for the message.

    Raises:
        CheckpointError: With each field that differs, old and new.
    """
    names = [*before, *(name for name in now if name not in before)]
    changes = [
        f"{printable(name)} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise CheckpointError(
            f"{source} is of another run: {'; '.join(changes)}. Set that back, or give another run_dir for a new run. "
            "Free to change are the processes, num_micro_batches, num_epochs, max_steps and patience."
        )


# --- what is saved ----------------------------------------------------------------------------------------------------


def capture(run: Run, identity: Mapping[str, Any], callbacks: Sequence[Callback]) -> Snapshot | None:
    """Return what a checkpoint of this moment holds, no copies; `None` where weights are not finite.

    All processes call it between two batches; only the main process's result counts.
    """
    training, state, model = run.training, run.training.state, run.training.prepared.plain
    if not training.is_sound():
        if training.hardware.is_main and training.config.on_nonfinite != "raise":  # the error is on its way then
            warn("The weights are not finite: no checkpoint is made of them.", stacklevel=2)
        return None
    losses = training.ledger.sums() if state.epoch > run.history.num_epochs else None
    if not training.hardware.is_main:
        return None
    weights, aliases = split_aliases(checked_state(model))
    of_optimizer: dict[str, Tensor] = {}
    progress = dict(buffers_beside(model, training.objective.modules))
    progress |= {f"best/{name}": buffer for name, buffer in run.saver.beside.items()}
    scaler = training.hardware.accelerator.scaler
    content = {
        "schedule": training.schedule.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "callbacks": {name: callback.state_dict() for name, callback in _stateful(callbacks).items()},
        "losses": losses,
        "norms": (float(training.norm_sum), training.num_norms),
        "seconds": training.clock.spent,
        "identity": dict(identity),
        "run": asdict(state),
        "told": _told(run),
        "num_micro_batches": _found_by_memory(run),
        "evaluating": [plain_name(name) for name, module in model.named_modules() if not module.training],
        "frozen": [plain_name(name) for name, one in model.named_parameters() if not one.requires_grad],
    }
    packed = {name: pack(value, progress, name) for name, value in content.items()}
    packed["optimizer"] = _optimizer_state(training.prepared.optimizer, model, of_optimizer)  # type: ignore[arg-type]
    return Snapshot(
        step=state.step,
        tensors={
            "model.safetensors": weights,
            _OPTIMIZER: of_optimizer,
            **({_PROGRESS: progress} if progress else {}),
        },
        metadata={"aliases": aliases, "step": state.step, "epoch": state.epoch},
        state=packed,
    )


def _told(run: Run) -> dict[str, Any]:
    config = run.training.config
    return {"num_processes": run.training.hardware.num_processes} | {name: getattr(config, name) for name in _TOLD}


def _found_by_memory(run: Run) -> int | None:
    """Return the number of micro-batches where it was found by running out of memory."""
    training = run.training
    number = training.feed.layout.num_micro_batches
    default = training.hardware.layout(training.config.num_micro_batches).num_micro_batches
    return number if number > default else None


def _stateful(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Return the callbacks that have a state, by class and place among those of the class."""
    found: dict[str, Any] = {}
    for callback in callbacks:
        if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
            name = type(callback).__qualname__
            found[f"{name} {sum(key.rpartition(' ')[0] == name for key in found) + 1}"] = callback
    return found


def _optimizer_state(optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the state of an optimizer by the names of its parameters, or in the form of its own, if it has one."""
    by_group = _names_by_group(optimizer, model)
    whole = optimizer.state_dict()
    if _has_own_form(optimizer, whole):
        return {"own": pack(whole, tensors, "own"), "param_groups": [{"params": names} for names in by_group]}
    names = list(itertools.chain.from_iterable(by_group))
    state = {
        names[place]: {key: pack(value, tensors, f"{names[place]}/{key}") for key, value in own.items()}
        for place, own in whole["state"].items()
    }
    groups = [
        pack({key: value for key, value in group.items() if key != "params"}, tensors, f"group {number}")
        | {"params": [names[place] for place in group["params"]]}
        for number, group in enumerate(whole["param_groups"])
    ]
    return {"state": state, "param_groups": groups}


def _has_own_form(optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
    """Return whether only the optimizer itself knows what its state means."""
    kind = type(optimizer)
    is_torchs = (kind.state_dict, kind.load_state_dict) == (Optimizer.state_dict, Optimizer.load_state_dict)
    return not is_torchs or not all(isinstance(key, int) for key in state["state"])


def _names_by_group(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters in each group, in the order in which the optimizer counts them."""
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    gone = "no part of the model any more: {}"
    return [
        [names.get(id(parameter), gone.format(place)) for place, parameter in enumerate(group["params"])]
        for group in optimizer.param_groups
    ]


# --- where to go on from ----------------------------------------------------------------------------------------------


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


# --- from the main process to all -------------------------------------------------------------------------------------


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


# --- what goes on -----------------------------------------------------------------------------------------------------


def begin(run: Run, found: Found, identity: Mapping[str, Any], callbacks: Sequence[Callback]) -> None:
    """Make the folder ready, and put the run where it goes on from."""
    training, folder = run.training, found.folder
    if found.snapshot is not None:
        with _understood(str(found.source)):
            _check_parts(run, found.snapshot)
            restore(run, found.snapshot, found.history)  # type: ignore[arg-type]
            _announce_changes(unpack(found.snapshot.state["told"], {}), _told(run), run.announce)
        _restore_callbacks(run, found.snapshot, callbacks)
    for name, callback in _stateful(callbacks).items():
        pack(callback.state_dict(), {}, f"callback {name}")  # refuses at once what could not be saved
    pack(training.schedule.state_dict(), {}, "scheduler")
    if run.training.config.run_dir is not None:
        _optimizer_state(training.prepared.optimizer, training.prepared.plain, {})  # type: ignore[arg-type]

    def open_folder() -> dict[str, Any] | None:
        if folder is None:
            return None
        folder.open(identity)
        return folder.best

    best = training.hardware.from_main(open_folder)
    beside = {} if found.snapshot is None else _under("best/", found.snapshot.tensors.get(_PROGRESS, {}))
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
        if is_stream(training.feed.loader) and done.position:
            run.announce(f"train_loader is a stream: {done.position} batches are read to be passed over.")
    if folder is not None:
        _check_room(run, folder)
    run.saver.start(partial(capture, run, identity, callbacks), beside)
    training.before_batch = run.saver.before_batch


def _tell_of_epoch_start(run: Run, callbacks: Sequence[Callback]) -> None:
    """Name the callbacks whose `on_epoch_start` has been called for the epoch under way, and leaves nothing here."""
    stateful = list(_stateful(callbacks).values())
    names = [
        type(one).__name__ for one in callbacks if Callbacks([one]).listens("on_epoch_start") and one not in stateful
    ]
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
    state.best_epoch = run.history.best_epoch = epoch
    state.best_value = run.history.best_value = value
    return False


def _check_parts(run: Run, snapshot: Snapshot) -> None:
    """Refuse a checkpoint of another model or optimizer, before anything is changed."""
    model: nn.Module = run.training.prepared.plain
    weights = snapshot.tensors["model.safetensors"]
    caches = {plain_name(name): buffer for name, buffer in model.named_buffers()}  # may have grown
    try:
        unfilled = _unfilled_buffers(model)
        known = {name: caches.get(name, tensor) for name, tensor in weights.items() if name not in unfilled}
        check_fit(known, model, "The checkpoint")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    optimizer: Optimizer = run.training.prepared.optimizer  # type: ignore[assignment]
    before = [group["params"] for group in snapshot.state["optimizer"]["param_groups"]]
    now = _names_by_group(optimizer, model)
    added = {name for group in before[len(now) :] for name in group}  # by a callback, during the run
    if before[: len(now)] != now or not added <= {plain_name(name) for name, _ in model.named_parameters()}:
        raise CheckpointError(
            f"The checkpoint's optimizer has other parameters in its {len(before)} groups than this one in its "
            f"{len(optimizer.param_groups)}: build both alike."
        )


def _check_room(run: Run, folder: RunFolder) -> None:
    """Warn beforehand of a disk that is too small; the state of the optimizer is not known yet."""
    parameters = sum(one.nbytes for one in run.training.gradients.parameters)
    one = sum(tensor.nbytes for tensor in plain_state(run.training.prepared.plain).values()) + 2 * parameters
    try:
        folder.check_room(one * (run.training.config.keep_checkpoints + 1))
    except OSError as error:
        warn(f"The checkpoints may find no room in {folder.path}: {error.strerror}.", stacklevel=2)


def restore(run: Run, snapshot: Snapshot, history: History) -> None:
    """Put a run where the checkpoint was made; every process calls it.

    Args:
        run: Made, and not begun.
        snapshot: On the main process's word, the same on all.
        history: As long as it was then.
    """
    training, saved = run.training, snapshot.state
    progress = snapshot.tensors.get(_PROGRESS, {})
    content = {name: unpack(saved[name], progress) for name in saved if name not in ("optimizer", "callbacks")}
    _restore_state(training.state, content["run"])
    for one in fields(history):
        setattr(run.history, one.name, getattr(history, one.name))
    _restore_model(training.prepared.plain, snapshot.tensors["model.safetensors"], progress, content["frozen"])
    for name, module in training.prepared.plain.named_modules():
        module.training = plain_name(name) not in content["evaluating"]
    for place, loss in enumerate(training.objective.modules):
        _restore_buffers(loss, _under(f"loss {place}/", progress))
    _restore_schedule_and_optimizer(run, content["schedule"], snapshot)
    if content["scaler"] is not None and training.hardware.accelerator.scaler is not None:
        training.hardware.accelerator.scaler.load_state_dict(content["scaler"])
    if content["losses"] is not None:
        training.ledger.restore(content["losses"])
    norm_sum, num_norms = content["norms"]
    training.norm_sum, training.num_norms = float(norm_sum), int(num_norms)
    training.clock.restore(content["seconds"])
    found = content["num_micro_batches"]
    if found is not None and training.feed.on_recut is not None and found > training.feed.layout.num_micro_batches:
        layout = training.feed.layout._replace(num_micro_batches=int(found))
        training.feed.layout = training.gradients.layout = training.buffers.layout = layout


def _restore_state(state: RunState, saved: Mapping[str, Any]) -> None:
    for one in fields(state):
        value = saved[one.name]
        kinds = (int, float, str) if one.default is None else (type(one.default),)
        is_known = (value is None and one.default is None) or (type(value) in kinds and _is_finite_in_64_bits(value))
        if not is_known or (type(value) is int and value < 0):
            raise ValueError(f"{one.name} is {value!r}")
        setattr(state, one.name, value)


def _is_finite_in_64_bits(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 2**63


def _restore_model(
    model: nn.Module, weights: Mapping[str, Tensor], progress: Mapping[str, Tensor], frozen: Sequence[str]
) -> None:
    _restore_buffers(model, {**weights, **_under("buffers/", progress)})
    copy_into(model, weights)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plain_name(name) not in frozen)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@torch.no_grad()
def _restore_buffers(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    buffers = {plain_name(name): (name, buffer) for name, buffer in root.named_buffers()}
    unfilled = _unfilled_buffers(root)
    for name, tensor in tensors.items():
        if name in unfilled:
            owner, attribute = unfilled[name]
            device = next(itertools.chain(root.parameters(), root.buffers()), tensor).device
            owner._buffers[attribute] = tensor.to(device).clone()
        elif name in buffers and not _can_take(buffers[name][1], tensor):  # a cache that had grown, a view
            place, _, attribute = buffers[name][0].rpartition(".")
            root.get_submodule(place)._buffers[attribute] = tensor.to(buffers[name][1].device).clone()
        elif name in buffers:
            buffers[name][1].copy_(tensor)


def _unfilled_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return where the buffers hang that are registered as `None`, for a forward to fill."""
    return {
        plain_name(f"{place}.{name}" if place else name): (module, name)
        for place, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is None
    }


def _can_take(buffer: Tensor, tensor: Tensor) -> bool:
    """Return whether a buffer has the shape of a tensor, and memory of its own for each element."""
    return buffer.shape == tensor.shape and is_plain(buffer)


def _restore_schedule_and_optimizer(run: Run, schedule: dict[str, Any], snapshot: Snapshot) -> None:
    training, optimizer = run.training, run.training.prepared.optimizer
    settings: list[dict[str, Any]] = []
    if training.schedule.is_made_for_another(schedule["total"]):
        settings = training.schedule.catch_up(training.state.step, run.history.num_epochs)
        run.announce(
            f"The schedule was made for {schedule['total']} {training.config.schedule_every}s and is now made for "
            f"{training.schedule.total}: the learning rate goes on as if it had been so from the start."
        )
    _restore_optimizer(run, snapshot.state["optimizer"], snapshot.tensors.get(_OPTIMIZER, {}))
    if not settings:
        training.schedule.load_state_dict(schedule)
    for group, own in zip(optimizer.param_groups, settings, strict=False):  # type: ignore[union-attr]
        group.update(own)


def _restore_optimizer(run: Run, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    optimizer: Optimizer = run.training.prepared.optimizer  # type: ignore[assignment]
    model = run.training.prepared.plain
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    settings = [
        unpack({key: value for key, value in group.items() if key != "params"}, tensors)
        for group in saved["param_groups"]
    ]
    for group, own in zip(optimizer.param_groups, settings, strict=False):  # a newer torch may have more of them
        own |= {key: one for key, one in group.items() if key != "params" and key not in own}
    for group, own in list(zip(saved["param_groups"], settings, strict=True))[len(optimizer.param_groups) :]:
        optimizer.add_param_group({"params": [parameters[name] for name in group["params"]]} | own)
    of_program = [{key: one for key, one in group.items() if callable(one)} for group in optimizer.param_groups]
    if "own" in saved:
        _restore_own_form(optimizer, saved["own"], tensors)
    else:
        _restore_torchs_form(optimizer, model, saved["state"], settings, tensors)
    for group, functions in zip(optimizer.param_groups, of_program, strict=True):
        group.update(functions)


def _restore_torchs_form(
    optimizer: Optimizer,
    model: nn.Module,
    state: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
) -> None:
    place = itertools.count()
    groups = [
        {**own, "params": [next(place) for _ in group["params"]]}
        for group, own in zip(optimizer.param_groups, settings, strict=True)
    ]
    # Not with the states: torch would cast them to the dtype of their parameter.
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    for names, group in zip(_names_by_group(optimizer, model), optimizer.param_groups, strict=True):
        on_device = counts_on_device(group)
        for name, parameter in zip(names, group["params"], strict=True):
            if name in state:
                optimizer.state[parameter] = {
                    key: _placed(value, parameter, key != "step" or on_device)
                    for key, value in unpack(state[name], tensors).items()
                }


def _restore_own_form(optimizer: Optimizer, saved: Any, tensors: Mapping[str, Tensor]) -> None:
    """Let an optimizer take back the state that it has given.

    Raises:
        CheckpointError: It has not: what it gives now is something else.
    """
    optimizer.load_state_dict(unpack(saved, {name: tensor.clone() for name, tensor in tensors.items()}))
    found: dict[str, Tensor] = {}
    is_same = pack(optimizer.state_dict(), found, "own") == saved
    wrong = [name for name, tensor in found.items() if not same_bits(tensor, tensors.get(name))]
    if wrong or not is_same:
        raise CheckpointError(
            f"The optimizer {type(optimizer).__name__} does not take back the state that it gave: after loading it "
            f"state_dict gives another {wrong[0] if wrong else 'form'}. A run with it cannot be resumed."
        )


def _placed(value: Any, parameter: Tensor, on_device: bool) -> Any:
    """Return a state with memory of its own where the optimizer keeps it.

    One of the parameter's shape also gets its strides, which decide in what order a norm of it adds.
    """
    if isinstance(value, Tensor):
        like = parameter.detach() if parameter.shape == value.shape else value
        device = parameter.device if on_device else value.device
        return torch.empty_like(like, dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, dict):
        return {key: _placed(one, parameter, on_device) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(one, parameter, on_device) for one in value)
    return value


def _restore_callbacks(run: Run, snapshot: Snapshot, callbacks: Sequence[Callback]) -> None:
    with _understood(f"The checkpoint of step {snapshot.step}"):
        states = dict(unpack(snapshot.state["callbacks"], snapshot.tensors.get(_PROGRESS, {})))
    stateful = _stateful(callbacks)
    for name, state in states.items():
        if name in stateful:
            stateful[name].load_state_dict(state)
        else:
            warn(f"The checkpoint has a state of callback {name}, which this run does not have.", stacklevel=2)


def _announce_changes(before: Mapping[str, Any], now: Mapping[str, Any], announce: Callable[[str], None]) -> None:
    changes = [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    if changes:
        announce(f"Changed since the checkpoint: {', '.join(changes)}.")
