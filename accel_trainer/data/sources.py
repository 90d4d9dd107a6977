"""Fetch many samples at once from data that is rows of numbers: tensors, and tables of the `datasets` library.

What is fetched equals what the loader's default collate function would make of single samples, without Python work for
each of them.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate

from .collated import aligned, pinned


class TensorSource:
    """The samples of a dataset as rows that are fetched together.

    Attributes:
        in_memory: Whether they are tensors already; a loader worker would only add the way back.
        sample_nbytes: What one row takes as tensors; `None` if they are not all of one shape.
        nbytes: Bytes needed to keep the data in memory.
        versioned: Tensors whose versions, which torch counts, grow when the data is changed in place. What NumPy writes
            into shared memory is not counted.
    """

    in_memory = False
    sample_nbytes: int | None = None
    nbytes = 0
    versioned: Sequence[Tensor] = ()

    def __call__(self, indices: Tensor) -> Any:
        """Return the rows of these indices, collated."""
        raise NotImplementedError

    @property
    def columns(self) -> Any:
        """The tensors of all rows and maybe of others, collated as a batch is; `None` if not in memory."""
        return None

    @property
    def version(self) -> list[int]:
        """What differs once the data has been changed in place."""
        return [tensor._version for tensor in self.versioned]

    @property
    def is_current(self) -> bool:
        """Whether the dataset has still the form in which these rows were found."""
        return True

    def loaded(self) -> TensorSource:
        """Return the same rows as tensors, on the host."""
        return self

    def to(self, device: torch.device) -> TensorSource:
        """Return the same rows, which must be in memory, on a device."""
        raise NotImplementedError


class MemorySource(TensorSource):
    """TensorSource of tensors, as the list of a `TensorDataset` or a dictionary of columns.

    Args:
        tensors: With a row per sample each.
        source: What they are a copy of.
        owner: The dataset that they are of, which may be given others.
    """

    in_memory = True

    def __init__(
        self,
        tensors: Sequence[Tensor] | Mapping[str, Tensor],
        source: TensorSource | None = None,
        owner: TensorDataset | None = None,
    ) -> None:
        self._owner, self._given = owner, tuple(tensors) if owner is not None else ()
        self._names = tuple(tensors) if isinstance(tensors, Mapping) else None
        self._tensors = list(tensors.values() if isinstance(tensors, Mapping) else tensors)
        self._source, self._copied = source, None if source is None else source.version
        if source is not None:
            self.versioned = source.versioned
        else:
            self.versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]  # which have no version
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors)
        if not any(tensor.requires_grad for tensor in self._tensors):  # those lead back to the whole, one by one
            self.sample_nbytes = sum(tensor[:1].nbytes for tensor in self._tensors)

    def __call__(self, indices: Tensor) -> Any:
        """Return the rows of these indices, in fresh memory."""
        self._follow_source()
        if self._tensors and self._tensors[0].device != indices.device:
            indices = pinned(indices) if self._tensors[0].is_cuda else indices
            indices = indices.to(self._tensors[0].device, non_blocking=True)
        return self._named([tensor.index_select(0, indices) for tensor in self._tensors])

    @property
    def is_current(self) -> bool:
        """Whether the dataset has still the form in which these rows were found."""
        if self._owner is not None:
            now = self._owner.tensors
            return len(now) == len(self._given) and all(map(operator.is_, now, self._given))
        return self._source is None or self._source.is_current

    def to(self, device: torch.device) -> MemorySource:
        """Return the same rows on a device."""
        return MemorySource(self._named([tensor.to(device) for tensor in self._tensors]), source=self)

    @property
    def columns(self) -> Any:
        """The tensors of all rows."""
        self._follow_source()
        return self._named(self._tensors)

    def _follow_source(self) -> None:
        """Copy anew what has been changed in place since the last copy."""
        if self._source is not None and self._source.version != self._copied:
            self._copied = self._source.version
            for mine, changed in zip(self._tensors, self._source._tensors, strict=True):  # type: ignore[attr-defined]
                mine.copy_(changed)

    def _named(self, tensors: list[Tensor]) -> Any:
        return tensors if self._names is None else dict(zip(self._names, tensors, strict=True))


class TableSource(TensorSource):
    """TensorSource of a `datasets.Dataset` in torch or numpy format, as a dictionary of column tensors.

    Columns of numbers, or of lists that all have one shape, are read from Arrow directly: without copies for the whole
    table, without the formatter of the library for some rows. Any other table is read as the library formats it.
    """

    def __init__(self, table: Any) -> None:
        self._table, self._format = table, table.format
        self._fingerprint, self._is_current = _fingerprint_of(table), True
        some = sorted({0, len(table) // 2, len(table) - 1}) if len(table) else []
        formatted = _numbers(table[some]) if some else None
        self._like = None if formatted is None else _plain_columns(table, formatted)
        if self._like is not None:
            self._arrow = table.with_format("arrow", columns=list(self._like))
            if all(_same(formatted[name], column) for name, column in self._from_arrow(some).items()):  # type: ignore[index]
                self.sample_nbytes = sum(one.nbytes for one in self._like.values())
                self.nbytes = self.sample_nbytes * len(table)
            else:
                self._like = None

    def __call__(self, indices: Tensor) -> Any:
        """Return the rows of these indices."""
        rows = indices.tolist()
        if self._like is not None:
            return self._from_arrow(rows, copies=True)
        columns = _numbers(self._table[rows])
        if columns is None:  # text, ragged or nested
            return default_collate(self._table.__getitems__(rows))
        return columns

    def loaded(self) -> MemorySource:
        """Return the whole table as tensors."""
        return MemorySource(self._from_arrow(slice(None)), source=self)

    @property
    def is_current(self) -> bool:
        """Whether the dataset has still the form in which these rows were found."""
        # The library renews the fingerprint with every change; to ask for the format costs a hundred times as much.
        fingerprint = _fingerprint_of(self._table)
        if fingerprint is None or fingerprint != self._fingerprint:
            self._fingerprint, self._is_current = fingerprint, self._table.format == self._format
        return self._is_current

    def _from_arrow(self, rows: list[int] | slice, copies: bool = False) -> dict[str, Tensor]:
        table = self._arrow[rows]
        return {name: _column(table[name], like, copies) for name, like in self._like.items()}  # type: ignore[union-attr]


class SubsetSource(TensorSource):
    """TensorSource of a `Subset`, fetched from what it is a subset of.

    Args:
        rows: Place of each sample in the whole.
        whole: What it is a subset of.
        subset: The dataset, which may be given other samples; `None` if it may not.
    """

    def __init__(self, rows: Tensor, whole: TensorSource, subset: Subset[Any] | None = None) -> None:
        self._rows, self._whole, self._subset = rows, whole, subset
        self._given = None if subset is None else (copy.copy(subset.indices), subset.dataset)
        self.in_memory = whole.in_memory
        self.sample_nbytes, self.nbytes, self.versioned = whole.sample_nbytes, whole.nbytes, whole.versioned

    @property
    def columns(self) -> Any:
        """The tensors of the whole, which has more rows."""
        return self._whole.columns

    @property
    def is_current(self) -> bool:
        """Whether the dataset has still the form in which these rows were found."""
        if self._subset is not None and self._given is not None:
            indices, dataset = self._given
            if self._subset.dataset is not dataset or not _equal(self._subset.indices, indices):
                return False
        return self._whole.is_current

    def __call__(self, indices: Tensor) -> Any:
        """Return the rows of these indices."""
        return self._whole(self._rows.index_select(0, indices))

    def loaded(self) -> TensorSource:
        """Return the same rows of the whole as tensors."""
        return SubsetSource(self._rows, self._whole.loaded(), self._subset)

    def to(self, device: torch.device) -> TensorSource:
        """Return the same rows of the whole on a device."""
        return SubsetSource(self._rows, self._whole.to(device), self._subset)


def _equal(now: Any, before: Any) -> bool:
    """Return whether indices are the same; of a list that takes 5 milliseconds a million."""
    if isinstance(now, numpy.ndarray) or isinstance(before, numpy.ndarray):
        return numpy.array_equal(now, before)
    return bool(now == before)


def tensor_source_of(dataset: Dataset[Any]) -> TensorSource | None:
    """Return what fetches many samples at once, just as the default collate function joins single ones.

    Only for what is known to draw nothing and to index alike: by exact type a `TensorDataset`, a `datasets.Dataset` in
    torch or numpy format, and a `Subset` of one; `None` for anything else.
    """
    if type(dataset) is TensorDataset:
        can_be = all(map(_can_be_selected, dataset.tensors))
        return MemorySource(dataset.tensors, owner=dataset) if can_be else None
    if type(dataset) is Subset:
        rows = dataset.indices if isinstance(dataset.indices, (Sequence, numpy.ndarray)) else ()
        places = numpy.asarray(rows)
        whole = tensor_source_of(dataset.dataset) if places.ndim == 1 and places.dtype.kind in "iu" else None
        if whole is None:
            return None
        length = len(dataset.dataset)  # type: ignore[arg-type]
        return SubsetSource(torch.as_tensor(not_negative(places.tolist(), length), dtype=torch.int64), whole, dataset)
    return TableSource(dataset) if _is_table(dataset) else None


def _can_be_selected(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.dtype not in (torch.uint16, torch.uint32, torch.uint64)


def not_negative(indices: Iterable[Any], length: int) -> list[int]:
    """Return indices counted from the front; a negative one counts from the end, as in a list."""
    return [int(index) + length if index < 0 else int(index) for index in indices]


def mark_of(dataset: Any) -> int:
    """Return a number by which it shows that data is not the same on all processes.

    It is of the rows of a subset, and of a few samples of tensors and tables; nobody else's code is run.
    """
    if type(dataset) is Subset:
        return crc32(repr(list(dataset.indices)).encode(), mark_of(dataset.dataset))
    if type(dataset) is ConcatDataset:
        return crc32(repr([mark_of(one) for one in dataset.datasets]).encode())
    if type(dataset) is TensorDataset and len(dataset):
        few = [
            tensor[[0, len(dataset) // 2, -1]].detach().cpu() for tensor in dataset.tensors if _can_be_selected(tensor)
        ]
        return crc32(b"".join(one.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for one in few))
    if _is_of_datasets(dataset) and len(dataset):
        return crc32(repr(dataset.with_format("arrow")[[0, len(dataset) // 2, len(dataset) - 1]].to_pydict()).encode())
    return 0


def _is_of_datasets(dataset: Any) -> bool:
    # Asked by name: importing datasets costs a second, and who has one has imported it.
    kind = type(dataset)
    return (kind.__module__, kind.__qualname__) == ("datasets.arrow_dataset", "Dataset")


def _is_table(dataset: Any) -> bool:
    if not _is_of_datasets(dataset):
        return False
    return dataset.format["type"] in ("torch", "numpy") and not dataset.format["format_kwargs"]


def _fingerprint_of(table: Any) -> str | None:
    fingerprint: str | None = getattr(table, "_fingerprint", None)
    return fingerprint


def _numbers(columns: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return formatted columns as tensors if each came as one numeric array with a row per sample, else `None`."""
    for column in columns.values():
        is_numeric = isinstance(column, Tensor) or getattr(getattr(column, "dtype", None), "kind", "") in tuple("iufb")
        if not is_numeric or column.ndim == 0:
            return None
    return {name: torch.as_tensor(column) for name, column in columns.items()} or None


def _plain_columns(table: Any, formatted: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a row of each column; `None` if not all are plain in the whole table."""
    like = {name: column[0] for name, column in formatted.items()}
    if table.format["output_all_columns"]:
        return None
    are_plain = all(_is_plain(chunk, one.shape) for name, one in like.items() for chunk in table.data[name].chunks)
    return like if are_plain else None


def _is_plain(array: Any, shape: Sequence[int]) -> bool:
    """Return whether an Arrow array holds numbers, or lists of lists of them of this shape, and nothing is missing."""
    array = getattr(array, "storage", array)  # of datasets' own types, such as Array2D
    if array.null_count:
        return False
    if not shape:
        return str(array.type).startswith(("int", "uint", "float", "double", "halffloat", "bool"))
    if not hasattr(array, "value_lengths"):
        return False
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    return bool((lengths == shape[0]).all()) and _is_plain(array.flatten(), shape[1:])


def _column(column: Any, like: Tensor, copies: bool) -> Tensor:
    """Return a plain Arrow column as a tensor.

    Args:
        column: Of an Arrow table.
        like: A row of it, as the library formats it: shape and dtype.
        copies: For who may write to it: otherwise the memory can be Arrow's own, or that of a file.
    """
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    for _ in like.shape:
        array = getattr(array, "storage", array).flatten()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the memory may not be written to
        values = torch.from_numpy(getattr(array, "storage", array).to_numpy(zero_copy_only=False))
    return values.reshape(len(column), *like.shape).to(like.dtype, copy=copies)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def divide(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Divide rows that were fetched together into micro-batches.

    Each is memory of its own to who uses it: no writing to one, and no gradient through it, reaches another. Each is
    aligned as if it had been fetched alone.

    Args:
        batch: A list or a dictionary of tensors, as `TensorSource` return it.
        sizes: Samples of each part.
    """
    if isinstance(batch, Mapping):
        columns = [_parts(column, sizes) for column in batch.values()]
        return [dict(zip(batch, parts, strict=True)) for parts in zip(*columns, strict=True)]
    return [list(parts) for parts in zip(*(_parts(column, sizes) for column in batch), strict=True)]


def _parts(column: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    parts = [part.data for part in torch.split(column, list(sizes))]  # no views to autograd
    return parts if column.is_pinned() else [aligned(part) for part in parts]  # the device gets copies of those
