"""The progress bar."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from ..base.console import Lenient
from ..callbacks import Callback
from .screen import bars_are_widgets, tqdm

if TYPE_CHECKING:
    from ..trainer import Trainer


class ProgressBar(Callback):
    """Show where the epoch and the run are, redrawn by time, on the main process only.

    Args:
        num_steps: Steps of an epoch; `None` if unknown.
        num_steps_of_run: Steps of the whole run; `None` if unknown.
        batch_size: Samples per step; `None` if they vary.
    """

    def __init__(self, num_steps: int | None, num_steps_of_run: int | None, batch_size: int | None) -> None:
        self._num_steps, self._num_steps_of_run, self._batch_size = num_steps, num_steps_of_run, batch_size
        self._bar: Any = None
        self._shown = math.nan

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin to measure the time of the run."""
        self._started, self._step_at_start = time.perf_counter(), trainer.state.step

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Open the bar of this epoch."""
        place = "{bar} {n_fmt}/{total_fmt}" if self._num_steps else "step {n_fmt}"
        shape = f"{{desc}} {place}  {{postfix[0]}}"
        options: dict[str, Any] = {"bar_format": shape, "postfix": [""], "leave": False, "dynamic_ncols": True}
        done = trainer.state.position % self._num_steps if self._num_steps else 0
        label = f"Epoch {trainer.state.epoch}/{trainer.config.num_epochs}"
        if not bars_are_widgets():
            options["file"] = Lenient(sys.stderr)
        self._bar = tqdm(total=self._num_steps, initial=done, desc=label, mininterval=0.2, **options)
        self._next = 0.0

    def on_step_end(self, trainer: Trainer) -> None:
        """Count one step."""
        if self._bar is None:  # gone on within an epoch
            self.on_epoch_start(trainer)
        now = time.perf_counter()
        if now >= self._next:  # what follows the bar is put together no more often than it is seen
            self._next = now + 0.2
            self._bar.postfix[0] = self._text(trainer, now)
        self._bar.update()

    def _text(self, trainer: Trainer, now: float) -> str:
        """Return loss, rate, and the time left for the epoch and the run."""
        parts = []
        if not math.isnan(trainer.state.recent_loss):
            parts.append(f"loss {trainer.state.recent_loss:.4f}")
        done = trainer.state.step - self._step_at_start
        per_step = (now - self._started) / max(done, 1)
        if done:
            rate, unit = (self._batch_size, "samples/s") if self._batch_size else (1, "steps/s")
            parts.append(f"{rate / per_step:,.0f} {unit}")
        if done and self._num_steps:
            left = tqdm.format_interval(max(self._num_steps - self._bar.n, 0) * per_step)
            if self._num_steps_of_run:
                left += f", run {tqdm.format_interval(max(self._num_steps_of_run - trainer.state.step, 0) * per_step)}"
            parts.append(f"left {left}")
        return "  ".join(parts)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Take the bar away."""
        self._close()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Take the bar of an epoch cut short away."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
