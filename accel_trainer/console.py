"""Lines on the screen. Whatever is wrong with it - none, closed, another alphabet - is no error of what speaks."""

from __future__ import annotations

import sys
import warnings
from typing import Any

__all__ = ["complain", "is_terminal", "show", "warn"]


def is_terminal(stream: Any) -> bool:
    """Return whether somebody reads a stream as it is written; `False` for what is none, or closed."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


def show(text: str, end: str = "\n") -> None:
    """Write a line to standard output."""
    _write(sys.stdout, text + end)


def complain(text: str) -> None:
    """Write a line to the standard error output."""
    _write(sys.stderr, text + "\n")


def warn(text: str, stacklevel: int = 2) -> None:
    """Warn, by Python's own way, of what the user should know.

    Args:
        text: What.
        stacklevel: Whose line is named, as of `warnings.warn`: 1 is that of the call.
    """
    try:
        warnings.warn(text, stacklevel=stacklevel + 1)
    except Warning:  # the user wants them as errors
        raise
    except (OSError, ValueError):  # the stream is closed, or cannot be written in this alphabet
        _write(sys.stderr, f"{text}\n")


def _write(stream: Any, text: str) -> None:
    """Write a text as far as the stream takes it: letters that it does not know become question marks."""
    try:
        try:
            stream.write(text)
        except UnicodeError:
            stream.write(text.encode("ascii", "replace").decode("ascii"))
        stream.flush()
    except (AttributeError, OSError, ValueError):  # no stream, a reader that is gone, a closed one
        pass
