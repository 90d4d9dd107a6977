"""The run folder: plain files, whole or not at all, nothing in them that could execute.

Everything here runs on the main process; only `BestWeights.restore` speaks to the others.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .history import History, encode
from .reductions import share_from_main

__all__ = ["BestWeights", "RunFolder", "load_best", "plain_state"]


# --- weights ----------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """Return a parameter's name as the user wrote it, without what compiling inserts anywhere in it.

    Example:
        >>> plain_name("_orig_mod.layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    return name.replace("_orig_mod.", "")


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model under the user's own names; no copies.

    Raises:
        TypeError: The model keeps an extra state that is not a tensor, which safetensors cannot hold.
    """
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The model's state {name!r} is a {type(value).__name__}, and weights are saved as tensors only. "
                "Keep it in a buffer, or leave it out of get_extra_state()."
            )
    return state


def _split_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and under which of those names the tied others are found."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        kept = first.setdefault(place, name) if tensor.numel() else name
        if kept != name:
            aliases[name] = kept
    return {name: tensor for name, tensor in state.items() if name not in aliases}, aliases


def save_weights(path: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
    """Write the weights as safetensors, beside the file first and then in its place.

    Args:
        path: File to write.
        model: The user's model.
        metadata: Plain data to keep in the file's header.
    """
    tensors, aliases = _split_aliases(plain_state(model))
    # Views of one storage are refused by safetensors and strided ones too: both become tensors of their own.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    beside = path.with_name(path.name + ".part")
    header = {"format": "pt", "accel_trainer": json.dumps(encode(metadata | {"aliases": aliases}))}
    try:
        save_file(own, beside, metadata=header)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of `save_weights` by name, tied ones under each of theirs."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        aliases = json.loads((file.metadata() or {}).get("accel_trainer", "{}")).get("aliases", {})
    return tensors | {name: tensors[kept] for name, kept in aliases.items()}


def _match(state: dict[str, Tensor], model: nn.Module, source: str) -> None:
    expected = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    problems = [
        *(f"missing {name}" for name in expected if name not in state),
        *(f"unexpected {name}" for name in state if name not in expected),
        *(
            f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the model"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ),
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}.")


@torch.no_grad()
def _copy_into(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[plain_name(name)])


def load_best(model: nn.Module, run_dir: str | os.PathLike[str]) -> nn.Module:
    """Give a model the best weights of a run, in place, and return it.

    Args:
        model: A model of the same architecture, on any device, compiled or wrapped or plain.
        run_dir: Folder of the run.

    Raises:
        FileNotFoundError: The folder holds no best weights.
        ValueError: The file is damaged, or does not fit the model; the message names each difference.

    Example:
        >>> import tempfile, torch
        >>> from accel_trainer.checkpoints import RunFolder
        >>> with tempfile.TemporaryDirectory() as run_dir:
        ...     saved = RunFolder(run_dir).save_best(torch.nn.Linear(2, 1), {"epoch": 3, "value": 0.1})
        ...     load_best(torch.nn.Linear(2, 1), run_dir)
        Linear(in_features=2, out_features=1, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_best takes a model and then a run_dir, got {type(model).__name__} first.")
    path = Path(run_dir) / "best" / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"No best weights in {Path(run_dir)}: {path} does not exist.")
    inner = model
    while isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner = inner.module
    try:
        state = read_weights(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    _match(state, inner, str(path))
    _copy_into(inner, state)
    return model


class BestWeights:
    """The weights of the best epoch, in the run folder or, without one, in host memory of the main process.

    Args:
        folder: The run folder, on the main process and if there is one.
        is_main: Whether this is the main process; the others keep nothing.
    """

    def __init__(self, folder: RunFolder | None, is_main: bool) -> None:
        self._folder, self._is_main = folder, is_main
        self._copy: dict[str, Tensor] | None = None

    def keep(self, model: nn.Module, metadata: dict[str, Any]) -> None:
        """Keep the present weights as the best so far.

        A folder that cannot be written ends nothing: a warning says so, and the weights stay in memory.
        """
        if not self._is_main:
            return
        if self._folder is not None and self._folder.save_best(model, metadata):
            self._copy = None
        else:
            self._copy = {name: tensor.detach().cpu().clone() for name, tensor in plain_state(model).items()}

    def restore(self, model: nn.Module, num_processes: int) -> None:
        """Give the model the weights kept last, on every process.

        Where the file is gone the model keeps the weights it has, and a warning says so.
        """
        if self._is_main:
            try:
                kept = self._copy
                _copy_into(model, kept if kept is not None else self._folder.read_best())  # type: ignore[union-attr]
            except (OSError, SafetensorError) as error:
                warnings.warn(f"The best weights are gone, the model keeps the last ones: {error}", stacklevel=2)
        if num_processes > 1:
            share_from_main(model.state_dict().values())


# --- the folder -------------------------------------------------------------------------------------------------------


class RunFolder:
    """The files of one run.

    Args:
        run_dir: The folder; made if need be.

    Raises:
        FileExistsError: The folder holds a run already.
        OSError: The folder cannot be made or written.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.path = Path(run_dir)
        for name in ("config.json", "history.jsonl", "best"):
            if (self.path / name).exists():
                raise FileExistsError(
                    f"run_dir {self.path} holds a run already ({name}). Give another run_dir, or remove the folder."
                )
        try:
            (self.path / "best").mkdir(parents=True)
            (self.path / "history.jsonl").touch()
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(
                f"run_dir {self.path} cannot be written: {reason}. Give a run_dir in a folder that can."
            ) from error
        self.best_path = self.path / "best" / "model.safetensors"

    def discard(self) -> None:
        """Remove the files of a run that has measured nothing, and the folder unless it holds others."""
        with suppress(OSError):
            for path in [self.path / name for name in ("config.json", "environment.json", "history.jsonl")]:
                path.unlink(missing_ok=True)
            (self.path / "best").rmdir()
            self.path.rmdir()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the folder."""
        self._attempt(name, lambda: _write_whole(self.path / name, json.dumps(encode(content), indent=2) + "\n"))

    def append_history(self, row: dict[str, Any]) -> None:
        """Append a line to `history.jsonl`."""

        def append() -> None:
            line = json.dumps(encode(row)) + "\n"
            with open(self.path / "history.jsonl", "ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(line.encode()) < len(line.encode()):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)  # no half line: the next one would be glued to it
                    raise

        self._attempt("history.jsonl", append)

    def save_best(self, model: nn.Module, metadata: dict[str, Any]) -> bool:
        """Write the best weights and return whether that succeeded."""
        return self._attempt("best/model.safetensors", lambda: save_weights(self.best_path, model, metadata))

    def read_best(self) -> dict[str, Tensor]:
        """Return the best weights by name."""
        return read_weights(self.best_path)

    def draw(self, history: History) -> None:
        """Draw `losses.png`; without matplotlib there is none."""

        def draw() -> None:
            beside = self.path / "losses.part.png"
            history.plot(beside)
            os.replace(beside, self.path / "losses.png")

        try:
            self._attempt("losses.png", draw)
        except ModuleNotFoundError as error:
            warnings.warn(f"No losses.png: {error}", stacklevel=2)

    def _attempt(self, name: str, write: Callable[[], None]) -> bool:
        """Write; a disk that is full or gone is no error of the training."""
        try:
            write()
        except (OSError, SafetensorError) as error:
            warnings.warn(f"Could not write {self.path / name}: {error}. The training goes on.", stacklevel=3)
            return False
        return True


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def describe_environment(hardware: str) -> dict[str, Any]:
    """Return what `environment.json` holds: hardware, versions, git commit, command line.

    Args:
        hardware: The line that is printed at the start.
    """
    names = ("accel_trainer", "torch", "accelerate", "safetensors", "datasets", "numpy")
    return {
        "hardware": hardware,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in names if (found := _version(name)) is not None},
        "git_commit": _git_commit(),
        "command": sys.orig_argv,
        "environment": {name: value for name, value in sorted(os.environ.items()) if _matters(name)},
    }


def _matters(variable: str) -> bool:
    return variable in ("WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") or variable.startswith("ACCELERATE_")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the working folder, marked when there are uncommitted changes; `None` without git."""
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (" with changes" if changes else "")
