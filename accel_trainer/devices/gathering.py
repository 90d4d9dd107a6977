"""The outputs of a model for all samples, of all processes, in the order of the samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor

from ..base.exchange import gather_on_main
from ..data.collated import tensors_in
from ..data.micro_batches import MicroBatch
from .environment import free_memory
from .hardware import Hardware


class Gathered:
    """Outputs of all processes, in the host memory of the main process; the others keep those of a few batches.

    With `is_bounded` it is an error that they take more than half of the host's free memory.
    """

    def __init__(self, hardware: Hardware, is_bounded: bool = False) -> None:
        self.hardware, self._is_on_host = hardware, hardware.device.type == "cpu"
        self._limit = 0.5 * free_memory() if is_bounded else None
        self.start()

    def start(self) -> None:
        """Begin, from the first sample; again where memory has run out."""
        self._nbytes = 0
        self._waiting: list[Any] = []
        self._parts: list[Any] = []

    def part_of(self, given: Any, num_samples: int) -> Any:
        """Return what is kept of what a micro-batch has given, one entry per sample."""
        return given

    def add(self, micro_batch: MicroBatch, given: Any) -> None:
        """Copy what is kept of a micro-batch of this process to the host, while the device goes on."""
        kept = self.part_of(given, micro_batch.num_samples)
        if self._is_on_host:  # a model may write its next outputs to the same memory
            copies = recursively_apply(torch.clone, kept)
        else:
            copies = send_to_device(kept, "cpu", non_blocking=True)
        self._waiting.append((micro_batch.position, copies))

    def after(self, micro_batch: MicroBatch) -> None:
        """Collect the outputs after every 32 batches; all processes call it for the same batches."""
        if micro_batch.piece.is_last and (micro_batch.batch.number + 1) % 32 == 0:
            self._collect()

    def _collect(self) -> None:
        """Bring the outputs of all processes to the main process, in order; waits for the device.

        Raises:
            ValueError: They take too much memory.
        """
        waiting, self._waiting = self._waiting, []
        if not self._is_on_host:
            torch.accelerator.synchronize(self.hardware.device)
            waiting = recursively_apply(torch.clone, waiting)  # out of page-locked memory
        everyone = [waiting] if self.hardware.num_processes == 1 else gather_on_main(waiting)
        parts = [outputs for _, outputs in sorted(itertools.chain(*everyone), key=lambda part: part[0])]
        self._nbytes += sum(tensor.nbytes for part in parts for tensor in tensors_in(part))
        if self._limit is not None and self._nbytes > self._limit:
            raise ValueError(
                f"The outputs that the whole metrics are computed of take {self._nbytes / 2**30:,.1f} GiB so far, more "
                "than half of the free memory of the host: evaluate fewer samples, or let the model return less."
            )
        self._parts += parts

    def parts(self) -> list[Any]:
        """Return the outputs of each micro-batch, in the order of the samples, on the main process; none on others."""
        self._collect()
        return self._parts


def of_samples(outputs: Any, num_samples: int, left_out: set[str], name: str = "") -> Any:
    """Return the parts of a model's outputs that have an entry per sample, and can be put in the order of the dataset.

    Other parts, such as a loss or a cache beside the scores, are left out of a dictionary and become `None` in a list
    or tuple; their names are added to `left_out`. `name` is that of a part, empty for all outputs.

    Raises:
        ValueError: No part has an entry per sample.
    """
    if outputs is None or (isinstance(outputs, Tensor) and outputs.ndim and len(outputs) == num_samples):
        return outputs
    if isinstance(outputs, Mapping):
        found = {key: of_samples(part, num_samples, left_out, f"{name}[{key!r}]") for key, part in outputs.items()}
        kept = {key: part for key, part in found.items() if part is not None}
        if kept or not found or name:
            return kept or None
    elif isinstance(outputs, (list, tuple)):
        parts = [of_samples(part, num_samples, left_out, f"{name}[{index}]") for index, part in enumerate(outputs)]
        if any(part is not None for part in parts) or not parts or name:
            return type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)
    elif name:
        left_out.add(name)
        return None
    description = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
    raise ValueError(
        f"predict joins outputs along the samples, their first dimension: for {num_samples} samples the model returned "
        f"{description}."
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
        raise ValueError(
            f"The outputs of the micro-batches cannot be joined along the samples: {error} Outputs of several lengths "
            "are returned as a list by predict(loader, ragged='list'), or filled up by ragged=0.0 or another number."
        ) from error


def join_ragged(parts: list[Any], masks: list[Tensor | None], fill: float | Literal["list"]) -> Any:
    """Join outputs of several lengths: to a list with a tensor for each sample, or filled up with a number.

    The masks, one for each part, have the shape `(samples, length)`: where all parts have this shape, or more
    dimensions, what is masked (0) is left out.
    """
    if not parts or parts[0] is None:
        return None
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: join_ragged([part[name] for part in parts], masks, fill) for name in first}
    if isinstance(first, (list, tuple)):
        joined = [join_ragged(list(column), masks, fill) for column in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    # Scores of five classes are no outputs per token, though some batch may be five tokens long.
    are_tokens = all(mask is not None and mask.shape == part.shape[:2] for part, mask in zip(parts, masks, strict=True))
    samples = list(itertools.chain(*parts))
    if are_tokens:
        kept = itertools.chain(*(mask.bool() for mask in masks))  # type: ignore[union-attr]
        samples = [sample[places] for sample, places in zip(samples, kept, strict=True)]
    return samples if fill == "list" else _filled_up(samples, fill)


def _filled_up(samples: list[Tensor], fill: float) -> Tensor:
    """Return samples of several shapes as one tensor, each filled up at the end of each dimension."""
    dtype = samples[0].dtype
    if not dtype.is_floating_point and not (math.isfinite(fill) and int(fill) == fill):
        raise ValueError(f"ragged={fill!r} cannot fill up outputs of {dtype}: give a whole number, or 'list'.")
    shape = [max(sizes) for sizes in zip(*(sample.shape for sample in samples), strict=True)]
    filled = samples[0].new_full((len(samples), *shape), fill)
    for place, sample in zip(filled, samples, strict=True):
        place[tuple(map(slice, sample.shape))] = sample
    return filled
