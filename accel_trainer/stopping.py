"""One decision for all processes: stop together, fail together, wait for nobody who is gone.

Every process of a run has a thread that looks five times a second at the key-value store of the process group. It
carries two kinds of news, without touching a device and without any collective:

- *stop*: some process wants to end the run (Ctrl-C, time limit, a callback). Each process publishes the last step it
  has started; from then on nobody starts a further step until all have published; all end after the greatest.
- *failure*: some process has left the run with an error. The others name it and end too, instead of waiting in a
  collective for its time-out.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from accelerate.utils import gather_object
from torch.distributed import distributed_c10d

from .errors import ProcessFailedError

__all__ = ["Stopping", "shared_failure"]

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 3.0  # for the main thread to notice by itself that its peer is gone
_numbers = itertools.count()


class Stopping:
    """Ask for, and agree on, the step after which a run ends.

    Args:
        board: Where the processes meet; `None` with one process.
        time_limit_seconds: Ask for the end after this long.
    """

    def __init__(self, board: _Board | None, time_limit_seconds: float | None = None) -> None:
        self._board = board
        self._time_limit = time_limit_seconds
        self._deadline = None if time_limit_seconds is None else time.monotonic() + time_limit_seconds
        self._reason: str | None = None

    def request(self, reason: str) -> None:
        """Ask for the end of the run; returns at once and may be called from a signal handler."""
        if self._reason is None:
            self._reason = reason
            if self._board is not None:
                self._board.wish = reason

    def may_start(self, step: int) -> bool:
        """Return whether this step is still made; every process gets the same answer for the same step.

        Args:
            step: The optimizer step about to begin, 1-based.
        """
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.request(f"time limit of {self._time_limit:g} seconds reached")
        if self._board is None:
            return self._reason is None
        return self._board.may_start(step)

    def agree(self) -> bool:
        """Return whether the run ends here; every process calls it at the same place (one small exchange)."""
        if self._board is not None:
            # One process may know already what another will only hear here: all must take part.
            reasons = gather_object([self._board.reason or self._reason])
            self._board.reason = next((reason for reason in reasons if reason is not None), None)
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """Why the run ends, once that is agreed."""
        return self._reason if self._board is None else self._board.reason

    @contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Let the first Ctrl-C end the run after the step under way, and the second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        before = signal.getsignal(signal.SIGINT)
        first: list[float] = []

        def interrupt(signum: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            # A launcher forwards the Ctrl-C that the terminal has sent already: within a second it is the same one.
            if first and now - first[0] > 1.0:
                raise KeyboardInterrupt
            if not first:
                first.append(now)
                self.request("interrupted (Ctrl-C)")
                os.write(2, b"\nStopping after this step. Ctrl-C again leaves at once.\n")

        if before in (None, signal.SIG_IGN):
            yield  # set by foreign code, which could not be put back, or not wanted at all
            return
        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class _Board:
    """The keys of one run in the store of the process group, and the thread that watches them."""

    def __init__(self, process: int, num_processes: int) -> None:
        # All processes make the same calls in the same order, so this number names the same run everywhere.
        store = distributed_c10d._get_default_store()
        self._store = distributed_c10d.PrefixStore(f"accel_trainer/{next(_numbers)}", store)
        self.process, self.num_processes = process, num_processes
        self.wish: str | None = None
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._stands = False  # whether some process wants to stop
        self._started = 0
        self._last: int | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="accel_trainer watch", daemon=True)
        self._thread.start()

    # --- stop ---------------------------------------------------------------------------------------------------------

    def may_start(self, step: int) -> bool:
        with self._lock:
            if not self._stands and self.wish is None:
                self._started = step
                return True
        if self._last is None:
            self._stand()
            self._agree()
        return step <= self._last  # type: ignore[operator]

    def _stand(self) -> None:
        """Publish the last step started; from here on this process starts no further one on its own."""
        with self._lock:
            if not self._stands:
                self._stands = True
                self._store.set("stop", "1")
                self._store.set(f"stop/{self.process}", json.dumps([self._started, self.wish]))

    def _agree(self) -> None:
        votes = [json.loads(self._wait_for(f"stop/{process}")) for process in range(self.num_processes)]
        self._last = max(step for step, _ in votes)
        self.reason = next(reason for _, reason in votes if reason is not None)

    def _wait_for(self, key: str) -> bytes:
        while not self._store.check([key]):
            time.sleep(0.005)
        return bytes(self._store.get(key))

    # --- failure ------------------------------------------------------------------------------------------------------

    def publish_failure(self, message: str) -> bool:
        """Publish this process's error; return whether it is the first of the run."""
        first = int(self._store.add("failures", 1)) == 1
        if first:
            self._store.set("failure", json.dumps([self.process, message]))
        return first

    def failure(self) -> tuple[int, str] | None:
        """Return the process that failed first and its error, if one did."""
        if not self._store.check(["failure"]):
            return None
        process, message = json.loads(self._store.get("failure"))
        return process, message

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            try:
                failure = self.failure()
                if not self._stands and (self.wish is not None or self._store.check(["stop"])):
                    self._stand()
            except RuntimeError as error:
                failure = (0, f"its store is gone ({type(error).__name__})")
            if failure is not None:
                if failure[0] != self.process:
                    self._leave(*failure)
                return

    def _leave(self, process: int, message: str) -> None:
        """End this process if its main thread does not do so by itself: it may wait for a process that is gone."""
        if not self._closed.wait(_GRACE_SECONDS):
            print(f"accel_trainer: process {self.process} ends. {_told(process, message)}", file=sys.stderr, flush=True)
            os._exit(1)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2 * _POLL_SECONDS)


def _told(process: int, message: str) -> str:
    return f"Process {process} failed with {message}"


@contextmanager
def shared_failure(process: int, num_processes: int) -> Iterator[_Board | None]:
    """Let an error of one process end the block on all of them, with one message that names it.

    The process that fails first prints its error at once; its exit closes its connections, so that peers waiting in a
    collective come out of it. They raise `ProcessFailedError`. A peer that stays stuck is ended after three seconds.

    Args:
        process: Index of this process.
        num_processes: Of all.
    """
    if num_processes == 1:
        yield None
        return
    board = _Board(process, num_processes)
    try:
        yield board
    except BaseException as error:
        cause = _settle(board, error)
        if cause is None:
            raise
        raise cause from None
    finally:
        board.close()


def _settle(board: _Board, error: BaseException) -> ProcessFailedError | None:
    """Publish this process's error, or return the earlier one of another process that explains it."""
    message = f"{type(error).__name__}: {error}"
    lost_peer = _looks_like_lost_peer(error)
    try:
        failure = _earlier_failure(board, patience_seconds=1.0 if lost_peer else 0.0)
        if failure is None and not lost_peer and board.publish_failure(message):
            where = f"process {board.process} of {board.num_processes}"
            print(f"accel_trainer: {where} failed with {message}", file=sys.stderr, flush=True)
            return None
        failure = failure or _earlier_failure(board, patience_seconds=1.0)
    except RuntimeError:  # the store is gone with the process that held it
        failure = None
    if failure is None and lost_peer:
        return ProcessFailedError(f"Another process is gone without a word: {message}")
    if failure is None or failure[1] == message:
        return None  # an error that all raise alike is each one's own
    return ProcessFailedError(_told(*failure))


def _earlier_failure(board: _Board, patience_seconds: float) -> tuple[int, str] | None:
    deadline = time.monotonic() + patience_seconds
    while True:
        failure = board.failure()
        if failure is not None or time.monotonic() >= deadline:
            return failure
        time.sleep(0.02)


def _looks_like_lost_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("closed by peer", "reset by peer", "Broken pipe", "gloo", "NCCL")
    )
