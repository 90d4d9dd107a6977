"""What importing costs, and how soon the command line answers: seconds of fresh processes, interleaved.

    python benchmarks/startup.py --write

`import accelerate`, which brings torch, is the measure; everything else is timed from the start of the process to its
end. Start-up to the first step of a training, beside other trainers, is in peers.py.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from common import interval, write_results

ACCELERATE = "import accelerate"
COMMANDS = {
    ACCELERATE: ["-c", "import accelerate"],
    "import accel_trainer": ["-c", "import accel_trainer"],
    "from accel_trainer import Trainer": ["-c", "from accel_trainer import Trainer"],
    "python -m accel_trainer --help": ["-m", "accel_trainer", "--help"],
    "a wrong argument": ["-m", "accel_trainer", "parity", "--processes", "none"],
    "a wrong module": ["-m", "accel_trainer", "parity", "no_such_module:make_run"],
}


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="keep the samples in benchmarks/results/startup.json")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    order = list(COMMANDS)
    for number in range(-1, options.rounds):
        random.Random(number).shuffle(order)
        for name in order:
            taken = seconds_of(COMMANDS[name])
            if number >= 0:  # the first round fills the disk's cache
                seconds[name].append(taken)
    results: dict[str, Any] = {}
    for name, samples in seconds.items():
        ratios = [one / other for one, other in zip(samples, seconds[ACCELERATE], strict=True)]
        median, (low, high) = statistics.median(ratios), interval(ratios)
        results[name] = {"seconds": samples, "ratio": median, "interval": [low, high]}
        print(
            f"{name:36} {statistics.median(samples):.3f} s ({min(samples):.3f} to {max(samples):.3f}), "
            f"{median:.3f} [{low:.3f}, {high:.3f}] of {ACCELERATE}"
        )
    if options.write:
        write_results("startup.json", results)


if __name__ == "__main__":
    main()
