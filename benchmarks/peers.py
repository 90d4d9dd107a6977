"""The trainer beside other loops and trainers: seconds per epoch, test loss, peak memory, start-up.

    python benchmarks/peers.py --write
    python benchmarks/peers.py --processes 2 --write
    python benchmarks/peers.py --workloads gpt2 resnet50 --write       # on a GPU

Every contender trains the same model from the same weights on the same data with the same optimizer, batch size and
number of epochs, shuffled, and tests it each epoch. A timed piece is a whole training with all that a contender does
before and after it. In a fresh process, forked from one that has imported everybody's modules, the hand-written loop
and one contender take turns, after an untimed training each: every turn gives a ratio. Such processes are interleaved
in changing order, so drift of a shared machine falls on all. The hand-written loop beside itself shows the noise.

Peak memory and start-up are those of processes from nothing that train two epochs: seconds from the start of the
process to the end of its first step, imports included. On two processes the reference is hand-written
DistributedDataParallel. A contender whose last test loss is not that of the reference is void.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask whether there is a GPU touches it otherwise

import torch
from common import peak_memory, where_measured
from contenders import CONTENDERS, DDP, HAND, IN_GROUPS, LIMIT, ON_GPU, PEERS
from table import cell_table
from torch.optim.optimizer import register_optimizer_step_post_hook
from workloads import WORKLOADS, make_task

RESULTS = Path(__file__).parent / "results" / "peers.json"
MODULES = (
    *("torch._dynamo", "torch.nn.parallel", "accel_trainer.trainer", "datasets", "sklearn.datasets", "lightning"),
    *("transformers.trainer", "pytorch_accelerated", "ignite.engine", "ignite.metrics", "skorch"),
)
Pieces = dict[str, list[float]]


@dataclass(frozen=True)
class Cell:
    """What is measured at a time."""

    workload: str
    data: str
    processes: int
    small: bool

    @property
    def reference(self) -> str:
        """Whom the others are compared with."""
        return HAND if self.processes == 1 else DDP

    @property
    def num_epochs(self) -> int:
        """Of a timed piece; on several processes what is done once, at the start, takes longer."""
        return WORKLOADS[self.workload](self.small).num_epochs.get(self.data, 1) * (1 if self.processes == 1 else 8)

    @property
    def device(self) -> str:
        """Where it is trained."""
        return torch.cuda.get_device_name() if self.processes == 1 and torch.cuda.is_available() else "CPU"

    def __str__(self) -> str:
        parts = [self.workload, self.data, self.device]
        parts += [f"{self.processes} processes"] if self.processes > 1 else []
        return ", ".join([*parts, "small"] if self.small else parts)


# --- in the measured process ------------------------------------------------------------------------------------------


def take_turns(cell: Cell, contender: str, turns: int, seed: int) -> dict[str, Pieces]:
    """Let the reference and a contender train in turn; return what each turn measured."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        return _take_turns(cell, contender, turns, seed)


def _take_turns(cell: Cell, contender: str, turns: int, seed: int) -> dict[str, Pieces]:
    torch.set_num_threads(1)
    sides = {"reference": cell.reference, "own": contender}
    compiled = make_task(cell.workload, cell.data, cell.small).compiled
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # both sides' variants; beyond it nothing would be compiled
    for _ in range(2 if compiled else 1):
        for name in sides.values():
            piece(cell, name, seed, num_epochs=1)
    gc.collect()
    gc.freeze()  # the modules of the others are no garbage to look through
    measured: dict[str, Pieces] = {}
    for number in range(turns):
        for side in sorted(sides, reverse=(seed + number) % 2 == 1):
            for what, value in piece(cell, sides[side], seed + number).items():
                measured.setdefault(what, {"own": [], "reference": []})[side].append(value)
    return measured


def piece(cell: Cell, name: str, seed: int, num_epochs: int | None = None) -> dict[str, float]:
    """Time one training from the first weights."""
    task = make_task(cell.workload, cell.data, cell.small, num_epochs or cell.num_epochs)
    on_gpu = task.device.type == "cuda"
    torch.manual_seed(seed)
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    started = time.perf_counter()
    test_loss = CONTENDERS[name](task)
    if on_gpu:
        torch.cuda.synchronize()
    measured = {"seconds_per_epoch": (time.perf_counter() - started) / task.num_epochs, "test_loss": test_loss}
    return measured | ({"peak_device_mib": torch.cuda.max_memory_allocated() / 2**20} if on_gpu else {})


def start_fresh(cell: Cell, contender: str, started: float) -> dict[str, float]:
    """Train two epochs; return when the first step was done, and the peak memory."""
    torch.set_num_threads(1)
    steps: list[float] = []

    def on_step(*args: Any) -> None:
        if not steps:
            steps.append(time.time())

    register_optimizer_step_post_hook(on_step)
    CONTENDERS[contender](make_task(cell.workload, cell.data, cell.small, num_epochs=2))
    return {"startup_seconds": steps[0] - started, "peak_memory_mib": peak_memory()}


# --- in the measuring process -----------------------------------------------------------------------------------------


def in_new_processes(cell: Cell, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in fresh processes of one group; return what the main one of them returns."""
    if cell.device != "CPU":  # what has touched a GPU cannot be forked
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, cell, *args).result()
    from accel_trainer.tools.launching import run_on_processes

    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if cell.processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
    return run_on_processes(cell.processes, function, cell, *args, environment=environment)[0]


def measure_turns(cell: Cell, names: list[str], rounds: int, turns: int) -> dict[str, dict[str, Pieces]]:
    """Return the samples of each contender."""
    samples: dict[str, dict[str, Pieces]] = {name: {} for name in names}
    shuffle = random.Random(0).shuffle
    for number in range(rounds):
        print(f"{cell}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        order = list(samples)
        shuffle(order)
        for name in order:
            try:
                measured = in_new_processes(cell, take_turns, name, turns, 1 + number * turns)
            except Exception as error:
                print(f"{cell}: {name} fails and is left out:\n{error}", file=sys.stderr)
                del samples[name]
                continue
            for what, sides in measured.items():
                for side, values in sides.items():
                    samples[name].setdefault(what, {"own": [], "reference": []})[side] += values
    return samples


def measure_fresh(cell: Cell, names: list[str], rounds: int) -> dict[str, Pieces]:
    """Return start-up and peak memory of each contender, a process from nothing each."""
    samples: dict[str, Pieces] = {name: {"startup_seconds": [], "peak_memory_mib": []} for name in names}
    shuffle = random.Random(0).shuffle
    for number in range(rounds):
        print(f"{cell}: fresh processes {number + 1} of {rounds}", file=sys.stderr, flush=True)
        order = list(samples)
        shuffle(order)
        for name in order:
            command = [sys.executable, __file__, "--workloads", cell.workload, "--data", cell.data]
            command += ["--small", "--fresh", name] if cell.small else ["--fresh", name]
            done = subprocess.run([*command, str(time.time())], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} fails in a fresh process:\n{done.stderr}")
            for what, value in json.loads(done.stdout.splitlines()[-1]).items():
                samples[name][what].append(value)
    return samples


def contenders_of(cell: Cell, chosen: list[str] | None) -> list[str]:
    """Return who takes part, the reference first."""
    possible = (
        IN_GROUPS if cell.processes > 1 else ON_GPU if WORKLOADS[cell.workload](cell.small).on_gpu else CONTENDERS
    )
    names = [name for name in possible if name == cell.reference or name in (chosen or possible)]
    if cell.processes == 1:
        names = [name for name in names if name != DDP and (name != LIMIT or cell.data != "workers")]
    return [name for name in names if _installed(PEERS.get(name, "torch"))]


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def describe(cell: Cell) -> dict[str, Any]:
    workload = WORKLOADS[cell.workload](cell.small)
    train, test = (len(table) for table in workload.make_tables())
    return {
        "workload": cell.workload,
        "data": cell.data,
        "device": cell.device,
        "processes": cell.processes,
        "small": cell.small,
        "reference": cell.reference,
        "num_epochs": cell.num_epochs,
        "rows": train,
        "unit": "tokens" if workload.tokens > 1 else "samples",
        "units_per_epoch": train * workload.tokens,
        # A test needs the forward only, a third.
        "flops_per_epoch": workload.flops() * (train + test / 3) if workload.flops else None,
        **where_measured(*sorted(filter(_installed, set(PEERS.values()) - {"accelerate"}))),
    }


def keep(path: Path, cell: Cell, measured: dict[str, Any]) -> None:
    """Put a cell beside what was measured before; under the same conditions, contender by contender."""
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    before = results.get(str(cell), {})
    contenders = before.pop("contenders", {})
    if before == {name: value for name, value in measured.items() if name != "contenders"}:
        for name, samples in measured["contenders"].items():
            contenders[name] = contenders.get(name, {}) | samples
        measured["contenders"] = contenders
    results[str(cell)] = measured
    path.write_text(json.dumps({"results": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--data", nargs="+", choices=["tensors", "dataset", "workers"], help="default: what suits each")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per contender")
    parser.add_argument("--repeats", type=int, default=3, help="turns in each of them")
    parser.add_argument("--startups", type=int, default=3, help="processes from nothing, for start-up and peak memory")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-startup", action="store_true")
    parser.add_argument("--small", action="store_true", help="shrink everything: a smoke test, no measurement")
    parser.add_argument("--write", nargs="?", type=Path, const=RESULTS, help="keep the samples (default: %(const)s)")
    parser.add_argument("--fresh", nargs=2, metavar=("NAME", "STARTED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fresh:
        name, started = options.fresh
        with contextlib.redirect_stdout(sys.stderr):
            measured = start_fresh(Cell(options.workloads[0], options.data[0], 1, options.small), name, float(started))
        print(json.dumps(measured))
        return

    if not _installed("accel_trainer"):  # its version is kept with what is measured
        parser.error("accel_trainer is not installed: pip install -e . in the project's folder, then again.")
    for distribution in sorted(set(PEERS.values())):
        if not _installed(distribution):
            print(f"{distribution} is not installed: skipped (pip install .[bench])")
    has_gpu = torch.cuda.is_available()
    on_cpu = ["cnn", "transformer"] if options.processes > 1 else ["tiny", "digits", "cnn", "transformer"]
    get_context("forkserver").set_forkserver_preload(list(MODULES))
    forkserver.ensure_running()
    for workload in options.workloads or on_cpu:
        if WORKLOADS[workload](options.small).on_gpu and not (options.small or has_gpu):
            print(f"{workload} needs a GPU, and there is none.")
            continue
        default = ["tensors"] if options.processes > 1 else WORKLOADS[workload](options.small).num_epochs
        for data in options.data or default:
            cell = Cell(workload, data, options.processes, options.small)
            names = contenders_of(cell, options.contenders)
            samples: dict[str, dict[str, Any]] = dict(measure_turns(cell, names, options.rounds, options.repeats))
            skipped = {"peak_memory_mib"} if options.skip_memory else set()
            skipped |= {"startup_seconds"} if options.skip_startup else set()
            if data == "tensors" and options.processes == 1 and len(skipped) < 2:
                for name, fresh in measure_fresh(cell, list(samples), options.startups).items():
                    samples[name] |= {what: values for what, values in fresh.items() if what not in skipped}
            measured = describe(cell) | {"contenders": samples}
            print(cell_table(measured), flush=True)
            if options.write:
                keep(options.write, cell, measured)


if __name__ == "__main__":
    main()
