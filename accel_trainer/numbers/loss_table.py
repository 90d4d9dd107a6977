"""Losses and metrics of an epoch, summed over micro-batches and processes in one order."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from ..data.cut import process_of
from ..data.micro_batches import Batch, MicroBatch
from .objective import Forward
from .scalars import column_of, widest_float


@dataclass(frozen=True)
class Fault:
    """A train loss that is not finite.

    Attributes:
        value: The loss.
        batch: Number of its batch, in the run.
        process: Index of the process that has computed it.
        places: Pass over the data, 1-based, and index in it, 0-based, of the batch and of the one before.
    """

    value: float
    batch: int
    process: int
    places: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Totals:
    """The means of an epoch, equal on every process, its samples, and the first loss in it that is not finite."""

    loss: float
    metrics: dict[str, float]
    num_samples: int
    fault: Fault | None


class _Rows(NamedTuple):
    """The rows of one batch in a loss table: one for each of its micro-batches, on whichever process."""

    number: int
    data_pass: int
    batch: Batch
    first_row: int

    @property
    def end(self) -> int:
        """Behind its last row."""
        return self.first_row + self.batch.num_micro_batches


class LossTable:
    """Collect loss and weight of every micro-batch on the device; add them up over processes and batches.

    They are the rows of one table, in the order of the batches, of which each process fills in its own; the others
    are zero there, so that a sum over the processes is exact. The rows are then added up in double precision and in
    their order: every process gets the same numbers, and the layout changes no more than the rounding of the single
    losses. What has been read is kept as sums only.

    Args:
        device: Where the losses are.
        metrics: Names of the metrics whose totals will be added.
        copies: Whether the memory of a loss is written to again before it is read (CUDA graphs).
    """

    _BLOCK = 512  # scalars joined into one tensor at a time: one alone costs half a kilobyte

    def __init__(self, device: torch.device, metrics: Sequence[str] = (), copies: bool = False) -> None:
        self._device, self._metrics, self._copies = device, tuple(metrics), copies
        self._batches: list[_Rows] = []  # those since the last read
        self._open: list[tuple[Any, ...]] = []  # row, loss, weight, samples, then a total per metric
        self._blocks: list[tuple[list[int], Tensor]] = []  # rows, and their columns
        self._sums = _Sums(len(self._metrics))
        self._before: list[_Rows] = []  # the last one of those read
        self.fault: Fault | None = None

    def restart(self) -> None:
        """Begin an epoch."""
        self._batches, self._open, self._blocks = [], [], []
        self._sums, self.fault = _Sums(len(self._metrics)), None

    def start_batch(self, number: int, batch: Batch, data_pass: int = 1) -> None:
        """Make room for a batch; every process begins each of them, in the same order.

        Args:
            number: Of the batch, in the run.
            batch: The batch.
            data_pass: Pass over the data, 1-based.
        """
        if len(self._open) >= self._BLOCK:
            self._close()
        self._batches.append(_Rows(number, data_pass, batch, self._batches[-1].end if self._batches else 0))

    def add(self, micro_batch: MicroBatch, forward: Forward, totals: Sequence[float | Tensor] = ()) -> None:
        """Take in a micro-batch of the batch under way; padding leaves no trace.

        Args:
            micro_batch: The micro-batch.
            forward: Its loss and weight.
            totals: Sum of each metric over its samples, in the order of the names.
        """
        if not micro_batch.piece.is_padding:
            row = self._batches[-1].first_row + micro_batch.piece.index
            loss, weight = forward.loss.detach(), forward.weight
            if self._copies:
                loss, weight = loss.clone(), weight.clone() if isinstance(weight, Tensor) else weight
            self._open.append((row, loss, weight, micro_batch.num_samples, *totals))

    def drop_batch(self) -> None:
        """Forget the batch under way, which will be done again."""
        first_row = self._batches.pop().first_row
        while self._open and self._open[-1][0] >= first_row:
            self._open.pop()

    def is_finite(self) -> bool | Tensor:
        """Return whether the losses of the last batch are finite on this process; those that weigh nothing may not."""
        flag: bool | Tensor = True
        for row, loss, weight, *_ in reversed(self._open):
            if row < self._batches[-1].first_row:
                break
            if isinstance(weight, Tensor):
                flag = flag & (loss.isfinite() | (weight == 0))
            elif weight:
                flag = flag & loss.isfinite()
        return flag

    def _close(self) -> None:
        """Join the scalars that have come into one tensor, on the device."""
        if self._open:
            rows, losses, *others = zip(*self._open, strict=True)
            joined = torch.stack([column_of(column, losses[0].device) for column in (losses, *others)])
            self._blocks.append((list(rows), joined.to(self._device)))
            self._open = []

    def _table(self) -> Tensor:
        """Return loss, weight, samples and totals, shape `(columns, rows)`, of all processes; one exchange."""
        self._close()
        blocks, self._blocks = self._blocks, []
        several = self._batches[-1].batch.layout.num_processes > 1
        if blocks and not several:
            return torch.cat([block for _, block in blocks], dim=1)
        shape = len(self._sums.all), self._batches[-1].end
        table = torch.zeros(*shape, dtype=widest_float(self._device), device=self._device)
        for rows, block in blocks:
            table[:, rows] = block
        if several:
            torch.distributed.all_reduce(table)
        return table

    def _read(self) -> None:
        """Add up what has come since the last read: one exchange, and one read-back."""
        if not self._batches:
            return
        losses, weights, sizes, *totals = self._table().tolist()
        if min(weights, default=0.0) < 0:
            batch, process = self._origin_of(next(row for row, weight in enumerate(weights) if weight < 0))
            where = f"in batch {batch}, on process {process}"
            raise ValueError(f"The weight of a micro-batch must be at least 0 and below 1e30; {where}, it was not.")
        products = [loss * weight if weight else 0.0 for loss, weight in zip(losses, weights, strict=True)]
        self._sums.add(sizes, products, weights, *totals)
        if self.fault is None and not math.isfinite(self._sums.all[1]):
            self.fault = self._first_fault(losses, weights)
        self._before, self._batches = self._batches[-1:], []

    def _first_fault(self, losses: list[float], weights: list[float]) -> Fault | None:
        for row, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
            if weight and not math.isfinite(loss):
                number, process = self._origin_of(row)
                known = {one.number: (one.data_pass, one.batch.number) for one in (*self._before, *self._batches)}
                return Fault(loss, number, process, tuple(known[at] for at in (number, number - 1) if at in known))
        return None

    def _origin_of(self, row: int) -> tuple[int, int]:
        """Return the number of the batch that a row is of, and the process that has computed it."""
        rows = next(rows for rows in reversed(self._batches) if rows.first_row <= row)
        return rows.number, process_of(row - rows.first_row, rows.batch.layout)

    def sums(self) -> list[float]:
        """Return what `restore` takes, the same on all processes; all call it at the same place."""
        self._read()
        return list(self._sums.all)

    def restore(self, sums: Sequence[float]) -> None:
        """Go on from what `sums` returned, before anything is added."""
        self._sums = _Sums(len(self._metrics), sums)

    def report(self) -> float:
        """Return the mean loss since the last report.

        Every process calls it after the same step. Costs one small exchange, and one read-back.
        """
        self._read()
        return self._sums.mean_since_last_report()

    def exchange(self) -> Totals:
        """Return the means over all micro-batches of all processes; waits for the device."""
        count, loss, weight, *totals = self.sums()
        metrics = {name: _mean(total, count) for name, total in zip(self._metrics, totals, strict=True)}
        return Totals(_mean(loss, weight), metrics, int(count), self.fault)


class _Sums:
    """Sums over the rows that have been read, in their order.

    Args:
        num_metrics: Number of metrics.
        before: What was added up before; `None` for nothing.

    Attributes:
        all: Of samples, loss x weight, weights, and the total of each metric, since the start of the epoch.
    """

    def __init__(self, num_metrics: int, before: Sequence[float] | None = None) -> None:
        self.all = [0.0] * (3 + num_metrics) if before is None else [float(number) for number in before]
        self._recent = 0.0, 0.0  # of loss x weight, and weights, since the last report

    def add(self, *columns: Sequence[float]) -> None:
        """Add rows, given as columns."""
        self.all = [functools.reduce(add, column, total) for total, column in zip(self.all, columns, strict=True)]
        product, weight = self._recent
        self._recent = functools.reduce(add, columns[1], product), functools.reduce(add, columns[2], weight)

    def mean_since_last_report(self) -> float:
        """Return the mean loss of the rows added since this was asked last."""
        recent, self._recent = self._recent, (0.0, 0.0)
        return _mean(*recent)


class MeanNorm:
    """The mean over the steps of an epoch of the gradient's norm, on the device until it is read."""

    def __init__(self) -> None:
        self._total: Any = 0.0
        self._number = 0

    def restore(self, total: float, number: int) -> None:
        """Go on from what `read` returned."""
        self._total, self._number = total, number

    def add(self, norm: Tensor) -> None:
        """Add the norm of a step."""
        self._total = self._total + norm.to(widest_float(norm.device))
        self._number += 1

    def is_finite(self) -> bool:
        """Return whether all norms are; one read-back if there are any."""
        return math.isfinite(self._total)

    def read(self) -> tuple[float, int]:
        """Return sum and number; one read-back."""
        return float(self._total), self._number

    def mean(self) -> float | None:
        """Return the mean; `None` without any."""
        total, number = self.read()
        return total / number if number else None


def _mean(total: float, weight: float) -> float:
    return total / weight if weight else math.nan
