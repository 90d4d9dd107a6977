"""Order of the samples, position in it, and the cut of each batch into micro-batches.

A batch is what the user's loader says, whatever the number of processes. Every process draws the same batches of
indices, cuts each the same way, and fetches only its own pieces.
"""

from __future__ import annotations

import atexit
import copy
import itertools
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from .exchange import gather_objects, share_object
from .fetching import Rows, divide, mark_of, not_negative, pinned, rows_of
from .randomness import DATA, FETCH, ORDER, SeededIterator, derive_seed, seed_all

__all__ = [
    "TARGET_NAMES",
    "Feed",
    "Layout",
    "MicroBatch",
    "Piece",
    "check_loader",
    "count_samples",
    "cut",
    "describe_batch",
    "leaves_of",
    "length_of",
    "num_batches",
    "process_of",
    "run_of",
    "sampler_of",
    "take",
    "tensors_in",
]


class Layout(NamedTuple):
    """How the work is divided: this process, of how many, and the micro-batches of a batch."""

    process: int
    num_processes: int
    num_micro_batches: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The samples `start:stop` of a batch as one micro-batch of this process.

    `counts` is false for the stand-in of a process that is left without samples: it takes part in the collectives
    with the batch's first micro-batch, whose losses and gradients then weigh nothing. `is_first` and `is_last` say its
    place among those of this process, `is_whole` that it is the batch.
    """

    index: int
    start: int
    stop: int
    counts: bool
    is_first: bool
    is_last: bool
    is_whole: bool


@lru_cache(maxsize=1024)
def cut(num_samples: int, layout: Layout) -> tuple[Piece, ...]:
    """Return the micro-batches of this process for a batch of so many samples.

    The batch is cut into contiguous pieces whose sizes differ by at most one sample, the larger first; the pieces are
    dealt to the processes in contiguous runs of which the same holds.

    Example:
        >>> [(piece.start, piece.stop) for piece in cut(10, Layout(process=0, num_processes=2, num_micro_batches=3))]
        [(0, 4), (4, 7)]
    """
    bounds = _even_bounds(num_samples, layout.num_micro_batches)
    mine = [(index, *bounds[index], True) for index in run_of(layout) if bounds[index][0] < bounds[index][1]]
    mine = mine or [(0, *bounds[0], False)]
    last = len(mine) - 1
    return tuple(
        Piece(*piece, place == 0, place == last, piece[2] - piece[1] == num_samples) for place, piece in enumerate(mine)
    )


def run_of(layout: Layout) -> range:
    """Return the micro-batches that this process computes."""
    return range(*_even_bounds(layout.num_micro_batches, layout.num_processes)[layout.process])


def process_of(index: int, layout: Layout) -> int:
    """Return the process that computes a micro-batch."""
    return next(process for process in range(layout.num_processes) if index in run_of(layout._replace(process=process)))


def _even_bounds(total: int, parts: int) -> list[tuple[int, int]]:
    size, larger = divmod(total, parts)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    return list(pairwise(starts))


@dataclass(slots=True)
class MicroBatch:
    """One forward of this process.

    Attributes:
        data: What the user's collate function made of the samples.
        piece: Which samples of the batch they are.
        batch_size: Samples of the whole batch, over all processes.
        batch_number: Place of the batch in the pass over the data, 0-based.
        is_full: Whether the batch is as large as the loader's batches are; the last of a pass may be shorter.
        num_held: Samples in it where a collate function may have left out or added some; `None` if as many as asked.
    """

    data: Any
    piece: Piece
    batch_size: int
    batch_number: int
    is_full: bool = True
    num_held: int | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Number of the batch and index of the micro-batch in it: the order of the sums."""
        return self.batch_number, self.piece.index

    @property
    def num_samples(self) -> int:
        """Samples that count: 0 for a stand-in."""
        if not self.piece.counts:
            return 0
        return self.piece.stop - self.piece.start if self.num_held is None else self.num_held


# --- order ------------------------------------------------------------------------------------------------------------


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return what yields batches of indices."""
    return loader.batch_sampler if loader.batch_sampler is not None else loader.sampler


def index_batches(
    loader: DataLoader[Any], seed: int, epoch: int, first_batch: int = 0
) -> Iterator[torch.Tensor | Sequence[Any]]:
    """Yield the indices of each batch of this epoch: a pure function of (loader, seed, epoch).

    Args:
        loader: A loader of a map-style dataset.
        seed: The user's seed.
        epoch: Pass over the data, 1-based.
        first_batch: Where to begin, 0-based; a sampler that is not torch's own draws the indices before it too.
    """
    sampler = sampler_of(loader)
    inner = getattr(sampler, "sampler", sampler)
    for stateful in (sampler, inner):
        if hasattr(stateful, "set_epoch"):
            stateful.set_epoch(epoch - 1)  # 0-based by torch's custom
    own = getattr(inner, "generator", None)
    path = (own.initial_seed() & (2**63 - 1),) if isinstance(own, torch.Generator) else ()
    seed = derive_seed(seed, ORDER, epoch, *path)
    order = _own_order(inner, seed) if type(sampler) is BatchSampler else None
    if order is None:
        # The generator of a sampler sits in the batch sampler or in the sampler inside.
        drawn = SeededIterator(sampler if own is None else _Drawing(sampler, own), seed)
        yield from itertools.islice(drawn, first_batch, None)
    else:
        size: int = sampler.batch_size
        end = len(order) - len(order) % size if sampler.drop_last else len(order)
        for start in range(first_batch * size, end, size):
            yield order[start : start + size]


def dataset_order(loader: DataLoader[Any]) -> Any:
    """Return a sampler of the samples that a loader reaches, each once, in the order of the dataset."""
    sampler = sampler_of(loader)
    inner = getattr(sampler, "sampler", sampler)
    if type(inner) in (SequentialSampler, RandomSampler, WeightedRandomSampler):
        return SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    drawn = list(SeededIterator(inner, 0))
    return sorted({index for item in drawn for index in (item if isinstance(item, (list, tuple)) else [item])})


class _Drawing:
    """A batch sampler shown together with the generator of the sampler inside it."""

    def __init__(self, sampler: Iterable[Any], generator: torch.Generator) -> None:
        self.sampler, self.generator = sampler, generator

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sampler)


def _own_order(sampler: object, seed: int) -> torch.Tensor | None:
    """Return the order of torch's two common samplers as one tensor, `None` for any other sampler."""
    if type(sampler) is SequentialSampler:
        return torch.arange(len(sampler.data_source))
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return torch.randperm(sampler.num_samples, generator=torch.Generator().manual_seed(seed))
    return None


# --- fetching ---------------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """What one micro-batch needs: its samples and the seed of what the dataset draws for them."""

    indices: Sequence[Any]
    seed: int


class _SeededDataset(Dataset[Any]):
    """Answer a request with the finished micro-batch; picklable, since loader workers run it."""

    def __init__(self, loader: DataLoader[Any], rows: Rows | None) -> None:
        self._dataset, self._collate, self._rows = loader.dataset, loader.collate_fn, rows
        self._answers_lists = loader.batch_sampler is None  # batch_size=None: the dataset takes a list of indices

    def __getitem__(self, request: _Request) -> Any:
        if self._rows is not None:
            return self._rows(torch.as_tensor(request.indices))
        seed_all(request.seed)
        return self._collate(self._items(request.indices))

    def _items(self, indices: Sequence[Any]) -> Any:
        if self._answers_lists:
            return self._dataset[indices]
        many = getattr(self._dataset, "__getitems__", None)
        return many(indices) if many else [self._dataset[index] for index in indices]


class _Parcel:
    """A micro-batch on its way from a loader worker; the thread of torch that pins memory asks it to do so itself."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def pin_memory(self) -> _Parcel:
        """Return it with what can be pinned in page-locked memory."""
        return _Parcel(pinned(self.data))


class _Requests:
    """The sampler of the loader with workers: what `start` gave it last."""

    def __init__(self) -> None:
        self.pending: Iterator[_Request] = iter(())

    def __iter__(self) -> Iterator[_Request]:
        return self.pending


class _WorkerInit:
    """Shelter a loader worker from signals that are meant for its parent, then do what the user asks for.

    Schedulers and terminals send them to whole groups of processes. The parent finishes its step and ends its workers;
    one that it does not end leaves 20 seconds later.
    """

    def __init__(self, user: Callable[[int], object] | None) -> None:
        self._user = user

    def __call__(self, worker: int) -> None:
        for name in ("SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _leave_soon)
        if self._user is not None:
            self._user(worker)


def _leave_soon(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_DFL)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 20.0)  # its signal ends the process


_loaders: WeakSet[DataLoader[Any]] = WeakSet()  # whose workers are sheltered


def _end_workers() -> None:
    """End persistent workers by the door: at its end multiprocessing would send them SIGTERM and wait."""
    for loader in list(_loaders):
        loader._iterator = None


atexit.register(_end_workers)  # what is registered last, after multiprocessing, runs first


def _read(iterator: Iterator[Any]) -> Generator[Any]:
    """Yield what loader workers bring, and end them all where one has been killed.

    The others may wait for a lock that it held, and are sheltered from the signal that would end them.
    """
    workers = getattr(getattr(iterator, "iterator", iterator), "_workers", ())
    try:
        yield from iterator
    except (RuntimeError, OSError, EOFError):  # as the main process hears of it, by one way or another
        _kill(workers)
        raise
    finally:
        if any(worker.exitcode for worker in workers):
            _kill(workers)


def _kill(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.kill()


@contextmanager
def _sheltered(loader: DataLoader[Any]) -> Iterator[None]:
    """Let the workers that a loader starts in this block be sheltered."""
    user = loader.worker_init_fn
    loader.worker_init_fn = _WorkerInit(user)
    _loaders.add(loader)
    try:
        yield
    finally:
        loader.worker_init_fn = user


_TOGETHER = 32  # micro-batches that are fetched in one go, at most ...
_TOGETHER_BYTES = 2**20  # ... and what they may take: who keeps one keeps the memory of all


class Feed:
    """The micro-batches of this process, epoch by epoch.

    Whoever calls `recut` while it is iterated gets the batch under way once more, from its start, in the new cut.

    Args:
        loader: The user's loader: any sampler, batch sampler, collate function and workers.
        layout: This process and the cut.
        seed: The user's seed.
        pin_memory: Copy each micro-batch to page-locked memory, from which a device can copy while it computes.
        on_recut: Called with the new number of micro-batches; `None` where the cut is fixed.
        may_be_pairs: Whether a batch of two is inputs and targets, rather than two samples.

    Attributes:
        rows: What fetches many samples at once, `None` where the data is not known to be rows. May be replaced by the
            same rows elsewhere before anything is fetched.
        num_changes: Grows while data in memory is found changed within a pass.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        layout: Layout,
        seed: int,
        pin_memory: bool = False,
        on_recut: Callable[[int], None] | None = None,
        may_be_pairs: bool = True,
    ) -> None:
        self.loader, self.layout, self.seed, self.on_recut = loader, layout, seed, on_recut
        self._may_be_pairs = may_be_pairs
        self._pin_memory = pin_memory
        self.rows: Rows | None = None
        self.num_changes = 0
        self._requests = _Requests()
        if not is_stream(loader) and loader.collate_fn is default_collate and loader.batch_sampler is not None:
            self.rows = rows_of(loader.dataset)

    @cached_property
    def _dataset(self) -> _SeededDataset:
        return _SeededDataset(self.loader, self.rows)

    @cached_property
    def _loader(self) -> DataLoader[Any] | None:
        """What asks loader workers; `None` if there are none."""
        user = self.loader
        if not user.num_workers or (self.rows is not None and self.rows.in_memory):
            return None
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._requests,
            collate_fn=_Parcel,
            pin_memory=self._pin_memory,
            num_workers=user.num_workers,
            timeout=user.timeout,
            worker_init_fn=_WorkerInit(user.worker_init_fn),
            multiprocessing_context=user.multiprocessing_context,
            prefetch_factor=user.prefetch_factor,
            persistent_workers=user.persistent_workers,
        )
        _loaders.add(loader)
        return loader

    @property
    def may_hold_others(self) -> bool:
        """Whether a micro-batch may hold more samples, or fewer, than it has indices."""
        if self.rows is not None or is_stream(self.loader):
            return False
        dataset = self.loader.dataset
        while type(dataset) is Subset:
            dataset = dataset.dataset
        is_known = type(dataset).__module__.startswith(("torch.", "datasets."))
        by_lists = self.loader.batch_sampler is None or (hasattr(dataset, "__getitems__") and not is_known)
        return by_lists or self.loader.collate_fn is not default_collate

    @property
    def is_uniform(self) -> bool:
        """Whether all samples are known to have one size."""
        return self.rows is not None and self.rows.row_nbytes is not None

    def refresh(self) -> None:
        """Look whether a table has been given another form, a transform, say; each pass begins with that."""
        if self.rows is not None and not self.rows.is_current:
            self.rows = rows_of(self.loader.dataset)
            for made in ("_dataset", "_loader"):
                self.__dict__.pop(made, None)

    def recut(self, layout: Layout) -> None:
        """Cut the batch under way, from its start, and all that follow in another number of micro-batches."""
        self.layout = layout
        if self.on_recut is not None:
            self.on_recut(layout.num_micro_batches)

    def check_same_everywhere(self, name: str) -> None:
        """Refuse data that differs between the processes: a random split without a seed, or a part for each.

        Compares lengths, the rows of a `Subset`, and a few samples of tensors and tables; neither a sampler nor a
        dataset of the user's own is touched.

        Args:
            name: How the user calls the loader, for the message.

        Raises:
            ValueError: The processes do not have the same data.
        """
        if self.layout.num_processes == 1:
            return
        dataset = self.loader.dataset
        found = (None, "a part") if _is_part(dataset) else (length_of(dataset), mark_of(dataset))
        lengths, marks = zip(*gather_objects(found), strict=True)
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{name} has datasets of different lengths on the processes: {list(lengths)}. {_UNDIVIDED}"
            )
        if len(set(marks)) > 1 or "a part" in marks:
            raise ValueError(
                f"{name} has other samples on each process. Split and shuffle with a fixed seed, so that all agree. "
                f"{_UNDIVIDED}"
            )

    def micro_batches(self, epoch: int, first_batch: int = 0) -> Generator[MicroBatch]:
        """Yield the micro-batches of this process for one pass over the data.

        Args:
            epoch: The pass, 1-based.
            first_batch: Where to begin, 0-based. Nothing is loaded to be skipped; a stream, which has no addresses,
                is read from its start.
        """
        if is_stream(self.loader):
            yield from self._streamed(epoch, first_batch)
            return
        self.refresh()
        again: int | None = first_batch
        while again is not None:
            again = yield from self._in_one_cut(epoch, again)

    def indices_of(self, epoch: int, number: int) -> list[Any] | None:
        """Return the samples of a batch; `None` for a stream."""
        if is_stream(self.loader):
            return None
        indices = next(index_batches(self.loader, self.seed, epoch, number))
        return indices.tolist() if isinstance(indices, torch.Tensor) else list(indices)

    def _in_one_cut(self, epoch: int, first_batch: int) -> Generator[MicroBatch, None, int | None]:
        """Yield until the pass is over, or return the batch to do again when the cut has changed."""
        layout, may_hold_others = self.layout, self.may_hold_others
        fetched = self._fetched(epoch, first_batch) if self._loader is None else self._from_workers(epoch, first_batch)
        with closing(fetched):
            for micro_batch in fetched:
                if may_hold_others:
                    num_asked = micro_batch.piece.stop - micro_batch.piece.start
                    micro_batch.num_held = count_samples(micro_batch.data, num_asked, self._may_be_pairs)
                yield micro_batch
                if self.layout is not layout:
                    return micro_batch.batch_number
        return None

    def _fetched(self, epoch: int, first_batch: int) -> Generator[MicroBatch]:
        planned = self._planned(epoch, first_batch)
        if self.rows is None or self.rows.row_nbytes is None:
            for micro_batch in planned:
                data = self._fetch(epoch, micro_batch)
                micro_batch.data = pinned(data) if self._pin_memory else data
                yield micro_batch
        else:
            yield from self._several_at_once(planned, self.rows)

    def _several_at_once(self, planned: Iterator[MicroBatch], rows: Rows) -> Generator[MicroBatch]:
        """Fetch what follows in one go, as far as it is small: that costs little more than one micro-batch does."""
        for first in planned:
            size = len(first.data) * (rows.row_nbytes or 1)
            others = min(_TOGETHER, _TOGETHER_BYTES // max(1, size)) - 1
            together = [first, *itertools.islice(planned, max(0, others))]
            version = rows.version
            data = rows(torch.cat([micro_batch.data for micro_batch in together]))
            if self._pin_memory:
                data = pinned(data)
            sizes = [len(micro_batch.data) for micro_batch in together]
            for micro_batch, part in zip(together, divide(data, sizes), strict=True):
                if rows.version == version:
                    micro_batch.data = part
                else:  # a callback has written into the data
                    micro_batch.data = rows(micro_batch.data)
                    self.num_changes += 1
                yield micro_batch

    def _from_workers(self, epoch: int, first_batch: int) -> Generator[MicroBatch]:
        planned: deque[MicroBatch] = deque()  # workers run ahead; what they were asked waits here
        self._requests.pending = self._asked(epoch, first_batch, planned)
        with closing(_read(iter(self._loader))) as parcels:  # type: ignore[arg-type]
            for parcel in parcels:
                micro_batch = planned.popleft()
                micro_batch.data = parcel.data
                yield micro_batch

    def _planned(self, epoch: int, first_batch: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches with their indices in place of their data."""
        sampler = sampler_of(self.loader)
        full_size = sampler.batch_size if type(sampler) is BatchSampler else None
        for number, indices in enumerate(index_batches(self.loader, self.seed, epoch, first_batch), start=first_batch):
            if not isinstance(indices, torch.Tensor) and not hasattr(indices, "__len__"):
                raise TypeError(
                    f"With batch_size=None the sampler must yield lists of indices, got {type(indices).__name__}. "
                    "Give the DataLoader a batch_size, or a BatchSampler as its sampler."
                )
            if not len(indices):
                continue
            if self.rows is not None and not isinstance(indices, torch.Tensor):
                indices = torch.as_tensor(not_negative(indices, len(self.loader.dataset)))  # type: ignore[arg-type]
            batch_size = len(indices)
            for piece in cut(batch_size, self.layout):
                mine = indices if piece.is_whole else indices[piece.start : piece.stop]
                yield MicroBatch(mine, piece, batch_size, number, batch_size == full_size or full_size is None)

    def _asked(self, epoch: int, first_batch: int, planned: deque[MicroBatch]) -> Iterator[_Request]:
        for micro_batch in self._planned(epoch, first_batch):
            planned.append(micro_batch)
            yield self._request(epoch, micro_batch)

    def _request(self, epoch: int, micro_batch: MicroBatch) -> _Request:
        indices = micro_batch.data
        indices = indices.tolist() if isinstance(indices, torch.Tensor) else list(indices)
        place = (epoch, micro_batch.batch_number, micro_batch.piece.start)
        return _Request(indices, derive_seed(self.seed, FETCH, *place))

    def _fetch(self, epoch: int, micro_batch: MicroBatch) -> Any:
        if self.rows is not None:
            return self.rows(micro_batch.data)
        return self._dataset[self._request(epoch, micro_batch)]

    def _streamed(self, epoch: int, first_batch: int) -> Iterator[MicroBatch]:
        """Read a stream on the main process only, share each batch, and take this process's samples out of it."""
        _tell_epoch(self.loader.dataset, epoch - 1)
        is_reader = self.layout.process == 0
        batches = None
        if is_reader:
            with _sheltered(self.loader):
                read = _read(SeededIterator(self.loader, derive_seed(self.seed, DATA, epoch)))
            batches = itertools.islice(read, first_batch, None)
        for number in itertools.count(first_batch):
            batch = next(batches, _END) if batches is not None else None
            if self.layout.num_processes > 1:
                batch = share_object(batch)
            if isinstance(batch, _End):
                return
            num_samples = count_samples(batch, may_be_pair=self._may_be_pairs)
            if num_samples is None:
                raise TypeError(
                    "A batch of a stream must tell how many samples it holds: give its targets, or all of its tensors, "
                    "one entry per sample in their first dimension."
                )
            layout = None
            while layout is not self.layout:  # once, or again in the new cut
                layout = self.layout
                for piece in cut(num_samples, layout):
                    data = batch if piece.is_whole else take(batch, piece.start, piece.stop, num_samples)
                    yield MicroBatch(
                        data, piece, num_samples, number, num_samples == (self.loader.batch_size or num_samples)
                    )
                    if self.layout is not layout:
                        break


_UNDIVIDED = "Do not divide the data over the processes (split_dataset_by_node): the trainer divides each batch."


def _tell_epoch(dataset: Any, epoch: int) -> None:
    """Tell a stream, or the streams that it is made of, which epoch begins (0-based)."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
        return
    for stream in _made_of(dataset):
        _tell_epoch(stream, epoch)


def _is_part(dataset: Any) -> bool:
    """Return whether a stream of the `datasets` library, or one that it is made of, is what a process has of it."""
    own = getattr(getattr(dataset, "_distributed", None), "world_size", 1)
    return own > 1 or (isinstance(dataset, IterableDataset) and any(map(_is_part, _made_of(dataset))))


def _made_of(dataset: Any) -> list[Dataset[Any]]:
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    return [one for one in inner if isinstance(one, Dataset)] if isinstance(inner, (list, tuple)) else []


class _End:
    """Mark the end of a stream."""


_END = _End()


def _is_array(item: Any) -> bool:
    return isinstance(item, (torch.Tensor, numpy.ndarray)) and item.ndim > 0


def leaves_of(batch: Any) -> Iterator[Any]:
    """Yield what a collated batch holds, in its lists, tuples and dictionaries."""
    if isinstance(batch, (Mapping, list, tuple)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from leaves_of(item)
    else:
        yield batch


def tensors_in(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a collated batch."""
    return (leaf for leaf in leaves_of(batch) if isinstance(leaf, torch.Tensor))


TARGET_NAMES = ("labels", "label", "targets", "target")


def count_samples(batch: Any, num_asked: int | None = None, may_be_pair: bool = True) -> int | None:
    """Return the samples of a collated batch, by its targets, since those are what a loss is the mean over.

    Targets are the second of a pair, or the entry of a dictionary with such a name; where there are none, or they do
    not tell, the inputs are asked. What has as many rows, or columns, as were asked for is complete: beside it may
    stand boxes, nodes, or several views of each. Without targets, more rows than that are parts of samples.

    Args:
        batch: Tensors, arrays and lists, in lists, tuples and dictionaries.
        num_asked: Samples that were to be in it; `None` if that is not known.
        may_be_pair: Whether two are inputs and targets, rather than two samples.

    Returns:
        Where the batch does not tell, `num_asked`, or the length of the first tensor or array in it.
    """
    parts, has_targets = [batch], False
    if may_be_pair and _is_pair(batch):
        parts, has_targets = [batch[1], batch[0]], True
    elif isinstance(batch, Mapping):
        named = [batch[name] for name in TARGET_NAMES if name in batch]
        parts = [*named, {name: one for name, one in batch.items() if name not in TARGET_NAMES}]
        has_targets = bool(named)
    counts = [count for part in parts if (count := _num_rows(part, num_asked)) is not None]
    arrays = [leaf for leaf in leaves_of(batch) if _is_array(leaf)]
    if num_asked is None:
        return next(iter(counts), next(map(len, arrays), None))
    # One row may be sequences that were joined.
    is_joined = bool(arrays) and all(one.ndim == 2 and len(one) == 1 and one.shape[1] > 1 for one in arrays)
    is_complete = num_asked in counts or any(num_asked in one.shape[:2] for one in arrays)
    if is_joined or is_complete or not counts or (counts[0] > num_asked and not has_targets):
        return num_asked
    return counts[0]


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (list, tuple)) and len(batch) == 2 and not hasattr(batch, "_fields")


def _num_rows(part: Any, num_asked: int | None) -> int | None:
    """Return the length that all columns of a part of a batch have, `None` if they have none in common."""
    if _is_array(part):
        return len(part)
    if isinstance(part, (list, tuple)) and not hasattr(part, "_fields"):
        are_samples = not any(map(_is_array_or_list, part))  # texts, numbers, a dictionary of each
        if part and (are_samples or len(part) == num_asked):
            return len(part)
    if not isinstance(part, (Mapping, list, tuple)):
        return None
    columns = part.values() if isinstance(part, Mapping) else part
    lengths = {_num_rows(column, num_asked) for column in columns if _is_array_or_list(column)}
    return lengths.pop() if len(lengths) == 1 else None


def _is_array_or_list(item: Any) -> bool:
    return _is_array(item) or isinstance(item, (list, tuple))


def _is_column(item: Any, num_samples: int) -> bool:
    """Return whether this part of a batch has an entry per sample itself, rather than being one."""
    if isinstance(item, Mapping):
        return True
    return (_is_array(item) or isinstance(item, (list, tuple))) and len(item) == num_samples


def take(batch: Any, start: int, stop: int, num_samples: int) -> Any:
    """Return the samples `start:stop` of a collated batch.

    Tensors and arrays must have an entry per sample, and so may lists; single numbers and texts stay what they are.

    Args:
        batch: Tensors, arrays and lists, in lists, tuples and dictionaries.
        start: First sample.
        stop: Behind the last sample.
        num_samples: Samples of the batch.

    Raises:
        TypeError: Something that cannot be cut by samples.
    """
    if _is_array(batch):
        if len(batch) != num_samples:
            raise TypeError(
                f"A batch of {num_samples} samples holds a tensor of shape {tuple(batch.shape)}: it cannot be cut into "
                "micro-batches. Give every tensor one entry per sample."
            )
        return batch[start:stop]
    if isinstance(batch, Mapping):
        parts = {key: take(item, start, stop, num_samples) for key, item in batch.items()}
        if type(batch) is dict:
            return parts
        copied = copy.copy(batch)
        copied.update(parts)  # type: ignore[attr-defined]
        return copied
    if isinstance(batch, (list, tuple)):
        if len(batch) == num_samples and not all(_is_column(item, num_samples) for item in batch):
            return batch[start:stop]
        taken = [take(item, start, stop, num_samples) for item in batch]
        return type(batch)(*taken) if hasattr(batch, "_fields") else type(batch)(taken)
    return batch


# --- what a loader says -----------------------------------------------------------------------------------------------


def is_stream(loader: DataLoader[Any]) -> bool:
    """Return whether the loader reads an iterable dataset, whose samples cannot be addressed."""
    return isinstance(loader.dataset, IterableDataset)


def num_batches(loader: DataLoader[Any]) -> int | None:
    """Return the batches of one pass over the data, `None` if the loader cannot say."""
    return length_of(loader)


def length_of(thing: Any) -> int | None:
    """Return the length of a loader, dataset or sampler, `None` if it cannot say."""
    try:
        return len(thing)
    except (TypeError, NotImplementedError):
        return None


def check_loader(loader: object, name: str, may_be_empty: bool = False) -> None:
    """Refuse a loader that the trainer could not divide, before anything is trained.

    Args:
        loader: What the user gave.
        name: How the user calls it, for the message.
        may_be_empty: Whether a loader without batches is accepted.

    Raises:
        TypeError: Not a plain torch `DataLoader`.
        ValueError: It has a `DistributedSampler`, or yields no batch.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"{name} must be a torch.utils.data.DataLoader, got {type(loader).__name__}.")
    if type(loader).__module__.startswith("accelerate."):
        raise TypeError(f"{name} is already prepared by Accelerate. Give the plain DataLoader: the trainer divides it.")
    kind = type(loader)
    if kind.__iter__ is not DataLoader.__iter__ and not kind.__module__.startswith(("torch.", "torchdata.")):
        raise TypeError(
            f"{name} is a {kind.__name__}, whose own __iter__ would not be used: the trainer asks sampler and dataset "
            "itself. Give a plain DataLoader; persistent_workers=True keeps its workers between epochs."
        )
    sampler = sampler_of(loader) if not is_stream(loader) else None
    for part in (sampler, getattr(sampler, "sampler", None)):
        if isinstance(part, DistributedSampler):
            raise ValueError(
                f"{name} has a DistributedSampler, but the trainer divides each batch over the processes by itself. "
                "Remove it: DataLoader(dataset, batch_size=..., shuffle=True)."
            )
    if num_batches(loader) == 0 and not may_be_empty:
        length = f"{len(loader.dataset)} samples" if hasattr(loader.dataset, "__len__") else "no samples"
        rest = f" and drop_last=True with batch_size {loader.batch_size}" if loader.drop_last else ""
        raise ValueError(f"{name} yields no batch: its dataset has {length}{rest}.")


def describe_batch(num_samples: int, layout: Layout) -> str:
    """Return the arithmetic of a batch in words.

    Example:
        >>> describe_batch(64, Layout(process=0, num_processes=2, num_micro_batches=4))
        'batch 64 = 2 processes x 2 micro-batches x 16'
    """
    factors = [
        _count({layout.num_processes}, "process"),
        _count(_sizes(layout.num_micro_batches, layout.num_processes), "micro-batch"),
        _count(_sizes(num_samples, layout.num_micro_batches), ""),
    ]
    return f"batch {num_samples} = {' x '.join(factors)}"


def _sizes(total: int, parts: int) -> set[int]:
    return {stop - start for start, stop in _even_bounds(total, parts)}


def _count(numbers: set[int], noun: str) -> str:
    plural = f" {noun}{'es' if numbers != {1} else ''}" if noun else ""
    return " or ".join(str(number) for number in sorted(numbers, reverse=True)) + plural
