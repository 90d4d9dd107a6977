"""The exact gradient of a model that is divided over the processes: each process ends with its own rows of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from ..base.dtensors import local, locals_of
from ..base.exchange import any_process
from ..data.cut import Layout
from ..data.micro_batches import Batch, MicroBatch
from .forward import Forward
from .gradients import LocalGradients, give_zeros_one_sign, never_zero, weighted
from .objective import usable
from .reductions import Node, TreeSum, as_bytes, fold, push


class Divided(Protocol):
    """What is needed of a model that is divided over the processes; see `devices.divided.Shards`."""

    units: list[nn.Module]
    is_accumulated_whole: bool

    @property
    def num_parts(self) -> int: ...  # noqa: D102

    @property
    def replicas(self) -> torch.distributed.ProcessGroup | None: ...  # noqa: D102

    def use_sums(self, reductions: Sequence[Any] = ()) -> None: ...  # noqa: D102

    def own_weights(self, unit: nn.Module) -> list[nn.Parameter]: ...  # noqa: D102

    def start_backward(self, is_last: bool, adds_each: bool) -> None: ...  # noqa: D102

    def watch_gradients(self, note: Any) -> None: ...  # noqa: D102

    def compared_calls(self) -> AbstractContextManager[Any]: ...  # noqa: D102


class ShardedGradients(LocalGradients):
    """The gradient of a divided model: torch adds the parts of each block while the backward still runs.

    Micro-batches are dealt in rounds, of which every process takes part in each. A parameter that some process does not
    use counts as zeros there; one that none uses has no gradient. Which ones, the processes tell each other in the
    first step, and in each one where it is known to vary.

    Args:
        model: The user's model, divided.
        accelerator: Knows the scaler of fp16.
        shards: How it is divided.
        may_vary: Whether a parameter may be used in some steps only.
    """

    _are_all_used: bool | None = None  # not known before the first step

    def __init__(self, model: nn.Module, accelerator: Accelerator, shards: Divided, may_vary: bool) -> None:
        super().__init__(model, accelerator)
        self._shards, self._may_vary = shards, may_vary
        self._used: set[str] = set()  # parameters that have had a gradient in this batch, on this process
        self._watched: list[str] = []
        self._prepare()

    def _prepare(self) -> None:
        self._shards.use_sums()

    def start_epoch(self) -> None:
        """Drop old gradients, and find which parameters are trained now."""
        super().start_epoch()
        if self._watched != self._names:
            self._watched, self._are_all_used = self._names, None
            self._shards.watch_gradients(self._used.add)

    def start_batch(self, batch: Batch, weight_is_num_samples: bool) -> None:
        """Begin to add up; `weight_is_num_samples` says that every process knows the weight of the batch."""
        super().start_batch(batch, weight_is_num_samples)
        self._used.clear()

    def context(self, micro_batch: MicroBatch, is_deferred: bool) -> AbstractContextManager[Any]:
        """Return a context that compares, in the first batch, what the processes call."""
        return self._shards.compared_calls() if self._are_all_used is None else nullcontext()

    def backward(self, forward: Forward, micro_batch: MicroBatch) -> None:
        """Add the gradient of one micro-batch."""
        self._shards.start_backward(micro_batch.piece.is_last, adds_each=not self._shards.is_accumulated_whole)
        self._run_backward(self._weighted_loss(forward, micro_batch), micro_batch)

    def finish(self) -> None:
        """Make the gradients those of the mean over the batch, each process its rows."""
        self._leave_out_unused()
        super().finish()

    def _own_gradients(self) -> list[Tensor]:
        """Return this process's rows of the gradients that there are."""
        return locals_of(super()._own_gradients())

    def _leave_out_unused(self) -> None:
        """Drop the zeros of parameters that no process has used."""
        are_used = [name in self._used for name in self._names]
        if self._are_all_used and not self._may_vary:
            self._refuse_missing([name for name, is_used in zip(self._names, are_used, strict=True) if not is_used])
            return
        if self._batch.layout.num_processes > 1:
            found = any_process([*are_used, *(not is_used for is_used in are_used)])
            are_used, are_unused = found[: len(are_used)], found[len(are_used) :]
        else:
            are_unused = [not is_used for is_used in are_used]
        if self._are_all_used is None:
            self._are_all_used = not any(are_unused)
        for parameter, is_used in zip(self.parameters, are_used, strict=True):
            if not is_used:
                parameter.grad = None


class ShardedTreeGradients(ShardedGradients):
    """The same gradient to the last bit on any number of processes: each slice is summed in the order of one tree."""

    def __init__(self, model: nn.Module, accelerator: Accelerator, shards: Divided, layout: Layout) -> None:
        self._round = _Round()
        self._weights = TreeSum(layout)
        self._nodes: list[Node] = []  # with one part only, where torch reduces nothing
        super().__init__(model, accelerator, shards, may_vary=True)

    def _prepare(self) -> None:
        how = self._round, self._shards.replicas
        self._reductions = [TreeReduceScatter(self._shards.own_weights(unit), *how) for unit in self._shards.units]
        self._shards.use_sums(self._reductions)

    def start_batch(self, batch: Batch, weight_is_num_samples: bool) -> None:
        """Begin to add up; `weight_is_num_samples` says that every process knows the weight of the batch."""
        super().start_batch(batch, weight_is_num_samples)
        self._weights.clear()
        self._nodes = []
        self._round.begin(batch)

    def backward(self, forward: Forward, micro_batch: MicroBatch) -> None:
        """Add the gradient of one micro-batch to the tree."""
        piece = micro_batch.piece
        weight = 0 if piece.is_padding else usable(forward.weight)
        self._round.advance(piece.is_last)
        for reduction in self._reductions:
            reduction.start_round()
        self._shards.start_backward(piece.is_last, adds_each=True)
        self._run_backward(weighted(forward.loss, weight), micro_batch)
        for reduction in self._reductions:
            reduction.end_round()
        if not piece.is_padding and not self._weight_is_num_samples:
            self._weights.add(piece.index, [self._as_weight(weight).clone()])
        if self._shards.num_parts == 1 and self._shards.replicas is None:
            push(self._nodes, Node(piece.index, 1, [_taken(parameter) for parameter in self.parameters]))

    def finish(self) -> None:
        """Make the gradients those of the mean over the batch, each process its rows."""
        if self._nodes:
            for parameter, gradient in zip(self.parameters, fold(self._nodes), strict=True):
                parameter.grad = gradient
            self._nodes = []
        for reduction in self._reductions:
            reduction.finish()
        self._leave_out_unused()
        weight: Any = self._batch.size
        if not self._weight_is_num_samples:
            (total,) = self._weights.total(self._batch.num_micro_batches, [self._as_weight(0)])
            weight = never_zero(total)  # type: ignore[arg-type]
        give_zeros_one_sign(self._own_gradients())
        self._divide(weight)


def _taken(parameter: nn.Parameter) -> Tensor | None:
    gradient, parameter.grad = parameter.grad, None
    return gradient


class _Round:
    """Which round of a batch is under way."""

    number, is_last = 0, False

    def begin(self, batch: Batch) -> None:
        """Begin a batch."""
        self.number, self._num_micro_batches, self._sizes = -1, batch.num_micro_batches, batch.sizes

    def advance(self, is_last: bool) -> None:
        """Count the next round, from 0 on, as the last one or not."""
        self.number, self.is_last = self.number + 1, is_last

    def is_within(self, index: int) -> bool:
        """Return whether a micro-batch is one of the batch: not padding after its last."""
        return index < self._num_micro_batches

    def is_filled(self, index: int) -> bool:
        """Return whether it has samples."""
        return self._sizes is None or self._sizes[index] > 0


class TreeReduceScatter:
    """A reduce-scatter in the order of the tree, for one unit; see `FSDPModule.set_custom_reduce_scatter`.

    In place of sums each process gets its slice of the gradient of each micro-batch of a round, and adds them up as
    `TreeSum` does. So it holds the gradient of a unit, as torch does, and beside it at most log2(micro-batches) + 1
    slices. The slices of other replicas are fetched too, and each replica adds up the same; all but the first return
    zeros, since torch then adds up the replicas.

    Of a unit that is called several times in a micro-batch torch reduces several times, the gradient in parts or zeros:
    its slices wait for the end of the round, and the sum is written into the gradients at the end of the batch.

    Args:
        weights: Those of the unit.
        round: The one under way.
        replicas: The processes that have the same slice; `None` where there is one replica.
    """

    def __init__(
        self, weights: list[nn.Parameter], round: _Round, replicas: torch.distributed.ProcessGroup | None
    ) -> None:
        self._weights, self._round, self._replicas = weights, round, replicas
        self._nodes: list[Node] = []
        self._num_calls = 0  # of the unit, in this forward
        self._waits = False  # for the end of the round
        self._slices: Tensor | None = None  # those that wait

    def note_call(self, *_: Any) -> None:
        """Count a forward of the unit."""
        self._num_calls += torch.is_grad_enabled()

    def start_round(self) -> None:
        """Begin a backward: as many calls of the unit as have been noted lead to it."""
        self._waits, self._num_calls = self._num_calls > 1, 0
        if self._round.number == 0:
            self._nodes = []

    def end_round(self) -> None:
        """Take in what waits; calls during the backward, which compute activations again, do not count."""
        self._num_calls = 0
        if self._slices is not None:
            self._take_in(self._slices)
            self._slices = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory that torch sends from or receives in."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: object, async_op: bool = False
    ) -> None:
        """Take in a round: `input_tensor` has a slice for each process of the group, `output_tensor` the sum of one."""
        received = torch.empty_like(input_tensor)
        torch.distributed.all_to_all_single(as_bytes(received), as_bytes(input_tensor), group=group)
        is_first = True
        if self._replicas is not None:
            everyone = received.new_empty(self._replicas.size(), received.numel())
            parts = list(as_bytes(everyone).chunk(len(everyone)))
            torch.distributed.all_gather(parts, as_bytes(received), self._replicas)
            received, is_first = everyone, torch.distributed.get_rank(self._replicas) == 0
        slices = received.view(-1, output_tensor.numel())
        if self._waits:
            self._slices = slices if self._slices is None else self._slices.add_(slices)
        else:
            self._take_in(slices)
            if self._round.is_last and is_first:
                self._write_total(output_tensor)
                return
        output_tensor.fill_(-0.0)  # to which adding anything gives just that

    def _take_in(self, slices: Tensor) -> None:
        start = self._round.number * len(slices)
        for index, values in enumerate(slices, start):
            if self._round.is_within(index):
                push(self._nodes, Node(index, 1, [values if self._round.is_filled(index) else None]))
        self._nodes = [_kept(node) if node.start >= start else node for node in self._nodes]

    def _write_total(self, target: Tensor) -> None:
        (total,) = fold(self._nodes)
        self._nodes = []
        target.fill_(-0.0) if total is None else target.copy_(total)

    def finish(self) -> None:
        """Write the sum into the gradients, where that had to wait for the end of the batch."""
        if not (self._nodes and self._waits):
            self._nodes = []
            return
        own = [local(weight.grad) for weight in self._weights if weight.grad is not None]
        flat = own[0].as_strided((own[0].untyped_storage().nbytes() // own[0].element_size(),), (1,), 0)
        if any(one.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr() for one in own):
            raise ValueError(
                "A part of the model that is called several times in a forward cannot be trained with bitwise=True and "
                "weights in host memory (fsdp_offload_params): leave out one of the two."
            )
        self._write_total(flat)


def _kept(node: Node) -> Node:
    """Return a node with memory of its own, instead of that of all slices of a round."""
    return node._replace(tensors=[None if tensor is None else tensor.clone() for tensor in node.tensors])
