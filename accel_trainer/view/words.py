"""What a run says of itself at its start, in words; what a hard error of torch means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.data import DataLoader

from ..base.console import warn
from ..config import TrainConfig
from ..data.cut import Layout, describe_batch
from ..data.order import num_batches, num_steps
from ..devices.hardware import Hardware
from ..run import Run


def start_lines(
    hardware: Hardware,
    model: nn.Module,
    train_loader: DataLoader[Any],
    config: TrainConfig,
    metrics_in_vain: Sequence[str],
) -> Iterator[str]:
    """Yield what is to be said before the first step; `metrics_in_vain` are those that there is no test loader for."""
    yield _start_line(hardware, train_loader, hardware.layout(config.num_micro_batches), config)
    if metrics_in_vain:
        yield f"There is no test_loader: {', '.join(metrics_in_vain)} cannot be computed."
    is_free = config.num_micro_batches is None and not config.bitwise
    has_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    if hardware.num_processes > 1 and is_free and has_norm:
        yield _ON_BATCH_NORM
    evaluating = _trained_while_evaluating(model)
    if evaluating:
        names = ", ".join(evaluating[:3]) + (f" and {len(evaluating) - 3} more" if len(evaluating) > 3 else "")
        yield f"In evaluation mode, so without dropout, though trained: {names}. {_ON_EVALUATING}"


def _start_line(hardware: Hardware, train_loader: DataLoader[Any], layout: Layout, config: TrainConfig) -> str:
    text = hardware.describe()
    if hardware.compiler != "no":
        text += f", compiled by {hardware.compiler} (launcher)"
    elif config.compile:
        text += f", compiled{' by regions' if config.compile == 'regional' else ''} (argument)"
    if train_loader.batch_size is None:
        return text
    default = "bitwise" if config.bitwise else "one per process"
    source = "argument" if config.num_micro_batches else default
    return f"{text}; {describe_batch(train_loader.batch_size, layout)} (micro-batches: {source})"


_ON_BATCH_NORM = (
    "The model has BatchNorm, which sees the micro-batch of its process: another number of processes trains another "
    "model. A fixed num_micro_batches (the largest number of processes that you may use) makes it the same on all."
)
_ON_EVALUATING = (
    "The model was given so, as from_pretrained returns it, and stays so: call model.train() before fit if that is not "
    "meant."
)


def _trained_while_evaluating(model: nn.Module) -> list[str]:
    """Return the names of modules in evaluation mode, the outermost only, whose weights a training model trains.

    That is meant for layers that normalise, and an oversight where `from_pretrained` has left a part so.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if module.training or isinstance(module, _NormBase) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if any(parameter.requires_grad for parameter in module.parameters()):
            found.append(name)
    return found


def resolved(run: Run) -> dict[str, Any]:
    """Return what the user's choices were resolved to."""
    training, data_loader = run.training, run.training.loader.data_loader
    return {
        "device": str(training.hardware.device),
        "num_processes": training.hardware.num_processes,
        "num_micro_batches": training.loader.layout.num_micro_batches,
        "num_micro_batches_of_test": next((one.layout.num_micro_batches for one in run.test_loaders.values()), None),
        "num_threads": torch.get_num_threads(),
        "mixed_precision": training.hardware.precision,
        "batch_size": data_loader.batch_size,
        "num_batches": num_batches(data_loader),
        "num_parameters": sum(parameter.numel() for parameter in training.prepared.user_model.parameters()),
        "num_steps": num_steps(training.config, data_loader),
        "monitor": run.monitor,
    }


def warn_of_state(run: Run, before: Mapping[str, str]) -> None:
    """Warn of what the loss has changed in itself, where that is lost or differs between the processes."""
    hardware, now = run.training.hardware, run.training.objective.state_outside()
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed and hardware.is_main and (hardware.num_processes > 1 or run.folder is not None):
        warn(
            f"The loss has changed {', '.join(changed)}, which is no buffer: each process has its own, and a run "
            "that goes on begins with the first value again. Keep it with register_buffer in an nn.Module.",
            stacklevel=4,
        )


@contextmanager
def hinted() -> Iterator[None]:
    """Say what to do about an error of torch that does not."""
    try:
        yield
    except (RuntimeError, AttributeError, TypeError) as error:
        hint = next((hint for text, hint in _HINTS.items() if text in str(error)), None)
        if hint is None:
            raise
        raise RuntimeError(hint) from error


_HINTS = {
    "'DistributedDataParallel' object": (
        "On several processes compute_loss is given the model in a wrapper, which adds up the gradients of what it is "
        "called with: call it as model(...), not a part or a method of it (its forward may choose by an argument)."
    ),
    "Expected to have finished reduction": (
        "A step left some parameters without a gradient in its last micro-batch, though the first step gave every "
        "parameter one. Set find_unused_parameters=True in TrainConfig."
    ),
    "does not have a deterministic implementation": (
        "bitwise=True allows deterministic operations only, and the model, the loss or a metric uses one that is not "
        "(torch names it above). Replace that operation, or use bitwise=False."
    ),
    "CUBLAS_WORKSPACE_CONFIG": (
        "bitwise=True needs cuBLAS to be deterministic, which it decides at the first matrix product of a process, and "
        "one came before this trainer. Start the program with CUBLAS_WORKSPACE_CONFIG=:4096:8 in its environment."
    ),
}
