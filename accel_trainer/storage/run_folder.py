"""The run folder: which run it holds, and what is written into it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.codec import checked, encode, unpack, with_checksum
from ..base.console import printable, warn
from ..errors import CheckpointError
from ..history import History
from .checkpoints import (
    BEST,
    STEP_NAME,
    UNREADABLE,
    Checkpoint,
    Snapshot,
    checkpoint_name,
    copy_once,
    fault_of,
    read_json,
    remove_checkpoint,
    steps_in,
    write_checkpoint,
)
from .files import check_kind, free_name, path_beside, put_in_place, remove, write_whole
from .tensor_files import check_seal, flush, metadata_of, read_weights, save_tensors

if os.name == "posix":
    import fcntl


_NOTES = ("preempted.json", "nonfinite.json")  # of how a run has ended
_RECORDS = ("config.json", "environment.json", "history.jsonl", "evaluations.json", "trackers.json", "report.html")
_FILES = (*_RECORDS, "losses.png", *_NOTES, BEST)  # all that a run writes, beside its checkpoints
_LOCK_SECONDS = 10.0  # for the last of a run that was told to leave


def is_in_use(run_dir: Path) -> bool:
    """Return whether a run of another process goes on in a folder."""
    if os.name != "posix" or not (run_dir / ".lock").exists():
        return False
    with open(run_dir / ".lock", "rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def newest_step(run_dir: str | os.PathLike[str]) -> int | None:
    """Return the step of the newest checkpoint that this process sees, valid or not."""
    return next((step for step, _ in steps_in(Path(run_dir).expanduser() / "checkpoints")), None)


class _Lock:
    """A file held open; a lock on it ends with it."""

    descriptor = -1

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    __del__ = close  # a run that fails before it begins holds nothing back


class RunFolder:
    """The files of one run.

    Args:
        run_dir: The folder; made if need be.
        resume: `False` for a new run, `True` to continue one, `"auto"` for the one or the other.
        keep: Checkpoints that stay.

    Attributes:
        resumed: The checkpoint to go on from; `None` for a new run.
        passed_over: Newer checkpoints that cannot be used, each with what is wrong with it.
        best: What the best weights of a run that goes on say of themselves, once the folder is open; `None` if there
            are none.
        aside: Where a new run has put what one without a checkpoint had left, once the folder is open.

    Raises:
        FileExistsError: The folder holds a run already, or one that is still going on.
        FileNotFoundError: There is nothing to continue.
        CheckpointError: There are checkpoints, and none can be used.
        OSError: The folder cannot be made or written.
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume: bool | str = False, keep: int = 2) -> None:
        self.path, self._keep = Path(run_dir).expanduser().absolute(), keep
        self.best_path = self.path / BEST
        self._checkpoints = self.path / "checkpoints"
        self._lines: list[bytes] = []  # of the history
        self._is_complete = True  # whether the file has them all
        self._failing: set[str] = set()
        self._lock: _Lock | None = None
        self._resume = bool(resume)
        parts = (self.path, self.best_path.parent, self._checkpoints, self.path / ".lock")
        self._of_others = [] if self._is_begun() else [part for part in parts if os.path.lexists(part)]
        self.resumed: Checkpoint | None = None
        self.best: dict[str, Any] | None = None
        self.aside: Path | None = None
        self.passed_over: list[str] = []
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"run_dir {self.path} is a file. Give a folder, or a name that is free.")
        if not resume:
            self._check_unused()
        elif self.path.is_dir():
            self._take_lock()
            self._clean()
            self.resumed = self._newest()
            self._check_unfinished()
        if resume is True and self.resumed is None:
            raise FileNotFoundError(f'run_dir {self.path} has no checkpoint to go on from. resume="auto" begins anew.')

    def _is_begun(self) -> bool:
        """Whether a run has come as far as its first file here."""
        return (self.path / "history.jsonl").exists() or bool(steps_in(self._checkpoints))

    def _check_unused(self) -> None:
        self._check_files(*_FILES, "best", "checkpoints")

    def _check_files(self, *names: str) -> None:
        """Refuse to write over what is there."""
        found = next((name for name in names if os.path.lexists(self.path / name)), None)
        if found is not None and self._is_begun():
            raise FileExistsError(
                f'run_dir {self.path} holds a run already ({found}). Continue it with resume="auto", give another '
                "run_dir, or remove the folder."
            )
        if found is not None:
            raise FileExistsError(
                f"run_dir {self.path} holds {found}, which the run would write over. Give it a folder of its own."
            )

    def _check_unfinished(self) -> None:
        """Refuse to begin anew where a run has come to its end, though its checkpoints are gone."""
        if self.resumed is None and self._holds_epochs() and not (self.path / "preempted.json").exists():
            with suppress(FileNotFoundError, ValueError):
                if History.load(self.path).stop_reason is not None:
                    raise FileExistsError(
                        f"run_dir {self.path} holds a run that has ended, without a checkpoint to go on from. Give "
                        "another run_dir, or remove the folder."
                    )

    def _holds_epochs(self) -> bool:
        """Whether there is something that a run has measured or found, and that a new one must not write over."""
        history = self.path / "history.jsonl"
        return self.best_path.exists() or (history.is_file() and history.stat().st_size > 0)

    def _set_aside(self) -> None:
        """Keep what a run that was cut short before its first checkpoint has left, in a folder of its own."""
        if not self._holds_epochs():
            return
        aside = free_name(self.path / "earlier")
        (aside / "best").mkdir(parents=True)
        for name in ("config.json", "environment.json", "history.jsonl", BEST, *_NOTES):
            if (self.path / name).exists():
                os.rename(self.path / name, aside / name)
        self.aside = aside

    def open(self, identity: Mapping[str, Any]) -> None:
        """Make the folder ready to write: empty for a new run, as it was then for one that goes on.

        Args:
            identity: What makes the run the one that it is; a new run does not take the folder of another.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self.resumed is not None:
                self._go_back_to(self.resumed)
            elif self._resume:
                self._check_same_run(identity)
                self._set_aside()
                for name in ("config.json", "history.jsonl", *_NOTES):
                    remove(self.path / name)
            else:
                self._check_unused()  # another may have come first
            self.best_path.parent.mkdir(exist_ok=True)
            write_whole(self.path / "history.jsonl", b"".join(self._lines))
        except FileExistsError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(
                f"run_dir {self.path} cannot be written: {reason}. Give a run_dir in a folder that can."
            ) from error

    def _check_same_run(self, identity: Mapping[str, Any]) -> None:
        """Refuse to begin anew, for want of a checkpoint, in the folder of another run."""
        if not (self.path / "config.json").exists():
            self._check_own()  # the run before did not come as far
            return
        try:
            before = unpack(checked(read_json(self.path / "config.json")))["identity"]
            changed = [name for name in before if before[name] != unpack(encode(identity)).get(name)]
        except UNREADABLE:
            changed = ["its config.json and ours"]
        if changed:
            told = printable(", ".join(changed))
            raise FileExistsError(
                f"run_dir {self.path} holds another run, without a checkpoint ({told} differ). Give another run_dir, "
                "or remove the folder."
            )

    def _check_own(self) -> None:
        """Refuse to write over files that no run has left: the first that one leaves is its history."""
        try:
            History.load(self.path)
        except (FileNotFoundError, ValueError):
            self._check_files(*_FILES)

    def _take_lock(self) -> None:
        """Let no second run write here; the system gives the lock back when this process ends, however that is."""
        if os.name != "posix" or self._lock is not None:
            return
        lock = _Lock(self.path / ".lock")
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.lockf(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break  # this disk knows no locks
                if time.monotonic() > deadline:
                    raise FileExistsError(
                        f"A run is going on in run_dir {self.path}: another process holds its lock. Wait for it or end "
                        "it, or give another run_dir."
                    ) from None
                time.sleep(0.2)
        self._lock = lock

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def discard(self) -> None:
        """Remove the files of a run that has measured and saved nothing, and the folder unless it holds others."""
        self.close()
        if steps_in(self._checkpoints):
            return
        with suppress(OSError):
            for name in (*_RECORDS, "preempted.json", ".lock"):
                if self.path / name not in self._of_others:
                    (self.path / name).unlink(missing_ok=True)
            for folder in (self.best_path.parent, self._checkpoints, self.path):
                if folder.is_dir() and folder not in self._of_others:
                    folder.rmdir()

    # --- which checkpoint ---------------------------------------------------------------------------------------------

    def _clean(self) -> None:
        """Remove what a crash has left half done."""
        with suppress(OSError):
            for name in _FILES:
                path_beside(self.path / name).unlink(missing_ok=True)
            for path in self.best_path.parent.glob(".tmp??????") if self._is_begun() else ():
                path.unlink()
            for path in self._checkpoints.glob(".step_*.part"):
                remove_checkpoint(path)
            for path in self._checkpoints.glob(".step_*.old"):
                in_place = self._checkpoints / path.name[1 : -len(".old")]
                if STEP_NAME.fullmatch(in_place.name) and not os.path.lexists(in_place):
                    os.rename(path, in_place)  # its successor had not come
                else:
                    remove_checkpoint(path)

    def _newest(self) -> Checkpoint | None:
        for _, path in steps_in(self._checkpoints):
            fault = fault_of(path)
            if fault is None:
                return Checkpoint(path)
            self.passed_over.append(f"{path.name}: {fault}")
        if self.passed_over:
            faults = "; ".join(self.passed_over)
            raise CheckpointError(
                f"No checkpoint in {self._checkpoints} can be used ({faults}). To begin anew, remove the folder."
            )
        return None

    def _go_back_to(self, checkpoint: Checkpoint) -> None:
        """Put history and best weights back to what they were."""
        self._lines = (checkpoint.path / "history.jsonl").read_bytes().splitlines(keepends=True)
        best = self._best_for(checkpoint)
        if best is not None and best != self.best_path:
            self.best_path.parent.mkdir(exist_ok=True)
            put_in_place(self.best_path, lambda beside: copy_once(best, beside, ()))
        elif best is None:
            remove(self.best_path)
        self.best = None if best is None else metadata_of(self.best_path)
        for name in (*_NOTES, "evaluations.json"):  # which are of weights that are not the last any more
            remove(self.path / name)

    def _best_for(self, checkpoint: Checkpoint) -> Path | None:
        """Return whole best weights for a checkpoint: its own, a copy of them, or older ones; `None` without any."""
        state = read_json(checkpoint.path / "state.json")["run"]
        if state["best_epoch"] is None:
            return None
        own = checkpoint.path / BEST
        places = [own, self.best_path, *(path / BEST for _, path in steps_in(self._checkpoints))]
        found: dict[Path, int] = {}
        for place in dict.fromkeys(places):
            with suppress(*UNREADABLE):
                check_kind(place, stat.S_ISREG)
                check_seal(place)
                epoch = int(metadata_of(place)["epoch"])
                if epoch == state["best_epoch"]:
                    return place
                found |= {place: epoch} if epoch < state["best_epoch"] else {}
        return max(found, key=found.__getitem__, default=None)

    # --- writing ------------------------------------------------------------------------------------------------------

    def check_room(self, num_bytes: int) -> None:
        """Refuse to begin what the disk has no room for.

        Raises:
            OSError: With the numbers.
        """
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            told = f"{num_bytes / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {told}")

    def save_best(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write the best weights.

        Raises:
            OSError: They could not be written.
        """
        self.best_path.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(self.best_path, lambda beside: save_tensors(beside, tensors, metadata, sealed=True))
        flush(self.best_path.parent)

    def save_checkpoint(self, snapshot: Snapshot, history: bytes) -> Path:
        """Write a checkpoint, whole or not at all, and remove the ones too many.

        Raises:
            OSError: It could not be written; the others are untouched.
        """
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self.check_room(snapshot.num_bytes)
        path = self._checkpoints / checkpoint_name(snapshot.step)
        beside, aside = (self._checkpoints / f".{path.name}.{ending}" for ending in ("part", "old"))
        remove_checkpoint(beside)
        try:
            best = self.best_path if self.best_path.exists() else None
            others = [one / BEST for _, one in steps_in(self._checkpoints)]
            write_checkpoint(beside, snapshot, history, best, others)
            if os.path.lexists(path):  # of the same step, but not as far: the epoch has ended since
                remove_checkpoint(aside)
                os.rename(path, aside)
            try:
                os.rename(beside, path)
            except OSError:
                if os.path.lexists(aside):
                    os.rename(aside, path)
                raise
            flush(self._checkpoints)
        finally:
            with suppress(OSError):
                remove_checkpoint(beside)
        with suppress(OSError):
            remove_checkpoint(aside)
            self._remove_others(snapshot.step)
        return path

    def _remove_others(self, step: int) -> None:
        """Keep this checkpoint and those before it that are still wanted; newer ones are of a time that never was."""
        steps = steps_in(self._checkpoints)
        wanted = [path for number, path in steps if number <= step][: self._keep]
        for _, path in steps:
            if path not in wanted:
                aside = self._checkpoints / f".{path.name}.part"  # a kill in between leaves nothing half there
                os.rename(path, aside)
                remove_checkpoint(aside)

    @property
    def history(self) -> bytes:
        """The lines of `history.jsonl` so far."""
        return b"".join(self._lines)

    def append_history(self, row: dict[str, Any]) -> None:
        """Append a line to `history.jsonl`, and what could not be written before."""
        line = (json.dumps(with_checksum(encode(row))) + "\n").encode()
        self._lines.append(line)

        def append() -> None:
            path = self.path / "history.jsonl"
            if not self._is_complete or not path.is_file():
                self.path.mkdir(parents=True, exist_ok=True)
                write_whole(path, self.history)
                return
            with open(path, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)  # no half line: the next one would be glued to it
                    raise

        self._is_complete = self.attempt("history.jsonl", append)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the folder."""
        text = json.dumps(with_checksum(encode(content)), indent=2) + "\n"
        self.attempt(name, lambda: write_whole(self.path / name, text.encode()))

    def read_best(self) -> dict[str, Tensor]:
        """Return the best weights by name.

        Raises:
            OSError: The file is gone.
            ValueError: It is damaged.
        """
        check_seal(self.best_path)
        return read_weights(self.best_path)

    def older_best(self) -> str:
        """Return a sentence on the best weights that are on the disk, in place of newer ones; empty without any."""
        with suppress(OSError, ValueError, KeyError):
            return f" The best weights on the disk are those of epoch {metadata_of(self.best_path)['epoch']}."
        return ""

    def attempt(self, name: str, write: Callable[[], object]) -> bool:
        """Write, and return whether that succeeded; a disk that is full or gone is no error of the training.

        Nor is a picture or page that cannot be drawn, whatever a library says of it.
        """
        try:
            write()
        except Exception as error:
            self.note(name, error)
            return False
        self.note(name, None)
        return True

    @property
    def failing(self) -> list[str]:
        """What could not be written when it was last tried: on the disk it is old, or missing."""
        return sorted(self._failing)

    def note(self, name: str, error: Exception | None) -> None:
        """Take in how a write has ended; the first failure, as long as anything fails, is a warning."""
        if error is None:
            self._failing.discard(name)
            return
        if not self._failing:
            told = f"Could not write {self.path / name}: {error}. The training goes on, and the next save tries again."
            warn(told, stacklevel=4)
        self._failing.add(name)
