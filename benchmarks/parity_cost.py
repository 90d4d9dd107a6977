"""What `bitwise=True` costs: seconds per epoch against the default at the same number of micro-batches.

    python benchmarks/parity_cost.py --rounds 9 --write

A CNN and a small transformer on 1, 2 and 4 processes, one thread each. Default and bitwise take turns in one launch, in
changing order; each is timed over the second epoch of a run, and what is compared is the ratio within a round. The
bytes that a process sends per step are counted from the calls that are made.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed
from common import interval, write_results
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import TrainConfig, Trainer
from accel_trainer.tools.launching import run_on_processes

NUM_MICRO_BATCHES, BATCH_SIZE, NUM_BATCHES = 8, 64, 12


class Transformer(nn.Module):
    """Two encoder layers over 32 tokens; predicts a class."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, 96)
        layer = nn.TransformerEncoderLayer(96, 4, 192, dropout=0.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(96, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores of shape `(batch, 10)` for tokens of shape `(batch, 32)`."""
        return self.head(self.encoder(self.embedding(tokens)).mean(dim=1))


def make(workload: str) -> tuple[nn.Module, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    num_samples = BATCH_SIZE * NUM_BATCHES
    targets = torch.randint(0, 10, (num_samples,), generator=generator)
    torch.manual_seed(0)
    if workload == "transformer":
        return Transformer(), TensorDataset(torch.randint(0, 500, (num_samples, 32), generator=generator), targets)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 49, 10)),
    )
    return model, TensorDataset(torch.randn(num_samples, 1, 28, 28, generator=generator), targets)


def seconds_of_epoch(workload: str, bitwise: bool, num_epochs: int = 2) -> float:
    model, data = make(workload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = TrainConfig(
        num_epochs=num_epochs,
        num_micro_batches=NUM_MICRO_BATCHES,
        bitwise=bitwise,
        num_threads=1,
        restore_best=False,
        verbose=False,
    )
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
    return trainer.fit(DataLoader(data, BATCH_SIZE, shuffle=True)).epoch_seconds[-1]


def measure_here(workload: str, rounds: int) -> dict[str, list[float]]:
    """Run in each process of a launch: take turns, and return the seconds of the main process."""
    warnings.simplefilter("ignore")
    seconds: dict[str, list[float]] = {"default": [], "bitwise": []}
    for number in range(rounds):
        for name in sorted(seconds, reverse=number % 2 == 1):
            seconds[name].append(seconds_of_epoch(workload, name == "bitwise"))
    return seconds


def bytes_sent_here(workload: str) -> dict[str, float]:
    """Count what this process sends to others in a step of bitwise, by kind of call."""
    warnings.simplefilter("ignore")
    sent = {"all_to_all_single": 0.0, "all_gather": 0.0}
    originals = {name: getattr(torch.distributed, name) for name in sent}

    def all_to_all_single(output: Tensor, source: Tensor, outputs: list[int], inputs: list[int]) -> Any:
        rank = torch.distributed.get_rank()
        sent["all_to_all_single"] += sum(inputs) - inputs[rank]
        return originals["all_to_all_single"](output, source, outputs, inputs)

    def all_gather(tensors: list[Tensor], tensor: Tensor) -> Any:
        sent["all_gather"] += tensor.nbytes * (torch.distributed.get_world_size() - 1)
        return originals["all_gather"](tensors, tensor)

    torch.distributed.all_to_all_single, torch.distributed.all_gather = all_to_all_single, all_gather
    seconds_of_epoch(workload, bitwise=True, num_epochs=1)
    gradients = sum(parameter.nbytes for parameter in make(workload)[0].parameters())
    return {**{name: count / NUM_BATCHES for name, count in sent.items()}, "gradients": gradients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--write", action="store_true", help="keep the samples in benchmarks/results/parity_cost.json")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    import parity_cost  # the processes import these functions by name

    cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    results: dict[str, Any] = {}
    for workload in ("cnn", "transformer"):
        for number in options.processes:
            seconds = run_on_processes(number, parity_cost.measure_here, workload, options.rounds, environment=cpu)[0]
            ratios = [exact / default for exact, default in zip(seconds["bitwise"], seconds["default"], strict=True)]
            median, (low, high) = statistics.median(ratios), interval(ratios)
            entry: dict[str, Any] = {"seconds_per_epoch": seconds, "ratio": {"median": median, "interval": [low, high]}}
            spread = f"[{low:.3f}, {high:.3f}] ({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"{workload:12} {number} processes: {median:.3f} {spread}")
            if number > 1:
                entry["bytes_sent_per_step"] = run_on_processes(
                    number, parity_cost.bytes_sent_here, workload, environment=cpu
                )
                ring = 2 * (number - 1) / number
                for rank, sent in enumerate(entry["bytes_sent_per_step"]):
                    total = sent["all_to_all_single"] + sent["all_gather"]
                    share = f"{total / sent['gradients']:.2f} x the gradients; a ring all-reduce {ring:.2f} x"
                    print(f"  process {rank} sends {total:,.0f} bytes a step, {share}")
            results[f"{workload}, {number} processes"] = entry
    if options.write:
        write_results("parity_cost.json", results)


if __name__ == "__main__":
    main()
