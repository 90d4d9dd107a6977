"""Losses and metrics of an epoch, summed over micro-batches and processes in one order."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from ..base.exchange import gather_objects
from ..data.cut import process_of
from ..data.micro_batches import Batch, MicroBatch
from .forward import Forward
from .scalars import column_of, widest_float


@dataclass(frozen=True)
class Fault:
    """A train loss that is not finite."""

    value: float
    batch: int  # number of its batch in the run, 1-based
    process: int
    # Pass over the data, 1-based, and index in it, 0-based, of the batch and of the batch before it.
    places: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Totals:
    """The means of an epoch, equal on every process, its samples, and the first loss in it that is not finite."""

    loss: float
    metrics: dict[str, float]
    num_samples: int
    fault: Fault | None
    scalars: dict[str, float] = field(default_factory=dict)


class _Rows(NamedTuple):
    """The rows of one batch in a loss table, one for each of its micro-batches, on whichever process."""

    number: int
    data_pass: int
    batch: Batch
    first_row: int

    @property
    def end(self) -> int:
        """Index behind its last row."""
        return self.first_row + self.batch.num_micro_batches


_COLUMNS = ("samples", "loss", "weight")  # then the metrics, then the scalars
_METRIC, _SCALAR = "metric ", "scalar "  # before their names


class _Scalars:
    """The names of the scalars that come with the losses: the same for each micro-batch, on all processes."""

    def __init__(self, are_agreed: bool) -> None:
        self.names: tuple[str, ...] | None = None  # `None` until the first micro-batch
        self.are_agreed = are_agreed

    def values_of(self, scalars: Mapping[str, float | Tensor], copies: bool) -> list[float | Tensor]:
        """Return scalars in the order of their names, which the first ones decide."""
        if self.names is None:
            self.names = tuple(sorted(scalars))
        _check_same(self.names, scalars)
        values = [scalars[name] for name in self.names]
        return [value.clone() if copies and isinstance(value, Tensor) else value for value in values]

    def agree(self) -> None:
        """Let processes that have computed nothing learn the names from the others; all call it at the same point."""
        first, *others = [names for names in gather_objects(self.names) if names is not None] or [None]
        for names in others:
            _check_same(first or (), names or ())
        self.names, self.are_agreed = first, True


def _check_same(first: Iterable[str], now: Iterable[str]) -> None:
    if set(first) != set(now):
        before, after = (", ".join(names) or "none" for names in (first, now))
        raise ValueError(
            f"compute_loss must return the same scalars for each micro-batch: first {before}, now {after}."
        )


class LossTable:
    """Collect loss and weight of every micro-batch on the device; add them up over processes and batches.

    They are the rows of one table, in the order of the batches. Each process fills in its own rows and leaves zeros in
    the others, so that a sum over the processes is exact. The rows are then added up in double precision and in their
    order: every process gets the same numbers, and the layout changes only the rounding of the single losses. Rows that
    have been read are kept as sums only. `has_scalars` says that losses may come with scalars, `copies` that the memory
    of a loss is written to again before it is read (CUDA graphs).
    """

    _BLOCK = 512  # scalars joined into one tensor at a time: a single one costs half a kilobyte

    def __init__(
        self, device: torch.device, metrics: Sequence[str] = (), has_scalars: bool = False, copies: bool = False
    ) -> None:
        self._device, self._copies = device, copies
        self._scalars = _Scalars(are_agreed=not has_scalars)
        self._sums = dict.fromkeys((*_COLUMNS, *(_METRIC + name for name in metrics)), 0.0)
        self._batches: list[_Rows] = []  # since the last read, and the last one read: its rows are negative
        self.restart()

    def restart(self) -> None:
        """Begin an epoch."""
        self._batches = [rows for rows in self._batches if rows.first_row < 0]
        self._open: list[tuple[Any, ...]] = []  # row, loss, weight, samples, a total per metric, scalars
        self._blocks: list[tuple[list[int], Tensor]] = []  # rows, and their columns
        self.fault: Fault | None = None
        self._recent = 0.0, 0.0  # sums of loss x weight, and of weights, since the last report
        self._sums = dict.fromkeys(self._sums, 0.0)

    def restore(self, sums: Mapping[str, float], recent: Sequence[float]) -> None:
        """Go on from what `sums` and `recent` returned, before anything is added."""
        self._sums |= {name: float(number) for name, number in sums.items()}
        self._scalars.names = tuple(self._sums_of(_SCALAR)) or self._scalars.names
        self._recent = float(recent[0]), float(recent[1])

    def _sums_of(self, prefix: str) -> dict[str, float]:
        """Return the sums of the metrics, or of the scalars, by name."""
        return {key.removeprefix(prefix): total for key, total in self._sums.items() if key.startswith(prefix)}

    def start_batch(self, number: int, batch: Batch, data_pass: int = 1) -> None:
        """Make room for a batch, the `number`-th of the run; every process begins each batch, in the same order."""
        if len(self._open) >= self._BLOCK:
            self._close()
        self._batches.append(_Rows(number, data_pass, batch, self._batches[-1].end if self._batches else 0))

    def add(self, micro_batch: MicroBatch, forward: Forward, totals: Sequence[float | Tensor] = ()) -> None:
        """Add a micro-batch of the present batch, and the sum of each metric over its samples; ignore padding."""
        if not micro_batch.piece.is_padding:
            row = self._batches[-1].first_row + micro_batch.piece.index
            loss, weight = forward.loss.detach(), forward.weight
            if self._copies:
                loss, weight = loss.clone(), weight.clone() if isinstance(weight, Tensor) else weight
            self._open.append((row, loss, weight, micro_batch.num_samples, *totals))
        if forward.scalars is not None:
            values = self._scalars.values_of(forward.scalars, self._copies)
            if not micro_batch.piece.is_padding:
                self._open[-1] += tuple(values)

    def drop_batch(self) -> None:
        """Forget the present batch, which will be computed again."""
        first_row = self._batches.pop().first_row
        while self._open and self._open[-1][0] >= first_row:
            self._open.pop()

    def is_finite(self) -> bool | Tensor:
        """Return whether the losses of the last batch are finite on this process; those of weight 0 do not count."""
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
        """Join the scalars collected since the last block into one tensor, on the device."""
        if self._open:
            rows, losses, *others = zip(*self._open, strict=True)
            joined = torch.stack([column_of(column, losses[0].device) for column in (losses, *others)])
            self._blocks.append((list(rows), joined.to(self._device)))
            self._open = []

    def _table(self) -> Tensor:
        """Return loss, weight, samples, totals, scalars, shape `(columns, rows)`, of all processes; one exchange."""
        self._close()
        blocks, self._blocks = self._blocks, []
        several = self._batches[-1].batch.layout.num_processes > 1
        if several and not self._scalars.are_agreed:
            self._scalars.agree()
        self._sums |= {_SCALAR + name: 0.0 for name in self._scalars.names or () if _SCALAR + name not in self._sums}
        if blocks and not several:
            return torch.cat([block for _, block in blocks], dim=1)
        shape = len(self._sums), self._batches[-1].end
        table = torch.zeros(*shape, dtype=widest_float(self._device), device=self._device)
        for rows, block in blocks:
            table[:, rows] = block
        if several:
            torch.distributed.all_reduce(table)
        return table

    def _read(self) -> None:
        """Add up the rows since the last read: one exchange, and one read-back."""
        if not self._batches or self._batches[-1].end == 0:
            return
        losses, weights, sizes, *others = self._table().tolist()
        if min(weights, default=0.0) < 0:
            batch, process = self._origin_of(next(row for row, weight in enumerate(weights) if weight < 0))
            where = f"in batch {batch}, on process {process}"
            raise ValueError(f"The weight of a micro-batch must be at least 0 and below 1e30; {where}, it was not.")
        num_scalars = len(self._scalars.names or ())
        totals, scalars = others[: len(others) - num_scalars], others[len(others) - num_scalars :]
        products, *of_scalars = (_products(values, weights) for values in (losses, *scalars))
        columns = sizes, products, weights, *totals, *of_scalars
        self._sums = {
            name: functools.reduce(add, column, total)
            for (name, total), column in zip(self._sums.items(), columns, strict=True)
        }
        product, weight = self._recent
        self._recent = functools.reduce(add, products, product), functools.reduce(add, weights, weight)
        if self.fault is None and not math.isfinite(self._sums["loss"]):
            self.fault = self._first_fault(losses, weights)
        last = self._batches[-1]
        self._batches = [last._replace(first_row=-last.batch.num_micro_batches)]

    def _first_fault(self, losses: list[float], weights: list[float]) -> Fault | None:
        for row, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
            if weight and not math.isfinite(loss):
                number, process = self._origin_of(row)
                known = {rows.number: (rows.data_pass, rows.batch.number) for rows in self._batches}
                return Fault(loss, number, process, tuple(known[at] for at in (number, number - 1) if at in known))
        return None

    def _origin_of(self, row: int) -> tuple[int, int]:
        """Return the number of the batch that a row belongs to, and the process that has computed it."""
        rows = next(rows for rows in reversed(self._batches) if rows.first_row <= row)
        return rows.number, process_of(row - rows.first_row, rows.batch.layout)

    def sums(self) -> dict[str, float]:
        """Return the sums since the start of the epoch, the same on all processes; all call it at the same point.

        They are of samples, of loss x weight, of weights, of the totals of each metric, and of scalar x weight.
        """
        self._read()
        return dict(self._sums)

    @property
    def recent(self) -> tuple[float, float]:
        """Sums of loss x weight, and of weights, from the last report to the last read."""
        return self._recent

    def report(self) -> float:
        """Return the mean loss since the last report.

        Every process calls it after the same step. Costs one small exchange, and one read-back.
        """
        self._read()
        recent, self._recent = self._recent, (0.0, 0.0)
        return _mean(*recent)

    def exchange(self) -> Totals:
        """Return the means over all micro-batches of all processes; waits for the device."""
        self._read()
        count, loss, weight = (self._sums[name] for name in _COLUMNS)
        metrics = {name: _mean(total, count) for name, total in self._sums_of(_METRIC).items()}
        scalars = {name: _mean(total, weight) for name, total in self._sums_of(_SCALAR).items()}
        return Totals(_mean(loss, weight), metrics, int(count), self.fault, scalars)


class MeanNorm:
    """The mean over the steps of an epoch of the gradient's norm, on the device until it is read."""

    def __init__(self) -> None:
        self.restore(0.0, 0)

    def restore(self, total: Any, number: int) -> None:
        """Go on from what `read` returned."""
        self._total, self._number = total, number

    def add(self, norm: Tensor) -> None:
        """Add the norm of a step."""
        self._total = self._total + norm.to(widest_float(norm.device))
        self._number += 1

    def is_finite(self) -> bool:
        """Return whether all norms are finite; one read-back if there are any."""
        return math.isfinite(self._total)

    def read(self) -> tuple[float, int]:
        """Return the sum of the norms, and their number; one read-back."""
        return float(self._total), self._number

    def mean(self) -> float | None:
        """Return the mean norm; `None` before the first."""
        total, number = self.read()
        return total / number if number else None


def _products(values: list[float], weights: list[float]) -> list[float]:
    """Return value x weight of each row; a value of weight 0, which may be anything, counts nothing."""
    return [value * weight if weight else 0.0 for value, weight in zip(values, weights, strict=True)]


def _mean(total: float, weight: float) -> float:
    return total / weight if weight else math.nan
