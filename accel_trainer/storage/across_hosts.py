"""Checkpoints that hosts bring to each other where they share no disk.

A scheduler that starts a job again may give the main process to another host: the newest checkpoint is then copied to
its disk. And a host that does not see the checkpoint from which a run goes on gets a copy for the time of the start, of
which its processes map the files: so it is in the memory of a host once, however many they are.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed

from ..base.exchange import gather_objects, meet, share_object
from ..devices.hardware import Hardware
from ..devices.hosts import place_of
from .checkpoints import EPOCHS, fault_of, files_of, read_json, steps_in
from .files import flush
from .run_folder import RunFolder

_BLOCK = 2**26  # bytes that are sent at once
_BESIDE = ("steps.jsonl", "trackers.json", EPOCHS)  # what a run that goes on needs of the run folder

Check = Callable[[Mapping[str, Any], str], Mapping[str, Any]]


class _Offer(NamedTuple):
    """The newest whole checkpoint of a host."""

    step: int
    path: Path
    host: str
    state: Mapping[str, Any]
    files: list[str]  # of the checkpoint
    beside: list[str]  # of the run folder


def bring_newest(
    run_dir: Path, folder: RunFolder | None, hardware: Hardware, check: Check, announce: Callable[[str], None]
) -> None:
    """Copy the newest checkpoint of any host to the main process's disk, unless it is there; all processes call it.

    Args:
        run_dir: The run folder, as this process sees it.
        folder: The same on the main process, `None` on the others. It goes on from what was brought.
        hardware: Of this process.
        check: Returns the identity of a run from a checkpoint's state and its name, or refuses it as another run's.
        announce: Says what was brought.

    Raises:
        CheckpointError: The newest checkpoint is of another run.
    """
    entries = steps_in(run_dir / "checkpoints") if place_of(hardware.process).leads else []
    resumed = None if folder is None else folder.resumed
    step_of_main = next((step for step, path in entries if path == resumed), -1)
    step_of_main, of_main = share_object((step_of_main, [_marks_of(path) for _, path in entries]))
    candidates = [entry for entry in entries if entry[0] > step_of_main and _marks_of(entry[1]) not in of_main]
    offers = gather_objects(_offer(run_dir, candidates))
    sender, offer = max(enumerate(offers), key=lambda one: -1 if one[1] is None else one[1].step)
    if offer is None:
        return
    has = "none" if step_of_main < 0 else f"step {step_of_main}"
    source = f"{offer.path} of process {sender} on {offer.host} (the main process has {has})"
    identity = hardware.from_main(lambda: check(offer.state, source))
    announce(f"Process {sender} has the newest checkpoint: {source} is copied to the main process.")
    if folder is None:
        _spread(sender, [0], [offer.path / name for name in offer.files] + [run_dir / name for name in offer.beside])
        return
    with folder.receiving(offer.path.name, identity) as part:
        _spread(sender, [0], [part / name for name in offer.files] + [folder.path / name for name in offer.beside])


def _offer(run_dir: Path, candidates: Sequence[tuple[int, Path]]) -> _Offer | None:
    """Return the newest whole one of some checkpoints, the newest first."""
    step, path = next(((step, path) for step, path in candidates if fault_of(path) is None), (None, None))
    if step is None or path is None:
        return None
    beside = [str(found.relative_to(run_dir)) for pattern in _BESIDE for found in run_dir.glob(pattern)]
    return _Offer(step, path, socket.gethostname(), read_json(path / "state.json"), files_of(path), beside)


@contextmanager
def at_hand(source: Path, run_dir: Path, hardware: Hardware, announce: Callable[[str], None]) -> Iterator[Path]:
    """Give the folder in which this process finds the main process's checkpoint; all processes use it.

    Where a host does not see that folder it is a copy, which is removed once the block has opened its files.

    Args:
        source: The checkpoint, as the main process sees it.
        run_dir: The run folder, as this process sees it.
        hardware: Of this process.
        announce: Says which processes do not see it.
    """
    if hardware.num_processes == 1:
        yield source
        return
    place = place_of(hardware.process)
    here = source if place.host == 0 else run_dir / "checkpoints" / source.name
    marks, names = share_object((_marks_of(source), files_of(source)) if hardware.is_main else None)
    sees = gather_objects(place.host == 0 or _marks_of(here) == marks)
    blind = [processes for processes in place.hosts if not all(sees[process] for process in processes)]
    if not blind:
        yield here
        return
    unseeing = [process for process, has_seen in enumerate(sees) if not has_seen]
    announce(f"Processes {unseeing} do not see {source}: it is sent to their hosts.")
    receivers = [leader for leader, *_ in blind]
    copy = tempfile.mkdtemp(prefix="accel_trainer-") if place.process in receivers else None
    _spread(0, receivers, [Path(copy or source) / name for name in names])
    copies = gather_objects(copy)
    try:
        yield Path(copies[place.neighbours[0]] or here)
        meet()
    finally:
        if copy is not None:
            shutil.rmtree(copy, ignore_errors=True)


def _marks_of(path: Path) -> list[tuple[str, int, int, int]]:
    """Return what is the same of a checkpoint on the same disk only: number, size and time of each of its files."""
    found = []
    with suppress(OSError, ValueError, LookupError):
        for name in files_of(path):
            status = os.stat(path / name)
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def _spread(sender: int, receivers: Sequence[int], paths: Sequence[Path]) -> None:
    """Copy files of one process's disk to those of others; all processes call it, each with its own paths."""
    process, members = torch.distributed.get_rank(), [sender, *receivers]
    group = torch.distributed.new_group(members, backend="gloo")
    if process not in members:
        return
    for path in paths:
        size = torch.tensor(path.stat().st_size if process == sender else 0)
        torch.distributed.broadcast(size, sender, group)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb" if process == sender else "wb") as file:
            for start in range(0, int(size), _BLOCK):
                block = torch.empty(min(_BLOCK, int(size) - start), dtype=torch.uint8)
                if process == sender:
                    file.readinto(block.numpy())  # type: ignore[attr-defined]
                torch.distributed.broadcast(block, sender, group)
                if process != sender:
                    file.write(block.numpy().data)
        if process != sender:
            flush(path)
    torch.distributed.destroy_process_group(group)
