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
from ..errors import CheckpointError
from .checkpoints import EPOCHS, fault_of, files_of, read_json, steps_in
from .files import flush
from .run_folder import RunFolder, ended_run, holds_ended_run

_BLOCK = 2**26  # bytes that are sent at once
# What a run that goes on needs of the run folder beside a checkpoint.
_BESIDE = ("steps.jsonl", "trackers.json", "best/model*.safetensors*", EPOCHS, f"{EPOCHS}.index.json")

Check = Callable[[Mapping[str, Any], str], Mapping[str, Any]]


class _Offer(NamedTuple):
    """What another disk has: its newest whole checkpoint, if any, and what is wrong with newer ones."""

    run_dir: str
    host: str
    faults: list[str]
    has_ended: bool  # a run, of which no checkpoint is left
    step: int = -1  # of the checkpoint, -1 without any
    name: str = ""
    state: Mapping[str, Any] | None = None
    files: Sequence[str] = ()  # of the checkpoint
    beside: Sequence[str] = ()  # of the run folder


def bring_newest(
    run_dir: Path, folder: RunFolder | None, hardware: Hardware, check: Check, announce: Callable[[str], None]
) -> None:
    """Copy the newest checkpoint of any disk to that of the main process, unless it is there; all processes call it.

    Args:
        run_dir: The run folder, as this process sees it.
        folder: The same on the main process, `None` on the others. It goes on from what was brought.
        hardware: Of this process.
        check: Returns the identity of a run from a checkpoint's state and its name, or refuses it as another run's.
        announce: Says what was brought.

    Raises:
        CheckpointError: The newest checkpoint is of another run than this one, or than what the main process has; or
            there are only damaged ones.
        FileExistsError: Another disk has a run that has ended, and no checkpoint.
    """
    sees_first = _is_first_to_see(run_dir, hardware)
    entries = steps_in(run_dir / "checkpoints") if sees_first else []
    resumed = None if folder is None else folder.resumed
    step_of_main = next((step for step, path in entries if path == resumed), -1)
    step_of_main, of_main = share_object((step_of_main, [_marks_of(path) for _, path in entries]))
    newer = [entry for entry in entries if entry[0] > step_of_main and _marks_of(entry[1]) not in of_main]
    offers = gather_objects(_offer(run_dir, newer, has_none=sees_first and not entries))
    for process, other in enumerate(offers):
        if other.faults:
            announce(f"Passed over in {other.run_dir} of process {process} on {other.host}: {'; '.join(other.faults)}.")
    sender, offer = max(enumerate(offers), key=lambda one: one[1].step)
    if offer.step < 0:
        if step_of_main < 0:
            hardware.from_main(lambda: _check_none_is_lost(offers))
        return
    has = "none" if step_of_main < 0 else f"step {step_of_main}"
    there = f"{offer.run_dir}/checkpoints/{offer.name}"
    source = f"{there} of process {sender} on {offer.host} (the main process has {has})"

    def prepare() -> None:
        identity = check(offer.state or {}, source)
        if folder is not None and resumed is not None:
            check(read_json(resumed / "state.json"), f"{resumed} of the main process")
        if folder is not None:
            folder.prepare(identity)

    hardware.from_main(prepare)
    announce(f"Process {sender} has the newest checkpoint: {source} is copied to the main process.")
    if folder is None:
        here = Path(offer.run_dir) / "checkpoints" / offer.name
        _spread(sender, [0], [*(here / name for name in offer.files), *(run_dir / name for name in offer.beside)])
        return
    with folder.receiving(offer.name, offer.beside) as (part, beside):
        _spread(sender, [0], [*(part / name for name in offer.files), *beside])


def _is_first_to_see(run_dir: Path, hardware: Hardware) -> bool:
    """Return whether no process before this one looks into the same folder of the same host."""
    everyone, place = gather_objects(str(run_dir)), place_of(hardware.process)
    return next(process for process in place.neighbours if everyone[process] == str(run_dir)) == hardware.process


def _offer(run_dir: Path, candidates: Sequence[tuple[int, Path]], has_none: bool) -> _Offer:
    """Return the newest whole one of some checkpoints, the newest first."""
    offer = _Offer(str(run_dir), socket.gethostname(), [], has_none and holds_ended_run(run_dir))
    for step, path in candidates:
        fault = fault_of(path)
        if fault is None:
            beside = [str(found.relative_to(run_dir)) for pattern in _BESIDE for found in run_dir.glob(pattern)]
            state = read_json(path / "state.json")
            return offer._replace(step=step, name=path.name, state=state, files=_files_in(path), beside=beside)
        offer.faults.append(f"{path.name}: {fault}")
    return offer


def _check_none_is_lost(offers: Sequence[_Offer]) -> None:
    """Refuse to begin anew where another disk shows that there has been a run."""
    for process, other in enumerate(offers):
        where = f"{other.run_dir} of process {process} on {other.host}"
        if other.faults:
            raise CheckpointError(
                f"No checkpoint in {where} can be used ({'; '.join(other.faults)}), and the main process has none. To "
                "begin anew, remove the folder."
            )
        if other.has_ended:
            raise ended_run(where)


def _files_in(path: Path) -> list[str]:
    """Return the files that are there of those that a checkpoint names; another copy may take the place of the best."""
    return [name for name in files_of(path) if (path / name).exists()]


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
    marks, names = share_object((_marks_of(source), _files_in(source)) if hardware.is_main else None)
    sees = gather_objects(place.host == 0 or _marks_of(here) == marks)
    blind = [processes for processes in place.hosts if not all(sees[process] for process in processes)]
    if not blind:
        yield here
        return
    unseeing = [process for process, has_seen in enumerate(sees) if not has_seen]
    announce(f"Processes {unseeing} do not see {source}: it is sent to their hosts.")
    receivers = [leader for leader, *_ in blind]
    copy: str | None = None
    try:
        copy = tempfile.mkdtemp(prefix="accel_trainer-") if place.process in receivers else None
        _spread(0, receivers, [Path(copy or source) / name for name in names])
        copies = gather_objects(copy)
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
        try:
            _send(path, sender, group) if process == sender else _receive(path, sender, group)
        except OSError as error:
            done = "read" if process == sender else "written"
            raise type(error)(f"{path} cannot be {done}, to bring a checkpoint to another host: {error}") from error
    torch.distributed.destroy_process_group(group)


def _send(path: Path, sender: int, group: Any) -> None:
    torch.distributed.broadcast(torch.tensor(path.stat().st_size), sender, group)
    with open(path, "rb") as file:
        while content := file.read(_BLOCK):
            torch.distributed.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), sender, group)


def _receive(path: Path, sender: int, group: Any) -> None:
    size = torch.tensor(0)
    torch.distributed.broadcast(size, sender, group)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for start in range(0, int(size), _BLOCK):
            block = torch.empty(min(_BLOCK, int(size) - start), dtype=torch.uint8)
            torch.distributed.broadcast(block, sender, group)
            file.write(block.numpy().data)
    flush(path)
