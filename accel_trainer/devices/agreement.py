"""One decision for all processes: stop together, fail together, wait for nobody who is gone.

Every process of a run has a thread that looks five times a second at the key-value store of the process group. It
carries two kinds of news, without touching a device and without any collective:

- *requests*: some process wants to end the run (a signal, the time limit, a callback) or to save it. Each process
  publishes how many batches it has begun; from then on nobody begins another until all have published; all end, or
  save, before the batch after the greatest number.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple

from torch.distributed import distributed_c10d

from ..base.console import complain, is_first_rank
from ..base.exchange import gather_objects
from ..errors import ProcessFailedError

_POLL_SECONDS = 0.2
_VOTE_SECONDS = 20.0  # the threads answer within a poll: who does not is gone
_GRACE_SECONDS = 3.0  # for the main thread to notice by itself that its peer is gone
_numbers = itertools.count()


class StopRequest(NamedTuple):
    """A wish to end the run.

    Attributes:
        reason: In words.
        kind: `callback`, whose decision is part of the run, or what interrupts it: `Ctrl-C`, `time limit` or the name
            of a signal that asks the program to leave.
    """

    reason: str
    kind: str

    @property
    def rank(self) -> int:
        """How much it matters against others: a signal to leave most, the decision of a callback least."""
        return 0 if self.kind == "callback" else 2 if self.kind.startswith("SIG") else 1


def _foremost(wishes: Iterable[StopRequest | None]) -> StopRequest | None:
    """Return the wish of the highest rank, of several the first."""
    return max((wish for wish in wishes if wish is not None), key=lambda wish: wish.rank, default=None)


class _Timer:
    """Is up some seconds after it was started.

    Args:
        seconds: How many; `None` for never.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Begin to count."""
        self._end = None if self.seconds is None else time.monotonic() + self.seconds

    def stop(self) -> None:
        """Count no more until it is restarted."""
        self._end = None

    @property
    def is_up(self) -> bool:
        """Whether the time is over."""
        return self._end is not None and time.monotonic() >= self._end


class Stopping:
    """Ask for, and agree on, the batch before which a run ends or is saved.

    Args:
        board: Where the processes meet; `None` with one process.
        time_limit_seconds: Ask for the end after this long.
        any_process: Returns for each flag whether it is set on any process.
        save_seconds: Ask for a save this long after the one before; `None` for never.

    Attributes:
        save_is_due: Whether the processes have agreed to save here; until `note_save`.
    """

    def __init__(
        self,
        board: _Board | None,
        time_limit_seconds: float | None = None,
        any_process: Callable[..., list[bool]] = lambda *flags: list(flags),
        save_seconds: float | None = None,
    ) -> None:
        self._board, self._any_process = board, any_process
        self._time_limit, self._save_timer = _Timer(time_limit_seconds), _Timer(save_seconds)
        self._request: StopRequest | None = None
        self._agreed: StopRequest | None = None
        self._wants_save = False
        self.save_is_due = False

    def request(self, reason: str, kind: str = "callback") -> None:
        """Ask for the end of the run; returns at once and may be called from a signal handler."""
        request = StopRequest(reason, kind)
        if self._request is None or request.rank > self._request.rank:
            self._request = request
            if self._board is not None:
                self._board.votes.request = request

    def before_leaving(self, function: Callable[[], None]) -> None:
        """Have something done before this process is ended because another one has failed."""
        if self._board is not None:
            self._board.before_leaving = function

    def request_save(self) -> None:
        """Ask for a save; one process is enough."""
        self._wants_save = True
        if self._board is not None:
            self._board.votes.wants_save = True

    def note_save(self) -> None:
        """Take in that the run is saved here."""
        self.save_is_due = False
        self._save_timer.restart()

    def may_go_on(self) -> bool:
        """Return whether the next batch is begun; every process gets the same answer for the same batch.

        Every process calls it before each batch of training and evaluation. It costs less than a microsecond.
        """
        if self._agreed is not None:
            return False
        if self._time_limit.is_up:
            self.request(f"time limit of {self._time_limit.seconds:g} seconds reached", "time limit")
        if self._save_timer.is_up:
            self._save_timer.stop()
            self.request_save()
        if self._board is not None:
            if self._board.votes.may_begin():
                return True
            self._settle(self._board.votes.end_round())
        elif self._request is not None or self._wants_save:
            self._settle((self._request, self._wants_save))
        return self._agreed is None

    def interrupts(self) -> bool:
        """Ask `may_go_on` within an evaluation, which the decision of a callback lets come to its end."""
        return not self.may_go_on() and self.kind != "callback"

    def agree(self) -> bool:
        """Return whether the run ends here; every process calls it at the same place (one small exchange)."""
        request = self._agreed or self._request
        # One process may know already what another will only hear here: all must take part.
        has_request, wants_save = self._any_process(request is not None, self._wants_save)
        if has_request and self._board is not None:
            request = _foremost(gather_objects(request))
        self._settle((request, wants_save))
        return self._agreed is not None

    def _settle(self, decision: tuple[StopRequest | None, bool]) -> None:
        request, save = decision
        self._agreed = self._agreed or request
        if save:
            self.save_is_due, self._wants_save = True, False
            if self._board is not None:
                self._board.votes.wants_save = False

    @property
    def reason(self) -> str | None:
        """Why the run ends, once that is agreed."""
        return None if self._agreed is None else self._agreed.reason

    @property
    def kind(self) -> str | None:
        """What ends the run, once that is agreed."""
        return None if self._agreed is None else self._agreed.kind

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let the first signal end the run after the step under way, and a second Ctrl-C at once.

        Ctrl-C, SIGTERM and SIGUSR1 are listened to. At the end the old handlers are put back; one that no end of the
        run has answered is sent again, to them.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        listener = _Listener(self)
        try:
            listener.start()
            yield
        finally:
            listener.stop()


class _Listener:
    """The signal handlers of one run."""

    _NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")

    def __init__(self, stopping: Stopping) -> None:
        self._stopping, self._process = stopping, os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._first: dict[signal.Signals, float] = {}

    def start(self) -> None:
        for number in [getattr(signal, name) for name in self._NAMES if hasattr(signal, name)]:
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # set by foreign code, which has no way back, or not wanted
                self._before[number] = before
                signal.signal(number, self._hear)

    def stop(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        agreed = self._stopping.kind
        is_answered = agreed is not None and agreed.startswith("SIG")
        late = [number for number in self._first if number is not signal.SIGINT or agreed in (None, "callback")]
        if late and not is_answered and sys.exc_info()[0] is None:
            os.kill(os.getpid(), late[0])  # it came too late for the run to end by it

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        number = signal.Signals(signum)
        if os.getpid() != self._process:
            self._hear_in_child(number)
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
            # Without a standard error output from the start, that number is a file's by now.
            if is_first_rank() and sys.__stderr__ is not None:
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, f"\n{name}: stopping after this step.{again}\n".encode())

    def _hear_in_child(self, number: signal.Signals) -> None:
        """Do in a forked child, such as a loader worker, what would be done without this listener."""
        if number is not signal.SIGINT:  # the parent has it too, and closes its workers
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)


class _Votes:
    """Agree, through the store, on the batch before which requests are met.

    They are met in rounds. A process that has voted has published how many batches it has begun, and begins no further
    one that no other process has begun.

    Attributes:
        request: What this process asks for.
        wants_save: Whether it asks for a save.
    """

    def __init__(self, store: Any, process: int, num_processes: int) -> None:
        self._store, self._processes = store, (process, num_processes)
        self.request: StopRequest | None = None
        self.wants_save = False
        self._lock = threading.Lock()
        self._round, self._voted_in = 0, -1
        self._num_begun = 0  # batches
        # The greatest number of any process, and what all ask for, once they are known.
        self._outcome: tuple[int, StopRequest | None, bool] | None = None

    def may_begin(self) -> bool:
        """Return whether the next batch may be begun without a further word; if not, `end_round` says what is due."""
        with self._lock:
            if self._voted_in < self._round and self.request is None and not self.wants_save:
                self._num_begun += 1
                return True
            number = self._round
        if self._outcome is None:
            self._vote(number)
            self._outcome = self._read_votes()
        if self._num_begun < self._outcome[0]:
            self._num_begun += 1
            return True
        return False

    def end_round(self) -> tuple[StopRequest | None, bool]:
        """Return what all ask for at this place - an end, a save - and begin the next batch and round."""
        with self._lock:
            (_, request, save), self._outcome = self._outcome, None  # type: ignore[misc]
            self._round += 1
            self._num_begun += 1
            return request, save

    def look(self) -> None:
        """Vote if any process has asked for something; called by the thread."""
        number, asks = self._round, self.request is not None or self.wants_save
        if self._voted_in < number and (asks or self._store.check([f"wish/{number}"])):
            self._vote(number)

    def _vote(self, number: int) -> None:
        """Publish the batches begun; from here on this process begins no further one on its own."""
        with self._lock:
            if self._voted_in < number == self._round:
                self._voted_in = number
                self._store.set(f"wish/{number}", "1")
                vote = json.dumps([self._num_begun, self.request, self.wants_save])
                self._store.set(f"vote/{number}/{self._processes[0]}", vote)

    def _read_votes(self) -> tuple[int, StopRequest | None, bool]:
        keys = [f"vote/{self._round}/{process}" for process in range(self._processes[1])]
        nums_begun, requests, wants = zip(*(json.loads(self._wait_for(key)) for key in keys), strict=True)
        request = _foremost(StopRequest(*one) for one in requests if one is not None)
        return max(nums_begun), request, any(wants)

    def _wait_for(self, key: str) -> bytes:
        deadline = time.monotonic() + _VOTE_SECONDS
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                process = key.rpartition("/")[2]
                raise ProcessFailedError(f"Process {process} is gone without a word: it did not answer a wish to stop.")
            time.sleep(0.005)
        return bytes(self._store.get(key))


class _Board:
    """The keys of one run in the store of the process group, and the thread that watches them.

    Attributes:
        before_leaving: Called before this process is ended because another one has failed.
        votes: Where the processes agree.
    """

    def __init__(self, process: int, num_processes: int) -> None:
        # All processes make the same calls in the same order, so this number names the same run everywhere.
        store = distributed_c10d._get_default_store()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store of a launcher outlives the processes
        self._store = distributed_c10d.PrefixStore(f"accel_trainer/{attempt}/{next(_numbers)}", store)
        self.process, self.num_processes = process, num_processes
        self.before_leaving: Callable[[], None] = lambda: None
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
                failure = (0, f"its store is gone ({type(error).__name__})")
            if failure is not None:
                if failure[0] != self.process:
                    self._leave(*failure)
                return

    def _leave(self, process: int, message: str) -> None:
        """End this process if its main thread does not do so by itself: it may wait for a process that is gone."""
        if not self._closed.wait(_GRACE_SECONDS):
            self.before_leaving()
            complain(f"accel_trainer: process {self.process} ends. {_failure_message(process, message)}")
            os._exit(1)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            # A thread that is still in the store when the interpreter ends takes the process down with an abort.
            self._thread.join(timeout=10.0)


def _failure_message(process: int, message: str) -> str:
    return f"Process {process} failed with {message}"


@contextmanager
def shared_failure(process: int, num_processes: int) -> Iterator[_Board | None]:
    """Let an error of one process end the block on all of them, with one message that names it.

    The process that fails first prints its error at once; its exit closes its connections, so that peers waiting in a
    collective come out of it. They raise `ProcessFailedError`. A peer that stays stuck is ended after three seconds.
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
            complain(f"accel_trainer: {where} failed with {message}")
            return None
        failure = failure or _earlier_failure(board, patience_seconds=1.0)
    except RuntimeError:  # the store is gone with the process that held it
        failure = None
    if failure is None and lost_peer:
        return ProcessFailedError(f"Another process is gone without a word: {message}")
    if failure is None or failure[1] == message:
        return None  # an error that all raise alike is each one's own
    return ProcessFailedError(_failure_message(*failure))


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
