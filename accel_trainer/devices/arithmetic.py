"""The arithmetic of a run: threads, kernels, TF32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed


@contextmanager
def fixed_arithmetic(bitwise: bool = False, num_threads: int | None = None) -> Iterator[None]:
    """Set the threads, kernels and TF32 of a run; the old settings are put back.

    Convolutions in float32 follow `torch.set_float32_matmul_precision` as matrix products do: by default in full
    precision. torch would let cuDNN round them to TF32, whose errors are larger than the promised difference between
    layouts.

    Args:
        bitwise: Whether not one bit may differ: deterministic kernels only, one thread unless a number is given.
        num_threads: Threads inside an operation on the CPU; `None` keeps the present number.
    """
    # cuBLAS reads it once, at the first matrix product of a process: a later run of this process may be the one that
    # needs it. Without it products on several streams are not deterministic, and torch refuses them then.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with ExitStack() as old:
        old.callback(_set_tf32_of_convolutions, _set_tf32_of_convolutions(uses_tf32()))
        if num_threads is not None or bitwise:
            old.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(num_threads or 1)
        if bitwise:
            old.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
            torch.use_deterministic_algorithms(True)
            old.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
            torch.backends.cudnn.benchmark = False
            # It would overwrite all memory that is allocated, in case it is read before it is written.
            deterministic: Any = torch.utils.deterministic
            fills = deterministic.fill_uninitialized_memory
            old.callback(setattr, deterministic, "fill_uninitialized_memory", fills)
            deterministic.fill_uninitialized_memory = False
        yield


def uses_tf32() -> bool:
    """Return whether the user lets torch round products of float32 matrices to TF32 on a GPU."""
    if hasattr(torch.backends.cudnn, "conv"):  # since torch 2.9, where the older function may refuse to answer
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def _set_tf32_of_convolutions(choice: bool | tuple[str, str]) -> bool | tuple[str, str]:
    """Set whether convolutions and recurrent layers are rounded to TF32, and return the old setting."""
    cudnn: Any = torch.backends.cudnn
    before: bool | tuple[str, str]
    try:
        before = bool(cudnn.allow_tf32)
    except RuntimeError:  # they were set one by one, by the names that torch has since 2.9
        before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    if isinstance(choice, bool):
        cudnn.allow_tf32 = choice
    else:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = choice
    return before


def tf32_message(device: torch.device) -> str:
    """Return the part of the first line of a run on TF32; empty on devices without it."""
    if device.type != "cuda":
        return ""
    return ", TF32 on (your choice)" if uses_tf32() else ', TF32 off (set_float32_matmul_precision("high") allows it)'
