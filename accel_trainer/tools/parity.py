"""The promise, measured: one run under every layout of this machine, compared, and the first difference named."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import TrainConfig
from ..errors import ProcessFailedError
from ..trainer import Trainer
from .launching import run_on_processes
from .recording import Divergence, RecordedTrainer, Recorder, digest, first_divergence, gradient_differences
from .run_functions import call_run_function

BUILT_IN = "accel_trainer.tools.digits:fixed_cut", "accel_trainer.tools.digits:free_cut"
# Largest relative difference of a loss that a promise allows, in single and in double precision. A metric may differ
# by more: one sample on the edge between two classes is a large step.
TOLERANCES = {"rounding": (1e-5, 1e-10), "device": (1e-3, 1e-8), "precision": (5e-2, 5e-2)}
_METRIC_TOLERANCE = {"rounding": 2e-2, "device": 5e-2, "precision": 0.2}


@dataclass(frozen=True)
class Case:
    """One layout to run under, and what is promised of it."""

    run: str  # name of the run function
    num_processes: int
    num_micro_batches: int | None  # of a batch; `None` for one per process
    bitwise: bool = False
    precision: str = "no"  # or `bf16`
    gpu: int | str | None = None  # index of the GPU, `all`, or `None` for the CPU
    sharding: str | None = None  # `full` for a model that is divided over the processes
    # What is compared with the reference: `bits`, `rounding`, `precision`, `device` (another kind of hardware), `cut`
    # (rounding, unless the model or its data look at the micro-batch or at chance), or `none`.
    promise: str = "none"
    reference: Case | None = None  # the case that this one is compared with; `None` without a promise
    is_again: bool = False  # repeats the reference

    @property
    def layout(self) -> str:
        """The layout in words."""
        number = self.num_micro_batches
        cut = "1 micro-batch per process" if number is None else _counted(number, "micro-batch")
        notes = {"divided": self.sharding is not None, "bitwise": self.bitwise}
        notes |= {"bf16": self.precision == "bf16", "again": self.is_again}
        return ", ".join([_counted(self.num_processes, "process"), cut, *(note for note in notes if notes[note])])

    @property
    def device(self) -> str:
        """The device in words."""
        return "CPU" if self.gpu is None else "all GPUs" if self.gpu == "all" else f"GPU {self.gpu}"

    @property
    def has_same_cut(self) -> bool:
        """Whether the reference cuts its batches alike."""
        numbers = {case.num_micro_batches or case.num_processes for case in (self, self.reference or self)}
        return len(numbers) == 1


@dataclass(frozen=True)
class Row:
    """The result of a case."""

    case: Case
    kept: bool | None  # whether the promise was kept; `None` without a promise
    verdict: str  # the same in words
    explanation: str = ""  # where it first differs from its reference, if it does
    seconds: float = math.nan  # of `fit`
    train_loss: float = math.nan  # of the last epoch
    test_loss: float | None = None  # of the last epoch; `None` without a test loader
    difference: float = math.nan  # greatest relative difference of a loss of any epoch from the first row of this run
    weights: str = ""  # digest of the weights and buffers
    optimizer: str = ""  # digest of the optimizer's state

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

    `name` is that of the user's run function, or `None` for the built-in ones; `num_processes` are the numbers of CPU
    processes to try besides 1; most cases have the same `num_micro_batches`.
    """
    several = sorted({number for number in num_processes if number > 1})
    fixed, free = (name, name) if name else BUILT_IN
    cases = _with_fixed_cut(Case(fixed, 1, num_micro_batches), several, None)
    # Random layers draw other numbers on another kind of device, so a GPU is compared with the first GPU.
    first_gpu = Case(fixed, 1, num_micro_batches, gpu=0)
    for gpu in range(num_gpus):
        case = first_gpu if gpu == 0 else replace(first_gpu, gpu=gpu, promise="rounding", reference=first_gpu)
        cases += _with_fixed_cut(case, [num_gpus] if num_gpus > 1 and gpu == 0 else [], "all")
    # Other cuts: a user's run may look at the micro-batch or at chance, the built-in one does not.
    whole = Case(free, 1, 1, promise="cut", reference=cases[0]) if name else Case(free, 1, 1)
    same = replace(whole, promise="rounding", reference=whole.reference or whole)
    cases += [whole, replace(same, num_micro_batches=3)]
    cases += [replace(same, num_processes=number, num_micro_batches=None) for number in several]
    cases += [replace(same, num_processes=number, num_micro_batches=number + 3) for number in several[:1]]
    return cases + [replace(same, gpu=gpu, promise="device") for gpu in range(num_gpus)]


def _with_fixed_cut(first: Case, numbers: list[int], gpu_of_several: str | None) -> list[Case]:
    """Return the cases of one kind of device: both strengths on one and several processes, divided too, and bf16."""
    rounding = replace(first, promise="rounding", reference=first)
    exact = replace(rounding, bitwise=True)
    low = replace(exact, precision="bf16", promise="precision")

    def on(numbers: list[int], case: Case) -> list[Case]:
        return [replace(case, num_processes=number, gpu=gpu_of_several) for number in numbers]

    as_exact = replace(exact, promise="bits", reference=exact)
    cases = [first, *on(numbers, rounding), exact, replace(as_exact, is_again=True), *on(numbers, as_exact)]
    cases += [*on(numbers[:1], replace(rounding, sharding="full")), *on(numbers, replace(as_exact, sharding="full"))]
    return [*cases, low, *on(numbers[:1], replace(low, promise="bits", reference=low))]


# What is set whatever the config of the run function says: by each case, and for all of them.
_OF_CASE = ("num_micro_batches", "bitwise", "mixed_precision", "sharding")
_OF_ALL = ("num_epochs", "max_steps", "seed", "restore_best", "run_dir", "verbose")


def run_here(name: str, config: TrainConfig, recording: dict[str, Any] | None) -> dict[str, Any]:
    """Run a case in this process, one of its group, and return what is compared.

    `recording` has the arguments of the `Recorder`; `None` records nothing.
    """
    with contextlib.redirect_stdout(sys.stderr):
        choices = {field: getattr(config, field) for field in (*_OF_CASE, *_OF_ALL)}
        arguments, loaders = call_run_function(name, config, choices)
        recorder = Recorder(**recording or {})
        trainer = Trainer(**arguments) if recording is None else RecordedTrainer(recorder, **arguments)
        started = time.perf_counter()
        history = trainer.fit(loaders["train_loader"], loaders.get("test_loader"))
        seconds = time.perf_counter() - started
    if not history.num_epochs:
        raise RuntimeError(f"no epoch was finished ({history.stop_reason}), so there is nothing to compare")
    return {
        "seconds": seconds,
        "train_losses": history.train_losses,
        "test_losses": history.test_losses,
        "metrics": history.metrics,
        "weights": digest(trainer.model.state_dict()),
        "optimizer": digest(trainer.optimizer.state_dict()),  # type: ignore[union-attr]
        "is_double": any(parameter.dtype == torch.float64 for parameter in trainer.model.parameters()),
        "trace": recorder.trace,
        "kept": recorder.kept,
        "doubts": list(trainer.doubts.values()),
    }


@dataclass
class Parity:
    """Run cases in processes of their own and compare them."""

    config: TrainConfig  # what the run function is given; layout and precision are set per case
    announce: Callable[[str], None] = lambda text: None  # called with a line before each case
    timeout: float | None = None  # seconds that a case may take; `None` for no limit

    def rows(self, cases: list[Case]) -> Iterator[Row]:
        """Yield the row of each case, in order.

        Raises:
            ProcessFailedError: The first case fails: the run function itself does not work.
        """
        results: dict[Case, dict[str, Any]] = {}
        for case in cases:
            self.announce(f"{case.device}, {case.layout} ...")
            try:
                result = results[case] = self.run(case)
            except ProcessFailedError as error:
                if not results:
                    raise
                reason = _REFUSED.search(str(error)) if case.sharding is not None else None
                found = (False, "FAILED", str(error)) if reason is None else (None, _NOT_DIVIDED, reason[1])
                yield Row(case, *found)
                continue
            first = next(results[other] for other in results if other.run == case.run)
            row = Row(
                case,
                *self._judge(case, result, results),
                seconds=result["seconds"],
                train_loss=result["train_losses"][-1],
                test_loss=result["test_losses"][-1] if result["test_losses"] else None,
                difference=_greatest_difference(first, result, _LOSSES),
                weights=result["weights"],
                optimizer=result["optimizer"],
            )
            yield row
            if case.promise == "cut" and not row.kept:
                return  # nothing is promised of the cases that follow

    def run(self, case: Case, recording: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the result of the main process of a case, with the traces of all processes."""
        choices: dict[str, Any] = {"num_micro_batches": case.num_micro_batches, "bitwise": case.bitwise}
        choices |= {"mixed_precision": case.precision, "sharding": case.sharding}
        config = replace(self.config, **choices)
        environment = {"ACCELERATE_USE_CPU": "true"} if case.gpu is None else {}
        if isinstance(case.gpu, int):
            environment["CUDA_VISIBLE_DEVICES"] = str(case.gpu)
        arguments = case.num_processes, run_here, case.run, config, recording
        results: list[dict[str, Any]] = run_on_processes(*arguments, environment=environment, timeout=self.timeout)
        main, *others = results
        differences = [first_divergence(main["trace"], other["trace"], 0.0, same_cut=False) for other in others]
        main["agrees"] = all(other["weights"] == main["weights"] for other in others)
        main["divergence"] = min(filter(None, differences), key=lambda found: found.position.step, default=None)
        for other in others:
            main["trace"] = other["trace"] | main["trace"]
        return main

    def _judge(
        self, case: Case, result: dict[str, Any], results: dict[Case, dict[str, Any]]
    ) -> tuple[bool | None, str, str]:
        """Return whether the promise is kept, the same in words, and where it is broken."""
        if case.reference is None:
            return None, "reference", ""
        reference = results.get(case.reference)
        if reference is None:
            return False, "not compared", "The row it is compared with failed."
        if not result["agrees"]:
            return False, "BROKEN: the processes part", self._explain(case, 0.0)
        if case.promise == "bits":
            if all(repr(reference[name]) == repr(result[name]) for name in _COMPARED):  # nan equals nan
                return True, "same bits", ""
            return False, "BROKEN: other bits", self._explain(case, 0.0)
        promise = "rounding" if case.promise == "cut" else case.promise
        tolerance = TOLERANCES[promise][result["is_double"]]
        of_losses = _greatest_difference(reference, result, _LOSSES)
        of_metrics = _greatest_difference(reference["metrics"], result["metrics"], reference["metrics"])
        if of_losses <= tolerance and of_metrics <= _METRIC_TOLERANCE[promise]:
            return True, f"within {promise} ({tolerance:g})", ""
        if case.promise == "cut" and result["doubts"]:
            return False, f"BROKEN: {of_losses:.1e}, no mean", " ".join(result["doubts"])
        if case.promise == "cut":
            return None, f"no promise: {max(of_losses, of_metrics):.1e}", _ON_THE_CUT
        explanation = self._explain(case, tolerance)
        if _SCALED_UP in explanation or _MULTIPLIED in explanation:
            return None, f"no promise: {of_losses:.1e}", explanation
        if of_losses > tolerance:
            return False, f"BROKEN: {of_losses:.1e} > {tolerance:g}", explanation
        return False, f"BROKEN: a metric by {of_metrics:.1e}", explanation

    # --- where they differ --------------------------------------------------------------------------------------------

    def _explain(self, case: Case, tolerance: float) -> str:
        """Run a case and its reference once more, recorded, and say where they first differ."""
        self.announce("  differs; running both again to find where ...")
        try:
            return self._first_difference(case, tolerance, *self._run_both(case))
        except ProcessFailedError as error:
            return f"It could not be found out where: {str(error).splitlines()[0]}"

    def _run_both(self, case: Case, look_at: int | None = None) -> list[dict[str, Any]]:
        """Return the recorded results of the reference of a case and of the case itself."""
        return [self.run(both, {"look_at": look_at}) for both in (case.reference, case)]  # type: ignore[arg-type]

    def _first_difference(self, case: Case, tolerance: float, one: dict[str, Any], other: dict[str, Any]) -> str:
        if other["divergence"] is not None:
            found = other["divergence"]
            return f"{_where(found)}: {_what(found)} differs between the processes of this run."
        if not other["agrees"]:
            return "The processes part after the last step: does a callback change the model?"
        # A fault is far above rounding; a drift is below the promise's own bound in every single step.
        for bound in [10 * tolerance, tolerance, 0.1 * tolerance] if tolerance else [0.0]:
            found = first_divergence(one["trace"], other["trace"], bound, case.has_same_cut)
            if found is not None:
                return self._describe(case, found, bound, one, other)
        metrics = one["metrics"], other["metrics"]
        names = ", ".join(name for name in one["metrics"] if _greatest_difference(*metrics, [name]) > tolerance)
        if names:
            return f"All steps and test losses agree, but not the metric {names}: does it look at the process?"
        return "Run again, the two do not differ: something depends on time or on chance."

    def _describe(self, case: Case, found: Divergence, bound: float, one: dict[str, Any], other: dict[str, Any]) -> str:
        """Say where two runs differ, and what to look at."""
        kind, step = found.position.kind, found.position.step
        if bound and kind in ("loss", "gradient") and step > 1:
            wrong = self._wrong_step(case, step, other)
            if wrong is None:
                return f"{_where(found)}: {_MULTIPLIED}. {_MULTIPLIED_HINT}"
            if wrong[0] > step:
                hint = _KINDS["gradient"][1]
                return f"step {wrong[0]}: from equal weights the gradient differs by {wrong[1]:.1e}. {hint}"
        if kind in ("loss", "gradient") and case.has_same_cut:
            # A fault of a module may be smaller in the loss than in what it does to the gradients.
            first, second = self._run_both(case, step)
            module = first_divergence(first["trace"], second["trace"], bound / 10, same_cut=True)
            found = module if module is not None and module.position.kind == "module" else found
        kind, name, hint = found.position.kind, found.position.name, _KINDS[found.position.kind][1]
        if kind == "gradient" and not case.has_same_cut:
            hint = "Micro-batches of other sizes cannot be compared: look at a row with as many of them."
        if kind == "weights" and step == 0:
            hint = "Does make_run look at the process, or draw from a generator of its own?"
        elif kind == "weights" and bound:
            differences = gradient_differences(one["trace"], other["trace"], step)
            own = differences.get(name, 0.0)
            if own > 1e-3 and own > 1000 * differences[""]:  # its gradient is only rounding
                return f"{_where(found)}: {_SCALED_UP} {name}. {_SCALED_UP_HINT}"
        size = "" if "batch" in kind else f" by {found.difference:.1e} (relative)"
        before = f" What comes before agrees to {bound:g}." if bound else " What comes before has the same bits."
        return f"{_where(found)}: {_what(found)} differs{size}.{before} {hint}"

    def _wrong_step(self, case: Case, first: int, other: dict[str, Any]) -> tuple[int, float] | None:
        """Return the first of some steps in which the reference, given the weights of a case, finds other gradients."""
        steps = range(first, first + _NUM_STEPS)
        kept = self.run(case, {"keeps": range(first - 1, first + _NUM_STEPS - 1)})["kept"]
        again = self.run(case.reference, {"puts": kept})  # type: ignore[arg-type]
        differences = ((step, gradient_differences(again["trace"], other["trace"], step)[""]) for step in steps)
        return next((found for found in differences if found[1] > _SAME_STEP[other["is_double"]]), None)


_REFUSED = re.compile(r"\b(?:ValueError|HardwareError): (.*)")  # of a model or an optimizer that cannot be divided
_NOT_DIVIDED = "cannot be divided"
_NUM_STEPS = 8  # that are made again from equal weights
_SAME_STEP = 2e-6, 1e-14  # gradients at equal weights, in single and in double precision
_MULTIPLIED = "from equal weights both make the same step, but the run multiplies rounding"
_MULTIPLIED_HINT = (
    "A ReLU or max-pooling that switches does that, and so does BatchNorm over few samples: no fault, but no promise "
    "of the last digits either. Use bitwise=True for those."
)
_SCALED_UP = "only rounding differs until the optimizer scales it up in"
_SCALED_UP_HINT = (
    "Its true gradient is zero, as that of a bias before BatchNorm is, and an optimizer that divides by the gradient's "
    "size, such as Adam, makes full steps of the rest. Leave it out (bias=False), or use bitwise=True."
)
_ON_THE_CUT = (
    "The run depends on the cut already on one process, so other numbers of micro-batches are not compared. BatchNorm, "
    "dropout, augmentation and losses over pairs of samples do that. If there are none, the loss is not a mean over "
    "its samples: see weight_fn."
)
_DATA_HINT = "Does the dataset draw from a generator of its own, or look at the process?"
# Kind of a position -> what differs, and what to look at.
_KINDS = {
    "batch": ("the batch content", _DATA_HINT),
    "test batch": ("the content of a test batch", _DATA_HINT),
    "module": ("the output of {}", "Does it look at the process, or keep a state outside its buffers?"),
    "loss": (
        "the loss",
        "So do the batch and the outputs of all modules. Does the loss look at the process, or keep a state?",
    ),
    "test loss": ("the test loss", "Does the model or the loss look at the process in an evaluation, or keep a state?"),
    "gradient": ("the gradient of {}", "So do all losses. Does a hook change it, or is it averaged per process?"),
    "buffer": ("the buffer {}", "So do the gradients. Does something outside the forward change it?"),
    "weights": ("the weight {}", "So do the gradients. Does the optimizer or a callback look at the process?"),
}


def _what(found: Divergence) -> str:
    return _KINDS[found.position.kind][0].format(found.position.name or "the model")


def _where(found: Divergence) -> str:
    position = found.position
    if position.step == 0:
        return "before the first step"
    part = f", micro-batch {position.micro_batch}" if position.micro_batch >= 0 else ""
    # What follows in a forward from a module that differs, differs too.
    others = f" (and {found.num_others} more there)" if found.num_others and position.kind != "module" else ""
    return f"{'after ' if position.kind.startswith('test') else ''}step {position.step}{part}{others}"


_LOSSES = ("train_losses", "test_losses")
_COMPARED = (*_LOSSES, "metrics", "weights", "optimizer")


def _greatest_difference(one: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str]) -> float:
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
                difference = abs(a - b) / max(abs(a), floor, 1e-300)
                greatest = max(greatest, difference if math.isfinite(difference) else math.inf)
        if len(one[name]) != len(other[name]):
            return math.inf
    return greatest
