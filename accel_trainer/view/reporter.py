"""What people read about a run: its epochs and its end, on the screen, in the history file, picture and page."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.clock import Clock
from ..base.extras import is_installed, without
from ..callbacks import Callback
from ..devices.environment import masked
from ..errors import ProcessFailedError
from ..history import History
from ..state import TrainState
from ..storage.files import put_in_place
from ..storage.run_folder import RunFolder
from .picture import draw_losses
from .report import LivePage, seen_from
from .screen import in_green, recut_message

if TYPE_CHECKING:
    from ..trainer import Trainer


class Reporter(Callback):
    """Show a run to people; `folder` and `page` are `None` without a run folder and on all but the main process."""

    def __init__(
        self,
        folder: RunFolder | None,
        history: History,
        state: TrainState,
        monitor: str,
        num_epochs: int,
        announce: Callable[[str], None],
    ) -> None:
        self._folder, self._history, self._state = folder, history, state
        self._monitor, self._num_epochs, self._announce = monitor, num_epochs, announce
        self._config: dict[str, Any] = {}
        self.page = None if folder is None else LivePage(folder.path, history)

    def report_start(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write `config.json`, `environment.json` and the first page."""
        self._config = config
        if self._folder is not None:
            self._folder.write_json("environment.json", environment)
            self._folder.write_json("config.json", config)
            steps = zip(self._history.steps, self._history.step_losses, self._history.step_learning_rates, strict=True)
            self._folder.write_steps(_step_row(*step) for step in steps)
            files = [file for file, library in _LIBRARIES.items() if not is_installed(library)]
            if files:
                self._announce(str(without(*_LIBRARIES.values(), no=" and ".join(files))))
        self.write_page("running")

    def on_report(self, trainer: Trainer) -> None:
        """Record loss and learning rates of a step, on every process, and write them down."""
        rates = [float(group.get("lr", math.nan)) for group in trainer.optimizer.param_groups]  # type: ignore[union-attr]
        self._history.report(self._state.step, self._state.recent_loss, rates)
        if self._folder is not None:
            self._folder.append_step(_step_row(self._state.step, self._state.recent_loss, rates))

    def report_recut(self, name: str, num_micro_batches: int) -> None:
        """Say that the batches of a loader are cut into more micro-batches from here on."""
        self._announce(recut_message(name, num_micro_batches))
        key = "num_micro_batches" if name == "train_loader" else "num_micro_batches_of_test"
        if self._folder is not None and self._config:
            self._config["resolved"][key] = num_micro_batches
            self._folder.write_json("config.json", self._config)

    def _best(self) -> dict[str, Any]:
        return {"best_epoch": self._state.best_epoch, "best_value": self._state.best_value}

    def report_epoch(self, clock: Clock) -> None:
        """Show the epoch that was recorded last; the clock counts the time of the page as saving."""
        state, row = self._state, self._history.last()
        self._history.note_best(state.best_epoch, state.best_value)
        if self._folder is not None:
            self._folder.append_history({"epoch": state.epoch, "step": state.step} | row | self._best())
        text = f"Epoch {state.epoch}/{self._num_epochs} - Train Loss: {row['train_loss']:.4f}"
        text += f", Test Loss: {row['test_loss']:.4f}" if "test_loss" in row else ""
        text += "".join(f", {name}: {value:.4f}" for name, value in row["metrics"].items())
        self._announce(in_green(text + " (best)") if state.best_epoch == state.epoch else text)
        with clock.measured("saving_seconds"):
            self.write_page("running")

    def write_page(self, state: str) -> None:
        """Write the page of the run in a state; while it is `running`, only when the page is due."""
        page, folder = self.page, self._folder
        if page is not None and folder is not None and (state != "running" or page.is_due()):
            folder.attempt("report.html", lambda: page.write(state))

    def report_end(self, holds_best: bool, how: str, advice: str | None) -> None:
        """Say how the run ended, `finished`, `interrupted` or `failed`, and show it in picture and page.

        The model holds the weights of the best epoch or the last ones; `advice` says what took too much time.
        """
        history, state, folder = self._history, self._state, self._folder
        if folder is not None:
            folder.append_history({"stop_reason": history.stop_reason} | self._best())
            self._write_picture(folder)
            self.write_page(how)
        self._announce(f"Stopped: {history.stop_reason}.")
        if not history.num_epochs:
            self._announce("No epoch was finished: nothing is recorded, and the model keeps its present weights.")
        elif state.best_epoch is None:
            self._announce("No epoch has a finite monitored value: the model keeps its last weights.")
        else:
            kept = "the model holds its weights" if holds_best else "the model holds the last weights"
            value = f"{self._monitor} {state.best_value:.4f}"
            self._announce(in_green(f"Best epoch {state.best_epoch}: {value}; {kept}."))
        if folder is not None and history.num_epochs:
            self._announce_files(folder)
        for line in filter(None, (history.overfitting(), advice)):
            self._announce(line)

    def report_failure(self, state: str, reason: str) -> None:
        """Show in `failed.json` and the page that an error has ended the run, unless its end was reported before.

        Nothing is left of a run that has measured and saved nothing.
        """
        page, folder = self.page, self._folder
        if page is None or folder is None or page.state != "running" or not (folder.path / "history.jsonl").exists():
            return
        self._history.end(reason)
        folder.write_json("failed.json", {"state": state, "reason": reason, "step": self._state.step})
        self.write_page(state)
        self._write_picture(folder)  # last: another process may end this one soon

    def _announce_files(self, folder: RunFolder) -> None:
        """Say which files are in the folder by now, and which could not be written."""
        names = [file.split("/")[0] for file in _FILES if file not in folder.failing]
        written = ", ".join(name for name in names if (folder.path / name).exists())
        path = min(str(folder.path), seen_from(folder.path), key=len)
        self._announce(f"Files in {path}: {written}.")
        if folder.failing:
            older = folder.older_best() if "best/model.safetensors" in folder.failing else ""
            self._announce(f"Not written, so older or missing there: {', '.join(folder.failing)}.{older}")

    def _write_picture(self, folder: RunFolder) -> None:
        if self._history.num_epochs and is_installed("matplotlib"):
            folder.attempt("losses.png", lambda: put_in_place(folder.path / "losses.png", self._draw))

    def _draw(self, path: Path) -> None:
        draw_losses(path, self._history, format="png")


def _step_row(step: int, train_loss: float, learning_rates: list[float]) -> dict[str, Any]:
    return {"step": step, "train_loss": train_loss, "learning_rates": learning_rates}


_LIBRARIES = {"report.html": "jinja2", "losses.png": "matplotlib"}
_FILES = ("report.html", "losses.png", "history.jsonl", "best/model.safetensors", "checkpoints")
# Class of an error -> the state in which it leaves a run; all others: failed. `TrialPruned` is Optuna's.
_ENDS = {"TrialPruned": "pruned", "KeyboardInterrupt": "interrupted"}
_LONGEST_REASON = 300  # characters


def report_failure(reporter: Reporter | None, kind: str, message: object) -> None:
    """Leave word in the run folder of the error that ends a run, by the name of its class."""
    state = _ENDS.get(kind, "failed")
    with suppress(Exception):  # whatever happens here, the error itself is what the user is told
        if isinstance(message, SystemExit) and message.code in (None, 0):
            state, message = "interrupted", "the program asked to end"
        name = f"{kind}: " if state == "failed" and kind != ProcessFailedError.__name__ else ""
        text, *_ = masked([f"{state}: {name}{_text_of(message)}".strip(": ")])[0].splitlines()
        if reporter is not None:
            reporter.report_failure(state, text[:_LONGEST_REASON])


def _text_of(message: object) -> str:
    try:
        return str(message).encode("utf-8", "replace").decode()  # without halves of letters, which no file takes
    except Exception as error:  # of the user's own class
        return f"(its text cannot be had: {type(error).__name__})"
