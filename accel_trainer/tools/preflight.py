"""Two steps of a run on its full layout: does it fit, agree, save and load, and how long will the whole take."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ..base.codec import pack, same_bits
from ..base.console import is_first_rank, show
from ..base.dtensors import cut_of, is_cut, local, num_bytes
from ..callbacks import Callback
from ..config import TrainConfig
from ..data.order import is_stream, num_batches
from ..devices.environment import free_memory
from ..devices.units import units_of
from ..trainer import Trainer
from ..view.report import duration
from .run_functions import call_run_function

_STEPS = 2
_MEBI = 2**20  # bytes


@dataclass(eq=False)
class _Watch(Callback):
    """Note the state at the start, which a resumed run has read, and the time of each step."""

    at_start: dict[str, Tensor] = field(default_factory=dict)
    clock: list[float] = field(default_factory=list)

    def on_fit_start(self, trainer: Trainer) -> None:
        self.at_start = _tensors(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.append(time.perf_counter())


_Line = tuple[bool, str, str]  # whether all is well, what is checked, what was found


def _print(lines: Sequence[_Line]) -> int:
    """Print the page, on the main process, and return 0 if all is well, else 1."""
    for is_well, title, text in lines:
        if is_first_rank():
            show(f"{'ok    ' if is_well else 'FAILED'}  {title:<12}  {text}")
    return 0 if all(is_well for is_well, _, _ in lines) else 1


def check(name: str, config: TrainConfig) -> int:
    """Train and evaluate two steps, save, load and compare; print a page, and return 0 if all is well, else 1.

    The files go into a temporary folder on the disk of the config's `run_dir`.
    """
    with _scratch(config.run_dir) as folder:
        first, again, written = _Watch(), _Watch(), f"{folder}/run"
        try:
            trainer, loaders = _fit(name, config, {"run_dir": written, "resume": False}, first)
            _fit(name, config, {"run_dir": written, "resume": True}, again)
        except Exception as error:
            return _print([(False, "training", f"{type(error).__name__}: {error}")])
        files = _line_of_files(_tensors(trainer), again.at_start)
        disk = _line_of_disk(Path(written), config.keep_checkpoints, Path(config.run_dir or "."))
        seconds = _line_of_time(trainer, loaders, first.clock, config)
        return _print([*_lines_of_run(trainer), files, _line_of_model(trainer), _line_of_memory(), disk, seconds])


@contextmanager
def _scratch(run_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Give a folder on the disk of the run folder, if there is to be one; all processes of a launch get the same."""
    wanted = Path(tempfile.gettempdir()) / "run" if run_dir is None else Path(run_dir).expanduser().absolute()
    parent = next(folder for folder in wanted.parents if folder.is_dir())
    launch = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
    own = os.getpid() if int(os.environ.get("WORLD_SIZE") or 1) == 1 else crc32(" ".join(launch).encode())
    folder = parent / f".accel_trainer-check-{own:x}"
    if not is_first_rank():
        yield folder
        return
    shutil.rmtree(folder, ignore_errors=True)  # what a kill has left
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fit(name: str, config: TrainConfig, files: dict[str, Any], watch: _Watch) -> tuple[Trainer, dict[str, Any]]:
    """Train two steps, or go on after them, and evaluate on two batches of the test loader."""
    short = {"max_steps": _STEPS, "steps_per_epoch": _STEPS, "num_epochs": 1, "patience": None}
    quiet = {"restore_best": False, "verbose": False, "checkpoint_every": None}
    arguments, loaders = call_run_function(name, config, files | short | quiet)
    trainer = Trainer(**arguments | {"callbacks": [*arguments.get("callbacks", ()), watch]})
    test_loader = loaders.get("test_loader")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is no mean over samples|Labels hold -100")  # a line of the page says so
        trainer.fit(loaders["train_loader"], _first_of_each(test_loader))
    return trainer, loaders


def _first_of_each(test_loader: Any) -> Any:
    """Return the first batches of a test loader, or of each of several."""
    if isinstance(test_loader, Mapping):
        return {name: _first_batches(loader) for name, loader in test_loader.items()}
    return None if test_loader is None else _first_batches(test_loader)


def _first_batches(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of the first two batches; of a stream, and with a batch sampler of its own, the whole."""
    if is_stream(loader) or loader.batch_size is None:
        return loader
    first = Subset(loader.dataset, range(min(_STEPS * loader.batch_size, len(loader.dataset))))  # type: ignore[arg-type]
    return DataLoader(first, loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of all tensors of model and optimizer by name, of divided ones of the own rows."""
    found: dict[str, Tensor] = {}
    pack(trainer.model.state_dict(), found, "model")
    pack(trainer.optimizer.state_dict(), found, "optimizer")  # type: ignore[union-attr]
    return {name: local(tensor).detach().cpu().clone() for name, tensor in found.items()}


def _lines_of_run(trainer: Trainer) -> list[_Line]:
    history, step = trainer.history, trainer.state.step
    losses = f"train loss {history.train_losses[0]:.4f}"
    losses += f", test loss {history.test_losses[0]:.4f}" if history.test_losses else ""
    number = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    equal = "their weights are equal bit for bit" if number > 1 else "there is nobody to differ from"
    if any(map(is_cut, trainer.model.parameters())):
        equal = "each has a part of the weights, and all train them with the same settings"
    doubts = " ".join(trainer.doubts.values())
    return [
        (step == _STEPS, "training", f"{step} steps and an evaluation: {losses}"),
        (True, "processes", f"{number}: {equal}"),
        (not doubts, "means", doubts or "loss and metrics do not depend on how batches are cut, as far as seen"),
    ]


def _line_of_files(saved: dict[str, Tensor], loaded: dict[str, Tensor]) -> _Line:
    wrong = [name for name in saved if not same_bits(saved[name], loaded.get(name))]
    text = f"{len(saved)} tensors of model and optimizer come back bit for bit"
    return not wrong, "save, load", text if not wrong else f"{', '.join(wrong[:3])} came back different"


def _line_of_model(trainer: Trainer) -> _Line:
    """Say what model, gradients and optimizer take on each process, with the whole model and with a part of it."""
    model, optimizer = trainer.model, trainer.optimizer
    state: dict[str, Tensor] = {}
    pack(optimizer.state_dict(), state, "optimizer")  # type: ignore[union-attr]
    gradients = sum(num_bytes(weight) for weight in model.parameters() if weight.requires_grad)
    parts = {"weights": sum(map(num_bytes, model.parameters())), "gradients": gradients}
    parts[type(optimizer).__name__] = sum(map(num_bytes, state.values()))
    total, number = sum(parts.values()), torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    cut = next((cut_of(weight) for weight in model.parameters() if is_cut(weight)), None)
    largest = max(_bytes_by_unit(model))  # its weights and gradients are gathered
    named = ", ".join(f"{name} {size / _MEBI:,.1f}" for name, size in parts.items())
    kind = "full" if cut is None or cut.number == number else "hybrid"
    nums_parts = (cut.number,) if cut is not None else (number,) if number > 1 else (2, 4, 8)
    by_number = {several: total / several + 2 * largest for several in nums_parts}
    divided = "; ".join(f"{size / _MEBI:,.1f} on each of {several}" for several, size in by_number.items())
    here = total if cut is None else by_number[cut.number]
    room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else free_memory() + here
    text = f"{named}: {total / _MEBI:,.1f} MiB whole, without activations; with sharding='{kind}' {divided}"
    return here < 0.9 * room, "model", f"{text}{'' if cut is None else ' (as here)'}"


def _bytes_by_unit(model: nn.Module) -> list[int]:
    """Return the bytes of the weights that are gathered together, of each unit of a divided model."""
    *blocks, _ = units_of(model)
    sizes = [sum(map(num_bytes, block.parameters())) for block in blocks]
    return [*sizes, sum(map(num_bytes, model.parameters())) - sum(sizes)]


def _line_of_memory() -> _Line:
    if torch.cuda.is_available():
        used, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
        return used < 0.95 * total, "memory", f"{used / _MEBI:,.0f} MiB of {total / _MEBI:,.0f} on the device"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    used, free = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, int(free_memory())
    return free > 0.1 * used, "memory", f"{used / _MEBI:,.0f} MiB at most so far, {free / _MEBI:,.0f} free"


def _line_of_disk(written: Path, keep_checkpoints: int, run_dir: Path) -> _Line:
    """Compare what the files of the whole run need, by those written, with what the disk has."""
    checkpoint = sum(file.stat().st_size for file in written.glob("checkpoints/*/*") if file.is_file())
    need = checkpoint * (keep_checkpoints + 1) + sum(file.stat().st_size for file in written.glob("best/*"))
    run_dir = run_dir.expanduser().absolute()
    free = shutil.disk_usage(next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())).free
    text = f"{need / _MEBI:,.1f} MiB for {keep_checkpoints} checkpoints and the best, {free / _MEBI:,.0f} free"
    return need < free, "disk", text


def _line_of_time(trainer: Trainer, loaders: dict[str, Any], clock: list[float], config: TrainConfig) -> _Line:
    """Say how long an epoch and the run will take, by the second step and the evaluation."""
    step = clock[-1] - clock[-2]
    steps = config.steps_per_epoch or num_batches(loaders["train_loader"])
    if steps is None:
        return True, "time", f"{duration(step)} a step; the train loader does not say how many"
    epoch = step * steps
    test_loader = loaders.get("test_loader")
    all_tests = test_loader.values() if isinstance(test_loader, Mapping) else filter(None, [test_loader])
    tests = sum(num_batches(loader) or 0 for loader in all_tests)
    if tests:
        epoch += trainer.history.evaluation_seconds[0] * max(tests / _STEPS, 1)
    epochs = config.num_epochs if config.max_steps is None else min(config.num_epochs, config.max_steps / steps)
    return True, "time", f"about {duration(epoch)} an epoch of {steps} steps, {duration(epoch * epochs)} for the run"
