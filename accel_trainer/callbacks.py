"""Observers of a run: the user's own, and the progress bar."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .errors import StopTraining

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
        """Before the first step of an epoch; `trainer.state.epoch` is its number."""

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
                reason = reason or stop.reason
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
    return sys.stderr.isatty() or "notebook" in tqdm.__module__


class ProgressBar(Callback):
    """Show the steps of an epoch, redrawn by time, on the main process only.

    Args:
        num_steps: Steps of an epoch; `None` if unknown.
    """

    def __init__(self, num_steps: int | None) -> None:
        self._num_steps = num_steps
        self._bar: Any = None

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Open the bar of this epoch."""
        self._bar = tqdm(total=self._num_steps, desc=f"Epoch {trainer.state.epoch}", leave=False, mininterval=0.2)
        self._shown = trainer.state.recent_loss

    def on_step_end(self, trainer: Trainer) -> None:
        """Count one step."""
        if self._bar is None:  # gone on within an epoch
            self.on_epoch_start(trainer)
        self._bar.update()
        if trainer.state.recent_loss != self._shown:
            self._shown = trainer.state.recent_loss
            self._bar.set_postfix(loss=f"{self._shown:.4f}", refresh=False)

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


def say(text: str) -> None:
    """Print a line that a progress bar does not break."""
    with suppress(OSError):  # the reader may be gone
        tqdm.write(text)
        sys.stdout.flush()
