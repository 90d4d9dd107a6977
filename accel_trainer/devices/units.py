"""The units of a divided model: what is gathered, computed with and given up again, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import repeated_blocks


def units_of(model: nn.Module, names: tuple[str, ...] = ()) -> list[nn.Module]:
    """Return the modules that are gathered and given up one at a time, the model itself last.

    They are the blocks that the model repeats, or those of the classes with these names. In a model without any they
    are its parts, apart from small ones. What belongs to none of them is gathered for as long as the model computes, so
    a part whose weights are used from outside of it, as tied ones are, is no unit.

    Raises:
        ValueError: There is no class of such a name in the model.
    """
    wanted = set(names or getattr(model, "_no_split_modules", None) or ())
    of_classes = [module for module in model.modules() if type(module).__name__ in wanted]
    missing = set(names) - {type(module).__name__ for module in of_classes}
    if missing:
        raise ValueError(
            f"The launch wants to divide the model by blocks of the class {', '.join(sorted(missing))}, and the model "
            f"has none: fsdp_transformer_layer_cls_to_wrap is the name of the class that it repeats."
        )
    least = _num_elements(model) // 64
    repeated = [part for block in repeated_blocks(model) for part in _called(block, 1)]
    blocks = of_classes or repeated or list(_large_parts(model, least))
    found = [block for block in dict.fromkeys(blocks) if block is not model and _is_a_unit(block, model)]
    inner = {module for block in found for module in block.modules() if module is not block}
    return [*(block for block in found if block not in inner), model]


def _num_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _large_parts(module: nn.Module, least: int) -> Iterator[nn.Module]:
    """Yield the parts of a module, and of its containers, that hold at least so many elements.

    Parts of parts are left together: code of their own may call some of them on some processes only.
    """
    for child in module.children():
        if isinstance(child, nn.Sequential):
            yield from _large_parts(child, least)
        else:
            yield from _called(child, least)


def _called(module: nn.Module, least: int) -> Iterator[nn.Module]:
    """Yield a module of at least so many elements, or the parts of one that only holds others, and is never called."""
    if type(module).forward is nn.Module.forward:
        yield from _large_parts(module, least)
    elif _num_elements(module) >= least:
        yield module


def _is_a_unit(block: nn.Module, model: nn.Module) -> bool:
    """Return whether a module has weights, and none that other parts of the model have too."""
    inside = set(block.modules())
    own = {id(weight) for module in inside for weight in module._parameters.values() if weight is not None}
    elsewhere = (module for module in model.modules() if module not in inside)
    outside = {id(weight) for module in elsewhere for weight in module._parameters.values() if weight is not None}
    return bool(own) and not own & outside


# --- an undivided model that is one to the last bit -------------------------------------------------------------------


@contextmanager
def joined_inputs(model: nn.Module) -> Iterator[None]:
    """Let the gradients of what a unit is given be added up within the unit first, as in a divided model.

    Where several units are given the same tensor, as the blocks of a decoder the output of an encoder, the order of the
    sum would be another one else.
    """
    *units, _ = units_of(model)
    hooks = [unit.register_forward_pre_hook(_joined, with_kwargs=True) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _joined(unit: nn.Module, args: Any, kwargs: Any) -> Any:
    given: list[Tensor] = []  # one that is given twice counts twice

    def note(tensor: Tensor) -> Tensor:
        given.append(tensor)
        return tensor

    if torch.is_grad_enabled():
        _exchanged((args, kwargs), note)
    if not given:
        return None
    copies = iter(_Identity.apply(*given))  # type: ignore[no-untyped-call]
    return _exchanged((args, kwargs), lambda tensor: next(copies))


def _exchanged(value: Any, new: Callable[[Tensor], Any]) -> Any:
    """Return a value with others in place of its tensors that need a gradient.

    A list or dictionary stays the same object, which the unit may fill for others.
    """
    if isinstance(value, Tensor):
        return new(value) if value.requires_grad else value
    if isinstance(value, (list, dict)):
        for key, one in list(enumerate(value) if isinstance(value, list) else value.items()):
            value[key] = _exchanged(one, new)
    if isinstance(value, tuple):
        items = tuple(_exchanged(one, new) for one in value)
        if any(map(is_not, items, value)):
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


class _Identity(torch.autograd.Function):
    """One node for all inputs of a unit, which waits for all of their gradients; copies, which may be changed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Any:
        return tuple(map(_copy, inputs))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy that lies in memory as the tensor does; the tensor itself where that cannot be."""
    copy = tensor.clone()
    lies_alike = copy.stride() == tensor.stride() and copy.data_ptr() % 64 == tensor.data_ptr() % 64
    return copy if lies_alike else tensor
