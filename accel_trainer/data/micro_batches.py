"""Micro-batches: fetched, cut and seeded alike on any number of processes.

A batch is what the user's loader says, whatever the number of processes. Every process draws the same batches of
indices, cuts each the same way, and fetches only its own pieces.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Subset, default_collate

from ..base.exchange import gather_objects, share_object
from .collated import count_samples, pinned
from .cut import Layout, Piece, cut
from .order import index_batches, is_stream, length_of, sampler_of
from .randomness import FETCH, derive_seed
from .sources import TensorSource, divide, mark_of, not_negative, tensor_source_of
from .streams import UNDIVIDED, ShardedStream, description_of, divided, is_part, num_samples_in, read_by_main
from .workers import Request, RequestSampler, SeededDataset, loader_of_parcels, read_from_workers

_TOGETHER = 32  # micro-batches that are fetched in one go, at most ...
_TOGETHER_BYTES = 2**20  # ... and their size together: all stay in memory as long as any of them is kept


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The samples of one optimizer step, over all processes."""

    number: int  # in the pass over the data, 0-based
    size: int  # samples
    layout: Layout
    is_full: bool = True  # whether it is as large as the loader's batches are; the last one of a pass may be smaller
    sizes: tuple[int, ...] | None = None  # samples of each micro-batch, where the batch is not cut evenly

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches up to the last with samples, over all processes."""
        number = self.layout.num_micro_batches
        return min(self.size, number) if self.sizes is None else number

    @property
    def num_filled(self) -> int:
        """Micro-batches with samples, over all processes."""
        return self.num_micro_batches if self.sizes is None else sum(map(bool, self.sizes))

    @property
    def is_even(self) -> bool:
        """Whether all micro-batches have the same number of samples."""
        if self.sizes is not None:
            return len(set(self.sizes)) == 1
        return self.size % self.layout.num_micro_batches == 0


@dataclass(slots=True)
class MicroBatch:
    """One forward of this process."""

    data: Any  # from the user's collate function
    piece: Piece
    batch: Batch
    num_held: int | None = None  # samples in the data, where they may be more or fewer than those of the piece

    @property
    def position(self) -> tuple[int, int]:
        """Number of the batch and index of the micro-batch in it: the order of the sums."""
        return self.batch.number, self.piece.index

    @property
    def num_samples(self) -> int:
        """Samples that count: 0 for padding."""
        if self.piece.is_padding:
            return 0
        return self.piece.stop - self.piece.start if self.num_held is None else self.num_held

    def move(self, to_device: Callable[[Any], Any]) -> None:
        """Move the data to the device of the model."""
        self.data = to_device(self.data)


class MicroBatchLoader:
    """The micro-batches of this process, pass by pass.

    After `recut`, called during the iteration, the present batch comes once more, from its start, in the new cut.

    Args:
        data_loader: The user's loader: any sampler, batch sampler, collate function and workers.
        layout: This process and the cut.
        seed: The user's seed.
        pin_memory: Copy each micro-batch to page-locked memory, from which a device can copy while it computes.
        on_recut: Called with the new number of micro-batches; `None` where the cut is fixed.
        may_be_pairs: Whether a batch of two is inputs and targets, rather than two samples.
        by_shards: Read a stream by its shards, instead of on the main process.

    Attributes:
        sharded: The stream that is read so; `None` otherwise.
    """

    def __init__(
        self,
        data_loader: DataLoader[Any],
        layout: Layout,
        seed: int,
        pin_memory: bool = False,
        on_recut: Callable[[int], None] | None = None,
        may_be_pairs: bool = True,
        by_shards: bool = False,
    ) -> None:
        self.data_loader, self.layout, self.seed, self._on_recut = data_loader, layout, seed, on_recut
        self._may_be_pairs, self._pin_memory = may_be_pairs, pin_memory
        self.num_changes = 0  # how often data in memory was found changed within a pass
        self.seconds = 0.0  # time that the caller has waited for micro-batches
        self._requests = RequestSampler()
        self.source: TensorSource | None = None  # known for tensors and tables
        is_collated_by_torch = data_loader.collate_fn is default_collate and data_loader.batch_sampler is not None
        if is_collated_by_torch and not is_stream(data_loader):
            self.source = tensor_source_of(data_loader.dataset)
        self.sharded = ShardedStream(data_loader, layout, seed, pin_memory, may_be_pairs) if by_shards else None

    @cached_property
    def _dataset(self) -> SeededDataset:
        return SeededDataset(self.data_loader, self.source)

    @cached_property
    def _workers(self) -> DataLoader[Any] | None:
        """The loader that asks workers; `None` if there are none."""
        if not self.data_loader.num_workers or (self.source is not None and self.source.in_memory):
            return None
        return loader_of_parcels(self.data_loader, self._dataset, self._requests, self._pin_memory)

    @property
    def may_recut(self) -> bool:
        """Whether the number of micro-batches is free."""
        return self._on_recut is not None

    @property
    def may_hold_others(self) -> bool:
        """Whether a micro-batch may hold more samples, or fewer, than it has indices."""
        if self.source is not None or is_stream(self.data_loader):
            return False
        dataset = self.data_loader.dataset
        while type(dataset) is Subset:
            dataset = dataset.dataset
        is_known = type(dataset).__module__.startswith(("torch.", "datasets."))
        by_lists = self.data_loader.batch_sampler is None or (hasattr(dataset, "__getitems__") and not is_known)
        return by_lists or self.data_loader.collate_fn is not default_collate

    @property
    def is_uniform(self) -> bool:
        """Whether all samples are known to have one size."""
        return self.source is not None and self.source.sample_nbytes is not None

    def use_source(self, source: TensorSource) -> None:
        """Fetch the same samples from another source, before anything has been fetched."""
        self.source = source

    def refresh(self) -> None:
        """Find a new source if the dataset has changed, such as by a transform; each pass begins with this."""
        if self.source is not None and not self.source.is_current:
            self.source = tensor_source_of(self.data_loader.dataset)
            for made in ("_dataset", "_workers"):
                self.__dict__.pop(made, None)

    def use_layout(self, layout: Layout) -> None:
        """Cut the batches to come in this way."""
        self.layout = layout

    def recut(self, layout: Layout) -> None:
        """Cut the present batch, from its start, and all that follow into another number of micro-batches."""
        self.layout = layout
        if self._on_recut is not None:
            self._on_recut(layout.num_micro_batches)

    def check_same_everywhere(self, name: str) -> None:
        """Refuse (ValueError) data that differs between the processes: a random split without a seed, or their parts.

        Compares lengths, the indices of a `Subset`, and a few samples of tensors and tables; calls neither a sampler
        nor a dataset of the user's own.
        """
        if self.layout.num_processes == 1:
            return
        dataset = self.data_loader.dataset
        mark = mark_of(dataset) if self.sharded is None else description_of(self.data_loader)
        found = (None, "a part") if is_part(dataset) else (length_of(dataset), mark)
        lengths, marks = zip(*gather_objects(found), strict=True)
        if len(set(lengths)) > 1:
            raise ValueError(f"{name} has datasets of different lengths on the processes: {list(lengths)}. {UNDIVIDED}")
        if len(set(marks)) > 1 or "a part" in marks:
            raise ValueError(
                f"{name} has other samples on each process. Split and shuffle with a fixed seed, so that all agree. "
                f"{UNDIVIDED}"
            )

    def micro_batches(self, epoch: int, first_batch: int = 0) -> Generator[MicroBatch]:
        """Yield the micro-batches of this process for one pass (1-based) over the data, from a batch (0-based) on.

        Batches before it are not loaded, except from a stream, which is read from its start where it knows no better.
        """
        read = self._streamed if is_stream(self.data_loader) else self._read
        with closing((read if self.sharded is None else self._sharded)(epoch, first_batch)) as fetched:
            while True:
                asked = perf_counter()
                micro_batch = next(fetched, None)
                self.seconds += perf_counter() - asked
                if micro_batch is None:
                    return
                yield micro_batch

    def indices_of(self, epoch: int, number: int) -> list[Any] | None:
        """Return the samples of a batch; `None` for a stream."""
        if is_stream(self.data_loader):
            return None
        indices = next(index_batches(self.data_loader, self.seed, epoch, number))
        return indices.tolist() if isinstance(indices, torch.Tensor) else list(indices)

    def _read(self, epoch: int, first_batch: int) -> Generator[MicroBatch]:
        self.refresh()
        layout = None
        while layout != self.layout:  # once, and again from the present batch in each new cut
            layout, may_hold_others = self.layout, self.may_hold_others
            read = self._fetched if self._workers is None else self._from_workers
            with closing(read(epoch, first_batch)) as fetched:
                for micro_batch in fetched:
                    if may_hold_others:
                        num_asked = micro_batch.piece.stop - micro_batch.piece.start
                        micro_batch.num_held = count_samples(micro_batch.data, num_asked, self._may_be_pairs)
                    yield micro_batch
                    if self.layout != layout:
                        first_batch = micro_batch.batch.number
                        break

    def _fetched(self, epoch: int, first_batch: int) -> Generator[MicroBatch]:
        planned = self._planned(epoch, first_batch)
        if self.is_uniform:
            yield from self._several_at_once(planned, self.source)  # type: ignore[arg-type]
            return
        for micro_batch in planned:
            data = self._dataset[self._request(epoch, micro_batch)]
            micro_batch.data = pinned(data) if self._pin_memory else data
            yield micro_batch

    def _several_at_once(self, planned: Iterator[MicroBatch], source: TensorSource) -> Generator[MicroBatch]:
        """Fetch several small micro-batches at once: that costs little more than a single one."""
        for first in planned:
            size = len(first.data) * (source.sample_nbytes or 1)
            others = min(_TOGETHER, _TOGETHER_BYTES // max(1, size)) - 1
            together = [first, *itertools.islice(planned, max(0, others))]
            version = source.version
            data = source(torch.cat([micro_batch.data for micro_batch in together]))
            if self._pin_memory:
                data = pinned(data)
            sizes = [len(micro_batch.data) for micro_batch in together]
            for micro_batch, part in zip(together, divide(data, sizes), strict=True):
                if [tensor._version for tensor in source.versioned] == version:
                    micro_batch.data = part
                else:  # a callback has written into the data
                    micro_batch.data = source(micro_batch.data)
                    self.num_changes += 1
                yield micro_batch

    def _from_workers(self, epoch: int, first_batch: int) -> Generator[MicroBatch]:
        planned: deque[MicroBatch] = deque()  # workers run ahead

        def requests() -> Iterator[Request]:
            for micro_batch in self._planned(epoch, first_batch):
                planned.append(micro_batch)
                yield self._request(epoch, micro_batch)

        self._requests.start(requests())
        with closing(read_from_workers(iter(self._workers))) as parcels:  # type: ignore[arg-type]
            for parcel in parcels:
                micro_batch = planned.popleft()
                micro_batch.data = parcel.data
                yield micro_batch

    def _planned(self, epoch: int, first_batch: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches with their indices in place of their data."""
        sampler = sampler_of(self.data_loader)
        full_size = sampler.batch_size if type(sampler) is BatchSampler else None
        batches = index_batches(self.data_loader, self.seed, epoch, first_batch)
        for number, indices in enumerate(batches, start=first_batch):
            if not isinstance(indices, torch.Tensor) and not hasattr(indices, "__len__"):
                raise TypeError(
                    f"With batch_size=None the sampler must yield lists of indices, got {type(indices).__name__}. "
                    "Give the DataLoader a batch_size, or a BatchSampler as its sampler."
                )
            if not len(indices):
                continue
            if self.source is not None and not isinstance(indices, torch.Tensor):
                indices = torch.as_tensor(not_negative(indices, len(self.data_loader.dataset)))  # type: ignore[arg-type]
            batch_size = len(indices)
            batch = Batch(number, batch_size, self.layout, batch_size == full_size or full_size is None)
            for piece in cut(batch_size, self.layout):
                yield MicroBatch(indices if piece.is_whole else indices[piece.start : piece.stop], piece, batch)

    def _request(self, epoch: int, micro_batch: MicroBatch) -> Request:
        indices = micro_batch.data
        indices = indices.tolist() if isinstance(indices, torch.Tensor) else list(indices)
        return Request(indices, derive_seed(self.seed, FETCH, epoch, micro_batch.batch.number, micro_batch.piece.start))

    def _streamed(self, epoch: int, first_batch: int) -> Generator[MicroBatch]:
        """Read a stream on the main process only, which sends the others their samples of each batch."""
        batches = read_by_main(self.data_loader, self.seed, epoch, first_batch, self.layout.process == 0)
        for number in itertools.count(first_batch):
            held = list(itertools.islice(batches, 1))
            num_samples = share_object(num_samples_in(held, self._may_be_pairs))
            if num_samples is None:
                return
            if isinstance(num_samples, TypeError):
                raise num_samples
            layout = None
            while layout != self.layout:  # once, or again in the new cut
                layout = self.layout
                batch = Batch(number, num_samples, layout, num_samples == (self.data_loader.batch_size or num_samples))
                parts = divided(held, num_samples, layout)
                for piece, data in zip(cut(num_samples, layout), parts, strict=True):
                    yield MicroBatch(data, piece, batch)
                    if self.layout != layout:
                        break

    def _sharded(self, epoch: int, first_batch: int) -> Generator[MicroBatch]:
        """Read the parts of a stream that are this process's."""
        stream: ShardedStream = self.sharded  # type: ignore[assignment]
        for number, sizes, parts in stream.batches(epoch, first_batch):
            size, starts = sum(sizes), [0, *itertools.accumulate(sizes)]
            batch = Batch(number, size, self.layout, size == self.data_loader.batch_size, tuple(sizes))
            for place, (part, is_padding) in enumerate(parts):
                bounds = starts[part.place], starts[part.place + 1]
                piece = Piece(part.place, *bounds, is_padding, place == 0, place == len(parts) - 1, part.size == size)
                yield MicroBatch(part.data, piece, batch)
