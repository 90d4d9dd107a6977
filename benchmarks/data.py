"""Samples per second from a `datasets.Dataset` of numbers: a plain `DataLoader` over it, and what trains here.

    python benchmarks/data.py --write

60,000 images of 28 x 28 numbers and their labels, in a file that is memory-mapped, are read in shuffled batches of 64;
nothing is trained. Ours reads them once as it does where they fit in memory, and once as where they do not. The three
take turns in one process, in changing order; what is compared is the ratio within a round. Making the tensors, once for
all epochs, is timed apart and in no round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy
import torch
from common import in_turns, rates_to, write_results
from torch.utils.data import DataLoader

from accel_trainer.data.cut import Layout
from accel_trainer.data.micro_batches import MicroBatchLoader
from accel_trainer.devices.hardware import Hardware
from accel_trainer.devices.memory import keep_data

PLAIN, KEPT, READ = "plain DataLoader", "accel_trainer, kept in memory", "accel_trainer, not kept in memory"


def on_disk(folder: str, num_rows: int) -> datasets.Dataset:
    rng = numpy.random.default_rng(0)
    columns = {"image": rng.random((num_rows, 784), dtype=numpy.float32), "label": rng.integers(0, 10, num_rows)}
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return datasets.load_from_disk(folder).with_format("torch")


def ours(loader: DataLoader[Any], keep: bool) -> Callable[[int], Iterable[Any]]:
    feed = MicroBatchLoader(loader, Layout(0, 1, 1), seed=0)
    keep_data(feed, Hardware(), keep, "train_loader")
    return lambda number: (micro_batch.data for micro_batch in feed.micro_batches(number))


def rate(batches: Iterable[dict[str, torch.Tensor]]) -> float:
    started, num_samples = time.perf_counter(), 0
    for batch in batches:
        num_samples += len(batch["label"])
    return num_samples / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="keep the samples in benchmarks/results/data.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        loader = DataLoader(on_disk(folder, options.rows), batch_size=64, shuffle=True)
        started = time.perf_counter()
        kept = ours(loader, keep=True)
        seconds_to_keep = time.perf_counter() - started
        readers = {PLAIN: lambda number: loader, KEPT: kept, READ: ours(loader, keep=False)}
        timed = {name: lambda number, read=read: rate(read(number)) for name, read in readers.items()}
        rates = in_turns(timed, options.rounds)  # type: ignore[arg-type]
    results: dict[str, Any] = {"rows": options.rows, "seconds_to_keep": seconds_to_keep, "samples_per_second": rates}
    print(f"Kept in memory after {seconds_to_keep:.2f} s. Ratio to the {PLAIN}, median [95 % interval] (range):")
    ratios = rates_to(PLAIN, rates)
    results |= {name: ratios[name] for name in (KEPT, READ)}
    if options.write:
        write_results("data.json", results)


if __name__ == "__main__":
    main()
