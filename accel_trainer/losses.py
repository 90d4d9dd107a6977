"""Weighted means over micro-batches, processes and epochs."""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from operator import add, mul
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import TARGET_NAMES, Layout, MicroBatch, process_of, tensors_in
from .fetching import Rows
from .randomness import preserved

__all__ = [
    "Fault",
    "Forward",
    "Ledger",
    "Objective",
    "Totals",
    "call_model",
    "check_loss",
    "column_of",
    "inputs_of",
    "may_leave_traces",
    "not_finite",
    "on_device",
    "split_batch",
    "usable",
]

Weight = int | float | Tensor
_Name = TypeVar("_Name")


# --- one micro-batch --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Forward:
    """What one forward gave.

    Attributes:
        loss: Scalar mean over the micro-batch.
        weight: How much it counts; a number, or a scalar on the device.
        outputs: What the model returned; `None` with `compute_loss`.
        targets: Second half of the batch; `None` with `compute_loss`.
    """

    loss: Tensor
    weight: Weight
    outputs: Any = None
    targets: Any = None


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch: a pair, or a dictionary of two with one entry named label(s) or target(s).

    Raises:
        TypeError: The batch is neither; the message says what it holds.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and len(batch) == 2:
        for name in TARGET_NAMES:
            if name in batch:
                first, second = batch
                return batch[second if first == name else first], batch[name]
    held = f"the keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    if isinstance(batch, (tuple, list)):
        held += f" of {len(batch)}"
    raise TypeError(
        "loss_fn needs batches of (inputs, targets), or dictionaries of two entries one of which is named "
        f"{', '.join(TARGET_NAMES)}; got {held}. Give compute_loss(model, batch) for any other batch."
    )


def inputs_of(batch: Any) -> Any:
    """Return what the model is called with: the first of a pair or single, the unlabelled entry, or the batch."""
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise TypeError(f"predict calls the model with the first of a pair or single; a batch has {len(batch)}.")
        return batch[0]
    if isinstance(batch, Mapping) and not (len(batch) == 2 and any(name in batch for name in TARGET_NAMES)):
        return batch
    return split_batch(batch)[0] if isinstance(batch, Mapping) else batch


class Objective:
    """The user's loss and what it weighs.

    Args:
        loss_fn: `(outputs, targets) -> scalar` mean over the samples.
        compute_loss: `(model, batch) -> loss` or `(loss, weight)`, instead of `loss_fn`.
        weight_fn: `(batch) -> weight` of a micro-batch, called before the forward.

    Raises:
        ValueError: A loss that does not take the mean, or both or neither of `loss_fn` and `compute_loss`.
        TypeError: Something that cannot be called.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        compute_loss: Callable[[nn.Module, Any], Tensor | tuple[Tensor, Weight]] | None = None,
        weight_fn: Callable[[Any], Weight] | None = None,
    ) -> None:
        if (loss_fn is None) == (compute_loss is None):
            raise ValueError("Give either loss_fn or compute_loss (then loss_fn=None), not both and not none.")
        for name, function in (("loss_fn", loss_fn), ("compute_loss", compute_loss), ("weight_fn", weight_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}.")
        if isinstance(loss_fn, type):
            raise TypeError(f"loss_fn is the class {loss_fn.__name__}; give an instance: {loss_fn.__name__}().")
        _check_reduction(loss_fn)
        self.loss_fn, self.compute_loss, self.weight_fn = loss_fn, compute_loss, weight_fn
        self._divisor = _divisor_of(loss_fn) if weight_fn is None else None
        self._known: WeakKeyDictionary[Rows, tuple[Any, bool]] = WeakKeyDictionary()  # version of data, answer
        weight = None if self._divisor is None else self._divisor.keywords["weight"]
        # torch's gradient of a micro-batch of no other class is nan.
        self._has_weightless_class = weight is not None and bool((weight == 0).any())

    def __reduce__(self) -> Any:
        return type(self), (self.loss_fn, self.compute_loss, self.weight_fn)  # without what it knows of the data

    def with_loss(self, loss_fn: Callable[[Any, Any], Tensor]) -> Objective:
        """Return the same with a copy of its loss."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, loss_fn=loss_fn)
        return other

    @property
    def may_leave_out(self) -> bool:
        """Whether it depends on the data if each sample weighs the same."""
        return self._divisor is not None and self.compute_loss is None

    def weighs_evenly(self, rows: Rows | None, may_hold_others: bool = False) -> bool:
        """Return whether each sample weighs as much as any other, so that all processes know the weight of a batch.

        Args:
            rows: The data, where it is known. A loss that leaves targets out does so in some data only, and whether in
                this is looked up if it is in memory (one read-back).
            may_hold_others: Whether a micro-batch may hold more samples, or fewer, than it has indices.
        """
        if self.compute_loss is not None or self.weight_fn is not None or may_hold_others:
            return False
        if self._divisor is None:
            return True
        if (
            rows is None
            or rows.row_nbytes is None
            or not rows.in_memory
            or self._divisor.keywords["weight"] is not None
        ):
            return False
        if rows not in self._known or self._known[rows][0] != rows.version:
            _, targets = split_batch(rows.columns)
            left_out = not targets.is_floating_point() and (targets == self._divisor.keywords["ignore_index"]).any()
            self._known[rows] = rows.version, not left_out
        return self._known[rows][1]

    @property
    def functions(self) -> list[Any]:
        """The user's functions that run in a forward."""
        given = (self.loss_fn, self.compute_loss, self.weight_fn)
        return [_unwrap_partial(function)[0] for function in given if function is not None]

    def state_outside(self) -> dict[str, str]:
        """Return what these functions keep as plain attributes, by name: no process knows that of another."""
        owners = [getattr(function, "__self__", function) for function in self.functions]
        parts = [part for one in owners for part in (one.modules() if isinstance(one, nn.Module) else [one])]
        return {
            f"{type(part).__name__}.{name}": repr(value.tolist() if isinstance(value, Tensor) else value)
            for part in parts
            for name, value in getattr(part, "__dict__", {}).items()
            if name != "training" and _is_small(value)
        }

    @property
    def modules(self) -> list[nn.Module]:
        """Those of them that are modules, whose buffers change as those of the model do."""
        return [function for function in self.functions if isinstance(function, nn.Module)]

    def to(self, device: torch.device) -> None:
        """Move what is a module, with its class weights and buffers, to where the model is."""
        for module in self.modules:
            module.to(device)

    @property
    def form(self) -> Hashable | None:
        """What the loss does, where it may be compiled together with the model: it looks at nothing, and keeps nothing.

        `None` where it may not. Losses of one form differ in nothing that compiled code depends on.
        """
        if self.compute_loss is not None or self.weight_fn is not None or self._has_weightless_class:
            return None
        function, keywords = _unwrap_partial(self.loss_fn)
        form = _form_of(function)
        settings = tuple(sorted((name, repr(value)) for name, value in keywords.items()))
        return None if form is None else (form, settings)

    def __call__(
        self,
        model: nn.Module,
        micro_batch: MicroBatch,
        evenly: bool,
        joined: Callable[[Any, Any], Tensor] | None = None,
    ) -> Forward:
        """Run the model on a micro-batch and return its loss and weight (0 for a stand-in).

        Args:
            model: What to call.
            micro_batch: On the device.
            evenly: Whether each sample is known to weigh the same.
            joined: Computes the loss of inputs and targets in place of model and `loss_fn`, if it has a `form`.
        """
        if joined is not None:
            return self._joined(joined, micro_batch, evenly)
        if self.compute_loss is None and self.weight_fn is None:
            forward = self._forward(model, micro_batch, evenly)
            if self._has_weightless_class:
                _mute(forward, list(tensors_in(forward.outputs)))
        else:
            with _watch_outputs(model) as outputs:
                forward = self._forward(model, micro_batch, evenly)
            forward.weight = _checked_weight(forward.weight, forward.loss)
            _mute(forward, outputs)
        if not micro_batch.piece.counts:
            forward.weight = 0
        return forward

    def _forward(self, model: nn.Module, micro_batch: MicroBatch, evenly: bool) -> Forward:
        batch = micro_batch.data
        weight: Weight = micro_batch.num_samples if self.weight_fn is None else self.weight_fn(batch)
        if self.compute_loss is not None:
            result = self.compute_loss(model, batch)
            return Forward(*result) if isinstance(result, tuple) else Forward(result, weight)
        inputs, targets = split_batch(batch)
        outputs = call_model(model, inputs)
        loss = self.loss_fn(outputs, targets)  # type: ignore[misc]
        return Forward(loss, self._divided_by(targets, weight, evenly), outputs, targets)

    def _joined(self, joined: Callable[[Any, Any], Tensor], micro_batch: MicroBatch, evenly: bool) -> Forward:
        inputs, targets = split_batch(micro_batch.data)
        loss = joined(inputs, targets)
        is_real = micro_batch.piece.counts
        return Forward(loss, self._divided_by(targets, micro_batch.num_samples, evenly) if is_real else 0)

    def _divided_by(self, targets: Any, weight: Weight, evenly: bool) -> Weight:
        return weight if self._divisor is None or evenly else self._divisor(targets)


def _is_small(value: Any) -> bool:
    """Return whether a value is a number, or a few of them: what a loss may count, or average."""
    if isinstance(value, Tensor):
        return value.numel() < 1000
    if isinstance(value, (list, tuple, deque)):
        return len(value) < 1000 and all(map(_is_small, value))
    return type(value) in (bool, int, float)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model with what it takes: a tensor, or a dictionary of arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def usable(weight: Weight) -> Weight:
    """Return a weight to compute with; one that is refused when it is read, negative until then, counts as 0."""
    return weight.clamp_min(0) if isinstance(weight, Tensor) else weight


def check_loss(loss: object, needs_grad: bool) -> None:
    """Refuse what is not a scalar loss to differentiate.

    Raises:
        TypeError: Not a tensor.
        ValueError: Not a scalar, or without a gradient to compute.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"The loss must be a tensor, got {type(loss).__name__}.")
    if loss.ndim != 0:
        raise ValueError(f"The loss must be a scalar (a mean over the samples), got shape {tuple(loss.shape)}.")
    if needs_grad and not loss.requires_grad:
        raise ValueError(
            "The loss does not require grad: nothing connects it with the model's parameters. Compute it from the "
            "model's outputs, without detach(), item() or torch.no_grad()."
        )


def _checked_weight(weight: Any, loss: Any) -> Weight:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(f"The weight of a micro-batch must be one number, got shape {tuple(weight.shape)}.")
        if weight.is_complex():
            raise ValueError(f"The weight of a micro-batch must be a real number, got {weight.dtype}.")
        weight = weight.detach().reshape(())
        weight = weight.float() if weight.element_size() < 4 else weight  # a sum of such would overflow
        weight = on_device(weight, loss.device) if isinstance(loss, Tensor) else weight
        return torch.where((weight >= 0) & (weight < _LARGEST_WEIGHT), weight, -1)  # found when it is read
    if not isinstance(weight, Real) or not 0 <= float(weight) < _LARGEST_WEIGHT:
        raise ValueError(f"The weight of a micro-batch must be a number of at least 0 and below 1e30, got {weight!r}.")
    return float(weight)


_LARGEST_WEIGHT = 1e30  # times a loss, and summed, that is still a number in single precision


# A mean over no tokens is 0/0, and so is its gradient. Where the user gives the weights, both are made zero, on the
# device; torch's own losses have a gradient of zeros there by themselves.


@contextmanager
def _watch_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that fills with the tensors that the model returns."""
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, inputs, outputs: seen.extend(tensors_in(outputs)))
    try:
        yield seen
    finally:
        handle.remove()


def _zero_where(is_empty: Tensor, gradient: Tensor) -> Tensor:
    return torch.where(is_empty, 0, gradient)


def _mute(forward: Forward, outputs: list[Tensor]) -> None:
    """Let a micro-batch that weighs nothing have a loss and a gradient of zero, whatever it divides by."""
    if not isinstance(forward.loss, Tensor) or forward.loss.ndim != 0:
        return  # refused a moment later
    if not isinstance(forward.weight, Tensor) and forward.weight > 0:
        return
    is_empty = ~(on_device(forward.weight, forward.loss.device) > 0)
    forward.loss = torch.where(is_empty, 0, forward.loss)
    for output in outputs:
        if output.requires_grad:
            output.register_hook(functools.partial(_zero_where, is_empty))  # type: ignore[no-untyped-call]


_WRITES = {f"{verb}_{what}" for verb in ("STORE", "DELETE") for what in ("GLOBAL", "SUBSCR", "ATTR")}
_CHANGES = {"add", "append", "clear", "extend", "insert", "pop", "popleft", "remove", "setdefault", "update", "write"}


def may_leave_traces(function: Any) -> bool:
    """Return whether a function may change something that outlives its call, as far as its code tells."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module):
        function = type(function).forward
    elif not hasattr(function, "__code__") and not hasattr(function, "__func__"):
        function = type(function).__call__
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    codes = [code] if code is not None else []
    for code in codes:  # those of inner functions too
        codes += [inner for inner in code.co_consts if hasattr(inner, "co_code")]
        for one in dis.get_instructions(code):
            is_outer = one.opname == "STORE_DEREF" and one.argval in code.co_freevars
            is_change = one.opname in ("LOAD_METHOD", "LOAD_ATTR") and one.argval in _CHANGES
            if one.opname in _WRITES or is_outer or is_change:
                return True
    return False


def _form_of(loss_fn: Any) -> Hashable | None:
    """Return what tells a loss from others; `None` if it is not torch's own and may keep, or refer to, what changes."""
    if isinstance(loss_fn, nn.Module):
        own = {name: value for name, value in vars(loss_fn).items() if name not in vars(nn.Module())}
        parts = any(vars(loss_fn)[name] for name in ("_parameters", "_buffers", "_modules"))
        is_torchs = type(loss_fn).__module__.startswith("torch.nn.")
        return (type(loss_fn), repr(sorted(own.items()))) if is_torchs or not (own or parts) else None
    if isinstance(loss_fn, BuiltinFunctionType):
        return loss_fn
    if not isinstance(loss_fn, FunctionType) or loss_fn.__closure__:
        return None
    writes = any(one.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for one in dis.get_instructions(loss_fn))
    return None if writes else (loss_fn.__code__, repr(loss_fn.__defaults__), repr(loss_fn.__kwdefaults__))


# --- what torch's own losses divide by --------------------------------------------------------------------------------


def _unwrap_partial(loss_fn: Any) -> tuple[Any, dict[str, Any]]:
    keywords: dict[str, Any] = {}
    while True:
        if isinstance(loss_fn, functools.partial):
            keywords = loss_fn.keywords | keywords
            loss_fn = loss_fn.func
        elif isinstance(getattr(loss_fn, "__self__", None), nn.Module):  # loss.forward in place of loss
            loss_fn = loss_fn.__self__
        elif hasattr(loss_fn, "_orig_mod"):  # torch.compile of a module ...
            loss_fn = loss_fn._orig_mod
        elif hasattr(loss_fn, "_torchdynamo_orig_callable"):  # ... and of a function
            loss_fn = inspect.unwrap(loss_fn)
        else:
            return loss_fn, keywords


def _check_reduction(loss_fn: Any) -> None:
    function, keywords = _unwrap_partial(loss_fn)
    reduction = keywords.get("reduction", getattr(function, "reduction", "mean"))
    if reduction == "sum" or (reduction == "none" and _is_torchs(function)):  # another may take the mean of them itself
        raise ValueError(
            f"loss_fn has reduction={reduction!r}, but a loss here is the mean over its samples: use reduction='mean'. "
            "For another weighting give weight_fn, or compute_loss returning (loss, weight)."
        )


def _is_torchs(function: Any) -> bool:
    """Return whether what is computed is torch's own, and not that of a subclass."""
    code = type(function).forward if isinstance(function, nn.Module) else function
    return str(getattr(code, "__module__", "")).startswith("torch.")


def _divisor_of(loss_fn: Any) -> functools.partial[Weight] | None:
    """Return what computes, from the targets, the number that this loss divides by; `None`: the number of samples."""
    function, keywords = _unwrap_partial(loss_fn)
    if function in (F.cross_entropy, F.nll_loss):
        weight, ignore_index = keywords.get("weight"), keywords.get("ignore_index", -100)
    elif isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss)) and function.reduction == "mean":
        if not _is_torchs(function) and _is_mean_of_samples(function):
            return None
        weight, ignore_index = function.weight, function.ignore_index
    else:
        return None
    return functools.partial(_class_divisor, weight=weight, ignore_index=ignore_index, loss_fn=function)


@torch.no_grad()
def _is_mean_of_samples(loss_fn: nn.CrossEntropyLoss | nn.NLLLoss) -> bool:
    """Return whether a subclass of torch's losses, on some made-up samples, is their mean; not what torch divides by.

    Where both are the same, or it takes other outputs and targets than torch's, it is taken for what it inherits.
    """
    weight, ignored = loss_fn.weight, loss_fn.ignore_index
    num_classes = 4 if weight is None else len(weight)
    device = torch.device("cpu") if weight is None else weight.device
    outputs = torch.linspace(-2, 1, 5 * num_classes, device=device).sin().view(5, num_classes).log_softmax(1)
    targets = torch.arange(5, device=device) % num_classes
    targets[1] = ignored
    pieces = [(outputs[part], targets[part]) for part in (slice(0, 2), slice(2, 5))]
    try:
        own = copy.deepcopy(loss_fn)  # which may keep something from call to call
        with preserved():
            whole, *losses = (float(own(*pair)) for pair in ((outputs, targets), *pieces))
    except Exception:
        return False
    divisors = [float(_class_divisor(labels, weight, ignored, loss_fn)) for _, labels in pieces]
    as_torchs = sum(map(mul, losses, divisors)) / sum(divisors)
    as_samples = (2 * losses[0] + 3 * losses[1]) / 5
    return math.isclose(as_samples, whole, rel_tol=1e-4) and not math.isclose(as_torchs, whole, rel_tol=1e-4)


def _class_divisor(targets: Any, weight: Tensor | None, ignore_index: int, loss_fn: Any) -> Weight:
    """Return the sum of the class weights over the targets that are not ignored, on the device.

    With probabilities as targets, `(batch, classes, ...)`, torch divides by the number of distributions.
    """
    if targets.is_floating_point():
        return int(targets.numel() // targets.shape[1])
    kept = targets != ignore_index
    if weight is None:
        count: Tensor = kept.sum()
        return count
    weight = getattr(loss_fn, "weight", weight)  # a module's weight moves to the device with it
    total: Tensor = weight.to(targets.device)[targets.where(kept, 0).long()].where(kept, 0).sum()
    return total


# --- means over an epoch ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A train loss that is not finite: its value, the number of its batch in the run, and its process."""

    value: float
    batch: int
    process: int


@dataclass(frozen=True)
class Totals:
    """The means of an epoch, equal on every process, its samples, and the first loss in it that is not finite."""

    loss: float
    metrics: dict[str, float]
    num_samples: int
    fault: Fault | None


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
    sums = [torch.stack(torch._foreach_norm(own, order)).sum() for own in groups.values()]
    return sum(sums[1:], sums[0]) if sums else 0.0


class _Batch(NamedTuple):
    """The rows of one batch in a ledger: one for each of its micro-batches, on whichever process."""

    number: int
    layout: Layout
    first_row: int


class Ledger:
    """Collect loss and weight of every micro-batch on the device; add them up over processes and batches.

    They are the rows of one table, in the order of the batches, of which each process fills in its own; the others
    are zero there, so that a sum over the processes is exact. The rows are then added up in double precision and in
    their order: every process gets the same numbers, and the layout changes no more than the rounding of the single
    losses. What has been read is kept as sums only.

    Args:
        device: Where the losses are.
        metrics: Names of the metrics whose totals will be added.
        copies: Whether the memory of a loss is written to again before it is read (CUDA graphs).
    """

    _BLOCK = 512  # scalars joined into one tensor at a time: one alone costs half a kilobyte

    def __init__(self, device: torch.device, metrics: Sequence[str] = (), copies: bool = False) -> None:
        self._device, self._metrics, self._copies = device, tuple(metrics), copies
        self._batches: list[_Batch] = []  # those since the last read
        self._num_rows = 0
        self._open: list[tuple[Any, ...]] = []  # row, loss, weight, samples, then a total per metric
        self._blocks: list[tuple[list[int], Tensor]] = []  # rows, and their columns
        self._sums = [0.0] * (3 + len(self._metrics))  # of samples, loss x weight, weights, totals
        self._recent = 0.0, 0.0  # of loss x weight and weights since the last report
        self._fault: Fault | None = None

    def begin(self, number: int, size: int, layout: Layout) -> None:
        """Make room for a batch; every process begins each of them, in the same order.

        Args:
            number: Of the batch, in the run.
            size: Its samples, over all processes.
            layout: How it is cut.
        """
        if len(self._open) >= self._BLOCK:
            self._close()
        self._batches.append(_Batch(number, layout, self._num_rows))
        self._num_rows += min(size, layout.num_micro_batches)

    def add(self, micro_batch: MicroBatch, forward: Forward, totals: Sequence[float | Tensor] = ()) -> None:
        """Take in a micro-batch of the batch under way; a stand-in leaves no trace.

        Args:
            micro_batch: Which it is.
            forward: Its loss and weight.
            totals: Sum of each metric over its samples, in the order of the names.
        """
        if micro_batch.piece.counts:
            row = self._batches[-1].first_row + micro_batch.piece.index
            loss, weight = forward.loss.detach(), forward.weight
            if self._copies:
                loss, weight = loss.clone(), weight.clone() if isinstance(weight, Tensor) else weight
            self._open.append((row, loss, weight, micro_batch.num_samples, *totals))

    def drop(self) -> None:
        """Forget the batch under way, which will be done again."""
        self._num_rows = self._batches.pop().first_row
        while self._open and self._open[-1][0] >= self._num_rows:
            self._open.pop()

    def is_finite(self) -> bool | Tensor:
        """Return whether the losses of the last batch are finite on this process; those that weigh nothing may not."""
        flag: bool | Tensor = True
        for row, loss, weight, *_ in reversed(self._open):
            if row < self._batches[-1].first_row:
                break
            if isinstance(weight, Tensor):
                flag = flag & (loss.isfinite() | (weight == 0))
            elif weight:
                flag = flag & loss.isfinite()
        return flag

    def _close(self) -> None:
        """Join the scalars that have come into one tensor, on the device."""
        if self._open:
            rows, losses, *others = zip(*self._open, strict=True)
            joined = torch.stack([column_of(column, losses[0].device) for column in (losses, *others)])
            self._blocks.append((list(rows), joined.to(self._device)))
            self._open = []

    def _table(self) -> Tensor:
        """Return loss, weight, samples and totals, shape `(columns, rows)`, of all processes; one exchange."""
        self._close()
        blocks, self._blocks = self._blocks, []
        several = self._batches[-1].layout.num_processes > 1
        if blocks and not several:
            return torch.cat([block for _, block in blocks], dim=1)
        table = torch.zeros(len(self._sums), self._num_rows, dtype=widest_float(self._device), device=self._device)
        for rows, block in blocks:
            table[:, rows] = block
        if several:
            torch.distributed.all_reduce(table)
        return table

    def _read(self) -> None:
        """Add up what has come since the last read: one exchange, and one read-back."""
        if not self._batches:
            return
        losses, weights, sizes, *totals = self._table().tolist()
        if min(weights, default=0.0) < 0:
            batch, process = self._place_of(next(row for row, weight in enumerate(weights) if weight < 0))
            where = f"in batch {batch}, on process {process}"
            raise ValueError(f"The weight of a micro-batch must be at least 0 and below 1e30; {where}, it was not.")
        products = [loss * weight if weight else 0.0 for loss, weight in zip(losses, weights, strict=True)]
        columns = sizes, products, weights, *totals
        self._sums = [functools.reduce(add, column, total) for total, column in zip(self._sums, columns, strict=True)]
        recent_product, recent_weight = self._recent
        self._recent = functools.reduce(add, products, recent_product), functools.reduce(add, weights, recent_weight)
        if self._fault is None and not math.isfinite(self._sums[1]):
            self._fault = self._first_fault(losses, weights)
        self._batches, self._num_rows = [], 0

    def _first_fault(self, losses: list[float], weights: list[float]) -> Fault | None:
        for row, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
            if weight and not math.isfinite(loss):
                return Fault(loss, *self._place_of(row))
        return None

    def _place_of(self, row: int) -> tuple[int, int]:
        """Return the number of the batch that a row is of, and the process that has computed it."""
        batch = next(batch for batch in reversed(self._batches) if batch.first_row <= row)
        return batch.number, process_of(row - batch.first_row, batch.layout)

    def sums(self) -> list[float]:
        """Return what `restore` takes, the same on all processes; all call it at the same place."""
        self._read()
        return list(self._sums)

    def restore(self, sums: Sequence[float]) -> None:
        """Go on from what `sums` returned, before anything is added."""
        self._sums = [float(number) for number in sums]

    def report(self) -> tuple[float, Fault | None]:
        """Return the mean loss since the last report, and the first loss of the epoch that is not finite.

        Every process calls it after the same step. Costs one small exchange, and one read-back.
        """
        self._read()
        loss, weight = self._recent
        self._recent = 0.0, 0.0
        return _mean(loss, weight), self._fault

    def exchange(self) -> Totals:
        """Return the means over all micro-batches of all processes; waits for the device."""
        count, loss, weight, *totals = self.sums()
        metrics = {name: _mean(total, count) for name, total in zip(self._metrics, totals, strict=True)}
        return Totals(_mean(loss, weight), metrics, int(count), self._fault)


def _mean(total: float, weight: float) -> float:
    return total / weight if weight else math.nan


def widest_float(device: torch.device) -> torch.dtype:
    """Return the precision in which a device hands over numbers: not every one knows double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_device(value: float | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a number, or a tensor wherever it is, as a tensor on a device, which nobody waits for.

    Args:
        value: What to bring there.
        device: Where to.
        dtype: Of the result; `None` for that of the tensor, as far as the device knows it.
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
    """Return plain numbers, and scalars wherever they are, as one tensor on the device."""
    dtype = widest_float(device)
    if not any(isinstance(number, Tensor) for number in numbers):
        return on_device(torch.tensor(numbers, dtype=torch.float64), device)
    scalars = [on_device(number, device, None if isinstance(number, Tensor) else dtype) for number in numbers]
    return torch.stack(scalars).to(dtype)
