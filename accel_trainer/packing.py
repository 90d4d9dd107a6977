"""Plain data with tensors in it, taken apart into JSON and tensors, and put together again.

Nothing but data comes back: numbers, texts, lists, dictionaries and tensors, of exactly these types.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

__all__ = ["pack", "same_bits", "unpack"]


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return what JSON can hold of a value; its tensors go beside it.

    What JSON does not know is a dictionary with one key that begins with `$`. Functions in a dictionary are left out:
    they belong to the program.

    Args:
        value: Numbers, texts, tensors and arrays, in lists, tuples and dictionaries with keys of any such kind.
        tensors: Takes the tensors in, no copies, under names that begin with `name`.
        name: Of the value, for its tensors and for messages.

    Raises:
        TypeError: With the name of a value of another type.

    Example:
        >>> tensors = {}
        >>> pack({"betas": (0.9, math.inf), "step": torch.ones(1)}, tensors, "adam")
        {'betas': {'$tuple': [0.9, {'$float': 'inf'}]}, 'step': {'$tensor': 'adam/step'}}
        >>> tensors
        {'adam/step': tensor([1.])}
    """
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, (Tensor, numpy.ndarray)):
        return _pack_tensor(value, tensors, name)
    if type(value) in (list, tuple):
        items = [pack(item, tensors, f"{name}/{place}") for place, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if type(value) in (dict, OrderedDict, defaultdict, Counter):
        return _pack_dict(value, tensors, name)
    raise TypeError(f"{name} is a {type(value).__name__}; only tensors, numbers, texts and lists of them can be saved.")


def _pack_tensor(value: Tensor | numpy.ndarray[Any, Any], tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    tag = "$tensor"
    if isinstance(value, numpy.ndarray):
        value, tag = torch.from_numpy(numpy.ascontiguousarray(value).reshape(value.shape)), "$array"
    if value.layout != torch.strided:
        raise TypeError(f"{name} is a {value.layout} tensor; only dense ones can be saved.")
    value = value.detach()
    if value.dtype == torch.complex128:  # safetensors does not know it
        value, tag = torch.view_as_real(value.resolve_conj()), "$complex"
    while name in tensors:
        name += "_"
    tensors[name] = value
    return {tag: name}


def _pack_dict(value: Mapping[Any, Any], tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    kept = {key: item for key, item in value.items() if not callable(item) or isinstance(item, Tensor)}
    if type(value) is not Counter and all(type(key) is str and not key.startswith("$") for key in kept):
        return {key: pack(item, tensors, f"{name}/{key}") for key, item in kept.items()}
    pairs = [
        [pack(key, tensors, f"{name}/key of {key}"), pack(item, tensors, f"{name}/{key}")] for key, item in kept.items()
    ]
    return {"$counter" if type(value) is Counter else "$pairs": pairs}


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `pack`.

    Args:
        packed: What `pack` returned.
        tensors: What it took in.

    Raises:
        ValueError: Not what `pack` returns.
    """
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    tag = next(iter(packed), "")
    if not tag.startswith("$"):
        return {key: unpack(item, tensors) for key, item in packed.items()}
    content = packed[tag]
    if tag == "$float":
        return float(content)
    if tag == "$tuple":
        return tuple(unpack(content, tensors))
    if tag == "$tensor":
        return tensors[content]
    if tag == "$array":
        return tensors[content].numpy()
    if tag == "$complex":
        return torch.view_as_complex(tensors[content])
    if tag in ("$pairs", "$counter"):
        pairs = {unpack(key, tensors): unpack(item, tensors) for key, item in content}
        return Counter(pairs) if tag == "$counter" else pairs
    raise ValueError(f"{tag} is not known.")


def same_bits(one: Tensor, other: Tensor | None) -> bool:
    """Return whether two tensors, wherever they are, are of one form and equal bit for bit."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = (tensor.cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)
