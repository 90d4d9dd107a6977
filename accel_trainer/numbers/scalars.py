"""Numbers on the device: finite or not, joined, converted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_Name = TypeVar("_Name")


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all elements of all tensors are finite; one read-back if they are."""
    tensors = list(tensors)
    return any(math.isfinite(sum_of_norms(tensors, order)) for order in (2, math.inf))


def not_finite(named: Mapping[_Name, Tensor]) -> list[_Name]:
    """Return the names of tensors that hold elements which are not finite; one read-back if there are none."""
    if is_finite(named.values()):
        return []
    return [name for name, tensor in named.items() if not is_finite([tensor])]


def sum_of_norms(tensors: Iterable[Tensor], order: float = 2) -> float | Tensor:
    """Return a number that is finite if all elements of all tensors are, on their device; 0 of none.

    Squares of finite elements may overflow; the norm of order infinity, which cannot, takes ten times as long.
    """
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            dense = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor
            if tensor.element_size() == 1:  # 8-bit floats have no norm
                dense = dense.float()
            groups.setdefault(dense.dtype, []).append(dense.detach())
    sums = [torch.stack(torch._foreach_norm(group, order)).sum() for group in groups.values()]
    return sum(sums[1:], sums[0]) if sums else 0.0


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest precision of a device: not every one has double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_device(value: float | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a number, or a tensor of any device, as a tensor on a device, without waiting for it.

    With `dtype=None` a tensor keeps its type, as far as the device has it.
    """
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)  # a copy from the host would wait for the device
    if value.device == device:
        return value if dtype is None else value.to(dtype)
    if dtype is None and value.dtype == torch.float64:
        dtype = widest_float(device)
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()  # from other memory the copy may wait too
    return value.to(device, dtype, non_blocking=True)


def column_of(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Return Python's numbers, and scalars of any device, as one tensor on the device."""
    dtype = widest_float(device)
    if not any(isinstance(number, Tensor) for number in numbers):
        return on_device(torch.tensor(numbers, dtype=torch.float64), device)
    scalars = [on_device(number, device, None if isinstance(number, Tensor) else dtype) for number in numbers]
    return torch.stack(scalars).to(dtype)
