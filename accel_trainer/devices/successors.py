"""Parameters that have taken the place of others in a model, which was divided or has left the meta device."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
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
        if before[name] is not parameter:
            _successors[before[name]] = parameter


def newest(parameter: Any) -> Any:
    """Return what has taken the place of a parameter by now; mostly it is itself."""
    while parameter in _successors:
        parameter = _successors[parameter]
    return parameter


def train_newest(optimizer: Optimizer) -> None:
    """Let an optimizer train what has taken the place of its parameters, with what it knows of them so far.

    It may have been made, and have trained, at any time before.
    """
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
