"""Tensors whose rows are divided over the processes: torch's `DTensor`, which no other file of the package knows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """How the rows of a tensor, its first dimension, are divided.

    Attributes:
        index: Which of the parts this process has, 0-based.
        number: How many parts there are; the last ones may be empty.
        is_kept_here: Whether this process is the one of its replicas that saves the part.
    """

    index: int
    number: int
    is_kept_here: bool


def rows_of(num_rows: int, index: int, number: int) -> tuple[int, int]:
    """Return start and end of the rows of one part, cut as by `torch.chunk`.

    Example:
        >>> [rows_of(5, index, 4) for index in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    size = -(-num_rows // number)
    return min(index * size, num_rows), min((index + 1) * size, num_rows)


def is_cut(tensor: object) -> bool:
    """Return whether a tensor's rows are divided over processes."""
    loaded = sys.modules.get("torch.distributed.tensor")  # no such tensor exists before it is; importing it takes time
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a tensor, no copy; the tensor itself where it is not divided."""
    return tensor._local_tensor if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return `local` of each tensor."""
    return [local(tensor) for tensor in tensors]


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of all elements of a tensor, wherever its rows are."""
    return tensor.numel() * tensor.element_size()


def cut_of(tensor: Any) -> Cut:
    """Return how a tensor is divided, by its placements on the mesh."""
    mesh, over = tensor.device_mesh, _mesh_dim_of(tensor)
    replicas = [mesh.get_local_rank(dim) for dim in range(mesh.ndim) if dim != over]
    return Cut(mesh.get_local_rank(over), mesh.size(over), not any(replicas))


def _mesh_dim_of(tensor: Any) -> int:
    """Return the dimension of the mesh over which the rows are divided."""
    placements = tensor.placements
    dims = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
    if len(dims) != 1 or placements[dims[0]].dim != 0 or type(placements[dims[0]]).__name__ != "Shard":
        raise NotImplementedError(f"A tensor is divided as {placements}; rows are, over one dimension of the mesh.")
    return dims[0]


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """Return start and end of the rows that this process has: all of a tensor that is not divided."""
    if not is_cut(tensor):
        return 0, len(tensor)
    cut = cut_of(tensor)
    return rows_of(len(tensor), cut.index, cut.number)


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of the same shape as a divided one, divided like it; all processes have the whole value."""
    start, stop = own_rows(like)
    divided: Any = torch.empty_like(like.detach(), dtype=value.dtype)
    divided._local_tensor.copy_(value[start:stop])
    return divided  # type: ignore[no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its rows; all processes call it for one that is divided."""
    return tensor.full_tensor() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def added_over_parts(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return a value per tensor, added up over the processes for those that are divided; no other is changed."""
    divided = [tensor for tensor in tensors if is_cut(tensor)]
    if not divided:
        return values
    are_divided = torch.tensor([is_cut(tensor) for tensor in tensors], device=values.device)
    total = torch.where(are_divided, values, 0).to(divided[0].device_mesh.device_type)  # type: ignore[attr-defined]
    torch.distributed.all_reduce(total, group=_group_of(divided[0]))
    return torch.where(are_divided, total.to(values.device), values)


def gather_rows(tensor: Tensor, receiver: int) -> Tensor | None:
    """Return a divided tensor whole, in host memory, on the process of this index among its parts; `None` on others.

    All processes that have a part call it; beside the result only one tensor's parts are in memory.
    """
    cut, mine = cut_of(tensor), local(tensor).detach().to(tensor.device_mesh.device_type)  # type: ignore[attr-defined]
    group = _group_of(tensor)
    size = -(-len(tensor) // cut.number)
    sent = mine.new_zeros(size, *tensor.shape[1:])
    sent[: len(mine)] = mine
    parts = [torch.empty_like(sent) for _ in range(cut.number)] if cut.index == receiver else None
    torch.distributed.gather(sent, parts, group=group, group_dst=receiver)
    if parts is None:
        return None
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for index, part in enumerate(parts):
        start, stop = rows_of(len(tensor), index, cut.number)
        whole[start:stop].copy_(part[: stop - start])
    return whole


def _group_of(tensor: Any) -> torch.distributed.ProcessGroup:
    return tensor.device_mesh.get_group(_mesh_dim_of(tensor))  # type: ignore[no-any-return]


def make_mesh(device_type: str, sizes: Sequence[int]) -> Any:
    """Return a mesh of all processes: `(replicas, parts)`, or `(parts,)`."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, tuple(sizes), mesh_dim_names=("replicate", "shard")[-len(sizes) :])
