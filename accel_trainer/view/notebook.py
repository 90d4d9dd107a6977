"""What a notebook shows of a run: what launched processes print, and the losses, drawn as the run goes on."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ..base.console import warn
from ..callbacks import Callback
from .picture import draw_losses

if TYPE_CHECKING:
    from ..history import History
    from ..trainer import Trainer


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, or was launched by one."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return "IPKernelApp" in getattr(shell, "config", {}) or os.environ.get("ACCEL_TRAINER_IN_NOTEBOOK") == "1"


@dataclass(frozen=True)
class Message:
    """What is sent before the result: a text to print, or a function and its arguments."""

    content: Any


class Channel(io.TextIOBase):
    """The standard output and error output of a launched process, sent to the process that launched it."""

    encoding = "utf-8"

    def __init__(self, sender: Connection) -> None:
        self._sender, self._lock = sender, threading.Lock()
        self._line = ""

    def write(self, text: str) -> int:
        """Keep a text until its line ends, so that lines of several processes do not mix."""
        self._line += text
        if text.endswith("\n"):
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Send what has been written."""
        if self._line:
            text, self._line = self._line, ""
            self.send(Message(text))

    def fileno(self) -> int:
        """Return where programs that this process starts can write: the standard output that it began with."""
        return sys.__stdout__.fileno()  # type: ignore[union-attr]

    @property
    def buffer(self) -> Any:
        """The same standard output, for bytes."""
        return sys.__stdout__.buffer  # type: ignore[union-attr]

    def send(self, content: Any) -> None:
        """Send something picklable."""
        with self._lock:
            self._sender.send(content)


_channel: Channel | None = None  # in a launched process


def open_channel(sender: Connection) -> Channel:
    """Send what this process prints, and its calls, to the process that launched it."""
    global _channel
    sys.stdout = sys.stderr = _channel = Channel(sender)
    return _channel


class LiveCurve(Callback):
    """Show train and test loss in a notebook, redrawn as the epochs end, on the main process only.

    A drawing takes a tenth of a second; the drawings take at most a twentieth of the time, and the last state is always
    drawn.
    """

    def __init__(self) -> None:
        self._name, self._not_before = f"accel_trainer-{time.time_ns()}", 0.0

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Draw, if it is time."""
        started = time.perf_counter()
        if started >= self._not_before:
            self.on_fit_end(trainer)
            ended = time.perf_counter()
            self._not_before = ended + (ended - started) / 0.05

    def on_fit_end(self, trainer: Trainer) -> None:
        """Draw the last state."""
        if trainer.history.num_epochs and _channel is not None:
            _channel.send(Message((show_losses, self._name, trainer.history)))
        elif trainer.history.num_epochs:
            show_losses(self._name, trainer.history)


def show_losses(name: str, history: History) -> None:
    """Show the losses in the notebook of this process, in place of the picture shown under the same name before."""
    picture = io.BytesIO()
    try:
        from IPython.display import display

        draw_losses(picture, history, format="png", dpi=90)
        content = {"image/png": picture.getvalue(), "text/plain": "losses"}
        display(content, raw=True, display_id=name, update=name in _shown)  # type: ignore[no-untyped-call]
        _shown.add(name)
    except ImportError as error:
        warn(str(error))
    except Exception as error:  # a picture that a library cannot draw is no error of the training
        warn(f"Could not draw the losses: {error!r}.")


_shown: set[str] = set()
