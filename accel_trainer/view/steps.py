"""What a run has measured step by step, as `steps.jsonl` holds it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.codec import checked, unpack

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


def read_steps(run_dir: Path) -> Steps:
    """Read what is whole in `steps.jsonl`; lines that are broken, or no such lines, are left out.

    Where the run went back to a checkpoint, what it measured the second time counts.
    """
    rows: list[tuple[int, float | None, list[float | None]]] = []
    try:
        lines = (run_dir / "steps.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Steps()
    for line in lines:
        row = _row_of(line)
        while row is not None and rows and rows[-1][0] >= row[0]:
            rows.pop()
        rows += [] if row is None else [row]
    every = max(1, math.ceil(len(rows) / MOST_POINTS))
    rows = rows[::-1][::every][::-1]  # with the last one
    num_groups = max((len(rates) for _, _, rates in rows), default=0)
    of_groups = [[rates[group] if group < len(rates) else None for _, _, rates in rows] for group in range(num_groups)]
    return Steps([step for step, _, _ in rows], [loss for _, loss, _ in rows], of_groups)


def _row_of(line: str) -> tuple[int, float | None, list[float | None]] | None:
    try:
        row = json.loads(line)
        row = unpack(checked(row) if "checksum" in row else row)
        step, rates = row["step"], row.get("learning_rates", [])
        if type(step) is not int or step < 1 or not isinstance(rates, list):
            return None
        return step, _drawable(row.get("train_loss")), [_drawable(rate) for rate in rates]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _drawable(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None
