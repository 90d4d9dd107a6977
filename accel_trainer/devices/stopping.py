"""When a run stops before its end: requests of a signal, of the time limit, of a callback.

A process asks to end the run, or to save it. Each process then publishes how many batches it has begun, and begins no
other until all have published; all end, or save, before the batch after the greatest number.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from ..base.console import is_first_rank
from ..base.exchange import gather_objects


class StopRequest(NamedTuple):
    """A request to end the run, with its reason in words.

    The kind is `callback`, whose decision is part of the run, or what interrupts it: `Ctrl-C`, `time limit` or the name
    of a signal that asks the program to leave.
    """

    reason: str
    kind: str


def foremost(requests: Iterable[StopRequest | None]) -> StopRequest | None:
    """Return the request that matters most, the first of several: signals to leave most, callbacks least."""

    def rank(request: StopRequest) -> int:
        return 0 if request.kind == "callback" else 2 if request.kind.startswith("SIG") else 1

    return max(filter(None, requests), key=rank, default=None)


class Alone:
    """Asks for an end or a save where there is one process: it is met before the next batch."""

    def __init__(self) -> None:
        self._request: StopRequest | None = None
        self._wants_save = False

    @property
    def request(self) -> StopRequest | None:
        """The end that this process asks for."""
        return self._request

    @property
    def wants_save(self) -> bool:
        """Whether this process asks for a save."""
        return self._wants_save

    def ask(self, request: StopRequest) -> None:
        """Ask for the end; may be called from a signal handler."""
        self._request = foremost((self._request, request))

    def ask_to_save(self, wants_save: bool = True) -> None:
        """Ask for a save, or take that back."""
        self._wants_save = wants_save

    def begin_batch(self) -> tuple[StopRequest | None, bool] | None:
        """Count the next batch as begun; return the end and the save that are due before it, or `None`."""
        if self._request is None and not self._wants_save:
            return None
        return self._request, self._wants_save


class Stopping:
    """Ask for, and agree on, the batch before which a run ends or is saved.

    Args:
        votes: Where the processes agree; `None` to agree with no other process.
        time_limit_seconds: Ask for the end after this time; `None` for never.
        any_process: Returns for each flag whether it is set on any process.
        save_seconds: Ask for a save this long after the one before; `None` for never.

    Attributes:
        reason: Why the run ends, once that is agreed.
        kind: The kind of that request.
        save_is_due: Whether the processes have agreed to save here; until `note_save`.
    """

    def __init__(
        self,
        votes: Alone | None,
        time_limit_seconds: float | None = None,
        any_process: Callable[..., list[bool]] = lambda *flags: list(flags),
        save_seconds: float | None = None,
    ) -> None:
        self._votes, self._any_process = votes or Alone(), any_process
        self._time_limit = math.inf if time_limit_seconds is None else time_limit_seconds
        self._save_seconds = math.inf if save_seconds is None else save_seconds
        self._end_at, self._save_at = time.monotonic() + self._time_limit, time.monotonic() + self._save_seconds
        self.reason: str | None = None
        self.kind: str | None = None
        self.save_is_due = False

    def request(self, reason: str, kind: str = "callback") -> None:
        """Ask for the end of the run; returns at once and may be called from a signal handler."""
        self._votes.ask(StopRequest(reason, kind))

    def note_save(self) -> None:
        """Note that the run is saved here."""
        self.save_is_due = False
        self._save_at = time.monotonic() + self._save_seconds

    def may_go_on(self) -> bool:
        """Return whether the next batch is begun; every process gets the same answer for the same batch.

        Every process calls it before each batch of training and evaluation. It costs less than a microsecond.
        """
        if self.kind is not None:
            return False
        now = time.monotonic()
        if now >= self._end_at:
            self.request(f"time limit of {self._time_limit:g} seconds reached", "time limit")
        if now >= self._save_at:
            self._save_at = math.inf
            self._votes.ask_to_save()
        decision = self._votes.begin_batch()
        if decision is not None:
            self._settle(*decision)
        return self.kind is None

    def interrupts(self) -> bool:
        """Ask `may_go_on` within an evaluation, which the decision of a callback lets come to its end."""
        return not self.may_go_on() and self.kind != "callback"

    def agree(self) -> bool:
        """Return whether the run ends here; every process calls it at the same point (one small exchange)."""
        request = self._votes.request
        # One process may have a request that another only receives here: all must take part.
        has_request, wants_save = self._any_process(request is not None, self._votes.wants_save)
        self._settle(foremost(gather_objects(request)) if has_request else None, wants_save)
        return self.kind is not None

    def _settle(self, request: StopRequest | None, is_save_due: bool) -> None:
        if request is not None and self.kind is None:
            self.reason, self.kind = request
        if is_save_due:
            self.save_is_due = True
            self._votes.ask_to_save(False)

    def on_signals(self) -> AbstractContextManager[None]:
        """Let the first signal end the run after the step under way, and a second Ctrl-C at once.

        These are Ctrl-C, SIGTERM and SIGUSR1. At the end the old handlers are put back; a signal that did not end the
        run is sent to them again.
        """
        return _Listener(self)


class _Listener(AbstractContextManager[None]):
    """The signal handlers of one run."""

    def __init__(self, stopping: Stopping) -> None:
        self._stopping, self._process = stopping, os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._first: dict[signal.Signals, float] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]:
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # `None`: set by other code, and cannot be put back
                self._before[number] = before
                signal.signal(number, self._hear)

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        agreed = self._stopping.kind
        late = [number for number in self._first if number is not signal.SIGINT or agreed in (None, "callback")]
        if late and not (agreed or "").startswith("SIG") and error is None:
            os.kill(os.getpid(), late[0])  # it came too late to end the run

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        number = signal.Signals(signum)
        if os.getpid() != self._process:  # a forked child, such as a loader worker
            if number is not signal.SIGINT:  # the parent has it too, and closes its workers
                signal.signal(number, self._before[number])
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        # A launcher forwards the Ctrl-C that the terminal has sent already: within a second it is the same one.
        if number is signal.SIGINT and number in self._first and now - self._first[number] > 1.0:
            raise KeyboardInterrupt
        if number not in self._first:
            self._first[number] = now
            is_interrupt = number is signal.SIGINT
            name = "Ctrl-C" if is_interrupt else number.name
            self._stopping.request(f"interrupted ({name})", name)
            again = " Ctrl-C again leaves at once." if is_interrupt else ""
            # A program that started without standard error may have opened a file under that number.
            if is_first_rank() and sys.__stderr__ is not None:
                with suppress(OSError):  # the terminal may be closed
                    os.write(2, f"\n{name}: stopping after this step.{again}\n".encode())
