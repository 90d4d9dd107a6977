"""How processes find each other: after a restart under a name of their own, and by their hosts."""

import multiprocessing
import os
import time

import pytest
import torch
from torch.distributed import TCPStore

from accel_trainer.devices.hardware import Hardware
from accel_trainer.devices.hosts import Place

pytestmark = pytest.mark.distributed


def meet(rank, size, port, attempt, seconds, results):
    """Form the group of processes as one that a launcher has started, after some seconds, and add up the ranks."""
    time.sleep(seconds)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    hardware = Hardware()
    total = torch.tensor(float(rank))
    torch.distributed.all_reduce(total)
    results.put((rank, hardware.num_processes, total.item()))
    results.close()
    results.join_thread()
    os._exit(0)  # as one that is killed: nothing is taken back from the store


@pytest.mark.timeout(120)
def test_processes_that_are_started_again_meet_whatever_their_hosts_have_counted():
    """Each host counts its own restarts; what earlier attempts have left in the store disturbs none."""
    fork = multiprocessing.get_context("fork")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    attempts = [  # the count and the delay of each process
        [(0, 0.0), (0, 0.0), (0, 0.0)],
        [(0, 0.0), (1, 0.0), (1, 0.5)],
        [(1, 0.5), (1, 0.0), (2, 0.0)],
        [(1, 0.0), (2, 0.0)],  # a host is gone
    ]
    for attempt in attempts:
        results = fork.Queue()
        processes = [
            fork.Process(target=meet, args=(rank, len(attempt), store.port, count, seconds, results))
            for rank, (count, seconds) in enumerate(attempt)
        ]
        for process in processes:
            process.start()
        size = len(attempt)
        found = sorted(results.get(timeout=30) for _ in attempt)
        assert found == [(rank, size, sum(range(size))) for rank in range(size)]
        for process in processes:
            process.join()


def test_a_place_tells_host_leader_and_neighbour():
    hosts = ((0, 2, 3), (1,), (4, 5))
    places = [Place(process, hosts) for process in range(6)]
    assert [place.host for place in places] == [0, 1, 0, 0, 2, 2]
    assert [place.leads for place in places] == [True, True, False, False, True, False]
    place = Place(3, hosts, (101, 102, 103))
    assert place.neighbour == (1, 2, 102) and Place(0, hosts, (101, 102, 103)).neighbour == (2, 3, 103)
    assert places[1].neighbour is None
    assert [places[0].name_of(host) for host in (1, 2)] == ["Host 1 (process 1)", "Host 2 (processes 4 to 5)"]
