"""How processes agree in rounds, through a store, on the batch before which a run ends or is saved.

Members of a circle vote: the processes of a host, and above them the hosts of a run, for each of which its leader
speaks. So what a store has to do grows with the members of its circle, never with their square.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import ProcessFailedError
from .stopping import Alone, StopRequest, foremost

_NEWS = 1 << 32  # added to the signs of life of a member: it counts news


class Failure(NamedTuple):
    """What ends a run on all processes: the error of a process, or, without its number, what has happened to one."""

    message: str
    process: int | None = None

    def __str__(self) -> str:
        return self.message if self.process is None else f"Process {self.process} failed with {self.message}"


class Vote(NamedTuple):
    """How many batches some processes have begun, and what they ask for."""

    num_begun: int
    request: StopRequest | None
    wants_save: bool

    @classmethod
    def read(cls, text: str | bytes) -> Vote:
        """Return the vote that was written as JSON."""
        num_begun, request, wants_save = json.loads(text)
        return cls(num_begun, None if request is None else StopRequest(*request), wants_save)

    @classmethod
    def of_all(cls, votes: Sequence[Vote]) -> Vote:
        """Return what follows from the votes of several."""
        nums_begun, requests, wants_save = zip(*votes, strict=True)
        return cls(max(nums_begun), foremost(requests), any(wants_save))


class Circle:
    """Members that agree in rounds through a store: the processes of a host, or the hosts of a run.

    Args:
        store: What all of them read and write.
        member: Index of this one, 0-based.
        size: Number of members.
        path: The file of the store, `None` without one. The last member that leaves takes it along.
    """

    def __init__(self, store: Any, member: int, size: int, path: str | None = None) -> None:
        self.store, self.member, self.size, self._path = store, member, size, path
        self._number = None if path is None else os.stat(path).st_ino

    def want(self, number: int) -> bool:
        """Ask all members for their votes in a round, and return whether nobody had."""
        return int(self.store.add(f"wanted/{number}", 1)) == 1

    def is_wanted(self, number: int) -> bool:
        """Return whether somebody has asked for votes in a round."""
        return bool(self.store.check([f"wanted/{number}"]))

    def cast(self, number: int, vote: Vote) -> None:
        """Publish the vote of this member."""
        self.store.set(f"vote/{number}/{self.member}", json.dumps(vote))

    def votes(self, number: int) -> Vote | None:
        """Return what follows from the votes of all members; `None` until all have voted."""
        keys = self._of_each(f"vote/{number}")
        return Vote.of_all([*map(Vote.read, self.store.multi_get(keys))]) if self.store.check(keys) else None

    def decide(self, number: int, decision: Vote) -> None:
        """Publish what follows from all votes of the run."""
        self.store.set(f"decision/{number}", json.dumps(decision))

    def decision(self, number: int) -> Vote | None:
        """Return what was decided in a round, once it was."""
        return Vote.read(self.store.get(f"decision/{number}")) if self.store.check([f"decision/{number}"]) else None

    def fail(self, failure: Failure) -> bool:
        """Publish a failure; return whether it is the first: the others are passed over."""
        is_first = int(self.store.add("failures", 1)) == 1
        if is_first:
            self.store.set("failure", json.dumps(failure))
        return is_first

    def failure(self) -> Failure | None:
        """Return the first failure, if there is one."""
        return Failure(*json.loads(self.store.get("failure"))) if self.store.check(["failure"]) else None

    def beat(self) -> int:
        """Give a sign of life, and return how many news there have been."""
        return int(self.store.add(f"beats/{self.member}", 1)) // _NEWS

    def ring(self) -> None:
        """Tell all members that there is news."""
        for key in self._of_each("beats"):
            self.store.add(key, _NEWS)

    def beats(self) -> list[int]:
        """Return how many signs of life each member has given, after `prepare`."""
        return [int(count) % _NEWS for count in self.store.multi_get(self._of_each("beats"))]

    def prepare(self) -> None:
        """Make the counts that `beats` reads, before any member has begun."""
        for key in self._of_each("beats"):
            self.store.add(key, 0)

    def has_left(self, member: int) -> bool:
        """Return whether a member has left in order."""
        return bool(self.store.check([f"left/{member}"]))

    def check_file(self) -> None:
        """Raise an `OSError` if somebody else has removed the file: the store would wait in vain for what it held."""
        if self._path is not None and os.stat(self._path).st_ino != self._number:
            raise FileNotFoundError(f"{self._path} was removed")

    def leave(self) -> None:
        """Leave in order. A file is let go, by the first member last if the others come within a second."""
        self.store.set(f"left/{self.member}", "1")
        if self._path is not None and self.member == 0:
            deadline = time.monotonic() + 1.0
            while not self.have_left() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.005)  # two stores that go at once may both take the other for the last
        if self._path is not None:
            self.release()

    def have_left(self) -> bool:
        """Return whether all members have left in order."""
        return bool(self.store.check(self._of_each("left")))

    def release(self) -> None:
        """Let go of the store."""
        self.store = None

    def _of_each(self, key: str) -> list[str]:
        return [f"{key}/{member}" for member in range(self.size)]


class Votes(Alone):
    """Agree in rounds with the other processes on the batch before which requests are met.

    A process that has voted has published how many batches it has begun, and begins no further batch that no other
    process has begun.
    """

    def __init__(self, circle: Circle, hurry: Callable[[], object]) -> None:
        super().__init__()
        self._circle, self._hurry = circle, hurry
        self._changed = threading.Condition()
        self._round, self._voted_in = 0, -1
        self._num_begun = 0  # batches
        self._decision: Vote | Failure | None = None

    def begin_batch(self) -> tuple[StopRequest | None, bool] | None:
        """Count the next batch as begun; return the end and the save that are due before it, or `None`.

        Raises:
            ProcessFailedError: A process has failed that would have had to vote.
        """
        with self._changed:
            if self._voted_in < self._round and self._request is None and not self._wants_save:
                self._num_begun += 1
                return None
            self._hurry()
            while self._decision is None:
                self._changed.wait(1.0)
            if isinstance(self._decision, Failure):
                raise ProcessFailedError(str(self._decision))
            last_batch, request, is_save_due = self._decision
            self._num_begun += 1
            if self._num_begun <= last_batch:
                return None
            self._decision = None
            self._round += 1
        return request, is_save_due

    def take_part(self) -> bool:
        """Vote if any process wants that, and take in the decision; return whether it is on its way. By the thread."""
        number, asks = self._round, self._request is not None or self._wants_save
        if self._voted_in < number:
            if asks:
                self._circle.want(number)
            elif not self._circle.is_wanted(number):
                return False
            with self._changed:
                self._voted_in = number
                vote = Vote(self._num_begun, self._request, self._wants_save)
            self._circle.cast(number, vote)
        if self._decision is not None:
            return False
        decision = self._circle.decision(number)
        if decision is not None:
            self._take_in(decision, number)
        return decision is None

    def fail(self, failure: Failure) -> None:
        """Wait for no decision any more."""
        self._take_in(failure, self._round)

    def _take_in(self, decision: Vote | Failure, number: int) -> None:
        with self._changed:
            if self._round == number:  # or the main thread has taken this decision already
                self._decision = decision
                self._changed.notify_all()


class Leader:
    """Speaks for the processes of a host: collects their votes, and exchanges them with those of the other hosts.

    Args:
        local: The processes of this host.
        hosts: The hosts, of which the first one decides; `None` if this is the only one.
    """

    def __init__(self, local: Circle, hosts: Circle | None) -> None:
        self._local, self._hosts = local, hosts
        self._round, self._num_news = 0, 0
        self._has_asked, self._has_voted = False, False

    def lead(self) -> bool:
        """Do what is to be done for the present round, and return whether a decision is on its way."""
        if self._hosts is not None:
            self._hear(self._hosts)
        if not self._local.is_wanted(self._round):
            return False
        if self._hosts is None:
            decision = self._local.votes(self._round)
            if decision is not None:
                self._decide(decision)
        else:
            self._speak(self._hosts)
        return True

    def _hear(self, hosts: Circle) -> None:
        """Give a sign of life, and pass on what is new."""
        num_news = hosts.beat()
        if num_news == self._num_news:
            return
        self._num_news = num_news
        failure = hosts.failure()
        if failure is not None:
            self._local.fail(failure)
        while (decision := hosts.decision(self._round)) is not None:
            self._decide(decision)
        if hosts.is_wanted(self._round):
            self._local.want(self._round)

    def _speak(self, hosts: Circle) -> None:
        """Bring request and vote of this host to the others; the first host decides."""
        if not self._has_asked:
            self._has_asked = True
            if hosts.want(self._round):
                hosts.ring()
        if not self._has_voted:
            vote = self._local.votes(self._round)
            if vote is not None:
                hosts.cast(self._round, vote)
                self._has_voted = True
        if self._has_voted and hosts.member == 0:
            decision = hosts.votes(self._round)
            if decision is not None:
                hosts.decide(self._round, decision)
                hosts.ring()
                self._decide(decision)

    def _decide(self, decision: Vote) -> None:
        self._local.decide(self._round, decision)
        self._round += 1
        self._has_asked, self._has_voted = False, False
