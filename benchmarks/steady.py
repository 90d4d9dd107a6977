"""Does a step cost more after 100,000 others? Time per step and resident memory over a long run.

    python benchmarks/steady.py --write

Runs of 100,000 steps of a small network, several of each kind in turn: one long epoch; 1,000 epochs of 100 steps with
an evaluation each; the same with a run folder, whose history grows. Compared are the last tenth of the steps and the
first: the median over the rounds, since a shared machine drifts within one.
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


def measure(num_steps: int, choices: dict[str, Any]) -> dict[str, Any]:
    """Return the samples of one run, and how much a step of its last tenth takes longer than one of its first."""
    watch = run(num_steps, **choices)
    tenth = len(watch.microseconds) // 10
    first, last = (statistics.median(part) for part in (watch.microseconds[:tenth], watch.microseconds[-tenth:]))
    return {
        "microseconds_per_step": [round(one, 2) for one in watch.microseconds],
        "first_tenth": first,
        "last_to_first": last / first,
        "grown_mebibytes": watch.mebibytes[-1] - watch.mebibytes[tenth - 1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="of each run, a multiple of 100")
    parser.add_argument("--rounds", type=int, default=7, help="each with one run of every kind")
    parser.add_argument("--write", action="store_true", help="keep the samples in benchmarks/results/steady.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run(1_000)
    rounds: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
            kinds: dict[str, dict[str, Any]] = {
                "one epoch": {"steps_per_epoch": options.steps},
                "epochs of 100 steps": {},
                "epochs of 100 steps, a run folder": {"run_dir": Path(folder, "run")},
            }
            for name, choices in kinds.items():
                rounds.setdefault(name, []).append(measure(options.steps, choices))
    results: dict[str, Any] = {}
    for name, samples in rounds.items():
        ratios = [one["last_to_first"] for one in samples]
        low, high = interval(ratios)
        summary = {"median": statistics.median(ratios), "interval": [low, high]}
        results[name] = {"rounds": samples, "last_tenth_to_first": summary}
        first = statistics.median(one["first_tenth"] for one in samples)
        grown = statistics.median(one["grown_mebibytes"] for one in samples)
        print(
            f"{name:34} {first:6.1f} us a step at first, at last {summary['median']:.3f} [{low:.3f}, {high:.3f}] of "
            f"that ({min(ratios):.3f} to {max(ratios):.3f}); {grown:+.1f} MiB"
        )
    if options.write:
        write_results("steady.json", results)


if __name__ == "__main__":
    main()
