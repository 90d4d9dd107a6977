"""What a run has measured step by step, as curves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..history import History

MOST_POINTS = 2_000  # of a curve; of more steps, every second, third, ... is shown


@dataclass
class Steps:
    """Curves by step, each value `None` where there is none that can be drawn.

    Attributes:
        steps: Steps (1-based) that something was reported of, ascending.
        train_losses: Loss at each of them.
        learning_rates: For each parameter group, its learning rate at each of them.
    """

    steps: list[int] = field(default_factory=list)
    train_losses: list[float | None] = field(default_factory=list)
    learning_rates: list[list[float | None]] = field(default_factory=list)


def steps_of(history: History) -> Steps:
    """Return the curves by step of a history, of at most `MOST_POINTS` points, the last one among them."""
    every = max(1, math.ceil(len(history.steps) / MOST_POINTS))
    shown = range(len(history.steps) - 1, -1, -every)[::-1]
    rates = [history.step_learning_rates[place] for place in shown]
    num_groups = max(map(len, rates), default=0)
    return Steps(
        [history.steps[place] for place in shown],
        _drawable(history.step_losses[place] for place in shown),
        [_drawable(row[group] if group < len(row) else math.nan for row in rates) for group in range(num_groups)],
    )


def _drawable(values: Iterable[float]) -> list[float | None]:
    return [value if abs(value) < 1e300 else None for value in values]
