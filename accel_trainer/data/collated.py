"""Collated batches: their samples, counted and taken; their memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor


def _is_array(item: Any) -> bool:
    return isinstance(item, (torch.Tensor, numpy.ndarray)) and item.ndim > 0


def leaves_of(batch: Any) -> Iterator[Any]:
    """Yield the tensors and other values in the lists, tuples and dictionaries of a collated batch."""
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
    """Return the number of samples of a collated batch, by its targets, since a loss is the mean over those.

    Targets are the second item of a pair, or the entry of a dictionary with such a name; without any, or where their
    number is not clear, the inputs count. A batch is complete if anything in it has as many rows, or columns, as were
    requested: beside these there may be boxes, nodes, or several views of each sample. Without targets, more rows than
    requested are parts of samples.

    Args:
        batch: Tensors, arrays and lists, in lists, tuples and dictionaries.
        num_asked: Number of samples requested; `None` if that is not known.
        may_be_pair: Whether a batch of two is inputs and targets, rather than two samples.

    Returns:
        Where the batch does not show its number, `num_asked`, or the length of the first tensor or array in it.
    """
    parts, has_targets = [batch], False
    if may_be_pair and isinstance(batch, (list, tuple)) and len(batch) == 2 and not hasattr(batch, "_fields"):
        parts, has_targets = [batch[1], batch[0]], True
    elif isinstance(batch, Mapping):
        named = [batch[name] for name in TARGET_NAMES if name in batch]
        parts = [*named, {name: item for name, item in batch.items() if name not in TARGET_NAMES}]
        has_targets = bool(named)
    counts = [count for part in parts if (count := _num_rows(part, num_asked)) is not None]
    arrays = [leaf for leaf in leaves_of(batch) if _is_array(leaf)]
    if num_asked is None:
        return next(iter(counts), next(map(len, arrays), None))
    # One row may be sequences that were joined.
    is_joined = bool(arrays) and all(array.ndim == 2 and array.shape[0] == 1 < array.shape[1] for array in arrays)
    is_complete = num_asked in counts or any(num_asked in array.shape[:2] for array in arrays)
    if is_joined or is_complete or not counts or (counts[0] > num_asked and not has_targets):
        return num_asked
    return counts[0]


def _num_rows(part: Any, num_asked: int | None) -> int | None:
    """Return the common length of all columns of a part of a batch, `None` if they differ."""
    if _is_array(part):
        return len(part)
    if isinstance(part, (list, tuple)) and not hasattr(part, "_fields"):
        are_samples = not any(map(_is_array_or_list, part))  # texts, numbers, or a dictionary for each sample
        if part and (are_samples or len(part) == num_asked):
            return len(part)
    if not isinstance(part, (Mapping, list, tuple)):
        return None
    columns = part.values() if isinstance(part, Mapping) else part
    lengths = {_num_rows(column, num_asked) for column in columns if _is_array_or_list(column)}
    return lengths.pop() if len(lengths) == 1 else None


def _is_array_or_list(item: Any) -> bool:
    return _is_array(item) or isinstance(item, (list, tuple))


def _are_columns(items: Sequence[Any]) -> bool:
    """Return whether each item is a dictionary, or has as many entries as there are items."""
    return all(isinstance(item, Mapping) or (_is_array_or_list(item) and len(item) == len(items)) for item in items)


def take(batch: Any, start: int, stop: int, num_samples: int) -> Any:
    """Return the samples `start:stop` of a collated batch.

    Tensors and arrays must have an entry per sample, and lists may; single numbers and texts stay as they are.

    Raises:
        TypeError: A tensor or an array does not have `num_samples` entries.
    """
    if _is_array(batch):
        if len(batch) != num_samples:
            raise TypeError(
                f"A batch of {num_samples} samples holds a tensor of shape {tuple(batch.shape)}: it cannot be cut into "
                "micro-batches. Give every tensor one entry per sample."
            )
        return batch[start:stop]
    if isinstance(batch, (list, tuple)) and len(batch) == num_samples and not _are_columns(batch):
        return batch[start:stop]
    if isinstance(batch, (Mapping, list, tuple)):
        return _mapped(lambda item: take(item, start, stop, num_samples), batch)
    return batch


_ALIGNMENTS = {"cpu": 64, "cuda": 256}  # bytes, as in torch's own allocators


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor at an address that torch's own allocator could have chosen.

    The choice of a kernel depends on it: matrix products of the same numbers elsewhere may differ in their last bits.
    """
    alignment = _ALIGNMENTS.get(tensor.device.type)
    if alignment is None or tensor.layout != torch.strided or tensor.is_nested:
        return tensor
    return tensor.clone() if tensor.data_ptr() % alignment else tensor


def pinned(batch: Any) -> Any:
    """Return a batch in page-locked memory, from which a device copies while it computes.

    Tensors that are on a device already, sparse and nested tensors stay as they are. An object pins itself, if it has a
    method for that.
    """
    if isinstance(batch, Tensor):
        may_be = batch.device.type == "cpu" and batch.layout == torch.strided and not batch.is_nested
        return batch.pin_memory() if may_be else batch
    try:
        if hasattr(batch, "pin_memory"):
            return batch.pin_memory()
        if isinstance(batch, (Mapping, list, tuple)):
            return _mapped(pinned, batch)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):  # a type that cannot be built from its items
        pass
    return batch


def compact(batch: Any) -> Any:
    """Return a batch whose tensors have memory of their own: a view would be sent with all that it is a part of."""
    if isinstance(batch, Tensor):
        is_view = batch.layout == torch.strided and batch.untyped_storage().nbytes() > batch.nbytes
        return batch.clone() if is_view else batch
    try:
        return _mapped(compact, batch) if isinstance(batch, (Mapping, list, tuple)) else batch
    except (TypeError, AttributeError):  # a type that cannot be built from its items
        return batch


def _mapped(function: Callable[[Any], Any], batch: Any) -> Any:
    """Return a list, tuple or dictionary of the same kind, with a function applied to its items."""
    if not isinstance(batch, Mapping):
        items = [function(item) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    values = {key: function(item) for key, item in batch.items()}
    if type(batch) is dict:
        return values
    changed = copy.copy(batch)
    changed.update(values)  # type: ignore[attr-defined]
    return changed
