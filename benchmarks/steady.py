"""Does a step cost more after 100,000 others? Time per step and resident memory over a long run.

    python benchmarks/steady.py --write

Three runs of 100,000 steps of a small network: one long epoch; 1,000 epochs of 100 steps with an evaluation each; the
same with a run folder, whose history grows. Compared are the last tenth of the steps and the first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from common import interval, write_results
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import Callback, TrainConfig, Trainer


class Watch(Callback):
    """Note the time and the resident memory now and then."""

    def __init__(self, every: int) -> None:
        self.every, self.clock, self.mebibytes = every, [time.perf_counter()], []
        self.process = psutil.Process()

    def on_step_end(self, trainer: Trainer) -> None:
        """Read both after so many steps."""
        if trainer.state.step % self.every == 0:
            self.clock.append(time.perf_counter())
            self.mebibytes.append(self.process.memory_info().rss / 2**20)

    @property
    def microseconds(self) -> list[float]:
        """Those of a step, over the steps between two looks."""
        return [1e6 * (later - sooner) / self.every for sooner, later in zip(self.clock, self.clock[1:], strict=False)]


def run(num_steps: int, **choices: Any) -> Watch:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(3_200, 64, generator=generator), torch.randint(0, 10, (3_200,)))
    loader, test_loader = DataLoader(data, 32, shuffle=True), DataLoader(data, 320)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = Watch(every=num_steps // 100)
    config = TrainConfig(num_epochs=10**6, max_steps=num_steps, verbose=False, **choices)
    Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[watch], config=config).fit(loader, test_loader)
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="of each run, a multiple of 100")
    parser.add_argument("--write", action="store_true", help="keep the samples in benchmarks/results/steady.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run(1_000)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
        runs: dict[str, dict[str, Any]] = {
            "one epoch": {"steps_per_epoch": options.steps},
            "epochs of 100 steps": {},
            "epochs of 100 steps, a run folder": {"run_dir": Path(folder, "run")},
        }
        for name, choices in runs.items():
            watch = run(options.steps, **choices)
            tenth = len(watch.microseconds) // 10
            first, last = watch.microseconds[:tenth], watch.microseconds[-tenth:]
            ratios = [one / statistics.median(first) for one in last]
            low, high = interval(ratios)
            grown = watch.mebibytes[-1] - watch.mebibytes[tenth - 1]
            results[name] = {
                "microseconds_per_step": watch.microseconds,
                "resident_mebibytes": watch.mebibytes,
                "last_tenth_to_first": {"median": statistics.median(ratios), "interval": [low, high]},
            }
            print(
                f"{name:34} {statistics.median(first):6.1f} us a step at first ({min(first):.1f} to {max(first):.1f}), "
                f"at last {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}] of that; {grown:+.1f} MiB"
            )
    if options.write:
        write_results("steady.json", results)


if __name__ == "__main__":
    main()
