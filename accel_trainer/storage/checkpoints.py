"""The run folder and its checkpoints: plain files, whole or not at all, nothing in them that could execute.

Everything here runs on the main process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError
from .files import check_kind, free_name, remove, size_and_digest, write_flushed
from .tensor_files import flush, read_weights, save_tensors, seal_of

_FORMAT = 1
_MANIFEST = "manifest.json"
_NEEDED = ("model.safetensors", "optimizer.safetensors", "state.json", "history.jsonl")
BEST = "best/model.safetensors"
_KNOWN = (*_NEEDED, "progress.safetensors", BEST)
STEP_NAME = re.compile(r"step_(\d{8,})")
# Worth nothing to anybody: of systems, and of a safetensors file whose write was cut short.
_LITTER = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|@eaDir|\.nfs.*|\.tmp\w{6}")
_LARGEST_JSON = 2**28  # bytes: more is not ours


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
            state = read_json(self.path / "state.json")
            files = read_json(self.path / _MANIFEST)["files"]
            names = [name for name in _KNOWN if name in files and "/" not in name and name.endswith(".safetensors")]
            tensors = {name: read_weights(self.path / name) for name in names}
            return Snapshot(int(self.path.name.removeprefix("step_")), tensors, {}, state)
        except UNREADABLE as error:
            raise CheckpointError(f"{self.path} cannot be read: {error!r}.") from error


UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError, RecursionError, MemoryError)


def write_checkpoint(
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
    write_flushed(path / "state.json", (json.dumps(snapshot.state, allow_nan=False) + "\n").encode())
    write_flushed(path / "history.jsonl", history)
    if best is not None:
        (path / "best").mkdir()
        copy_once(best, path / BEST, others)
        flush(path / "best")
    files = {name: size_and_digest(path / name) for name in _KNOWN if (path / name).exists()}
    manifest = {"format": _FORMAT, "step": snapshot.step, "files": files}
    write_flushed(path / _MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    flush(path)


def copy_once(source: Path, target: Path, others: Sequence[Path]) -> None:
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


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, as it is written."""
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path.name} is too large")
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
        files = manifest["files"]  # what else is there is other programs', such as .DS_Store
        wrong = [name for name in files if name not in _KNOWN] or [name for name in _NEEDED if name not in files]
        if wrong:
            return f"its manifest has a wrong list of files ({wrong[0]!r})"
        for name, expected in files.items():
            if name == BEST:
                continue  # another copy may take its place: see RunFolder._best_for
            for place in [path / name, *(path / name).parents][: name.count("/") + 1]:
                check_kind(place, stat.S_ISREG if place == path / name else stat.S_ISDIR)
            if (path / name).stat().st_size != expected["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes in place of {expected['size']!r}"
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
    """Remove what this package has written into a checkpoint, and the folder, unless it holds files of others."""
    if path.is_symlink() or not path.is_dir():
        remove(path)
        return
    for name in (_MANIFEST, *_KNOWN):
        (path / name).unlink(missing_ok=True)
    for folder in (path / "best", path):
        for litter in [one for one in folder.glob("*") if _LITTER.fullmatch(one.name)]:
            remove(litter)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if path.exists():
        step = path.name.strip(".").partition(".")[0]
        os.rename(path, free_name(path.with_name(f"{step}_others")))


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """Return step and place of what is named as a checkpoint in a folder, the newest first."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    return sorted(((int(match[1]), path) for path in paths if (match := STEP_NAME.fullmatch(path.name))), reverse=True)
