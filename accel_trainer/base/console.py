"""Lines on the screen. A stream that is missing, closed or of another alphabet is no error for the writer."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from .tracebacks import ENTRY

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines


class Styled(str):
    """A text with colours of this package, which are shown; others would be left out."""


def printable(text: str) -> str:
    r"""Return a text with question marks in place of what would steer a terminal, as a file may hold it.

    Example:
        >>> printable("a run \x1b[2J that clears the screen")
        'a run ?[2J that clears the screen'
    """
    return _CONTROL.sub("?", text)


def is_terminal(stream: Any) -> bool:
    """Return whether somebody reads a stream as it is written; `False` for one that is missing or closed."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


def show(text: str, end: str = "\n") -> None:
    """Write a line to standard output."""
    pass_on((text if isinstance(text, Styled) else printable(text)) + end)


def pass_on(text: str) -> None:
    """Write to standard output what another process has written, as it is."""
    _write(sys.stdout, text)


def complain(text: str) -> None:
    """Write a line to the standard error output."""
    _write(sys.stderr, printable(text) + "\n")


def warn(text: str, stacklevel: int = 2) -> None:
    """Warn as `warnings.warn`: a `stacklevel` of 1 names the line of the call; `ends_in_users_lines` does not count."""
    frame, level, counted = sys._getframe(1), 2, 1
    while counted < stacklevel and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        counted += frame.f_code is not ENTRY
    try:
        warnings.warn(printable(text), stacklevel=level)
    except (OSError, ValueError):  # the stream is closed, or cannot be written in this alphabet
        complain(text)


def _write(stream: Any, text: str) -> None:
    """Write a text as far as the stream takes it: letters that it does not know become question marks."""
    try:
        try:
            stream.write(text)
        except UnicodeError:
            stream.write(text.encode("ascii", "replace").decode("ascii"))
        stream.flush()
    except (AttributeError, OSError, ValueError):  # no stream, one whose reader has ended, a closed one
        pass


class Lenient:
    """A stream for a library that writes to it by itself: what it does not take is left out."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write as far as that goes."""
        _write(self._stream, text)

    def flush(self) -> None:
        """Do nothing: each write is flushed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        return self._stream is getattr(other, "_stream", other)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was meant by a wrong one: a slip of the keyboard, most of the same words, or initials.

    Example:
        >>> known = ["num_epochs", "learning_rate", "trackers"]
        >>> [nearest(name, known) for name in ("num_epohcs", "epochs", "lr", "workers")]
        ['num_epochs', 'num_epochs', 'learning_rate', None]
    """
    words = _words(name)

    def likeness(other: str) -> tuple[float, float]:
        others = _words(other)
        letters = difflib.SequenceMatcher(None, "_".join(words), "_".join(others)).ratio()
        shared = 2 * len({*words} & {*others}) / (len(words) + len(others) or 1)
        if len(others) > 1 and words == ["".join(word[0] for word in others)]:
            shared = 1.0
        return max(letters * (letters > 0.75), shared * (shared > 0.6)), letters

    near = max(known, key=likeness, default=None)
    return near if near is not None and likeness(near)[0] else None


def _words(name: str) -> list[str]:
    """Return the words of a name, in the singular."""
    return [word.rstrip("s") or word for word in re.findall("[a-z0-9]+", name.lower())]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the known name that was meant; nothing where none is near."""
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"


def some_of(names: Sequence[str]) -> str:
    """Return the first three of some names, and how many there are more.

    Example:
        >>> some_of(["a", "b"]), some_of(["a", "b", "c", "d", "e"])
        ('a, b', 'a, b, c and 2 more')
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_first_rank() -> bool:
    """Return whether this process is the main one of the launch, before there is a group of processes."""
    return os.environ.get("RANK", "0") == "0"
