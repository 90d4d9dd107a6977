"""Two steps of a run on its full layout: does it fit, agree, save and load, and how long will the whole take."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ..base.codec import pack, same_bits
from ..base.console import is_first_rank, show
from ..callbacks import Callback
from ..config import TrainConfig
from ..data.order import is_stream, num_batches
from ..devices.environment import free_memory
from ..trainer import Trainer
from ..view.report import duration
from .run_functions import make_run

_STEPS = 2


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


class _Page:
    """The lines of the page, printed by the main process, and whether all is well."""

    def __init__(self, is_main: bool) -> None:
        self.is_main, self.is_well = is_main, True

    def say(self, is_well: bool, what: str, told: str) -> None:
        self.is_well = self.is_well and is_well
        if self.is_main:
            show(f"{'ok    ' if is_well else 'FAILED'}  {what:<12}  {told}")


def check(name: str, config: TrainConfig, run_dir: str | None) -> int:
    """Train and evaluate two steps, save, load and compare; print a page, and return 0 if all is well, else 1.

    Args:
        name: Of the run function.
        config: Of the run that is to come; without a `run_dir`.
        run_dir: Where that run is to be saved; its disk is looked at. `None` looks at the working folder's.
    """
    with tempfile.TemporaryDirectory() as folder:
        choices: dict[str, Any] = {
            "max_steps": _STEPS,
            "steps_per_epoch": _STEPS,
            "num_epochs": 1,
            "run_dir": f"{folder}/run",
        }
        short = replace(config, **choices, verbose=False, restore_best=False, patience=None)
        first, again = _Watch(), _Watch()
        page = _Page(is_main=True)
        try:
            trainer, loaders = _fit(name, short, first)
            page.is_main = trainer.is_main_process
            _fit(name, replace(short, resume=True), again)
        except Exception as error:
            page.is_main = is_first_rank()
            page.say(False, "training", f"{type(error).__name__}: {error}")
            return 1
        _tell_run(page, trainer)
        _tell_files(page, _tensors(trainer), again.at_start)
        _tell_room(page, Path(folder, "run"), config, Path(run_dir or "."))
        _tell_time(page, trainer, loaders, first.clock, config)
    return 0 if page.is_well else 1


def _is_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _fit(name: str, config: TrainConfig, watch: _Watch) -> tuple[Trainer, dict[str, Any]]:
    """Run a run function for as long as the config says, on two batches of its test loader."""
    of_trainer, loaders = make_run(name, config)
    chosen = of_trainer.get("config", config)
    kept = ("max_steps", "steps_per_epoch", "num_epochs", "run_dir", "resume", "verbose", "restore_best", "patience")
    own = replace(chosen, checkpoint_every=None, **{one: getattr(config, one) for one in kept})
    callbacks = [*of_trainer.pop("callbacks", ()), watch]
    trainer = Trainer(**{"loss_fn": None} | of_trainer | {"config": own, "callbacks": callbacks})
    test_loader = loaders.get("test_loader")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is no mean over samples|Labels hold -100")  # a line of the page tells it
        trainer.fit(loaders["train_loader"], None if test_loader is None else _first_batches(test_loader))
    return trainer, loaders


def _first_batches(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of the first two batches; of a stream, and with a batch sampler of its own, the whole."""
    if is_stream(loader) or loader.batch_size is None:
        return loader
    size = min(_STEPS * loader.batch_size, len(loader.dataset))  # type: ignore[arg-type]
    few: DataLoader[Any] = DataLoader(
        Subset(loader.dataset, range(size)),
        loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )
    return few


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of all tensors of model and optimizer by name."""
    model: nn.Module = trainer.model
    found = {f"model: {name}": tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    if trainer.optimizer is not None:
        pack(trainer.optimizer.state_dict(), found, "optimizer")
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def _tell_run(page: _Page, trainer: Trainer) -> None:
    history = trainer.history
    losses = f"train loss {history.train_losses[0]:.4f}"
    losses += f", test loss {history.test_losses[0]:.4f}" if history.test_losses else ""
    page.say(trainer.state.step == _STEPS, "training", f"{trainer.state.step} steps and an evaluation: {losses}")
    number = torch.distributed.get_world_size() if _is_group() else 1
    told = "their weights are equal bit for bit" if number > 1 else "there is nobody to differ from"
    page.say(True, "processes", f"{number}: {told}")
    doubts = list(trainer.doubts.values())
    page.say(
        not doubts, "means", " ".join(doubts) or "loss and metrics do not depend on how batches are cut, as far as seen"
    )


def _tell_files(page: _Page, saved: dict[str, Tensor], loaded: dict[str, Tensor]) -> None:
    wrong = [name for name in saved if not same_bits(saved[name], loaded.get(name))]
    told = f"{len(saved)} tensors of model and optimizer come back bit for bit"
    page.say(not wrong, "save, load", told if not wrong else f"{', '.join(wrong[:3])} came back different")


def _tell_room(page: _Page, written: Path, config: TrainConfig, run_dir: Path) -> None:
    """Say what memory was used and is there, and what the files of the whole run need and have."""
    mebi = 2**20
    if torch.cuda.is_available():
        used, there = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
        told = f"{used / mebi:,.0f} MiB of {there / mebi:,.0f} on the device"
        page.say(used < 0.95 * there, "memory", told)
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        used, there = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, int(free_memory())
        page.say(there > 0.1 * used, "memory", f"{used / mebi:,.0f} MiB at most so far, {there / mebi:,.0f} free")
    if not page.is_main:
        return
    one = sum(file.stat().st_size for file in written.glob("checkpoints/*/*") if file.is_file())
    need = one * (config.keep_checkpoints + 1) + sum(file.stat().st_size for file in written.glob("best/*"))
    place = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    told = f"{need / mebi:,.1f} MiB for {config.keep_checkpoints} checkpoints and the best, {free / mebi:,.0f} free"
    page.say(need < free, "disk", told)


def _tell_time(page: _Page, trainer: Trainer, loaders: dict[str, Any], clock: list[float], config: TrainConfig) -> None:
    """Say how long an epoch and the run will take, by the second step and the evaluation."""
    step = clock[-1] - clock[-2]
    steps = config.steps_per_epoch or num_batches(loaders["train_loader"])
    if steps is None:
        page.say(True, "time", f"{duration(step)} a step; the train loader does not say how many")
        return
    epoch = step * steps
    test_loader = loaders.get("test_loader")
    tests = None if test_loader is None else num_batches(test_loader)
    if tests:
        epoch += trainer.history.evaluation_seconds[0] * max(tests / _STEPS, 1)
    epochs = config.num_epochs if config.max_steps is None else min(config.num_epochs, config.max_steps / steps)
    told = f"about {duration(epoch)} an epoch of {steps} steps, {duration(epoch * epochs)} for the run"
    page.say(True, "time", told)
