"""The run folder of a model that is divided over the processes: each writes its files, the main one places them.

Nothing is exchanged but what was written, through the store of the process group: so threads do all of it, while the
training goes on.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import PrefixStore, distributed_c10d  # type: ignore[attr-defined]

from ..base.dtensors import cut_of, gather_rows, is_cut, num_bytes
from ..base.exchange import gather_objects
from ..devices.hardware import Hardware
from .checkpoints import BEST, Files, Snapshot, checkpoint_name, epoch_path, write_tensors
from .run_folder import RunFolder, check_may_be_folder, explained
from .shards import deal
from .weight_files import Part, clean, put_parts_in_place, write_part

_Result = TypeVar("_Result")
_numbers = itertools.count()  # the same on all processes
_SECONDS_TO_BE_SEEN = 5.0  # a disk of a network may take a while
_LONGEST_WRITE = 3600.0  # seconds that processes wait for each other


def check_seen_by_all(run_dir: str | os.PathLike[str], hardware: Hardware) -> None:
    """Refuse (ValueError) a run folder that not all processes see, or can write in; all call it. It stays as it is."""
    path = Path(run_dir).expanduser().absolute()
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]

    def begin() -> str:
        check_may_be_folder(path)
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".seen-{time.time_ns()}"
            probe.touch()
        return probe.name

    probe, deadline = path / hardware.from_main(begin), time.monotonic() + _SECONDS_TO_BE_SEEN
    while not (is_seen := probe.is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    fault = _try_to_write(probe.with_name(f"{probe.name}-{hardware.process}")) if is_seen else None
    everyone = gather_objects((is_seen, str(path), fault))
    if hardware.is_main:
        probe.unlink(missing_ok=True)
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
    blind = [process for process, (has_seen, _, _) in enumerate(everyone) if not has_seen]
    unable = [process for process, (_, _, fault) in enumerate(everyone) if fault is not None]
    if blind and everyone[blind[0]][1] != everyone[0][1]:
        raise ValueError(
            f"Process {blind[0]} was given the run_dir {everyone[blind[0]][1]}, and the main process "
            f"{everyone[0][1]}. Give all the same, on a disk that all hosts share."
        )
    if blind:
        raise ValueError(
            f"Processes {blind} do not see {path} of the main process. The model is divided, and each process writes "
            "its own part: give a run_dir on a disk that all hosts share."
        )
    if unable:
        raise ValueError(
            f"Processes {unable} cannot write in run_dir {path}: {everyone[unable[0]][2]}. The model is divided, and "
            "each process writes its own part: give a run_dir in a folder that all can write in."
        )


def _try_to_write(path: Path) -> str | None:
    """Return why a file cannot be written; `None` where it can."""
    try:
        path.touch()
        path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


class SharedFolder:
    """What a `Saver` writes to on each process of a divided model.

    Args:
        run_dir: The run folder, which all processes see; see `check_seen_by_all`.
        folder: The same on the main process, `None` on the others.
        hardware: The processes.
    """

    def __init__(self, run_dir: str | os.PathLike[str], folder: RunFolder | None, hardware: Hardware) -> None:
        self.path = Path(run_dir).expanduser().absolute()
        self.best_path = self.path / BEST
        self._folder, self._talk = folder, _Talk(hardware.process, hardware.num_processes)

    @property
    def holds_best(self) -> bool:
        """Whether there is a file of the best weights; that somebody has removed it is not asked by each process."""
        return True

    @property
    def history(self) -> bytes:
        """The lines of the history so far, on the main process."""
        return b"" if self._folder is None else self._folder.history

    def save_checkpoint(self, snapshot: Snapshot, history: bytes) -> Path | None:
        """Write this process's shard, and on the main process the rest; return the folder there.

        After an `OSError`, which all processes raise if one does, older checkpoints are untouched.
        """
        part = self.path / "checkpoints" / f".{checkpoint_name(snapshot.step)}.part"

        def write(path: Path, snapshot: Snapshot) -> Files:
            everyone: list[Files] = self._talk.collect(lambda: write_tensors(path, snapshot))
            return {name: file for files in everyone for name, file in files.items()}

        return self._write(
            lambda folder: folder.save_checkpoint(snapshot, history, write), lambda: write_tensors(part, snapshot)
        )

    def save_best(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write this process's part of the best weights, or raise an `OSError` on all processes."""
        self._write(
            lambda folder: folder.save_best(tensors, metadata, self._save_in_parts),
            lambda: self._write_part(self.best_path, tensors),
        )

    def save_epoch(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], epochs: Iterable[int]) -> None:
        """Write this process's part of the weights of an epoch; see `RunFolder.save_epoch`."""
        self._write(
            lambda folder: folder.save_epoch(tensors, metadata, epochs, self._save_in_parts),
            lambda: self._write_part(epoch_path(self.path, metadata["epoch"]), tensors),
        )

    def _write(self, lead: Callable[[RunFolder], _Result], follow: Callable[[], Any]) -> _Result | None:
        """Write together: the main process into its folder, and within that each other one its part."""
        folder = self._folder
        if folder is not None:
            return self._talk.lead(lambda: lead(folder))
        self._talk.follow(follow)
        return None

    def _save_in_parts(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        try:
            everyone: list[list[Part]] = self._talk.collect(partial(self._write_part, path, tensors))
            put_parts_in_place(path, [Part(*part) for parts in everyone for part in parts], metadata)
        except (OSError, SafetensorError):
            with suppress(OSError):
                clean(path)  # a full disk has no room for what is left of a failed write
            raise

    def _write_part(self, path: Path, tensors: Mapping[str, Tensor]) -> list[Part]:
        """Write the tensors that were dealt to this process, if any; they say which part that is."""
        return [write_part(path, tensors.index, tensors.number, tensors)] if isinstance(tensors, Dealt) else []

    def note(self, name: str, error: Exception | None) -> None:
        """Note how a write has ended."""
        if self._folder is not None:
            self._folder.note(name, error)

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._folder is not None:
            self._folder.close()


class Dealt(dict[str, Tensor]):
    """The tensors that one process writes, and which of so many parts they are, 0-based."""

    index: int
    number: int

    def __init__(self, tensors: Mapping[str, Tensor], index: int, number: int) -> None:
        super().__init__(tensors)
        self.index, self.number = index, number


def gathered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that this process is to write, whole and in host memory; all processes call it.

    They are gathered one by one, so that no process ever has more than its share and one tensor.
    """
    cut = next(cut_of(tensor) for tensor in weights.values() if is_cut(tensor))
    if not cut.is_kept_here:
        return {}
    owners = deal({name: num_bytes(tensor) for name, tensor in weights.items()}, cut.number)
    mine = {}
    for name, tensor in weights.items():
        if is_cut(tensor):
            found = gather_rows(tensor, owners[name])
        else:
            found = tensor.detach().cpu().clone() if owners[name] == cut.index else None
        if found is not None:
            mine[name] = found
    number = max(owners.values()) + 1
    return Dealt(mine, cut.index, number) if cut.index < number else {}


def wait_for_nobody() -> None:
    """End writes that wait for other processes, of which one is lost."""
    _is_in_vain.set()


_is_in_vain = Event()


class _Talk:
    """How the threads of all processes write together: the main process opens, collects and closes each write.

    All processes make the same writes in the same order, so that a number names them.
    """

    def __init__(self, process: int, num_processes: int) -> None:
        store: Any = distributed_c10d._get_default_store()
        self._store = PrefixStore(f"accel_trainer saves {next(_numbers)}", store)
        self._process, self._num_processes, self._number = process, num_processes, -1

    def lead(self, work: Callable[[], _Result]) -> _Result:
        """Do the work of the main process, of which `collect` is a part, and tell the others how it has ended."""
        self._begin()
        try:
            result = work()
        except BaseException as error:
            self._set("end", str(error) or type(error).__name__)
            raise
        self._set("end", "")
        return result

    def collect(self, write: Callable[[], Any]) -> list[Any]:
        """Let all processes write, and return what each tells of it; raise an `OSError` if one could not."""
        self._set("open", "")
        mine = write()
        others = [json.loads(self._wait_for(f"of {process}")) for process in range(1, self._num_processes)]
        for process, (error, _) in enumerate(others, 1):
            if error:
                raise OSError(f"process {process} could not write its part: {error}")
        return [mine, *(told for _, told in others)]

    def follow(self, write: Callable[[], Any]) -> None:
        """Write on another process, once the main process opens it; raise an `OSError` if it has failed on any."""
        self._begin()
        self._wait_for("open", "end")
        if not self._has("end"):
            fault, told = None, None
            try:
                told = write()
            except Exception as error:  # whatever it is, the main process must not wait
                fault = error
            text = "" if fault is None else str(fault) or type(fault).__name__
            self._set(f"of {self._process}", json.dumps([text, told]))
            if fault is not None and not isinstance(fault, (OSError, SafetensorError)):
                raise fault
        error_of_any = self._wait_for("end")
        if error_of_any:
            raise OSError(error_of_any)

    def _begin(self) -> None:
        """Count the next write, and forget the last but one, of which all have seen the end."""
        self._number += 1
        if self._process == 0 and self._number > 1:
            old = self._number - 2
            for key in ("open", "end", *(f"of {process}" for process in range(1, self._num_processes))):
                self._ask(partial(self._store.delete_key, f"{old} {key}"))

    def _key(self, name: str) -> str:
        return f"{self._number} {name}"

    def _set(self, name: str, text: str) -> None:
        self._ask(lambda: self._store.set(self._key(name), text))

    def _has(self, name: str) -> bool:
        return bool(self._ask(lambda: self._store.check([self._key(name)])))

    def _wait_for(self, *names: str) -> str:
        """Wait until one of these stands, and return its text.

        The store is asked again and again, since an answer that it waits with would hold up all other threads.
        """
        pause, deadline = 0.005, time.monotonic() + _LONGEST_WRITE
        while True:
            if _is_in_vain.is_set():
                raise OSError("another process was lost in the write")
            for name in names:
                if self._has(name):
                    return str(self._ask(partial(self._store.get, self._key(name))).decode())
            if time.monotonic() > deadline:
                raise OSError(f"the other processes have not written their parts in {_LONGEST_WRITE:.0f} seconds")
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError as error:  # its process has ended
            raise OSError(f"the store of the process group does not answer: {error}") from error
