"""What the benchmarks share: the interval of a median, and the file with samples, versions and hardware."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


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
