"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tensor_files import flush


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and see it through to the disk."""
    path.write_bytes(content)
    flush(path)


def put_in_place(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside, then put it in its place."""
    beside = path_beside(path)
    beside.unlink(missing_ok=True)
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def path_beside(path: Path) -> Path:
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

    put_in_place(path, write)


def size_and_digest(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, as a manifest lists them."""
    with open(path, "rb") as file:
        digest, size = hashlib.sha256(), 0
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
    return {"size": size, "sha256": digest.hexdigest()}


def check_kind(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Refuse what is not what it should be, such as a link that leads elsewhere."""
    if not is_kind(os.lstat(path).st_mode):
        raise ValueError(f"{path.name} is not a plain {'file' if is_kind is stat.S_ISREG else 'folder'}")


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """Return a path that does not exist yet: this one with a number."""
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(1))
    return next(one for one in numbered if not os.path.lexists(one))
