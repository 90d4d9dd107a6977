"""Files that are written whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """See a file, or the names in a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and see it through to the disk."""
    path.write_bytes(content)
    flush(path)


def put_in_place(path: Path, write: Callable[[Path], object]) -> None:
    """Let a function write a file beside this path, then rename it; after an error the file before is untouched."""
    beside = path_beside(path)
    beside.unlink(missing_ok=True)
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def path_beside(path: Path) -> Path:
    """Return where a file is written before it is renamed; nobody else uses such a name."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, content: bytes, flushed: bool = True) -> None:
    """Write a file whole or not at all; `flushed` sees it through to the disk, for what cannot be made again."""
    write = write_flushed if flushed else Path.write_bytes
    put_in_place(path, lambda beside: write(beside, content))


def sha256_of(path: Path, blank: bytes = b"", position: int = 0) -> str:
    """Return the SHA-256 of a file, as if the bytes from a position on were these blank ones."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(position) + blank)
        file.seek(position + len(blank))
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def size_and_digest(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, as a manifest lists them."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def check_kind(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Refuse anything but a file or a folder where one is needed, such as a link that leads elsewhere."""
    if not is_kind(os.lstat(path).st_mode):
        raise ValueError(f"{path.name} is not a {'file' if is_kind is stat.S_ISREG else 'folder'}, or is a link")


def check_is_file(path: Path) -> None:
    """Refuse anything but a file, such as a link that leads elsewhere."""
    check_kind(path, stat.S_ISREG)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """Return a path that does not exist yet: this one with a number."""
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(1))
    return next(candidate for candidate in numbered if not os.path.lexists(candidate))
