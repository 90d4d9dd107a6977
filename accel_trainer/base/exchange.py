"""Small facts and Python objects that the processes send each other from host to host, past the devices."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed


def host_group() -> torch.distributed.ProcessGroup | None:
    """Return a group of all processes that exchanges host memory; `None` for the default group, if it does that.

    The first call makes the group: all processes call it at the same place.
    """
    return None if torch.distributed.get_backend() in ("gloo", "mpi") else _host_group_of(torch.distributed.group.WORLD)


@lru_cache(maxsize=1)
def _host_group_of(world: object) -> torch.distributed.ProcessGroup:
    return torch.distributed.new_group(backend="gloo")  # type: ignore[no-any-return]


def any_process(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set on any process, without waiting for a device."""
    counts = torch.tensor(flags, dtype=torch.uint8)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX, host_group())
    return [bool(count) for count in counts.tolist()]


def meet() -> None:
    """Wait for the other processes; on the host, whatever devices there are."""
    any_process([False])


def gather_objects(mine: Any) -> list[Any]:
    """Return the object of each process, on all of them; objects travel pickled."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine, group=host_group())
    return everyone


def gather_on_main(mine: Any) -> list[Any]:
    """Return the object of each process, on the main process; an empty list on the others."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyone = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(mine, everyone, dst=0, group=host_group())
    return everyone or []


def scatter_from_main(parts: list[Any]) -> Any:
    """Return this process's entry of the list of the main process, which has one for each; they travel pickled."""
    received: list[Any] = [None]
    torch.distributed.scatter_object_list(received, parts, src=0, group=host_group())
    return received[0]


def share_object(mine: Any, source: int = 0) -> Any:
    """Return the object of one process, the main one unless said, on all of them; it travels pickled."""
    if not torch.distributed.is_initialized():
        return mine
    shared = [mine]
    torch.distributed.broadcast_object_list(shared, src=source, group=host_group())
    return shared[0]


@atexit.register
def _leave_groups() -> None:
    """End the groups before the interpreter does.

    Torch does not. A thread of gloo that frees the last exchange's tensors while Python is taken down aborts the
    process, after a training that went well. After an error this would wait for processes still in an exchange.
    """
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        gc.collect()  # of reference cycles that still hold a group
        torch.distributed.destroy_process_group()  # the default group, and that of the hosts
