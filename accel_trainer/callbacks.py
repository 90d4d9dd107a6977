"""Observers of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base.console import did_you_mean
from .errors import StopTraining

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """Observe a run on every process; override the hooks of interest.

    A callback watches and cannot reorder or replace anything. The one request that it can make is
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

    def on_report(self, trainer: Trainer) -> None:
        """After every `report_every` steps, when the loss of these steps was read back: `trainer.state.recent_loss`.

        The optimizer still has the learning rates of this update.
        """

    def on_evaluation_start(self, trainer: Trainer) -> None:
        """After the last step of an epoch: the weights that the model has from here on are evaluated, and may be best.

        A callback may put others in their place, such as an average, and back in `on_evaluation_end`.
        """

    def on_evaluation_end(self, trainer: Trainer) -> None:
        """After the evaluation, also one that was cut short or failed, and after the weights of a best epoch were kept.

        The callbacks are called in reverse order.
        """

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After an epoch was evaluated and recorded in `trainer.history`; the model is in evaluation mode."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """On the main process, when a checkpoint is whole on the disk: before the next is made, or at the end.

        `path` is its folder, which stays there until `keep_checkpoints` newer ones have been made. It is called again
        for a checkpoint that is written anew, as where a callback has ended the run.
        """

    def on_fit_end(self, trainer: Trainer) -> None:
        """At the end of the run, however it ended, except by an error; the weights are the promised ones."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """The callbacks of a run; a hook that nobody listens to costs nothing.

    Raises:
        TypeError: Something is not a `Callback`, or has a hook that does not exist; the message names the nearest.
    """

    def __init__(
        self, callbacks: Iterable[Callback] = (), trainer: Any = None, stop: Callable[[str], None] = lambda reason: None
    ) -> None:
        callbacks = list(callbacks)
        for callback in callbacks:
            _check(callback)
        self._trainer, self._stop = trainer, stop
        self._listeners = {hook: [getattr(one, hook) for one in callbacks if listens(one, hook)] for hook in HOOKS}
        self.heard = frozenset(hook for hook in HOOKS if self._listeners[hook])
        users = [one for one in callbacks if not type(one).__module__.startswith(f"{__package__}.")]
        self.may_draw = any(listens(one, hook) for one in users for hook in HOOKS)  # code of the user's, at random

    def call(self, hook: str, *more: Any) -> None:
        """Call a hook of all callbacks that listen to it; the first `StopTraining` ends the run after the others."""
        reasons: list[str] = []
        # What several have put in place before an evaluation, the last one takes away first.
        for listener in self._listeners[hook][:: -1 if hook == "on_evaluation_end" else 1]:
            try:
                listener(self._trainer, *more)
            except StopTraining as stop:
                reasons.append(stop.reason)
        if reasons:
            self._stop(reasons[0])


def listens(callback: Callback, hook: str) -> bool:
    """Return whether a callback overrides a hook."""
    return getattr(type(callback), hook) is not getattr(Callback, hook) or hook in vars(callback)


def _check(callback: object) -> None:
    if not isinstance(callback, Callback):
        raise TypeError(f"A callback must be an instance of accel_trainer.Callback, got {callback!r}.")
    for name in dir(callback):
        if name.startswith("on_") and name not in HOOKS:
            raise TypeError(
                f"{type(callback).__name__}.{name} is not a hook and would never be called."
                f"{did_you_mean(name, HOOKS)} The hooks are {', '.join(HOOKS)}."
            )
