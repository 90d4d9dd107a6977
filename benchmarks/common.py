"""What the benchmarks share: the interval of a median, and the file with samples, versions and hardware."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
from pathlib import Path
from typing import Any


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[1949]


def write_results(name: str, results: dict[str, Any]) -> None:
    """Keep results in `benchmarks/results/`, with the versions and the machine they were measured with."""
    import accelerate
    import torch

    import accel_trainer

    versions = {module.__name__: module.__version__ for module in (torch, accelerate, accel_trainer)}
    machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        machine["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    path = Path(__file__).parent / "results" / name
    path.write_text(json.dumps({"versions": versions, "machine": machine, "results": results}, indent=1) + "\n")
