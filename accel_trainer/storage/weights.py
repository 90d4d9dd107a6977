"""Weights under the user's own names, tied ones once, and without those that were frozen all the time."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..base.console import printable, some_of
from ..base.dtensors import added_over_parts, is_cut, local, locals_of, own_rows
from ..base.tracebacks import ends_in_users_lines
from ..numbers.objective import unwrapped
from .checkpoints import BEST, epoch_path, epochs_in
from .shards import fill
from .tensor_files import is_utf8
from .weight_files import check, exist, metadata_of, read_weights, told


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
    frozen = [plain_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for name, value in without(state, frozen).items():
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
    return {one.data_ptr() for one in locals_of(tensors) if one.layout == torch.strided and one.numel()}


def split_aliases(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and for every other name of a tied tensor the name that was kept."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    # A divided tensor has no address: some processes have no row of it.
    divided = {plain_name(name): one for name, one in model.named_parameters(remove_duplicate=False) if is_cut(one)}
    for name, tensor in state.items():
        if is_cut(tensor):  # under a name that only the model's own state_dict() knows, it is one by itself
            memory: tuple[Any, ...] = (id(divided[name]) if name in divided else name,)
        else:
            bits = tensor.is_conj(), tensor.is_neg()
            memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), bits)
        kept = first.setdefault(memory, name) if tensor.numel() else name
        if kept != name:
            aliases[name] = kept
    return {name: tensor for name, tensor in state.items() if name not in aliases}, aliases


def without(state: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a state without these names, and what belongs to them: the scales of weights of four bits and of eight."""
    parts = tuple(f"{name}." for name in names)
    beside = {name.removesuffix("weight") + scale for name in names for scale in _SCALES}
    return {
        name: value
        for name, value in state.items()
        if name not in names and name not in beside and not name.startswith(parts)
    }


_SCALES = ("SCB", "weight_format")  # what bitsandbytes writes beside a weight of eight bits


class FrozenWeights:
    """The weights that are frozen when a run begins: files leave out those that are still the same, and say so.

    A callback may unfreeze weights, or write to frozen ones, as to those of a teacher; these are saved like others.

    Attributes:
        values: What they were, in host memory, by name: best weights without them are whole with these. Of a model that
            is divided over the processes, the rows of this one.
    """

    def __init__(self, model: nn.Module | None = None, left_out: Collection[str] = ()) -> None:
        """Take the frozen weights of a model, and those that a checkpoint leaves out; none without a model."""
        frozen = {} if model is None else _frozen(model, left_out)
        self.values = {name: local(one).detach().to("cpu", copy=True) for name, one in frozen.items()}
        self._digests = _digests_of(frozen)

    def digests(self, model: nn.Module) -> dict[str, str]:
        """Return digests of those that still are frozen, and what they were; one read-back if there are any."""
        now = _digests_of({name: one for name, one in _frozen(model).items() if name in self._digests})
        return {name: digest for name, digest in now.items() if digest == self._digests[name]}


def _digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a digest of type, shape and all bits of each tensor, by name; one read-back if there are any.

    Of a model that is divided over the processes, all call it.
    """
    if not tensors:
        return {}
    totals = [_fingerprint(one) for one in tensors.values()]
    joined = torch.stack([total.to(totals[0].device) for total in totals])
    read = added_over_parts(joined, list(tensors.values())).tolist()
    return {
        name: f"{one.dtype} {tuple(one.shape)} {total % 2**64:016x}"
        for (name, one), total in zip(tensors.items(), read, strict=True)
    }


def _fingerprint(tensor: Tensor) -> Tensor:
    """Return a sum over the elements, modulo 2**64, of their bits and places, mixed as by SplitMix64.

    It is computed on the device of the tensor, and the same on any; of a divided one it is the sum over the own rows.
    """
    mine = local(tensor).detach()
    first = own_rows(tensor)[0] * (mine[0].numel() if len(mine) else 0) if tensor.ndim else 0
    first = first * mine.element_size() // min(8, mine.element_size())  # complex numbers are two
    elements = mine.contiguous().view(-1).view(_WHOLE.get(tensor.element_size(), torch.int64))
    total = torch.zeros((), dtype=torch.int64, device=mine.device)
    for start in range(0, len(elements), _AT_A_TIME):
        part = elements[start : start + _AT_A_TIME].long()
        places = torch.arange(first + start + 1, first + start + 1 + len(part), device=part.device)
        mixed = part * -0x61C8864680B583EB + places * -0x3D4D51C2D82B14B1
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            mixed = (mixed ^ (mixed >> shift)) * factor
        total += mixed.sum()
    return total


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # the whole numbers of so many bytes
_AT_A_TIME = 2**20  # elements: they take several times their memory


def _frozen(model: nn.Module, others: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the frozen weights, and others, that a model's state holds as they are, under each of their names."""
    state = plain_state(model)
    named = {plain_name(name): one for name, one in model.named_parameters(remove_duplicate=False)}
    return {
        name: one
        for name, one in named.items()
        if (name in others or not one.requires_grad) and one.layout == torch.strided and one.numel() and name in state
        and local(state[name]).data_ptr() == local(one).data_ptr()
    }  # fmt: skip


def check_left_out(left_out: Mapping[str, str], state: Mapping[str, Tensor], source: str) -> None:
    """Refuse (ValueError) a state whose frozen weights are not those that a file leaves out, by their digests."""
    found = _digests_of({name: state[name] for name in left_out if name in state})
    different = [name for name, digest in left_out.items() if found.get(name) != digest]
    if different:
        raise ValueError(
            printable(
                f"{source} leaves out weights that were frozen, and the model has others in {some_of(different)}. "
                "Build it from the same pretrained weights, or under the same seed, in the same type and before they "
                "are changed."
            )
        )


def check_fit(
    state: Mapping[str, Any],
    model: nn.Module,
    source: str,
    left_out: Collection[str] = (),
    of_process: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Refuse weights of another architecture with a `ValueError` that names every difference.

    `left_out` are the names that the weights do without, `of_process` what they have of each tensor of the model.
    """
    expected = {name: of_process(tensor) for name, tensor in without(plain_state(model), left_out).items()}
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
def copy_into(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a model the weights of these names, in place."""
    for name, tensor in plain_state(model).items():
        if name in state:
            fill(tensor, state[name])


@torch.no_grad()
def copy_rows_into(model: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Give a model, of which this process has these rows only, their values, in place; all rows of one not divided."""
    for name, tensor in plain_state(model).items():
        if name in rows:
            local(tensor).copy_(rows[name])


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
def load_best(model: nn.Module, run_dir: str | os.PathLike[str], epoch: int | None = None) -> nn.Module:
    """Give a model the best weights of a run, in place, and return it.

    Weights that were frozen all the time are not in the file: it has their digests, and the model must have them.

    Args:
        model: A model of the same architecture, on any device; it may be compiled or wrapped.
        run_dir: Folder of the run.
        epoch: Another good epoch, 1-based, of a run with `keep_best` of 2 or more; `None` for the best.

    Raises:
        FileNotFoundError: The folder holds no best weights, or none of this epoch.
        ValueError: The file is damaged, or does not fit the model, or its frozen weights; the message names each
            difference.

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
    if epoch is not None and (type(epoch) is not int or epoch < 1):
        raise ValueError(f"epoch must be a whole number of at least 1, or None, got {epoch!r}.")
    folder = Path(run_dir).expanduser()
    path = folder / BEST if epoch is None else epoch_path(folder, epoch)
    if not exist(path):
        others = ", ".join(map(str, epochs_in(folder)))
        hint = "" if epoch is None else f" There are those of the epochs {others or '(none; see keep_best)'}."
        raise FileNotFoundError(f"No best weights in {Path(run_dir)}: {path} does not exist.{hint}")
    inner = unwrapped(model)
    try:
        check(path)
        state, left_out = read_weights(path), left_out_of(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{told(path)} is damaged: {error}.") from error
    check_fit(state, inner, str(path), left_out)
    check_left_out(left_out, plain_state(inner), str(path))
    copy_into(inner, state)
    return model


def left_out_of(path: Path) -> dict[str, str]:
    """Return names and digests of the frozen weights that a file of weights leaves out."""
    return checked_digests(metadata_of(path).get("left_out", {}))


def checked_digests(left_out: Any) -> dict[str, str]:
    """Return names and digests that were read, or raise a `ValueError`."""
    if not isinstance(left_out, dict) or not all(isinstance(text, str) for item in left_out.items() for text in item):
        raise ValueError(f"left_out is {left_out!r}")
    return left_out
