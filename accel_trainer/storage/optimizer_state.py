"""The state of an optimizer, by the names of its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.codec import pack, same_bits, unpack
from ..devices.prepared import counts_on_device
from ..errors import CheckpointError
from .weights import plain_name


def optimizer_state(optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the state of an optimizer by the names of its parameters, or in the form of its own, if it has one."""
    by_group = names_by_group(optimizer, model)
    whole = optimizer.state_dict()
    if _has_own_form(optimizer, whole):
        return {"own": pack(whole, tensors, "own"), "param_groups": [{"params": names} for names in by_group]}
    names = list(itertools.chain.from_iterable(by_group))
    state = {
        names[place]: {key: pack(value, tensors, f"{names[place]}/{key}") for key, value in own.items()}
        for place, own in whole["state"].items()
    }
    groups = [
        pack({key: value for key, value in group.items() if key != "params"}, tensors, f"group {number}")
        | {"params": [names[place] for place in group["params"]]}
        for number, group in enumerate(whole["param_groups"])
    ]
    return {"state": state, "param_groups": groups}


def _has_own_form(optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
    """Return whether only the optimizer itself knows what its state means."""
    kind = type(optimizer)
    is_torchs = (kind.state_dict, kind.load_state_dict) == (Optimizer.state_dict, Optimizer.load_state_dict)
    return not is_torchs or not all(isinstance(key, int) for key in state["state"])


def names_by_group(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters in each group, in the order in which the optimizer counts them."""
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    gone = "no part of the model any more: {}"
    return [
        [names.get(id(parameter), gone.format(place)) for place, parameter in enumerate(group["params"])]
        for group in optimizer.param_groups
    ]


def restore_optimizer(
    optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the state that `optimizer_state` took.

    Raises:
        CheckpointError: It does not take it back.
    """
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    settings = [
        unpack({key: value for key, value in group.items() if key != "params"}, tensors)
        for group in saved["param_groups"]
    ]
    for group, own in zip(optimizer.param_groups, settings, strict=False):  # a newer torch may have more of them
        own |= {key: one for key, one in group.items() if key != "params" and key not in own}
    for group, own in list(zip(saved["param_groups"], settings, strict=True))[len(optimizer.param_groups) :]:
        optimizer.add_param_group({"params": [parameters[name] for name in group["params"]]} | own)
    of_program = [{key: one for key, one in group.items() if callable(one)} for group in optimizer.param_groups]
    if "own" in saved:
        _restore_own_form(optimizer, saved["own"], tensors)
    else:
        _restore_torchs_form(optimizer, model, saved["state"], settings, tensors)
    for group, functions in zip(optimizer.param_groups, of_program, strict=True):
        group.update(functions)


def _restore_torchs_form(
    optimizer: Optimizer,
    model: nn.Module,
    state: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
) -> None:
    number = itertools.count()
    groups = [
        {**own, "params": [next(number) for _ in group["params"]]}
        for group, own in zip(optimizer.param_groups, settings, strict=True)
    ]
    # Not with the states: torch would cast them to the dtype of their parameter.
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    for names, group in zip(names_by_group(optimizer, model), optimizer.param_groups, strict=True):
        on_device = counts_on_device(group)
        for name, parameter in zip(names, group["params"], strict=True):
            if name in state:
                optimizer.state[parameter] = {
                    key: _placed(value, parameter, key != "step" or on_device)
                    for key, value in unpack(state[name], tensors).items()
                }


def _restore_own_form(optimizer: Optimizer, saved: Any, tensors: Mapping[str, Tensor]) -> None:
    """Let an optimizer take back the state that it has given.

    Raises:
        CheckpointError: It has not: what it gives now is something else.
    """
    optimizer.load_state_dict(unpack(saved, {name: tensor.clone() for name, tensor in tensors.items()}))
    found: dict[str, Tensor] = {}
    is_same = pack(optimizer.state_dict(), found, "own") == saved
    wrong = [name for name, tensor in found.items() if not same_bits(tensor, tensors.get(name))]
    if wrong or not is_same:
        raise CheckpointError(
            f"The optimizer {type(optimizer).__name__} does not take back the state that it gave: after loading it "
            f"state_dict gives another {wrong[0] if wrong else 'form'}. A run with it cannot be resumed."
        )


def _placed(value: Any, parameter: Tensor, on_device: bool) -> Any:
    """Return a state with memory of its own where the optimizer keeps it.

    One of the parameter's shape also gets its strides, which decide in what order a norm of it adds.
    """
    if isinstance(value, Tensor):
        like = parameter.detach() if parameter.shape == value.shape else value
        device = parameter.device if on_device else value.device
        return torch.empty_like(like, dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, dict):
        return {key: _placed(one, parameter, on_device) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(one, parameter, on_device) for one in value)
    return value
