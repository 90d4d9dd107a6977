"""Loader workers: their requests, their seeds, and their end."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from .collated import pinned
from .order import dataset_order, is_stream, sampler_of
from .randomness import seed_all
from .sources import TensorSource


class Request(NamedTuple):
    """The samples of one micro-batch, and the seed for what the dataset draws for them."""

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
        if self._answers_lists:
            return self._collate(self._dataset[request.indices])
        many = getattr(self._dataset, "__getitems__", None)
        return self._collate(many(request.indices) if many else [self._dataset[index] for index in request.indices])


class Parcel:
    """What a loader worker has made, such as a micro-batch; torch's thread that pins memory calls its `pin_memory`."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def pin_memory(self) -> Parcel:
        """Return it with its data in page-locked memory, as far as possible."""
        return Parcel(pinned(self.data))


class RequestSampler:
    """The sampler of the loader with workers: it yields the requests of the last `start`."""

    def __init__(self) -> None:
        self._pending: Iterator[Request] = iter(())

    def start(self, requests: Iterator[Request]) -> None:
        """Yield these requests from now on."""
        self._pending = requests

    def __iter__(self) -> Iterator[Request]:
        return self._pending


def init_worker(user: Callable[[int], object] | None, worker: int) -> None:
    """Shelter a loader worker from signals that are meant for its parent, then call the user's `worker_init_fn`.

    Schedulers and terminals send signals to whole groups of processes. The parent finishes its step and ends its
    workers; a worker that it does not end leaves 20 seconds later.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_soon)
    if user is not None:
        user(worker)


def _leave_soon(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_DFL)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 20.0)  # its signal ends the process


_loaders: WeakSet[DataLoader[Any]] = WeakSet()  # with sheltered workers


def loader_of_parcels(
    data_loader: DataLoader[Any],
    dataset: Dataset[Any],
    requests: RequestSampler | None,
    pin_memory: bool,
    **changes: Any,
) -> DataLoader[Any]:
    """Return a loader whose workers, set up as the user's, answer requests, or read a stream, in parcels."""
    loader: DataLoader[Any] = like_loader(
        data_loader,
        dataset=dataset,
        batch_size=None,
        sampler=requests,
        collate_fn=Parcel,
        pin_memory=pin_memory,
        worker_init_fn=partial(init_worker, data_loader.worker_init_fn),
        **changes,
    )
    _loaders.add(loader)
    return loader


def like_loader(data_loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Return a loader like the user's, with some arguments changed; the sampler must be one of them."""
    names = "dataset collate_fn num_workers pin_memory timeout worker_init_fn multiprocessing_context prefetch_factor"
    kept = {name: getattr(data_loader, name) for name in (*names.split(), "persistent_workers")}
    return DataLoader(**(kept | changes))


def in_dataset_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader like this one that yields each of its samples once, in dataset order."""
    if is_stream(loader):
        return loader
    size = getattr(sampler_of(loader), "batch_size", None) or 1
    batches = BatchSampler(dataset_order(loader), size, drop_last=False)
    if loader.batch_sampler is None:  # batch_size=None: the dataset answers lists of indices
        return like_loader(loader, batch_size=None, sampler=batches)
    return like_loader(loader, batch_sampler=batches)


def _end_workers() -> None:
    """End persistent workers in time: multiprocessing would send them SIGTERM and wait when the process exits."""
    for loader in list(_loaders):
        loader._iterator = None


atexit.register(_end_workers)  # registered after multiprocessing's function, it runs before that


def read_from_workers(iterator: Iterator[Any]) -> Generator[Any]:
    """Yield the items of loader workers, and end all workers at an error, or if one has been killed.

    The other workers may wait for a lock that it held, and are sheltered from the signal that would end them.
    """
    own: Any = getattr(iterator, "iterator", iterator)
    workers = getattr(own, "_workers", ())
    try:
        yield from iterator
    except GeneratorExit:  # who reads has enough
        raise
    except BaseException as error:
        is_of_the_data = "in DataLoader worker process" in str(error.args)  # the workers are as sound as before
        if isinstance(error, (RuntimeError, OSError, EOFError)) and not is_of_the_data:  # any of these if one is killed
            _kill(workers)
        elif workers and not any(worker.exitcode for worker in workers):
            own._shutdown_workers()  # the traceback would hold them alive
        for loader in list(_loaders):
            if loader._iterator is own:
                loader._iterator = None  # persistent workers begin anew
        raise
    finally:
        if any(worker.exitcode for worker in workers):
            _kill(workers)


def _kill(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.kill()


@contextmanager
def sheltered(loader: DataLoader[Any]) -> Iterator[None]:
    """Shelter the workers that a loader starts in this block from signals."""
    user = loader.worker_init_fn
    loader.worker_init_fn = partial(init_worker, user)
    _loaders.add(loader)
    try:
        yield
    finally:
        loader.worker_init_fn = user
