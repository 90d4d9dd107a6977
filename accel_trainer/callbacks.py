"""Observers of a run: the user's own, and the progress bar."""

from __future__ import annotations

import difflib
import io
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a notebook without ipywidgets, where the bar is one of text
    from tqdm.auto import tqdm

from .console import Lenient, Styled, is_terminal, printable, show, warn
from .errors import StopTraining
from .launching import call_in_launcher
from .picture import draw_losses

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["HOOKS", "Callback", "Callbacks", "ProgressBar"]


class Callback:
    """Observe a run on every process; override the hooks of interest.

    A callback watches and cannot reorder or replace anything. The one wish it may voice is
    `raise StopTraining("reason")`, which ends the run on all processes. Any other error ends the run as an error.
    Look at `trainer.state` (epoch, step), `trainer.history`, `trainer.config`, `trainer.model` and
    `trainer.is_main_process`; print and write on the main process only.

    Example:
        >>> class PrintLearningRate(Callback):
        ...     def on_epoch_end(self, trainer):
        ...         if trainer.is_main_process:
        ...             print(trainer.history.learning_rates[-1])
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first step; model and loaders are ready."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Before the first step of an epoch; `trainer.state.epoch` is its number.

        A run that goes on within an epoch does not call it again for that epoch: give the callback `state_dict` and
        `load_state_dict` if it sets more than weights, groups of the optimizer, what is frozen, and modes.
        """

    def on_step_end(self, trainer: Trainer) -> None:
        """After each optimizer update; `trainer.state.step` counts them."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After an epoch was evaluated and recorded in `trainer.history`; the model is in evaluation mode."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """At the end of the run, however it ended, except by an error; the weights are the promised ones."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """The callbacks of a run; a hook that nobody listens to costs nothing.

    Args:
        callbacks: In the order in which they are called.

    Raises:
        TypeError: Something that is not a `Callback`, or one with a hook that does not exist.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = list(callbacks)
        for callback in self._callbacks:
            check_callback(callback)
        self._listeners: dict[str, Sequence[Callable[[Any], None]]] = {
            hook: [getattr(callback, hook) for callback in self._callbacks if _listens(callback, hook)]
            for hook in HOOKS
        }

    def listens(self, hook: str) -> bool:
        """Return whether anybody listens to a hook."""
        return bool(self._listeners[hook])

    def call(self, hook: str, trainer: Any) -> str | None:
        """Call one hook of all who listen; return the reason of the first who asks for the end of the run."""
        reason = None
        for listener in self._listeners[hook]:
            try:
                listener(trainer)
            except StopTraining as stop:
                reason = stop.reason if reason is None else reason
        return reason


def _listens(callback: Callback, hook: str) -> bool:
    return getattr(type(callback), hook) is not getattr(Callback, hook) or hook in vars(callback)


def check_callback(callback: object) -> None:
    """Refuse what would never be called.

    Raises:
        TypeError: Not a `Callback`, or a hook that does not exist; the message names the nearest one.
    """
    if not isinstance(callback, Callback):
        raise TypeError(f"A callback must be an instance of accel_trainer.Callback, got {callback!r}.")
    for name in dir(callback):
        if name.startswith("on_") and name not in HOOKS:
            nearest = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.0)[0]
            raise TypeError(
                f"{type(callback).__name__}.{name} is not a hook and would never be called; did you mean {nearest}? "
                f"The hooks are {', '.join(HOOKS)}."
            )


def wants_bar() -> bool:
    """Return whether someone watches: a terminal or a notebook."""
    return is_terminal(sys.stderr) or _bars_are_widgets()


def _bars_are_widgets() -> bool:
    return "notebook" in tqdm.__module__


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
        if not _bars_are_widgets():
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
            self._bar.postfix[0] = self._told(trainer, now)
        self._bar.update()

    def _told(self, trainer: Trainer, now: float) -> str:
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


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, or was launched by one."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return "IPKernelApp" in getattr(shell, "config", {}) or os.environ.get(_OF_NOTEBOOK) == "1"


_OF_NOTEBOOK = "ACCEL_TRAINER_IN_NOTEBOOK"


class LiveCurve(Callback):
    """Show train and test loss in a notebook, drawn anew as the epochs end, on the main process only.

    Drawing takes a tenth of a second; it is done no more often than takes a twentieth of the time, and at the end.
    """

    _SHARE = 0.05

    def __init__(self) -> None:
        self._name, self._not_before = f"accel_trainer-{time.time_ns()}", 0.0

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Draw, if it is time."""
        started = time.perf_counter()
        if started >= self._not_before:
            self._show(trainer)
            ended = time.perf_counter()
            self._not_before = ended + (ended - started) / self._SHARE

    def on_fit_end(self, trainer: Trainer) -> None:
        """Draw the last state."""
        if trainer.history.num_epochs:
            self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        history = trainer.history
        losses = self._name, history.train_losses, history.test_losses, history.best_epoch
        if not call_in_launcher(show_losses, *losses):
            show_losses(*losses)


def show_losses(name: str, train_losses: list[float], test_losses: list[float], best_epoch: int | None) -> None:
    """Show the losses in the notebook of this process, in place of what was shown under that name before."""
    try:
        _display_losses(name, train_losses, test_losses, best_epoch)
    except Exception as error:  # whatever a library says of a picture, it is no error of the training
        warn(f"Could not draw the losses: {error!r}.")


def _display_losses(name: str, train_losses: list[float], test_losses: list[float], best_epoch: int | None) -> None:
    from IPython.display import display

    picture = io.BytesIO()
    draw_losses(picture, train_losses, test_losses, best_epoch, format="png", dpi=90)
    is_new = name not in _shown
    _shown.add(name)
    content = {"image/png": picture.getvalue(), "text/plain": "losses"}
    display(content, raw=True, display_id=name, update=not is_new)  # type: ignore[no-untyped-call]


_shown: set[str] = set()
_STYLES = {"best": "\033[32m"}
_PLAIN = "\033[0m"


def styled(text: str, style: str) -> str:
    """Return a text in a colour where it goes to a terminal that is not asked to be plain (NO_COLOR), else as it is."""
    if not is_terminal(sys.stdout) or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    return Styled(f"{_STYLES[style]}{printable(text)}{_PLAIN}")


def say(text: str) -> None:
    """Print a line that a progress bar does not break."""
    with tqdm.external_write_mode():
        show(text)
