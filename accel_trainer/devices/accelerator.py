"""Build the one `Accelerator`, or refuse requests of the launch that would be ignored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from ..errors import HardwareError
from .sharding import is_asked_for, is_set, unknown_to_accelerate

_PLUGINS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def check_environment() -> None:
    """Refuse requests of the launch that would be ignored."""
    _check_accumulation(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or 1)
    for variable, plugin in _PLUGINS.items():
        if is_set(variable):
            _refuse_plugin(plugin)


def _check_accumulation(steps: int | str) -> None:
    if str(steps) != "1":
        raise HardwareError(
            f"gradient_accumulation_steps={steps} is not used here: the loader's batch is what one update sees, on any "
            "number of processes. Multiply batch_size by it and set num_micro_batches in TrainConfig to cut the batch."
        )


def _refuse_plugin(plugin: str) -> None:
    raise HardwareError(
        f"The launch asks for {plugin}, which is not supported (and which Accelerate silently ignores on CPU). Launch "
        "without it: one process per device, each with the whole model, or divide a model that is too large over the "
        "processes: --use_fsdp --fsdp_version 2, or sharding='full' in TrainConfig."
    )


def build_accelerator(mixed_precision: str | None, factory: Callable[[], Accelerator] | None) -> Accelerator:
    """Return the `Accelerator` of this process: from the user's function, or one for the hardware found."""
    if factory is not None:
        launch_asks = is_asked_for()
        accelerator = factory()
        if not isinstance(accelerator, Accelerator):
            raise TypeError(f"accelerator must be a function that returns an Accelerator, got {accelerator!r}.")
        if is_asked_for() and not launch_asks and accelerator.distributed_type != DistributedType.FSDP:
            raise HardwareError(
                "The Accelerator was given an FSDP plugin, which Accelerate drops here. Set sharding='full' in "
                "TrainConfig, or launch with --use_fsdp --fsdp_version 2."
            )
        return accelerator
    state = AcceleratorState._shared_state
    if mixed_precision is not None and state and state["_mixed_precision"] != mixed_precision:
        raise HardwareError(
            f"This process already has an Accelerator with mixed_precision={state['_mixed_precision']!r}, and "
            f"Accelerate cannot change it to {mixed_precision!r}. Use the same setting, or a fresh process."
        )
    # Without an accelerator Accelerate would start as many separate trainings as there are processes.
    cpu = int(os.environ.get("WORLD_SIZE") or 1) > 1 and not torch.accelerator.is_available()
    _check_precision(mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    with unknown_to_accelerate():
        return Accelerator(mixed_precision=mixed_precision, cpu=cpu)


_OF_LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


@contextmanager
def without_blank_variables() -> Iterator[None]:
    """Remove empty variables of a launcher, which Accelerate takes for broken numbers, and put them back."""
    blank = [name for name in _OF_LAUNCHERS if os.environ.get(name) == ""]
    for name in blank:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(dict.fromkeys(blank, ""))


def check_accelerator(accelerator: Accelerator, mixed_precision: str | None) -> None:
    """Refuse an `Accelerator` that would not do what was asked for."""
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size != accelerator.num_processes:
        raise HardwareError(
            f"The launcher started {world_size} processes, but Accelerate sees {accelerator.num_processes}: each would "
            "train alone. An Accelerator or PartialState made before the trainer, without cpu=True, does this: "
            "remove it, or set ACCELERATE_USE_CPU=true."
        )
    if world_size > 1 and accelerator.distributed_type == DistributedType.NO:
        raise HardwareError(
            f"The Accelerator knows of {world_size} processes and would not add up their gradients: each would train "
            'alone. backend="gloo" needs cpu=True beside it, or ACCELERATE_USE_CPU=true.'
        )
    _check_accumulation(accelerator.gradient_accumulation_steps)
    check_environment()  # Accelerate sets a variable for each plugin that the user's function has given it
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        _refuse_plugin(str(accelerator.distributed_type.value))
    if mixed_precision is not None and accelerator.mixed_precision != mixed_precision:
        raise HardwareError(
            f"mixed_precision is {mixed_precision!r} in TrainConfig and {accelerator.mixed_precision!r} in the "
            "Accelerator that was given: set it in one place."
        )
    _check_precision(accelerator.mixed_precision, accelerator.device.type)


def possible_precisions(device_type: str) -> list[str]:
    """Return the precisions in which a type of device can train here."""
    if device_type == "cpu":
        return ["no", "bf16"]
    if device_type == "cuda":
        return ["no", "fp16", *(["bf16"] if torch.cuda.is_bf16_supported() else []), "fp8"]
    return ["no", "fp16", "bf16"]


def _check_precision(precision: str, device_type: str | None = None) -> None:
    if device_type is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device_type = "cpu" if found is None or is_set("ACCELERATE_USE_CPU") else found.type
    possible = possible_precisions(device_type)
    if precision not in possible:
        raise HardwareError(
            f"Precision {precision!r} is impossible on {device_type.upper()} (Accelerate would silently train in full "
            f"precision). This machine can do: {', '.join(possible)}."
        )


def precision_source(mixed_precision: str | None, factory: object) -> str:
    """Return where the precision comes from, in words."""
    if mixed_precision is not None:
        return "argument"
    if factory is not None:
        return "your Accelerator"
    if AcceleratorState._shared_state:
        return "the Accelerator of this process"
    return "launcher or environment" if "ACCELERATE_MIXED_PRECISION" in os.environ else "default"


def device_source(device: torch.device) -> str:
    """Return why this device was chosen, in words."""
    if is_set("ACCELERATE_USE_CPU"):
        return "asked for by ACCELERATE_USE_CPU"
    return "no accelerator found" if device.type == "cpu" and not torch.accelerator.is_available() else "found"
