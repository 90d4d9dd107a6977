"""Weights under the user's own names, tied ones once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..base.console import printable
from ..base.tracebacks import ends_in_users_lines
from .checkpoints import BEST
from .tensor_files import check_seal, is_utf8, read_weights


def plain_name(name: str) -> str:
    """Return a parameter's name as the user wrote it, without what compiling inserts anywhere in it.

    Example:
        >>> plain_name("_orig_mod.layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    return name.replace("_orig_mod.", "")


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model under the user's own names; no copies."""
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def checked_state(model: nn.Module) -> dict[str, Tensor]:
    """Return `plain_state`, or raise a `TypeError` where part of it could not be saved or restored."""
    state = plain_state(model)
    saved = _addresses(value for value in state.values() if isinstance(value, Tensor))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _addresses([parameter]) <= saved:
            raise TypeError(
                f"The model's state_dict() leaves out {name}, which is trained: best weights and checkpoints would "
                "lack it. Give a model whose state_dict() is torch's own."
            )
    restorable = _addresses((*model.parameters(), *model.buffers()))
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The model's state {name!r} is a {type(value).__name__}, and weights are saved as tensors only. "
                "Keep it in a buffer, or leave it out of get_extra_state()."
            )
        if not is_utf8(name):
            raise TypeError(f"The model's state {name!r} has a name that safetensors files cannot hold.")
        if value.dtype in (torch.complex128, torch.complex32):
            raise TypeError(f"The model's state {name!r} is {value.dtype}, which safetensors files cannot hold.")
        if not _addresses([value]) <= restorable:
            raise TypeError(f"The model's state {name!r} is a copy made for state_dict(), which could not be restored.")
    return state


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Return where these tensors are in memory; sparse and empty ones are left out."""
    return {tensor.data_ptr() for tensor in tensors if tensor.layout == torch.strided and tensor.numel()}


def split_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and for every other name of a tied tensor the name that was kept."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        bits = tensor.is_conj(), tensor.is_neg()
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), bits)
        kept = first.setdefault(memory, name) if tensor.numel() else name
        if kept != name:
            aliases[name] = kept
    return {name: tensor for name, tensor in state.items() if name not in aliases}, aliases


def check_fit(state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Refuse weights of another architecture with a `ValueError` that names every difference."""
    expected = plain_state(model)
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(printable(f"{source} does not fit the model: {'; '.join(problems)}."))


@torch.no_grad()
def copy_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the weights of these names, in place."""
    for name, tensor in plain_state(model).items():
        tensor.copy_(state[name])


def buffers_beside(model: nn.Module, losses: Iterable[nn.Module] = ()) -> dict[str, Tensor]:
    """Return the buffers that the user's own files leave out, by name: those not persistent, and those of the loss."""
    saved = model.state_dict()
    found = {f"buffers/{plain_name(name)}": buffer for name, buffer in model.named_buffers() if name not in saved}
    for number, loss in enumerate(losses):
        found |= {f"loss {number}/{plain_name(name)}": buffer for name, buffer in loss.named_buffers()}
    return {name: buffer for name, buffer in found.items() if buffer.layout == torch.strided}


@torch.no_grad()
def copy_beside(model: nn.Module, losses: Iterable[nn.Module], values: Mapping[str, Tensor]) -> None:
    """Give such buffers these values, in place; one of another shape, a cache that has grown, stays as it is."""
    for name, buffer in buffers_beside(model, losses).items():
        if name in values and values[name].shape == buffer.shape:
            buffer.copy_(values[name])


@ends_in_users_lines
def load_best(model: nn.Module, run_dir: str | os.PathLike[str]) -> nn.Module:
    """Give a model the best weights of a run, in place, and return it.

    Args:
        model: A model of the same architecture, on any device; it may be compiled or wrapped.
        run_dir: Folder of the run.

    Raises:
        FileNotFoundError: The folder holds no best weights.
        ValueError: The file is damaged, or does not fit the model; the message names each difference.

    Example:
        >>> import tempfile, torch
        >>> from accel_trainer import TrainConfig, Trainer
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 2), torch.ones(8, 1)))
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> with tempfile.TemporaryDirectory() as run_dir:
        ...     config = TrainConfig(num_epochs=1, run_dir=run_dir, verbose=False)
        ...     history = Trainer(model, optimizer, torch.nn.MSELoss(), config=config).fit(loader)
        ...     load_best(torch.nn.Linear(2, 1), run_dir)
        Linear(in_features=2, out_features=1, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_best takes a model and then a run_dir, got {type(model).__name__} first.")
    path = Path(run_dir).expanduser() / BEST
    if not path.is_file():
        raise FileNotFoundError(f"No best weights in {Path(run_dir)}: {path} does not exist.")
    inner = model
    while isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner = inner.module
    try:
        check_seal(path)
        state = read_weights(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    check_fit(state, inner, str(path))
    copy_into(inner, state)
    return model
