"""Seeds as pure functions of where a run stands, and the generators that they set."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from hashlib import blake2b
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim import Optimizer

__all__ = [
    "DATA",
    "EVALUATION",
    "FETCH",
    "ORDER",
    "TRAINING",
    "Draws",
    "derive_seed",
    "draws_of",
    "preserved",
    "seed_all",
    "torch_generators",
]

# What a seed is for; the second number of every path, so that no two uses share a stream.
ORDER, DATA, FETCH, TRAINING, EVALUATION = range(5)


_packers = [struct.Struct(f"<{length}q").pack for length in range(8)]


def derive_seed(*path: int) -> int:
    """Return a seed from 0 to 2**63 - 1 that depends on every number of the path, the same on every machine.

    Costs about one microsecond.

    Args:
        *path: The user's seed, what it is for, then numbers such as epoch and position; each below 2**63.
    """
    digest = blake2b(_packers[len(path)](*path), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Set the generators that a dataset may draw from: Python's, NumPy's and torch's on the CPU (8 microseconds)."""
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)  # the legacy generator takes 32 bits
    torch.default_generator.manual_seed(seed)


class Draws(IntEnum):
    """What code may draw from: seeding Python's and NumPy's generators costs four times as much as torch's."""

    NOTHING = 0
    TORCH = 1
    ANYTHING = 2


# Parts of torch.nn that compute without chance, but for the exceptions. What is new in torch is taken to draw.
_CERTAIN = frozenset(
    f"torch.nn.modules.{name}"
    for name in "activation batchnorm container conv flatten linear loss normalization padding pooling sparse".split()
)
_EXCEPTIONS = ("RReLU", "MultiheadAttention", "FractionalMaxPool", "Lazy")
_SILENT = frozenset({bool, int, float, str, tuple})  # what is common among attributes and is neither code nor hooks
_HOOKS_EVERYWHERE = [
    hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_") and isinstance(hooks, dict)
]


def draws_of(model: nn.Module | None, *others: Any) -> Draws:
    """Return what a model, and functions and optimizers beside it, may draw from when they are called.

    Where no code but torch's runs, nothing draws from Python's and NumPy's generators. Costs microseconds a module.

    Args:
        model: With its modules and parameters; `None` for none.
        *others: Modules, functions, optimizers.
    """
    modules = [] if model is None else list(model.modules())
    parameters = (one for module in modules for one in module._parameters.values() if one is not None)
    if any(_HOOKS_EVERYWHERE) or any(map(_has_code, parameters)):
        return Draws.ANYTHING
    return max(map(_draws, (*modules, *others)), default=Draws.NOTHING)


def _has_code(parameter: nn.Parameter) -> bool:
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(hooks) or type(parameter) is not nn.Parameter


def _draws(thing: Any) -> Draws:
    kind = thing if isinstance(thing, (FunctionType, BuiltinFunctionType)) else type(thing)
    drawn = _draws_of_kind(kind)
    if drawn is Draws.ANYTHING:
        return drawn
    for name, value in getattr(thing, "__dict__", {}).items():
        if type(value) in _SILENT or value is None:
            continue
        if name.endswith("_hooks") and value:
            return Draws.ANYTHING
        if callable(value) and not isinstance(thing, Optimizer):  # an activation, a distance, a method of its own;
            drawn = max(drawn, _draws(value))  # that of an optimizer is its scheduler's
    return drawn


def _draws_of_kind(kind: Any) -> Draws:
    code = getattr(kind, "forward", kind)
    if not all(str(one.__module__).startswith(("torch.nn.", "torch.optim.")) for one in (kind, code)):
        return Draws.ANYTHING
    is_certain = kind.__module__ in _CERTAIN and not kind.__name__.startswith(_EXCEPTIONS)
    is_optimizer = isinstance(kind, type) and issubclass(kind, Optimizer)
    return Draws.NOTHING if is_certain or is_optimizer else Draws.TORCH


def torch_generators(device: torch.device) -> list[torch.Generator]:
    """Return the generators that dropout and friends draw from on this device.

    `torch.manual_seed` would reach every device of the machine and costs 200 times as much as these.
    """
    generators = [torch.default_generator]
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        index = device.index if device.index is not None else module.current_device()
        module.init()  # fills default_generators
        generators.append(module.default_generators[index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    return generators


def _snapshot(generators: list[torch.Generator]) -> tuple[Any, ...]:
    return random.getstate(), numpy.random.get_state(), [generator.get_state() for generator in generators]


def _put_back(generators: list[torch.Generator], states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    for generator, state in zip(generators, states[2], strict=True):
        generator.set_state(state)


@contextmanager
def preserved(*generators: torch.Generator) -> Iterator[None]:
    """Put Python's, NumPy's and torch's generators back as they were before the block.

    Args:
        *generators: The torch generators to guard; none means the CPU's default one.
    """
    guarded = list(generators) or [torch.default_generator]
    states = _snapshot(guarded)
    try:
        yield
    finally:
        _put_back(guarded, states)


class SeededIterator(Iterator[Any]):
    """Iterate over something that may draw at random as if it were alone with freshly seeded generators.

    Its draws depend on the seed only, not on what others draw between two of its items, and leave no trace in the
    generators of others. Costs about 50 microseconds an item.

    Attributes:
        iterator: What is iterated.
    """

    def __init__(self, iterable: Any, seed: int) -> None:
        own = getattr(iterable, "generator", None)
        self._generators = [torch.default_generator, *([own] if isinstance(own, torch.Generator) else [])]
        with preserved(*self._generators):
            seed_all(seed)
            for generator in self._generators[1:]:
                generator.manual_seed(seed)
            self.iterator = iter(iterable)
            self._states = _snapshot(self._generators)

    def __next__(self) -> Any:
        with preserved(*self._generators):
            _put_back(self._generators, self._states)
            item = next(self.iterator)
            self._states = _snapshot(self._generators)
            return item
