"""What the benchmarks share: the interval of a median, and the file with samples, versions and hardware."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def in_turns(readers: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Call each with the number of the round (1-based), in changing order; return what each has measured."""
    found: dict[str, list[float]] = {name: [] for name in readers}
    order = list(readers)
    for number in range(1, rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            found[name].append(readers[name](number))
    return found


def rates_to(base: str, rates: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Print and return the median ratio of each rate, samples per second, to one of them within the rounds."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in rates.items():
        ratios = [one / other for one, other in zip(own, rates[base], strict=True)]
        median, (low, high) = statistics.median(ratios), interval(ratios)
        found[name] = {"ratio": median, "interval": [low, high]}
        spread = f"[{low:.2f}, {high:.2f}] ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {name:36} {median:.2f} {spread}, {statistics.median(own):,.0f} samples per second")
    return found


def peak_memory() -> float:
    """Return the peak memory of this process in MiB; `ru_maxrss` would start from its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) / 1024


def where_measured(*distributions: str) -> dict[str, Any]:
    """Return the versions, those of more distributions too, and the machine."""
    import torch

    names = ("torch", "accelerate", "accel_trainer", *distributions)
    machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        machine["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"versions": {name: version(name) for name in names}, "machine": machine}


def write_results(name: str, results: dict[str, Any]) -> None:
    """Keep results in `benchmarks/results/`, with the versions and the machine they were measured with."""
    path = Path(__file__).parent / "results" / name
    path.write_text(json.dumps({**where_measured(), "results": results}, indent=1) + "\n")
