"""Which run it is: what must be the same to go on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..base.console import printable
from ..config import TrainConfig
from ..data.order import is_stream, length_of, num_batches, sampler_of
from ..errors import CheckpointError

_OF_THE_CONFIG = ("seed", "steps_per_epoch", "monitor", "mode", "max_grad_norm", "schedule_every")


def identity_of(
    config: TrainConfig,
    model: nn.Module,
    settings: Sequence[Mapping[str, Any]],
    functions: Mapping[str, Any],
    loaders: Mapping[str, DataLoader[Any] | None],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Return what makes a run the one that it is: with another of these it could not go on.

    Args:
        config: The user's choices.
        model: The user's model.
        settings: Of the optimizer's groups of parameters, those that the run began with.
        functions: Name of the argument -> loss, weights, scheduler, optimizer.
        loaders: `train_loader` and `test_loader`.
        metrics: Their names.
    """
    train_loader = loaders["train_loader"]
    return {
        **{name: getattr(config, name) for name in _OF_THE_CONFIG},
        **_order_of(train_loader),
        **{
            f"length of {name}'s dataset": length_of(getattr(loader, "dataset", None))
            for name, loader in loaders.items()
        },
        "metrics": list(metrics),
        "model": _name_of(model),
        **{name: _name_of(function) for name, function in functions.items()},
        "learning rates": [_rate_of(group) for group in settings],
        "weight decays": [float(group.get("weight_decay") or 0) for group in settings],
    }


def _rate_of(group: Mapping[str, Any]) -> float | None:
    rate = group.get("initial_lr", group.get("lr"))
    return None if rate is None else float(rate)


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
        "sampler": " of ".join(_name_of(one) or "" for one in (outer, inner) if one is not None),
        "replacement": getattr(inner, "replacement", None),
    }


def _name_of(thing: Any) -> str | None:
    """Return the qualified name of a function or of an object's class."""
    if isinstance(thing, partial):
        return _name_of(thing.func)
    thing = getattr(thing, "_orig_mod", thing)  # compiled or not
    if thing is None:
        return None
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], source: str) -> None:
    """Refuse to go on with another run.

    Raises:
        CheckpointError: With each field that differs, old and new.
    """
    names = [*before, *(name for name in now if name not in before)]
    changes = [
        f"{printable(name)} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise CheckpointError(
            f"{source} is of another run: {'; '.join(changes)}. Set that back, or give another run_dir for a new run. "
            "Free to change are the processes, num_micro_batches, num_epochs, max_steps and patience."
        )
