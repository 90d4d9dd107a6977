"""Whether an optimizer treats each element of a weight by itself: only then may a process have some of the rows."""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.randomness import generators_kept, seed_all

# Shapes, and rows at which they are cut: more elements than 8-bit optimizers leave alone, cut so that nothing divides
# anything; and rows that are shorter than what a processor computes at once.
_CASES = (((131, 67), (0, 5, 50, 131)), ((64, 7), tuple(range(65))))
_NUM_STEPS = 8
_TOLERANCE = 1e-4  # relative; what looks at a whole weight differs by far more


def check_by_element(optimizer: Optimizer, device: torch.device, bitwise: bool) -> None:
    """Try an optimizer on a small weight, whole and in parts; refuse (ValueError) one whose results differ.

    Each group's settings are tried, by copies: the optimizer itself stays as it is. With `bitwise` not one bit may
    differ.
    """
    kind = type(optimizer)
    if (kind.state_dict, kind.load_state_dict) != (Optimizer.state_dict, Optimizer.load_state_dict):
        raise ValueError(
            f"The state of {kind.__name__} has a form of its own, of which a process cannot have a part. {_REMEDY}"
        )
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    tried: list[Mapping[str, Any]] = []
    for one in settings:
        if not any(one is other or repr(one) == repr(other) for other in tried):
            tried.append(one)
            _try(optimizer, one, device, bitwise)


def _try(optimizer: Optimizer, settings: Mapping[str, Any], device: torch.device, bitwise: bool) -> None:
    name = type(optimizer).__name__
    if bitwise and settings.get("fused") and device.type == "cpu":  # rarely enough that a trial may miss it
        raise ValueError(
            f"{name} with fused=True rounds an element by its place in memory on the CPU, so bitwise=True cannot "
            "promise anything of a divided model. Leave out fused=True."
        )
    for shape, cuts in _CASES:
        with generators_kept():
            seed_all(0)
            values, gradients = torch.randn(shape), 0.03 * torch.randn(_NUM_STEPS, *shape)
        try:
            whole = _trained(optimizer, settings, values, gradients, device)
            rows = itertools.pairwise(cuts)
            parts = [_trained(optimizer, settings, values[a:b], gradients[:, a:b], device) for a, b in rows]
        except Exception as error:
            raise ValueError(
                f"{name} could not be tried on a part of a weight ({type(error).__name__}: {error}). {_REMEDY}"
            ) from error
        together = torch.cat(parts)
        if not torch.allclose(together, whole, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise ValueError(
                f"{name} looks at a whole weight, not at each element by itself: on a part of its rows it does "
                f"something else. {_REMEDY}"
            )
        if bitwise and not torch.equal(together, whole):
            raise ValueError(
                f"{name} rounds an element by its place in memory, so bitwise=True cannot promise anything of a "
                f"divided model. {_REMEDY}"
            )


_REMEDY = "With sharding use an optimizer that works by element, such as AdamW, Adam or SGD."


def _trained(
    optimizer: Optimizer,
    settings: Mapping[str, Any],
    values: Tensor,
    gradients: Sequence[Tensor] | Tensor,
    device: torch.device,
) -> Tensor:
    """Return a weight after some steps of a copy of the optimizer."""
    weight = nn.Parameter(values.to(device, copy=True))
    copy: Any = object.__new__(type(optimizer))
    hooks = {key: OrderedDict[Any, Any]() for key in vars(optimizer) if key.endswith("_hooks")}
    rate = settings.get("lr")
    settings = {**settings, "lr": 0.01} if isinstance(rate, float) and rate < 1e-3 else settings  # as in a warm-up
    group = {**settings, "params": [weight]}
    copy.__dict__ = {**vars(optimizer), **hooks, "state": defaultdict(dict), "param_groups": [group]}
    copy.__dict__.pop("step", None)  # a scheduler's, which counts
    for gradient in gradients:
        weight.grad = gradient.to(device, copy=True)
        copy.step()
    for key, value in copy.state[weight].items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != weight.shape:
            shapes = f"{tuple(value.shape)}, and the weight {tuple(weight.shape)}"
            raise ValueError(f"its state {key!r} has the shape {shapes}")
    return weight.detach().cpu()
