"""The promise, measured: one run under every layout this machine has, compared, and the first divergence named."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .config import TrainConfig
from .errors import ProcessFailedError
from .launching import run_on_processes
from .recording import Divergence, Recorder, digest, first_divergence
from .run_functions import make_run
from .trainer import Trainer

__all__ = ["Case", "Parity", "Row", "compare", "plan"]

# Largest relative difference of a loss that a promise allows, in single and in double precision.
TOLERANCES = {"rounding": (1e-5, 1e-10), "device": (1e-3, 1e-8), "precision": (5e-2, 5e-2)}


@dataclass(frozen=True)
class Case:
    """One layout to run under, and what is promised of it.

    Attributes:
        run: Name of the run function.
        num_processes: Processes of the launch.
        num_micro_batches: Pieces of a batch; `None` for one per process.
        bitwise: Whether bits are asked for.
        precision: `no` or `bf16`.
        gpu: Index of the GPU, `all`, or `None` for the CPU.
        promise: `reference` (nothing), `bits`, `rounding`, `precision`, `device` (another kind of hardware), or `cut`
            (rounding, if neither model nor data look at the micro-batch or at chance).
        reference: Place of the case that this one is compared with.
        again: Whether it repeats that case.
    """

    run: str
    num_processes: int
    num_micro_batches: int | None
    bitwise: bool = False
    precision: str = "no"
    gpu: int | str | None = None
    promise: str = "reference"
    reference: int = 0
    again: bool = False

    @property
    def layout(self) -> str:
        """The layout in words."""
        cut = (
            "one micro-batch each"
            if self.num_micro_batches is None
            else _counted(self.num_micro_batches, "micro-batch")
        )
        words = [_counted(self.num_processes, "process"), cut]
        words += ["bitwise"] if self.bitwise else []
        words += ["bf16"] if self.precision == "bf16" else []
        words += ["again"] if self.again else []
        return ", ".join(words)

    @property
    def device(self) -> str:
        """The device in words."""
        return "CPU" if self.gpu is None else "all GPUs" if self.gpu == "all" else f"GPU {self.gpu}"


@dataclass(frozen=True)
class Row:
    """What a case gave.

    Attributes:
        case: Which it was.
        seconds: How long `fit` took.
        train_loss: Of the last epoch.
        test_loss: Of the last epoch; `None` without a test loader.
        difference: Greatest relative difference of a loss, of any epoch, from the first row with this run function.
        weights: Digest of the weights and buffers.
        optimizer: Digest of the optimizer's state.
        kept: Whether the promise was kept; `None` if there is none.
        verdict: That in words.
    """

    case: Case
    seconds: float
    train_loss: float
    test_loss: float | None
    difference: float
    weights: str
    optimizer: str
    kept: bool | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {**asdict(self), "layout": self.case.layout, "device": self.case.device}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es'}"


# --- which cases ------------------------------------------------------------------------------------------------------


def plan(name: str, num_processes: Iterable[int], num_micro_batches: int, num_gpus: int) -> list[Case]:
    """Return the cases of a run function with a fixed number of micro-batches, each after the one it is compared with.

    Args:
        name: Of the run function.
        num_processes: Numbers of CPU processes to try beside one.
        num_micro_batches: The fixed number.
        num_gpus: GPUs of this machine.
    """
    several = [number for number in num_processes if number > 1]
    cases: list[Case] = []

    def add(number: int, **choices: Any) -> int:
        cases.append(Case(name, number, num_micro_batches, **choices))
        return len(cases) - 1

    def add_block(numbers: list[int], gpu: int | str | None, promise: str, reference: int) -> None:
        plain = add(1, gpu=gpu, promise=promise, reference=reference)
        for number in numbers:
            add(number, gpu="all" if gpu is not None else None, promise="rounding", reference=plain)
        exact = add(1, bitwise=True, gpu=gpu, promise="rounding", reference=plain)
        add(1, bitwise=True, gpu=gpu, promise="bits", reference=exact, again=True)
        for number in numbers:
            add(number, bitwise=True, gpu="all" if gpu is not None else None, promise="bits", reference=exact)
        low = add(1, bitwise=True, precision="bf16", gpu=gpu, promise="precision", reference=plain)
        for number in numbers[:1]:
            add(
                number,
                bitwise=True,
                precision="bf16",
                gpu="all" if gpu is not None else None,
                promise="bits",
                reference=low,
            )

    add_block(several, None, "reference", 0)
    for gpu in range(num_gpus):
        # Random layers draw other numbers on another kind of device, so a GPU is compared with the first GPU.
        first = next((place for place, case in enumerate(cases) if case.gpu is not None), len(cases))
        add_block([num_gpus] if num_gpus > 1 and gpu == 0 else [], gpu, "rounding" if gpu else "reference", first)
    return cases


def plan_cuts(name: str, num_processes: Iterable[int], num_gpus: int, is_known: bool) -> list[Case]:
    """Return the cases of a run function with other numbers of micro-batches.

    Args:
        name: Of the run function.
        num_processes: Numbers of CPU processes to try beside one.
        num_gpus: GPUs of this machine.
        is_known: Whether its model and data are known to look neither at their micro-batch nor at chance.
    """
    several = [number for number in num_processes if number > 1]
    cases = [Case(name, 1, 1), Case(name, 1, 3, promise="rounding" if is_known else "cut")]
    cases += [Case(name, 1, 8, promise="rounding")]
    cases += [Case(name, number, None, promise="rounding") for number in several]
    cases += [Case(name, number, number + 3, promise="rounding") for number in several[:1]]
    return cases + [Case(name, 1, 1, gpu=gpu, promise="device") for gpu in range(num_gpus)]


# --- running one ------------------------------------------------------------------------------------------------------


class _RecordingTrainer(Trainer):
    """A trainer whose steps are recorded."""

    recorder: Recorder | None = None

    def _prepare_run(self, *args: Any, **kwargs: Any) -> Any:
        run = super()._prepare_run(*args, **kwargs)
        if self.recorder is not None:
            self.recorder.attach(run.training, self.optimizer)  # type: ignore[arg-type]
        return run


def run_here(name: str, config: TrainConfig, records: bool, look_at: int | None) -> dict[str, Any]:
    """Run a case in this process, one of its group, and return what is compared.

    Args:
        name: Of the run function.
        config: Of the run.
        records: Whether to record the steps.
        look_at: A step whose module outputs are recorded too.
    """
    torch.backends.cudnn.allow_tf32 = False  # convolutions in the precision that the row says
    arguments, loaders = make_run(name, config)
    trainer = _RecordingTrainer(**arguments, config=config)
    trainer.recorder = Recorder(look_at) if records else None
    started = time.perf_counter()
    history = trainer.fit(loaders["train_loader"], loaders.get("test_loader"))
    seconds = time.perf_counter() - started
    states = trainer.optimizer.state_dict()["state"]  # type: ignore[union-attr]
    return {
        "seconds": seconds,
        "train_losses": history.train_losses,
        "test_losses": history.test_losses,
        "metrics": history.metrics,
        "weights": digest(dict(_named_tensors(trainer.model.state_dict().items(), ""))),
        "optimizer": digest(dict(_named_tensors(states.items(), ""))),
        "is_double": any(parameter.dtype == torch.float64 for parameter in trainer.model.parameters()),
        "trace": trainer.recorder.trace if trainer.recorder else None,
    }


def _named_tensors(items: Iterable[tuple[Any, Any]], prefix: str) -> Iterable[tuple[str, torch.Tensor]]:
    for name, value in items:
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict):
            yield from _named_tensors(value.items(), f"{prefix}{name}.")


class Parity:
    """Run cases in processes of their own and compare them.

    Args:
        config: What the run function is given; layout and precision are set per case.
        announce: Called with a line before each case.
    """

    def __init__(self, config: TrainConfig, announce: Callable[[str], None] = lambda text: None) -> None:
        self._config, self._announce = config, announce

    def run(self, case: Case, records: bool = False, look_at: int | None = None) -> dict[str, Any]:
        """Return what the main process of a case gives, with the records of all processes."""
        config = replace(
            self._config,
            num_micro_batches=case.num_micro_batches,
            bitwise=case.bitwise,
            mixed_precision=case.precision,  # type: ignore[arg-type]
        )
        environment = {"ACCELERATE_USE_CPU": "true"} if case.gpu is None else {}
        if isinstance(case.gpu, int):
            environment["CUDA_VISIBLE_DEVICES"] = str(case.gpu)
        arguments = (case.run, config, records, look_at)
        results = run_on_processes(case.num_processes, run_here, *arguments, environment=environment)
        if records:
            for other in results[1:]:
                results[0]["trace"] = other["trace"] | results[0]["trace"]
        main: dict[str, Any] = results[0]
        return main

    def rows(self, cases: list[Case]) -> Iterable[Row]:
        """Yield the row of each case, in order."""
        results: list[dict[str, Any] | None] = []
        first: dict[str, dict[str, Any]] = {}
        for case in cases:
            self._announce(f"{case.device}, {case.layout} ...")
            try:
                result = self.run(case)
            except ProcessFailedError as error:
                results.append(None)
                nan = float("nan")
                yield Row(case, nan, nan, None, nan, "", "", False, f"FAILED: {str(error).splitlines()[0]}")
                continue
            results.append(result)
            reference = result if case.promise == "reference" else results[case.reference]
            kept, verdict = self._judge(case, cases[case.reference], result, reference)
            yield Row(
                case=case,
                seconds=result["seconds"],
                train_loss=result["train_losses"][-1],
                test_loss=result["test_losses"][-1] if result["test_losses"] else None,
                difference=_difference(first.setdefault(case.run, result), result),
                weights=result["weights"],
                optimizer=result["optimizer"],
                kept=kept,
                verdict=verdict,
            )

    def _judge(
        self, case: Case, reference_case: Case, result: dict[str, Any], reference: Any
    ) -> tuple[bool | None, str]:
        if case.promise == "reference":
            return None, "reference"
        if reference is None:
            return False, "not compared: its reference failed"
        if case.promise == "bits":
            if all(
                result[name] == reference[name]
                for name in ("train_losses", "test_losses", "metrics", "weights", "optimizer")
            ):
                return True, "same bits"
            return False, "BROKEN, other bits: " + self._explain(reference_case, case, 0.0)
        bound = "rounding" if case.promise == "cut" else case.promise
        tolerance = TOLERANCES[bound][result["is_double"]]
        difference = _difference(reference, result)
        if difference <= tolerance:
            return True, f"within {bound} ({tolerance:g})"
        if case.promise == "cut":
            return None, "no promise: it depends on the cut already on one process"
        return False, f"BROKEN, {difference:.1e} > {tolerance:g}: " + self._explain(reference_case, case, tolerance)

    # --- where they part ----------------------------------------------------------------------------------------------

    def _explain(self, reference: Case, case: Case, tolerance: float) -> str:
        """Run both once more, recorded, and say where they first part."""
        self._announce("  the promise is broken; looking for the first divergence ...")
        same_cut = _num_pieces(reference) == _num_pieces(case)
        one, other = (self.run(which, records=True)["trace"] for which in (reference, case))
        # A drift may stay below the promise's own bound in every single step.
        for bound in [tolerance * factor for factor in (100, 10, 1, 0.1, 0.01)] if tolerance else [0.0]:
            found = first_divergence(one, other, bound, same_cut)
            if found is not None:
                break
        else:
            return "no step differs when both are run again: something in it depends on time or on chance."
        module = ""
        if found.place.kind == "loss":
            one, other = (self.run(which, True, found.place.step)["trace"] for which in (reference, case))
            closer = first_divergence(one, other, bound, same_cut)
            module = closer.place.name if closer is not None and closer.place.kind == "module" else ""
        return _told(found, module)


def _num_pieces(case: Case) -> int:
    return case.num_micro_batches or case.num_processes


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the greatest relative difference of a loss; infinity where one is not finite or missing."""
    losses = [result["train_losses"] + result["test_losses"] for result in (one, other)]
    if len(losses[0]) != len(losses[1]):
        return float("inf")
    apart = [abs(a - b) / max(abs(a), 1e-300) if a != b else 0.0 for a, b in zip(*losses, strict=True)]
    return max((value if value == value else float("inf") for value in apart), default=0.0)


def _told(found: Divergence, module: str) -> str:
    """Say where two runs part, and what to look at."""
    place = found.place
    where = f"step {place.step}"
    if place.micro_batch >= 0:
        where += f", micro-batch {place.micro_batch}"
    others = f" (and {found.num_others} more)" if found.num_others else ""
    if place.kind == "batch":
        return (
            f"{where}: the batch content differs{others}. The dataset gives other samples or draws other random "
            "numbers: does it have a generator of its own, or look at the process?"
        )
    if place.kind == "loss" and module:
        return (
            f"{where}: the output of module {module!r} differs, on the same batch, weights and buffers. Does it keep "
            "state outside its buffers, or look at the process?"
        )
    if place.kind == "loss":
        return (
            f"{where}: the loss differs{others}, on the same batch, weights and buffers, and so do no outputs of "
            "modules. Does the loss look at the process, or keep a state?"
        )
    if place.kind == "gradient":
        return (
            f"{where}: the gradient of {place.name} differs{others} by {found.difference:.1e}, though all losses are "
            "the same. Does a hook change it, or is it averaged per process?"
        )
    if place.kind == "buffer":
        return f"{where}: the buffer {place.name} differs{others} by {found.difference:.1e}, on the same gradients."
    return f"{where}: the weights {place.name} differ{others} after the update, on the same gradients and buffers."


# --- a run to compare -------------------------------------------------------------------------------------------------


def digits(config: TrainConfig) -> dict[str, Any]:
    """Return a run on scikit-learn's handwritten digits with BatchNorm and dropout; nothing in it divides anything."""
    layers = [
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
    ]
    return _digits_run(nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Linear(12 * 16, 10)))


def digits_any_cut(config: TrainConfig) -> dict[str, Any]:
    """Return the same run without the layers that look at their batch or at chance."""
    layers = [nn.Conv2d(1, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return _digits_run(nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Linear(12 * 16, 10)))


def _digits_run(model: nn.Module) -> dict[str, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("The built-in run needs scikit-learn: pip install 'accel_trainer[demo]'.") from None
    data = load_digits()
    inputs, targets = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    train, test = TensorDataset(inputs[:997], targets[:997]), TensorDataset(inputs[997:1298], targets[997:1298])
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "loss_fn": nn.CrossEntropyLoss(),
        "metrics": {"accuracy": lambda outputs, targets: outputs.argmax(1) == targets},
        "train_loader": DataLoader(train, batch_size=54, shuffle=True),  # 18 batches of 54, one of 25
        "test_loader": DataLoader(test, batch_size=100),
    }


BUILT_IN = (f"{__name__}:digits", f"{__name__}:digits_any_cut")


_ON_THE_CUT = (
    "Other numbers of micro-batches give other losses, so they are not compared. BatchNorm, dropout, augmentation and "
    "losses over pairs of samples do that. If there are none, the loss is not a mean over its samples: see weight_fn."
)


def compare(
    name: str | None,
    config: TrainConfig,
    num_processes: Iterable[int],
    num_micro_batches: int,
    announce: Callable[[str], None],
) -> Iterable[Row]:
    """Yield a row for every layout of this machine.

    Args:
        name: Of the user's run function; `None` for the built-in runs.
        config: What it is given.
        num_processes: Numbers of CPU processes to try beside one.
        num_micro_batches: The fixed number of the rows that have one.
        announce: Called with a line before each case.
    """
    parity = Parity(config, announce)
    num_processes = list(num_processes)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    fixed, free = (name, name) if name else BUILT_IN
    yield from parity.rows(plan(fixed, num_processes, num_micro_batches, num_gpus))
    for row in parity.rows(plan_cuts(free, num_processes, num_gpus, is_known=name is None)):
        yield row
        if row.case.promise == "cut" and row.kept is None:
            announce(_ON_THE_CUT)
            return
