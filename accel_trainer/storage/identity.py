"""The identity of a run: what must be the same to go on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..base.console import printable
from ..config import TrainConfig
from ..data.order import is_stream, length_of, num_batches, sampler_of
from ..data.streams import description_of
from ..errors import CheckpointError

_CHOICES = ("seed", "steps_per_epoch", "monitor", "mode", "max_grad_norm", "schedule_every")


def identity_of(
    config: TrainConfig,
    model: nn.Module,
    settings: Sequence[Mapping[str, Any]],
    functions: Mapping[str, Any],
    loaders: Mapping[str, DataLoader[Any] | None],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Return the identity of a run: if any of these values were another, it could not go on.

    `settings` are those that the optimizer's parameter groups began with; `functions` and `loaders` are given by the
    names of their arguments, `metrics` by their names only.
    """
    rates = [group.get("initial_lr", group.get("lr")) for group in settings]
    lengths = {name: length_of(getattr(loader, "dataset", None)) for name, loader in loaders.items()}
    return {
        **{name: getattr(config, name) for name in _CHOICES},
        **_order_of(loaders["train_loader"]),
        **{f"length of {name}'s dataset": length for name, length in lengths.items()},
        **_stream_of(config, loaders["train_loader"]),
        "metrics": list(metrics),
        "model": _name_of(model),
        **{name: _name_of(function) for name, function in functions.items()},
        "learning rates": [None if rate is None else float(rate) for rate in rates],
        "weight decays": [float(group.get("weight_decay") or 0) for group in settings],
    }


def _order_of(loader: DataLoader[Any] | None) -> dict[str, Any]:
    """Return what decides the order of the samples and their batches."""
    if loader is None or is_stream(loader):
        return {"batch_size": getattr(loader, "batch_size", None)}
    outer = sampler_of(loader)
    inner = getattr(outer, "sampler", None)
    return {
        "batch_size": getattr(outer, "batch_size", None),
        "num_batches": num_batches(loader),
        "drop_last": getattr(outer, "drop_last", None),
        "sampler": " of ".join(_name_of(sampler) or "" for sampler in (outer, inner) if sampler is not None),
        "replacement": getattr(inner, "replacement", None),
    }


def _stream_of(config: TrainConfig, loader: DataLoader[Any] | None) -> dict[str, Any]:
    """Return what decides the samples of a stream that is read by its shards."""
    if not config.stream_by_shards or loader is None:
        return {}
    groups = config.num_micro_batches
    return {"stream_by_shards": groups, "stream": description_of(loader), "drop_last": loader.drop_last}


def _name_of(thing: Any) -> str | None:
    """Return the qualified name of a function or of an object's class."""
    if isinstance(thing, partial):
        return _name_of(thing.func)
    thing = getattr(thing, "_orig_mod", thing)  # compiled or not
    return None if thing is None else str(getattr(thing, "__qualname__", type(thing).__qualname__))


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], source: str) -> None:
    """Refuse to go on with another run: the `CheckpointError` names each field that differs, old and new."""
    changes = [
        f"{printable(name)} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise CheckpointError(
            f"{source} is of another run: {'; '.join(changes)}. Set that back, or give another run_dir for a new run. "
            "Free to change are the processes, num_micro_batches (without stream_by_shards), num_epochs, max_steps and "
            "patience."
        )
