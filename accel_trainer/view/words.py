"""What a run says of itself, in words: at its start, of settings without effect, of time; what errors of torch mean."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.data import DataLoader

from ..base.console import some_of, warn
from ..config import TrainConfig
from ..data.cut import Layout, describe_batch
from ..data.order import is_stream, num_batches, num_steps
from ..devices.compiled import num_compilations
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
    num_frozen = sum(not parameter.requires_grad for parameter in model.parameters())
    if num_frozen and config.run_dir is not None:
        yield (
            f"{num_frozen} frozen weights are left out of the files: to go on and to load, build the model with the "
            "same ones, from the same pretrained weights or under the same seed."
        )
    evaluating = _trained_while_evaluating(model)
    if evaluating:
        yield f"In evaluation mode, so without dropout, though trained: {some_of(evaluating)}. {_ON_EVALUATING}"


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
    "got mixed torch.Tensor and DTensor": (
        "A weight of a divided model is used where it is not gathered: outside of the part that it belongs to, as by "
        "another module or in compute_loss, or by a method of the model other than its forward. Call model(...) and "
        "its parts as modules; or set the model's _no_split_modules to the names of the classes of its blocks, so that "
        "such weights are within one, or in none."
    ),
    "RegisterPostBackwardFunction": (
        "A part of a divided model that is gathered by itself changes what it is given, in place, as with "
        "nn.ReLU(inplace=True) at its beginning. Let it make a new tensor (inplace=False)."
    ),
    "out of bounds for storage of size 0": (
        "The backward of a divided model has come to a part whose weights were not gathered for it: torch gathers them "
        "for the tensors that a part returns, alone or in tuples, lists, dictionaries and dataclasses. Let each part "
        "that is gathered by itself return what the loss depends on in that way, and not be differentiated twice; or "
        "name larger parts, by the model's _no_split_modules."
    ),
    "in-place operations that require placement changes": (
        "The optimizer calls something that torch cannot do on a part of a weight (it names it above). With sharding "
        "use another, such as AdamW, Adam or SGD."
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


def warn_of_ignored(accelerator: Accelerator) -> None:
    """Say which settings have no effect here, or none in Accelerate itself."""
    if not accelerator.is_main_process:
        return
    settings, default = vars(accelerator.dataloader_config), vars(DataLoaderConfiguration())
    changed = [f"{name}={value!r}" for name, value in settings.items() if value != default[name]]
    if changed:
        warn(
            f"DataLoaderConfiguration({', '.join(changed)}) has no effect: the trainer itself divides each batch, and "
            "Accelerate does not prepare the loaders.",
            stacklevel=4,
        )
    if accelerator.num_processes == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and _asks_for_several_cpus():
        warn(
            "Accelerate's config says distributed_type: MULTI_CPU, of which its launcher takes no notice: this is one "
            "process. accelerate launch --multi_gpu --num_processes N starts several, without a GPU too, and torchrun.",
            stacklevel=4,
        )


def _asks_for_several_cpus() -> bool:
    """Return whether `accelerate launch`, which has started this process, was given such a config file."""
    from accelerate.commands.config.config_args import load_config_from_file

    with suppress(Exception):  # another launcher, or a file that nobody can read
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config_file")
        given, _ = parser.parse_known_args(psutil.Process(os.getppid()).cmdline())
        config = load_config_from_file(given.config_file)
        return bool(config.distributed_type == DistributedType.MULTI_CPU and config.num_processes > 1)
    return False


_MANY_GRAPHS = 8  # one each for training and evaluation, and some for a model in parts, are as it should be


def advice_of(run: Run) -> str | None:
    """Return one line when something takes time out of proportion."""
    training = run.training
    num_graphs = num_compilations() - training.num_graphs_before
    if num_graphs > _MANY_GRAPHS:
        return (
            f"The model was compiled {num_graphs} times: each new shape costs one. Pad samples to few lengths, or set "
            "TORCH_LOGS=recompiles to see why."
        )
    data_loader, source = training.loader.data_loader, training.loader.source
    is_read_here = is_stream(data_loader) or (source is not None and source.in_memory)
    remedies = {
        "data_seconds": None if is_read_here else f"raise num_workers of train_loader (now {data_loader.num_workers})",
        "evaluation_seconds": "evaluate less often with steps_per_epoch, or on fewer samples",
        "saving_seconds": "raise checkpoint_every" if run.folder is not None else None,
    }
    return advice_on_time(vars(run.history), remedies)


# Part of the time -> the share of a run from which on it is out of proportion, and what the run does then.
_PARTS = {
    "data_seconds": (0.25, "waits for data"),
    "evaluation_seconds": (0.5, "evaluates the test set"),
    "saving_seconds": (0.15, "waits for checkpoints"),
}
_LEAST_SECONDS = 5.0  # of a run that is worth advice


def advice_on_time(series: Mapping[str, Sequence[float]], remedies: Mapping[str, str | None]) -> str | None:
    """Return one line when a part of a run takes a time out of proportion, else `None`.

    `series` are the seconds of each epoch and of its parts, by name; a part without a remedy is passed over.
    """
    whole = sum(series["epoch_seconds"])
    if whole < _LEAST_SECONDS:
        return None
    shares = {part: sum(series[part]) / whole for part in _PARTS if remedies.get(part) is not None}
    worst = max(shares, key=lambda part: shares[part] - _PARTS[part][0], default=None)
    if worst is None or shares[worst] <= _PARTS[worst][0]:
        return None
    return f"{100 * shares[worst]:.0f} % of the time {_PARTS[worst][1]}: {remedies[worst]}."
