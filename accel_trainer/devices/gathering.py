"""What a model returns for all samples, of all processes, in the order of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor

from ..base.exchange import gather_on_main
from ..data.collated import tensors_in
from ..data.micro_batches import MicroBatch
from .environment import free_memory
from .hardware import Hardware

_HOST = torch.device("cpu")


class Gathered:
    """Outputs of all processes, in the memory of the main process's host; of the others only those under way.

    Args:
        hardware: Of the run.
        is_bounded: Whether to stop before half of the host's free memory is taken.
    """

    _BATCHES_AT_A_TIME = 32

    def __init__(self, hardware: Hardware, is_bounded: bool = False) -> None:
        self._hardware = hardware
        self._limit = 0.5 * free_memory() if is_bounded else None
        self._nbytes = 0
        self._waiting: list[Any] = []
        self._parts: list[Any] = []

    def add(self, micro_batch: MicroBatch, outputs: Any) -> None:
        """Take in the outputs of a micro-batch; the copy is under way while the device goes on."""
        is_here = self._hardware.device.type == "cpu"  # where a model may write its next outputs to the same memory
        copies = (
            recursively_apply(torch.clone, outputs) if is_here else send_to_device(outputs, _HOST, non_blocking=True)
        )
        self._waiting.append((micro_batch.position, copies))

    def after(self, micro_batch: MicroBatch) -> None:
        """Let the processes meet after every so many batches, of which all have as many."""
        if micro_batch.piece.is_last and (micro_batch.batch.number + 1) % self._BATCHES_AT_A_TIME == 0:
            self._collect()

    def _collect(self) -> None:
        """Bring the outputs of all processes to the main process, in order; waits for the device.

        Raises:
            ValueError: They take too much memory.
        """
        waiting, self._waiting = self._hardware.arrived(self._waiting), []
        if self._hardware.num_processes > 1:
            waiting = [part for one in gather_on_main(waiting) for part in one]
        parts = [outputs for _, outputs in sorted(waiting, key=lambda part: part[0])]
        self._nbytes += sum(tensor.nbytes for part in parts for tensor in tensors_in(part))
        if self._limit is not None and self._nbytes > self._limit:
            raise ValueError(
                f"The outputs that the whole metrics are computed of take {self._nbytes / 2**30:,.1f} GiB so far, more "
                "than half of the free memory of the host: evaluate fewer samples, or let the model return less."
            )
        self._parts += parts

    def joined(self) -> Any:
        """Return all outputs, joined along the samples, on the main process; `None` on others, and of no samples."""
        self._collect()
        return join(self._parts) if self._hardware.is_main else None


def of_samples(outputs: Any, num_samples: int, left_out: set[str], name: str = "") -> Any:
    """Return those of a model's outputs that have an entry per sample, which can be put in the order of the dataset.

    Of a dictionary the others are left out, as a loss or a cache beside the scores; in a list or tuple `None` stands
    in their place.

    Args:
        outputs: What the model returned.
        num_samples: Samples of the micro-batch.
        left_out: Takes the names of what is left out.
        name: Of these outputs within the whole; empty for the whole.

    Raises:
        ValueError: Nothing has an entry per sample.
    """
    if outputs is None or (isinstance(outputs, Tensor) and outputs.ndim and len(outputs) == num_samples):
        return outputs
    if isinstance(outputs, Mapping):
        own = {key: of_samples(one, num_samples, left_out, f"{name}[{key!r}]") for key, one in outputs.items()}
        kept = {key: one for key, one in own.items() if one is not None}
        if kept or not own or name:
            return kept or None
    elif isinstance(outputs, (list, tuple)):
        parts = [of_samples(one, num_samples, left_out, f"{name}[{place}]") for place, one in enumerate(outputs)]
        if any(one is not None for one in parts) or not parts or name:
            return type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)
    elif name:
        left_out.add(name)
        return None
    told = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
    raise ValueError(
        f"predict joins outputs along the samples, their first dimension: for {num_samples} samples the model returned "
        f"{told}."
    )


def join(parts: list[Any]) -> Any:
    """Join the outputs of micro-batches along their first dimension.

    Raises:
        ValueError: Outputs whose other dimensions differ.
    """
    if not parts or parts[0] is None:
        return None
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    if isinstance(first, (list, tuple)):
        joined = [join(list(column)) for column in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    try:
        return torch.cat(parts)
    except RuntimeError as error:
        raise ValueError(f"The outputs of the micro-batches cannot be joined along the samples: {error}") from error
