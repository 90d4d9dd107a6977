"""Seeds as pure functions of the position in a run, and the generators that they set."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim import Optimizer

# The uses of a seed: the second number of every path, so that no two uses share a stream.
ORDER, DATA, FETCH, TRAINING, EVALUATION, WEIGHTS = range(6)
_packers = [struct.Struct(f"<{length}q").pack for length in range(8)]


def derive_seed(*path: int) -> int:
    """Return a seed from 0 to 2**63 - 1 that depends on every number of the path, the same on every machine.

    The path is the user's seed, its use, then numbers such as epoch and position; each below 2**63. Costs about one
    microsecond.
    """
    digest = blake2b(_packers[len(path)](*path), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int, generators: Sequence[torch.Generator] = (torch.default_generator,)) -> None:
    """Set the generators that code may draw from, Python's, NumPy's and torch's, to a seed from 0 to 2**63 - 1.

    Costs 13 microseconds.
    """
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)  # the legacy generator takes 32 bits
    for generator in generators:
        generator.manual_seed(seed)


# Parts of torch.nn that compute without chance, but for the exceptions; what is new in torch may draw.
_CERTAIN = frozenset(
    f"torch.nn.modules.{name}"
    for name in "activation batchnorm container conv flatten linear loss normalization padding pooling sparse".split()
)
_EXCEPTIONS = ("RReLU", "MultiheadAttention", "FractionalMaxPool", "Lazy")
_HOOKS_EVERYWHERE = [
    hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_") and isinstance(hooks, dict)
]
_PLAIN = frozenset({bool, int, float, str, tuple, type(None)})  # attributes that are neither code nor hooks


def draws_nothing(model: nn.Module, *others: Any) -> bool:
    """Return whether no code runs that may draw: in a model, with its hooks, and in other modules and optimizers."""
    if any(_HOOKS_EVERYWHERE) or not all(map(_has_no_code, model.parameters())):
        return False
    return all(map(_is_certain, (*model.modules(), *others)))


def _has_no_code(parameter: nn.Parameter) -> bool:
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return type(parameter) is nn.Parameter and not hooks


def _is_certain(thing: Any) -> bool:
    kind = type(thing)
    if isinstance(thing, Optimizer):
        return kind.__module__.startswith("torch.optim.")
    is_torchs = kind.__module__ in _CERTAIN and str(kind.forward.__module__).startswith("torch.nn.")
    if not is_torchs or kind.__name__.startswith(_EXCEPTIONS):
        return False
    for name, value in vars(thing).items():
        is_hooks = name.endswith("_hooks")
        if type(value) not in _PLAIN and ((is_hooks and value) or (callable(value) and not _is_certain(value))):
            return False
    return True


def torch_generators(device: torch.device) -> list[torch.Generator]:
    """Return the generators that operations such as dropout draw from on this device.

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
def generators_kept(*generators: torch.Generator) -> Iterator[None]:
    """Put back Python's and NumPy's generators, and these of torch (the CPU's default one without any), at the end."""
    guarded = list(generators) or [torch.default_generator]
    states = _snapshot(guarded)
    try:
        yield
    finally:
        _put_back(guarded, states)


class SeededIterator(Iterator[Any]):
    """Iterate over something that may draw at random, with generators seeded for it alone.

    Its draws depend on the seed only, not on other draws between two of its items, and do not change the generators of
    other code. `generator` is the one it draws from, if that is not its own attribute. Costs about 50 microseconds an
    item.
    """

    def __init__(self, iterable: Any, seed: int, generator: torch.Generator | None = None) -> None:
        generator = getattr(iterable, "generator", None) if generator is None else generator
        self._generators = [torch.default_generator, *([generator] if isinstance(generator, torch.Generator) else [])]
        with generators_kept(*self._generators):
            seed_all(seed, self._generators)
            self.iterator = iter(iterable)
            self._states = _snapshot(self._generators)

    def __next__(self) -> Any:
        with generators_kept(*self._generators):
            _put_back(self._generators, self._states)
            item = next(self.iterator)
            self._states = _snapshot(self._generators)
            return item
