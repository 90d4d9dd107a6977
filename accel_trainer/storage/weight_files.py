"""The weights of an epoch on the disk: one file, or several parts with an index, as those of transformers.

Both are known by the path of the one file, such as `best/model.safetensors`. Parts are beside it, such as
`model-00001-of-00004.safetensors`, and so is their index `model.safetensors.index.json`, which also has what the header
of the one file says.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..base.codec import checked, encode, unpack, with_checksum
from . import tensor_files
from .files import check_is_file, flush, path_beside, put_in_place, write_flushed
from .shards import shard_of
from .tensor_files import check_seal, copy_once, save_tensors, seal_of


class Part(NamedTuple):
    """One of the files that a model's weights are in, as its writer tells of it."""

    file: str
    seal: str
    num_bytes: int
    names: list[str]


def index_of(path: Path) -> Path:
    """Return the path of the index of weights that are in parts."""
    return path.with_name(f"{path.name}.index.json")


def part_of(path: Path, index: int, number: int) -> Path:
    """Return the path of a part, 0-based, of so many."""
    return path.with_name(shard_of(path.name, index, number))


def told(path: Path) -> str:
    """Return how weights are called where they are damaged: by their file, or the folder of their parts."""
    return str(path.parent if _is_in_parts(path) else path)


def exist(path: Path) -> bool:
    """Return whether there are weights, in one file or in parts."""
    return path.is_file() or index_of(path).is_file()


def are_complete(path: Path) -> bool:
    """Return whether there are weights of which no file is missing, nor the index damaged."""
    try:
        files = files_of(path)
    except ValueError:
        return False
    return bool(files) and all(file.is_file() for file in files)


def files_of(path: Path) -> list[Path]:
    """Return the files that weights are in, of parts the index last; none where there are no weights."""
    if path.is_file() or not index_of(path).is_file():
        return [path] if path.is_file() else []
    return [*(path.with_name(file) for file in _read_index(path)["sha256"]), index_of(path)]


def metadata_of(path: Path) -> dict[str, Any]:
    """Return what is said of weights beside them; a `ValueError` says that nothing is."""
    if not _is_in_parts(path):
        return tensor_files.metadata_of(path)
    return _said_in(_read_index(path))


def check(path: Path) -> None:
    """Refuse weights of which a single bit has changed since they were written, with a `ValueError` or `OSError`."""
    if not _is_in_parts(path):
        check_is_file(path)
        check_seal(path)
        return
    check_is_file(index_of(path))
    index = _read_index(path)
    _said_in(index)
    for file, seal in index["sha256"].items():
        part = path.with_name(file)
        if not part.exists():
            raise ValueError(f"{file} is missing")
        check_is_file(part)
        try:
            check_seal(part)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if seal_of(part)[0] != seal:
            raise ValueError(f"{file} belongs to other weights")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors by name, tied ones under each of their names; of parts they are mapped, not read yet."""
    if not _is_in_parts(path):
        return tensor_files.read_weights(path)
    index = _read_index(path)
    tensors: dict[str, Tensor] = {}
    for file in index["sha256"]:
        tensors |= tensor_files.read_weights(path.with_name(file))
    return tensors | {name: tensors[kept] for name, kept in _said_in(index).get("aliases", {}).items()}


def _is_in_parts(path: Path) -> bool:
    return not path.is_file() and index_of(path).is_file()


def _read_index(path: Path, index: Path | None = None) -> dict[str, Any]:
    """Return the metadata of an index, which anybody may have written; a `ValueError` says that it is damaged.

    The index is the one in its place, or this one.
    """
    index = index or index_of(path)
    try:
        metadata: dict[str, Any] = checked(json.loads(index.read_text(encoding="utf-8")))["metadata"]
        are_parts = all(_is_part(path, file) and isinstance(seal, str) for file, seal in metadata["sha256"].items())
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name}: {error}") from error
    if not are_parts:
        raise ValueError(f"{index.name} names files that are no parts")
    return metadata


def _said_in(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an index has of what the header of the one file says; a `ValueError` says that it is damaged."""
    try:
        return dict(unpack(index["accel_trainer"]))
    except (TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"the metadata of the index make no sense: {error}") from error


def _is_part(path: Path, file: str) -> bool:
    return re.fullmatch(re.escape(path.stem) + r"-\d{5}-of-\d{5}\.safetensors", file) is not None


# --- writing ----------------------------------------------------------------------------------------------------------


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights into one file, in place of what was there, or raise an `OSError`."""
    put_in_place(path, lambda beside: save_tensors(beside, tensors, metadata, sealed=True))
    _remove_parts(path)
    flush(path.parent)


def write_part(path: Path, index: int, number: int, tensors: Mapping[str, Tensor]) -> Part:
    """Write one part beside its place, for `put_parts_in_place`."""
    part = part_of(path, index, number)
    save_tensors(path_beside(part), tensors, {}, sealed=True)
    seal, _ = seal_of(path_beside(part))
    return Part(part.name, seal, sum(tensor.nbytes for tensor in tensors.values()), list(tensors))


def put_parts_in_place(path: Path, parts: Sequence[Part], metadata: Mapping[str, Any]) -> None:
    """Put parts that were written beside their places there, with an index, in place of what was there.

    From the moment on at which the index has its name for the time between, a crash loses neither: see `finish_parts`.
    """
    described = {
        "total_size": sum(part.num_bytes for part in parts),
        "accel_trainer": encode(dict(metadata)),
        "sha256": {part.file: part.seal for part in parts},
    }
    names = {name: part.file for part in parts for name in part.names}
    index = with_checksum({"metadata": described, "weight_map": dict(sorted(names.items()))})
    beside = path_beside(index_of(path))
    write_flushed(beside, (json.dumps(index, indent=2) + "\n").encode())
    os.replace(beside, _between(path))
    flush(path.parent)
    finish_parts(path)


def _between(path: Path) -> Path:
    return path.with_name(f".{index_of(path).name}.next")


def finish_parts(path: Path) -> None:
    """Put parts in their places if that was begun, now or before a crash."""
    if not _between(path).is_file():
        return
    try:
        files = _read_index(path, _between(path))["sha256"]
    except ValueError:  # the disk has damaged it: what was there before stays
        _between(path).unlink()
        return
    for file in files:
        part = path.with_name(file)
        if path_beside(part).exists():
            os.replace(path_beside(part), part)
    path.unlink(missing_ok=True)
    _remove_parts(path, keep=files)
    os.replace(_between(path), index_of(path))
    flush(path.parent)


def _remove_parts(path: Path, keep: Sequence[str] | None = None) -> None:
    """Remove parts other than these; all, and their index, without any."""
    if keep is None:
        index_of(path).unlink(missing_ok=True)
    for part in path.parent.glob(f"{path.stem}-*-of-*.safetensors"):
        if part.name not in (keep or ()) and _is_part(path, part.name):
            part.unlink(missing_ok=True)


def remove_weights(path: Path) -> None:
    """Remove weights, if they are there."""
    path.unlink(missing_ok=True)
    _remove_parts(path)


def clean(path: Path) -> None:
    """Finish what a crash has left of parts that were complete, and remove what it has left half done."""
    finish_parts(path)
    if path.is_file():
        _remove_parts(path)
    for left in (path, index_of(path)):
        path_beside(left).unlink(missing_ok=True)
    for left in path.parent.glob(f".{path.stem}-*-of-*.safetensors.part"):
        left.unlink(missing_ok=True)


def copy_weights(source: Path, target: Path, others: Sequence[Path] = ()) -> None:
    """Copy weights, in place of what was there; or link to the copies in `others` that are equal."""
    files = files_of(source)
    if source in files:
        put_in_place(target, lambda beside: copy_once(source, beside, others))
        _remove_parts(target)
        return
    *parts, index = files
    for part in parts:
        beside = path_beside(target.with_name(part.name))
        beside.unlink(missing_ok=True)
        copy_once(part, beside, [other.with_name(part.name) for other in others])
    _between(target).write_bytes(index.read_bytes())
    flush(_between(target))
    finish_parts(target)
