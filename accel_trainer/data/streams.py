"""Streams that cannot be addressed: read by the main process for all, or each part of the shards by one process.

Read by shards, a stream of the `datasets` library has as many parts as a batch has micro-batches: micro-batch i of
every batch is what comes next from part i. So the batches do not depend on the number of processes, and a process opens
only the parts of its own micro-batches. A part that has ended makes the batches to come smaller.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from ..base.exchange import gather_objects, host_group, scatter_from_main, share_object
from .collated import aligned, compact, count_samples, pinned, take
from .cut import Layout, Piece, cut, num_forwards, process_of, run_of
from .randomness import DATA, SeededIterator, derive_seed, generators_kept, seed_all
from .workers import loader_of_parcels, read_from_workers, sheltered

_TOGETHER = 64  # rows of a table that are read in one go at first, if a micro-batch has fewer ...
_TOGETHER_BYTES = 2**20  # ... and then as many as have this size, up to 16 times as many
UNDIVIDED = "Do not divide the data over the processes (split_dataset_by_node): the trainer divides each batch."

# --- read by the main process -----------------------------------------------------------------------------------------


def read_by_main(loader: DataLoader[Any], seed: int, epoch: int, first_batch: int, is_main: bool) -> Iterator[Any]:
    """Yield the batches of a pass (1-based) from a batch (0-based) on, on the main process; the others get none."""
    set_epoch(loader.dataset, epoch - 1)
    if not is_main:
        return iter(())
    with sheltered(loader):
        read = read_from_workers(SeededIterator(loader, derive_seed(seed, DATA, epoch)))
    return itertools.islice(read, first_batch, None)


def num_samples_in(held: list[Any], may_be_pair: bool) -> int | TypeError | None:
    """Return the samples of the one batch of a list, an error where it does not tell them; `None` without a batch."""
    if not held:
        return None
    error = TypeError(
        "A batch of a stream must tell how many samples it holds: give its targets, or all of its tensors, one entry "
        "per sample in their first dimension."
    )
    num_samples = count_samples(held[0], may_be_pair=may_be_pair)
    return error if num_samples is None else num_samples


def divided(held: list[Any], num_samples: int, layout: Layout) -> list[Any]:
    """Return the micro-batches of this process out of a batch; all call it.

    Args:
        held: The batch, as the only entry, on the main process; anything on the others.
        num_samples: Its samples.
        layout: This process and the cut.
    """
    parts = []
    for process in range(layout.num_processes) if layout.process == 0 else ():
        pieces = cut(num_samples, layout._replace(process=process))
        parts.append([_part_of(held[0], piece, num_samples) for piece in pieces])
    if layout.num_processes == 1:
        return parts[0]
    own: list[Any] = scatter_from_main(compact(parts))
    return own


def _part_of(samples: Any, piece: Piece, num_samples: int) -> Any:
    return samples if piece.is_whole else take(samples, piece.start, piece.stop, num_samples)


# --- read by shards ---------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What one part of a stream gives to a batch: a micro-batch."""

    place: int  # of the micro-batch in the batch
    num_rows: int  # that were read; 0 once the part has ended
    data: Any  # collated; `None` without rows
    state: Any  # from which the part of the next batch is read; `None` where it cannot be found again
    size: int = 0  # samples, which a collate function may have made more or fewer than the rows


class _Reader(IterableDataset[list[Part]]):
    """Read some parts of a stream, batch after batch, without an end; picklable, since loader workers run it."""

    def __init__(self, loader: DataLoader[Any], num_parts: int, indices: Sequence[int], seed: int) -> None:
        self._dataset: Any = loader.dataset
        self._collate, self._seed = loader.collate_fn, seed
        self._num_parts, self._indices = num_parts, indices
        sizes = cut(loader.batch_size, Layout(0, 1, num_parts))
        self._sizes = [piece.stop - piece.start for piece in sizes]
        steps = list(_steps_of(loader.dataset))
        with_functions = [step for name, step in steps if name in _WITH_FUNCTIONS]
        self.is_plain = loader.collate_fn is default_collate and not with_functions
        self._is_table = not with_functions and steps[0][1].iter_arrow is not None and _gives_columns(loader.dataset)
        self._runs_again = not all(map(_maps_row_by_row, with_functions))
        self._is_seekable = all(name in _SEEKABLE for name, _ in steps)
        self._epoch, self._first_batch = 1, 0
        self._states: Mapping[int, Any] = {}

    def start(self, epoch: int, first_batch: int, states: Mapping[int, Any]) -> None:
        """Read a pass (1-based) from a batch (0-based) on next; `states` has those of the parts there, if known."""
        self._epoch, self._first_batch, self._states = epoch, first_batch, states

    def __iter__(self) -> Generator[list[Part]]:
        worker = get_worker_info()
        indices = self._indices if worker is None else self._indices[worker.id :: worker.num_workers]
        torch_worker._worker_info = None  # else `datasets` divides each part over the workers once more
        parts = [self._read(index) for index in indices]
        while True:
            yield [next(part) for part in parts]

    def _read(self, index: int) -> Generator[Part]:
        stream: Any = self._dataset.shard(num_shards=self._num_parts, index=index)
        stream.set_epoch(self._epoch - 1)
        state, is_seekable = self._states.get(index), self._is_seekable
        pieces = _pieces_of(stream, self._sizes[index], self._is_table, state)
        for number in itertools.count(0 if state is None else self._first_batch):
            drawn_from = self._seed_for(number, index)
            piece, state = next(pieces, (None, state))
            if drawn_from is not None and _state_of_generators() != drawn_from:
                is_seekable = False  # code that a state lets run again would draw from another seed
            if number >= self._first_batch:  # else the stream is read again, to be passed over
                num_rows, data = (0, None) if piece is None else _collated(piece, self._collate)
                yield Part(index, num_rows, data, state if is_seekable else None)

    def _seed_for(self, number: int, index: int) -> Any:
        """Seed what the user's functions draw for a micro-batch; return what the generators are then."""
        if self.is_plain:
            return None
        seed_all(derive_seed(self._seed, DATA, self._epoch, number, index))
        return _state_of_generators() if self._runs_again and self._is_seekable else None


class ShardedStream:
    """A stream of `datasets` that all processes read together, each the parts of its own micro-batches.

    Args:
        loader: The user's loader of it.
        layout: This process and the cut; it stays.
        seed: The user's seed.
        pin_memory: Copy each micro-batch to page-locked memory.
    """

    _NUM_KEPT = 3  # positions whose states are kept: the loop fetches one micro-batch ahead

    def __init__(
        self, loader: DataLoader[Any], layout: Layout, seed: int, pin_memory: bool, may_be_pairs: bool = True
    ) -> None:
        self._layout, self._pin_memory, self._may_be_pairs = layout, pin_memory, may_be_pairs
        indices = run_of(layout)
        self._reader = _Reader(loader, layout.num_micro_batches, indices, seed)
        self._workers: DataLoader[Any] | None = None
        if loader.num_workers and indices:
            number = min(loader.num_workers, len(indices))
            # Persistent workers would go on with the pass before.
            how = {"num_workers": number, "persistent_workers": False}
            self._workers = loader_of_parcels(loader, self._reader, None, pin_memory, **how)
        self._states: dict[tuple[int, int], dict[int, Any]] = {}
        self._open: tuple[tuple[int, int], Generator[list[Part]]] | None = None  # left within a pass, and where
        self._least = (loader.batch_size or 1) if loader.drop_last else 1  # rows of a batch

    def batches(self, epoch: int, first_batch: int) -> Generator[tuple[int, list[int], list[tuple[Part, bool]]]]:
        """Yield number, samples of each micro-batch, and the own micro-batches that have any; all processes iterate.

        A process without samples, in a batch or in a round, gets those of the first micro-batch that has any; the flag
        says that they are padding, which counts nothing.
        """
        portions, number = self._portions_from(epoch, first_batch), first_batch
        while True:
            parts = [self._counted(part) for part in next(portions)]
            rows, sizes = self._everywhere(parts)
            if sum(rows) < self._least:
                portions.close()
                return
            self._states[epoch, number + 1] = {part.place: part.state for part in parts if part.state is not None}
            for old in list(self._states)[: -self._NUM_KEPT]:
                del self._states[old]
            if any(sizes):
                try:
                    yield number, sizes, self._own(parts, sizes)
                except GeneratorExit:
                    self._open = (epoch, number + 1), portions  # an epoch may end within the pass
                    raise
            number += 1

    def _portions_from(self, epoch: int, first_batch: int) -> Generator[list[Part]]:
        """Return the own parts of each batch; where they were left, if that is the place."""
        left, self._open = self._open, None
        if left is not None and left[0] == (epoch, first_batch):
            return left[1]
        if left is not None:
            left[1].close()
        self._reader.start(epoch, first_batch, self._states.get((epoch, first_batch), {}))
        return self._portions()

    def _counted(self, part: Part) -> Part:
        if part.num_rows == 0:
            return part
        if part.data is None:
            raise TypeError("The collate function of a stream has returned None in place of a batch.")
        if self._reader.is_plain:
            return part._replace(size=part.num_rows)
        size = count_samples(part.data, part.num_rows, self._may_be_pairs)
        return part._replace(size=part.num_rows if size is None else size)

    def _own(self, parts: list[Part], sizes: list[int]) -> list[tuple[Part, bool]]:
        """Return the own micro-batches with samples, and padding where a process has none, each with whether it is."""
        layout, own = self._layout, {part.place: part for part in parts if part.size}
        filled = [index for index, size in enumerate(sizes) if size]
        number = num_forwards(filled[-1] + 1, layout)
        if layout.in_rounds:
            places = [place * layout.num_processes + layout.process for place in range(number)]
            needs_padding = len(filled) < number * layout.num_processes
        else:
            places = sorted(own) or [-1]
            needs_padding = len({process_of(index, layout) for index in filled}) < layout.num_processes
        if not needs_padding:
            return [(own[place], False) for place in places]
        owner = process_of(filled[0], layout)
        first = own[filled[0]] if owner == layout.process else None
        sent = share_object(None if first is None else first._replace(data=compact(first.data)), owner)
        return [(own.get(place, sent), place not in own) for place in places]

    def _portions(self) -> Generator[list[Part]]:
        """Yield the own parts of each batch."""
        if self._workers is None:
            read_here = iter(self._reader)
            while True:
                with nullcontext() if self._reader.is_plain else generators_kept():
                    parts = next(read_here)
                yield pinned(parts) if self._pin_memory else parts
        num_workers = self._workers.num_workers
        with closing(read_from_workers(iter(self._workers))) as parcels:
            while True:
                of_batch = itertools.islice(parcels, num_workers)
                yield sorted((part for parcel in of_batch for part in parcel.data), key=lambda part: part.place)

    def _everywhere(self, parts: list[Part]) -> tuple[list[int], list[int]]:
        """Return the rows and the samples of each micro-batch, of all processes."""
        if self._layout.num_processes == 1:
            return [part.num_rows for part in parts], [part.size for part in parts]
        counts = torch.zeros(2, self._layout.num_micro_batches, dtype=torch.int64)
        for part in parts:
            counts[0, part.place], counts[1, part.place] = part.num_rows, part.size
        torch.distributed.all_reduce(counts, group=host_group())
        rows, sizes = counts.tolist()
        return rows, sizes

    def states_at(self, epoch: int, number: int) -> list[Any] | None:
        """Return the state of each part at the start of a batch, `None` where one is not known; all call it."""
        found: dict[int, Any] = {}
        for states in gather_objects(self._states.get((epoch, number), {})):
            found |= states
        everything = range(self._layout.num_micro_batches)
        return [found[index] for index in everything] if found.keys() >= set(everything) else None

    def knows(self, epoch: int, number: int) -> bool:
        """Return whether this process's parts go on at the start of a batch without being read again."""
        return len(self._states.get((epoch, number), {})) == len(run_of(self._layout))

    def go_on_from(self, epoch: int, number: int, states: Sequence[Any]) -> None:
        """Take what `states_at` has returned, on any number of processes."""
        self._states = {(epoch, number): {index: states[index] for index in run_of(self._layout)}}


def check_by_shards(loader: DataLoader[Any], name: str, num_micro_batches: int) -> None:
    """Refuse a loader that cannot be read by shards.

    Raises:
        TypeError: Its dataset is no `datasets.IterableDataset`.
        ValueError: It has fewer shards than a batch has micro-batches, or a batch fewer samples.
    """
    dataset: Any = loader.dataset
    if not isinstance(loader.dataset, IterableDataset) or not type(dataset).__module__.startswith("datasets."):
        raise TypeError(
            "stream_by_shards reads a datasets.IterableDataset, such as that of load_dataset(..., streaming=True); "
            f"{name} has a {type(dataset).__name__}."
        )
    if loader.batch_size is None or loader.batch_size < num_micro_batches:
        raise ValueError(
            f"stream_by_shards needs a batch_size of at least num_micro_batches={num_micro_batches}; that of {name} is "
            f"{loader.batch_size}."
        )
    if dataset.num_shards < num_micro_batches:
        raise ValueError(
            f"stream_by_shards needs a shard for each of num_micro_batches={num_micro_batches}; {name} has "
            f"{dataset.num_shards}. Give it more files, or dataset.reshard(), or set a smaller num_micro_batches."
        )
    if getattr(dataset, "_formatting", None) is not None and dataset._formatting.is_table:
        raise ValueError(f"{name} gives whole tables: use with_format('torch'), 'numpy' or None.")
    if is_part(dataset):
        raise ValueError(f"{name} is a part of a stream. {UNDIVIDED}")
    if any(step in ("TakeExamplesIterable", "SkipExamplesIterable") for step, _ in _steps_of(dataset)):
        raise ValueError(
            f"{name} has a take() or skip(), which stream_by_shards would apply to each group of shards: choose files "
            "for it, or leave stream_by_shards out."
        )


def can_be_sharded(loader: DataLoader[Any], num_micro_batches: int) -> bool:
    """Return whether `check_by_shards` has nothing against a loader."""
    try:
        check_by_shards(loader, "", num_micro_batches)
    except (TypeError, ValueError):
        return False
    return True


# Steps of a stream of `datasets` that go on exactly from a state; what others keep, as a shuffle buffer, is not in it.
_SEEKABLE = frozenset(
    f"{name}Iterable"
    for name in (
        *("Examples", "ArrowExamples", "RebatchedArrowExamples", "SelectColumns", "MappedExamples", "FilteredExamples"),
        *("FormattedExamples", "VerticallyConcatenatedMultiSourcesExamples", "RepeatExamples"),
    )
)
_MAPPED = "MappedExamplesIterable"
_WITH_FUNCTIONS = frozenset({_MAPPED, "FilteredExamplesIterable", "ExamplesIterable"})  # the last: a generator


def _maps_row_by_row(step: Any) -> bool:
    """Return whether a function runs for a row when that is read, and for no other: so its draws are the row's."""
    is_waited_for = not inspect.iscoroutinefunction(getattr(step, "function", None))
    return type(step).__name__ == _MAPPED and not step.batched and step.iter_arrow is None and is_waited_for


def _gives_columns(dataset: Any) -> bool:
    """Return whether columns have the numbers of the rows: NumPy's format has others for single numbers."""
    formatting = getattr(dataset, "_formatting", None)
    return formatting is None or formatting.format_type == "torch"


def _steps_of(dataset: Any) -> Iterator[tuple[str, Any]]:
    """Yield kind and object of each step of a stream of `datasets`."""
    pending = [getattr(dataset, "_ex_iterable", None)]
    for step in pending:
        yield type(step).__name__, step
        inner = getattr(step, "ex_iterable", None)
        pending += [*([] if inner is None else [inner]), *getattr(step, "ex_iterables", ())]


def _pieces_of(stream: Any, size: int, is_table: bool, state: Any) -> Iterator[tuple[list[Any] | dict[str, Any], Any]]:
    """Yield so many rows at a time, from a state on, and the state behind them.

    A table yields columns, of several pieces at once where they are small: that is many times faster. A state is that
    of the stream, `None` at its start, and how many pieces are to be passed over from there.
    """
    before, num_passed = state or (None, 0)
    if before is not None:
        stream.load_state_dict(before)
    if not is_table:
        rows = iter(stream)
        while piece := list(itertools.islice(rows, size)):
            yield piece, (stream.state_dict(), 0)
        return
    for columns in _chunks_of(stream, size):
        for number, start in enumerate(range(0, len(next(iter(columns.values()))), size), 1):
            if num_passed:
                num_passed -= 1
                continue
            part = slice(start, start + size)
            yield {name: _rows_of(column, part) for name, column in columns.items()}, (before, number)
        before = stream.state_dict()


def _rows_of(column: Any, part: slice) -> Any:
    return aligned(column[part]) if isinstance(column, torch.Tensor) else column[part]


def _chunks_of(stream: Any, size: int) -> Iterator[dict[str, Any]]:
    """Yield the columns of many rows at a time, a multiple of `size`: of more than the first time if they are small."""
    number = max(1, _TOGETHER // size)
    chunks = stream.iter(batch_size=size * number)
    columns = next(chunks, None)
    if columns is None:
        return
    yield columns
    if all(isinstance(column, torch.Tensor) for column in columns.values()):
        num_bytes = sum(column.nbytes for column in columns.values()) // number
        larger = min(_TOGETHER_BYTES // max(1, num_bytes), 16 * number)
        if larger > number:
            stream.load_state_dict(stream.state_dict())
            chunks = stream.iter(batch_size=size * larger)
    yield from chunks


def _collated(piece: list[Any] | dict[str, Any], collate: Callable[[Any], Any]) -> tuple[int, Any]:
    """Return how many rows there are, and the rows collated."""
    if isinstance(piece, list):
        return len(piece), collate(piece)
    columns, size = piece, len(next(iter(piece.values())))
    if collate is default_collate and all(isinstance(column, torch.Tensor) for column in columns.values()):
        return size, columns
    rows = zip(*columns.values(), strict=True)
    return size, collate([dict(zip(columns, row, strict=True)) for row in rows])


def _state_of_generators() -> Any:
    _, keys, *others = numpy.random.get_state()
    return random.getstate(), bytes(keys), others, bytes(torch.get_rng_state().numpy())  # type: ignore[arg-type]


def description_of(loader: DataLoader[Any]) -> str | None:
    """Return the steps of a stream of `datasets`, and a digest of its sources and shuffles; `None` for other data."""
    dataset: Any = loader.dataset
    if not isinstance(loader.dataset, IterableDataset) or not hasattr(dataset, "_ex_iterable"):
        return None
    steps = list(_steps_of(dataset))
    sources = [list(_told(getattr(step, "kwargs", None))) for _, step in steps]
    generators = [str(step.generator.bit_generator.state) for _, step in steps if hasattr(step, "generator")]
    functions = [getattr(getattr(step, "function", None), "__qualname__", "") for _, step in steps]
    digest = hashlib.sha256(repr((sources, generators, functions)).encode()).hexdigest()[:8]
    names = (name.removesuffix("Iterable").removesuffix("Examples") or "Generated" for name, _ in reversed(steps))
    return f"{' > '.join(names)}, {dataset.num_shards} shards, {digest}"


def _told(value: Any) -> Iterator[Any]:
    """Yield the plain values in the arguments of a source; of a path its name, since hosts may mount it elsewhere."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from _told(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _told(part)
    elif isinstance(value, (str, os.PathLike)):
        yield os.path.basename(value)
    elif isinstance(value, (int, float, bytes, bool, type(None))):
        yield value


# --- streams of streams -----------------------------------------------------------------------------------------------


def set_epoch(dataset: Any, epoch: int) -> None:
    """Set the epoch (0-based) of a stream, or of the streams that it is made of."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
        return
    for stream in _made_of(dataset):
        set_epoch(stream, epoch)


def is_part(dataset: Any) -> bool:
    """Return whether a stream of the `datasets` library, or a part of it, has been divided over processes."""
    num_parts = getattr(getattr(dataset, "_distributed", None), "world_size", 1)
    return num_parts > 1 or (isinstance(dataset, IterableDataset) and any(map(is_part, _made_of(dataset))))


def _made_of(dataset: Any) -> list[Dataset[Any]]:
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    return [part for part in inner if isinstance(part, Dataset)] if isinstance(inner, (list, tuple)) else []
