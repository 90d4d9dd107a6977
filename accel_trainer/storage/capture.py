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
from .checkpoints import Snapshot
from .optimizer_state import optimizer_state, restore_optimizer
from .weights import buffers_beside, checked_state, copy_into, plain_name, split_aliases

OPTIMIZER, PROGRESS = "optimizer.safetensors", "progress.safetensors"
_TOLD = ("num_micro_batches", "bitwise", "mixed_precision", "compile", "num_threads", "patience", "min_delta")


def capture(
    training: Training,
    history: History,
    beside: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    callbacks: Sequence[Callback],
) -> Snapshot | None:
    """Return what a checkpoint of this moment holds, no copies; `None` where weights are not finite.

    All processes call it between two batches; only the main process's result counts.

    Args:
        training: The run.
        history: What it has recorded.
        beside: The buffers of the best epoch that its file leaves out.
        identity: What makes the run the one that it is.
        callbacks: The user's.
    """
    state, model = training.state, training.prepared.user_model
    if not training.finite.is_sound():
        if training.hardware.is_main and training.config.on_nonfinite != "raise":  # the error is on its way then
            warn("The weights are not finite: no checkpoint is made of them.", stacklevel=2)
        return None
    losses = training.losses.sums() if state.epoch > history.num_epochs else None
    if not training.hardware.is_main:
        return None
    weights, aliases = split_aliases(checked_state(model))
    of_optimizer: dict[str, Tensor] = {}
    progress = dict(buffers_beside(model, training.objective.modules))
    progress |= {f"best/{name}": buffer for name, buffer in beside.items()}
    scaler = training.hardware.accelerator.scaler
    content = {
        "schedule": schedule_state(training),
        "scaler": None if scaler is None else scaler.state_dict(),
        "callbacks": {name: callback.state_dict() for name, callback in stateful(callbacks).items()},
        "losses": losses,
        "norms": training.norms.read(),
        "seconds": training.clock.spent(training.loader.seconds),
        "identity": dict(identity),
        "run": asdict(state),
        "told": layout_and_choices(training),
        "num_micro_batches": _found_by_memory(training),
        "evaluating": [plain_name(name) for name, module in model.named_modules() if not module.training],
        "frozen": [plain_name(name) for name, one in model.named_parameters() if not one.requires_grad],
    }
    packed = {name: pack(value, progress, name) for name, value in content.items()}
    packed["optimizer"] = optimizer_state(training.prepared.optimizer, model, of_optimizer)  # type: ignore[arg-type]
    return Snapshot(
        step=state.step,
        tensors={
            "model.safetensors": weights,
            OPTIMIZER: of_optimizer,
            **({PROGRESS: progress} if progress else {}),
        },
        metadata={"aliases": aliases, "step": state.step, "epoch": state.epoch},
        state=packed,
    )


def schedule_state(training: Training) -> dict[str, Any]:
    """Return the state of the schedule, and the learning rate of the last update."""
    own = {"total": None, "scheduler": None} if training.schedule is None else training.schedule.state_dict()
    return own | {"learning_rate": training.prepared.learning_rate}


def layout_and_choices(training: Training) -> dict[str, Any]:
    """Return what may change when a run goes on, and is announced then."""
    config = training.config
    return {"num_processes": training.hardware.num_processes} | {name: getattr(config, name) for name in _TOLD}


def _found_by_memory(training: Training) -> int | None:
    """Return the number of micro-batches where it was found by running out of memory."""
    number = training.loader.layout.num_micro_batches
    default = training.hardware.layout(training.config.num_micro_batches).num_micro_batches
    return number if number > default else None


def stateful(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Return the callbacks that have a state, by class and place among those of the class."""
    found: dict[str, Any] = {}
    for callback in callbacks:
        if hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict"):
            name = type(callback).__qualname__
            found[f"{name} {sum(key.rpartition(' ')[0] == name for key in found) + 1}"] = callback
    return found


def restore(training: Training, history: History, snapshot: Snapshot, announce: Callable[[str], None]) -> None:
    """Put a run where the checkpoint was made; every process calls it."""
    saved = snapshot.state
    progress = snapshot.tensors.get(PROGRESS, {})
    content = {name: unpack(saved[name], progress) for name in saved if name not in ("optimizer", "callbacks")}
    _restore_state(training.state, content["run"])
    _restore_model(training.prepared.user_model, snapshot.tensors["model.safetensors"], progress, content["frozen"])
    for name, module in training.prepared.user_model.named_modules():
        module.training = plain_name(name) not in content["evaluating"]
    for number, loss in enumerate(training.objective.modules):
        _restore_buffers(loss, under(f"loss {number}/", progress))
    _restore_schedule_and_optimizer(training, history, content["schedule"], snapshot, announce)
    if content["scaler"] is not None and training.hardware.accelerator.scaler is not None:
        training.hardware.accelerator.scaler.load_state_dict(content["scaler"])
    if content["losses"] is not None:
        training.losses.restore(content["losses"])
    norm_sum, num_norms = content["norms"]
    training.norms.restore(float(norm_sum), int(num_norms))
    training.clock.restore(content["seconds"])
    found = content["num_micro_batches"]
    layout = training.loader.layout
    if found is not None and training.loader.may_recut and found > layout.num_micro_batches:
        training.loader.use_layout(layout._replace(num_micro_batches=int(found)))


def _restore_state(state: TrainState, saved: Mapping[str, Any]) -> None:
    values: dict[str, Any] = {}
    for one in fields(state):
        value = saved[one.name]
        kinds = (int, float, str) if one.default is None else (type(one.default),)
        is_known = (value is None and one.default is None) or (type(value) in kinds and _is_finite_in_64_bits(value))
        if not is_known or (type(value) is int and value < 0):
            raise ValueError(f"{one.name} is {value!r}")
        values[one.name] = value
    state.restore(values)


def _is_finite_in_64_bits(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 2**63


def _restore_model(
    model: nn.Module, weights: Mapping[str, Tensor], progress: Mapping[str, Tensor], frozen: Sequence[str]
) -> None:
    _restore_buffers(model, {**weights, **under("buffers/", progress)})
    copy_into(model, weights)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(plain_name(name) not in frozen)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@torch.no_grad()
def _restore_buffers(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    buffers = {plain_name(name): (name, buffer) for name, buffer in root.named_buffers()}
    unfilled = unfilled_buffers(root)
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


def unfilled_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
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


def _restore_schedule_and_optimizer(
    training: Training,
    history: History,
    state: dict[str, Any],
    snapshot: Snapshot,
    announce: Callable[[str], None],
) -> None:
    schedule, settings = training.schedule, []
    if schedule is not None and schedule.is_made_for_another(state["total"]):
        settings = schedule.catch_up(training.state.step, history.num_epochs)
        training.prepared.note_learning_rate()
        announce(
            f"The schedule was made for {state['total']} {training.config.schedule_every}s and is now made for "
            f"{schedule.total}: the learning rate goes on as if it had been so from the start."
        )
    restore_optimizer(
        training.prepared.optimizer,  # type: ignore[arg-type]
        training.prepared.user_model,
        snapshot.state["optimizer"],
        snapshot.tensors.get(OPTIMIZER, {}),
    )
    if not settings:
        training.prepared.note_learning_rate(state["learning_rate"])
        if schedule is not None:
            schedule.load_state_dict(state)
    for group, own in zip(training.prepared.optimizer.param_groups, settings, strict=False):  # type: ignore[union-attr]
        group.update(own)
