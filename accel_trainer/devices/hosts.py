"""How the processes of a launch find each other: under a name that only they have, and by their hosts."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.constants import default_pg_timeout

from ..base.exchange import gather_objects
from ..errors import HardwareError

# --- meeting ----------------------------------------------------------------------------------------------------------


@contextmanager
def meeting_anew() -> Iterator[None]:
    """Let the group of processes that is made in this block meet under a name of its own.

    The store of an elastic launcher outlives the processes that it starts again: a new process would find the addresses
    of those that have ended. The number of the attempt is no name for the new ones, since each host counts its own.
    """
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not has_agent or int(os.environ.get("WORLD_SIZE") or 1) == 1 or torch.distributed.is_initialized():
        yield
        return
    initialize = torch.distributed.init_process_group

    def initialize_under_name(backend: Any = None, init_method: Any = None, **options: Any) -> None:
        if init_method is not None or options.get("store") is not None:  # where the user lets them meet
            initialize(backend, init_method, **options)
            return
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        seconds = (options.get("timeout") or default_pg_timeout).total_seconds()
        store = PrefixStore(*_agree_on_name(rank, size, seconds))
        initialize(backend, **{**options, "store": store, "rank": rank, "world_size": size})

    torch.distributed.init_process_group = initialize_under_name  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.distributed.init_process_group = initialize


def _agree_on_name(rank: int, size: int, seconds: float) -> tuple[str, Any]:
    """Return a new name from the main process, the same on these very processes, and the launcher's store."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=seconds))
        name = _name_asked_for(store, rank) if rank else _name_given(store, size, seconds)
    except torch.distributed.DistError as error:
        raise HardwareError(f"Process {rank} has not met the others within {seconds:.0f} seconds: {error}") from error
    return f"accel_trainer/{name}", store


def _name_asked_for(store: Any, rank: int) -> str:
    """Ask the main process for a name. The question is new, so an answer to it is no old one."""
    question = uuid.uuid4().hex
    store.set(f"accel_trainer/asks/{rank}", question)
    name: str = store.get(f"accel_trainer/answers/{question}").decode()
    store.add(f"accel_trainer/joined/{name}", 1)
    return name


def _name_given(store: Any, size: int, seconds: float) -> str:
    """Answer the questions of the others, and those that an earlier attempt has left, until all have joined."""
    name, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    answered: set[bytes] = set()
    while store.add(f"accel_trainer/joined/{name}", 0) < size - 1:
        asked = set(store.multi_get([f"accel_trainer/asks/{rank}" for rank in range(1, size)]))
        for question in asked - answered:
            store.set(f"accel_trainer/answers/{question.decode()}", name)
        answered |= asked
        if time.monotonic() > deadline:
            raise torch.distributed.DistStoreError("not all have asked")
        time.sleep(0.02)
    return name


# --- hosts ------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a process stands among those of a run.

    Attributes:
        process: Its number, 0-based.
        hosts: The processes of each host, in ascending order; the hosts in the order of their first ones, the leaders.
        pids: The operating system's number of each process of the same host.
        path: Where files that the processes of a host share may begin to be called; `None` where there is no place.
    """

    process: int
    hosts: tuple[tuple[int, ...], ...]
    pids: tuple[int, ...] = ()
    path: str | None = None

    @property
    def host(self) -> int:
        """Index of the host of this process."""
        return next(index for index, processes in enumerate(self.hosts) if self.process in processes)

    @property
    def neighbours(self) -> tuple[int, ...]:
        """All processes of the same host."""
        return self.hosts[self.host]

    @property
    def member(self) -> int:
        """Index of this process among those of its host."""
        return self.neighbours.index(self.process)

    @property
    def leads(self) -> bool:
        """Whether this process speaks for its host."""
        return self.member == 0

    @property
    def neighbour(self) -> tuple[int, int, int] | None:
        """Index, number and pid of the process before this one on the host, of the last for the first; `None` alone."""
        if len(self.pids) < 2:
            return None
        member = (self.member - 1) % len(self.pids)
        return member, self.neighbours[member], self.pids[member]

    @property
    def name(self) -> str:
        """How this process is called in a message."""
        return f"process {self.process} of {sum(map(len, self.hosts))}"

    def name_of(self, host: int) -> str:
        """Return how a host is called in a message."""
        first, *others = self.hosts[host]
        return f"Host {host} ({f'processes {first} to {others[-1]}' if others else f'process {first}'})"


def place_of(process: int) -> Place:
    """Return where a process stands; the first call for a group of processes is made by all of them."""
    world: Any = torch.distributed.group.WORLD
    if world not in _places:
        _places[world] = _find_place(process)
    return _places[world]


_places: WeakKeyDictionary[Any, Place] = WeakKeyDictionary()  # by group, whose threads end with it


def _find_place(process: int) -> Place:
    everyone = gather_objects((_identity_of_host(), os.getpid(), _new_path()))
    by_host: dict[str, list[int]] = {}
    for number, (host, _, _) in enumerate(everyone):
        by_host.setdefault(host, []).append(number)
    neighbours = by_host[everyone[process][0]]
    pids = tuple(everyone[other][1] for other in neighbours)
    return Place(process, tuple(map(tuple, by_host.values())), pids, everyone[neighbours[0]][2])


def _identity_of_host() -> str:
    """Return what processes have in common that see the same files, processes and loopback."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts += [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("net", "pid", "mnt")]
    return " ".join(parts)


def _new_path() -> str | None:
    """Return the beginning of names of files that nobody has, in memory if possible."""
    folders = ("/dev/shm", tempfile.gettempdir())
    for folder in folders:
        with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # more than it will hold
            file.flush()
            return os.path.join(folder, f"accel_trainer-{uuid.uuid4().hex}")
    return None
