"""How a batch is cut into micro-batches, and which process computes which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Layout(NamedTuple):
    """How the work is divided: this process, of how many, and the micro-batches of a batch.

    Micro-batches are dealt in contiguous runs, or `in_rounds`: one to each process, then the next one to each, and so
    on. Every process then takes part in every round, as a model that is divided over the processes needs.
    """

    process: int
    num_processes: int
    num_micro_batches: int
    in_rounds: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """The samples `start:stop` of a batch as one micro-batch of this process.

    A process that has no samples of its own, in a batch or in a round, gets padding: it takes part in the collectives
    with the batch's first micro-batch, whose loss and gradient then have the weight 0.
    """

    index: int  # of the micro-batch in the batch, over all processes
    start: int
    stop: int
    is_padding: bool
    is_first: bool  # micro-batch of this process
    is_last: bool  # micro-batch of this process
    is_whole: bool  # whether it is the whole batch


@lru_cache(maxsize=1024)
def cut(num_samples: int, layout: Layout) -> tuple[Piece, ...]:
    """Return the micro-batches of this process for a batch of so many samples.

    The batch is cut into contiguous pieces whose sizes differ by at most one sample, larger pieces first; each process
    gets a contiguous run of pieces, with sizes by the same rule, or one in each round.

    Example:
        >>> [(piece.start, piece.stop) for piece in cut(10, Layout(process=0, num_processes=2, num_micro_batches=3))]
        [(0, 4), (4, 7)]
        >>> rounds = Layout(process=0, num_processes=2, num_micro_batches=3, in_rounds=True)
        >>> [(piece.start, piece.stop) for piece in cut(10, rounds)]
        [(0, 4), (7, 10)]
    """
    number = layout.num_micro_batches
    mine = [(index, *_bounds(num_samples, number, index), False) for index in run_of(layout) if index < num_samples]
    padding = (0, *_bounds(num_samples, number, 0), True)
    mine += [padding] * (num_forwards(min(num_samples, number), layout) - len(mine))
    last = len(mine) - 1
    return tuple(
        Piece(*piece, number == 0, number == last, piece[2] - piece[1] == num_samples)
        for number, piece in enumerate(mine)
    )


def num_forwards(num_filled: int, layout: Layout) -> int:
    """Return how many micro-batches of a batch each process computes at least, if so many of them have samples."""
    return -(-num_filled // layout.num_processes) if layout.in_rounds else 1


def run_of(layout: Layout) -> range:
    """Return the micro-batches that this process computes."""
    if layout.in_rounds:
        return range(layout.process, layout.num_micro_batches, layout.num_processes)
    return range(*_bounds(layout.num_micro_batches, layout.num_processes, layout.process))


def process_of(index: int, layout: Layout) -> int:
    """Return the process that computes a micro-batch."""
    if layout.in_rounds:
        return index % layout.num_processes
    size, num_larger = divmod(layout.num_micro_batches, layout.num_processes)
    beyond = index - num_larger * (size + 1)  # those of the larger runs
    return index // (size + 1) if beyond < 0 else num_larger + beyond // size


def _bounds(total: int, parts: int, part: int) -> tuple[int, int]:
    """Return start and end of one of the parts of a total; the first ones may be larger by one."""
    size, num_larger = divmod(total, parts)
    start = part * size + min(part, num_larger)
    return start, start + size + (part < num_larger)


def describe_batch(num_samples: int, layout: Layout) -> str:
    """Return the arithmetic of a batch in words.

    Example:
        >>> describe_batch(64, Layout(process=0, num_processes=2, num_micro_batches=4))
        'batch 64 = 2 processes x 2 micro-batches x 16'
    """
    factors = [
        _count(layout.num_processes, 1, "process"),
        _count(layout.num_micro_batches, layout.num_processes, "micro-batch"),
        _count(num_samples, layout.num_micro_batches, ""),
    ]
    return f"batch {num_samples} = {' x '.join(factors)}"


def _count(total: int, parts: int, noun: str) -> str:
    """Return the sizes of the parts of a total, with their noun."""
    sizes = {stop - start for start, stop in (_bounds(total, parts, part) for part in (0, parts - 1))}
    plural = f" {noun}{'es' if sizes != {1} else ''}" if noun else ""
    return " or ".join(str(size) for size in sorted(sizes, reverse=True)) + plural
