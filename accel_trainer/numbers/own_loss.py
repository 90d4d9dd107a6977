"""The loss that a model computes by itself, as those of transformers do, and its weight."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..data.collated import TARGET_NAMES, take
from .forward import Loss
from .objective import target_name_of, unwrapped


def computes_its_loss(model: nn.Module) -> bool:
    """Return whether a model may compute its own loss: its forward takes targets, as those of transformers do."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False
    return any(name in parameters for name in TARGET_NAMES) or any(
        one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()
    )


def own_loss(model: nn.Module, batch: Any) -> Loss:
    """Return the loss that a model computes by itself from a dictionary with labels, weighted by those that count.

    Labels are whole numbers, of which -100 does not count, as in transformers; with others each sample weighs the same.
    """
    name = target_name_of(batch)
    if name is None:
        raise TypeError(
            "Without loss_fn and compute_loss the model computes its loss from batches that are dictionaries with an "
            f"entry named {', '.join(TARGET_NAMES)}; got a {type(batch).__name__}."
        )
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"The model returned a {type(outputs).__name__} without a loss for a batch of {', '.join(batch)}. Give "
            "loss_fn or compute_loss."
        )
    labels = batch[name]
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return Loss(loss, None, outputs, labels)
    ignored = -100
    if labels.ndim == 3:  # of pixels
        ignored = getattr(getattr(unwrapped(model), "config", None), "semantic_loss_ignore_index", ignored)
    counted = labels[:, 1:] if labels.ndim == 2 and _passes_over_first(model, batch, name) else labels
    return Loss(loss, (counted != ignored).sum(), outputs, labels)


def predicts_next(model: nn.Module) -> bool:
    """Return whether a model, of which `own_loss` has been asked, takes the scores of a token for the next label."""
    return _passing_over_first.get(unwrapped(model), False)


_passing_over_first: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _passes_over_first(model: nn.Module, batch: Mapping[str, Any], name: str) -> bool:
    """Return whether a model leaves out the first label of each sequence, as those do that predict the next token.

    Asked once, of one sample whose other labels are -100, and with -100 alone: then the first one changes nothing.
    """
    model = unwrapped(model)
    if model not in _passing_over_first:
        sample = take(batch, 0, 1, len(batch[name]))
        none = torch.full_like(sample[name], -100)
        only_first = none.clone()
        only_first[:, 0] = sample[name][:, 0].clamp_min(0)
        modes = [(module, module.training) for module in model.modules()]
        try:
            losses = [model.eval()(**{**sample, name: labels})["loss"] for labels in (only_first, none)]
        finally:
            for module, mode in modes:
                module.training = mode
        with_first, without = torch.stack(losses).nan_to_num(0.0).tolist()  # nan is the mean of no labels
        _passing_over_first[model] = math.isclose(with_first, without, rel_tol=1e-4)
    return _passing_over_first[model]
