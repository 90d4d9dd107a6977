"""What the user's loss divides by, and what its code may change."""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import math
from collections.abc import Hashable
from operator import mul
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.randomness import generators_kept

Weight = int | float | Tensor


def unwrap_partial(loss_fn: Any) -> tuple[Any, dict[str, Any]]:
    """Return the function or module within partials, bound methods and compiled code, and its keyword arguments."""
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


def check_reduction(loss_fn: Any) -> None:
    """Refuse (ValueError) a loss that is not the mean over its samples, since its reduction is `sum` or `none`."""
    function, keywords = unwrap_partial(loss_fn)
    reduction = keywords.get("reduction", getattr(function, "reduction", "mean"))
    if reduction == "sum" or (
        reduction == "none" and _is_torchs(function)
    ):  # other losses may take the mean themselves
        raise ValueError(
            f"loss_fn has reduction={reduction!r}, but a loss here is the mean over its samples: use reduction='mean'. "
            "For another weighting give weight_fn, or compute_loss returning (loss, weight)."
        )


def _is_torchs(function: Any) -> bool:
    """Return whether a function, or the forward of a module, is torch's own, not that of a subclass."""
    code = type(function).forward if isinstance(function, nn.Module) else function
    return str(getattr(code, "__module__", "")).startswith("torch.")


def divisor_of(loss_fn: Any) -> functools.partial[Weight] | None:
    """Return a function of the targets for the number that a loss divides by; `None` for the number of samples."""
    function, keywords = unwrap_partial(loss_fn)
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
    """Return whether a subclass of torch's losses divides made-up samples by their number, not as torch does.

    It is assumed to divide as torch does if both agree, or if it needs other outputs and targets than torch's loss.
    """
    weight, ignored = loss_fn.weight, loss_fn.ignore_index
    num_classes = 4 if weight is None else len(weight)
    device = torch.device("cpu") if weight is None else weight.device
    outputs = torch.linspace(-2, 1, 5 * num_classes, device=device).sin().view(5, num_classes).log_softmax(1)
    targets = torch.arange(5, device=device) % num_classes
    targets[1] = ignored
    pieces = [(outputs[part], targets[part]) for part in (slice(0, 2), slice(2, 5))]
    try:
        copied = copy.deepcopy(loss_fn)  # it may keep a state
        with generators_kept():
            whole, *losses = (float(copied(*pair)) for pair in ((outputs, targets), *pieces))
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


_WRITES = {f"{verb}_{what}" for verb in ("STORE", "DELETE") for what in ("GLOBAL", "SUBSCR", "ATTR")}
_CHANGES = {"add", "append", "clear", "extend", "insert", "pop", "popleft", "remove", "setdefault", "update", "write"}


def may_leave_traces(function: Any) -> bool:
    """Return whether a function may change something that outlives its call, as far as its code shows."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module):
        function = type(function).forward
    elif not hasattr(function, "__code__") and not hasattr(function, "__func__"):
        function = type(function).__call__
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    codes = [code] if code is not None else []
    for code in codes:  # also those of inner functions
        codes += [inner for inner in code.co_consts if hasattr(inner, "co_code")]
        for step in dis.get_instructions(code):
            is_outer = step.opname == "STORE_DEREF" and step.argval in code.co_freevars
            is_change = step.opname in ("LOAD_METHOD", "LOAD_ATTR") and step.argval in _CHANGES
            if step.opname in _WRITES or is_outer or is_change:
                return True
    return False


def form_of(loss_fn: Any) -> Hashable | None:
    """Return a key of what a loss computes; `None` if it is not torch's own and may depend on a state."""
    if isinstance(loss_fn, nn.Module):
        settings = {name: value for name, value in vars(loss_fn).items() if name not in vars(nn.Module())}
        parts = any(vars(loss_fn)[name] for name in ("_parameters", "_buffers", "_modules"))
        is_torchs = type(loss_fn).__module__.startswith("torch.nn.")
        return (type(loss_fn), repr(sorted(settings.items()))) if is_torchs or not (settings or parts) else None
    if isinstance(loss_fn, BuiltinFunctionType):
        return loss_fn
    if not isinstance(loss_fn, FunctionType) or loss_fn.__closure__:
        return None
    writes = any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in dis.get_instructions(loss_fn))
    return None if writes else (loss_fn.__code__, repr(loss_fn.__defaults__), repr(loss_fn.__kwdefaults__))
