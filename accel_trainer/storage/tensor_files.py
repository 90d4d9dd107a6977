"""Tensors as safetensors files that carry their checksum."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.codec import encode, unpack
from .files import flush, sha256_of

# The checksum of a file stands in its own header, and is computed with zeros in its place.
_BLANK = b"0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_LARGEST_HEADER = 2**27  # bytes; safetensors takes no larger ones


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], sealed: bool = False) -> None:
    """Write tensors of any device as safetensors, with metadata in the header, and see them through to the disk.

    `sealed` puts the checksum of the whole file into its header.
    """
    dense = {name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous() for name, tensor in tensors.items()}
    sharing = Counter(tensor.untyped_storage().data_ptr() for tensor in dense.values())
    for name, tensor in dense.items():
        if sharing[tensor.untyped_storage().data_ptr()] > 1:  # safetensors refuses views of one storage
            dense[name] = tensor.clone()
    header = {"format": "pt", "accel_trainer": json.dumps(encode(metadata))}
    with _in_utf8(path) as readable:
        save_file(dense, readable, metadata=header | ({"sha256": _BLANK.decode()} if sealed else {}))
    if sealed:
        _, position = seal_of(path)
        checksum = sha256_of(path, _BLANK, position)
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(checksum.encode())
    flush(path)


def seal_of(path: Path) -> tuple[str, int]:
    """Return the checksum that a file carries, unchecked, and its position; a `ValueError` says that there is none."""
    with open(path, "rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), _LARGEST_HEADER))
    found = _SEAL.search(header)
    if found is None:
        raise ValueError("it carries no checksum")
    return found[1].decode(), 8 + found.start(1)


def check_seal(path: Path) -> None:
    """Refuse a file of which a single bit has changed since `save_tensors` sealed it, with a `ValueError`."""
    seal, position = seal_of(path)
    if sha256_of(path, _BLANK, position) != seal:
        raise ValueError("its checksum does not match")


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


def metadata_of(path: Path) -> dict[str, Any]:
    """Return the metadata in the header of a file of `save_tensors`; other files are refused with a `ValueError`."""
    try:
        with _in_utf8(path) as readable, safe_open(readable, framework="pt") as file:
            content = unpack(json.loads((file.metadata() or {}).get("accel_trainer", "null")))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict):
        raise ValueError("its header holds no metadata of this package")
    return content


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of `save_tensors` by name, tied ones under each of their names."""
    with _in_utf8(path) as readable, safe_open(readable, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        aliases = json.loads((file.metadata() or {}).get("accel_trainer", "{}")).get("aliases", {})
    return tensors | {name: tensors[kept] for name, kept in aliases.items()}


@contextmanager
def _in_utf8(path: Path) -> Iterator[Path]:
    """Yield a path of a file that safetensors takes: it takes none that is not UTF-8, as on disks of older systems."""
    if is_utf8(str(path)):
        yield path
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield Path(f"/dev/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def is_utf8(text: str) -> bool:
    """Return whether a text can be written in UTF-8."""
    return text.encode(errors="replace").decode() == text
