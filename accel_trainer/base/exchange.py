"""What the processes tell each other from host to host: small facts and Python objects, past the devices."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed

_ON_HOSTS = ("gloo", "mpi")


def host_group() -> torch.distributed.ProcessGroup | None:
    """Return the processes as a group that exchanges host memory; `None` stands for the default group, if it does that.

    The first call makes the group: all processes call it at the same place.
    """
    if torch.distributed.get_backend() in _ON_HOSTS:
        return None
    return _beside(torch.distributed.group.WORLD)


@lru_cache(maxsize=1)
def _beside(group: object) -> torch.distributed.ProcessGroup:
    beside: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo")
    return beside


def any_process(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set on any process, without waiting for a device."""
    counts = torch.tensor(flags, dtype=torch.uint8)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX, host_group())
    return [bool(count) for count in counts.tolist()]


def meet() -> None:
    """Wait for the other processes; on the host, whatever devices there are."""
    any_process([False])


def gather_objects(mine: Any) -> list[Any]:
    """Return what each process gives, on all of them; it travels pickled."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine, group=host_group())
    return everyone


def gather_on_main(mine: Any) -> list[Any]:
    """Return what each process gives, on the main process; an empty list on the others."""
    if not torch.distributed.is_initialized():
        return [mine]
    is_main = torch.distributed.get_rank() == 0
    everyone: list[Any] = [None] * torch.distributed.get_world_size() if is_main else []
    torch.distributed.gather_object(mine, everyone if is_main else None, dst=0, group=host_group())
    return everyone


def share_object(mine: Any) -> Any:
    """Return what the main process gives, on all of them; it travels pickled."""
    if not torch.distributed.is_initialized():
        return mine
    shared = [mine]
    torch.distributed.broadcast_object_list(shared, src=0, group=host_group())
    return shared[0]


@atexit.register
def _leave_groups() -> None:
    """End the groups before the interpreter does.

    Torch leaves this to its users, who rarely know. A thread of gloo that still lets go of the last exchange's tensors
    while Python is taken down aborts the process, after a training that went well; NCCL warns of what it may leak.
    After an error other processes may still wait in an exchange, and so would this.
    """
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        gc.collect()  # of what still holds a group in a circle
        torch.distributed.destroy_process_group()  # the default one, and those beside it
