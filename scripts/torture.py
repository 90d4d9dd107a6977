"""Kill a run a hundred times, go on from what it left each time, and compare with the run that was left alone.

python scripts/torture.py --kills 100 --write

SIGKILL, SIGTERM and SIGINT come at random instants - in steps, evaluations, saves and renames - to one process or all.
Each time the run goes on with 1 to 4 processes and another num_micro_batches (a fixed one with bitwise, half of the
runs), in half of its lives with a model that is divided over them, also in two replicas; in a tenth of the cases its
newest checkpoint is damaged first. Exit code 0: nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import History, ProcessFailedError, TrainConfig, Trainer
from accel_trainer.base.dtensors import whole
from accel_trainer.devices.environment import describe_environment
from accel_trainer.storage.checkpoints import fault_of, steps_in
from accel_trainer.tools.launching import run_on_processes

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "torture.json"
BATCH_SIZE = 60


TWO_REPLICAS = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


def train(
    run_dir: str,
    log: str,
    bitwise: bool,
    num_epochs: int,
    num_micro_batches: int | None,
    kill_at: int,
    sharding: str | None = None,
) -> bool:
    """Go on with the run, or begin it, in one of its processes; return whether it came to its end."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
    rank = int(os.environ.get("RANK", "0"))
    Path(f"{log}.{rank}.pid").write_text(str(os.getpid()))
    if rank == 0 and kill_at:
        kill_at_write(kill_at)
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data / 16), torch.tensor(digits.target)  # float64
    data = TensorDataset(inputs[:1400], targets[:1400], torch.arange(1400))
    test = TensorDataset(inputs[1400:], targets[1400:], torch.arange(len(inputs) - 1400))
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(96), nn.Dropout(0.2)] if bitwise else []
    model = nn.Sequential(nn.Linear(64, 96), *layers, nn.Tanh(), nn.Linear(96, 10)).double()
    seen = open(f"{log}.{rank}", "a", buffering=1)

    def compute_loss(model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets, samples = batch
        if torch.is_grad_enabled():
            seen.write(json.dumps([trainer.state.num_batches, samples.tolist()]) + "\n")
        return nn.functional.cross_entropy(model(inputs), targets)

    config = TrainConfig(
        num_epochs=num_epochs,
        run_dir=run_dir,
        resume="auto",
        checkpoint_every=40,
        keep_checkpoints=3,
        num_micro_batches=4 if bitwise else num_micro_batches,
        bitwise=bitwise,
        sharding=sharding,
        restore_best=False,
        verbose=False,
    )
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        compute_loss=compute_loss,
        scheduler=lambda optimizer, num_steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps),
        config=config,
    )
    history = trainer.fit(DataLoader(data, BATCH_SIZE, shuffle=True), DataLoader(test, 100))
    finished = history.num_epochs == num_epochs
    torch_free = {name: whole(tensor).tolist() for name, tensor in model.state_dict().items()}
    if finished and trainer.is_main_process:
        Path(f"{log}.weights").write_text(json.dumps(torch_free))
    return finished


def kill_at_write(number: int) -> None:
    """Let this process kill itself just before its n-th flush or rename."""
    count = iter(range(1, 10**9))

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "replace", "link"):
        setattr(os, name, counted(getattr(os, name)))


# --- one life ---------------------------------------------------------------------------------------------------------


class Life:
    """A start of the run, and its end."""

    def __init__(self, run_dir: Path, log: Path, bitwise: bool, num_epochs: int) -> None:
        self.run_dir, self.log, self.bitwise, self.num_epochs = run_dir, log, bitwise, num_epochs

    def live(self, dice: random.Random, kind: str) -> str:
        """Start it and end it in this way; return how it ended: finished, interrupted, killed, terminated."""
        self.num_processes, environment = dice.randint(1, 4), {}
        sharding = dice.choice([None, "full"]) if self.num_processes > 1 else None
        if sharding is not None and self.num_processes == 4 and dice.random() < 0.5:
            sharding, environment = "hybrid", TWO_REPLICAS
        self.layout = f"{'2x2' if environment else self.num_processes}{'' if sharding is None else ' divided'}"
        cuts = [*([None] if sharding is None else []), *range(self.num_processes, 9)]
        arguments = (str(self.run_dir), str(self.log), self.bitwise, self.num_epochs, dice.choice(cuts))
        kill_at = dice.randint(1, 120) if kind == "SIGKILL in a write" else 0
        outcome: list[Any] = []

        def run() -> None:
            try:
                how = {"environment": environment, "timeout": 1800}
                outcome.extend(run_on_processes(self.num_processes, train, *arguments, kill_at, sharding, **how))
            except ProcessFailedError as error:
                outcome.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        deadline = time.monotonic() + 60
        pids = [Path(f"{self.log}.{rank}.pid") for rank in range(self.num_processes)]
        while not all(path.exists() for path in pids) and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        if kind in ("SIGKILL", "SIGTERM", "SIGINT"):
            thread.join(dice.uniform(0.05, 3.0))
            processes = [int(path.read_text()) for path in pids if path.exists()]
            for process in processes if dice.random() < 0.5 else [dice.choice(processes)]:
                try:
                    os.kill(process, getattr(signal, kind))
                except ProcessLookupError:
                    pass  # it has come to its end
        thread.join()
        return ending(outcome)


_OF_A_KILL = "killed by signal 9", "has ended without an error message", "closed by peer", "reset by peer"


def ending(outcome: list[Any]) -> str:
    """Return how a life has ended.

    Raises:
        SystemExit: In a way that loses something.
    """
    text = outcome[0]
    if isinstance(text, bool):
        return "finished" if text else "interrupted"
    if any(words in text for words in _OF_A_KILL):
        return "killed"
    if text.startswith("SystemExit: 143"):
        return "terminated"
    if text.startswith("KeyboardInterrupt") or "killed by signal 15" in text:
        return "ended before or after fit"
    raise SystemExit(f"A run refused to go on:\n{text}")


def damage(run_dir: Path, dice: random.Random) -> bool:
    """Damage the newest checkpoint if an older one is good; return whether that was done."""
    paths = [path for _, path in steps_in(run_dir / "checkpoints") if fault_of(path) is None]
    if len(paths) < 2:
        return False
    path = dice.choice([path for path in paths[0].iterdir() if path.is_file()])
    content = bytearray(path.read_bytes())
    kind = dice.choice(["flip", "cut", "delete"])
    if kind == "delete":
        path.unlink()
        return True
    if kind == "flip":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(bytes(content) if kind == "flip" else content[: dice.randrange(len(content))])
    return True


# --- what must hold ---------------------------------------------------------------------------------------------------


def check_samples(logs: list[Path], num_epochs: int) -> None:
    """See that every epoch of the kept history has each sample once."""
    per_epoch = -(-1400 // BATCH_SIZE)
    lives: dict[int, dict[Path, list[int]]] = defaultdict(lambda: defaultdict(list))
    for log in logs:  # in the order of the lives
        for path in log.parent.glob(f"{log.name}.[0-9]"):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # not broken off
                    number, samples = json.loads(line)
                    lives[number][log] += samples
    for epoch in range(num_epochs):
        counts: Counter[int] = Counter()
        for number in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1):
            # As sets: padding of a divided model computes the first micro-batch of a batch once more, at weight 0.
            attempts = [sorted(set(samples)) for samples in lives[number].values()]
            last = attempts[-1]
            if any(set(attempt) - set(last) for attempt in attempts):
                raise SystemExit(f"Batch {number} had other samples after going on.")
            counts.update(last)
        if counts != Counter(range(1400)):
            raise SystemExit(f"Epoch {epoch + 1} has samples twice or not at all.")


def compare(log: Path, run_dir: Path, reference: Path, reference_dir: Path, bitwise: bool) -> float:
    """Return the greatest relative difference of losses and weights from the run that was left alone."""
    greatest = 0.0
    one, other = (History.load(folder) for folder in (reference_dir, run_dir))
    for name in ("train_losses", "test_losses", "learning_rates"):
        for left, right in zip(getattr(one, name), getattr(other, name), strict=True):
            greatest = max(greatest, abs(left - right) / max(abs(left), 1e-300))
    weights, others = (json.loads(Path(f"{path}.weights").read_text()) for path in (reference, log))
    for name, values in weights.items():
        left, right = (torch.tensor(item, dtype=torch.float64) for item in (values, others[name]))
        greatest = max(greatest, float((left - right).norm() / left.norm().clamp_min(1e-300)))
    if greatest > (0.0 if bitwise else 1e-10):
        raise SystemExit(f"The run differs from the one left alone by {greatest:.1e} (bitwise: {bitwise}).")
    return greatest


def torture(folder: Path, bitwise: bool, kills: int, num_epochs: int, dice: random.Random, tell: Any) -> dict[str, Any]:
    """Kill one run so many times, or until it ends, and return what came of it."""
    (folder / "logs").mkdir(parents=True)
    reference = folder / "logs" / "reference"
    (alone,) = run_on_processes(1, train, str(folder / "alone"), str(reference), bitwise, num_epochs, None, 0)
    if not alone:
        raise SystemExit("The run that is left alone does not come to its end.")
    logs, kinds, damaged, layouts = [], Counter(), 0, Counter()
    while True:
        done = sum(kinds.values()) >= kills
        kind = "none" if done else dice.choice(["SIGKILL", "SIGKILL in a write", "SIGTERM", "SIGINT"])
        life = Life(folder / "run", folder / "logs" / f"life{len(logs):04d}", bitwise, num_epochs)
        logs.append(life.log)
        end = life.live(dice, kind)
        layouts[life.layout] += 1
        step = next((step for step, _ in steps_in(folder / "run" / "checkpoints")), 0)
        tell(f"bitwise={bitwise} {sum(kinds.values()):4d} {kind:20s} {life.layout} processes: {end}, step {step}")
        if end == "finished":
            break
        kinds[kind] += 1
        if dice.random() < 0.1:
            damaged += damage(folder / "run", dice)
    check_samples(logs, num_epochs)
    difference = compare(logs[-1], folder / "run", reference, folder / "alone", bitwise)
    return {
        "bitwise": bitwise,
        "kills": dict(kinds),
        "damaged_checkpoints": damaged,
        "starts_by_processes": dict(sorted(layouts.items())),
        "epochs": num_epochs,
        "greatest_relative_difference": difference,
    }


def main() -> None:
    """Read the options, torture, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="in all (default: 100)")
    parser.add_argument("--num_epochs", type=int, default=150, help="of each run (default: 150)")
    parser.add_argument("--seed", type=int, default=0, help="of the dice (default: 0)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/torture.json")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    runs: list[dict[str, Any]] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while (left := options.kills - sum(sum(run["kills"].values()) for run in runs)) > 0:
            share = min(left, max(options.kills // 2, 1))
            place = Path(folder, str(len(runs)))
            runs.append(torture(place, len(runs) % 2 == 0, share, options.num_epochs, dice, print_now))
    result = {"runs": runs, "seconds": round(time.monotonic() - started), "seed": options.seed}
    print_now(json.dumps(result, indent=2))
    if options.write:
        about = describe_environment("CPU")
        machine = {name: about[name] for name in ("platform", "cpu_count", "python", "versions")}
        RESULTS.write_text(json.dumps(result | {"machine": machine}, indent=2) + "\n")
    print_now(f"Nothing was lost in {sum(sum(run['kills'].values()) for run in runs)} kills.")


def print_now(text: str) -> None:
    """Print a line at once."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
