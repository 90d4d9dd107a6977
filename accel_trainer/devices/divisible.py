"""Whether a model and an optimizer can be divided over the processes."""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.exchange import gather_objects
from ..data.randomness import generators_kept, seed_all
from .successors import all_of

# Shapes, and rows at which they are cut: more elements than 8-bit optimizers leave alone, cut so that nothing divides
# anything; and rows that are shorter than what a processor computes at once.
_CASES = (((131, 67), (0, 5, 50, 131)), ((32, 7), tuple(range(33))))
_NUM_STEPS = 8
_TOLERANCE = 1e-4  # relative; what looks at a whole weight differs by far more


def check_is_same_everywhere(model: nn.Module) -> None:
    """Refuse (ValueError) a model that is not built alike on all processes: they would wait for each other."""
    form = {name: (*one.shape, str(one.dtype), one.requires_grad) for name, one in model.named_parameters()}
    form |= {name: (*one.shape, str(one.dtype)) for name, one in model.named_buffers()}
    forms = gather_objects(form)
    for process, other in enumerate(forms):
        wrong = [name for name in {**forms[0], **other} if forms[0].get(name) != other.get(name)]
        if wrong or list(forms[0]) != list(other):
            where = wrong[0] if wrong else "the order of its parts"
            raise ValueError(
                f"The model is not the same on all processes: process {process} has "
                f"{_told(other.get(where))} where process 0 has {_told(forms[0].get(where))}, in {where}. "
                "Build it from the config alone, and freeze the same weights everywhere."
            )


def _told(form: tuple[Any, ...] | None) -> str:
    if form is None:
        return "nothing"
    sizes = tuple(size for size in form if type(size) is int)
    frozen = ", frozen" if form[-1] is False else ""
    return f"{sizes} {next(text for text in form if isinstance(text, str)).removeprefix('torch.')}{frozen}"


def check_can_be_divided(model: nn.Module, units: list[nn.Module], bitwise: bool) -> None:
    """Refuse (ValueError) weights that torch cannot divide, by their names; others are put in order for it."""
    _check_memory(model)
    for name, weight in model.named_parameters():
        if not weight.ndim:
            raise ValueError(f"{name} is a single number, which has no rows to divide: give it the shape (1,).")
        if not weight.numel():
            raise ValueError(f"{name} has the shape {tuple(weight.shape)}, with nothing in it to divide: leave it out.")
        if weight.layout != torch.strided or weight.is_complex():
            kind = "complex" if weight.is_complex() else "sparse"
            raise ValueError(f"{name} is {kind}: only dense real weights can be divided.")
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            raise ValueError(
                f"{name} has a hook of its own (register_hook), which a divided weight would not call: leave it out, "
                "or hook the module."
            )
        if not weight.is_contiguous():
            if bitwise:
                raise ValueError(
                    f"{name} is not contiguous (as with channels_last), and a divided model is: it would be computed "
                    "in another order, so bitwise=True cannot promise anything of it. Give it contiguous weights."
                )
            weight.data = weight.data.contiguous()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(f"{name} has sparse gradients, which cannot be divided: use sparse=False there.")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ValueError(f"{name} has a max_norm, which changes weights in the forward: leave it out.")
    seen: set[int] = set()
    for unit in units:
        trained = [weight for weight in unit.parameters() if weight.requires_grad and id(weight) not in seen]
        seen |= set(map(id, trained))
        kinds = {str(weight.dtype).removeprefix("torch.") for weight in trained}
        if len(kinds) > 1:
            raise ValueError(
                f"The weights of {type(unit).__name__} that are trained are {' and '.join(sorted(kinds))}, and are "
                "gathered together: give them one type."
            )


def _check_memory(model: nn.Module) -> None:
    """Refuse (ValueError) weights that share memory and are not one parameter: the parts of a divided model do not."""
    places = []
    for name, weight in model.named_parameters():
        if weight.layout == torch.strided and weight.device.type != "meta":
            steps = zip(weight.shape, weight.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in steps)
            places.append((weight.data_ptr(), weight.data_ptr() + extent * weight.element_size(), name))
    for (_, end, name), (start, _, other) in itertools.pairwise(sorted(places)):
        if start < end:
            raise ValueError(
                f"{name} and {other} share memory, which the parts of a divided model cannot: make them one parameter, "
                "as tied weights are, or give each memory of its own (clone)."
            )


def check_by_element(optimizer: Optimizer, device: torch.device, bitwise: bool) -> None:
    """Try an optimizer on a small weight, whole and in parts; refuse (ValueError) one whose results differ.

    A process has some of the rows of a weight: each element must be trained by itself.
    Each group's settings are tried, by copies: the optimizer itself stays as it is. With `bitwise` not one bit may
    differ. Of an optimizer that steps others, these are tried.
    """
    for one in all_of(optimizer):
        if all_of(one) == [one]:
            _check_by_element(one, device, bitwise)


def _check_by_element(optimizer: Optimizer, device: torch.device, bitwise: bool) -> None:
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
        if torch.equal(whole, values):
            raise ValueError(f"{name} does not train a weight of its param_groups, on which it was tried. {_REMEDY}")
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
