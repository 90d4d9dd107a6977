"""What processes tell each other past the devices: votes that scale, failures, signs of life."""

import glob
import itertools
import os
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, TCPStore

from accel_trainer import Callback, ProcessFailedError, Trainer
from accel_trainer.devices import board as board_module
from accel_trainer.devices import hosts as hosts_module
from accel_trainer.devices.board import Board
from accel_trainer.devices.board import _Pulse as Pulse
from accel_trainer.devices.circle import Circle, Leader, Vote, Votes
from accel_trainer.devices.hosts import Place
from accel_trainer.devices.stopping import StopRequest
from support import loader_of, make_data, make_model, on_processes, quiet

KEYS_PER_HOST = 16  # that a vote may touch in the store between the hosts


class Counted:
    """A store that counts the keys that are touched, signs of life left out."""

    def __init__(self, store, counts):
        self._store, self._counts = store, counts

    def __getattr__(self, name):
        call = getattr(self._store, name)

        def counted(keys, *values):
            for key in [keys] if isinstance(keys, str) else keys:
                self._counts[key.split("/")[0]] += 1
            return call(keys, *values)

        return counted


# --- votes, step by step ----------------------------------------------------------------------------------------------


def circles_of(hosts_sizes, hosts_counts, local_counts):
    """Return for each host the circle of its processes, by member, and its circle among the hosts."""
    between = Counted(HashStore(), hosts_counts)
    for host, size in enumerate(hosts_sizes):
        within = Counted(HashStore(), local_counts)
        yield [Circle(within, member, size) for member in range(size)], Circle(between, host, len(hosts_sizes))


def rounds_until_agreed(sizes, counts):
    """Let one process ask, and each take its turn, once after the other; return the rounds and what was agreed."""
    hosts = list(circles_of(sizes, counts, Counter()))
    votes = [[Votes(circle, lambda: None) for circle in local] for local, _ in hosts]
    leaders = [Leader(local[0], between if len(sizes) > 1 else None) for local, between in hosts]
    everyone = list(itertools.chain(*votes))
    for number, vote in enumerate(everyone):
        for _ in range(number % 5):
            assert vote.begin_batch() is None
    everyone[-1].ask(StopRequest("asked", "callback"))
    for turn in itertools.count(1):
        for vote in everyone:
            vote.take_part()
        for leader in leaders:
            leader.lead()
        if all(vote._decision is not None for vote in everyone):
            return turn, everyone


@pytest.mark.parametrize("sizes", [[1] * 4, [1] * 8, [1] * 16, [4, 3, 1], [8] * 8, [5]])
def test_what_a_vote_does_in_the_store_grows_with_the_hosts_not_with_their_square(sizes):
    counts = Counter()
    turns, votes = rounds_until_agreed(sizes, counts)
    assert turns <= 5
    assert sum(count for key, count in counts.items() if key != "beats") <= KEYS_PER_HOST * len(sizes)
    assert counts["beats"] <= (turns + 2) * len(sizes)  # each turn one, and two rings
    if len(sizes) == 1:
        assert not counts
    begun = []
    for number, vote in enumerate(votes):
        num_begun = number % 5
        while vote.begin_batch() is None:
            num_begun += 1
        begun.append(num_begun)
    assert set(begun) == {min(4, len(votes) - 1)}  # the most that anyone had begun


def test_a_second_round_follows_the_first_and_a_save_is_no_end():
    _, everyone = rounds_until_agreed([2, 2], Counter())
    (vote, *_) = everyone
    while (met := vote.begin_batch()) is None:
        pass
    assert met == (StopRequest("asked", "callback"), False)
    circle = Circle(HashStore(), 0, 1)
    alone = Votes(circle, lambda: None)
    leader = Leader(circle, None)
    for number in range(3):
        alone.ask_to_save()
        assert alone.take_part() and leader.lead() and not alone.take_part()
        while (met := alone.begin_batch()) is None:
            pass
        assert met == (None, True), number
        alone.ask_to_save(False)
        assert alone.begin_batch() is None


def test_votes_survive_the_way_through_the_store():
    votes = [Vote(3, None, True), Vote(5, StopRequest("why", "SIGTERM"), False)]
    circle = Circle(HashStore(), 0, 2)
    circle.cast(0, votes[0])
    assert circle.votes(0) is None
    Circle(circle.store, 1, 2).cast(0, votes[1])
    assert circle.votes(0) == Vote(5, StopRequest("why", "SIGTERM"), True)


# --- many processes ---------------------------------------------------------------------------------------------------


@contextmanager
def boards_of(sizes, heartbeat_seconds=30.0):
    """Give the boards of simulated processes, with a real server between the hosts."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    firsts = list(itertools.accumulate(sizes, initial=0))
    hosts = tuple(tuple(range(first, first + size)) for first, size in zip(firsts, sizes, strict=False))

    def connect(host):
        return TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=60))

    with ThreadPoolExecutor(64) as threads:
        clients = list(threads.map(connect, hosts))
    boards = []
    for number, processes in enumerate(hosts):
        within = HashStore()
        for member, process in enumerate(processes):
            local, between = Circle(within, member, len(processes)), Circle(clients[number], number, len(hosts))
            boards.append(Board(Place(process, hosts), local, between, heartbeat_seconds))
    try:
        yield boards
    finally:
        on_threads(*(board.close for board in boards))


def on_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def seconds_to_stop(boards):
    """Let a process ask for the end while all begin batches; return the seconds until all have the same."""
    ends, stopped = [], threading.Event()

    def go(votes):
        num_batches = 0
        while votes.begin_batch() is None:
            num_batches += 1
            stopped.wait(0.5)
        ends.append(num_batches)

    threads = [threading.Thread(target=go, args=(board.votes,)) for board in boards]
    for thread in threads:
        thread.start()
    time.sleep(0.7)
    started = time.monotonic()
    boards[len(boards) // 2].votes.ask(StopRequest("SIGTERM", "SIGTERM"))
    waiting = list(zip(boards, threads, strict=True))
    while any(board.votes._decision is None and thread.is_alive() for board, thread in waiting):
        time.sleep(0.01)
    seconds = time.monotonic() - started
    stopped.set()
    for thread in threads:
        thread.join()
    assert len(ends) == len(boards) and len(set(ends)) == 1
    return seconds


def test_hundreds_of_processes_agree_in_seconds():
    sizes = [16] * 16
    with boards_of(sizes) as boards:
        time.sleep(1.5)
        seconds = seconds_to_stop(boards)
    print(f"{sum(sizes)} processes on {len(sizes)} hosts agreed in {seconds:.2f} s")
    assert seconds < 3.0


def test_seconds_in_which_the_process_itself_was_stopped_are_no_silence_of_others():
    pulse = Pulse(5.0)
    assert all(pulse.silent([count, count], 1.0) is None for count in range(1, 5))
    assert pulse.silent([5, 4], 3600.0) is None  # all were suspended, and this one goes on first
    assert pulse.silent([6, 5], 1.0) is None
    assert [pulse.silent([6 + count, 5], 1.0) for count in range(1, 7)] == [None] * 4 + [1, 1]


# --- real processes, which stand for hosts ----------------------------------------------------------------------------


def fit_tiny(config, callbacks=()):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config, callbacks=list(callbacks))
    return trainer.fit(loader_of(make_data(40)), loader_of(make_data(20))).train_losses


def train_while(folder, hosts, stopped, seconds):
    """Train while the last process stops another; return the losses and what was said.

    Args:
        folder: For the numbers of the processes.
        hosts: The host that each process takes itself to be on.
        stopped: The process that is stopped ...
        seconds: ... and for how long.
    """
    rank, said, identity = torch.distributed.get_rank(), [], hosts_module._identity_of_host()
    board_module.complain = lambda line: (said.append(line), print(line, flush=True))
    hosts_module._identity_of_host = lambda: f"{identity} {hosts[rank]}"
    (folder / f"pid {rank}").write_text(str(os.getpid()))

    class Interfere(Callback):
        def on_epoch_end(self, trainer):
            if trainer.state.epoch == 1 and rank == len(hosts) - 1:
                pid = int((folder / f"pid {stopped}").read_text())
                os.kill(pid, signal.SIGSTOP)
                threading.Timer(seconds, os.kill, (pid, signal.SIGCONT)).start()

    return fit_tiny(quiet(num_epochs=4, heartbeat_seconds=5), [Interfere()]), said


@pytest.mark.distributed
@pytest.mark.parametrize("hosts, stopped", [("aa", 0), ("aabb", 2)])
def test_a_stopped_process_is_waited_for_and_told_once(tmp_path, hosts, stopped):
    undisturbed = fit_tiny(quiet(num_epochs=4))
    losses, said = zip(*on_processes(len(hosts), train_while, tmp_path, hosts, stopped, 8.0), strict=True)
    assert all(one == pytest.approx(undisturbed, rel=1e-5) for one in losses)
    (line,) = itertools.chain(*said)
    assert re.search(rf"process {stopped} has been stopped for [56] seconds", line)


def train_until_one_is_killed(folder, hosts, killed):
    """Train while the first process kills another; print how the training has ended."""
    rank, identity = torch.distributed.get_rank(), hosts_module._identity_of_host()
    hosts_module._identity_of_host = lambda: f"{identity} {hosts[rank]}"
    (folder / f"pid {rank}").write_text(str(os.getpid()))

    class Kill(Callback):
        def on_step_end(self, trainer):
            time.sleep(0.02)
            if trainer.state.step == 20 and rank == 0:
                os.kill(int((folder / f"pid {killed}").read_text()), signal.SIGKILL)

    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # of the one that has started all, which sees the first that has ended
    try:
        fit_tiny(quiet(num_epochs=1000), [Kill()])
    except ProcessFailedError as error:
        print(f"process {rank}: {error}", flush=True)


@pytest.mark.distributed
@pytest.mark.parametrize("killed", [2, 3])
def test_a_process_that_is_killed_is_named_on_all_hosts(tmp_path, capfd, killed):
    started = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        on_processes(4, train_until_one_is_killed, tmp_path, "aabb", killed)
    assert time.monotonic() - started < 12
    said = capfd.readouterr()
    told = re.findall(
        r"rocess (\d)(?: of 4 ends.|:) Process (\d) has ended without an error message", said.out + said.err
    )
    assert {int(one) for one, _ in told} == {0, 1, 2, 3} - {killed} and {int(other) for _, other in told} == {killed}


@pytest.mark.distributed
def test_a_silent_host_is_named_and_ends_all_others(tmp_path, capfd):
    def go_on():
        os.kill(int((tmp_path / "pid 1").read_text()), signal.SIGCONT)

    threading.Timer(10.0, go_on).start()
    started = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        on_processes(3, train_while, tmp_path, "aba", 1, 60.0)
    assert time.monotonic() - started < 15
    told = capfd.readouterr().out
    for process in (0, 2):
        assert f"process {process} of 3 ends. Host 1 (process 1) has not answered for 5 seconds." in told


# --- the file of a host -----------------------------------------------------------------------------------------------


def fit_several_times():
    for _ in range(5):
        fit_tiny(quiet(num_epochs=1))
    return hosts_module.place_of(torch.distributed.get_rank()).path


@pytest.mark.distributed
def test_the_file_that_the_processes_of_a_host_share_goes_with_the_last():
    paths = on_processes(3, fit_several_times)
    left = glob.glob(f"{paths[0]}*")  # where two stores go in the same microseconds, each takes the other for the last
    assert len(set(paths)) == 1 and len(left) <= 1


def train_without_its_file():
    """Remove the file in the middle of a run, as cleaners of temporary files do."""

    class Remove(Callback):
        def on_epoch_end(self, trainer):
            if trainer.state.epoch == 2 and trainer.is_main_process:
                for path in glob.glob(f"{hosts_module.place_of(0).path}*"):
                    os.unlink(path)
            time.sleep(0.3)

    return fit_tiny(quiet(num_epochs=30), [Remove()])


@pytest.mark.distributed
def test_a_file_that_is_removed_ends_the_run_with_the_cause(capfd):
    started = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        on_processes(2, train_without_its_file)
    assert time.monotonic() - started < 8
    assert "What the processes of a host share is gone: [Errno 2] No such file" in capfd.readouterr().err
