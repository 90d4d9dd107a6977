"""The norm of a gradient, of which each process may have some rows, and scaling it down."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

from ..base.dtensors import local, locals_of, own_rows
from .scalars import widest_float


@torch.no_grad()
def clip(gradients: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale gradients, in place, so that their norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in locals_of(gradients):
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, dtype), group in groups.items():
        torch._foreach_mul_(group, scale.to(device, dtype))


@torch.no_grad()
def norm_over(gradients: Sequence[Tensor], device: torch.device, group: torch.distributed.ProcessGroup) -> Tensor:
    """Return the norm, on the device, of gradients whose rows are divided over the processes of a group."""
    mine = [gradient for gradient in locals_of(gradients) if gradient.numel()]
    own: Tensor = torch.nn.utils.get_total_norm(mine) if mine else torch.zeros(())
    square = own.to(device, widest_float(device)).square()
    torch.distributed.all_reduce(square, group=group)
    dtypes = {gradient.dtype for gradient in gradients}  # not of the own rows: a process may have none
    return square.sqrt().to(torch.float64 if torch.float64 in dtypes else torch.float32)


@torch.no_grad()
def norm_by_rows(
    gradients: Sequence[Tensor], device: torch.device, group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """Return the norm of gradients, on the device, the same to the last bit whatever rows a process has.

    A row, an entry of the first dimension, is whole on one process. Its squares are added by halves, in an order that
    depends on its length alone. The sums of all rows are then added on each process alike.
    """
    dtype = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    lengths = [len(gradient) if gradient.ndim else 1 for gradient in gradients]
    sums = torch.zeros(sum(lengths), dtype=dtype, device=device)
    end = 0
    for gradient, length in zip(gradients, lengths, strict=True):
        first, last = own_rows(gradient) if gradient.ndim else (0, 1)
        mine = local(gradient)
        if mine.numel():
            sums[end + first : end + last] = _sums_of_squares(mine.reshape(last - first, -1), dtype)
        end += length
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)  # each is zero on all processes but one
    return sums.sum().sqrt()


def _sums_of_squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of squares of each row, shape `(rows,)`."""
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    squares = rows.to(dtype).square()
    while (width := squares.shape[1]) > 1:
        half = math.ceil(width / 2)
        halved = squares[:, :half]
        halved[:, : width - half] += squares[:, half:]
        squares = halved
    return squares[:, 0]
