"""Lines on the screen while a run goes on."""

from __future__ import annotations

import os
import sys
import warnings

from ..base.console import Styled, is_terminal, printable, show

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a notebook without ipywidgets, where the bar is one of text
    from tqdm.auto import tqdm as tqdm


def wants_bar() -> bool:
    """Return whether someone watches: a terminal or a notebook."""
    return is_terminal(sys.stderr) or bars_are_widgets()


def bars_are_widgets() -> bool:
    """Return whether a progress bar is a widget of a notebook."""
    return "notebook" in tqdm.__module__


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


def recut_message(name: str, num_micro_batches: int) -> str:
    """Return what to tell the user when batches turned out not to fit in memory."""
    return (
        f"Out of memory: each batch of {name} is now cut into {num_micro_batches} micro-batches. They became smaller, "
        "which layers that look at their batch, such as BatchNorm, and random ones take notice of."
    )
