"""What is told of a run: its epochs and its end, on the screen, in the history file, picture and page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..base.clock import Clock
from ..history import History
from ..state import TrainState
from ..storage.files import put_in_place
from ..storage.run_folder import RunFolder
from .picture import draw_losses
from .report import LivePage, seen_from
from .screen import recut_message, styled


class Reporter:
    """Tell people of a run, on the main process.

    Args:
        folder: The run folder; `None` without one, and on the other processes.
        history: What the run has measured.
        state: Where it stands.
        monitor: Name of the value that chooses the best epoch.
        num_epochs: Of the config.
        announce: Prints a line.

    Attributes:
        page: The page of the run; `None` without a folder.
    """

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
        """Write the first files.

        Args:
            config: What was asked for, what it was resolved to, and what makes it the run that it is.
            environment: Hardware, versions, command line.
        """
        self._config = config
        if self._folder is not None:
            self._folder.write_json("environment.json", environment)
            self._folder.write_json("config.json", config)
        self.write_page("running")

    def report_recut(self, name: str, num_micro_batches: int) -> None:
        """Tell that the batches of a loader are cut finer from here on."""
        self._announce(recut_message(name, num_micro_batches))
        key = "num_micro_batches" if name == "train_loader" else "num_micro_batches_of_test"
        if self._folder is not None and self._config:
            self._config["resolved"][key] = num_micro_batches
            self._folder.write_json("config.json", self._config)

    def report_epoch(self, clock: Clock) -> None:
        """Tell of the epoch that was recorded last, in the history file and to the reader."""
        state, row = self._state, self._history.last()
        self._history.note_best(state.best_epoch, state.best_value)
        if self._folder is not None:
            row_of_file = {"epoch": state.epoch, "step": state.step} | row
            self._folder.append_history(row_of_file | {"best_epoch": state.best_epoch, "best_value": state.best_value})
        text = f"Epoch {state.epoch}/{self._num_epochs} - Train Loss: {row['train_loss']:.4f}"
        text += f", Test Loss: {row['test_loss']:.4f}" if "test_loss" in row else ""
        text += "".join(f", {name}: {value:.4f}" for name, value in row["metrics"].items())
        self._announce(styled(text + " (best)", "best") if state.best_epoch == state.epoch else text)
        with clock.measured("saving_seconds"):
            self.write_page("running")

    def write_page(self, state: str) -> None:
        """Let the page of the run show its present state; while it is running, only as often as that costs nothing."""
        page, folder = self.page, self._folder
        if page is None or folder is None or (state == "running" and not page.is_due()):
            return
        folder.attempt("report.html", lambda: page.write(state))

    def _draw(self, path: Path) -> None:
        history = self._history
        draw_losses(path, history.train_losses, history.test_losses, history.best_epoch, format="png")

    def report_end(self, holds_best: bool, how: str, advice: str | None) -> None:
        """Say how the run ended, and show it in picture and page.

        Args:
            holds_best: Whether the model has the weights of the best epoch.
            how: `finished`, `interrupted` or `failed`.
            advice: What took time out of proportion, and what helps; `None` for nothing.
        """
        history, state, folder = self._history, self._state, self._folder
        if folder is not None:
            best = {"best_epoch": state.best_epoch, "best_value": state.best_value}
            folder.append_history({"stop_reason": history.stop_reason} | best)
            if history.num_epochs:
                folder.attempt("losses.png", lambda: put_in_place(folder.path / "losses.png", self._draw))
            self.write_page(how)
        self._announce(f"Stopped: {history.stop_reason}.")
        if not history.num_epochs:
            self._announce("No epoch was finished: nothing is recorded, and the model keeps its present weights.")
        elif state.best_epoch is None:
            self._announce("No epoch has a finite monitored value: the model keeps its last weights.")
        else:
            kept = "the model holds its weights" if holds_best else "the model holds the last weights"
            value = f"{self._monitor} {state.best_value:.4f}"
            self._announce(styled(f"Best epoch {state.best_epoch}: {value}; {kept}.", "best"))
        if folder is not None and history.num_epochs:
            for line in _lines_on_files(folder):
                self._announce(line)
        for line in (history.overfitting(), advice):  # type: ignore[assignment]
            if line is not None:
                self._announce(line)


_FILES = {name: name for name in ("report.html", "losses.png", "history.jsonl")}
_FILES |= {"best/model.safetensors": "best", "checkpoints": "checkpoints"}


def _lines_on_files(folder: RunFolder) -> Iterator[str]:
    """Yield what is in the folder by now, as it should be, and what is not."""
    whole = [name for file, name in _FILES.items() if file not in folder.failing and (folder.path / name).exists()]
    yield f"Files in {_short(folder.path)}: {', '.join(whole)}."
    if folder.failing:
        older = folder.older_best() if "best/model.safetensors" in folder.failing else ""
        yield f"Not written, so older or missing there: {', '.join(folder.failing)}.{older}"


def _short(path: Path) -> str:
    """Return a path as seen from the working folder, where that is shorter."""
    return min(str(path), seen_from(path), key=len)
