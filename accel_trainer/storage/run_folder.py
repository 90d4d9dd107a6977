"""The run folder: which run it holds, and what is written into it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.codec import checked, encode, unpack, with_checksum
from ..base.console import printable, warn
from ..errors import CheckpointError
from ..history import History
from .checkpoints import (
    BEST,
    UNREADABLE,
    Files,
    Snapshot,
    add_checkpoint,
    clean_checkpoints,
    epoch_path,
    epochs_in,
    fault_of,
    read_json,
    replaced,
    steps_in,
    write_tensors,
)
from .files import flush, free_name, path_beside, remove, write_whole
from .weight_files import (
    check,
    clean,
    copy_weights,
    exist,
    files_of,
    index_of,
    metadata_of,
    remove_weights,
    save_weights,
)

if os.name == "posix":
    import fcntl

_NOTES = ("preempted.json", "nonfinite.json", "failed.json")  # how a run has ended
_RECORDS = ("config.json", "environment.json", "history.jsonl", "steps.jsonl", "trackers.json", "report.html")
_OF_EVALUATIONS = ("evaluations.json", "classification.png", "regression.png", "wrong_samples.png")
_FILES = (*_RECORDS, *_OF_EVALUATIONS, "losses.png", *_NOTES, BEST)  # all that a run writes, beside its checkpoints
_INDEX = index_of(Path(BEST)).as_posix()  # of best weights in parts
SaveWeights = Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], None]
_LOCK_SECONDS = 10.0  # to wait for the end of another run, which a signal may have ended just now


def is_in_use(run_dir: Path) -> bool:
    """Return whether a run of another process goes on in a folder."""
    if os.name != "posix" or not (run_dir / ".lock").exists():
        return False
    with open(run_dir / ".lock", "rb") as file:
        return _is_refused(file.fileno(), fcntl.LOCK_SH)


def _is_refused(descriptor: int, kind: int) -> bool:
    """Try to lock a file, and return whether another process has locked it; some disks know no locks."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def check_may_be_folder(path: Path) -> None:
    """Refuse (FileExistsError) a run folder of whose name there is something else."""
    if os.path.lexists(path) and not path.is_dir():
        kind = "a file" if path.exists() else "a link that leads nowhere"
        raise FileExistsError(f"run_dir {path} is {kind}. Give a folder, or a name that is free.")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of an `OSError` in this block that a run folder cannot be written."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(
            f"run_dir {path} cannot be written: {reason}. Give a run_dir in a folder that can."
        ) from error


class RunFolder:
    """The files of one run, of which `keep` is the number of checkpoints that stay.

    `resume` is `False` for a new run, `True` to continue one, `"auto"` for the one or the other. The constructor
    refuses a folder as `Trainer.fit` documents it.

    Attributes:
        history: The lines of `history.jsonl` so far, also those that could not be written.
        resumed: Folder of the checkpoint to go on from; `None` for a new run.
        passed_over: Newer checkpoints that cannot be used, each with what is wrong with it.
        aside: Where a new run has put what one without a checkpoint had left, once the folder is open.
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume: bool | str = False, keep: int = 2) -> None:
        self.path, self._keep = Path(run_dir).expanduser().absolute(), keep
        self.best_path = self.path / BEST
        self._checkpoints = self.path / "checkpoints"
        self.history = b""
        self._failing: set[str] = set()
        self._unlock: Callable[[], object] | None = None
        self._resume = resume
        parts = (self.path, self.best_path.parent, self._checkpoints, self.path / ".lock")
        self._was_there = [] if self._is_begun() else [part for part in parts if os.path.lexists(part)]
        self.resumed: Path | None = None
        self.aside: Path | None = None
        self.passed_over: list[str] = []
        check_may_be_folder(self.path)
        if not resume:
            self._check_files("best", "checkpoints")
        elif self.path.is_dir():
            self._take_lock()
            self._clean()
            self.resumed = self._newest()

    def start(self) -> Path | None:
        """Return the checkpoint to go on from, `None` for a new run; refuse to begin anew where one should go on."""
        if self.resumed is not None or not self._resume:
            return self.resumed
        if self.passed_over:
            faults = "; ".join(self.passed_over)
            raise CheckpointError(
                f"No checkpoint in {self._checkpoints} can be used ({faults}). To begin anew, remove the folder."
            )
        if holds_ended_run(self.path):
            raise ended_run(self.path)
        if self._resume is True:
            raise FileNotFoundError(f'run_dir {self.path} has no checkpoint to go on from. resume="auto" begins anew.')
        return None

    def _is_begun(self) -> bool:
        """Return whether a run has come as far as its first file here."""
        return (self.path / "history.jsonl").exists() or bool(steps_in(self._checkpoints))

    def _check_files(self, *folders: str) -> None:
        """Refuse to write over files of a run, or over these folders."""
        found = next((name for name in (*_FILES, _INDEX, *folders) if os.path.lexists(self.path / name)), None)
        if found is None:
            return
        if self._is_begun():
            raise FileExistsError(
                f'run_dir {self.path} holds a run already ({found}). Continue it with resume="auto", give another '
                "run_dir, or remove the folder."
            )
        raise FileExistsError(
            f"run_dir {self.path} holds {found}, which the run would write over. Give it a folder of its own."
        )

    def open(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make the folder ready to write: empty for a new run, as it was then for one that goes on.

        A new run does not take the folder of one with another identity. Return the metadata of the best weights, if a
        run that goes on has any.
        """
        best: dict[str, Any] | None = None
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self.resumed is not None:
                best = self._go_back_to(self.resumed)
            elif self._resume:
                self._make_way(identity)
            else:
                self._check_files("best", "checkpoints")  # another run may have come first
            self.best_path.parent.mkdir(exist_ok=True)
            write_whole(self.path / "history.jsonl", self.history)
            return best

    def prepare(self, identity: Mapping[str, Any]) -> None:
        """Make the folder ready for the checkpoint of another disk; one of another run is refused."""
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if self.resumed is None:
            self._make_way(identity)

    @contextmanager
    def receiving(self, name: str, beside: Sequence[str]) -> Iterator[tuple[Path, list[Path]]]:
        """Give where the files of a checkpoint of another disk are to be copied, and those beside it.

        They are put in their places together; the run then goes on from that checkpoint.
        """
        path, copies = self._checkpoints / name, [path_beside(self.path / one) for one in beside]
        try:
            with replaced(path) as part:
                yield part, copies
            fault = fault_of(path)
            if fault is not None:
                raise CheckpointError(f"{path} was not copied as it is on the other host: {fault}.")
            for old in epochs_in(self.path).values():
                remove_weights(old)
            for copy, one in zip(copies, beside, strict=True):
                os.replace(copy, self.path / one)
        finally:
            for copy in copies:
                copy.unlink(missing_ok=True)
        self.resumed = path

    def _make_way(self, identity: Mapping[str, Any]) -> None:
        """Let the folder be a new run's; one with another identity is refused."""
        self._check_same_run(identity)
        self._set_aside()
        for name in ("config.json", "history.jsonl", "steps.jsonl", *_NOTES):
            remove(self.path / name)

    def _check_same_run(self, identity: Mapping[str, Any]) -> None:
        """Refuse to begin anew, for want of a checkpoint, in the folder of another run or program."""
        config = self.path / "config.json"
        if not config.exists():
            try:
                History.load(self.path)  # the first file of a run: this one ended before it wrote the next
            except (FileNotFoundError, ValueError):
                self._check_files()
            return
        try:
            before = unpack(checked(read_json(config)))["identity"]
            changed = [name for name in before if before[name] != unpack(encode(identity)).get(name)]
        except UNREADABLE:
            changed = ["its config.json and ours"]
        if changed:
            names = printable(", ".join(changed))
            raise FileExistsError(
                f"run_dir {self.path} holds another run, without a checkpoint ({names} differ). Give another run_dir, "
                "or remove the folder."
            )

    def _set_aside(self) -> None:
        """Keep what a run that was cut short before its first checkpoint has left, in a folder of its own."""
        if not _holds_epochs(self.path):
            return
        self.aside = free_name(self.path / "earlier")
        (self.aside / "best").mkdir(parents=True)
        for name in ("config.json", "environment.json", "history.jsonl", "steps.jsonl", *_NOTES):
            if (self.path / name).exists():
                os.rename(self.path / name, self.aside / name)
        for weights in (self.best_path, *epochs_in(self.path).values()):
            for path in files_of(weights):
                os.rename(path, self.aside / "best" / path.name)

    def _take_lock(self) -> None:
        """Let no second run write here; the system gives the lock back when this process ends, however that is."""
        if os.name != "posix" or self._unlock is not None:
            return
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._unlock = weakref.finalize(self, os.close, descriptor)  # also where a run fails before it begins
        deadline = time.monotonic() + _LOCK_SECONDS
        while _is_refused(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise FileExistsError(
                    f"A run is going on in run_dir {self.path}: another process holds its lock. Wait for it or end it, "
                    "or give another run_dir."
                )
            time.sleep(0.2)

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._unlock is not None:
            self._unlock()

    def discard(self) -> None:
        """Remove the files of a run that has measured and saved nothing, and the folder unless it was there before."""
        self.close()
        if steps_in(self._checkpoints):
            return
        with suppress(OSError):
            for name in (*_RECORDS, *_OF_EVALUATIONS, "preempted.json", ".lock"):
                if self.path / name not in self._was_there:
                    (self.path / name).unlink(missing_ok=True)
            for folder in (self.best_path.parent, self._checkpoints, self.path):
                if folder.is_dir() and folder not in self._was_there:
                    folder.rmdir()

    def _clean(self) -> None:
        """Remove what a crash has left half done."""
        with suppress(OSError):
            for name in _FILES:
                path_beside(self.path / name).unlink(missing_ok=True)
            for path in (self.best_path, *epochs_in(self.path).values()):
                clean(path)
            for path in self.best_path.parent.glob(".tmp??????") if self._is_begun() else ():
                path.unlink()
        clean_checkpoints(self._checkpoints)

    def _newest(self) -> Path | None:
        """Return the newest checkpoint in which nothing is wrong; `None` where there is none."""
        for _, path in steps_in(self._checkpoints):
            fault = fault_of(path)
            if fault is None:
                return path
            self.passed_over.append(f"{path.name}: {fault}")
        return None

    def _go_back_to(self, checkpoint: Path) -> dict[str, Any] | None:
        """Put history and best weights back to what they were, and return the metadata of the latter."""
        self.history = (checkpoint / "history.jsonl").read_bytes()
        best = self._best_for(checkpoint)
        if best is None:
            remove_weights(self.best_path)
        elif best != self.best_path:
            self.best_path.parent.mkdir(exist_ok=True)
            copy_weights(best, self.best_path)
        for name in (*_NOTES, *_OF_EVALUATIONS):  # they are about weights that are not the last any more
            remove(self.path / name)
        return None if best is None else metadata_of(self.best_path)

    def _best_for(self, checkpoint: Path) -> Path | None:
        """Return whole best weights for a checkpoint: its own, a copy of them, or older ones; `None` without any."""
        best_epoch = read_json(checkpoint / "state.json")["run"]["best_epoch"]
        if best_epoch is None:
            return None
        paths = [checkpoint / BEST, self.best_path, *(path / BEST for _, path in steps_in(self._checkpoints))]
        older: dict[Path, int] = {}
        for path in dict.fromkeys(paths):
            with suppress(*UNREADABLE):
                check(path)
                epoch = int(metadata_of(path)["epoch"])
                if epoch == best_epoch:
                    return path
                if epoch < best_epoch:
                    older[path] = epoch
        return max(older, key=older.__getitem__, default=None)

    def check_room(self, num_bytes: int) -> None:
        """Raise an `OSError` with both numbers if the disk has no room for so many bytes."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            numbers = f"{num_bytes / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {numbers}")

    def save_best(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], save: SaveWeights = save_weights
    ) -> None:
        """Write the best weights, or raise an `OSError`."""
        self.best_path.parent.mkdir(parents=True, exist_ok=True)
        save(self.best_path, tensors, metadata)

    def save_epoch(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        epochs: Iterable[int],
        save: SaveWeights = save_weights,
    ) -> None:
        """Write the weights of an epoch, and remove those of epochs that are not among these; or raise an `OSError`."""
        self.best_path.parent.mkdir(parents=True, exist_ok=True)
        wanted = [epoch_path(self.path, epoch) for epoch in epochs]
        save(epoch_path(self.path, metadata["epoch"]), tensors, metadata)
        for other in epochs_in(self.path).values():
            if other not in wanted:
                remove_weights(other)
        flush(self.best_path.parent)

    def save_checkpoint(
        self, snapshot: Snapshot, history: bytes, write: Callable[[Path, Snapshot], Files] = write_tensors
    ) -> Path:
        """Write a checkpoint, remove those that are too many, and return its folder.

        After an `OSError` the others are untouched. `write` writes the tensors.
        """
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        num_shards = 1 if snapshot.shard is None else snapshot.shard.number
        here = sum(tensor.nbytes for tensors in snapshot.tensors.values() for tensor in tensors.values())
        self.check_room(here * num_shards)  # the first shard is the largest
        return add_checkpoint(self._checkpoints, snapshot, history, self.best_path, self._keep, write)

    def append_history(self, row: dict[str, Any]) -> None:
        """Append a line to `history.jsonl`, and what could not be written before."""
        path = self.path / "history.jsonl"
        line = _line_of(row)
        self.history += line

        def append() -> None:
            if path.name in self._failing or not path.is_file():
                self.path.mkdir(parents=True, exist_ok=True)
                write_whole(path, self.history)
                return
            with open(path, "ab") as file:  # after a failure the file ends with half a line, and is written anew
                file.write(line)

        self.attempt(path.name, append)

    def write_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `steps.jsonl` anew, with these rows; no file without any."""
        path, content = self.path / "steps.jsonl", b"".join(map(_line_of, rows))
        self.attempt(path.name, lambda: write_whole(path, content) if content else path.unlink(missing_ok=True))

    def append_step(self, row: Mapping[str, Any]) -> None:
        """Append a row to `steps.jsonl`; one that cannot be written is lost."""

        def append() -> None:
            with open(self.path / "steps.jsonl", "ab") as file:
                file.write((b"\n" if "steps.jsonl" in self._failing else b"") + _line_of(row))  # behind half a line

        self.attempt("steps.jsonl", append)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the folder."""
        text = json.dumps(with_checksum(encode(content)), indent=2) + "\n"
        self.attempt(name, lambda: write_whole(self.path / name, text.encode()))

    @property
    def holds_best(self) -> bool:
        """Whether the best weights are on the disk."""
        return exist(self.best_path)

    def older_best(self) -> str:
        """Return a sentence on the best weights that are on the disk, in place of newer ones; empty without any."""
        with suppress(OSError, ValueError, KeyError):
            return f" The best weights on the disk are those of epoch {metadata_of(self.best_path)['epoch']}."
        return ""

    def attempt(self, name: str, write: Callable[[], object]) -> None:
        """Write a file; a full disk is no error of the training, nor is a picture or page that cannot be drawn."""
        try:
            write()
        except Exception as error:
            self.note(name, error)
        else:
            self.note(name, None)

    @property
    def failing(self) -> list[str]:
        """What could not be written when it was last tried: on the disk it is old, or missing."""
        return sorted(self._failing)

    def note(self, name: str, error: Exception | None) -> None:
        """Note how a write has ended; the first failure, as long as anything fails, is a warning."""
        if error is None:
            self._failing.discard(name)
            return
        if not self._failing:
            message = f"Could not write {self.path / name}: {error}."
            warn(f"{message} The training goes on, and the next save tries again.", stacklevel=4)
        self._failing.add(name)


def _holds_epochs(run_dir: Path) -> bool:
    """Return whether there are results of a run, which a new one must not write over."""
    history = run_dir / "history.jsonl"
    return exist(run_dir / BEST) or (history.is_file() and history.stat().st_size > 0)


def holds_ended_run(run_dir: Path) -> bool:
    """Return whether the history of a folder is that of a run that has come to its end."""
    if _holds_epochs(run_dir) and not (run_dir / "preempted.json").exists():
        with suppress(FileNotFoundError, ValueError):
            return History.load(run_dir).stop_reason is not None
    return False


def ended_run(run_dir: Path | str) -> FileExistsError:
    """Return the error where a run has come to its end, and its checkpoints were removed."""
    return FileExistsError(
        f"run_dir {run_dir} holds a run that has ended, without a checkpoint to go on from. Give another run_dir, or "
        "remove the folder."
    )


def _line_of(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(with_checksum(encode(dict(row)))) + "\n").encode()
