"""Models on the meta device, which describes weights without memory for them: they get it, and first weights."""

from __future__ import annotations

from zlib import crc32

import torch
from torch import nn

from ..base.console import printable, some_of
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

    They are a function of the seed and the name of the module, the same on every process and device. The parameters
    are new ones; see `noting_successors`.
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
