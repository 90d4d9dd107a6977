"""Plain data as JSON, with tensors beside it, and back again; checksums of it.

Nothing but data comes back: numbers, texts, lists, dictionaries and tensors, of exactly these types.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

import numpy
import torch
from torch import Tensor

_WORDS = ("nan", "inf", "-inf")
_CHECKSUM = "checksum"
_FROM_TENSOR: dict[str, Callable[[Tensor], Any]] = {
    "$tensor": lambda tensor: tensor,
    "$array": Tensor.numpy,
    "$complex": torch.view_as_complex,
}


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return what JSON can hold of a value; its tensors go into `tensors`, no copies.

    Their names, and those in messages, begin with `name`. The value is made of numbers, texts, tensors and arrays, in
    lists, tuples and dictionaries with keys of any such kind; a `TypeError` names a part of another type. Numbers that
    are not finite become the words that `float()` reads back; what else JSON does not know is a dictionary with one key
    that begins with `$`. Functions in a dictionary are left out: they belong to the program.

    Example:
        >>> tensors = {}
        >>> pack({"betas": (0.9, math.inf), "step": torch.ones(1)}, tensors, "adam")
        {'betas': {'$tuple': [0.9, 'inf']}, 'step': {'$tensor': 'adam/step'}}
        >>> tensors
        {'adam/step': tensor([1.])}
    """
    if isinstance(value, numpy.generic):
        value = value.item()
    if value is None or type(value) in (bool, int):
        return value
    if type(value) is str:
        return {"$text": value} if value in _WORDS else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, (Tensor, numpy.ndarray)):
        return _pack_tensor(value, tensors, name)
    if type(value) in (list, tuple):
        items = [pack(item, tensors, f"{name}/{index}") for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if type(value) in (dict, OrderedDict, defaultdict, Counter):
        return _pack_dict(value, tensors, name)
    raise TypeError(f"{name} is a {type(value).__name__}; only tensors, numbers, texts and lists of them can be saved.")


def encode(value: Any) -> Any:
    """Return what JSON can hold of a value, for files that people read: as `pack`, but what it refuses is a text."""
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    try:
        return pack(value, {}, "")
    except TypeError:
        return str(value)


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


def unpack(packed: Any, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """Undo `pack`, or `encode`; refuse anything else with a `ValueError`."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return float(packed) if packed in _WORDS else packed
    tag = next(iter(packed), "")
    if not tag.startswith("$"):
        return {key: unpack(item, tensors) for key, item in packed.items()}
    content = packed[tag]
    if tag == "$text":
        return content
    if tag == "$float":  # of checkpoints before version 0.2
        return float(content)
    if tag == "$tuple":
        return tuple(unpack(content, tensors))
    if tag in _FROM_TENSOR:
        return _FROM_TENSOR[tag](tensors[content])  # type: ignore[index]
    if tag in ("$pairs", "$counter"):
        pairs = {unpack(key, tensors): unpack(item, tensors) for key, item in content}
        return Counter(pairs) if tag == "$counter" else pairs
    raise ValueError(f"{tag} is not known.")


def same_bits(one: Tensor, other: Tensor | None) -> bool:
    """Return whether two tensors, on any devices, have one shape and dtype and are equal bit for bit."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = (tensor.cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return encoded content together with its checksum, which shows damage when it is read."""
    return {**content, _CHECKSUM: f"{crc32(json.dumps(content).encode()):08x}"}


def checked(content: Any) -> dict[str, Any]:
    """Return what `with_checksum` was given, or raise a `ValueError` if it is not as it was written."""
    if not isinstance(content, dict) or _CHECKSUM not in content:
        raise ValueError("it carries no checksum")
    rest = {name: value for name, value in content.items() if name != _CHECKSUM}
    if content != with_checksum(rest):
        raise ValueError("its checksum does not match: it is damaged, or has been changed")
    return rest


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values as one level, the names joined by dots.

    Example:
        >>> flattened({"seed": 0, "versions": {"torch": "2.13.0"}})
        {'seed': 0, 'versions.torch': '2.13.0'}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": item for inner, item in flattened(value).items()}
        else:
            flat[name] = value
    return flat
