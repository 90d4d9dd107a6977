"""The screen while a run goes on: lines, colours and the progress bar."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from ..base.console import Lenient, Styled, is_terminal, printable, show
from ..callbacks import Callback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # in a notebook without ipywidgets, where the bar is made of text
    from tqdm.auto import tqdm

if TYPE_CHECKING:
    from ..trainer import Trainer


def wants_bar() -> bool:
    """Return whether somebody watches: in a terminal or a notebook."""
    return is_terminal(sys.stderr) or _bar_is_widget()


def _bar_is_widget() -> bool:
    return "notebook" in tqdm.__module__


def in_green(text: str) -> str:
    """Return a text in green for a terminal that takes colours, unless NO_COLOR is set; else the text as it is."""
    if not is_terminal(sys.stdout) or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    return Styled(f"\033[32m{printable(text)}\033[0m")


def say(text: str) -> None:
    """Print a line that a progress bar does not break."""
    with tqdm.external_write_mode():
        show(text)


def recut_message(name: str, num_micro_batches: int) -> str:
    """Return the message for batches that turned out not to fit in memory."""
    return (
        f"Out of memory: each batch of {name} is now cut into {num_micro_batches} micro-batches. They became smaller, "
        "which layers that look at their batch, such as BatchNorm, and random ones take notice of."
    )


class ProgressBar(Callback):
    """Show where the epoch and the run are, redrawn by time, on the main process only.

    The steps of an epoch, the steps of the run and the batch size are `None` where they are unknown or vary.
    """

    def __init__(self, num_steps: int | None, num_steps_of_run: int | None, batch_size: int | None) -> None:
        self._num_steps, self._num_steps_of_run, self._batch_size = num_steps, num_steps_of_run, batch_size
        self._bar: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin to measure the time of the run."""
        self._started, self._step_at_start = time.perf_counter(), trainer.state.step

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Open the bar of this epoch."""
        progress = "{bar} {n_fmt}/{total_fmt}" if self._num_steps else "step {n_fmt}"
        self._bar = tqdm(  # type: ignore[call-overload]
            desc=f"Epoch {trainer.state.epoch}/{trainer.config.num_epochs}",
            total=self._num_steps,
            initial=trainer.state.position % self._num_steps if self._num_steps else 0,
            bar_format=f"{{desc}} {progress}  {{postfix[0]}}",
            postfix=[""],
            leave=False,
            file=None if _bar_is_widget() else Lenient(sys.stderr),
            dynamic_ncols=True,
            mininterval=0.2,
        )
        self._next = 0.0

    def on_step_end(self, trainer: Trainer) -> None:
        """Count one step."""
        if self._bar is None:  # a run that goes on within an epoch
            self.on_epoch_start(trainer)
        now = time.perf_counter()
        if now >= self._next:  # the text after the bar is made no more often than it is seen
            self._next = now + 0.2
            self._bar.postfix[0] = self._text(trainer, now)
        self._bar.update()

    def _text(self, trainer: Trainer, now: float) -> str:
        """Return loss, rate, and the time left for the epoch and the run."""
        state = trainer.state
        parts = [] if math.isnan(state.recent_loss) else [f"loss {state.recent_loss:.4f}"]
        if done := state.step - self._step_at_start:
            per_step = (now - self._started) / done
            rate, unit = (self._batch_size, "samples/s") if self._batch_size else (1, "steps/s")
            parts.append(f"{rate / per_step:,.0f} {unit}")
            if self._num_steps:
                left = tqdm.format_interval(max(self._num_steps - self._bar.n, 0) * per_step)
                if self._num_steps_of_run:
                    left += f", run {tqdm.format_interval(max(self._num_steps_of_run - state.step, 0) * per_step)}"
                parts.append(f"left {left}")
        return "  ".join(parts)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_fit_end = on_epoch_end  # of an epoch that was cut short
