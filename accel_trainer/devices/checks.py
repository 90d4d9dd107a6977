"""Which models and optimizers the trainer accepts."""

from __future__ import annotations

import inspect
import os

import torch
import torch.distributed
from torch import nn
from torch.optim import Optimizer

from ..base.dtensors import is_cut
from .successors import newest


def check_model(model: object, bitwise: bool = False, may_be_divided: bool = False) -> None:
    """Refuse a model that cannot be trained; with `bitwise`, one whose bits depend on the number of processes.

    `may_be_divided` says that it may be divided over the processes, by a run before.

    Raises:
        TypeError: Not a module, or one that is wrapped for several processes already.
        ValueError: A layer whose result depends on the number of processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    renorming = (nn.Embedding, nn.EmbeddingBag)
    if bitwise and any(isinstance(module, renorming) and module.max_norm is not None for module in model.modules()):
        raise ValueError(
            "An embedding with max_norm changes its weights in the forward, by the samples that a process has: "
            "bitwise=True cannot promise anything of it. Leave max_norm out."
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError(f"model is wrapped in {type(model).__name__}. Give the plain model: the trainer wraps it.")
    if any(map(is_cut, model.parameters())) and not may_be_divided:
        raise TypeError(
            "model is divided over the processes already. Give the plain model, or set sharding='full' in TrainConfig."
        )
    several = bitwise or int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "SyncBatchNorm normalises over processes, so the run would depend on their number. Use BatchNorm with a "
            "fixed num_micro_batches, or a layer that does not look at the batch (GroupNorm, LayerNorm)."
        )


def _needs_closure(optimizer: Optimizer) -> bool:
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)  # a scheduler wraps the method of the object
    except TypeError:
        return True
    except ValueError:  # compiled code has no signature
        pass
    return False


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Refuse an optimizer that would not train this model.

    Raises:
        TypeError: Not a torch optimizer, or one that calls the loss by itself.
        ValueError: A model without trainable parameters, or an optimizer of other parameters.
    """
    if not isinstance(optimizer, Optimizer):
        several = isinstance(optimizer, (list, tuple, dict)) and len(optimizer) > 1
        hint = _ON_SEVERAL_OPTIMIZERS if several else ""
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.{hint}")
    if _needs_closure(optimizer):
        raise TypeError(
            f"The optimizer {type(optimizer).__name__} wants a closure, to evaluate the loss several times in a step, "
            "which this loop does not do. Use another."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("The model has no trainable parameters: each has requires_grad=False, or there is none.")
    foreign = foreign_parameters(optimizer, model)
    if foreign:
        num_held = sum(len(group["params"]) for group in optimizer.param_groups)
        raise ValueError(
            f"The optimizer holds {len(foreign)} of {num_held} parameters that are not the model's (the first has "
            f"shape {tuple(foreign[0].shape)}). Build it from this model: Optimizer(model.parameters(), ...); a loss "
            "with parameters belongs inside the model."
        )


_ON_SEVERAL_OPTIMIZERS = (
    " One optimizer takes several groups of parameters, each with settings of its own: AdamW([{'params': ..., "
    "'lr': ...}, ...]). Where one kind is not enough, write a class that inherits from Optimizer and steps several."
)


def foreign_parameters(optimizer: Optimizer, model: nn.Module) -> list[torch.Tensor]:
    """Return the parameters of an optimizer that are not, or no longer, parameters of a model, nor were before."""
    ids = {id(parameter) for parameter in model.parameters()}
    held = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter for parameter in held if id(newest(parameter)) not in ids]
