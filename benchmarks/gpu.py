"""What a GPU machine is asked, in two halves: is all of it right there (4 minutes), and how fast is it (7 minutes).

    python benchmarks/gpu.py first
    python benchmarks/gpu.py second
    python benchmarks/gpu.py first second --small       # on a CPU, in two minutes: every part runs to its end
    python benchmarks/gpu.py bits memory                # single parts, of gpu_parts.py
    python benchmarks/table.py                          # writes the tables of benchmarks/README.md

Every part is a process of its own with a limit, forked from one that has imported what all need and has not touched
the GPU. What a part finds are lines of JSON in `results/gpu/`; what it prints is in the text file beside them. Most
parts of the first half share the GPU; those that measure memory or time have it alone. Ends with 1 if something is not
right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDERS = [str(folder) for folder in (ROOT, ROOT / "benchmarks", ROOT / "tests")]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])  # of what the parts start
os.environ.setdefault("OMP_NUM_THREADS", "4")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask whether there is a GPU touches it otherwise

import gpu_parts  # noqa: E402
import torch  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
OUT_OF_MEMORY = "devices/test_memory.py::test_a_real_device_runs_out_of_memory"
# Warnings are no errors here: they are those of another version of torch and Python.
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-rA")
TESTS = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
PARITY = "parity", "--processes", "1", "2", "--format", "json"


@dataclass(frozen=True)
class Part:
    """Something to find out, and the seconds that it may take."""

    name: str
    limit: float
    command: tuple[str, ...] = ()  # in place of the function of that name in gpu_parts.py
    may_lack: bool = False  # of time

    def __call__(self, results: Path, small: bool) -> None:
        """Run it in this process."""
        if self.command:
            done = subprocess.run(self.command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            print(done.stdout)
            is_right = done.returncode == 0 or (small and done.returncode == 5)  # no test for a CPU
            last = [line for line in done.stdout.splitlines() if line.strip()][-1:]
            tell(results, {"part": self.name, "name": "passes", "right": is_right, "found": last})
            return
        function, _, argument = self.name.partition(" ")
        finder = gpu_parts.Finder(lambda found: tell(results, {"part": self.name, **found}), small)
        getattr(gpu_parts, function)(finder, *([argument] if argument else []))


# Each list of the first half at the same time, the parts of the second one after the other.
FIRST = [
    [
        Part("machine", 60),
        Part("batches", 120),
        Part("fp16", 120),
        Part("second_fit", 120),
        Part("bits", 150),
        Part("after_product", 60),
        Part("waits", 150),
        Part("two_processes", 120),
        Part("divided", 150),
        Part("graphs", 150),
        Part("tests", 150, (*PYTEST, "--deselect", f"tests/{OUT_OF_MEMORY}", *TESTS)),
        Part("parity", 150, (sys.executable, "-m", "accel_trainer", *PARITY)),
    ],
    [Part("memory", 60)],
    [Part("memory_test", 40, (*PYTEST, str(ROOT / "tests" / OUT_OF_MEMORY)))],
]
SECOND = [
    [Part("gpt2", 230)],
    [Part("resnet", 70)],
    [Part("save", 40)],
    [Part("peer transformers", 90, may_lack=True)],
    [Part("peer lightning", 80, may_lack=True)],
]
HALVES = {"first": (FIRST, 240.0), "second": (SECOND, 420.0)}  # and the seconds that each may take


def tell(results: Path, found: dict[str, Any]) -> None:
    line = json.dumps(found, default=str)
    print(line, flush=True)
    with results.open("a") as file:
        file.write(line + "\n")


def run_part(part: Part, results: Path, output: Path, small: bool) -> None:
    """Run a part in a process of its own, with a group of its own, whose output goes to a file."""
    os.setsid()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            part(results, small)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


def run_together(parts: list[Part], results: Path, log: Path, small: bool, seconds: float) -> None:
    """Run parts at the same time, each within its limit, and all within so many seconds."""
    context, running = get_context("fork"), []
    for part in parts:
        output = Path(tempfile.mkstemp(suffix=".txt")[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which wait for nothing
            process = context.Process(target=run_part, args=(part, results, output, small))
            process.start()
        running.append((part, time.monotonic(), output, process))
    for part, began, output, process in running:
        process.join(max(1.0, min(part.limit, seconds) - (time.monotonic() - began)))
        with contextlib.suppress(ProcessLookupError):  # it, if it takes too long, and what it has left running
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        text, spent = output.read_text(errors="replace"), round(time.monotonic() - began, 1)
        output.unlink()
        with log.open("a") as file:
            file.write(f"\n===== {part.name}: {process.exitcode}, {spent} s\n{text[-60_000:]}")
        ended = process.exitcode == 0
        is_right = None if part.may_lack and not ended else ended
        tell(results, {"part": part.name, "name": "comes to its end", "right": is_right, "seconds": spent})
        if not ended:
            print(text[-2000:], flush=True)


def run_half(name: str, phases: list[list[Part]], seconds: float, folder: Path, small: bool) -> bool:
    """Run the parts of a half, and return whether all that has a right answer was answered so."""
    folder.mkdir(parents=True, exist_ok=True)
    results, log = folder / f"{name}.jsonl", folder / f"{name}.txt"
    results.write_text("")
    log.write_text("")
    began = time.monotonic()
    for phase in phases:
        left = seconds - (time.monotonic() - began)
        if small:  # on few cores, where together they would take no less
            for start in range(0, len(phase), 2):
                run_together(phase[start : start + 2], results, log, small, seconds)
        elif left > 20:
            run_together(phase, results, log, small, left)
        else:
            is_right = None if phase[0].may_lack else False
            tell(results, {"part": name, "name": f"time is left for {phase[0].name}", "right": is_right})
    found = [json.loads(line) for line in results.read_text().splitlines()]
    wrong = [one for one in found if one.get("right") is False]
    print(f"{name}: {time.monotonic() - began:.0f} s, {len(found)} findings, {len(wrong)} of them wrong", flush=True)
    for one in wrong:
        print(f"  WRONG {json.dumps(one)}", flush=True)
    return not wrong


def main() -> int:
    single = {part.name: part for phase in (*FIRST, *SECOND) for part in phase}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", help=f"first, second, or parts: {', '.join(single)}")
    parser.add_argument("--small", action="store_true", help="shrink everything; also on a CPU. Measures nothing")
    parser.add_argument("--results", type=Path, help="folder (default: benchmarks/results/gpu, temporary if small)")
    options = parser.parse_args()
    unknown = [name for name in options.what if name not in (*HALVES, *single)]
    if unknown:
        parser.error(f"there is no {unknown[0]}; choose from first, second, {', '.join(single)}.")
    if not (options.small or torch.cuda.is_available()):
        parser.error("there is no GPU; --small tries everything without one.")
    folder = options.results or (Path(tempfile.mkdtemp()) if options.small else RESULTS)
    if options.small:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    runs = [(name, *HALVES[name]) for name in options.what if name in HALVES]
    chosen = [[single[name]] for name in options.what if name in single]
    runs += [("parts", chosen, math.inf)] if chosen else []
    return 0 if all([run_half(*run, folder, options.small) for run in runs]) else 1


if __name__ == "__main__":
    sys.exit(main())
