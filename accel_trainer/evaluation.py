"""Evaluate and predict: loss, metrics and outputs over all samples of a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from .base.console import warn
from .data.collated import count_samples
from .data.micro_batches import MicroBatch, MicroBatchLoader
from .data.order import no_batch
from .data.randomness import EVALUATION, derive_seed, draws_nothing, seed_all
from .devices.gathering import Gathered, join, join_ragged, of_samples
from .devices.memory import until_it_fits
from .devices.prepared import Prepared
from .devices.stopping import Stopping
from .libraries.transformers import mask_of, predicted_from, without_caches
from .numbers.buffers import FixedBuffers
from .numbers.forward import Forward
from .numbers.loss_table import LossTable
from .numbers.means import MeanProbe
from .numbers.metrics import Metrics
from .numbers.objective import Objective, call_model, check_loss


def evaluate(
    prepared: Prepared,
    objective: Objective,
    loader: MicroBatchLoader,
    metrics: Metrics,
    stopping: Stopping | None = None,
    probe: MeanProbe | None = None,
    answers: Gathered | None = None,
) -> dict[str, float] | None:
    """Return the loss and metrics over all samples of a loader, the same numbers on every process.

    Args:
        prepared: The model.
        objective: The loss.
        loader: The micro-batches.
        metrics: The metrics; there may be none.
        stopping: With it the end of the run cuts it short, on all processes alike, and `None` is returned.
        probe: Looks whether the functions are means.
        answers: Takes in what a report of the evaluation needs of each sample.
    """
    hardware = prepared.hardware
    loader.refresh()
    is_even = objective.weighs_evenly(loader.source, loader.may_hold_others)
    is_certain = draws_nothing(prepared.user_model, *objective.functions, *metrics.called)
    has_scalars = objective.compute_loss is not None
    whole = _WholeOutputs(hardware, is_bounded=True) if metrics.whole else None
    collecting = [one for one in (whole, answers) if one is not None]
    for memory in until_it_fits(hardware, loader):
        metrics.reset(hardware.device)
        losses = LossTable(hardware.device, tuple(metrics.functions), has_scalars, prepared.copies_losses)
        for one in collecting:
            one.start()
        with evaluation_pass(prepared, loader, objective.modules) as micro_batches:
            for micro_batch in micro_batches:
                if micro_batch.piece.is_first:
                    if stopping is not None and stopping.interrupts():
                        return None
                    losses.start_batch(micro_batch.batch.number, micro_batch.batch)
                if not memory.exceeded and _is_computed(prepared, micro_batch):
                    if not is_certain:
                        seed_all(derive_seed(loader.seed, EVALUATION, *micro_batch.position), hardware.generators)
                    with memory.trying(micro_batch):
                        forward = evaluated(prepared, objective, micro_batch, is_even)
                        if not micro_batch.piece.is_padding:
                            losses.add(micro_batch, forward, metrics.totals(forward, micro_batch.num_samples))
                            for one in collecting:
                                one.add(micro_batch, forward)
                            if probe is not None:
                                uncompiled = _forwards_of_one(prepared)
                                probe.look(objective, metrics, prepared.model, uncompiled, micro_batch, forward)
                        del forward  # two outputs in memory are one too many
                for one in collecting:
                    one.after(micro_batch)
    totals = losses.exchange()
    if probe is not None:
        probe.settle(hardware.device, hardware.is_main)
    if stopping is not None and not totals.num_samples:
        raise no_batch("test_loader")
    values = totals.metrics | metrics.merge(hardware.num_processes)
    if whole is not None:
        values |= whole.values(metrics)
    return {"loss": totals.loss, **metrics.in_order(values), **totals.scalars}


def _is_computed(prepared: Prepared, micro_batch: MicroBatch) -> bool:
    """Return whether a micro-batch runs: padding only where the others wait, since a divided model is gathered."""
    return prepared.is_divided or not micro_batch.piece.is_padding


def _forwards_of_one(prepared: Prepared) -> Callable[[], AbstractContextManager[Any]] | None:
    """Return the context of forwards that this process alone runs; `None` where no process can run one alone."""
    return partial(prepared.forward_mode, is_full=False) if not prepared.is_divided else None


class _WholeOutputs(Gathered):
    """The outputs and targets of all samples, for metrics that are computed of all at once."""

    def part_of(self, given: Forward, num_samples: int) -> Any:
        left_out: set[str] = set()
        return tuple(of_samples(one, num_samples, left_out) for one in (given.outputs, given.targets))

    def values(self, metrics: Metrics) -> dict[str, float]:
        """Return the values of the metrics, on all processes; all call it."""
        outputs, targets = join(self.parts()) or (None, None)
        return self.hardware.from_main(lambda: metrics.of_all(outputs, targets))  # type: ignore[no-any-return]


def evaluated(prepared: Prepared, objective: Objective, micro_batch: MicroBatch, is_even: bool) -> Forward:
    """Return what a micro-batch gives in an evaluation; it is then on the device."""
    micro_batch.move(prepared.to_device)
    with prepared.forward_mode(micro_batch.batch.is_full):
        forward = objective(prepared.model, micro_batch, is_even)
    check_loss(forward.loss, needs_grad=False)
    return forward


def predict(prepared: Prepared, loader: MicroBatchLoader, ragged: float | Literal["list"] | None = None) -> Any:
    """Return the model's outputs for every sample in the order of the loader, on the main process, in host memory.

    `ragged` says what becomes of outputs of several lengths, as for `Trainer.predict`.
    """
    hardware = prepared.hardware
    left_out: set[str] = set()
    gathered = Gathered(hardware)
    for memory in until_it_fits(hardware, loader):
        gathered.start()
        with evaluation_pass(prepared, loader) as micro_batches:
            for micro_batch in micro_batches:
                if not memory.exceeded and _is_computed(prepared, micro_batch):
                    seed_all(derive_seed(loader.seed, EVALUATION, *micro_batch.position), hardware.generators)
                    with memory.trying(micro_batch):
                        outputs = predicted(prepared, micro_batch, left_out)
                        kept = outputs if ragged is None else (outputs, mask_of(micro_batch.data))
                        if not micro_batch.piece.is_padding:
                            gathered.add(micro_batch, kept)
                        del outputs, kept  # two outputs in memory are one too many
                gathered.after(micro_batch)
    parts = gathered.parts()
    if left_out and hardware.is_main:
        warn(f"predict leaves out what has no entry per sample: {', '.join(sorted(left_out))}.", stacklevel=3)
    if ragged is None or not parts:
        return join(parts)
    outputs, masks = zip(*parts, strict=True)
    return join_ragged(list(outputs), list(masks), ragged)


def predicted(prepared: Prepared, micro_batch: MicroBatch, left_out: set[str]) -> Any:
    """Return the outputs for the samples of a micro-batch; `left_out` takes the names of those without samples."""
    micro_batch.move(prepared.to_device)
    model, inputs = prepared.user_model, predicted_from(prepared.user_model, micro_batch.data)
    with prepared.forward_mode(micro_batch.batch.is_full):
        outputs = without_caches(model, call_model(prepared.model, inputs))
    if micro_batch.piece.is_padding:
        return None
    num_samples = micro_batch.num_samples
    if micro_batch.num_held is not None:  # which goes by the targets
        num_samples = count_samples(inputs, num_samples) or 0
    return of_samples(outputs, num_samples, left_out)


# --- modes ------------------------------------------------------------------------------------------------------------


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and each of its modules back in the mode it had."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode, and each of its modules back in the mode it had.

    In a model that is in training mode already, modules in evaluation mode were frozen on purpose and stay so.
    """
    with _modes_kept(model):
        if not model.training:
            model.train()
        yield


@contextmanager
def evaluation_pass(
    prepared: Prepared, loader: MicroBatchLoader, losses: Sequence[nn.Module] = ()
) -> Iterator[Iterator[MicroBatch]]:
    """Yield the micro-batches of a loader, the model in evaluation mode, without gradients, all buffers kept."""
    buffers = FixedBuffers([prepared.user_model, *losses])

    def each() -> Iterator[MicroBatch]:
        with ExitStack() as first_batch:
            if prepared.shards is not None and prepared.hardware.num_processes > 1:
                first_batch.enter_context(prepared.shards.compared_calls())
            for micro_batch in micro_batches:
                yield micro_batch
                buffers.restore()
                if micro_batch.piece.is_last:
                    first_batch.close()

    model = prepared.model  # with its wrapper on several processes, which compute_loss may ask for its mode
    try:
        with evaluation_mode(model), torch.no_grad(), closing(loader.micro_batches(1)) as micro_batches:
            yield each()
    finally:
        if prepared.shards is not None:
            prepared.shards.give_up()
