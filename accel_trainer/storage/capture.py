"""What a checkpoint holds of a run: `capture` and `restore`, side by side.

Left out is all that is a function of the position: the order of the samples and the generators.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..base.codec import pack, unpack
from ..base.console import warn
from ..callbacks import Callback
from ..history import History
from ..numbers.buffers import is_plain
from ..run import Training
from ..state import TrainState
from .checkpoints import MODEL, OPTIMIZER, PROGRESS, Snapshot
from .optimizer_state import optimizer_state, restore_optimizer
from .shards import own_shard
from .weights import FrozenWeights, buffers_beside, checked_state, copy_into, plain_name, split_aliases, without

_CHOICES = ("num_micro_batches", "bitwise", "mixed_precision", "compile", "num_threads", "patience", "min_delta")


def capture(
    training: Training,
    history: History,
    beside: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    callbacks: Sequence[Callback],
    frozen: FrozenWeights,
) -> Snapshot | None:
    """Return what a checkpoint of this moment holds, no copies; `None` where weights are not finite.

    All processes call it between two batches; only the main process's result counts, unless the model is divided.
    `beside` holds the buffers of the best epoch that the file of the best weights leaves out; `frozen` what the files
    leave out of the weights.
    """
    state, model = training.state, training.prepared.user_model
    if not training.finite.is_sound():
        if training.hardware.is_main and training.config.on_nonfinite != "raise":  # the error is on its way then
            warn("The weights are not finite: no checkpoint is made of them.", stacklevel=2)
        return None
    losses = training.losses.sums() if state.epoch > history.num_epochs else None
    stream = training.loader.sharded
    stream_states = None if stream is None else stream.states_at(state.data_pass, state.position)
    is_divided = training.prepared.is_divided
    if not (training.hardware.is_main or is_divided):
        return None
    left_out = frozen.digests(model)
    weights, aliases = split_aliases(without(checked_state(model), left_out), model)
    progress = buffers_beside(model, training.objective.modules)
    progress |= {f"best/{name}": buffer for name, buffer in beside.items()}
    scaler = training.hardware.accelerator.scaler
    number = training.loader.layout.num_micro_batches
    is_recut = number > training.hardware.layout(training.config.num_micro_batches).num_micro_batches
    content = {
        "schedule": schedule_state(training),
        "scaler": None if scaler is None else scaler.state_dict(),
        "callbacks": {name: callback.state_dict() for name, callback in stateful(callbacks).items()},
        "losses": None if losses is None else {"sums": losses, "recent": training.losses.recent},
        "norms": training.norms.read(),
        "seconds": training.clock.spent(training.loader.seconds),
        "identity": dict(identity),
        "run": asdict(state),
        "stream": stream_states,
        "left_out": left_out,
        "told": layout_and_choices(training),
        "num_micro_batches": number if is_recut else None,  # found by running out of memory
        "evaluating": [plain_name(name) for name, module in model.named_modules() if not module.training],
        "frozen": [plain_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }
    packed = {name: pack(value, progress, name) for name, value in content.items()}
    tensors = {MODEL: weights, OPTIMIZER: {}}
    packed["optimizer"] = optimizer_state(training.prepared.optimizer, model, tensors[OPTIMIZER])  # type: ignore[arg-type]
    if progress:
        tensors[PROGRESS] = progress
    metadata = {"aliases": aliases, "step": state.step, "epoch": state.epoch, "left_out": left_out}
    shard = None
    if is_divided:
        tensors, shard = own_shard(tensors, training.hardware.process)
    return Snapshot(state.step, tensors, metadata, packed, shard)


def schedule_state(training: Training) -> dict[str, Any]:
    """Return the state of the schedule, and the learning rate of the last update."""
    state = {"total": None, "scheduler": None} if training.schedule is None else training.schedule.state_dict()
    return state | {"learning_rate": training.prepared.learning_rate}


def layout_and_choices(training: Training) -> dict[str, Any]:
    """Return what may change when a run goes on, and is announced then."""
    choices = {name: getattr(training.config, name) for name in _CHOICES}
    return {"num_processes": training.hardware.num_processes, **choices}


def stateful(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Return the callbacks that have a state, by class and number among those of the class."""
    found: dict[str, Any] = {}
    for callback in callbacks:
        if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
            name = type(callback).__qualname__
            found[f"{name} {sum(key.rpartition(' ')[0] == name for key in found) + 1}"] = callback
    return found


def restore(training: Training, history: History, snapshot: Snapshot, announce: Callable[[str], None]) -> None:
    """Put a run where the checkpoint was made; every process calls it."""
    saved, model = snapshot.state, training.prepared.user_model
    weights, progress = snapshot.tensors[MODEL], snapshot.tensors.get(PROGRESS, {})
    content = {name: unpack(saved[name], progress) for name in saved if name not in ("optimizer", "callbacks")}
    _restore_state(training.state, content["run"])
    _restore_buffers(model, {**weights, **under("buffers/", progress)})
    copy_into(model, weights)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plain_name(name) not in content["frozen"])
    for name, module in model.named_modules():
        module.training = plain_name(name) not in content["evaluating"]
    for number, loss in enumerate(training.objective.modules):
        _restore_buffers(loss, under(f"loss {number}/", progress))
    _restore_schedule_and_optimizer(training, history, content["schedule"], snapshot, announce)
    if content["scaler"] is not None and training.hardware.accelerator.scaler is not None:
        training.hardware.accelerator.scaler.load_state_dict(content["scaler"])
    if isinstance(losses := content["losses"], list):  # of a checkpoint of version 0.1
        losses = {"sums": dict(zip(("samples", "loss", "weight"), losses, strict=True)), "recent": (0.0, 0.0)}
    if losses is not None:
        training.losses.restore(losses["sums"], losses["recent"])
    norm_sum, num_norms = content["norms"]
    training.norms.restore(float(norm_sum), int(num_norms))
    training.clock.restore(content["seconds"])
    states = content.get("stream")
    if states is not None and training.loader.sharded is not None:
        training.loader.sharded.go_on_from(training.state.data_pass, training.state.position, states)
    number, layout = content["num_micro_batches"], training.loader.layout
    if number is not None and training.loader.may_recut and number > layout.num_micro_batches:
        training.loader.use_layout(layout._replace(num_micro_batches=int(number)))


def _restore_state(state: TrainState, saved: Mapping[str, Any]) -> None:
    for field in fields(state):
        value = saved[field.name]
        kinds = (int, float, str, type(None)) if field.default is None else (type(field.default),)
        if type(value) not in kinds or (type(value) is int and not 0 <= value < 2**63):
            raise ValueError(f"{field.name} is {value!r}")
    state.restore({field.name: saved[field.name] for field in fields(state)})


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def buffer_owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return module and attribute of each buffer by its name; also of those that a first forward fills."""
    return {
        plain_name(f"{path}.{name}" if path else name): (module, name)
        for path, module in model.named_modules()
        for name in module._buffers
    }


@torch.no_grad()
def _restore_buffers(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, (module, attribute) in buffer_owners(root).items():
        tensor, buffer = tensors.get(name), module._buffers[attribute]
        if tensor is None:
            continue
        if buffer is not None and buffer.shape == tensor.shape and is_plain(buffer):
            buffer.copy_(tensor)
        else:  # not filled yet, a cache that had grown, a view that repeats elements
            like = next(itertools.chain(root.parameters(), root.buffers()), tensor) if buffer is None else buffer
            module._buffers[attribute] = tensor.to(like.device).clone()


def _restore_schedule_and_optimizer(
    training: Training,
    history: History,
    state: dict[str, Any],
    snapshot: Snapshot,
    announce: Callable[[str], None],
) -> None:
    prepared, schedule, settings = training.prepared, training.schedule, []
    optimizer: torch.optim.Optimizer = prepared.optimizer  # type: ignore[assignment]
    if schedule is not None and schedule.is_made_for_another(state["total"]):
        settings = schedule.catch_up(training.state.step, history.num_epochs)
        prepared.note_learning_rate()
        announce(
            f"The schedule was made for {state['total']} {training.config.schedule_every}s and is now made for "
            f"{schedule.total}: the learning rate goes on as if it had been so from the start."
        )
    restore_optimizer(optimizer, prepared.user_model, snapshot.state["optimizer"], snapshot.tensors.get(OPTIMIZER, {}))
    if not settings:
        prepared.note_learning_rate(state["learning_rate"])
        if schedule is not None:
            schedule.load_state_dict(state)
    for group, changed in zip(optimizer.param_groups, settings, strict=False):
        group.update(changed)
