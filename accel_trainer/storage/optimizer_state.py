"""The state of an optimizer, by the names of its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.codec import pack, same_bits, unpack
from ..base.dtensors import is_cut
from ..devices.prepared import counts_on_device
from ..errors import CheckpointError
from .shards import Parts, fill, whole
from .weights import plain_name


def optimizer_state(optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the state of an optimizer by the names of its parameters, or in a form of its own, if it has one."""
    by_group = names_by_group(optimizer, model)
    whole = optimizer.state_dict()
    kind = type(optimizer)
    is_torchs = (kind.state_dict, kind.load_state_dict) == (Optimizer.state_dict, Optimizer.load_state_dict)
    if not is_torchs or not all(isinstance(key, int) for key in whole["state"]):
        return {"own": pack(whole, tensors, "own"), "param_groups": [{"params": names} for names in by_group]}
    names = list(itertools.chain.from_iterable(by_group))
    state = {
        names[index]: {key: pack(value, tensors, f"{names[index]}/{key}") for key, value in content.items()}
        for index, content in whole["state"].items()
    }
    groups = [
        pack(_settings_of(group), tensors, f"group {number}") | {"params": [names[index] for index in group["params"]]}
        for number, group in enumerate(whole["param_groups"])
    ]
    return {"state": state, "param_groups": groups}


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def names_by_group(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters in each group, in the order in which the optimizer counts them."""
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    return [
        [names.get(id(parameter), f"no part of the model any more: {n}") for n, parameter in enumerate(group["params"])]
        for group in optimizer.param_groups
    ]


def restore_optimizer(
    optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the state that `optimizer_state` returned; a `CheckpointError` says that it cannot take it."""
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    settings = [unpack(_settings_of(group), tensors) for group in saved["param_groups"]]
    num_groups = len(optimizer.param_groups)
    for index, group in enumerate(optimizer.param_groups):
        settings[index] = _settings_of(group) | settings[index]  # a newer torch may have more of them
    for group, kept in zip(saved["param_groups"][num_groups:], settings[num_groups:], strict=True):
        optimizer.add_param_group({"params": [parameters[name] for name in group["params"]]} | kept)
    functions = [{key: value for key, value in group.items() if callable(value)} for group in optimizer.param_groups]
    if "own" in saved:
        _restore_own_form(optimizer, saved["own"], tensors)
    else:
        state = {name: unpack(content, tensors) for name, content in saved["state"].items()}
        _restore_torchs_form(optimizer, model, state, settings)
    for group, functions_of_group in zip(optimizer.param_groups, functions, strict=True):
        group.update(functions_of_group)


def _restore_torchs_form(optimizer: Optimizer, model: nn.Module, state: dict[str, Any], settings: list[Any]) -> None:
    number = itertools.count()
    groups = [
        {**kept, "params": [next(number) for _ in group["params"]]}
        for group, kept in zip(optimizer.param_groups, settings, strict=True)
    ]
    # Not with the states: torch would cast them to the dtype of their parameter.
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    for names, group in zip(names_by_group(optimizer, model), optimizer.param_groups, strict=True):
        on_device = counts_on_device(group)
        for name, parameter in zip(names, group["params"], strict=True):
            if name in state:
                optimizer.state[parameter] = {
                    key: recursively_apply(_placed, value, parameter, key != "step" or on_device, test_type=_is_tensor)
                    for key, value in state[name].items()
                }


def _restore_own_form(optimizer: Optimizer, saved: Any, tensors: Mapping[str, Tensor]) -> None:
    """Let an optimizer take back the state that it gave, and check that it gives the same again."""
    optimizer.load_state_dict(unpack(saved, {name: tensor.clone() for name, tensor in tensors.items()}))
    found: dict[str, Tensor] = {}
    is_same = pack(optimizer.state_dict(), found, "own") == saved
    wrong = [name for name, tensor in found.items() if not same_bits(tensor, tensors.get(name))]
    if wrong or not is_same:
        raise CheckpointError(
            f"The optimizer {type(optimizer).__name__} does not take back the state that it gave: after loading it "
            f"state_dict gives another {wrong[0] if wrong else 'form'}. A run with it cannot be resumed."
        )


def _is_tensor(value: object) -> bool:
    return isinstance(value, (Tensor, Parts))


def _placed(value: Tensor | Parts, parameter: Tensor, on_device: bool) -> Tensor:
    """Return a copy of a tensor of the state on the device where the optimizer keeps it.

    One of the parameter's shape also gets its strides, which decide in what order a norm of it adds, and is divided
    over the processes if the parameter is.
    """
    if parameter.shape == value.shape and is_cut(parameter):
        placed = torch.empty_like(parameter.detach(), dtype=value.dtype)
    else:
        value = whole(value)
        like = parameter.detach() if parameter.shape == value.shape else value
        device = parameter.device if on_device else value.device
        placed = torch.empty_like(like, dtype=value.dtype, device=device)
    fill(placed, value)
    return placed
