"""What a launch, or the user, asks for: models that are divided over the processes, or refused kinds of parallelism.

It is read from Accelerate's plugin, whose `prepare` is not used: see `divided.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

from ..errors import HardwareError
from .hosts import place_of

Kind = Literal["full", "hybrid"]

_USES_FSDP, _USES_PARALLELISM = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"
_OTHERS = {"TP": "tensor parallelism", "CP": "context parallelism", "SP": "sequence parallelism"}


@dataclass(frozen=True)
class Sharding:
    """How a model is to be divided over the processes.

    Attributes:
        kind: `full` over all processes; `hybrid` over those of a host, with a replica on each.
        source: Where the wish comes from, in words.
        sizes: Replicas, and parts of each; `None` for what `kind` says.
        frees_after_forward: Whether a block's weights are given up after its forward and gathered again.
        offloads: Whether weights, gradients and optimizer state are kept in host memory.
        recomputes: Whether the activations within a block are computed again in the backward.
        blocks: Names of the classes of the blocks; empty to find them.
    """

    kind: Kind
    source: str
    sizes: tuple[int, int] | None = None
    frees_after_forward: bool = True
    offloads: bool = False
    recomputes: bool = False
    blocks: tuple[str, ...] = ()

    def mesh_sizes(self, process: int, num_processes: int) -> tuple[int, ...]:
        """Return the sizes of the mesh: parts, or replicas and parts of each."""
        sizes = self.sizes
        if sizes is None and self.kind == "hybrid" and num_processes > 1:
            hosts = place_of(process).hosts
            sizes_of_hosts = {len(processes) for processes in hosts}
            if len(sizes_of_hosts) > 1:
                raise HardwareError(
                    f"sharding='hybrid' puts a replica on each host, and the hosts have {sorted(sizes_of_hosts)} "
                    "processes. Start equally many on each, or use sharding='full'."
                )
            if list(chain(*hosts)) != list(range(num_processes)):
                raise HardwareError(
                    "sharding='hybrid' puts a replica on each host, and the processes are not numbered host by host: "
                    f"the first has {list(hosts[0])}. Let the launcher number them so (SLURM: "
                    "--distribution=block), or use sharding='full'."
                )
            sizes = len(hosts), len(hosts[0])
        if sizes is None or sizes == (1, num_processes):
            return (num_processes,)
        if sizes[1] < 2:
            raise HardwareError(
                "With replicas of one process each, every process would have the whole model. Use sharding='full', or "
                "leave sharding out."
            )
        if sizes[0] * sizes[1] != num_processes:
            raise HardwareError(
                f"The launch asks for {sizes[0]} replicas of {sizes[1]} processes each, and there are {num_processes}."
            )
        return sizes

    def check_precision(self, precision: str) -> None:
        """Refuse a precision in which a divided model does not train."""
        if precision == "fp16" and self.offloads:
            raise HardwareError(
                "fp16 with weights in host memory (fsdp_offload_params) is not supported: its gradients cannot be "
                "checked for overflow there. Use bf16, or leave out the offload."
            )
        if precision == "fp8":
            raise HardwareError("fp8 is not supported for a divided model, whose scales torch keeps whole. Use bf16.")

    def is_worthwhile(self, num_processes: int, precision: str) -> bool:
        """Return whether there is anything to do: with one process only where it computes in another way then."""
        return num_processes > 1 or torch.distributed.is_initialized() or self.offloads or precision != "no"


def asked_for(kind: Kind | None, accelerator: Accelerator | None = None) -> Sharding | None:
    """Return how the user, or the launch, wants models to be divided; `None` for models that are whole everywhere.

    Raises:
        HardwareError: FSDP1, or another kind of parallelism.
    """
    sizes = _sizes_of_launch(accelerator)
    plugin = getattr(accelerator.state, "fsdp_plugin", None) if accelerator is not None else None
    if plugin is None and is_asked_for():
        _check_version(os.environ.get("FSDP_VERSION") or "1")  # which of version 1 needs a GPU to be read at all
        try:
            plugin = FullyShardedDataParallelPlugin()
        except (ValueError, KeyError, RuntimeError) as error:
            raise HardwareError(f"Accelerate cannot read the launch's settings of FSDP (FSDP_...): {error}.") from error
    if plugin is None and kind is None:
        if sizes is not None:
            raise HardwareError(
                "The launch asks for a parallelism config without FSDP. Launch with --use_fsdp --fsdp_version 2, or "
                "set sharding='hybrid' in TrainConfig."
            )
        return None
    if kind == "full" and sizes is not None and sizes[0] > 1:
        raise HardwareError(
            f"sharding='full' divides the model over all processes, and the launch asks for {sizes[0]} replicas. Leave "
            "one of them out, or use sharding='hybrid'."
        )
    source = "argument" if kind is not None else "launcher"
    sharding = Sharding(kind or ("hybrid" if sizes is not None and sizes[0] > 1 else "full"), source, sizes)
    return sharding if plugin is None else _with_plugin(sharding, plugin)


def is_asked_for() -> bool:
    """Return whether the launch asks for FSDP."""
    return is_set(_USES_FSDP)


def is_set(variable: str) -> bool:
    """Return whether a variable of the environment says yes."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "on", "y", "t")


def _sizes_of_launch(accelerator: Accelerator | None) -> tuple[int, int] | None:
    """Return replicas and parts of Accelerate's parallelism config; refuse other kinds of parallelism."""
    config = None if accelerator is None else getattr(accelerator, "parallelism_config", None)
    if config is None and not is_set(_USES_PARALLELISM):
        return None

    def size_of(name: str) -> int:
        variable = f"PARALLELISM_CONFIG_{name}_SIZE"
        given = getattr(config, f"{name.lower()}_size", None) or os.environ.get(variable) or 1
        if not str(given).isdecimal() or not int(given):
            raise HardwareError(f"{variable} must be a whole number of at least 1, got {given!r}.")
        return int(given)

    for name, words in _OTHERS.items():
        if size_of(name) > 1:
            raise HardwareError(
                f"The launch asks for {words} ({name.lower()}_size={size_of(name)}), which is not supported: it needs "
                "changes inside the model. Divide the model over the processes instead (sharding='full')."
            )
    return size_of("DP_REPLICATE"), size_of("DP_SHARD")


def _check_version(version: str) -> None:
    if version != "2":
        raise HardwareError(
            f"The launch asks for FSDP version {version}, which is not supported. Launch with --fsdp_version 2 "
            "(fsdp_version: 2 in the yaml of accelerate config), or set sharding='full' in TrainConfig."
        )


def _with_plugin(sharding: Sharding, plugin: FullyShardedDataParallelPlugin) -> Sharding:
    _check_version(str(plugin.fsdp_version))
    if plugin.activation_checkpointing_offload:
        raise HardwareError("fsdp_activation_checkpointing_offload is not supported. Leave it out.")
    if plugin.ignored_modules is not None:
        raise HardwareError("fsdp_ignored_modules is not supported: every parameter is divided. Leave it out.")
    names = plugin.transformer_cls_names_to_wrap or ()
    return replace(
        sharding,
        frees_after_forward=bool(plugin.reshard_after_forward),
        offloads=bool(plugin.cpu_offload),
        recomputes=bool(plugin.activation_checkpointing),
        blocks=tuple(filter(None, (name.strip() for name in ([names] if isinstance(names, str) else names)))),
    )


@contextmanager
def unknown_to_accelerate() -> Iterator[None]:
    """Let an `Accelerator` be built in this block that leaves dividing the model to us: it keeps devices and launch."""
    hidden = {name: os.environ.pop(name) for name in (_USES_FSDP, _USES_PARALLELISM) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
