"""A divided model beside DDP and a hand-written loop with `fully_shard`: seconds per step, memory, saving and loading.

    python benchmarks/sharding.py --write

Steps: the same model, data and optimizer on 2 and 4 processes of one thread, one micro-batch for each process and two.
Ours, the hand-written loop and DDP (by Accelerate, as users write it) take turns in the same processes, in changing
order, some steps each; what is compared is the ratio of the median steps within a round. Memory: the peak of a process
of 4 in fresh processes, less what it had before the model, with 100 M parameters and AdamW. Files: seconds until a
checkpoint of model and optimizer is on the disk, and until it is read back, beside torch's own (DCP).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch
import torch.distributed as dist
from common import in_turns, interval, peak_memory, write_results
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import Callback, TrainConfig, Trainer
from accel_trainer.tools.launching import run_on_processes

WIDTH, BATCH_SIZE = 256, 64
HAND, DDP, OURS, BITWISE = "hand-written fully_shard", "DDP", "ours", "ours, bitwise"


class Block(nn.Module):
    """A block of a transformer without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs, shape (batch, ...)."""
        return inputs + self.narrow(nn.functional.gelu(self.wide(self.norm(inputs))))


class Model(nn.Module):
    """Blocks and a head."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs, shape (batch, ...)."""
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)


def make_model(width: int = WIDTH, num_blocks: int = 12) -> Model:
    torch.manual_seed(0)
    return Model(width, num_blocks)


def batches(number: int, width: int = WIDTH, size: int = BATCH_SIZE) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(number * size, width, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 10, (number * size,), generator=generator))


# --- steps ------------------------------------------------------------------------------------------------------------


class Clock(Callback):
    """The time at the end of each step."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin anew."""
        self.times: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def median_step(times: list[float]) -> float:
    """Return the median seconds between two ends of steps, the first few left out."""
    return statistics.median(after - before for before, after in itertools.pairwise(times[3:]))


QUIET: dict[str, Any] = {"num_epochs": 1, "restore_best": False, "verbose": False}


def reader_of_ours(num_steps: int, num_micro_batches: int, **choices: Any) -> Callable[[int], float]:
    model, clock = make_model(), Clock()
    config = TrainConfig(num_micro_batches=num_micro_batches, **QUIET, **choices)
    trainer = Trainer(
        model, torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss(), callbacks=[clock], config=config
    )
    loader = DataLoader(batches(num_steps), BATCH_SIZE, shuffle=True)

    def read(round: int) -> float:
        trainer.fit(loader)
        return median_step(clock.times)

    return read


def by_hand(model: nn.Module, num_steps: int, num_pieces: int, sync: Callable[[bool], Any]) -> Callable[[int], float]:
    """Return a loop as a user writes it: each process reads its part of the batch, in some pieces."""
    optimizer, loss_fn = torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss()
    inputs, targets = batches(num_steps).tensors
    rank, size = dist.get_rank(), BATCH_SIZE // (dist.get_world_size() * num_pieces)

    def read(round: int) -> float:
        times = []
        for step in range(num_steps):
            for piece in range(num_pieces):
                start = step * BATCH_SIZE + (piece * dist.get_world_size() + rank) * size
                with sync(piece == num_pieces - 1):
                    loss = loss_fn(model(inputs[start : start + size]), targets[start : start + size])
                    (loss / num_pieces).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter())
        return median_step(times)

    return read


def hand_written(num_steps: int, num_pieces: int) -> Callable[[int], float]:
    from contextlib import nullcontext

    from torch.distributed.fsdp import fully_shard

    model = make_model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)

    def sync(is_last: bool) -> Any:
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)
        return nullcontext()

    return by_hand(model, num_steps, num_pieces, sync)


def data_parallel(num_steps: int, num_pieces: int) -> Callable[[int], float]:
    from contextlib import nullcontext

    model = nn.parallel.DistributedDataParallel(make_model())
    return by_hand(model, num_steps, num_pieces, lambda is_last: nullcontext() if is_last else model.no_sync())


def measure_steps(num_pieces: int, num_steps: int, rounds: int) -> dict[str, list[float]]:
    """Measure in one of the processes; all take the same turns."""
    from accel_trainer.devices.hardware import Hardware

    Hardware()  # makes the group
    number = dist.get_world_size() * num_pieces
    readers = {
        HAND: hand_written(num_steps, num_pieces),
        DDP: data_parallel(num_steps, num_pieces),
        OURS: reader_of_ours(num_steps, number, sharding="full"),
        BITWISE: reader_of_ours(num_steps, number, sharding="full", bitwise=True),
    }
    return in_turns(readers, rounds)


def compare_steps(num_processes: int, num_pieces: int, num_steps: int, rounds: int) -> dict[str, Any]:
    seconds, *_ = run_on_processes(num_processes, measure_steps, num_pieces, num_steps, rounds)
    print(f"{num_processes} processes, {num_pieces} micro-batches each: seconds per step, to those of the loop by hand")
    found: dict[str, Any] = {}
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own, seconds[HAND], strict=True)]
        low, high = interval(ratios)
        found[name] = {"ratio": statistics.median(ratios), "interval": [low, high], "seconds": own}
        print(f"  {name:28} {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}], {statistics.median(own):.4f} s")
    return found


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_of(sharding: Any, width: int, num_blocks: int) -> float:
    """Return the peak memory in MiB of this process, less what it had before the model was made."""
    before = peak_memory()
    model = make_model(width, num_blocks)
    config = TrainConfig(num_micro_batches=int(os.environ["WORLD_SIZE"]), sharding=sharding, **QUIET)
    Trainer(model, torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss(), config=config).fit(
        DataLoader(batches(3, width, 8), 8)
    )
    return peak_memory() - before


def compare_memory(num_processes: int, width: int, num_blocks: int) -> dict[str, Any]:
    millions = sum(weight.numel() for weight in make_model(width, num_blocks).parameters()) / 1e6
    peaks = {
        name: max(run_on_processes(num_processes, peak_of, sharding, width, num_blocks))
        for name, sharding in ((DDP, None), (OURS, "full"))
    }
    ratio = peaks[OURS] / peaks[DDP]
    print(f"{millions:.0f} M parameters, AdamW, {num_processes} processes: ratio {ratio:.3f} of peak MiB {peaks}")
    return {"millions": millions, "num_processes": num_processes, "peak_mib": peaks, "ratio": ratio}


# --- files ------------------------------------------------------------------------------------------------------------


def measure_files(folder: str, width: int, num_blocks: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of saving and loading a divided model and its optimizer, ours and by DCP."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = make_model(width, num_blocks)
    config = TrainConfig(num_micro_batches=int(os.environ["WORLD_SIZE"]), sharding="full", **QUIET)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
    trainer.fit(DataLoader(batches(2, width, 8), 8))

    def timed(function: Callable[[int], object]) -> Callable[[int], float]:
        def read(round: int) -> float:
            dist.barrier()
            started = time.perf_counter()
            function(round)
            dist.barrier()
            return time.perf_counter() - started

        return read

    def dcp_save(round: int) -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/dcp")

    def dcp_load(round: int) -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/dcp")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    ours = OursFiles(Path(folder) / "ours", model, optimizer)
    readers = {"save, ours": ours.save, "save, DCP": dcp_save, "load, ours": ours.load, "load, DCP": dcp_load}
    for name in ("save, ours", "save, DCP"):
        readers[name](0)  # the first write makes the files that later ones replace
    return in_turns({name: timed(function) for name, function in readers.items()}, rounds)


class OursFiles:
    """What our own checkpoints do, without the rest of a run: copy, write, digest, commit; verify, read."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from accel_trainer.devices.hardware import Hardware
        from accel_trainer.storage.run_folder import RunFolder
        from accel_trainer.storage.saver import _HostBuffers
        from accel_trainer.storage.shared_folder import SharedFolder

        hardware = Hardware()
        main = RunFolder(folder, keep=1) if hardware.is_main else None
        if main is not None:
            main.open({})
        self.folder = SharedFolder(folder, main, hardware)
        self.model, self.optimizer, self.buffers, self.step = model, optimizer, _HostBuffers(), 0

    def save(self, round: int) -> None:
        """Save the next checkpoint."""
        from dataclasses import replace

        from accel_trainer.storage.checkpoints import MODEL, OPTIMIZER, Snapshot
        from accel_trainer.storage.optimizer_state import optimizer_state
        from accel_trainer.storage.shards import own_shard
        from accel_trainer.storage.weights import plain_state

        self.step += 1
        tensors: dict[str, dict[str, Any]] = {MODEL: plain_state(self.model), OPTIMIZER: {}}
        state = {
            "optimizer": optimizer_state(self.optimizer, self.model, tensors[OPTIMIZER]),
            "run": {"best_epoch": None},
        }
        own, shard = own_shard(tensors, dist.get_rank())
        snapshot = Snapshot(self.step, own, {"aliases": {}}, state, shard)
        self.folder.save_checkpoint(replace(snapshot, tensors=self.buffers.copy(own) or own), b"")

    def load(self, round: int) -> None:
        """Load the last one."""
        from accel_trainer.base.exchange import share_object
        from accel_trainer.storage.checkpoints import MODEL, OPTIMIZER, checkpoint_name, fault_of, read_checkpoint
        from accel_trainer.storage.optimizer_state import restore_optimizer
        from accel_trainer.storage.weights import copy_into

        path = self.folder.path / "checkpoints" / checkpoint_name(self.step)
        if share_object(fault_of(path) if dist.get_rank() == 0 else None) is not None:
            raise OSError(f"{path} is damaged")
        snapshot = read_checkpoint(path)
        copy_into(self.model, snapshot.tensors[MODEL])
        restore_optimizer(self.optimizer, self.model, snapshot.state["optimizer"], snapshot.tensors[OPTIMIZER])


def compare_files(num_processes: int, width: int, num_blocks: int, rounds: int) -> dict[str, Any]:
    folder = tempfile.mkdtemp()
    try:
        seconds, *_ = run_on_processes(num_processes, measure_files, folder, width, num_blocks, rounds)
    finally:
        shutil.rmtree(folder)
    print(f"{num_processes} processes: seconds")
    for name, own in seconds.items():
        print(f"  {name:12} {statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})")
    return {"num_processes": num_processes, "width": width, "num_blocks": num_blocks, "seconds": seconds}


def parts(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    rounds = 2 if options.small else options.rounds
    for num_processes in (2, 4):
        for num_pieces in (1, 2):
            key = f"steps, {num_processes} processes, {num_pieces} each"
            yield key, partial(compare_steps, num_processes, num_pieces, 8 if options.small else 14, rounds)
    size = (128, 4) if options.small else (1024, 12)
    yield "memory", lambda: compare_memory(4, *size)
    yield "files", lambda: compare_files(4, *((128, 4) if options.small else (1024, 4)), rounds)


def main() -> None:
    """Read the options, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    parser.add_argument("--only", default="", help="measure the parts whose name begins so")
    parser.add_argument("--small", action="store_true", help="numbers that mean nothing, in a minute")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/sharding.json")
    options = parser.parse_args()
    results = {name: measure() for name, measure in parts(options) if name.startswith(options.only)}
    if options.write:
        path = Path(__file__).parent / "results" / "sharding.json"
        before = json.loads(path.read_text())["results"] if options.only and path.exists() else {}
        write_results("sharding.json", before | results)


if __name__ == "__main__":
    main()
