"""What a checkpoint costs: how long the training stands still, how long a position takes, what memory a resume takes.

python benchmarks/checkpoint.py --write

A model of 100 million parameters is trained with AdamW on the CPU. Each save is followed by a plain
`safetensors.torch.save_file` and fsync of the same tensors, in the same process and on the same disk. The same model
is then resumed on two processes of this host, whose memory is read fifty times a second: pages of files that several
processes map count in parts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before processes are forked
from accelerate import debug_launcher
from common import interval, write_results
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import Callback, TrainConfig, Trainer
from accel_trainer.data.cut import Layout
from accel_trainer.data.micro_batches import MicroBatchLoader
from accel_trainer.storage.saver import Saver

STEPS_BETWEEN = 8


def make_large_model(width: int) -> nn.Sequential:
    """Return four linear layers and their activations."""
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())))


class Compare(Callback):
    """After each checkpoint has been written, write the same bytes plainly."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "plain.safetensors"
        self.plain: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        """Write plainly, shortly before the next checkpoint."""
        if trainer.state.step % STEPS_BETWEEN == STEPS_BETWEEN - 1 and trainer.state.step > STEPS_BETWEEN:
            while any(self.path.parent.glob("run/checkpoints/.*.part")):
                time.sleep(0.1)  # one disk, one writer
            tensors = {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()}
            for number, state in enumerate(trainer.optimizer.state.values()):
                tensors |= {f"{number}.{key}": value for key, value in state.items()}
            os.sync()
            started = time.perf_counter()
            save_file(tensors, self.path)
            descriptor = os.open(self.path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            self.plain.append(time.perf_counter() - started)
            self.path.unlink()


def measure_saves(num_saves: int, width: int) -> dict[str, Any]:
    """Return the seconds that each save held the training up, and those of a plain write."""
    model = make_large_model(width)
    stood: list[float] = []
    save = Saver.save

    def timed(self: Saver, training: Any) -> None:
        started = time.perf_counter()
        save(self, training)
        stood.append(time.perf_counter() - started)

    Saver.save = timed  # type: ignore[method-assign]
    data = TensorDataset(torch.randn(64, width), torch.randn(64, width))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
        compare = Compare(Path(folder))
        config = TrainConfig(
            num_epochs=1000,
            max_steps=STEPS_BETWEEN * num_saves + STEPS_BETWEEN - 1,
            checkpoint_every=STEPS_BETWEEN,
            keep_checkpoints=1,
            run_dir=Path(folder, "run"),
            restore_best=False,
            steps_per_epoch=10**6,
            verbose=False,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[compare], config=config)
        trainer.fit(DataLoader(data, 4, shuffle=True))
    Saver.save = save  # type: ignore[method-assign]
    ratios = [one / other for one, other in zip(stood[1:num_saves], compare.plain[1:], strict=True)]
    low, high = interval(ratios)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds_of_first_save": stood[0],
        "seconds_of_saves": stood[1:num_saves],
        "seconds_of_plain_writes": compare.plain,
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "largest_ratio": max(ratios),
    }


def peak_memory(width: int, folder: Path, max_steps: int) -> dict[str, int]:
    """Train one of two processes up to a step; return the most bytes of its own and of its share of mapped files."""
    peaks, is_over = {"Pss": 0, "Anonymous": 0}, threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            rows = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
            for name in peaks:
                peaks[name] = max(peaks[name], int(rows[name].split()[0]) * 1024)

    model = make_large_model(width)
    data = TensorDataset(torch.randn(64, width), torch.randn(64, width))
    kept = {"run_dir": folder / "run", "resume": "auto", "keep_checkpoints": 1}
    config = TrainConfig(max_steps=max_steps, restore_best=False, verbose=False, **kept)  # type: ignore[arg-type]
    thread = threading.Thread(target=watch)
    thread.start()
    trainer = Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-5), nn.MSELoss(), config=config)
    trainer.fit(DataLoader(data, 4, shuffle=True))
    is_over.set()
    thread.join()
    (folder / f"{torch.distributed.get_rank()} at {max_steps}").write_text(json.dumps(peaks))
    return peaks


def measure_memory(width: int) -> dict[str, Any]:
    """Return the peak memory of each of two processes, from the start and resumed."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as name:
        folder = Path(name)
        for max_steps in (3, 6):
            debug_launcher(peak_memory, (width, folder, max_steps), 2)
        peaks = {
            kind: [json.loads((folder / f"{rank} at {max_steps}").read_text()) for rank in range(2)]
            for kind, max_steps in (("from_the_start", 3), ("resumed", 6))
        }
        size = sum(path.stat().st_size for path in folder.glob("run/checkpoints/*/*.safetensors"))
    return {"checkpoint_bytes": size, "peak_bytes": peaks}


def measure_positions(num_samples: int, rounds: int) -> dict[str, Any]:
    """Return the seconds to the first micro-batch from the start, the middle and the end of a shuffled pass."""
    data = TensorDataset(torch.zeros(num_samples, 1, dtype=torch.uint8))
    feed = MicroBatchLoader(DataLoader(data, 32, shuffle=True), Layout(0, 1, 1), seed=0)
    places = {"start": 0, "middle": num_samples // 64, "end": num_samples // 32 - 1}
    seconds: dict[str, list[float]] = {name: [] for name in places}
    for _ in range(rounds):
        for name, place in places.items():
            started = time.perf_counter()
            next(feed.micro_batches(1, place))
            seconds[name].append(time.perf_counter() - started)
    return {"samples": num_samples, "batch_size": 32, "seconds": seconds} | {
        f"ratio_of_{name}": statistics.median(
            one / other for one, other in zip(seconds[name], seconds["start"], strict=True)
        )
        for name in ("middle", "end")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--saves", type=int, default=7, help="checkpoints (default: 7)")
    parser.add_argument(
        "--width", type=int, default=5000, help="of four linear layers (default: 5000: 100 M parameters)"
    )
    parser.add_argument("--write", action="store_true", help="write results/checkpoint.json")
    options = parser.parse_args()
    memory = measure_memory(options.width)  # first: threads of this process do not live on in forks
    print(f"checkpoint of {memory['checkpoint_bytes'] / 2**30:.2f} GiB; peak of each process: {memory['peak_bytes']}")
    positions = measure_positions(10**7, 7)
    print(f"to the first micro-batch, of the start: {positions['ratio_of_middle']:.2f} in the middle, "
          f"{positions['ratio_of_end']:.2f} at the end")  # fmt: skip
    saves = measure_saves(options.saves, options.width)
    low, high = saves["interval"]
    print(f"{saves['parameters']:,} parameters: the training stands still for {saves['ratio']:.3f} ")
    print(f"[{low:.3f}, {high:.3f}] of a plain write; the first save takes {saves['seconds_of_first_save']:.2f} s")
    if options.write:
        write_results("checkpoint.json", {"saves": saves, "positions": positions, "memory": memory})


if __name__ == "__main__":
    main()
