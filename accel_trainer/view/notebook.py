"""The losses in a notebook, drawn as the run goes on."""

from __future__ import annotations

import io
import os
import sys
import time
from typing import TYPE_CHECKING

from ..base.console import warn
from ..callbacks import Callback
from .channel import call_in_launcher
from .picture import draw_losses

if TYPE_CHECKING:
    from ..trainer import Trainer


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
