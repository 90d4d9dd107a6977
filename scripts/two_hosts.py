"""Train on two hosts, let things go wrong, and compare with the run that was left alone.

sudo python scripts/two_hosts.py --write

The hosts are network namespaces of this machine, with a cable between them and a disk each; a host has two processes.
With --sharding the model is divided over them, which takes a disk that both see; it is whole in the run that is left
alone, of one process. A worker or a launcher is killed, the cable is cut, the main process moves to the other host.
This script starts the launchers again where a scheduler would. It prints how long it took until all processes had
noticed, and until the next step. Exit code 0: nothing was lost, and not one bit differs. It needs Linux, root and `ip`
(iproute2).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Launcher = subprocess.Popen[str]
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FAULTS = ("worker", "launcher", "cable", "moved")
NUM_STEPS = 240
SECONDS_TO_LEAVE = 60.0  # that a scheduler gives the launchers that are left

# --- what each process does -------------------------------------------------------------------------------------------


def train(folder: Path, host: str, heartbeat_seconds: float, sharding: str | None = None) -> None:
    """Begin the run, or go on with it, and note each step."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from accel_trainer import Callback, TrainConfig, Trainer
    from accel_trainer.base.dtensors import whole

    rank = os.environ.get("RANK", "0")
    (folder / f"pid of {rank}").write_text(str(os.getpid()))

    class Note(Callback):
        """Notes each step, and takes some time for it."""

        def on_step_end(self, trainer: Trainer) -> None:
            with open(folder / f"steps of {rank}", "a") as file:
                file.write(f"{time.time()} {trainer.state.step}\n")
            time.sleep(0.01 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0.0)

    torch.manual_seed(0)
    inputs = torch.randn(1800, 64)
    data = TensorDataset(inputs, (inputs @ torch.randn(64, 10)).argmax(dim=1))
    model = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Dropout(0.2), nn.Tanh(), nn.Linear(96, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = TrainConfig(
        max_steps=NUM_STEPS,
        num_micro_batches=4,
        bitwise=True,
        run_dir=folder / f"disk of {'both' if sharding else host}" / "run",
        resume="auto",
        checkpoint_every=20,
        heartbeat_seconds=heartbeat_seconds,
        restore_best=False,
        sharding=sharding,
    )
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config, callbacks=[Note()])
    history = trainer.fit(DataLoader(data, 60, shuffle=True), DataLoader(data, 300))
    weights = [whole(tensor) for tensor in model.state_dict().values()]
    if trainer.is_main_process and trainer.state.step == NUM_STEPS:
        digest = hashlib.sha256()
        for tensor in weights:
            digest.update(tensor.numpy().tobytes())
        losses = history.train_losses, history.test_losses
        (folder / "result").write_text(json.dumps([*losses, digest.hexdigest()]))


# --- the hosts --------------------------------------------------------------------------------------------------------


class Hosts:
    """Two namespaces with a cable between them."""

    def __init__(self, num_processes: int, sharding: str | None) -> None:
        self.num_processes = num_processes  # of each
        self.sharding = sharding
        self.names = [f"host{number}-{os.getpid()}" for number in range(2)]
        self.cables = [f"cable{number}-{os.getpid() % 10**6}"[:15] for number in range(2)]
        self.addresses = ["10.78.0.1", "10.78.0.2"]

    def make(self) -> None:
        """Make them."""
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
        for name, cable, address in zip(self.names, self.cables, self.addresses, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
        self.connect(True)

    def connect(self, is_connected: bool) -> None:
        """Plug the cable in, or pull it out."""
        for name, cable in zip(self.names, self.cables, strict=True):
            ip("-n", name, "link", "set", cable, "up" if is_connected else "down")

    def remove(self) -> None:
        """Remove them, and the cable with them."""
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    def start(self, host: int, main: int, rendezvous: str, folder: Path, heartbeat_seconds: float) -> Launcher:
        """Start the launcher of a host, in a session of its own."""
        how = [f"--rdzv_backend={rendezvous}", f"--rdzv_endpoint={self.addresses[main]}:29400"]
        if rendezvous == "c10d":  # the hosts number themselves
            how += [f"--rdzv_conf=is_host={int(host == main)},join_timeout=60", "--max_restarts=2"]
        else:
            how += [f"--node_rank={int(host != main)}"]
        command = [
            *("ip", "netns", "exec", self.names[host], sys.executable, "-m", "torch.distributed.run", *how),
            *("--nnodes=2", f"--nproc_per_node={self.num_processes}", "--monitor_interval=0.1"),
            f"--local_addr={self.addresses[host]}",
            *(__file__, "--train", str(folder), "--host", str(host), "--heartbeat", str(heartbeat_seconds)),
            *(["--sharding", self.sharding] if self.sharding else []),
        ]
        # Gloo might take an address that the other host cannot reach.
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": self.cables[host], "OMP_NUM_THREADS": "1"}
        with open(folder / f"log of host {host}", "a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)


def ip(*arguments: str) -> None:
    """Call `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_hosts(num_processes: int, sharding: str | None) -> Iterator[Hosts]:
    """Give two hosts, and remove them at the end."""
    hosts = Hosts(num_processes, sharding)
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()


# --- the scheduler ----------------------------------------------------------------------------------------------------


class Job:
    """A training that is started again until it has come to its end."""

    def __init__(self, hosts: Hosts, folder: Path, heartbeat_seconds: float) -> None:
        self.hosts, self.folder, self.heartbeat = hosts, folder, heartbeat_seconds
        self.main, self.num_starts = 0, 0
        self.launchers: list[Launcher] = []

    def tend(self) -> None:
        """Start a launcher on each host if there are none, and end both when one has failed."""
        codes = [launcher.poll() for launcher in self.launchers]
        if any(codes):
            self.end()
        if not self.launchers:
            rendezvous = "static" if self.num_starts else "c10d"
            self.launchers = [
                self.hosts.start(host, self.main, rendezvous, self.folder, self.heartbeat) for host in range(2)
            ]
            self.num_starts += 1

    def end(self) -> None:
        """Ask the launchers to leave, and kill what has not left in time, as a scheduler does."""
        deadline, pids = time.monotonic() + SECONDS_TO_LEAVE, self.pids()
        for launcher in self.launchers:
            launcher.terminate()  # nothing, where it has ended
        while any(launcher.poll() is None for launcher in self.launchers) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in [*(launcher.pid for launcher in self.launchers if launcher.poll() is None), *pids]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()
        self.launchers = []

    def is_done(self) -> bool:
        """Return whether the run has come to its end, on all processes."""
        return (self.folder / "result").exists() and all(launcher.poll() == 0 for launcher in self.launchers)

    def pids(self) -> list[int]:
        """Return the processes, by rank."""
        return [int(path.read_text()) for path in sorted(self.folder.glob("pid of *"))]

    def steps(self) -> list[tuple[float, int]]:
        """Return when each step of the main process was done."""
        path = self.folder / "steps of 0"
        rows = [row.split() for row in path.read_text().splitlines()] if path.exists() else []
        return [(float(row[0]), int(row[1])) for row in rows if len(row) == 2]

    def has_come_to(self, step: int, since: float = 0.0) -> bool:
        """Return whether a step has been done since some time."""
        return any(when > since and number >= step for when, number in self.steps())


def is_alive(pid: int) -> bool:
    """Return whether a process runs."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# --- faults -----------------------------------------------------------------------------------------------------------


def let_happen(fault: str, job: Job) -> dict[str, float]:
    """Let a fault come upon a run; return the seconds until all had noticed, and until the next step."""
    pids, at = job.pids(), time.time()
    if fault == "worker":
        os.kill(pids[-1], signal.SIGKILL)  # its launcher starts the processes again
    elif fault == "launcher":
        os.kill(job.launchers[1].pid, signal.SIGKILL)  # its processes train on until the scheduler ends the job
        job.end()
    elif fault == "cable":
        job.hosts.connect(False)
    else:
        job.end()
        job.main = 1
    wait_for(lambda: not any(map(is_alive, pids)), "all processes to leave")
    noticed = time.time()
    job.hosts.connect(True)
    wait_for(lambda: job.has_come_to(0, noticed), "the next step", job)
    again = next(when for when, _ in job.steps() if when > noticed)
    return {"seconds_until_all_had_noticed": noticed - at, "seconds_until_the_next_step": again - at}


def wait_for(is_so: Callable[[], bool], what: str, job: Job | None = None) -> None:
    """Wait until something is so, and tend a job in the meantime.

    Raises:
        SystemExit: It has taken longer than anything here may.
    """
    deadline = time.monotonic() + 180
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit(f"Waited in vain for {what}.")
        if job is not None:
            job.tend()
        time.sleep(0.05)


def compare(hosts: Hosts, folder: Path, faults: Sequence[str], heartbeat_seconds: float) -> dict[str, Any]:
    """Let the faults come upon one run; return how long each took, and whether it ends as one that is left alone."""
    folders = folder / "alone", folder / "disturbed"
    for each in folders:
        each.mkdir(parents=True)
    train(folders[0], "none", heartbeat_seconds)
    job, results = Job(hosts, folders[1], heartbeat_seconds), {}
    for number, fault in enumerate(faults, 1):
        wait_for(lambda step=NUM_STEPS * number // 6: job.has_come_to(step), "the step of the fault", job)  # type: ignore[misc]
        results[fault] = let_happen(fault, job)
        print(fault, json.dumps(results[fault]), flush=True)
    wait_for(job.is_done, "the end of the run", job)
    alone, disturbed = ((each / "result").read_text() for each in folders)
    return {
        "faults": results,
        "steps": NUM_STEPS,
        "steps_done_twice": len(job.steps()) - NUM_STEPS,
        "starts_by_the_scheduler": job.num_starts,
        "is_equal": alone == disturbed,
    }


def main() -> None:
    """Read the options, and do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, help="which (default: all)")
    parser.add_argument("--heartbeat", type=float, default=30.0, help="heartbeat_seconds of the runs (default: 30)")
    parser.add_argument("--processes", type=int, default=2, help="of each host (default: 2)")
    parser.add_argument("--sharding", choices=["full", "hybrid"], help="divide the model (default: it is whole)")
    parser.add_argument("--folder", type=Path, help="keep all files here (default: a temporary folder)")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--host", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        train(options.train, options.host, options.heartbeat, options.sharding)
        return
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("Needs Linux, root and ip (iproute2).")
    with tempfile.TemporaryDirectory() as temporary, two_hosts(options.processes, options.sharding) as hosts:
        results = compare(hosts, options.folder or Path(temporary), options.faults, options.heartbeat)
    print(json.dumps(results, indent=2))
    if options.write:
        from accel_trainer.devices.environment import describe_environment

        content = {"environment": describe_environment(""), "heartbeat_seconds": options.heartbeat, **results}
        name = "_".join(filter(None, ("two_hosts", options.sharding)))
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    if not results["is_equal"]:
        raise SystemExit("The result differs from that of the run that was left alone.")


if __name__ == "__main__":
    main()
