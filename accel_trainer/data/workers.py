"""Loader workers: what they are asked, how they are seeded, and how they end."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from .collated import pinned
from .randomness import seed_all
from .sources import TensorSource


class Request(NamedTuple):
    """What one micro-batch needs: its samples and the seed of what the dataset draws for them."""

    indices: Sequence[Any]
    seed: int


class SeededDataset(Dataset[Any]):
    """Answer a request with the finished micro-batch; picklable, since loader workers run it."""

    def __init__(self, loader: DataLoader[Any], source: TensorSource | None) -> None:
        self._dataset, self._collate, self._source = loader.dataset, loader.collate_fn, source
        self._answers_lists = loader.batch_sampler is None  # batch_size=None: the dataset takes a list of indices

    def __getitem__(self, request: Request) -> Any:
        if self._source is not None:
            return self._source(torch.as_tensor(request.indices))
        seed_all(request.seed)
        return self._collate(self._items(request.indices))

    def _items(self, indices: Sequence[Any]) -> Any:
        if self._answers_lists:
            return self._dataset[indices]
        many = getattr(self._dataset, "__getitems__", None)
        return many(indices) if many else [self._dataset[index] for index in indices]


class Parcel:
    """A micro-batch on its way from a loader worker; the thread of torch that pins memory asks it to do so itself."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def pin_memory(self) -> Parcel:
        """Return it with what can be pinned in page-locked memory."""
        return Parcel(pinned(self.data))


class RequestSampler:
    """The sampler of the loader with workers: it yields the requests that `start` was given last."""

    def __init__(self) -> None:
        self._pending: Iterator[Request] = iter(())

    def start(self, requests: Iterator[Request]) -> None:
        """Yield these from here on."""
        self._pending = requests

    def __iter__(self) -> Iterator[Request]:
        return self._pending


class WorkerInit:
    """Shelter a loader worker from signals that are meant for its parent, then do what the user asks for.

    Schedulers and terminals send them to whole groups of processes. The parent finishes its step and ends its workers;
    one that it does not end leaves 20 seconds later.
    """

    def __init__(self, user: Callable[[int], object] | None) -> None:
        self._user = user

    def __call__(self, worker: int) -> None:
        """Begin as this worker."""
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


_loaders: WeakSet[DataLoader[Any]] = WeakSet()  # with sheltered workers


def loader_of_requests(
    data_loader: DataLoader[Any], dataset: SeededDataset, requests: RequestSampler, pin_memory: bool
) -> DataLoader[Any]:
    """Return a loader whose workers, set up as the user's, answer requests."""
    loader: DataLoader[Any] = like_loader(
        data_loader,
        dataset=dataset,
        batch_size=None,
        sampler=requests,
        collate_fn=Parcel,
        pin_memory=pin_memory,
        worker_init_fn=WorkerInit(data_loader.worker_init_fn),
    )
    _loaders.add(loader)
    return loader


def like_loader(data_loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Return a loader like the user's, but for its sampler and what is given."""
    names = "dataset collate_fn num_workers pin_memory timeout worker_init_fn multiprocessing_context prefetch_factor"
    kept = {name: getattr(data_loader, name) for name in (*names.split(), "persistent_workers")}
    return DataLoader(**(kept | changes))


def _end_workers() -> None:
    """End persistent workers by the door: at its end multiprocessing would send them SIGTERM and wait."""
    for loader in list(_loaders):
        loader._iterator = None


atexit.register(_end_workers)  # what is registered last, after multiprocessing, runs first


def read_from_workers(iterator: Iterator[Any]) -> Generator[Any]:
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
def sheltered(loader: DataLoader[Any]) -> Iterator[None]:
    """Let the workers that a loader starts in this block be sheltered."""
    user = loader.worker_init_fn
    loader.worker_init_fn = WorkerInit(user)
    _loaders.add(loader)
    try:
        yield
    finally:
        loader.worker_init_fn = user
