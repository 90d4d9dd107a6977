"""Samples per second from a stream of Parquet files: `datasets` alone, a `DataLoader` of it, and ours by shards.

    python benchmarks/streams.py --write

A million samples (16 numbers, a label and an index) in 64 files are read in batches of 64 in torch format; nothing is
trained. `datasets` alone is asked for whole batches (`iter(batch_size=64)`), which is the fastest that it does; a
`DataLoader` asks it for rows, of which it is given fewer, since it takes longer. Ours reads each batch in 1, 4 and 8
micro-batches from as many groups of shards. All take turns in one process, in changing order; what is compared is the
ratio within a round.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import torch
from common import in_turns, rates_to, write_results
from torch.utils.data import DataLoader

from accel_trainer.data.cut import Layout
from accel_trainer.data.micro_batches import MicroBatchLoader

NUM_FILES, BATCH_SIZE = 64, 64
ALONE, PLAIN = "datasets alone", "plain DataLoader"


def write_files(folder: Path, num_samples: int) -> None:
    rng, size = numpy.random.default_rng(0), num_samples // NUM_FILES
    for number in range(NUM_FILES):
        inputs = pyarrow.FixedSizeListArray.from_arrays(rng.random(size * 16, dtype=numpy.float32), 16)
        columns = {"index": numpy.arange(size) + number * size, "inputs": inputs, "target": rng.integers(0, 10, size)}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{number:02}.parquet")


def stream_of(folder: Path) -> datasets.IterableDataset:
    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    cache = str(folder / "cache")
    found = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=cache)
    return found.with_format("torch")


def ours(folder: Path, num_micro_batches: int) -> Iterator[int]:
    loader = DataLoader(stream_of(folder), BATCH_SIZE)
    feed = MicroBatchLoader(loader, Layout(0, 1, num_micro_batches), seed=0, by_shards=True)
    return (micro_batch.num_samples for micro_batch in feed.micro_batches(1))


def rate(sizes: Iterator[int]) -> float:
    started = time.perf_counter()
    return sum(sizes) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the samples in benchmarks/results/streams.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, options.samples)

        def plain(number: int) -> float:
            few = options.samples // BATCH_SIZE // 20
            return rate(
                len(batch["index"]) for batch in itertools.islice(DataLoader(stream_of(folder), BATCH_SIZE), few)
            )

        def alone(number: int) -> float:
            return rate(len(batch["index"]) for batch in stream_of(folder).iter(batch_size=BATCH_SIZE))

        readers: dict[str, Callable[[int], float]] = {ALONE: alone, PLAIN: plain}
        for groups in (1, 4, 8):
            told = f"accel_trainer, {groups} group{'s' if groups > 1 else ''} of shards"
            readers[told] = lambda number, groups=groups: rate(ours(folder, groups))  # type: ignore[misc]
        rates = in_turns(readers, options.rounds)
    print(f"Ratio to {ALONE}, median [95 % interval] (range):")
    results = {"samples": options.samples, "files": NUM_FILES, "samples_per_second": rates}
    results |= {"ratios": rates_to(ALONE, rates)}
    if options.write:
        write_results("streams.json", results)


if __name__ == "__main__":
    main()
