"""Sums over micro-batches and processes: as they come, or in the order of one fixed tree.

Floating-point addition is not associative, so a sum whose order follows the number of processes has other last bits on
each layout. `TreeSum` adds in an order that depends on the number of micro-batches alone: neighbours in pairs, then
neighbouring pairs, and so on. A process adds those of its own micro-batches that are neighbours in the tree; what is
left is exchanged, and the process that owns a slice of the result adds it up in the order of the same tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.functional import pad

from ..base.dtensors import local
from ..base.exchange import any_process
from ..data.cut import Layout, run_of

_BUCKET = 2**23  # elements sent together: large enough to hide latency, small against the model


def add_over_processes(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over the processes, in place, many in one message."""
    for tensor in tensors:
        if tensor.layout != torch.strided:  # embeddings with sparse=True
            torch.distributed.all_reduce(tensor)
    for bucket in _buckets([tensor for tensor in tensors if tensor.layout == torch.strided]):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        torch.distributed.all_reduce(flat)
        _unflatten(flat, bucket)


@torch.no_grad()
def share_from_main(tensors: Iterable[Tensor], group: torch.distributed.ProcessGroup | None = None) -> None:
    """Overwrite each tensor, in place, with that of the main process, many in one message.

    All processes give equally many tensors of the same shapes. A `group` that is not the default one holds all
    processes too, and can send tensors that the default one cannot.
    """
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        torch.distributed.broadcast(as_bytes(flat), src=0, group=group)
        _unflatten(flat, bucket)


def are_same_everywhere(numbers: Tensor, group: torch.distributed.ProcessGroup | None = None) -> list[bool]:
    """Return for each whole number of a vector on the device whether all processes have the same: one read-back."""
    extremes = torch.cat([numbers, ~numbers])  # the least is the inverse of the greatest inverse
    torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group)
    greatest, inverse_of_least = extremes.chunk(2)
    same: list[bool] = (greatest == ~inverse_of_least).tolist()
    return same


def check_same_weights(model: nn.Module, replicas: torch.distributed.ProcessGroup | None = None) -> None:
    """Find processes whose weights differ: they would train different models from here on.

    `replicas` are those that have the same rows of a divided model.

    Raises:
        RuntimeError: With the first parameter that differs.
    """
    named = list(model.named_parameters())
    sums = torch.stack([sum_of_bits(local(parameter)) for _, parameter in named])
    for (name, _), is_same in zip(named, are_same_everywhere(sums, replicas), strict=True):
        if not is_same:
            raise RuntimeError(
                f"The weights differ between the processes, first in {name}. Call the model that compute_loss is "
                "given, not one it has from elsewhere, let nothing in it depend on the process, and set "
                "find_unused_parameters=True if a step can leave parameters without a gradient."
            )


def sum_of_bits(parameter: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as whole numbers of 64 bits: the widest are added fastest."""
    values = parameter.detach().contiguous().view(-1)
    if values.storage_offset() * values.element_size() % 8:
        values = values.clone()  # only where such numbers may begin can they be read
    in_bytes = values.view(torch.uint8)
    whole, rest = in_bytes.tensor_split([len(in_bytes) // 8 * 8])
    total = whole.view(torch.int64).sum()
    return total + pad(rest, (0, 8 - len(rest))).view(torch.int64).sum() if len(rest) else total


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors that have elements in groups of one dtype and limited size."""
    open_buckets: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        bucket, size = open_buckets.pop(tensor.dtype, ([], 0))
        if tensor.numel():
            bucket.append(tensor)
            size += tensor.numel()
        if size >= _BUCKET:
            yield bucket
        elif bucket:
            open_buckets[tensor.dtype] = bucket, size
    yield from (bucket for bucket, _ in open_buckets.values())


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, values in zip(tensors, torch.split(flat, sizes), strict=True):
        tensor.copy_(values.view(tensor.shape))


class ChainSum:
    """Add up lists of tensors, one list per micro-batch, one after the other, then over the processes."""

    def __init__(self, layout: Layout) -> None:
        self._several = layout.num_processes > 1
        self._sum: list[Tensor | None] | None = None

    def add(self, index: int, tensors: list[Tensor | None]) -> None:
        """Add the tensors of a micro-batch, and keep them."""
        self._sum = tensors if self._sum is None else _added(self._sum, tensors)

    def clear(self) -> None:
        """Forget what was added."""
        self._sum = None

    def total(self, num_micro_batches: int, like: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the sums over all processes, and begin anew."""
        total, self._sum = self._sum or [None] * len(like), None
        if not self._several:
            return total
        filled = [torch.zeros_like(tensor) if part is None else part for part, tensor in zip(total, like, strict=True)]
        add_over_processes(filled)
        return [*filled]


class Node(NamedTuple):
    """The sum over the micro-batches `start` to `start + size`; `size` is a power of two that divides `start`."""

    start: int
    size: int
    tensors: list[Tensor | None]


class TreeSum:
    """Add up lists of tensors, one list per micro-batch, in the order of one binary tree.

    With 5 micro-batches the sum is ((0 + 1) + (2 + 3)) + 4, on any number of processes. `None` is left out of it. At
    most log2(micro-batches) + 1 lists are alive at a time on a process.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout, self._run = layout, run_of(layout)
        self.clear()

    def add(self, index: int, tensors: list[Tensor | None]) -> None:
        """Add the tensors of a micro-batch, and keep them; a process adds its micro-batches in ascending order."""
        self._fill(index, len(tensors))
        push(self._nodes, Node(index, 1, tensors))
        self._num_added += 1

    def _fill(self, end: int, length: int) -> None:
        """Add nothing for the micro-batches of this process before `end` that have no samples."""
        for index in self._run[self._num_added :]:
            if index >= end:
                break
            push(self._nodes, Node(index, 1, [None] * length))
            self._num_added += 1

    def clear(self) -> None:
        """Forget what was added."""
        self._nodes: list[Node] = []
        self._num_added = 0  # micro-batches of this process, those without samples included

    def total(self, num_micro_batches: int, like: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the sums over all processes, and begin anew."""
        self._fill(num_micro_batches, len(like))
        nodes = self._nodes
        self.clear()
        if self._layout.num_processes == 1:
            return fold(nodes)
        mine = [any(node.tensors[index] is not None for node in nodes) for index in range(len(like))]
        present = any_process(mine)
        # The result has the strides of what was added, so that a norm over it adds in the same order everywhere.
        targets = [_first(nodes, index, like[index]) if present[index] else None for index in range(len(like))]
        indices = {id(target): index for index, target in enumerate(targets)}
        for bucket in _buckets(target for target in targets if target is not None):
            parts = [[node.tensors[indices[id(target)]] for target in bucket] for node in nodes]
            self._exchange(parts, bucket, num_micro_batches)
        return targets

    def _exchange(self, parts: list[list[Tensor | None]], targets: list[Tensor], num_micro_batches: int) -> None:
        """Add the nodes of a bucket of all processes, each process one slice of it, and share the slices.

        Every process sends each of its nodes once, in slices, and its slice of the result to all others: as much as a
        ring all-reduce where it has one node, that is where its micro-batches are a whole subtree.
        """
        num_processes = self._layout.num_processes
        plan = _plan_of(self._layout._replace(process=0), num_micro_batches)
        reals = [_real(target) for target in targets]
        width = -(-sum(real.numel() for real in reals) // num_processes)
        sent = [_flat(part, reals, width * num_processes).view(num_processes, width) for part in parts]
        slices = torch.stack(sent, dim=1) if sent else reals[0].new_empty(num_processes, 0, width)
        received = slices.new_empty(sum(map(len, plan)), width)
        bytes_per_node = width * received.element_size()
        torch.distributed.all_to_all_single(
            as_bytes(received),
            as_bytes(slices),
            [len(nodes) * bytes_per_node for nodes in plan],
            [len(parts) * bytes_per_node] * num_processes,
        )
        nodes: list[Node] = []
        known = [node for nodes in plan for node in nodes]
        for row in sorted(range(len(known)), key=known.__getitem__):
            push(nodes, Node(*known[row], [received[row]]))
        (mine,) = fold(nodes)
        total = slices.new_empty(num_processes, width)
        torch.distributed.all_gather(list(as_bytes(total).chunk(num_processes)), as_bytes(mine))  # type: ignore[arg-type]
        _unflatten(total.view(-1)[: sum(real.numel() for real in reals)], reals)


def push(nodes: list[Node], node: Node) -> None:
    """Append the next node to the right, and add up siblings as a binary counter carries."""
    nodes.append(node)
    while len(nodes) > 1 and _are_siblings(*nodes[-2:]):
        right, left = nodes.pop(), nodes.pop()
        nodes.append(Node(left.start, 2 * left.size, _added(left.tensors, right.tensors)))


def _are_siblings(left: Node, right: Node) -> bool:
    return left.size == right.size and left.start + left.size == right.start and left.start % (2 * left.size) == 0


def fold(nodes: list[Node]) -> list[Tensor | None]:
    """Return the root: what stands alone at the right end of the tree is added from the right."""
    total = nodes[-1].tensors
    for node in reversed(nodes[:-1]):
        total = _added(node.tensors, total)
    return total


def _added(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    """Return the sums, in the memory of the left."""
    pairs = [
        (first, second) for first, second in zip(left, right, strict=True) if first is not None and second is not None
    ]
    if pairs:
        torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
    return [second if first is None else first for first, second in zip(left, right, strict=True)]


@lru_cache(maxsize=16)  # full batches and smaller ones, of a few loaders
def _plan_of(layout: Layout, num_full: int) -> list[list[tuple[int, int]]]:
    """Return start and size of the nodes of each process; the first `num_full` micro-batches have samples."""
    runs = (run_of(layout._replace(process=process)) for process in range(layout.num_processes))
    if layout.in_rounds and layout.num_processes > 1:
        return [[(index, 1) for index in run if index < num_full] for run in runs]
    return [_nodes_of(run.start, min(run.stop, num_full)) for run in runs]


def _nodes_of(start: int, stop: int) -> list[tuple[int, int]]:
    """Return start and size of the largest subtrees that micro-batches `start` to `stop` consist of, in their order."""
    nodes = []
    while start < stop:
        size = 1 << ((stop - start).bit_length() - 1)
        size = min(size, start & -start) if start else size
        nodes.append((start, size))
        start += size
    return nodes


def _first(nodes: list[Node], index: int, like: Tensor) -> Tensor:
    parts = (node.tensors[index] for node in nodes)
    found = next((part for part in parts if part is not None), None)
    return torch.empty_like(like, requires_grad=False) if found is None else found


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _flat(part: list[Tensor | None], reals: list[Tensor], length: int) -> Tensor:
    """Join the tensors of a node; one that it lacks becomes -0.0, to which adding anything gives just that."""
    flats = [
        real.new_full((real.numel(),), -0.0) if tensor is None else _real(tensor).reshape(-1)
        for tensor, real in zip(part, reals, strict=True)
    ]
    missing = length - sum(map(len, flats))
    return torch.cat([*flats, flats[0].new_zeros(missing)])


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor: every backend can send bytes, not every one bfloat16 or complex."""
    return tensor.view(-1).view(torch.uint8)
