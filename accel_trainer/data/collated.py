"""Collated batches: their samples, counted and taken; their memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor


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


_ALIGNMENTS = {"cpu": 64, "cuda": 256}  # bytes; what torch's own allocators keep to


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that begins where torch's own allocator would let it.

    Kernels are chosen by the address too: matrix products of the same numbers at another one differ in their last bits.
    """
    alignment = _ALIGNMENTS.get(tensor.device.type)
    if alignment is None or tensor.layout != torch.strided or tensor.is_nested:
        return tensor
    return tensor.clone() if tensor.data_ptr() % alignment else tensor


def pinned(batch: Any) -> Any:
    """Return a batch in page-locked memory, from which a device copies while it computes.

    What cannot be pinned stays as it is: tensors on a device already, sparse and nested ones. An object pins itself,
    where it has a method for that.
    """
    if isinstance(batch, Tensor):
        may_be = batch.device.type == "cpu" and batch.layout == torch.strided and not batch.is_nested
        return batch.pin_memory() if may_be else batch
    try:
        if hasattr(batch, "pin_memory"):
            return batch.pin_memory()
        if isinstance(batch, Mapping):
            return _with_values(batch, {key: pinned(item) for key, item in batch.items()})
        if isinstance(batch, (list, tuple)):
            items = [pinned(item) for item in batch]
            return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):  # it cannot be made anew from such
        pass
    return batch


def _with_values(mapping: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if type(mapping) is dict:
        return values
    changed = copy.copy(mapping)
    changed.update(values)  # type: ignore[attr-defined]
    return changed
