"""The order of the samples, and checks of a loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from ..config import TrainConfig
from .large_order import LargeOrder
from .randomness import ORDER, SeededIterator, derive_seed

_LARGE = 10**8  # samples: as one tensor their order would have 8 bytes each, in every process


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return the sampler that yields batches of indices."""
    return loader.batch_sampler if loader.batch_sampler is not None else loader.sampler


def index_batches(
    loader: DataLoader[Any], seed: int, epoch: int, first_batch: int = 0
) -> Iterator[torch.Tensor | Sequence[Any]]:
    """Yield the indices of each batch of a pass (1-based) over a map-style dataset, from a batch (0-based) on.

    They are a pure function of (loader, seed, epoch). A sampler of the user draws the batches before the first one too.
    """
    sampler = sampler_of(loader)
    inner = getattr(sampler, "sampler", sampler)
    for stateful in (sampler, inner):
        if hasattr(stateful, "set_epoch"):
            stateful.set_epoch(epoch - 1)  # torch counts from 0
    generator = getattr(inner, "generator", None)
    path = (generator.initial_seed() & (2**63 - 1),) if isinstance(generator, torch.Generator) else ()
    seed = derive_seed(seed, ORDER, epoch, *path)
    order = _own_order(inner, seed) if type(sampler) is BatchSampler else None
    if order is None:
        yield from itertools.islice(SeededIterator(sampler, seed, generator), first_batch, None)
    else:
        size: int = sampler.batch_size
        end = len(order) - len(order) % size if sampler.drop_last else len(order)
        for start in range(first_batch * size, end, size):
            yield order[start : start + size]


def dataset_order(loader: DataLoader[Any]) -> Any:
    """Return a sampler of all samples that a loader can yield, each once, in the order of the dataset."""
    sampler = sampler_of(loader)
    inner = getattr(sampler, "sampler", sampler)
    if type(inner) in (SequentialSampler, RandomSampler, WeightedRandomSampler):
        return SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    drawn = list(SeededIterator(inner, 0))
    return sorted({index for item in drawn for index in (item if isinstance(item, (list, tuple)) else [item])})


def _own_order(sampler: object, seed: int) -> torch.Tensor | LargeOrder | None:
    """Return the order of torch's two common samplers, `None` for any other sampler."""
    if type(sampler) is SequentialSampler:
        length = len(sampler.data_source)
        return torch.arange(length) if length < _LARGE else LargeOrder(length)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        length = sampler.num_samples
        if length >= _LARGE:
            return LargeOrder(length, seed)
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return None


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

    Raises:
        TypeError: It is not torch's own `DataLoader`.
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


def no_batch(name: str) -> ValueError:
    """Return the error for a loader that has come to its end without a batch."""
    return ValueError(
        f"{name} yields no batch: its stream is empty, ends before a full batch with drop_last, or can be read only "
        "once and is used up after a pass."
    )


def num_steps(config: TrainConfig, train_loader: DataLoader[Any]) -> int | None:
    """Return the optimizer steps of the whole run; `None` where the loader cannot say."""
    per_epoch = config.steps_per_epoch or num_batches(train_loader)
    totals = [None if per_epoch is None else per_epoch * config.num_epochs, config.max_steps]
    return min((total for total in totals if total is not None), default=None)
