"""What the user chooses for a run. No facts about the machine."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .base.console import did_you_mean
from .base.tracebacks import ends_in_users_lines

if TYPE_CHECKING:
    Names = Sequence[str]
    Folder = str | os.PathLike[str]
else:  # as far as OmegaConf and HfArgumentParser know types; any sequence and path is taken
    Names = list[str]
    Folder = str

# Those of accelerate.tracking; a test compares.
TRACKER_NAMES = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The user's choices for one run; checked when it is made.

    Args:
        num_epochs: Passes over the train loader, at least 1.
        max_steps: Optimizer steps after which the run ends, at least 1; `None` sets no such limit.
        steps_per_epoch: Steps that make one epoch of the history (evaluate, record, save), at least 1;
            `None` makes an epoch one pass over the train loader.
        patience: Epochs in a row without improvement after which the run stops, at least 1; `None` never stops.
        min_delta: How much better than the best a value must be to count as improvement, at least 0,
            in the unit of the monitored value.
        monitor: What chooses the best epoch: `test_loss`, `train_loss` or the name of a metric.
            Without a test loader `test_loss` means the train loss.
        mode: Whether a smaller (`min`) or a larger (`max`) monitored value is better. `None` is `min` for a loss, and
            what a torchmetrics object says of itself; for any other metric it has to be given.
        num_micro_batches: Pieces that each batch is cut into, at least 1; `None` cuts one per process.
            More pieces than processes is gradient accumulation. With a fixed number, models with dropout or
            BatchNorm too give the same run on any number of processes. With `None` a batch that does not fit in
            memory is cut finer.
        bitwise: Let not one bit of losses and weights depend on the number of processes: fixed order of sums,
            deterministic kernels. `num_micro_batches` is then 8 unless given.
        sharding: Divide the model over the processes, where it is too large for one device: weights, gradients and
            optimizer state over all of them (`full`), or over those of each host, with a replica on each (`hybrid`).
            `None` does what `accelerate launch --use_fsdp --fsdp_version 2` says, else nothing. Needs
            `num_micro_batches` (or `bitwise`). The model stays divided after `fit`.
        num_threads: Threads inside one operation on the CPU, at least 1, for the length of the run; `None` keeps
            the present number, or takes 1 with `bitwise`, whose bits depend on it.
        mixed_precision: `no`, `bf16`, `fp16` or `fp8`; `None` takes what `accelerate launch` says, else `no`.
        compile: Compile the model with `torch.compile`: the whole, or with `"regional"` its repeated blocks, which
            takes less time at the start. `accelerate launch --dynamo_backend` does the same with other compilers.
            The short last batch of a pass is not compiled.
        stream_by_shards: Whether a stream (`datasets.IterableDataset`) is read by its shards: micro-batch i of each
            batch comes from the i-th of `num_micro_batches` groups of shards, and each process opens only its own.
            Its batches are others than without, the same on any number of processes. Without, the main process
            reads it, as it does a test set with too few shards.
        data_in_memory: Whether tables of numbers (`datasets.Dataset`) are made tensors once, and tensors are kept on
            the GPU: `"auto"` where they fit easily, never data with a transform; `True` insists, `False` never.
        max_grad_norm: Clip the gradient of each step to this global norm, greater than 0; `None` does not clip.
        schedule_every: Whether the scheduler steps once per optimizer `step` or once per `epoch`.
            `ReduceLROnPlateau` always steps per epoch.
        seed: Decides the order of the samples, dropout and augmentation; from 0 to 2**63 - 1.
        restore_best: Give the model the weights of the best epoch at the end; false keeps the last.
        run_dir: Folder for config, history, best weights, checkpoints and picture; `None` writes nothing.
        resume: `False` for a new run; `True` to go on from the newest valid checkpoint of `run_dir`; `"auto"` to do
            so where there is one and to begin anew where there is none.
        checkpoint_every: Steps between two checkpoints, at least 1, or minutes as `"10min"`; `None` makes one at
            the end of each epoch. The end of the run makes one too.
        keep_checkpoints: Checkpoints that stay, at least 1; the best weights are kept apart from them.
        keep_best: Epochs whose weights stay, at least 1: the best, and with 2 or more also the next best by the
            monitored value, in `best/epoch_00000007.safetensors` and the like.
        report_every: Steps between two read-backs of the loss, for the bar and the check for non-finite values.
        time_limit_seconds: Stop at the first step after this many seconds, greater than 0; `None` sets no limit.
        heartbeat_seconds: How long, with several hosts, one of them may give no sign of life, at least 5: all others
            then end and name it. A process that is stopped (SIGSTOP, a debugger) is waited for, and named once.
        on_nonfinite: When the train loss or the gradient becomes nan or infinite: `raise` an error within
            `report_every` steps; `skip` the update of that batch, which costs one read-back per step; or `ignore` it.
            The history shows it.
        find_unused_parameters: Set it when a step can leave some parameters without a gradient that
            had one in the first step. Costs the overlap of communication and backward.
        trackers: Experiment trackers that log the run, by Accelerate's names: `tensorboard`, `wandb`, `trackio`,
            `mlflow`, ... They are given the loss every `report_every` steps, and each epoch. A run that goes on from a
            checkpoint goes on in them too; one that fails is left out with a warning.
        project: What the trackers call project or experiment.
        verbose: Print the hardware, a line per epoch and the end of the run, on the main process.

    Raises:
        ValueError: A value is out of its range; the message names the field, its range and the value.

    Example:
        >>> TrainConfig(num_epochs=20, patience=3).patience
        3
    """

    num_epochs: int = 50
    max_steps: int | None = None
    steps_per_epoch: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    monitor: str = "test_loss"
    mode: Literal["min", "max"] | None = None
    num_micro_batches: int | None = None
    bitwise: bool = False
    sharding: Literal["full", "hybrid"] | None = None
    num_threads: int | None = None
    mixed_precision: Literal["no", "fp16", "bf16", "fp8"] | None = None
    compile: Literal[True, False, "regional"] = False
    stream_by_shards: bool = False
    data_in_memory: Literal[True, False, "auto"] = "auto"
    max_grad_norm: float | None = None
    schedule_every: Literal["step", "epoch"] = "step"
    seed: int = 0
    restore_best: bool = True
    run_dir: Folder | None = None
    resume: Literal[True, False, "auto"] = False
    checkpoint_every: int | str | None = None
    keep_checkpoints: int = 2
    keep_best: int = 1
    report_every: int = 50
    time_limit_seconds: float | None = None
    heartbeat_seconds: float = 30.0
    on_nonfinite: Literal["raise", "skip", "ignore"] = "raise"
    find_unused_parameters: bool = False
    trackers: Names = field(default_factory=tuple)
    project: str = "accel_trainer"
    verbose: bool = True

    @ends_in_users_lines
    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _as_python(value))
        every = self.checkpoint_every
        if isinstance(every, str) and every.isdecimal():  # HfArgumentParser leaves a number a text
            object.__setattr__(self, "checkpoint_every", int(every))
        for names, required, is_right in _REQUIREMENTS:
            for name in names:
                value = getattr(self, name)
                may_be_left_out = value is None and getattr(TrainConfig, name) is None
                if not may_be_left_out and not is_right(value):
                    raise ValueError(f"{name} must be {required}, got {_shown(value)}.")
        check_tracker_names(self.trackers)
        object.__setattr__(self, "trackers", tuple(self.trackers))
        if self.bitwise and self.mixed_precision == "fp8":
            raise ValueError("bitwise=True cannot be had with mixed_precision='fp8', whose scales the processes share.")
        if self.stream_by_shards and self.num_micro_batches is None:
            raise ValueError("stream_by_shards needs num_micro_batches: so many groups of shards are read.")
        in_folder = {"resume": self.resume, "checkpoint_every": self.checkpoint_every, "keep_best": self.keep_best > 1}
        for name, is_set in in_folder.items():
            if is_set and self.run_dir is None:
                raise ValueError(f"{name} needs a run_dir, where checkpoints and weights are.")


def check_with_sharding(config: TrainConfig) -> None:
    """Refuse (ValueError) what a model that is divided over the processes cannot be trained with."""
    if config.num_micro_batches is None and not config.bitwise:
        raise ValueError(
            "With sharding num_micro_batches must be given: no process can try smaller micro-batches where memory runs "
            "out, since the others wait for it. Set it to the number of processes, or a multiple of it."
        )
    if config.compile is True:
        raise ValueError("With sharding only the repeated blocks can be compiled: use compile='regional'.")


def _as_python(value: Any) -> Any:
    """Return a number of NumPy, or of another library of arrays, as Python's own."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def _is_too_large(value: object) -> bool:
    return isinstance(value, int) and abs(value) >= 2**63


def _is_whole(value: object) -> bool:
    return type(value) is int and not _is_too_large(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_too_large(value)


def _is_patient(value: Any) -> bool:
    return _is_number(value) and 5 <= value < math.inf


def _is_interval(value: Any) -> bool:
    """Return whether a value is a number of steps, or minutes such as "10min"."""
    minutes = re.fullmatch(r"(\d+(?:\.\d+)?)min", str(value))
    return float(minutes[1]) > 0 if minutes else _is_whole(value) and value >= 1


def _shown(value: object) -> str:
    """Return a value for a message; Python refuses to print a number of thousands of digits."""
    return "a number of more than 64 bits" if _is_too_large(value) else repr(value)


def _one_of(*choices: Any) -> tuple[str, Callable[[Any], bool]]:
    """Return how a message names these choices, and the function that says whether a value is one of them."""

    def is_right(value: Any) -> bool:
        return any(isinstance(value, type(choice)) and value == choice for choice in choices)

    *first, last = map(repr, choices)
    return f"{', '.join(first)} or {last}", is_right


_POSITIVE = ("max_grad_norm", "time_limit_seconds")
_COUNTS = ("num_epochs", "report_every", "keep_checkpoints", "keep_best")
_OPTIONAL_COUNTS = ("max_steps", "steps_per_epoch", "patience", "num_micro_batches", "num_threads")
# Fields, what they must be (None too, where it is the default), and whether a value is that; checked in this order.
_REQUIREMENTS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (_COUNTS, "a whole number", _is_whole),
    (_OPTIONAL_COUNTS, "a whole number or None", _is_whole),
    (_COUNTS + _OPTIONAL_COUNTS, "at least 1", lambda value: value >= 1),
    (("seed",), "a whole number from 0 to 2**63 - 1", lambda value: _is_whole(value) and value >= 0),
    (("min_delta",), "a number of at least 0 and finite", lambda value: _is_number(value) and 0 <= value < math.inf),
    (_POSITIVE, "a number greater than 0 (or None)", lambda value: _is_number(value) and value > 0),
    (("heartbeat_seconds",), "a number of at least 5, and finite", _is_patient),
    (("bitwise", "stream_by_shards", "restore_best", "find_unused_parameters", "verbose"), *_one_of(True, False)),
    (("compile",), *_one_of(True, False, "regional")),
    (("data_in_memory", "resume"), *_one_of(True, False, "auto")),
    (("mode",), *_one_of("min", "max", None)),
    (("sharding",), *_one_of("full", "hybrid", None)),
    (("mixed_precision",), *_one_of("no", "fp16", "bf16", "fp8", None)),
    (("schedule_every",), *_one_of("step", "epoch")),
    (("on_nonfinite",), *_one_of("raise", "skip", "ignore")),
    (("monitor",), "a name", lambda value: isinstance(value, str)),
    (("project",), "a name", lambda value: isinstance(value, str) and value != ""),
    (("run_dir",), "a path or None", lambda value: isinstance(value, (str, os.PathLike))),
    (("checkpoint_every",), "steps, minutes such as '10min', or None", _is_interval),
)


def check_tracker_names(names: Sequence[str]) -> None:
    """Refuse what is not a list of names that Accelerate knows; the message names the nearest known name."""
    is_list = isinstance(names, Sequence) and not isinstance(names, (str, bytes))
    if not is_list or not all(isinstance(name, str) for name in names):
        raise ValueError(f"trackers must be a list of names, such as ['tensorboard'], got {names!r}.")
    for name in names:
        if name not in TRACKER_NAMES:
            known = ", ".join(TRACKER_NAMES)
            raise ValueError(f"trackers must be among {known}, got {name!r}.{did_you_mean(name, TRACKER_NAMES)}")
