"""What a launched process shows where it was launched: its output, and calls to make there."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True)
class Message:
    """What is no result."""

    content: Any


class Channel(io.TextIOBase):
    """What a launched process sends to the one that has launched it: its output, and calls to make there."""

    encoding = "utf-8"

    def __init__(self, sender: Connection) -> None:
        self._sender, self._lock = sender, threading.Lock()
        self._line = ""

    def write(self, text: str) -> int:
        """Send whole lines."""
        self._line += text
        if text.endswith("\n"):  # whole lines: those of several processes do not mix
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Send what has been written."""
        if self._line:
            text, self._line = self._line, ""
            self.send(Message(text))

    def fileno(self) -> int:
        """Return where programs that this process starts may write: what the launching process began with."""
        return sys.__stdout__.fileno()  # type: ignore[union-attr]

    @property
    def buffer(self) -> Any:
        """What takes bytes, at the same place."""
        return sys.__stdout__.buffer  # type: ignore[union-attr]

    def send(self, content: Any) -> None:
        """Send something picklable."""
        with self._lock:
            self._sender.send(content)


_channel: Channel | None = None  # in a launched process


def open_channel(sender: Connection) -> Channel:
    """Let what this process prints, and its calls, go to the one that has launched it."""
    global _channel
    _channel = Channel(sender)
    sys.stdout = sys.stderr = _channel
    return _channel


def call_in_launcher(function: Callable[..., Any], *args: Any) -> bool:
    """Call a function where `launch` was called; return `False` in a process that was not launched so."""
    if _channel is None:
        return False
    _channel.send(Message((function, *args)))
    return True
