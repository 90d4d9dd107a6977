"""Tensors as safetensors files that carry their checksum."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.codec import encode, unpack


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], sealed: bool = False) -> None:
    """Write tensors as safetensors and see them through to the disk.

    Args:
        path: File to write.
        tensors: On any device; strided ones and views of one storage too.
        metadata: Plain data to keep in the file's header.
        sealed: Whether to put the checksum of the whole file into its header.
    """
    plain = {name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous() for name, tensor in tensors.items()}
    sharing = Counter(tensor.untyped_storage().data_ptr() for tensor in plain.values())
    own = {  # safetensors refuses views of one storage
        name: tensor.clone() if sharing[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in plain.items()
    }
    seal = {_SEAL: _BLANK} if sealed else {}
    with _in_utf8(path) as place:
        save_file(own, place, metadata={"format": "pt", "accel_trainer": json.dumps(encode(metadata)), **seal})
    if sealed:
        _seal(path)
    flush(path)


# The checksum of a file, in its own header: computed with zeros in its place.
_SEAL, _BLANK = "sha256", "0" * 64
_SEALED = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def seal_of(path: Path) -> tuple[str, int]:
    """Return the checksum that a file carries, unchecked, and where in it.

    Raises:
        OSError: It cannot be read.
        ValueError: It carries none.
    """
    with open(path, "rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), _LARGEST_HEADER))
    found = _SEALED.search(header)
    if found is None:
        raise ValueError("it carries no checksum")
    return found[1].decode(), 8 + found.start(1)


_LARGEST_HEADER = 2**27  # bytes; safetensors takes no larger ones


def _sum_of(path: Path, place: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(place) + _BLANK.encode())
        file.seek(place + len(_BLANK))
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _seal(path: Path) -> None:
    _, place = seal_of(path)
    checksum = _sum_of(path, place)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(checksum.encode())


def check_seal(path: Path) -> None:
    """Refuse a file that is not as `save_tensors` has written and sealed it.

    Raises:
        OSError: It cannot be read.
        ValueError: Not one bit of it may have changed, and one has.
    """
    seal, place = seal_of(path)
    if _sum_of(path, place) != seal:
        raise ValueError("its checksum does not match")


def metadata_of(path: Path) -> dict[str, Any]:
    """Return the plain data that `save_tensors` has put into a file's header.

    Raises:
        OSError: It cannot be read.
        ValueError: It has none.
    """
    try:
        with _in_utf8(path) as place, safe_open(place, framework="pt") as file:
            content = unpack(json.loads((file.metadata() or {}).get("accel_trainer", "null")))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict):
        raise ValueError("it says nothing of itself")
    return content


@contextmanager
def _in_utf8(path: Path) -> Iterator[Path]:
    """Yield a name of a file that safetensors takes: in a folder of an older system's alphabet it takes none."""
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
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def flush(path: Path) -> None:
    """See a file, or the names in a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of `save_tensors` by name, tied ones under each of theirs."""
    with _in_utf8(path) as place, safe_open(place, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        aliases = json.loads((file.metadata() or {}).get("accel_trainer", "{}")).get("aliases", {})
    return tensors | {name: tensors[kept] for name, kept in aliases.items()}
