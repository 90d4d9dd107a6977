"""Models on the meta device, which describes weights without memory for them: they get it, and first weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.console import printable, some_of
from ..base.dtensors import cut_like, is_cut
from ..data.randomness import WEIGHTS, derive_seed, generators_kept, seed_all


def check_can_be_materialised(model: nn.Module) -> None:
    """Refuse (ValueError) a model on the meta device with a part that does not know its first weights."""
    without = [
        name
        for name, module in model.named_modules()
        if is_on_meta(module) and not callable(getattr(module, "reset_parameters", None))
    ]
    if without:
        raise ValueError(
            printable(
                f"The model is on the meta device, and {some_of(without)} cannot be given first weights there: add a "
                "method reset_parameters() that sets its own parameters and buffers."
            )
        )


def is_on_meta(module: nn.Module) -> bool:
    """Return whether a module has a parameter or buffer of its own, not of modules within, on the meta device."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and tensor.device.type == "meta" for tensor in tensors)


def materialise(unit: nn.Module, model: nn.Module, seed: int) -> None:
    """Give what a part of a model has on the meta device host memory, and first weights by its `reset_parameters`.

    They are a function of the seed and the name of the module, the same on every process and device.
    """
    inside = set(unit.modules())
    found = [(name, module) for name, module in model.named_modules() if module in inside and is_on_meta(module)]
    made: dict[int, nn.Parameter] = {}
    for _, module in found:
        for key, weight in module._parameters.items():
            if weight is not None and weight.device.type == "meta":
                if id(weight) not in made:  # tied ones stay so
                    made[id(weight)] = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
                module._parameters[key] = made[id(weight)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
    with generators_kept():
        for name, module in found:
            if callable(getattr(module, "reset_parameters", None)):
                seed_all(derive_seed(seed, WEIGHTS, crc32(name.encode())))
                module.reset_parameters()


def materialise_whole(model: nn.Module, optimizer: Optimizer | None, seed: int) -> None:
    """Materialise a model that is not divided, and let the optimizer train its new weights."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    materialise(model, model, seed)
    if optimizer is not None:
        train_instead(optimizer, names, dict(model.named_parameters()))


def train_instead(optimizer: Optimizer, names: Mapping[int, str], new: Mapping[str, nn.Parameter]) -> None:
    """Let an optimizer train new parameters in place of those by the same names, with what it knows of them so far.

    Args:
        optimizer: Holds the old parameters.
        names: Name of each by its id.
        new: The new ones by name: what memory was given, or the own rows of the old ones.
    """
    state = dict(optimizer.state)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        before, group["params"] = group["params"], [new[names[id(old)]] for old in group["params"]]
        for old, weight in zip(before, group["params"], strict=True):
            if old in state:
                optimizer.state[weight] = {key: _cut_as(weight, value) for key, value in state[old].items()}


def _cut_as(weight: nn.Parameter, value: Any) -> Any:
    """Return the own rows of a value of the optimizer's state, where it has an entry for each element of a weight."""
    is_by_element = isinstance(value, Tensor) and value.shape == weight.shape and not is_cut(value)
    return cut_like(value, weight) if is_by_element and is_cut(weight) else value
