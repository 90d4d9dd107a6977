"""Weights as files: safetensors under the user's own names, tied ones once."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .console import printable
from .history import decode, encode

__all__ = [
    "buffers_beside",
    "check_fit",
    "check_seal",
    "checked_state",
    "copy_beside",
    "copy_into",
    "flush",
    "load_best",
    "metadata_of",
    "plain_name",
    "plain_state",
    "read_weights",
    "save_tensors",
    "seal_of",
    "split_aliases",
]


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
    """Return `plain_state`, of which everything can be saved and restored.

    Raises:
        TypeError: The model keeps an extra state that is not a tensor, which safetensors cannot hold, or leaves out
            weights that are trained.
    """
    state = plain_state(model)
    places = {one.data_ptr() for one in state.values() if isinstance(one, Tensor) and one.layout == torch.strided}
    for name, parameter in model.named_parameters():
        is_kept = not parameter.requires_grad or parameter.layout != torch.strided or not parameter.numel()
        if not is_kept and parameter.data_ptr() not in places:
            raise TypeError(
                f"The model's state_dict() leaves out {name}, which is trained: best weights and checkpoints would "
                "lack it. Give a model whose state_dict() is torch's own."
            )
    own = {one.data_ptr() for one in (*model.parameters(), *model.buffers()) if one.layout == torch.strided}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"The model's state {name!r} is a {type(value).__name__}, and weights are saved as tensors only. "
                "Keep it in a buffer, or leave it out of get_extra_state()."
            )
        if not _is_utf8(name):
            raise TypeError(f"The model's state {name!r} has a name that safetensors files cannot hold.")
        if value.dtype in (torch.complex128, torch.complex32):
            raise TypeError(f"The model's state {name!r} is {value.dtype}, which safetensors files cannot hold.")
        if value.layout == torch.strided and value.numel() and value.data_ptr() not in own:
            raise TypeError(f"The model's state {name!r} is a copy made for state_dict(), which could not be restored.")
    return state


def split_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and under which of those names the tied others are found."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        bits = tensor.is_conj(), tensor.is_neg()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), bits)
        kept = first.setdefault(place, name) if tensor.numel() else name
        if kept != name:
            aliases[name] = kept
    return {name: tensor for name, tensor in state.items() if name not in aliases}, aliases


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], sealed: bool = False) -> None:
    """Write tensors as safetensors and see them through to the disk.

    Args:
        path: File to write.
        tensors: On any device; strided ones and views of one storage too.
        metadata: Plain data to keep in the file's header.
        sealed: Whether to put the checksum of the whole file into its header.
    """
    plain = {name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous() for name, tensor in tensors.items()}
    sharing = Counter(tensor.untyped_storage().data_ptr() for tensor in plain.values())
    own = {  # safetensors refuses views of one storage
        name: tensor.clone() if sharing[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in plain.items()
    }
    seal = {_SEAL: _BLANK} if sealed else {}
    with _in_utf8(path) as place:
        save_file(own, place, metadata={"format": "pt", "accel_trainer": json.dumps(encode(metadata)), **seal})
    if sealed:
        _seal(path)
    flush(path)


# The checksum of a file, in its own header: computed with zeros in its place.
_SEAL, _BLANK = "sha256", "0" * 64
_SEALED = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def seal_of(path: Path) -> tuple[str, int]:
    """Return the checksum that a file carries, unchecked, and where in it.

    Raises:
        OSError: It cannot be read.
        ValueError: It carries none.
    """
    with open(path, "rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), _LARGEST_HEADER))
    found = _SEALED.search(header)
    if found is None:
        raise ValueError("it carries no checksum")
    return found[1].decode(), 8 + found.start(1)


_LARGEST_HEADER = 2**27  # bytes; safetensors takes no larger ones


def _sum_of(path: Path, place: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(place) + _BLANK.encode())
        file.seek(place + len(_BLANK))
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _seal(path: Path) -> None:
    _, place = seal_of(path)
    checksum = _sum_of(path, place)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(checksum.encode())


def check_seal(path: Path) -> None:
    """Refuse a file that is not as `save_tensors` has written and sealed it.

    Raises:
        OSError: It cannot be read.
        ValueError: Not one bit of it may have changed, and one has.
    """
    seal, place = seal_of(path)
    if _sum_of(path, place) != seal:
        raise ValueError("its checksum does not match")


def metadata_of(path: Path) -> dict[str, Any]:
    """Return the plain data that `save_tensors` has put into a file's header.

    Raises:
        OSError: It cannot be read.
        ValueError: It has none.
    """
    try:
        with _in_utf8(path) as place, safe_open(place, framework="pt") as file:
            content = decode(json.loads((file.metadata() or {}).get("accel_trainer", "null")))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict):
        raise ValueError("it says nothing of itself")
    return content


@contextmanager
def _in_utf8(path: Path) -> Iterator[Path]:
    """Yield a name of a file that safetensors takes: in a folder of an older system's alphabet it takes none."""
    if _is_utf8(str(path)):
        yield path
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield Path(f"/dev/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def flush(path: Path) -> None:
    """See a file, or the names in a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of `save_tensors` by name, tied ones under each of theirs."""
    with _in_utf8(path) as place, safe_open(place, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        aliases = json.loads((file.metadata() or {}).get("accel_trainer", "{}")).get("aliases", {})
    return tensors | {name: tensors[kept] for name, kept in aliases.items()}


def check_fit(state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Refuse weights of another architecture.

    Args:
        state: Tensors by name.
        model: The user's model.
        source: Where they come from, for the message.

    Raises:
        ValueError: With every difference.
    """
    expected = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    problems = [
        *(f"missing {name}" for name in expected if name not in state),
        *(f"unexpected {name}" for name in state if name not in expected),
        *(
            f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the model"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ),
    ]
    if problems:
        raise ValueError(printable(f"{source} does not fit the model: {'; '.join(problems)}."))


@torch.no_grad()
def copy_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the weights of these names, in place."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[plain_name(name)])


def buffers_beside(model: nn.Module, losses: Iterable[nn.Module] = ()) -> dict[str, Tensor]:
    """Return the buffers that the user's own files leave out, by name: those not persistent, and those of the loss."""
    own = model.state_dict()
    found = {f"buffers/{plain_name(name)}": one for name, one in model.named_buffers() if name not in own}
    for place, loss in enumerate(losses):
        found |= {f"loss {place}/{plain_name(name)}": one for name, one in loss.named_buffers()}
    return {name: one for name, one in found.items() if one.layout == torch.strided}


@torch.no_grad()
def copy_beside(model: nn.Module, losses: Iterable[nn.Module], values: Mapping[str, Tensor]) -> None:
    """Give such buffers these values, in place; one of another shape, a cache that has grown, stays as it is."""
    for name, buffer in buffers_beside(model, losses).items():
        if name in values and values[name].shape == buffer.shape:
            buffer.copy_(values[name])


def load_best(model: nn.Module, run_dir: str | os.PathLike[str]) -> nn.Module:
    """Give a model the best weights of a run, in place, and return it.

    Args:
        model: A model of the same architecture, on any device, compiled or wrapped or plain.
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
    path = Path(run_dir).expanduser() / "best" / "model.safetensors"
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
