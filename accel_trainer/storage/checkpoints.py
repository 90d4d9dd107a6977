"""Checkpoints: folders of data files, whole or not at all, with nothing in them that could execute.

Everything here runs on the main process. The tensors are in one file of each kind (format 1), or in shards that the
processes write together (format 2, of models that are divided over them).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import CheckpointError
from .files import check_is_file, check_kind, flush, free_name, remove, size_and_digest, write_flushed
from .shards import Shard, joined, shard_of
from .tensor_files import read_weights, save_tensors
from .weight_files import are_complete, clean, copy_weights
from .weight_files import files_of as files_of_weights

MODEL, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.safetensors", "progress.safetensors"
BEST = "best/model.safetensors"
EPOCHS = "best/epoch_*.safetensors"  # other good epochs, where the user wants more than the best
_STEP_NAME = re.compile(r"step_(\d{8,})")
_MANIFEST, _INDEX = "manifest.json", "index.json"
_PLAIN = ("state.json", "history.jsonl")
_NEEDED = {1: (MODEL, OPTIMIZER, *_PLAIN), 2: (_INDEX, *_PLAIN)}  # by format
_SHARD = r"(-\d{5}-of-\d{5})?"
_KNOWN = re.compile(
    rf"(model|optimizer|progress){_SHARD}\.safetensors|{_INDEX}|state\.json|history\.jsonl"
    rf"|best/model{_SHARD}\.safetensors|best/model\.safetensors\.index\.json"
)
# Worth nothing to anybody: files of operating systems, and of a safetensors write that was cut short.
_LITTER = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|@eaDir|\.nfs.*|\.tmp\w{6}")

# What reading a damaged or senseless file can raise.
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError),
    SafetensorError,
)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory.

    Attributes:
        step: When it was made.
        tensors: By file and name; on the disk those of a divided model are `Parts`.
        metadata: Of the file of the weights.
        state: Everything that is no tensor, as JSON can hold it.
        shard: Which shard this process saves; `None` where there are none.
    """

    step: int
    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, Any]
    state: dict[str, Any]
    shard: Shard | None = None


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
    if manifest["format"] == 1:
        kinds = [name for name in (MODEL, OPTIMIZER, PROGRESS) if name in manifest["files"]]
        tensors: dict[str, dict[str, Any]] = {name: read_weights(path / name) for name in kinds}
    else:
        tensors = _read_shards(path, read_json(path / _INDEX))
    return Snapshot(manifest["step"], tensors, {}, read_json(path / "state.json"))


def _read_shards(path: Path, index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is in the shards of each file, by file and name; nothing is read before it is used."""
    tensors = {}
    for name, shapes in index["shapes"].items():
        shards = [
            read_weights(path / shard_of(name, number, index["num_shards"])) for number in range(index["num_shards"])
        ]
        content = joined(shards, shapes)
        tensors[name] = content | {alias: content[kept] for alias, kept in index["aliases"].get(name, {}).items()}
    return tensors


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


Files = dict[str, dict[str, Any]]  # size and digest by name, as a manifest lists them


def write_tensors(path: Path, snapshot: Snapshot) -> Files:
    """Write the tensors that this process saves into the folder of a checkpoint."""
    files: Files = {}
    shard = snapshot.shard
    if shard is not None and shard.index is None:
        return files
    for name, tensors in snapshot.tensors.items():
        file = name if shard is None else shard.file(name)
        save_tensors(path / file, tensors, snapshot.metadata if name == MODEL and shard is None else {})
        files[file] = size_and_digest(path / file)
    return files


def add_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    history: bytes,
    best: Path,
    keep: int,
    write: Callable[[Path, Snapshot], Files] = write_tensors,
) -> Path:
    """Write a checkpoint under another name, rename it, remove those that are too many, and return its folder.

    Args:
        folder: Of the checkpoints.
        snapshot: What it holds.
        history: The lines of the history so far.
        best: The best weights so far, which may be missing.
        keep: How many checkpoints stay.
        write: Writes the tensors into a folder, here and on the other processes that have some.
    """
    path = folder / checkpoint_name(snapshot.step)
    with replaced(path) as part:
        others = [other / BEST for _, other in steps_in(folder)]
        write_checkpoint(part, snapshot, history, best, others, write)
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


def write_checkpoint(
    path: Path,
    snapshot: Snapshot,
    history: bytes,
    best: Path,
    others: Sequence[Path],
    write: Callable[[Path, Snapshot], Files] = write_tensors,
) -> None:
    """Write the files of a checkpoint into a new folder, the manifest last; `others` are other best weights."""
    path.mkdir()
    files = write(path, snapshot)
    plain = {"state.json": json.dumps(snapshot.state, allow_nan=False).encode() + b"\n", "history.jsonl": history}
    if snapshot.shard is not None:
        aliases = {MODEL: snapshot.metadata["aliases"]}
        index = {"num_shards": snapshot.shard.number, "shapes": snapshot.shard.shapes, "aliases": aliases}
        plain[_INDEX] = json.dumps(index).encode() + b"\n"
    for name, content in plain.items():
        write_flushed(path / name, content)
    if are_complete(best):
        (path / "best").mkdir()
        copy_weights(best, path / BEST, others)
    written = [*plain, *(f"best/{file.name}" for file in files_of_weights(path / BEST))]
    files = files | {name: size_and_digest(path / name) for name in written}
    manifest = {"format": 1 if snapshot.shard is None else 2, "step": snapshot.step, "files": files}
    write_flushed(path / _MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    flush(path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def fault_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, `None` if every file is as it was written."""
    try:
        check_kind(path, stat.S_ISDIR)
        check_kind(path / _MANIFEST, stat.S_ISREG)
        manifest = read_json(path / _MANIFEST)
        if manifest["format"] not in _NEEDED:
            return f"format {manifest['format']!r} is not known to this version"
        if path.name != checkpoint_name(manifest["step"]):
            return f"its manifest is that of step {manifest['step']!r}"
        files = manifest["files"]  # files that it does not name are other programs', such as .DS_Store
        needed = _NEEDED[manifest["format"]]
        wrong = [name for name in files if not _KNOWN.fullmatch(name)] or [name for name in needed if name not in files]
        if wrong:
            return f"its manifest has a wrong list of files ({wrong[0]!r})"
        # Another copy of the best weights may take the place of these: see RunFolder._best_for.
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            faults = executor.map(lambda name: _fault_of_file(path, name, files[name]), filter(_is_own, files))
            fault = next(filter(None, faults), None)
        if fault is not None or manifest["format"] == 1:
            return fault
        index = read_json(path / _INDEX)
        shards = [
            shard_of(name, number, index["num_shards"])
            for name in index["shapes"]
            for number in range(index["num_shards"])
        ]
        missing = [name for name in (*(MODEL, OPTIMIZER), *shards) if name not in (*index["shapes"], *files)]
        if missing:
            return f"its manifest has a wrong list of files ({missing[0]!r})"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except UNREADABLE as error:
        return f"it cannot be read ({error})"
    return None


def epoch_path(run_dir: Path, epoch: int) -> Path:
    """Return the file of the weights of an epoch, 1-based, among the best ones."""
    return run_dir / EPOCHS.replace("*", f"{epoch:08d}")


def epochs_in(run_dir: Path) -> dict[int, Path]:
    """Return the weights of the epochs that are kept beside the best, by epoch."""
    named = re.compile(r"epoch_(\d{8})\.safetensors(\.index\.json)?")
    found = (named.fullmatch(path.name) for path in sorted((run_dir / "best").glob("epoch_*")))
    return {int(match[1]): epoch_path(run_dir, int(match[1])) for match in found if match}


def _is_own(name: str) -> bool:
    return not name.startswith("best/")


def _fault_of_file(path: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    check_is_file(path / name)
    size = (path / name).stat().st_size
    if size != expected["size"]:
        return f"{name} has {size} bytes in place of {expected['size']!r}"
    return None if size_and_digest(path / name) == expected else f"the checksum of {name} does not match"


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"step_{step:08d}"


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint's files, and the folder unless other programs keep files there: then it is renamed."""
    if path.is_symlink() or not path.is_dir():
        remove(path)
        return
    (path / _MANIFEST).unlink(missing_ok=True)
    for file in (*path.glob("*"), *path.glob("best/*")):
        if _KNOWN.fullmatch(str(file.relative_to(path))):
            file.unlink(missing_ok=True)
    clean(path / BEST)
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
