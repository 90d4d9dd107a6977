"""The run folder and its checkpoints: plain files, whole or not at all, nothing in them that could execute.

Everything here runs on the main process.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from .console import printable, warn
from .errors import CheckpointError
from .history import History, checked, decode, encode, with_checksum
from .weights import check_seal, flush, metadata_of, read_weights, save_tensors, seal_of

if os.name == "posix":
    import fcntl

__all__ = ["Checkpoint", "RunFolder", "Snapshot", "is_in_use", "newest_step", "write_whole"]

_FORMAT = 1
_MANIFEST = "manifest.json"
_NEEDED = ("model.safetensors", "optimizer.safetensors", "state.json", "history.jsonl")
_BEST = "best/model.safetensors"
_KNOWN = (*_NEEDED, "progress.safetensors", _BEST)
_STEP = re.compile(r"step_(\d{8,})")
_NOTES = ("preempted.json", "nonfinite.json")  # of how a run has ended
_RECORDS = ("config.json", "environment.json", "history.jsonl", "evaluations.json", "trackers.json", "report.html")
_FILES = (*_RECORDS, "losses.png", *_NOTES, _BEST)  # all that a run writes, beside its checkpoints
# Worth nothing to anybody: of systems, and of a safetensors file whose write was cut short.
_LITTER = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|@eaDir|\.nfs.*|\.tmp\w{6}")
_LARGEST_JSON = 2**28  # bytes: more is not ours
_LOCK_SECONDS = 10.0  # for the last of a run that was told to leave


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory.

    Attributes:
        step: Optimizer steps made.
        tensors: File name -> tensors by name.
        metadata: Of the weights; goes into the header of their file.
        state: Everything that is no tensor, as JSON can hold it.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    metadata: dict[str, Any]
    state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Size on the disk, but for some kilobytes."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk whose files are as they were written."""

    path: Path

    def read(self) -> Snapshot:
        """Read it into memory.

        Raises:
            CheckpointError: Its content makes no sense.
        """
        try:
            state = _read_json(self.path / "state.json", as_written=True)
            files = _read_json(self.path / _MANIFEST)["files"]
            names = [name for name in _KNOWN if name in files and "/" not in name and name.endswith(".safetensors")]
            tensors = {name: read_weights(self.path / name) for name in names}
            return Snapshot(int(self.path.name.removeprefix("step_")), tensors, {}, state)
        except _UNREADABLE as error:
            raise CheckpointError(f"{self.path} cannot be read: {error!r}.") from error


_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError, RecursionError, MemoryError)


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def _write_checkpoint(
    path: Path, snapshot: Snapshot, history: bytes, best: Path | None, others: Sequence[Path] = ()
) -> None:
    """Write the files of a checkpoint into a new folder, the manifest last.

    Args:
        path: The folder.
        snapshot: What to write.
        history: Lines of the history up to then.
        best: The best weights up to then; `None` if there are none.
        others: Best weights of other checkpoints, which may be the same.
    """
    path.mkdir()
    for name, tensors in snapshot.tensors.items():
        save_tensors(path / name, tensors, snapshot.metadata if name == "model.safetensors" else {})
    _write(path / "state.json", (json.dumps(snapshot.state, allow_nan=False) + "\n").encode())
    _write(path / "history.jsonl", history)
    if best is not None:
        (path / "best").mkdir()
        _copy_once(best, path / _BEST, others)
        flush(path / "best")
    files = {name: _describe(path / name) for name in _KNOWN if (path / name).exists()}
    manifest = {"format": _FORMAT, "step": snapshot.step, "files": files}
    _write(path / _MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    flush(path)


def _copy_once(source: Path, target: Path, others: Sequence[Path]) -> None:
    """Copy a file, or let a second name stand for a copy of it that is there already.

    So that its content is on the disk twice, and what damages the one leaves the other.
    """
    same = next((one for one in others if _has_same_seal(one, source) and not one.samefile(source)), None)
    try:
        if same is None:
            raise FileNotFoundError
        os.link(same, target)
    except OSError:  # none, or the disk has no links
        shutil.copyfile(source, target)
        flush(target)


def _has_same_seal(one: Path, other: Path) -> bool:
    try:
        return seal_of(one) == seal_of(other) and one.stat().st_size == other.stat().st_size
    except (OSError, ValueError):
        return False


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    flush(path)


def _put_in_place(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside, then put it in its place."""
    beside = _beside(path)
    beside.unlink(missing_ok=True)
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Return where a file is written before it is put in its place; nobody else uses such a name."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, content: bytes, flushed: bool = True) -> None:
    """Write a file whole or not at all; `flushed` sees it through to the disk, for what cannot be made again.

    Raises:
        OSError: It could not be written; the one before is untouched.
    """

    def write(beside: Path) -> None:
        beside.write_bytes(content)
        if flushed:
            flush(beside)

    _put_in_place(path, write)


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


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest, size = hashlib.sha256(), 0
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def _read_json(path: Path, as_written: bool = False) -> Any:
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path.name} is too large")
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if as_written else decode(content)


def fault_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, `None` if every file is as it was written."""
    try:
        _check_kind(path, stat.S_ISDIR)
        _check_kind(path / _MANIFEST, stat.S_ISREG)
        manifest = _read_json(path / _MANIFEST)
        if manifest["format"] != _FORMAT:
            return f"format {manifest['format']!r} is not known to this version"
        if path.name != _name(manifest["step"]):
            return f"its manifest is that of step {manifest['step']!r}"
        files = manifest["files"]  # what else is there is other programs', such as .DS_Store
        wrong = [name for name in files if name not in _KNOWN] or [name for name in _NEEDED if name not in files]
        if wrong:
            return f"its manifest has a wrong list of files ({wrong[0]!r})"
        for name, expected in files.items():
            if name == _BEST:
                continue  # another copy may take its place: see RunFolder._best_for
            for place in [path / name, *(path / name).parents][: name.count("/") + 1]:
                _check_kind(place, stat.S_ISREG if place == path / name else stat.S_ISDIR)
            if (path / name).stat().st_size != expected["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes in place of {expected['size']!r}"
            if _describe(path / name) != expected:
                return f"the checksum of {name} does not match"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except _UNREADABLE as error:
        return f"it cannot be read ({error})"
    return None


def _check_kind(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Refuse what is not what it should be, such as a link that leads elsewhere."""
    if not is_kind(os.lstat(path).st_mode):
        raise ValueError(f"{path.name} is not a plain {'file' if is_kind is stat.S_ISREG else 'folder'}")


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_checkpoint(path: Path) -> None:
    """Remove what this package has written into a checkpoint, and the folder, unless it holds files of others."""
    if path.is_symlink() or not path.is_dir():
        _remove(path)
        return
    for name in (_MANIFEST, *_KNOWN):
        (path / name).unlink(missing_ok=True)
    for folder in (path / "best", path):
        for litter in [one for one in folder.glob("*") if _LITTER.fullmatch(one.name)]:
            _remove(litter)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if path.exists():
        step = path.name.strip(".").partition(".")[0]
        os.rename(path, _free_name(path.with_name(f"{step}_others")))


def _free_name(path: Path) -> Path:
    """Return a path that does not exist yet: this one with a number."""
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(1))
    return next(one for one in numbered if not os.path.lexists(one))


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Return step and place of what is named as a checkpoint in a folder, the newest first."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    return sorted(((int(match[1]), path) for path in paths if (match := _STEP.fullmatch(path.name))), reverse=True)


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


# --- the folder -------------------------------------------------------------------------------------------------------


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
        self.best_path = self.path / _BEST
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
        aside = _free_name(self.path / "earlier")
        (aside / "best").mkdir(parents=True)
        for name in ("config.json", "environment.json", "history.jsonl", _BEST, *_NOTES):
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
                    _remove(self.path / name)
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
            before = decode(checked(_read_json(self.path / "config.json", as_written=True)))["identity"]
            changed = [name for name in before if before[name] != decode(encode(identity)).get(name)]
        except _UNREADABLE:
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
                _beside(self.path / name).unlink(missing_ok=True)
            for path in self.best_path.parent.glob(".tmp??????") if self._is_begun() else ():
                path.unlink()
            for path in self._checkpoints.glob(".step_*.part"):
                _remove_checkpoint(path)
            for path in self._checkpoints.glob(".step_*.old"):
                in_place = self._checkpoints / path.name[1 : -len(".old")]
                if _STEP.fullmatch(in_place.name) and not os.path.lexists(in_place):
                    os.rename(path, in_place)  # its successor had not come
                else:
                    _remove_checkpoint(path)

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
            _put_in_place(self.best_path, lambda beside: _copy_once(best, beside, ()))
        elif best is None:
            _remove(self.best_path)
        self.best = None if best is None else metadata_of(self.best_path)
        for name in (*_NOTES, "evaluations.json"):  # which are of weights that are not the last any more
            _remove(self.path / name)

    def _best_for(self, checkpoint: Checkpoint) -> Path | None:
        """Return whole best weights for a checkpoint: its own, a copy of them, or older ones; `None` without any."""
        state = _read_json(checkpoint.path / "state.json")["run"]
        if state["best_epoch"] is None:
            return None
        own = checkpoint.path / _BEST
        places = [own, self.best_path, *(path / _BEST for _, path in steps_in(self._checkpoints))]
        found: dict[Path, int] = {}
        for place in dict.fromkeys(places):
            with suppress(*_UNREADABLE):
                _check_kind(place, stat.S_ISREG)
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
        _put_in_place(self.best_path, lambda beside: save_tensors(beside, tensors, metadata, sealed=True))
        flush(self.best_path.parent)

    def save_checkpoint(self, snapshot: Snapshot, history: bytes) -> Path:
        """Write a checkpoint, whole or not at all, and remove the ones too many.

        Raises:
            OSError: It could not be written; the others are untouched.
        """
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self.check_room(snapshot.num_bytes)
        path = self._checkpoints / _name(snapshot.step)
        beside, aside = (self._checkpoints / f".{path.name}.{ending}" for ending in ("part", "old"))
        _remove_checkpoint(beside)
        try:
            best = self.best_path if self.best_path.exists() else None
            others = [one / _BEST for _, one in steps_in(self._checkpoints)]
            _write_checkpoint(beside, snapshot, history, best, others)
            if os.path.lexists(path):  # of the same step, but not as far: the epoch has ended since
                _remove_checkpoint(aside)
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
                _remove_checkpoint(beside)
        with suppress(OSError):
            _remove_checkpoint(aside)
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
                _remove_checkpoint(aside)

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
        encoded = json.loads(json.dumps(encode(content), default=str))
        text = json.dumps(with_checksum(encoded), indent=2) + "\n"
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

    def draw(self, history: History) -> None:
        """Draw `losses.png`."""

        def draw() -> None:
            beside = self.path / ".losses.part.png"  # its ending chooses the format
            history.plot(beside)
            os.replace(beside, self.path / "losses.png")

        self.attempt("losses.png", draw)

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
