"""What all processes must be given alike: else they would wait for each other for ever, or train a patchwork."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..base.exchange import gather_objects
from ..config import TrainConfig
from ..numbers.schedules import settings_of
from .hardware import Hardware

# What each process, or its host, may have for itself, as a limit of time that counts from its own start.
_OWN = ("run_dir", "time_limit_seconds", "heartbeat_seconds", "verbose", "trackers", "project", "num_threads")


def check_alike(mine: Mapping[str, Any]) -> None:
    """Refuse (ValueError) values that are not the same on all processes, by their names; all call it."""
    everyone = gather_objects(dict(mine))
    for process, other in enumerate(everyone):
        for name in {**everyone[0], **other}:
            here, there = everyone[0].get(name), other.get(name)
            if here != there:
                raise ValueError(
                    f"{name} is {here!r} on process 0 and {there!r} on process {process}. Give all processes the same."
                )


def choices_of(config: TrainConfig, hardware: Hardware) -> dict[str, Any]:
    """Return what decides which steps a run takes, and what its processes exchange, by name."""
    choices = {name: value for name, value in asdict(config).items() if name not in _OWN}
    choices |= {"run_dir": None if config.run_dir is None else "given", "mixed_precision": hardware.precision}
    if config.bitwise:
        choices["num_threads"] = config.num_threads
    if hardware.sharding is None:
        return choices | {"sharding": None}
    details = asdict(hardware.sharding)
    kind, _ = details.pop("kind"), details.pop("source")
    return choices | {"sharding": kind} | {f"{name} of sharding": value for name, value in details.items()}


def plain_settings(optimizer: Optimizer) -> dict[str, Any]:
    """Return the settings of an optimizer's groups that are numbers or words, by name."""
    found = {}
    for number, group in enumerate(settings_of(optimizer)):
        for name, value in group.items():
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if value is None or isinstance(value, (bool, int, float, str, tuple)):
                found[f"the optimizer's {name} (group {number})"] = value
    return found
