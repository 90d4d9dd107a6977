"""Seconds per epoch of the trainer beside the loop its user would write: one process, one thread, interleaved rounds.

    python benchmarks/overhead.py --rounds 15 --write

Contenders: a hand-written torch loop with a `DataLoader`; the same loop slicing whole batches from tensors, the limit;
the bare Accelerate loop; ours. Each trains the same model on the same data from the same weights for the same number of
epochs, with the loss summed on the device and read once per epoch, and each is timed over whole epochs after an
untimed warm-up epoch. Rounds interleave the contenders in changing order, so drift of a shared machine falls on all;
what is compared is the ratio to the hand-written loop of the same round. Peak memory is that of a fresh process each.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import interval, peak_memory, write_results
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

Epochs = Callable[[int], float]
HAND, LIMIT, BARE, OURS = "hand-written loop", "whole-batch slices", "bare Accelerate", "accel_trainer"


def tiny_data() -> Any:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(16_384, 64, generator=generator), torch.randint(0, 10, (16_384,), generator=generator)
    )


def digits_data() -> Any:
    import datasets
    from sklearn.datasets import load_digits

    digits = load_digits()
    columns = {"pixels": (digits.data / 16).astype("float32"), "label": digits.target}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def make(workload: str) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any], nn.Module]:
    data = tiny_data() if workload == "tiny" else digits_data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, DataLoader(data, batch_size=32, shuffle=True), nn.CrossEntropyLoss()


def pair(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return (batch["pixels"], batch["label"]) if isinstance(batch, dict) else batch


def hand_written(workload: str) -> Epochs:
    model, optimizer, loader, loss_fn = make(workload)

    def epoch() -> float:
        model.train()
        total = torch.zeros(())
        for batch in loader:
            inputs, targets = pair(batch)
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(targets)
        return float(total) / len(loader.dataset)

    return lambda num_epochs: [epoch() for _ in range(num_epochs)][-1]


def whole_slices(workload: str) -> Epochs:
    model, optimizer, loader, loss_fn = make(workload)
    whole = loader.dataset
    inputs, targets = whole.tensors if workload == "tiny" else (whole["pixels"][:], whole["label"][:])

    def epoch() -> float:
        model.train()
        total = torch.zeros(())
        for indices in torch.randperm(len(targets)).split(32):
            optimizer.zero_grad()
            loss = loss_fn(model(inputs[indices]), targets[indices])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(indices)
        return float(total) / len(targets)

    return lambda num_epochs: [epoch() for _ in range(num_epochs)][-1]


def bare_accelerate(workload: str) -> Epochs:
    from accelerate import Accelerator

    plain, plain_optimizer, plain_loader, loss_fn = make(workload)
    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(plain, plain_optimizer, plain_loader)

    def epoch() -> float:
        model.train()
        total = torch.zeros(())
        for batch in loader:
            inputs, targets = pair(batch)
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            total += loss.detach() * len(targets)
        return float(total) / len(plain_loader.dataset)

    return lambda num_epochs: [epoch() for _ in range(num_epochs)][-1]


def ours(workload: str) -> Epochs:
    """The whole of `fit`, its start and its end included."""
    from accel_trainer import TrainConfig, Trainer

    model, optimizer, loader, loss_fn = make(workload)

    def run(num_epochs: int) -> float:
        config = TrainConfig(num_epochs=num_epochs, verbose=False)
        return Trainer(model, optimizer, loss_fn, config=config).fit(loader).train_losses[-1]

    return run


CONTENDERS = {HAND: hand_written, LIMIT: whole_slices, BARE: bare_accelerate, OURS: ours}


def measure(workload: str, rounds: int, epochs: int) -> dict[str, list[float]]:
    """Return seconds per epoch of each contender, one number a round."""
    runs = {name: build(workload) for name, build in CONTENDERS.items()}
    for run in runs.values():
        run(1)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            runs[name](epochs)
            seconds[name].append((time.perf_counter() - started) / epochs)
    return seconds


def peak_memories(workload: str) -> dict[str, float]:
    """Return the peak memory in MiB of a fresh process that runs three epochs, by contender."""
    peaks = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--workload", workload, "--memory-of", name]
        peaks[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="keep the samples in benchmarks/results/overhead.json")
    parser.add_argument("--workload", choices=["tiny", "digits"])
    parser.add_argument("--memory-of", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.memory_of:
        run = CONTENDERS[options.memory_of](options.workload)
        run(3)
        print(peak_memory())
        return

    results: dict[str, Any] = {}
    for workload in [options.workload] if options.workload else ["tiny", "digits"]:
        seconds = measure(workload, options.rounds, epochs=3 if workload == "tiny" else 12)
        memory = peak_memories(workload)
        results[workload] = {"seconds_per_epoch": seconds, "peak_memory_mib": memory, "ratios": {}}
        print(f"\n{workload}: ratio to the {HAND}, median of {options.rounds} rounds [95 % interval] (range)")
        for name in CONTENDERS:
            ratios = [one / hand for one, hand in zip(seconds[name], seconds[HAND], strict=True)]
            low, high = interval(ratios)
            median = statistics.median(ratios)
            results[workload]["ratios"][name] = {"median": median, "interval": [low, high]}
            print(
                f"  {name:20} {median:.3f} [{low:.3f}, {high:.3f}] ({min(ratios):.3f} to {max(ratios):.3f})"
                f"   peak memory {memory[name]:.0f} MiB = {memory[name] / memory[HAND]:.3f}"
            )
    if options.write:
        write_results("overhead.json", results)


if __name__ == "__main__":
    main()
