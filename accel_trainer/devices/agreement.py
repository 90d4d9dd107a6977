"""One decision for all processes: stop together, fail together, never wait for a process that has ended.

Every process of a run has a thread that reads the key-value store of the process group five times a second. Two kinds
of messages pass through it, without a device and without a collective:

- *requests*: a process asks to end the run (a signal, the time limit, a callback) or to save it. Each process
  publishes how many batches it has begun; from then on no process begins another until all have published; all end,
  or save, before the batch after the greatest number.
- *failure*: a process has left the run with an error. The others name it and end too, instead of waiting in a
  collective for its time-out.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

from torch.distributed import HashStore, distributed_c10d  # type: ignore[attr-defined]

from ..base.console import complain, is_first_rank
from ..base.exchange import gather_objects
from ..errors import ProcessFailedError

_POLL_SECONDS = 0.2
_VOTE_SECONDS = 20.0  # the threads answer within a poll: a process that does not has ended
_GRACE_SECONDS = 3.0  # for the main thread to notice by itself that another process has ended
_numbers = itertools.count()
_Found = TypeVar("_Found")


class StopRequest(NamedTuple):
    """A request to end the run, with its reason in words.

    The kind is `callback`, whose decision is part of the run, or what interrupts it: `Ctrl-C`, `time limit` or the name
    of a signal that asks the program to leave.
    """

    reason: str
    kind: str


def _foremost(requests: Iterable[StopRequest | None]) -> StopRequest | None:
    """Return the request that matters most, the first of several: signals to leave most, callbacks least."""

    def rank(request: StopRequest) -> int:
        return 0 if request.kind == "callback" else 2 if request.kind.startswith("SIG") else 1

    return max(filter(None, requests), key=rank, default=None)


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
        votes: _Votes | None,
        time_limit_seconds: float | None = None,
        any_process: Callable[..., list[bool]] = lambda *flags: list(flags),
        save_seconds: float | None = None,
    ) -> None:
        self._votes, self._any_process = votes or _Votes(HashStore(), 0, 1), any_process
        self._time_limit = math.inf if time_limit_seconds is None else time_limit_seconds
        self._save_seconds = math.inf if save_seconds is None else save_seconds
        self._end_at, self._save_at = time.monotonic() + self._time_limit, time.monotonic() + self._save_seconds
        self.reason: str | None = None
        self.kind: str | None = None
        self.save_is_due = False

    def request(self, reason: str, kind: str = "callback") -> None:
        """Ask for the end of the run; returns at once and may be called from a signal handler."""
        self._votes.request = _foremost((self._votes.request, StopRequest(reason, kind)))

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
            self._votes.wants_save = True
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
        self._settle(_foremost(gather_objects(request)) if has_request else None, wants_save)
        return self.kind is not None

    def _settle(self, request: StopRequest | None, is_save_due: bool) -> None:
        if request is not None and self.kind is None:
            self.reason, self.kind = request
        if is_save_due:
            self.save_is_due, self._votes.wants_save = True, False

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


class _Votes:
    """Agree in rounds, through the store, on the batch before which requests are met.

    A process that has voted has published how many batches it has begun, and begins no further batch that no other
    process has begun. `request` and `wants_save` are what this process asks for.
    """

    def __init__(self, store: Any, process: int, num_processes: int) -> None:
        self._store, self._processes = store, (process, num_processes)
        self.request: StopRequest | None = None
        self.wants_save = False
        self._lock = threading.Lock()
        self._round, self._voted_in = 0, -1
        self._num_begun = 0  # batches
        # The greatest number of batches, the request to end and whether to save, over all processes; once known.
        self._outcome: tuple[int, StopRequest | None, bool] | None = None

    def begin_batch(self) -> tuple[StopRequest | None, bool] | None:
        """Count the next batch as begun; return the end and the save that are due before it, or `None`."""
        with self._lock:
            if self._voted_in < self._round and self.request is None and not self.wants_save:
                self._num_begun += 1
                return None
            number = self._round
        if self._outcome is None:
            self._vote(number)
            self._outcome = self._read_votes()
        last_batch, request, is_save_due = self._outcome
        with self._lock:
            self._num_begun += 1
            if self._num_begun <= last_batch:
                return None
            self._outcome = None
            self._round += 1
        return request, is_save_due

    def look(self) -> None:
        """Vote if any process has a request; called by the thread."""
        number = self._round
        if self._voted_in < number and (self.request or self.wants_save or self._store.check([f"request/{number}"])):
            self._vote(number)

    def _vote(self, number: int) -> None:
        """Publish the number of batches begun; from here on this process begins no further batch on its own."""
        with self._lock:
            if self._voted_in < number == self._round:
                self._voted_in = number
                self._store.set(f"request/{number}", "1")
                vote = json.dumps([self._num_begun, self.request, self.wants_save])
                self._store.set(f"vote/{number}/{self._processes[0]}", vote)

    def _read_votes(self) -> tuple[int, StopRequest | None, bool]:
        votes = []
        for process in range(self._processes[1]):
            key = f"vote/{self._round}/{process}"
            if not _wait_for(partial(self._store.check, [key]), _VOTE_SECONDS):
                raise ProcessFailedError(
                    f"Process {process} has ended without an error message: it did not answer a request to stop."
                )
            votes.append(json.loads(self._store.get(key)))
        nums_begun, requests, wants_save = zip(*votes, strict=True)
        request = _foremost(StopRequest(*request) for request in requests if request is not None)
        return max(nums_begun), request, any(wants_save)


def _wait_for(look: Callable[[], _Found], seconds: float) -> _Found:
    """Look until something is found or the time is over; the store itself would keep the other thread waiting too."""
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found


class _Board:
    """The keys of one run in the store of the process group, and the thread that watches them."""

    def __init__(self, process: int, num_processes: int, before_leaving: Callable[[str], object]) -> None:
        # All processes make the same calls in the same order, so this number names the same run everywhere.
        store = distributed_c10d._get_default_store()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store of a launcher outlives the processes
        self._store = distributed_c10d.PrefixStore(f"accel_trainer/{attempt}/{next(_numbers)}", store)
        self.process, self.num_processes, self._before_leaving = process, num_processes, before_leaving
        self.votes = _Votes(self._store, process, num_processes)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="accel_trainer watch", daemon=True)
        self._thread.start()

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

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            try:
                failure = self.failure()
                self.votes.look()
            except RuntimeError as error:
                failure = (0, f"its store is closed ({type(error).__name__})")
            if failure is not None:
                # The main thread may wait for the process that has ended.
                if failure[0] != self.process and not self._closed.wait(_GRACE_SECONDS):
                    cause = "Process {} failed with {}".format(*failure)
                    self._before_leaving(cause)
                    complain(f"accel_trainer: process {self.process} ends. {cause}")
                    os._exit(1)
                return

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            # A thread that is still in the store when the interpreter ends takes the process down with an abort.
            self._thread.join(timeout=10.0)


@contextmanager
def shared_failure(
    process: int, num_processes: int, before_leaving: Callable[[str], object] = lambda cause: None
) -> Iterator[_Votes | None]:
    """Let an error of one process end the block on all of them, with one message that names it.

    The process that fails first prints its error at once; its exit closes its connections, so that processes waiting in
    a collective with it come out of it. They raise `ProcessFailedError`. A process that stays stuck is ended after
    three seconds; before that, its `before_leaving` is called with the cause. Yields what `Stopping` needs for several
    processes.
    """
    if num_processes == 1:
        yield None
        return
    board = _Board(process, num_processes, before_leaving)
    try:
        yield board.votes
    except BaseException as error:
        cause = _settle(board, error)
        if cause is None:
            raise
        raise cause from None
    finally:
        board.close()


_SIGNS_OF_A_LOST_PROCESS = ("closed by peer", "reset by peer", "Broken pipe", "gloo", "NCCL")


def _settle(board: _Board, error: BaseException) -> ProcessFailedError | None:
    """Publish this process's error, or return the earlier one of another process that explains it."""
    message = f"{type(error).__name__}: {error}"
    is_lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PROCESS)
    try:
        failure = _wait_for(board.failure, 1.0 if is_lost else 0.0)
        if failure is None and not is_lost and board.publish_failure(message):
            complain(f"accel_trainer: process {board.process} of {board.num_processes} failed with {message}")
            return None
        failure = failure or _wait_for(board.failure, 1.0)
    except RuntimeError:  # the process that held the store has ended
        failure = None
    if failure is None and is_lost:
        return ProcessFailedError(f"Another process has ended without an error message: {message}")
    if failure is None or failure[1] == message:
        return None  # an error that all raise alike
    return ProcessFailedError("Process {} failed with {}".format(*failure))
