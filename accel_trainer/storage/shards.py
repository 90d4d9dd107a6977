"""A checkpoint in shards: each process's rows in files of its own, read by any number of processes.

The rows are a formula (`rows_of`), so that the index has the shape of each divided tensor only. What is not divided is
in the first shard. Each process reads the rows that it needs, whatever the number of shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.dtensors import cut_of, is_cut, local, own_rows, rows_of

Tensors = dict[str, dict[str, Tensor]]  # by file and name


@dataclass(frozen=True)
class Shard:
    """What a process saves of a divided model.

    Attributes:
        index: Which of the shards it is, 0-based; `None` for a process that saves nothing, since another has its rows.
        number: How many shards there are.
        shapes: The whole shape of each divided tensor, by file and name.
    """

    index: int | None
    number: int
    shapes: dict[str, dict[str, list[int]]]

    def file(self, name: str) -> str:
        """Return the name of the file of this shard that stands for a whole file."""
        return shard_of(name, self.index or 0, self.number)


def shard_of(name: str, index: int, number: int) -> str:
    """Return the name of a shard of a file.

    Example:
        >>> shard_of("model.safetensors", 0, 4)
        'model-00001-of-00004.safetensors'
    """
    return f"{name.removesuffix('.safetensors')}-{index + 1:05d}-of-{number:05d}.safetensors"


def own_shard(tensors: Mapping[str, Mapping[str, Tensor]], process: int) -> tuple[Tensors, Shard]:
    """Return what a process saves of these tensors, no copies, and which shard that is."""
    divided = {file: {name: one for name, one in content.items() if is_cut(one)} for file, content in tensors.items()}
    cut = next((cut_of(one) for content in divided.values() for one in content.values()), None)
    if cut is None:
        raise ValueError("None of these tensors is divided.")
    own: Tensors = {file: {} for file in tensors}
    for file, content in tensors.items():
        for name, tensor in content.items():
            if is_cut(tensor) or process == 0:
                own[file][name] = local(tensor)
    shapes = {file: {name: list(one.shape) for name, one in content.items()} for file, content in divided.items()}
    if not cut.is_kept_here:
        own = {file: {} for file in tensors}
    return own, Shard(cut.index if cut.is_kept_here else None, cut.number, shapes)


class Parts:
    """A tensor on the disk whose rows are in several files, cut by `rows_of`; nothing is read before it is used."""

    def __init__(self, parts: Sequence[Tensor], shape: Sequence[int]) -> None:
        self._parts, self.shape, self.dtype = parts, torch.Size(shape), parts[0].dtype
        for index, part in enumerate(parts):
            start, stop = rows_of(self.shape[0], index, len(parts))
            if part.shape != (stop - start, *self.shape[1:]) or part.dtype != self.dtype:
                raise ValueError(f"a part has the shape {tuple(part.shape)} in a tensor of {tuple(self.shape)}")

    def copy_rows(self, target: Tensor, start: int, stop: int) -> None:
        """Copy the rows from `start` to `stop` into a tensor that has just these."""
        for index, part in enumerate(self._parts):
            first, last = rows_of(self.shape[0], index, len(self._parts))
            low, high = max(first, start), min(last, stop)
            if low < high:
                target[low - start : high - start].copy_(part[low - first : high - first])

    def whole(self) -> Tensor:
        """Return all rows in one tensor."""
        return torch.cat(list(self._parts))


@torch.no_grad()
def fill(target: Tensor, value: Tensor | Parts) -> None:
    """Give a tensor a value of its shape, in place: one that is divided over the processes, its own rows."""
    start, stop = own_rows(target) if target.ndim else (0, 1)
    if isinstance(value, Parts):
        value.copy_rows(local(target), start, stop)
    elif is_cut(target):
        local(target).copy_(value[start:stop])
    else:
        target.copy_(value)


def whole(value: Tensor | Parts) -> Tensor:
    """Return a value as one tensor."""
    return value.whole() if isinstance(value, Parts) else value


def joined(shards: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the tensors of a file that is in shards, the divided ones as `Parts`."""
    undivided: dict[str, Any] = {name: tensor for name, tensor in shards[0].items() if name not in shapes}
    return undivided | {name: Parts([shard[name] for shard in shards], shape) for name, shape in shapes.items()}


def deal(sizes: Mapping[str, int], number: int) -> dict[str, int]:
    """Deal tensors of so many bytes to writers, in their order, so that each gets about as much; return name -> writer.

    Writers are counted from 0 on, and each has at least one tensor.

    Example:
        >>> deal({"a": 4, "b": 1, "c": 1, "d": 2}, 2)
        {'a': 0, 'b': 1, 'c': 1, 'd': 1}
    """
    total, before = max(1, sum(sizes.values())), 0
    owners = {}
    for name, size in sizes.items():
        owners[name] = min(number - 1, (before + size // 2) * number // total)
        before += size
    numbers = {owner: index for index, owner in enumerate(sorted(set(owners.values())))}
    return {name: numbers[owner] for name, owner in owners.items()}
