"""Errors in a notebook: shown in the user's own lines, without the frames of the libraries around them."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARIES = ("accel_trainer", "accelerate", "torch", "contextlib", "IPython", "ipykernel")
_ALL = "ACCEL_TRAINER_FULL_TRACEBACK"
_NOTE = f"Frames of accel_trainer, Accelerate and torch are left out; after `%env {_ALL}=1` they are shown."


def ends_in_users_lines(function: Callable[P, R]) -> Callable[P, R]:
    """Let IPython show an error that leaves a function of this package without the frames of libraries.

    The error itself keeps them all: for `%debug`, for logs, and for those who ask by `ACCEL_TRAINER_FULL_TRACEBACK=1`.
    """

    @functools.wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            if "IPython" in sys.modules:
                vars(error)["_render_traceback_"] = _rendered  # what IPython asks an error for
            raise

    return entry


ENTRY = ends_in_users_lines(str).__code__  # of the frame that each decorated function has more


def _rendered() -> list[str]:
    """Return the lines that IPython shows of the present error."""
    error: Any = sys.exc_info()[1] or sys.last_value
    show: Callable[..., list[str]] = sys.modules["IPython"].get_ipython().InteractiveTB.structured_traceback
    if os.environ.get(_ALL):
        return show(type(error), error, error.__traceback__, tb_offset=1)  # without the frame of IPython
    with _in_users_lines(error):
        return [_NOTE, *show(type(error), error, error.__traceback__, tb_offset=0)]


def text_of(error: BaseException, is_for_notebook: bool) -> str:
    """Return an error with its traceback as text; for a notebook without the frames of libraries."""
    if not is_for_notebook or os.environ.get(_ALL):
        return "".join(traceback.format_exception(error))
    with _in_users_lines(error):
        return "".join(traceback.format_exception(error))


@contextmanager
def _in_users_lines(error: BaseException) -> Iterator[None]:
    """Leave the frames of libraries out of an error, and of those that it comes from, for the length of the block."""
    whole: dict[BaseException, TracebackType | None] = {}
    following: BaseException | None = error
    while following is not None and following not in whole:
        whole[following] = following.__traceback__
        following = following.__cause__ or following.__context__
    try:
        for one, frames in whole.items():
            one.with_traceback(_of_user(frames))
        yield
    finally:
        for one, frames in whole.items():
            one.with_traceback(frames)


def _of_user(frames: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of libraries."""
    kept = []
    while frames is not None:
        if frames.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            kept.append(frames)
        frames = frames.tb_next
    rest = None
    for one in reversed(kept):
        rest = TracebackType(rest, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return rest
