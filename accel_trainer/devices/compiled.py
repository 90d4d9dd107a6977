"""Lower precision and compiled code, without copies of the user's modules."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, wraps
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DynamoBackend, convert_to_fp32
from torch import nn


@contextmanager
def neither_compiling_nor_casting(accelerator: Accelerator) -> Iterator[None]:
    """Keep Accelerate from compiling the model and from giving it a forward in lower precision.

    When it compiles by regions it copies modules, and the copies would not follow the user's modules. Its cast is a
    new function for each `prepare`, so compiled code around it would be compiled anew.
    """
    plugin = accelerator.state.dynamo_plugin
    backend, casts = plugin.backend, accelerator.native_amp
    plugin.backend, accelerator.native_amp = DynamoBackend.NO, False
    try:
        yield
    finally:
        plugin.backend, accelerator.native_amp = backend, casts


def autocast_of(accelerator: Accelerator) -> tuple[Any, ...] | None:
    """Return the arguments of `torch.autocast` for a forward in lower precision; `None` where nothing is cast."""
    if not accelerator.native_amp:
        return None
    handler = accelerator.autocast_handler or AutocastKwargs()
    dtype = torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16
    return accelerator.device.type, dtype, handler.enabled, handler.cache_enabled


def cast_forward(forward: Any, autocast: tuple[Any, ...]) -> Any:
    """Return a forward that computes in lower precision and returns full precision.

    A method stays bound to its object, so that a copy of the model computes with its own weights.
    """
    if isinstance(forward, MethodType):
        return MethodType(_casting(forward.__func__, autocast), forward.__self__)
    return _casting(forward, autocast)


@lru_cache
def _casting(function: Any, autocast: tuple[Any, ...]) -> Any:
    """Return a function that casts; the same one for equal arguments, so that compiled code is not compiled anew."""
    device_type, dtype, enabled, cache_enabled = autocast

    def called(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype, enabled, cache_enabled):  # not shared: a model may call itself
            outputs = function(*args, **kwargs)
        return convert_to_fp32(outputs)

    return wraps(function)(_with_own_code(called))


def _with_own_code(function: Any) -> Any:
    """Return the function with a code object of its own: the compiler limits the graphs of each code object."""
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )


@lru_cache(maxsize=256)
def own_code(function: Any, key: Hashable) -> Any:
    """Return the function with a code object for each key; the same one each time, so that it is not compiled anew."""
    return _with_own_code(function)


def loss_of_model(
    model: nn.Module, loss_fn: Callable[[Any, Any], torch.Tensor], targets: Any, *arguments: Any, **named: Any
) -> Any:
    """Compute a loss with a model called with these arguments, to be compiled as one function."""
    return loss_fn(model(*arguments, **named), targets)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module of torch, whose own code torch does not compile where it is called directly."""
    return function(*args, **kwargs)


def uses_cuda_graphs(how: Mapping[str, Any]) -> bool:
    """Return whether code compiled with these arguments may be replayed in the same memory on a GPU."""
    options = how.get("options") or {}
    return (
        how.get("mode") in ("reduce-overhead", "max-autotune")
        or how.get("backend") == "cudagraphs"
        or bool(options.get("triton.cudagraphs"))
        or os.environ.get("TORCHINDUCTOR_CUDAGRAPHS") == "1"
        or bool(getattr(getattr(sys.modules.get("torch._inductor.config"), "triton", None), "cudagraphs", False))
    )


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats: one graph serves all of a class."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    blocks = [block for module in lists if len({type(block) for block in module}) == 1 for block in module]
    inner = {module for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if block not in inner]


def num_compilations() -> int:
    """Return how many graphs this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # the only counter
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
