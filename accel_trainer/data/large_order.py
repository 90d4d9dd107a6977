"""The order of very many samples, of which any part is computed by itself: no process holds it as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .randomness import derive_seed

_BLOCK = 2**14  # indices that are computed at once: few enough for the cache, and for one thread
_NUM_ROUNDS = 8
_FACTORS = -0x61C8864680B583EB, 0x2545F4914F6CDD1D  # odd, of 64 bits: they spread what has changed over the upper bits


class LargeOrder:
    """The samples 0 to `length - 1` in their order, or in a random one that is a pure function of a seed.

    A slice of it is a tensor of int64. The random order is a Feistel network: a one-to-one function on the numbers of
    so many bits, applied again to a result that is no sample.

    Args:
        length: Number of samples, at least 2.
        seed: Decides the order; `None` for that of the samples.

    References:
        Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions" (1988); Black and
        Rogaway, "Ciphers with arbitrary finite domains" (2002).
    """

    def __init__(self, length: int, seed: int | None = None) -> None:
        self._length = length
        self._compute: Callable[[Tensor], Tensor] = torch.Tensor.clone
        if seed is not None:
            keys = [derive_seed(seed, number) for number in range(_NUM_ROUNDS)]
            self._compute = partial(_shuffled, length=length, keys=keys)
        self._start, self._block = 0, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(self._length)
        if not self._start <= start <= stop <= self._start + len(self._block):
            end = min(max(stop, start + _BLOCK), self._length)
            self._start, self._block = start, self._compute(torch.arange(start, end))
        return self._block[start - self._start : stop - self._start]


def _shuffled(places: Tensor, length: int, keys: list[int]) -> Tensor:
    """Return the sample at each place."""
    num_bits = (length - 1).bit_length()
    found = _permuted(places, num_bits, keys)
    while len(beyond := (found >= length).nonzero().squeeze(1)):
        found[beyond] = _permuted(found[beyond], num_bits, keys)
    return found


def _permuted(numbers: Tensor, num_bits: int, keys: list[int]) -> Tensor:
    """Return other numbers of so many bits, one for each; there is an even number of keys."""
    num_left = num_bits // 2
    num_right = num_bits - num_left
    left, right = numbers >> num_right, numbers & ((1 << num_right) - 1)
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & ((1 << num_left) - 1))
        num_left, num_right = num_right, num_left
    return (left << num_right) | right


def _mixed(numbers: Tensor) -> Tensor:
    """Return numbers of which each bit depends on all bits of those given; what overflows is lost alike everywhere."""
    for factor in _FACTORS:
        numbers = numbers * factor
        numbers = numbers ^ (numbers >> 32)
    return numbers
