"""Errors in a notebook: shown in the user's own lines, without the frames of the libraries around them."""

from __future__ import annotations

import functools
import os
import re
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
    whole: dict[BaseException, tuple[TracebackType | None, tuple[Any, ...]]] = {}
    following: BaseException | None = error
    while following is not None and following not in whole:
        whole[following] = following.__traceback__, following.args
        following = following.__cause__ or following.__context__
    try:
        for one, (frames, args) in whole.items():
            one.with_traceback(_of_user(frames))
            if len(args) == 1 and isinstance(args[0], str) and _OF_WORKER in args[0]:
                one.args = (type(args[0])(_text_of_user(args[0])),)
        yield
    finally:
        for one, (frames, args) in whole.items():
            one.with_traceback(frames)
            one.args = args


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


_OF_WORKER = "\nOriginal Traceback (most recent call last):\n"  # in the message of what a loader worker has raised
_FRAME = re.compile(r'  File "(.*)", line \d+')


def first_line_of(error: BaseException) -> str:
    """Return the text of an error without the traceback that torch puts into that of a loader worker."""
    return str(error).partition(_OF_WORKER)[0]


def _text_of_user(text: str) -> str:
    """Return a traceback in words without the frames of libraries, which are told by their files."""
    files = [str(getattr(sys.modules.get(name), "__file__", None) or name) for name in _LIBRARIES]
    roots = tuple(file.removesuffix("__init__.py") for file in files)
    kept, is_kept = [], True
    for line in text.splitlines(keepends=True):
        frame = _FRAME.match(line)
        if frame is not None:
            is_kept = not frame[1].startswith(roots)
        elif not line.startswith("  "):
            is_kept = True
        if is_kept:
            kept.append(line)
    return "".join(kept)
