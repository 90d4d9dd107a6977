"""The model's layers and the optimizer's settings, as `config.json` keeps them for the page."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.codec import encode
from .forms import Form

_MOST_LAYERS = 1_000
LAYERS: Form = [[str, str, str, int, bool], ...]  # name, type, shapes, parameters, whether they are trained
OPTIMIZER: Form = {"name": str, "groups": [dict, ...]}


def described(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the entries of `config.json` on model and optimizer."""
    return {"layers": layers_of(model), "optimizer": optimizer_of(optimizer)}


def layers_of(model: nn.Module) -> list[list[Any]]:
    """Return name, type, shapes, number of parameters and whether they are trained, of each layer without layers in it.

    So too of what has parameters of its own. Of more than 1,000 layers the first are listed, and how many are left out.
    """
    rows: list[list[Any]] = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own or next(module.children(), None) is None:
            shapes = ", ".join(" x ".join(map(str, parameter.shape)) or "1" for parameter in own)
            is_trained = any(parameter.requires_grad for parameter in own)
            number = sum(parameter.numel() for parameter in own)
            name = ".".join(part for part in name.split(".") if part != "_orig_mod")  # of a compiled layer
            rows.append([name or "(the model)", type(module).__name__, shapes, number, is_trained])
    if len(rows) > _MOST_LAYERS:
        rest = rows[_MOST_LAYERS:]
        number = sum(row[3] for row in rest)
        rows = [*rows[:_MOST_LAYERS], [f"({len(rest):,} more)", "", "", number, any(row[4] for row in rest)]]
    return rows


def optimizer_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return the class of an optimizer, and the settings of each of its parameter groups."""
    groups = []
    for group in optimizer.param_groups:
        numel = sum(parameter.numel() for parameter in group["params"])
        settings = {name: _plain(value) for name, value in group.items() if name not in ("params", "param_names")}
        groups.append({"parameters": numel} | settings)
    return {"name": type(optimizer).__name__, "groups": groups}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else f"tensor {tuple(value.shape)}"
    return value if isinstance(value, (int, float, str, list, tuple)) or value is None else encode(str(value))
