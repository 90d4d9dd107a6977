"""Models of transformers and peft: the loss that they compute themselves, what they predict, the files beside them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..base.dtensors import is_cut
from ..data.collated import TARGET_NAMES, take
from ..numbers.forward import Loss
from ..numbers.objective import inputs_of, target_name_of, unwrapped


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
        ignored = getattr(_config_of(model), "semantic_loss_ignore_index", ignored)
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


def predicted_from(model: nn.Module, batch: Any) -> Any:
    """Return what a model predicts from: the inputs of a batch; all of it where its decoder is fed with the labels."""
    is_decoder_fed = isinstance(batch, Mapping) and getattr(_config_of(model), "is_encoder_decoder", False)
    return batch if is_decoder_fed else inputs_of(batch)


def mask_of(batch: Any) -> Tensor | None:
    """Return the attention mask of a batch, if it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def without_caches(model: nn.Module, outputs: Any) -> Any:
    """Return the outputs of a model without its loss and what is for its next call, where it has a config."""
    config = _config_of(model)
    if not isinstance(outputs, Mapping) or config is None:
        return outputs
    ignored = ("loss", *getattr(config, "keys_to_ignore_at_inference", _FOR_THE_NEXT_TOKEN))
    return {name: part for name, part in outputs.items() if name not in ignored}


_FOR_THE_NEXT_TOKEN = ("past_key_values", "cache")  # their names, by version


def save_beside(model: Any, best: Path, is_whole: bool) -> None:
    """Write beside the best weights, which the model holds, what its library loads them with.

    That is an adapter (peft), or the config of a model whose weights are all in the file.
    """
    if hasattr(model, "peft_config") and hasattr(model, "save_pretrained"):
        if not any(map(is_cut, model.parameters())):  # of a divided model no process has an adapter to save
            model.save_pretrained(best.parent)
    elif is_whole and hasattr(_config_of(model), "save_pretrained"):
        model.config.save_pretrained(best.parent)


def _config_of(model: nn.Module) -> Any:
    return getattr(unwrapped(model), "config", None)
