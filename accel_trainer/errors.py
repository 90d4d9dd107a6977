"""The few exceptions of the package. Wrong arguments raise the built-in `ValueError` and `TypeError`."""

from __future__ import annotations

from collections.abc import Sequence


class StopTraining(Exception):
    """Raise it in a callback to end the run, on all processes, at the same step.

    Args:
        reason: What to tell the user; it becomes `History.stop_reason`.

    Example:
        >>> from accel_trainer import Callback
        >>> class StopWhenGoodEnough(Callback):
        ...     def on_epoch_end(self, trainer):
        ...         if trainer.history.test_losses[-1] < 0.1:
        ...             raise StopTraining("test loss below 0.1")
    """

    def __init__(self, reason: object = None) -> None:
        super().__init__(reason)
        self.reason = str(reason or "") or "a callback asked for it"


class CheckpointError(ValueError):
    """No checkpoint of a run folder can be used, or the one to go on from is of another run."""


class HardwareError(RuntimeError):
    """The launch asks for something that this machine or this package cannot do."""


class NonFiniteError(ArithmeticError):
    """A train loss or the weights became infinite or not a number, and `on_nonfinite="raise"`.

    Args:
        message: What was found, and where.
        places: Pass over the data, 1-based, and number in it, 0-based, of the batch and of the batch before, whose
            gradient may be the cause; empty if they are not known.
    """

    def __init__(self, message: str, places: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(message)
        self.places = tuple(places)


class ProcessFailedError(RuntimeError):
    """Another process of the run failed; the message names it and its error."""
