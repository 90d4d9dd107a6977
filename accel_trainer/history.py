"""What a run has measured, epoch by epoch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from .base.codec import checked, unpack
from .base.tracebacks import ends_in_users_lines

# Name of a value of one epoch -> the attribute of `History` that has all of them.
SERIES = {
    "train_loss": "train_losses",
    "test_loss": "test_losses",
    "learning_rate": "learning_rates",
    "grad_norm": "grad_norms",
}
PARTS_OF_EPOCH = ("data_seconds", "compute_seconds", "evaluation_seconds", "saving_seconds")
_KINDS = ("metrics", "train_metrics")  # several values of one epoch, by name
SERIES |= {name: name for name in ("samples_per_second", "epoch_seconds", *PARTS_OF_EPOCH)}


@dataclass
class History:
    """Losses, metrics and decisions of a run; the same on every process but for the seconds.

    Attributes:
        train_losses: Mean loss over the samples of each epoch, under the weights that each batch met.
        test_losses: Loss of the whole test set under the weights at the end of each epoch; empty without one.
        learning_rates: Learning rate of the last update of each epoch (first parameter group).
        grad_norms: Mean over the steps of each epoch of the gradient's norm before clipping; empty
            without `max_grad_norm`.
        metrics: Name of each metric, and of each scalar of `compute_loss` -> its value on the test set per epoch.
        train_metrics: Name of each scalar of `compute_loss` -> its mean over the samples of each epoch.
        epoch_steps: Optimizer updates of the run done at the end of each epoch.
        steps: The steps, 1-based, after which the loss was read back: one in `report_every`.
        step_losses: Mean train loss over the steps since the one before, or since the start of the epoch.
        step_learning_rates: Learning rate of each parameter group in the updates of these steps.
        samples_per_second: Train samples of each epoch, over all processes, per second of waiting for data and
            computing.
        epoch_seconds: Seconds that each epoch took, from the end of the epoch before to its own end; the time of a save
            after an epoch counts for the next epoch, and after the last for none.
        data_seconds: Seconds of each epoch in which the training waited for data.
        compute_seconds: Seconds of each epoch in which it computed, the time of callbacks included.
        evaluation_seconds: Seconds of each epoch in which it evaluated the test set.
        saving_seconds: Seconds of each epoch in which it stood still to save best weights and checkpoints.
        best_epoch: The epoch whose weights are the best, 1-based; `None` if no epoch has a finite value.
        best_value: Monitored value of the best epoch.
        stop_reason: Why the run ended, in words; `None` while it goes on.

    Example:
        >>> history = History()
        >>> history.record(train_loss=0.5, test_loss=0.6, learning_rate=0.1, epoch_seconds=2.0)
        >>> history.test_losses
        [0.6]
    """

    train_losses: list[float] = field(default_factory=list)
    test_losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    train_metrics: dict[str, list[float]] = field(default_factory=dict)
    epoch_steps: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    step_learning_rates: list[list[float]] = field(default_factory=list)
    samples_per_second: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    data_seconds: list[float] = field(default_factory=list)
    compute_seconds: list[float] = field(default_factory=list)
    evaluation_seconds: list[float] = field(default_factory=list)
    saving_seconds: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    best_value: float | None = None
    stop_reason: str | None = None

    @property
    def num_epochs(self) -> int:
        """Epochs recorded so far."""
        return len(self.train_losses)

    def record(
        self,
        *,
        metrics: dict[str, float] | None = None,
        train_metrics: dict[str, float] | None = None,
        step: int | None = None,
        **values: float | None,
    ) -> None:
        """Append one epoch; a value of `None` is left out."""
        if step is not None:
            self.epoch_steps.append(step)
        for name, value in values.items():
            if value is not None:
                getattr(self, SERIES[name]).append(value)
        for named, series in ((metrics, self.metrics), (train_metrics, self.train_metrics)):
            for name in dict.fromkeys([*series, *(named or ())]):  # nan in an epoch that has no value of this name
                known = series.setdefault(name, [math.nan] * (self.num_epochs - 1))
                known.append((named or {}).get(name, math.nan))

    def report(self, step: int, train_loss: float, learning_rates: Iterable[float]) -> None:
        """Append what was read back after a step."""
        loss, rates = float(train_loss), [float(rate) for rate in learning_rates]
        self.steps.append(int(step))
        self.step_losses.append(loss)
        self.step_learning_rates.append(rates)

    def note_best(self, epoch: int | None, value: float | None) -> None:
        """Record which epoch is the best so far, and its monitored value."""
        self.best_epoch, self.best_value = epoch, value

    def best_epochs(self, monitor: str, mode: str, number: int) -> list[int]:
        """Return the epochs, 1-based, with the best values of what is monitored, the best first; nan never is."""
        name = {"train_loss": "train_losses", "test_loss": "test_losses"}.get(monitor)
        values = self.metrics[monitor] if name is None else getattr(self, name)
        sign = 1 if mode == "min" else -1
        ranked = sorted((sign * value, epoch) for epoch, value in enumerate(values, start=1) if math.isfinite(value))
        return [epoch for _, epoch in ranked[:number]]

    def end(self, reason: str) -> None:
        """Record why the run has ended."""
        self.stop_reason = reason

    def restore(self, other: History) -> None:
        """Go on from the records of another history."""
        self.__dict__.update(vars(other))

    def last(self) -> dict[str, Any]:
        """Return what was recorded for the last epoch, by name."""
        row = {name: getattr(self, series)[-1] for name, series in SERIES.items() if getattr(self, series)}
        for kind in _KINDS:
            row[kind] = {name: series[-1] for name, series in getattr(self, kind).items()}
        return row

    def to_dict(self) -> dict[str, Any]:
        """Return everything as lists, dictionaries and numbers."""
        return asdict(self)

    @ends_in_users_lines
    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the losses into an image file; its ending chooses the format.

        Raises:
            ImportError: matplotlib is not installed; the message names the extra that brings it.
        """
        from .view.picture import draw_losses

        draw_losses(Path(path).expanduser(), self)

    def overfitting(self) -> str | None:
        """Return a sentence when the test loss has clearly risen since its lowest, else `None`.

        Clearly: the lowest was reached in the first 80 % of the epochs and at least 3 epochs ago, the test loss
        is now more than 2 % above it, and the train loss went on falling.
        """
        losses = self.test_losses
        if len(losses) < 4 or not all(map(math.isfinite, losses)):
            return None
        lowest = losses.index(min(losses))
        since = self.num_epochs - 1 - lowest
        risen = losses[-1] > losses[lowest] + 0.02 * abs(losses[lowest])
        fallen = self.train_losses[-1] < self.train_losses[lowest]
        if since < max(3, 0.2 * self.num_epochs) or not (risen and fallen):
            return None
        return (
            f"Overfitting: since epoch {lowest + 1} the test loss rose from {losses[lowest]:.4f} to {losses[-1]:.4f} "
            f"while the train loss fell from {self.train_losses[lowest]:.4f} to {self.train_losses[-1]:.4f}."
        )

    @classmethod
    @ends_in_users_lines
    def load(cls, run_dir: str | os.PathLike[str]) -> History:
        """Read the history of a run folder.

        A last line that was broken off while it was written is left out. Of `steps.jsonl`, from which nothing goes on,
        all lines are left out that are damaged.

        Raises:
            FileNotFoundError: The folder holds no `history.jsonl`.
            ValueError: A line is not as this package writes it; the message names the line.
        """
        path = Path(run_dir).expanduser() / "history.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"No history.jsonl in {Path(run_dir)}: is this a run_dir of a started run?")
        history = cls()
        *lines, broken_off = path.read_text(encoding="utf-8", errors="replace").split("\n")
        lines += [broken_off] if _goes_on(broken_off) else []
        for number, line in enumerate(lines, start=1):
            try:
                history._add(unpack(checked(json.loads(line))))
            except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is no line of a history: {error!r}.") from error
        history.load_steps(run_dir)
        return history

    def load_steps(self, run_dir: str | os.PathLike[str], last: int | None = None) -> None:
        """Add what `steps.jsonl` of a run folder holds, up to the step `last`; nothing without such a file."""
        try:
            text = (Path(run_dir).expanduser() / "steps.jsonl").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                row = unpack(checked(json.loads(line)))
                if last is None or row["step"] <= last:
                    self.report(**row)

    def _add(self, row: dict[str, Any]) -> None:
        """Record what a line of `history.jsonl` holds: an epoch, or the end of the run."""
        if "epoch" in row:
            metrics, train_metrics = (
                {name: float(value) for name, value in row.get(kind, {}).items()} for kind in _KINDS
            )
            values = {name: float(row[name]) for name in SERIES if name in row or name == "train_loss"}
            step = int(row["step"]) if "step" in row else None
            self.record(metrics=metrics, train_metrics=train_metrics, step=step, **values)
        self.best_epoch, best_value, self.stop_reason = map(row.get, ("best_epoch", "best_value", "stop_reason"))
        if type(self.best_epoch) not in (int, NoneType) or type(self.stop_reason) not in (str, NoneType):
            raise TypeError(f"best_epoch {self.best_epoch!r}, stop_reason {self.stop_reason!r}")
        self.best_value = None if best_value is None else float(best_value)


def _goes_on(line: str) -> bool:
    """Return whether something follows a whole record: then the end of the line is damaged, not unwritten."""
    try:
        return json.JSONDecoder().raw_decode(line)[1] < len(line)
    except (ValueError, RecursionError):
        return False
