"""The promise, measured: one run under every layout this machine has, compared, and the first divergence named."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..callbacks import Callback
from ..config import TrainConfig
from ..errors import ProcessFailedError
from ..trainer import Trainer
from .launching import run_on_processes
from .recording import (
    Divergence,
    Place,
    RecordedObjective,
    Recorder,
    Trace,
    apart,
    digest,
    first_divergence,
)
from .run_functions import make_run

BUILT_IN = "accel_trainer.tools.digits:fixed_cut", "accel_trainer.tools.digits:free_cut"
# Largest relative difference of a loss that a promise allows, in single and in double precision. A metric may differ
# by more: one sample on the edge between two classes is a large step.
TOLERANCES = {"rounding": (1e-5, 1e-10), "device": (1e-3, 1e-8), "precision": (5e-2, 5e-2)}
_METRIC_TOLERANCE = {"rounding": 2e-2, "device": 5e-2, "precision": 0.2}


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
        promise: What is compared with the reference: `bits`, `rounding`, `precision`, `device` (another kind of
            hardware), or `cut` (rounding, unless the model or its data look at the micro-batch or at chance).
        reference: The case that this one is compared with; `None` without a promise.
        is_again: Whether it repeats that case.
    """

    run: str
    num_processes: int
    num_micro_batches: int | None
    bitwise: bool = False
    precision: str = "no"
    gpu: int | str | None = None
    promise: str = "none"
    reference: Case | None = None
    is_again: bool = False

    @property
    def layout(self) -> str:
        """The layout in words."""
        number = self.num_micro_batches
        cut = "1 micro-batch per process" if number is None else _counted(number, "micro-batch")
        words = [_counted(self.num_processes, "process"), cut]
        words += ["bitwise"] if self.bitwise else []
        words += ["bf16"] if self.precision == "bf16" else []
        words += ["again"] if self.is_again else []
        return ", ".join(words)

    @property
    def device(self) -> str:
        """The device in words."""
        return "CPU" if self.gpu is None else "all GPUs" if self.gpu == "all" else f"GPU {self.gpu}"

    @property
    def num_pieces(self) -> int:
        """Micro-batches of a batch."""
        return self.num_micro_batches or self.num_processes

    @property
    def has_same_cut(self) -> bool:
        """Whether the reference cuts its batches alike."""
        return self.reference is not None and self.num_pieces == self.reference.num_pieces


@dataclass(frozen=True)
class Row:
    """What a case gave.

    Attributes:
        case: Which it was.
        kept: Whether the promise was kept; `None` if there is none.
        verdict: That in words.
        explanation: Where it first parts from its reference; empty where it does not.
        seconds: How long `fit` took.
        train_loss: Of the last epoch.
        test_loss: Of the last epoch; `None` without a test loader.
        difference: Greatest relative difference of a loss, of any epoch, from the first row of this run function.
        weights: Digest of the weights and buffers.
        optimizer: Digest of the optimizer's state.
    """

    case: Case
    kept: bool | None
    verdict: str
    explanation: str = ""
    seconds: float = math.nan
    train_loss: float = math.nan
    test_loss: float | None = None
    difference: float = math.nan
    weights: str = ""
    optimizer: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        case, reference = self.case, self.case.reference
        compared_with = None if reference is None else {"layout": reference.layout, "device": reference.device}
        of_case = {"run": case.run, "layout": case.layout, "device": case.device, "promise": case.promise}
        of_row = {name: value for name, value in vars(self).items() if name != "case"}
        return {**of_case, "compared_with": compared_with, **of_row}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es'}"


def plan(name: str | None, num_processes: Iterable[int], num_micro_batches: int, num_gpus: int) -> list[Case]:
    """Return the cases to run, each after the one it is compared with.

    Args:
        name: Of the user's run function; `None` for the built-in ones.
        num_processes: Numbers of CPU processes to try beside one.
        num_micro_batches: The fixed number of most cases.
        num_gpus: GPUs of this machine.
    """
    several = sorted({number for number in num_processes if number > 1})
    fixed, free = (name, name) if name else BUILT_IN
    cases = _with_fixed_cut(Case(fixed, 1, num_micro_batches), several, None)
    first_gpu: Case | None = None
    for gpu in range(num_gpus):
        # Random layers draw other numbers on another kind of device, so a GPU is compared with the first GPU.
        promise = "none" if first_gpu is None else "rounding"
        first = Case(fixed, 1, num_micro_batches, gpu=gpu, promise=promise, reference=first_gpu)
        cases += _with_fixed_cut(first, [num_gpus] if num_gpus > 1 and gpu == 0 else [], "all")
        first_gpu = first_gpu or first
    return cases + _with_free_cut(free, several, num_gpus, cases[0] if name else None)


def _with_fixed_cut(first: Case, numbers: list[int], others_gpu: str | None) -> list[Case]:
    """Return the cases of one kind of device: both strengths on one and several processes, and bf16."""
    plain = replace(first, promise="rounding", reference=first)
    exact = replace(plain, bitwise=True)
    low = replace(exact, precision="bf16", promise="precision")

    def on(number: int, case: Case, **changes: Any) -> Case:
        return replace(case, num_processes=number, gpu=others_gpu, **changes)

    return [
        first,
        *(on(number, plain) for number in numbers),
        exact,
        replace(exact, promise="bits", reference=exact, is_again=True),
        *(on(number, exact, promise="bits", reference=exact) for number in numbers),
        low,
        *(on(number, low, promise="bits", reference=low) for number in numbers[:1]),
    ]


def _with_free_cut(name: str, several: list[int], num_gpus: int, known: Case | None) -> list[Case]:
    """Return the cases with other numbers of micro-batches.

    Args:
        name: Of the run function.
        several: Numbers of CPU processes above one.
        num_gpus: GPUs of this machine.
        known: A case of a run of which it is not known whether it looks at its micro-batch or at chance.
    """
    whole = Case(name, 1, 1, promise="cut", reference=known) if known else Case(name, 1, 1)
    same = replace(whole, promise="rounding", reference=known or whole)
    cases = [whole, replace(same, num_micro_batches=3)]
    cases += [replace(same, num_processes=number, num_micro_batches=None) for number in several]
    cases += [replace(same, num_processes=number, num_micro_batches=number + 3) for number in several[:1]]
    return cases + [replace(same, gpu=gpu, promise="device") for gpu in range(num_gpus)]


class _RecordedTrainer(Trainer):
    """A trainer whose steps are recorded."""

    def __init__(self, recorder: Recorder, callbacks: Iterable[Callback] = (), **arguments: Any) -> None:
        super().__init__(callbacks=[*callbacks, recorder], **arguments)
        self._objective = RecordedObjective(self._objective, recorder, self)  # type: ignore[assignment]


def run_here(name: str, config: TrainConfig, records: bool, how: dict[str, Any]) -> dict[str, Any]:
    """Run a case in this process, one of its group, and return what is compared."""
    with contextlib.redirect_stdout(sys.stderr):
        arguments, loaders = make_run(name, config)
        imposed = {name: getattr(config, name) for name in _IMPOSED}
        chosen = replace(arguments.pop("config", config), **imposed)
        recorder = Recorder(**how)
        trainer = (
            _RecordedTrainer(recorder, **arguments, config=chosen) if records else Trainer(**arguments, config=chosen)
        )
        started = time.perf_counter()
        history = trainer.fit(loaders["train_loader"], loaders.get("test_loader"))
        seconds = time.perf_counter() - started
    if not history.num_epochs:
        raise RuntimeError(f"no epoch was finished ({history.stop_reason}), so there is nothing to compare")
    states = trainer.optimizer.state_dict()  # type: ignore[union-attr]
    return {
        "seconds": seconds,
        "train_losses": history.train_losses,
        "test_losses": history.test_losses,
        "metrics": history.metrics,
        "weights": digest(dict(_named_tensors(trainer.model.state_dict(), ""))),
        "optimizer": digest(dict(_named_tensors(states, ""))),
        "is_double": any(parameter.dtype == torch.float64 for parameter in trainer.model.parameters()),
        "trace": recorder.trace if records else None,
        "kept": recorder.kept if records else None,
        "doubts": list(trainer.doubts.values()),
    }


_IMPOSED = (
    "num_epochs",
    "max_steps",
    "num_micro_batches",
    "bitwise",
    "mixed_precision",
    "seed",
    "restore_best",
    "run_dir",
    "verbose",
)


def _named_tensors(nested: dict[Any, Any], prefix: str) -> Iterable[tuple[str, torch.Tensor]]:
    for name, value in nested.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict):
            yield from _named_tensors(value, f"{prefix}{name}.")


class Parity:
    """Run cases in processes of their own and compare them.

    Args:
        config: What the run function is given; layout and precision are set per case.
        announce: Called with a line before each case.
        timeout: Seconds that a case may take; `None` for no limit.
    """

    def __init__(
        self, config: TrainConfig, announce: Callable[[str], None] = lambda text: None, timeout: float | None = None
    ) -> None:
        self._config, self._announce, self._timeout = config, announce, timeout

    def rows(self, cases: list[Case]) -> Iterator[Row]:
        """Yield the row of each case, in order.

        Raises:
            ProcessFailedError: The first case fails: the run function itself does not work.
        """
        results: dict[Case, dict[str, Any]] = {}
        first: dict[str, dict[str, Any]] = {}
        for case in cases:
            self._announce(f"{case.device}, {case.layout} ...")
            try:
                result = results[case] = self.run(case)
            except ProcessFailedError as error:
                if not results:
                    raise
                yield Row(case, False, "FAILED", str(error))
                continue
            row = self._row(case, result, results, first.setdefault(case.run, result))
            yield row
            if case.promise == "cut" and not row.kept:
                return  # nothing is promised of the cases that follow

    def run(self, case: Case, records: bool = False, **how: Any) -> dict[str, Any]:
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
        results = run_on_processes(
            case.num_processes,
            run_here,
            *(case.run, config, records, how),
            environment=environment,
            timeout=self._timeout,
        )
        main: dict[str, Any] = results[0]
        main["agrees"] = all(other["weights"] == main["weights"] for other in results[1:])
        main["parted"] = None
        if records:
            parted = [first_divergence(main["trace"], other["trace"], 0.0, same_cut=False) for other in results[1:]]
            main["parted"] = min(filter(None, parted), key=lambda found: found.place.step, default=None)
            for other in results[1:]:
                main["trace"] = other["trace"] | main["trace"]
        return main

    def _row(
        self, case: Case, result: dict[str, Any], results: dict[Case, dict[str, Any]], first: dict[str, Any]
    ) -> Row:
        kept, verdict, explanation = self._judge(case, result, results)
        return Row(
            case=case,
            kept=kept,
            verdict=verdict,
            explanation=explanation,
            seconds=result["seconds"],
            train_loss=result["train_losses"][-1],
            test_loss=result["test_losses"][-1] if result["test_losses"] else None,
            difference=_apart(first, result, "train_losses", "test_losses"),
            weights=result["weights"],
            optimizer=result["optimizer"],
        )

    def _judge(
        self, case: Case, result: dict[str, Any], results: dict[Case, dict[str, Any]]
    ) -> tuple[bool | None, str, str]:
        """Return whether the promise is kept, that in words, and where it is broken."""
        if case.reference is None:
            return None, "reference", ""
        reference = results.get(case.reference)
        if reference is None:
            return False, "not compared", "The row it is compared with failed."
        if not result["agrees"]:
            return False, "BROKEN: the processes part", self._explain(case, 0.0)
        if case.promise == "bits":
            if _has_same_bits(reference, result):
                return True, "same bits", ""
            return False, "BROKEN: other bits", self._explain(case, 0.0)
        promise = "rounding" if case.promise == "cut" else case.promise
        tolerance = TOLERANCES[promise][result["is_double"]]
        apart = _apart(reference, result, "train_losses", "test_losses")
        of_metrics = _apart(reference["metrics"], result["metrics"], *reference["metrics"])
        if apart <= tolerance and of_metrics <= _METRIC_TOLERANCE[promise]:
            return True, f"within {promise} ({tolerance:g})", ""
        if case.promise == "cut" and result["doubts"]:
            return False, f"BROKEN: {apart:.1e}, no mean", " ".join(result["doubts"])
        if case.promise == "cut":
            return None, f"no promise: {max(apart, of_metrics):.1e}", _ON_THE_CUT
        explanation = self._explain(case, tolerance)
        if _SCALED_UP in explanation or _MULTIPLIED in explanation:
            return None, f"no promise: {apart:.1e}", explanation
        verdict = (
            f"BROKEN: {apart:.1e} > {tolerance:g}" if apart > tolerance else f"BROKEN: a metric by {of_metrics:.1e}"
        )
        return False, verdict, explanation

    # --- where they part ----------------------------------------------------------------------------------------------

    def _explain(self, case: Case, tolerance: float) -> str:
        """Run a case and its reference once more, recorded, and say where they first part."""
        self._announce("  differs; running both again to find where ...")
        try:
            return self._first_difference(case, *self._run_both(case), tolerance)
        except ProcessFailedError as error:
            return f"It could not be found out where: {str(error).splitlines()[0]}"

    def _run_both(self, case: Case, look_at: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what the reference of a case and the case itself give, recorded."""
        reference: Case = case.reference  # type: ignore[assignment]
        return self.run(reference, True, look_at=look_at), self.run(case, True, look_at=look_at)

    def _first_difference(self, case: Case, one: dict[str, Any], other: dict[str, Any], tolerance: float) -> str:
        if other["parted"] is not None:
            place = other["parted"].place
            what = _NOUNS[place.kind].format(place.name)
            return f"{_where(other['parted'])}: {what} differs between the processes of this run."
        if not other["agrees"]:
            return "The processes part after the last step: does a callback change the model?"
        # A fault is far above rounding; a drift is below the promise's own bound in every single step.
        for bound in [10 * tolerance, tolerance, 0.1 * tolerance] if tolerance else [0.0]:
            found = first_divergence(one["trace"], other["trace"], bound, case.has_same_cut)
            if found is not None:
                return self._told(case, found, bound, one, other)
        names = [name for name in one["metrics"] if _apart(one["metrics"], other["metrics"], name) > tolerance]
        if names:
            return (
                f"All steps and test losses agree, but not the metric {', '.join(names)}: does it look at the process?"
            )
        return "Run again, the two do not differ: something depends on time or on chance."

    def _told(self, case: Case, found: Divergence, bound: float, one: dict[str, Any], other: dict[str, Any]) -> str:
        """Say where two runs part, and what to look at."""
        if bound and found.place.kind in ("loss", "gradient") and found.place.step > 1:
            step, difference = self._other_step(case, found.place.step, other)
            if step is None:
                return f"{_where(found)}: {_MULTIPLIED}. {_HINTS['multiplied']}"
            if step > found.place.step:
                return f"step {step}: from equal weights the gradient differs by {difference:.1e}. {_HINTS['gradient']}"
        if found.place.kind in ("loss", "gradient") and case.has_same_cut:
            # A fault of a module may be smaller in the loss than in what it does to the gradients.
            found = self._module(case, found.place.step, bound / 10) or found
        kind, name = found.place.kind, found.place.name
        hint = kind
        if kind == "gradient" and not case.has_same_cut:
            hint = "gradient, other cut"
        if kind == "weights" and found.place.step == 0:
            hint = "weights, at the start"
        elif kind == "weights" and bound and _is_rounding(one["trace"], other["trace"], found.place):
            return f"{_where(found)}: {_SCALED_UP} {name}. {_HINTS['weights, scaled up']}"
        size = "" if "batch" in kind else f" by {found.difference:.1e} (relative)"
        before = f" What comes before agrees to {bound:g}." if bound else " What comes before has the same bits."
        return f"{_where(found)}: {_NOUNS[kind].format(name or 'the model')} differs{size}.{before} {_HINTS[hint]}"

    def _other_step(self, case: Case, first: int, other: dict[str, Any]) -> tuple[int | None, float]:
        """Return the first of some steps in which the reference, given the weights of a case, finds other gradients."""
        steps = range(first, first + _NUM_STEPS)
        kept = self.run(case, True, keeps=range(first - 1, first + _NUM_STEPS - 1))["kept"]
        again = self.run(case.reference, True, puts=kept)  # type: ignore[arg-type]
        differences = {step: apart(again["trace"], other["trace"], step)[""] for step in steps}
        wrong = (step for step, one in differences.items() if one > _SAME_STEP[other["is_double"]])
        return next(((step, differences[step]) for step in wrong), (None, 0.0))

    def _module(self, case: Case, step: int, bound: float) -> Divergence | None:
        """Return the first module whose output differs in a step."""
        one, other = self._run_both(case, step)
        found = first_divergence(one["trace"], other["trace"], bound, same_cut=True)
        return found if found is not None and found.place.kind == "module" else None


_NUM_STEPS = 8  # that are made again from equal weights
_SAME_STEP = 2e-6, 1e-14  # gradients at equal weights, in single and in double precision
_MULTIPLIED = "from equal weights both make the same step, but the run multiplies rounding"
_SCALED_UP = "only rounding differs until the optimizer scales it up in"
_ON_THE_CUT = (
    "The run depends on the cut already on one process, so other numbers of micro-batches are not compared. BatchNorm, "
    "dropout, augmentation and losses over pairs of samples do that. If there are none, the loss is not a mean over "
    "its samples: see weight_fn."
)
_NOUNS = {
    "batch": "the batch content",
    "test batch": "the content of a test batch",
    "module": "the output of {}",
    "loss": "the loss",
    "test loss": "the test loss",
    "gradient": "the gradient of {}",
    "buffer": "the buffer {}",
    "weights": "the weight {}",
}
_HINTS = {
    "batch": "Does the dataset draw from a generator of its own, or look at the process?",
    "test batch": "Does the dataset draw from a generator of its own, or look at the process?",
    "module": "Does it look at the process, or keep a state outside its buffers?",
    "loss": "So do the batch and the outputs of all modules. Does the loss look at the process, or keep a state?",
    "test loss": "Does the model or the loss look at the process in an evaluation, or keep a state?",
    "gradient": "So do all losses. Does a hook change it, or is it averaged per process?",
    "gradient, other cut": "Micro-batches of other sizes cannot be compared: look at a row with as many of them.",
    "buffer": "So do the gradients. Does something outside the forward change it?",
    "weights": "So do the gradients. Does the optimizer or a callback look at the process?",
    "weights, at the start": "Does make_run look at the process, or draw from a generator of its own?",
    "multiplied": (
        "A ReLU or max-pooling that switches does that, and so does BatchNorm over few samples: no fault, but no "
        "promise of the last digits either. Use bitwise=True for those."
    ),
    "weights, scaled up": (
        "Its true gradient is zero, as that of a bias before BatchNorm is, and an optimizer that divides by the "
        "gradient's size, such as Adam, makes full steps of the rest. Leave it out (bias=False), or use bitwise=True."
    ),
}


def _where(found: Divergence) -> str:
    place = found.place
    if place.step == 0:
        return "before the first step"
    part = f", micro-batch {place.micro_batch}" if place.micro_batch >= 0 else ""
    # What follows in a forward from a module that differs, differs too.
    others = f" (and {found.num_others} more there)" if found.num_others and place.kind != "module" else ""
    return f"{'after ' if place.kind.startswith('test') else ''}step {place.step}{part}{others}"


def _is_rounding(one: Trace, other: Trace, place: Place) -> bool:
    """Return whether the gradient of a parameter is nothing but rounding: it differs, and those of others do not."""
    differences = apart(one, other, place.step)
    own = differences.get(place.name, 0.0)
    return own > 1e-3 and own > 1000 * differences[""]


_COMPARED = ("train_losses", "test_losses", "metrics", "weights", "optimizer")


def _has_same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether nothing differs by a bit; nan equals nan."""
    return all(repr(one[name]) == repr(other[name]) for name in _COMPARED)


def _apart(one: dict[str, Any], other: dict[str, Any], *names: str) -> float:
    """Return the greatest relative difference in some series of numbers.

    It is relative to the number itself, or to a hundredth of the greatest of its series where that is more: a loss
    that has come down to nothing is compared with what it came from.
    """
    greatest = 0.0
    for name in names:
        pairs = list(zip(one[name], other[name], strict=False))
        floor = 0.01 * max((abs(a) for a, _ in pairs if math.isfinite(a)), default=0.0)
        for a, b in pairs:
            if repr(a) != repr(b):
                apart = abs(a - b) / max(abs(a), floor, 1e-300)
                greatest = max(greatest, apart if math.isfinite(apart) else math.inf)
        if len(one[name]) != len(other[name]):
            return math.inf
    return greatest
