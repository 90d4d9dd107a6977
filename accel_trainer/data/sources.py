"""Fetch many samples at once from data that is rows of numbers: tensors, and tables of the `datasets` library.

The result equals that of the loader's default collate function, without Python work for each sample.
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
    """The samples of a dataset as rows that are fetched together."""

    in_memory = False  # whether they are tensors already; a loader worker would only have to send them
    sample_nbytes: int | None = None  # bytes of one row as tensors; `None` if rows have several shapes
    nbytes = 0  # bytes needed to keep the data in memory
    # Tensors whose versions, counted by torch, grow when the data is changed in place, except by NumPy.
    versioned: Sequence[Tensor] = ()

    def __call__(self, indices: Tensor) -> Any:
        """Return the rows of these indices, collated."""
        raise NotImplementedError

    @property
    def columns(self) -> Any:
        """The tensors of all rows, and maybe of more, in the form of a batch; `None` if not in memory."""
        return None

    @property
    def version(self) -> list[int]:
        """A key that changes when the data is changed in place."""
        return [tensor._version for tensor in self.versioned]

    @property
    def is_current(self) -> bool:
        """Whether the dataset still is as it was when this source was made."""
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
        tensors: Each with a row per sample.
        source: The source that they are a copy of, if any.
        owner: The dataset that they belong to, if any; it may get other tensors later.
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
        with_version = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self.versioned = with_version if source is None else source.versioned
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors)
        if not any(tensor.requires_grad for tensor in self._tensors):  # the graph of each row would lead to the whole
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
        """Whether the dataset still is as it was when this source was made."""
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
        self._fingerprint, self._is_current = getattr(table, "_fingerprint", None), True
        self._like: dict[str, Tensor] = {}  # a row of each column; empty if Arrow is not read directly
        some = sorted({0, len(table) // 2, len(table) - 1}) if len(table) else []
        formatted = _numbers(table[some]) if some else None
        if formatted is None or table.format["output_all_columns"]:
            return
        like = {name: column[0] for name, column in formatted.items()}
        if not all(_is_dense(chunk, row.shape) for name, row in like.items() for chunk in table.data[name].chunks):
            return
        self._like, self._arrow = like, table.with_format("arrow", columns=list(like))
        if all(_same(formatted[name], column) for name, column in self._from_arrow(some).items()):
            self.sample_nbytes = sum(row.nbytes for row in like.values())
            self.nbytes = self.sample_nbytes * len(table)
        else:
            self._like = {}

    def __call__(self, indices: Tensor) -> Any:
        """Return the rows of these indices."""
        rows = indices.tolist()
        if self._like:
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
        """Whether the dataset still is as it was when this source was made."""
        # The library renews the fingerprint with every change; to ask for the format costs a hundred times as much.
        fingerprint = getattr(self._table, "_fingerprint", None)
        if fingerprint is None or fingerprint != self._fingerprint:
            self._fingerprint, self._is_current = fingerprint, self._table.format == self._format
        return self._is_current

    def _from_arrow(self, rows: list[int] | slice, copies: bool = False) -> dict[str, Tensor]:
        table = self._arrow[rows]
        return {name: _column(table[name], like, copies) for name, like in self._like.items()}


class SubsetSource(TensorSource):
    """TensorSource of a `Subset`: rows of `whole`, the source of its dataset."""

    def __init__(self, indices: Tensor, whole: TensorSource, subset: Subset[Any]) -> None:
        self._indices, self._whole, self._subset = indices, whole, subset
        self._given = copy.copy(subset.indices), subset.dataset  # which may be replaced later
        self.in_memory = whole.in_memory
        self.sample_nbytes, self.nbytes, self.versioned = whole.sample_nbytes, whole.nbytes, whole.versioned

    @property
    def columns(self) -> Any:
        """The tensors of the whole, which has more rows."""
        return self._whole.columns

    @property
    def is_current(self) -> bool:
        """Whether the dataset still is as it was when this source was made."""
        indices, dataset = self._given
        is_same = self._subset.dataset is dataset and _equal(self._subset.indices, indices)
        return is_same and self._whole.is_current

    def __call__(self, indices: Tensor) -> Any:
        """Return the rows of these indices."""
        return self._whole(self._indices.index_select(0, indices))

    def loaded(self) -> TensorSource:
        """Return the same rows of the whole as tensors."""
        return SubsetSource(self._indices, self._whole.loaded(), self._subset)

    def to(self, device: torch.device) -> TensorSource:
        """Return the same rows of the whole on a device."""
        return SubsetSource(self._indices, self._whole.to(device), self._subset)


def _equal(now: Any, before: Any) -> bool:
    """Return whether indices are the same; of a list that takes 5 milliseconds a million."""
    if isinstance(now, numpy.ndarray) or isinstance(before, numpy.ndarray):
        return numpy.array_equal(now, before)
    return bool(now == before)


def tensor_source_of(dataset: Dataset[Any]) -> TensorSource | None:
    """Return a source whose batches equal those of the default collate function; `None` if there is none.

    There is one for the types that draw nothing at random and have known rows: exactly `TensorDataset`,
    `datasets.Dataset` in torch or numpy format, and a `Subset` of one of these.
    """
    if type(dataset) is TensorDataset:
        can_be = all(map(_can_be_selected, dataset.tensors))
        return MemorySource(dataset.tensors, owner=dataset) if can_be else None
    if type(dataset) is Subset:
        indices = numpy.asarray(dataset.indices if isinstance(dataset.indices, (Sequence, numpy.ndarray)) else ())
        whole = tensor_source_of(dataset.dataset) if indices.ndim == 1 and indices.dtype.kind in "iu" else None
        if whole is None:
            return None
        length = len(dataset.dataset)  # type: ignore[arg-type]
        return SubsetSource(torch.as_tensor(not_negative(indices.tolist(), length), dtype=torch.int64), whole, dataset)
    if not _is_of_datasets(dataset):
        return None
    form: Any = dataset.format  # type: ignore[attr-defined]
    return TableSource(dataset) if form["type"] in ("torch", "numpy") and not form["format_kwargs"] else None


def _can_be_selected(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.dtype not in (torch.uint16, torch.uint32, torch.uint64)


def not_negative(indices: Iterable[Any], length: int) -> list[int]:
    """Return indices counted from the front; a negative one counts from the end, as in a list."""
    return [int(index) + length if index < 0 else int(index) for index in indices]


def mark_of(dataset: Any) -> int:
    """Return a checksum that shows whether data differs between processes.

    It covers the indices of a subset, and a few samples of tensors and tables; no code of the user is run.
    """
    if type(dataset) is Subset:
        return crc32(repr(list(dataset.indices)).encode(), mark_of(dataset.dataset))
    if type(dataset) is ConcatDataset:
        return crc32(repr([mark_of(part) for part in dataset.datasets]).encode())
    if type(dataset) is TensorDataset and len(dataset):
        few = [
            tensor[[0, len(dataset) // 2, -1]].detach().cpu() for tensor in dataset.tensors if _can_be_selected(tensor)
        ]
        return crc32(b"".join(rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for rows in few))
    if _is_of_datasets(dataset) and len(dataset):
        return crc32(repr(dataset.with_format("arrow")[[0, len(dataset) // 2, len(dataset) - 1]].to_pydict()).encode())
    return 0


def _is_of_datasets(dataset: Any) -> bool:
    # Compared by name: importing `datasets` takes a second.
    kind = type(dataset)
    return (kind.__module__, kind.__qualname__) == ("datasets.arrow_dataset", "Dataset")


def _numbers(columns: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return formatted columns as tensors if each came as one numeric array with a row per sample, else `None`."""
    for column in columns.values():
        is_numeric = isinstance(column, Tensor) or getattr(getattr(column, "dtype", None), "kind", "") in tuple("iufb")
        if not is_numeric or column.ndim == 0:
            return None
    return {name: torch.as_tensor(column) for name, column in columns.items()} or None


def _is_dense(array: Any, shape: Sequence[int]) -> bool:
    """Return whether an Arrow array holds numbers, or lists of lists of them of this shape, and nothing is missing."""
    array = getattr(array, "storage", array)  # in `datasets`' own types, such as Array2D
    if array.null_count:
        return False
    if not shape:
        return str(array.type).startswith(("int", "uint", "float", "double", "halffloat", "bool"))
    if not hasattr(array, "value_lengths"):
        return False
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    return bool((lengths == shape[0]).all()) and _is_dense(array.flatten(), shape[1:])


def _column(column: Any, like: Tensor, copies: bool) -> Tensor:
    """Return a dense Arrow column as a tensor, with the shape and dtype of `like`, a row of it.

    Without `copies` nobody may write to it: the memory can be Arrow's own, or that of a file.
    """
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    for _ in like.shape:
        array = getattr(array, "storage", array).flatten()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the memory may not be written to
        values = torch.from_numpy(getattr(array, "storage", array).to_numpy(zero_copy_only=False))
    return values.reshape(len(column), *like.shape).to(like.dtype, copy=copies)


def _same(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.nan_to_num(), second.nan_to_num())


def divide(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Divide a batch that a `TensorSource` has fetched into micro-batches of these sizes.

    No gradient through one of them reaches another, and each is aligned as if it had been fetched alone.
    """
    if isinstance(batch, Mapping):
        columns = [_parts(column, sizes) for column in batch.values()]
        return [dict(zip(batch, parts, strict=True)) for parts in zip(*columns, strict=True)]
    return [list(parts) for parts in zip(*(_parts(column, sizes) for column in batch), strict=True)]


def _parts(column: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    parts = [part.data for part in torch.split(column, list(sizes))]  # no views to autograd
    return parts if column.is_pinned() else [aligned(part) for part in parts]  # the device gets copies of those
