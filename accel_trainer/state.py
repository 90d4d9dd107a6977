"""Where a run stands: plain data that can be printed, saved and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class TrainState:
    """The position of a run and what it has decided so far.

    Attributes:
        epoch: The epoch under way or just finished, 1-based; 0 before the first.
        step: Optimizer updates that really happened.
        num_batches: Batches trained on, including those whose update was skipped.
        num_skipped: Batches whose update was skipped because loss or gradient was not finite.
        data_pass: The pass over the data that is under way, 1-based.
        position: Batches of this pass that are done.
        best_epoch: The epoch of the best monitored value, 1-based; `None` while no value was finite.
        best_value: Monitored value of the best epoch.
        num_bad_epochs: Epochs in a row without improvement.
        recent_loss: Mean train loss over the steps since the last report, for display.
        finished: Why a callback has ended the run; `None` if none has.
    """

    epoch: int = 0
    step: int = 0
    num_batches: int = 0
    num_skipped: int = 0
    data_pass: int = 1
    position: int = 0
    best_epoch: int | None = None
    best_value: float | None = None
    num_bad_epochs: int = 0
    recent_loss: float = math.nan
    finished: str | None = None

    def restore(self, values: Mapping[str, Any]) -> None:
        """Set each attribute to its saved value."""
        for name, value in values.items():
            setattr(self, name, value)

    def start_epoch(self) -> None:
        """Count the next epoch."""
        self.epoch += 1

    def note_best(self, epoch: int | None, value: float | None) -> None:
        """Record which epoch is the best so far, and its monitored value."""
        self.best_epoch, self.best_value = epoch, value

    def update_best(self, value: float, mode: str, min_delta: float) -> bool:
        """Compare the monitored value of this epoch with the best, and return whether it is better; nan never is."""
        worst = math.inf if mode == "min" else -math.inf
        best = worst if self.best_value is None else self.best_value
        improved = value < best - min_delta if mode == "min" else value > best + min_delta
        if improved:
            self.best_epoch, self.best_value, self.num_bad_epochs = self.epoch, value, 0
        else:
            self.num_bad_epochs += 1
        return improved
