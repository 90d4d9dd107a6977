"""What people read about a run: its epochs and its end, on the screen, in the history file, picture and page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..base.clock import Clock
from ..history import History
from ..state import TrainState
from ..storage.files import put_in_place
from ..storage.run_folder import RunFolder
from .picture import draw_losses
from .report import LivePage, seen_from
from .screen import in_green, recut_message
from .steps import read_steps


class Reporter:
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
        self.write_page("running")

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
            self._announce(in_green(f"Best epoch {state.best_epoch}: {value}; {kept}."))
        if folder is not None and history.num_epochs:
            self._announce_files(folder)
        for line in filter(None, (history.overfitting(), advice)):
            self._announce(line)

    def _announce_files(self, folder: RunFolder) -> None:
        """Say which files are in the folder by now, and which could not be written."""
        names = [file.split("/")[0] for file in _FILES if file not in folder.failing]
        written = ", ".join(name for name in names if (folder.path / name).exists())
        path = min(str(folder.path), seen_from(folder.path), key=len)
        self._announce(f"Files in {path}: {written}.")
        if folder.failing:
            older = folder.older_best() if "best/model.safetensors" in folder.failing else ""
            self._announce(f"Not written, so older or missing there: {', '.join(folder.failing)}.{older}")

    def _draw(self, path: Path) -> None:
        draw_losses(path, self._history, steps=self._points_by_step(path.parent), format="png")

    def _points_by_step(self, run_dir: Path) -> list[tuple[float, float | None]]:
        """Return the train losses by step, each at its place among the epochs; none where epochs vary in length."""
        asked, resolved = (self._config.get(name, {}) for name in ("asked", "resolved"))
        per_epoch = asked.get("steps_per_epoch") or resolved.get("num_batches")
        steps = read_steps(run_dir)
        places = [step / per_epoch for step in steps.steps] if per_epoch else []
        if not places or places[-1] > self._history.num_epochs + 1:
            return []
        return list(zip(places, steps.train_losses, strict=True))


_FILES = ("report.html", "losses.png", "history.jsonl", "best/model.safetensors", "checkpoints")
