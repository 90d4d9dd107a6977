"""Checkpoints: folders of data files, whole or not at all, with nothing in them that could execute.

Everything here runs on the main process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError
from .files import check_kind, flush, free_name, remove, size_and_digest, write_flushed
from .tensor_files import read_weights, save_tensors, seal_of

MODEL, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.safetensors", "progress.safetensors"
BEST = "best/model.safetensors"
EPOCHS = "best/epoch_*.safetensors"  # other good epochs, where the user wants more than the best
_STEP_NAME = re.compile(r"step_(\d{8,})")
_FORMAT = 1
_MANIFEST = "manifest.json"
_NEEDED = (MODEL, OPTIMIZER, "state.json", "history.jsonl")
_KNOWN = (*_NEEDED, PROGRESS, BEST)
# Worth nothing to anybody: files of operating systems, and of a safetensors write that was cut short.
_LITTER = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|@eaDir|\.nfs.*|\.tmp\w{6}")

# What reading a damaged or senseless file can raise.
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError),
    SafetensorError,
)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by file and name
    metadata: dict[str, Any]  # of the file of the weights
    state: dict[str, Any]  # everything that is no tensor, as JSON can hold it


@contextmanager
def understood(source: Path | str) -> Iterator[None]:
    """Turn what unreadable or senseless content raises into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"{source} cannot be read: {error!r}.") from error


def read_checkpoint(path: Path) -> Snapshot:
    """Read a checkpoint in which `fault_of` has found nothing wrong."""
    manifest = read_json(path / _MANIFEST)
    tensors = {name: read_weights(path / name) for name in (MODEL, OPTIMIZER, PROGRESS) if name in manifest["files"]}
    return Snapshot(manifest["step"], tensors, {}, read_json(path / "state.json"))


def files_of(path: Path) -> list[str]:
    """Return the names of a checkpoint's files within its folder, the manifest last."""
    return [*read_json(path / _MANIFEST)["files"], _MANIFEST]


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give another name for a checkpoint to be written under; it is then renamed, in place of one that is there."""
    part, old = (path.with_name(f".{path.name}.{ending}") for ending in ("part", "old"))
    clean_checkpoints(path.parent)
    try:
        yield part
        if os.path.lexists(path):  # of the same step, but not as far: the epoch has ended since
            os.rename(path, old)
        os.rename(part, path)
        flush(path.parent)
    finally:
        clean_checkpoints(path.parent)


def add_checkpoint(folder: Path, snapshot: Snapshot, history: bytes, best: Path, keep: int) -> Path:
    """Write a checkpoint under another name, rename it, remove those that are too many, and return its folder.

    `history` are the lines of the history so far; `best` is the file of the best weights so far, and may be missing.
    """
    path = folder / checkpoint_name(snapshot.step)
    with replaced(path) as part:
        write_checkpoint(part, snapshot, history, best, [other / BEST for _, other in steps_in(folder)])
    # Checkpoints of later steps were made before the run went back to an earlier one.
    steps = steps_in(folder)
    wanted = [other for step, other in steps if step <= snapshot.step][:keep]
    with suppress(OSError):
        for _, other in steps:
            if other not in wanted:  # renamed first: a kill in between leaves nothing half there
                os.rename(other, other.with_name(f".{other.name}.part"))
    clean_checkpoints(folder)
    return path


def clean_checkpoints(folder: Path) -> None:
    """Remove half a checkpoint, and one that was replaced; the old one goes back where the new one is missing."""
    with suppress(OSError):
        for path in folder.glob(".step_*.part"):
            remove_checkpoint(path)
        for path in folder.glob(".step_*.old"):
            in_place = folder / path.name[1 : -len(".old")]
            if _STEP_NAME.fullmatch(in_place.name) and not os.path.lexists(in_place):
                os.rename(path, in_place)
            else:
                remove_checkpoint(path)


def write_checkpoint(path: Path, snapshot: Snapshot, history: bytes, best: Path, others: Sequence[Path]) -> None:
    """Write the files of a checkpoint into a new folder, the manifest last; `others` are other best weights."""
    path.mkdir()
    for name, tensors in snapshot.tensors.items():
        save_tensors(path / name, tensors, snapshot.metadata if name == MODEL else {})
    write_flushed(path / "state.json", (json.dumps(snapshot.state, allow_nan=False) + "\n").encode())
    write_flushed(path / "history.jsonl", history)
    if best.exists():
        (path / "best").mkdir()
        copy_once(best, path / BEST, others)
        flush(path / "best")
    files = {name: size_and_digest(path / name) for name in _KNOWN if (path / name).exists()}
    manifest = {"format": _FORMAT, "step": snapshot.step, "files": files}
    write_flushed(path / _MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    flush(path)


def copy_once(source: Path, target: Path, others: Sequence[Path]) -> None:
    """Copy a file, or link to another copy of it if there is one.

    So its content is on the disk twice, and what damages one copy leaves the other.
    """
    for other in others:
        with suppress(OSError, ValueError):  # no such file, no checksum in it, or a disk without links
            is_same = seal_of(other) == seal_of(source) and other.stat().st_size == source.stat().st_size
            if is_same and not other.samefile(source):
                os.link(other, target)
                return
    shutil.copyfile(source, target)
    flush(target)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def fault_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, `None` if every file is as it was written."""
    try:
        check_kind(path, stat.S_ISDIR)
        check_kind(path / _MANIFEST, stat.S_ISREG)
        manifest = read_json(path / _MANIFEST)
        if manifest["format"] != _FORMAT:
            return f"format {manifest['format']!r} is not known to this version"
        if path.name != checkpoint_name(manifest["step"]):
            return f"its manifest is that of step {manifest['step']!r}"
        files = manifest["files"]  # files that it does not name are other programs', such as .DS_Store
        wrong = [name for name in files if name not in _KNOWN] or [name for name in _NEEDED if name not in files]
        if wrong:
            return f"its manifest has a wrong list of files ({wrong[0]!r})"
        for name, expected in files.items():
            if name == BEST:
                continue  # another copy may take its place: see RunFolder._best_for
            check_kind(path / name, stat.S_ISREG)
            size = (path / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes in place of {expected['size']!r}"
            if size_and_digest(path / name) != expected:
                return f"the checksum of {name} does not match"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except UNREADABLE as error:
        return f"it cannot be read ({error})"
    return None


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"step_{step:08d}"


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint's files, and the folder unless other programs keep files there: then it is renamed."""
    if path.is_symlink() or not path.is_dir():
        remove(path)
        return
    for name in (_MANIFEST, *_KNOWN):
        (path / name).unlink(missing_ok=True)
    for folder in (path / "best", path):
        for litter in [entry for entry in folder.glob("*") if _LITTER.fullmatch(entry.name)]:
            remove(litter)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if path.exists():
        step = path.name.strip(".").partition(".")[0]
        os.rename(path, free_name(path.with_name(f"{step}_others")))


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of each entry of a folder that is named as a checkpoint, the newest first."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    return sorted(((int(match[1]), path) for path in paths if (match := _STEP_NAME.fullmatch(path.name))), reverse=True)
