"""What the processes of a run tell each other past the devices: requests, failures, signs of life.

The processes of one host share a file, into which each looks five times a second, and each watches the one before it.
Of each host one process, its leader, asks the store of the group once a second. This is the host's sign of life, and
the answer says whether there is news: a failure, a request, a decision.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread, current_thread
from typing import Any, TypeVar

import psutil
from torch.distributed import FileStore, PrefixStore, distributed_c10d  # type: ignore[attr-defined]

from ..base.console import complain
from ..errors import ProcessFailedError
from .circle import Circle, Failure, Leader, Votes
from .hosts import Place, place_of

_POLL_SECONDS = 0.2  # within a host
_BEAT_SECONDS = 1.0  # between the hosts
_VOTING_SECONDS = 0.02  # within a host, while a decision is on its way
_GONE_SECONDS = 1.0  # after which a process that has ended without a word is named
_GRACE_SECONDS = 3.0  # for the main thread to notice by itself that another process has ended
_numbers = itertools.count()
_Found = TypeVar("_Found")


class Board:
    """What one process of a run publishes and reads, and the threads that do it.

    Args:
        place: Where this process stands.
        local: The processes of its host.
        hosts: The hosts; `None` if there is one.
        heartbeat_seconds: How long a host may be silent.
        before_leaving: Called before this process is ended because of another, with the cause, and whether that other
            process is lost, rather than failed by an error of its own.
    """

    def __init__(
        self,
        place: Place,
        local: Circle,
        hosts: Circle | None,
        heartbeat_seconds: float,
        before_leaving: Callable[[str, bool], object] = lambda cause, is_lost: None,
    ) -> None:
        self.place, self._local, self._hosts = place, local, hosts
        self._before_leaving = before_leaving
        leader = Leader(local, hosts) if place.leads else None
        self._leader = leader if hosts is None else None
        self._talk = None if leader is None or hosts is None else _Talk(place, local, hosts, leader, heartbeat_seconds)
        self._neighbour = None if place.neighbour is None else _Neighbour(*place.neighbour, heartbeat_seconds)
        self._watch = _Repeated(self._step)
        self.votes = Votes(local, self._watch.hurry)
        self._watch.start()

    def publish_failure(self, message: str) -> bool:
        """Publish this process's error; return whether it is the first of the run."""
        failure = Failure(message, self.place.process)
        is_first = self._local.fail(failure)
        return is_first and (self._hosts is None or _tell(self._hosts, failure))

    def failure(self) -> Failure | None:
        """Return the first failure of the run, if there is one."""
        return self._local.failure()

    def close(self) -> None:
        """End the threads, and leave the others."""
        self._watch.close()
        if self._talk is not None:
            self._talk.close()
        with suppress(RuntimeError, OSError):
            self._local.leave()

    def _step(self, elapsed: float) -> float | None:
        """Look for requests, decisions and failures; return the seconds until the next look, `None` for the last."""
        try:
            self._local.check_file()
        except OSError as error:
            self._end(Failure(f"What the processes of a host share is gone: {error}."), 0.0)
        try:
            is_voting = self.votes.take_part()
            if self._leader is not None:
                is_voting = self._leader.lead() or is_voting
            if self._talk is not None:
                self._talk.note(elapsed, is_voting)
            failure = self._local.failure() or self._found()
        except (RuntimeError, OSError) as error:
            is_voting, failure = False, Failure(f"What the processes of a host share cannot be read: {error}")
        if failure is not None:
            self._end(failure, _GRACE_SECONDS)
            return None
        return _VOTING_SECONDS if is_voting else _POLL_SECONDS

    def _found(self) -> Failure | None:
        """Return what has become of the way to the other hosts, or of the process before this one on the host."""
        message = None if self._talk is None else self._talk.fault()
        neighbour = self._neighbour if message is None else None
        message = message if neighbour is None else self._look_at(neighbour)
        if message is None:
            return None
        if self._local.fail(Failure(message)) and neighbour is not None and self._hosts is not None:
            # Not by the leader, which may be the one that has ended; in a thread, since the way may be blocked.
            Thread(target=_tell_if_possible, args=(self._hosts, Failure(message)), daemon=True).start()
        return self._local.failure()

    def _look_at(self, other: _Neighbour) -> str | None:
        """Return what is wrong with another process, once it cannot be waited for any more."""
        state, seconds = other.look()
        if state == "gone" and seconds > _GONE_SECONDS and not self._local.has_left(other.member):
            return f"Process {other.process} has ended without an error message."
        if state == "stopped" and self._hosts is not None and other.member == 0 and other.process != 0:
            self._hosts.beat()  # in place of the leader; but the main process may hold the store
        if state == "stopped" and other.is_to_be_told(seconds):
            complain(
                f"accel_trainer: process {other.process} has been stopped for {seconds:.0f} seconds, by SIGSTOP or a "
                "debugger; the others wait for it."
            )
        return None

    def _end(self, failure: Failure, seconds: float) -> None:
        """End this process, unless its main thread, which may wait for one that has ended, does so in time."""
        self.votes.fail(failure)
        if failure.process != self.place.process and not self._watch.closed.wait(seconds):
            self._before_leaving(str(failure), failure.process is None)
            complain(f"accel_trainer: {self.place.name} ends. {failure}")
            if seconds:
                self._local.release()  # this process's file would stay
            os._exit(1)


class _Repeated:
    """Calls a function in a thread with the seconds since the last call, after the seconds that it has returned.

    It ends when the function returns `None`, or after one more call when it is closed.
    """

    def __init__(self, function: Callable[[float], float | None]) -> None:
        self.closed, self._hurried, self._function = Event(), Event(), function
        self._thread = Thread(target=self._run, name="accel_trainer watch", daemon=True)

    def start(self) -> None:
        """Begin to call it."""
        self._thread.start()

    def hurry(self) -> None:
        """Call it now."""
        self._hurried.set()

    def _run(self) -> None:
        pause: float | None = 0.0
        last = time.monotonic()
        while pause is not None and not self.closed.is_set():
            self._hurried.wait(pause)
            self._hurried.clear()
            now = time.monotonic()
            pause, last = self._function(now - last), now

    def close(self) -> None:
        """End the thread. One that is still in a store when the interpreter ends takes the process down with it."""
        self.closed.set()
        self._hurried.set()
        if self._thread is not current_thread():
            self._thread.join(timeout=10.0)


class _Talk:
    """Speaks for a host among the others, in a thread of its own: the way to them may be blocked."""

    def __init__(self, place: Place, local: Circle, hosts: Circle, leader: Leader, heartbeat_seconds: float) -> None:
        self._place, self._local, self._hosts, self._leader = place, local, hosts, leader
        self._pulse = _Pulse(heartbeat_seconds)
        self._silence = 0.0  # seconds since the store has answered, those in which this process was stopped left out
        self._told: Failure | None = None
        self._is_voting = False
        if hosts.member == 0:
            hosts.prepare()
        self._thread = _Repeated(self._step)
        self._thread.start()

    def note(self, elapsed: float, is_voting: bool) -> None:
        """Note that time has passed, and whether the processes of this host have begun to vote."""
        self._silence += min(elapsed, 1.0)
        if is_voting and not self._is_voting:
            self._thread.hurry()
        self._is_voting = is_voting

    def fault(self) -> str | None:
        """Return what is wrong with the way to the other hosts, if it is silent for too long."""
        if self._silence + _BEAT_SECONDS <= self._pulse.seconds:
            return None
        return (
            f"The store of the run, at {os.environ.get('MASTER_ADDR')}, has not answered for {self._pulse.seconds:g} "
            "seconds: its host, or the way to it, is down."
        )

    def _step(self, elapsed: float) -> float | None:
        try:
            is_voting = self._leader.lead()
            self._silence = 0.0
            silent = self._pulse.silent(self._hosts.beats(), elapsed) if self._hosts.member == 0 else None
            if silent is not None and not self._hosts.has_left(silent):
                name = self._place.name_of(silent)
                self._local.fail(Failure(f"{name} has not answered for {self._pulse.seconds:g} seconds."))
            self._pass_on()
        except (RuntimeError, OSError) as error:
            with suppress(RuntimeError, OSError):
                self._local.fail(Failure(f"The store of the run is gone, and the process that has held it: {error}"))
            return None
        return _POLL_SECONDS if is_voting else _BEAT_SECONDS

    def _pass_on(self) -> None:
        """Tell the other hosts of a failure that any process of this one has found."""
        failure = self._local.failure()
        if failure is not None and failure != self._told:
            _tell(self._hosts, failure)
            self._told = failure

    def close(self) -> None:
        """End the thread, and leave the others."""
        self._thread.close()
        if self._silence < 1.0:
            with suppress(RuntimeError, OSError):
                self._pass_on()
                self._hosts.leave()
                if self._told is not None and self._hosts.member == 0:  # its process may hold the store
                    _wait_for(self._hosts.have_left, 2 * _BEAT_SECONDS)


def _tell(hosts: Circle, failure: Failure) -> bool:
    """Let all hosts know of a failure; return whether it is the first."""
    is_first = hosts.fail(failure)
    if is_first:
        hosts.ring()
    return is_first


def _tell_if_possible(hosts: Circle, failure: Failure) -> None:
    with suppress(RuntimeError, OSError):  # the store may have gone with its process
        _tell(hosts, failure)


class _Pulse:
    """Finds a host that has given no sign of life for too long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._seen: list[tuple[int, float]] = []  # the count of each host, and when it was first seen
        self._now = 0.0  # seconds in which this process was not stopped itself

    def silent(self, counts: list[int], elapsed: float) -> int | None:
        """Return the first host that has begun to give signs of life, and whose count stays the same for too long."""
        self._now += min(elapsed, 2 * _BEAT_SECONDS)
        now = self._now
        before = self._seen or [(0, now)] * len(counts)
        self._seen = [old if old[0] == new else (new, now) for old, new in zip(before, counts, strict=True)]
        patience = self.seconds - _BEAT_SECONDS  # the last sign of life may be as old when it is seen
        stuck = (host for host, (count, since) in enumerate(self._seen) if count and now - since > patience)
        return next(stuck, None)


class _Neighbour:
    """Watches another process of the same host: whether it has ended, or was stopped."""

    def __init__(self, member: int, process: int, pid: int, patience: float) -> None:
        self.member, self.process, self._patience = member, process, patience
        self._known: psutil.Process | None = None
        with suppress(psutil.Error):
            self._known = psutil.Process(pid)
        self._state, self._since = "running", time.monotonic()
        self._looked, self._has_told = -_BEAT_SECONDS, False

    def look(self) -> tuple[str, float]:
        """Return whether it is running, stopped or gone, and the seconds since that was first seen."""
        now = time.monotonic()
        if now - self._looked >= _BEAT_SECONDS:
            self._looked, state = now, self._state_now()
            if state != self._state:
                self._state, self._since, self._has_told = state, now, False
        return self._state, now - self._since

    def _state_now(self) -> str:
        status = psutil.STATUS_DEAD
        with suppress(psutil.Error):
            if self._known is not None and self._known.is_running():
                status = self._known.status()
        if status in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
            return "gone"
        return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "running"

    def is_to_be_told(self, seconds: float) -> bool:
        """Return whether it has stood still for so long that this is said, once."""
        if seconds <= self._patience or self._has_told:
            return False
        self._has_told = True
        return True


# --- a run ------------------------------------------------------------------------------------------------------------


@contextmanager
def shared_failure(
    process: int,
    num_processes: int,
    before_leaving: Callable[[str, bool], object] = lambda cause, is_lost: None,
    heartbeat_seconds: float = 30.0,
) -> Iterator[Votes | None]:
    """Let an error of one process end the block on all of them, with one message that names it.

    The process that fails first prints its error at once; its exit closes its connections, so that processes waiting in
    a collective with it come out of it. They raise `ProcessFailedError`. A process that stays stuck is ended after
    three seconds; before that, its `before_leaving` is called with the cause. A host that is silent for
    `heartbeat_seconds` has failed too. Yields what `Stopping` needs for several processes.
    """
    if num_processes == 1:
        yield None
        return
    board = _board_of(process, heartbeat_seconds, before_leaving)
    try:
        yield board.votes
    except BaseException as error:
        cause = _settle(board, error)
        if cause is None:
            raise
        raise cause from None
    finally:
        board.close()


def _board_of(process: int, heartbeat_seconds: float, before_leaving: Callable[[str, bool], object]) -> Board:
    """Return the board of a run. All processes make the same calls, so that one number names the same run on all."""
    place, number = place_of(process), next(_numbers)
    everywhere: Any = distributed_c10d._get_default_store()
    if len(place.hosts) > 1 and hasattr(everywhere, "clone"):  # since torch 2.8
        everywhere = everywhere.clone()  # a way of its own: on the first one the main thread may wait for an answer
    store = PrefixStore(f"accel_trainer/{number}", everywhere)
    hosts = Circle(PrefixStore("hosts", store), place.host, len(place.hosts)) if len(place.hosts) > 1 else None
    path = None if place.path is None else f"{place.path}-{number}"
    shared: Any = PrefixStore(f"host {place.host}", store) if path is None else FileStore(path, len(place.neighbours))
    if path is not None:
        shared.set_timeout(timedelta(seconds=10))
    local = Circle(shared, place.member, len(place.neighbours), path)
    return Board(place, local, hosts, heartbeat_seconds, before_leaving)


_SIGNS_OF_A_LOST_PROCESS = ("closed by peer", "reset by peer", "Broken pipe", "gloo", "NCCL")
_SECONDS_TO_BE_NAMED = _POLL_SECONDS + 2 * _BEAT_SECONDS + _GONE_SECONDS


def _settle(board: Board, error: BaseException) -> ProcessFailedError | None:
    """Publish this process's error, or return the earlier one of another process that explains it."""
    message = f"{type(error).__name__}: {error}"
    is_lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PROCESS)
    try:
        failure = _wait_for(board.failure, _SECONDS_TO_BE_NAMED if is_lost else 0.0)
        if failure is None and not is_lost and board.publish_failure(message):
            complain(f"accel_trainer: {board.place.name} failed with {message}")
            return None
        failure = failure or _wait_for(board.failure, 1.0)
    except (RuntimeError, OSError):  # the process that held the store has ended
        failure = None
    if failure is None and is_lost:
        return ProcessFailedError(f"Another process has ended without an error message: {message}")
    if failure is None or failure.message == message:
        return None  # an error that all raise alike
    return ProcessFailedError(str(failure))


def _wait_for(look: Callable[[], _Found], seconds: float) -> _Found:
    """Look until something is found or the time is over."""
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
