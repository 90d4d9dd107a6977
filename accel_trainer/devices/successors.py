"""Parameters that have taken the place of others in a model, which was divided or has left the meta device."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from ..base.dtensors import cut_like, is_cut

_successors: MutableMapping[Tensor, nn.Parameter] = WeakTensorKeyDictionary()


@contextmanager
def noting_successors(model: nn.Module) -> Iterator[None]:
    """Note which parameters of a model take the place of which in this block: those by the same names."""
    before = dict(model.named_parameters())
    yield
    for name, parameter in model.named_parameters():
        old = before[name]
        if old is not parameter:
            _successors[old] = parameter
            vars(parameter).update({key: value for key, value in vars(old).items() if key not in vars(parameter)})
            if old.requires_grad:
                old.register_hook(partial(_refuse_use, name))  # type: ignore[no-untyped-call]


def _refuse_use(name: str, gradient: Tensor) -> None:
    raise ValueError(
        f"{name} was listed before the model was divided, or left the meta device, and its old weight is used: as in a "
        "list of parameters of a penalty. Take it from the model where it is used; of a divided model only the part "
        "that it belongs to can use it, in its forward."
    )


def newest(parameter: Any) -> Any:
    """Return what has taken the place of a parameter by now; mostly it is itself."""
    while parameter in _successors:
        parameter = _successors[parameter]
    return parameter


def all_of(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it holds, as one that steps several does."""
    found = [optimizer]
    for one in found:  # which grows
        for value in vars(one).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            found += [inner for inner in held if isinstance(inner, Optimizer) and inner not in found]
    return found


def train_newest(optimizer: Optimizer) -> None:
    """Let an optimizer, and those within, train what has taken the place of its parameters, with what it knows so far.

    It may have been made, and have trained, at any time before.
    """
    for one in all_of(optimizer):
        _train_newest(one)


def _train_newest(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            parameter = group["params"][place] = newest(old)
            if parameter is not old and old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state[parameter] = {key: _cut_as(parameter, value) for key, value in state.items()}


def _cut_as(weight: nn.Parameter, value: Any) -> Any:
    """Return the own rows of a value of the optimizer's state, where it has an entry for each element of a weight."""
    is_by_element = isinstance(value, Tensor) and value.shape == weight.shape and not is_cut(value)
    return cut_like(value, weight) if is_by_element and is_cut(weight) else value
