"""The loop: what happens in an epoch, in order. `fit` and `train_epoch` are the documentation of the package."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .batches import Feed, MicroBatch, check_loader, count_samples
from .callbacks import say, styled
from .checkpoints import RunFolder
from .clock import Clock
from .config import TrainConfig
from .console import warn
from .errors import NonFiniteError
from .fetching import Rows
from .gathering import Gathered, of_samples
from .gradients import Buffers, FixedBuffers, Gradients, TreeGradients
from .hardware import (
    Hardware,
    Prepared,
    check_model,
    check_optimizer,
    fixed_arithmetic,
    foreign_parameters,
    num_compilations,
)
from .history import History
from .losses import (
    Fault,
    Forward,
    Ledger,
    Objective,
    Totals,
    call_model,
    check_loss,
    inputs_of,
    is_finite,
    not_finite,
    sum_of_norms,
    widest_float,
)
from .means import MeanProbe
from .memory import TrainingMemory, keep_data, until_it_fits
from .metrics import Metrics
from .randomness import EVALUATION, TRAINING, Draws, derive_seed, draws_of, preserved
from .reductions import ChainSum, TreeSum, are_same_everywhere, share_from_main
from .report import LivePage
from .saving import Saver
from .schedules import Schedule
from .state import RunState
from .stopping import Stopping, shared_failure

__all__ = ["Run", "Training", "evaluate", "evaluate_model", "fit", "predict", "train_epoch", "train_model"]


@dataclass
class Training:
    """What makes optimizer steps: the parts that `train_epoch` puts in order.

    Attributes:
        ledger: The losses of the epoch under way.
        joined: Model and loss compiled as one; `None` where they are called one after the other.
        draws: The generators that a step may draw from.
        observers: The user's callbacks, which run in it too.
        watched: The hooks that a callback listens to.
        num_changes: Those of the data that have been looked at.
        infinite: Names of buffers and frozen weights that were not finite at the start, such as masks.
        num_gone: Parameters of the optimizer that have left the model.
        num_graphs_before: Graphs that the process had compiled before the run.
        probe: Looks whether the loss is a mean.
        batches: Number of each batch since the last report -> its pass over the data and place there.
    """

    config: TrainConfig
    hardware: Hardware
    prepared: Prepared
    objective: Objective
    gradients: Gradients
    buffers: Buffers
    memory: TrainingMemory
    schedule: Schedule
    stopping: Stopping
    state: RunState
    feed: Feed
    ledger: Ledger
    joined: Callable[[Any, Any], Tensor] | None = None
    draws: Draws = Draws.ANYTHING
    observers: Sequence[Any] = ()
    clock: Clock = field(default_factory=Clock)
    call: Callable[[str], None] = lambda hook: None
    watched: frozenset[str] = frozenset()
    num_changes: int = 0
    before_batch: Callable[[], None] = lambda: None
    norm_sum: Any = 0.0
    num_norms: int = 0
    batches: dict[int, tuple[int, int]] = field(default_factory=dict)
    infinite: frozenset[str] = frozenset()
    num_gone: int = 0
    num_graphs_before: int = field(default_factory=num_compilations)
    probe: MeanProbe | None = None

    def begin_epoch(self, epoch: int) -> bool:
        """Begin an epoch, or go on with the one under way; return whether it is a new one."""
        is_new = epoch != self.state.epoch
        if is_new:
            self.state.epoch, self.ledger = epoch, Ledger(self.hardware.device, copies=self.prepared.copies_losses)
            self.norm_sum, self.num_norms = 0.0, 0
        return is_new

    def follow(self, feed: Feed) -> None:
        """Take the batches of this feed from here on."""
        self.feed = feed
        self.memory.follow(feed)

    def take_notice(self) -> None:
        """Look at what may have changed since the last epoch; all processes call it together."""
        self._look_at_structure()
        self.prepared.put_optimizer("train")
        self.feed.refresh()
        self.weigh()
        others = (*self.objective.functions, self.prepared.optimizer, *self.observers)
        self.draws = draws_of(self.prepared.plain, *others)
        self.gradients.begin()
        self.buffers.begin()

    def _look_at_structure(self) -> None:
        """Tell of parameters that have left the model: what has come in their place is not trained."""
        num_gone = len(foreign_parameters(self.prepared.optimizer, self.prepared.plain))  # type: ignore[arg-type]
        if num_gone > self.num_gone and self.hardware.is_main:
            warn(
                f"The model has changed: {num_gone} of the optimizer's parameters are no part of it any more. What has "
                "come in their place is trained only if it is given to the optimizer (add_param_group)."
            )
        self.num_gone = num_gone

    def weigh(self) -> None:
        """Find out whether each sample weighs the same; all processes call it together."""
        self.num_changes = self.feed.num_changes
        evenly = self.objective.weighs_evenly(self.feed.rows, self.feed.may_hold_others)
        if self.objective.may_leave_out:
            evenly = not self.hardware.any_process(not evenly)[0]
        self.gradients.weighs_samples = evenly

    def look_again(self) -> None:
        """See to it that data which was changed within an epoch still weighs what was found at its beginning.

        Raises:
            RuntimeError: It holds targets now that the loss leaves out.
        """
        self.num_changes = self.feed.num_changes
        if self.gradients.weighs_samples and not self.objective.weighs_evenly(
            self.feed.rows, self.feed.may_hold_others
        ):
            raise RuntimeError(
                "Within an epoch train_loader has come to hold targets that the loss leaves out (ignore_index). Change "
                "them between epochs, or give weight_fn."
            )

    def is_sound(self) -> bool:
        """Return whether weights and buffers are finite, but for what was not so at the start: one read-back."""
        model = self.prepared.plain
        named = (*model.named_parameters(), *model.named_buffers())
        return is_finite([tensor for name, tensor in named if name not in self.infinite])


@dataclass
class Run:
    """What makes epochs out of steps: the parts that `fit` puts in order."""

    training: Training
    test_feed: Feed | None
    metrics: Metrics
    history: History
    saver: Saver
    folder: RunFolder | None
    page: LivePage | None
    probe: MeanProbe
    monitor: str
    mode: str
    announce: Callable[[str], None]


def fit(run: Run) -> str:
    """Train until something ends the run and return the reason, in words."""
    training, config, state = run.training, run.training.config, run.training.state
    reason = end_of(run)
    while reason is None:
        if training.begin_epoch(run.history.num_epochs + 1):
            training.call("on_epoch_start")
        train = train_epoch(training, micro_batches_of_epoch(training))
        if train is None:
            return f"{training.stopping.reason} in epoch {state.epoch}"  # an epoch cut short is not recorded

        training.buffers.share()
        check_weights(training)
        if state.step == config.max_steps:
            run.saver.save_last()  # not after an epoch cut short: with more steps the run goes on within it
        training.prepared.put_optimizer("eval")
        test = evaluate_epoch(run)
        if test is None:
            return f"{training.stopping.reason} in epoch {state.epoch}"
        value = record(run, train, test)
        is_sound = config.on_nonfinite == "raise" or training.is_sound()  # or else it has been raised
        if is_sound and state.judge(value, run.mode, config.min_delta):
            run.saver.keep_best({"epoch": state.epoch, run.monitor: value})
        training.schedule.after_epoch(run.history.num_epochs, value)
        report_epoch(run)
        if "on_epoch_end" in training.watched:
            with evaluation_mode(training.prepared.plain):  # a callback may look at the model, and change its modes
                training.call("on_epoch_end")
        reason = end_of(run)
        state.finished = reason if training.stopping.kind == "callback" else None
        run.saver.after_epoch()
    return reason


def end_of(run: Run) -> str | None:
    """Return why the run ends here, between two epochs, or `None`; all processes call it together."""
    training, config, state = run.training, run.training.config, run.training.state
    if state.finished is not None:
        return state.finished
    if training.stopping.agree():
        where = "in" if state.epoch > run.history.num_epochs else "after"
        return f"{training.stopping.reason} {where} epoch {state.epoch}"
    if state.epoch > run.history.num_epochs:
        return None  # resumed within it
    if config.patience is not None and state.num_bad_epochs >= config.patience:
        return f"no improvement of {run.monitor} for {config.patience} epochs"
    if config.max_steps is not None and state.step >= config.max_steps:
        return f"max_steps={config.max_steps} reached"
    if state.epoch >= config.num_epochs:
        return f"all {config.num_epochs} epochs done"
    return None


def train_epoch(training: Training, micro_batches: Generator[MicroBatch]) -> Totals | None:
    """Make the optimizer steps of one epoch and return its mean loss; `None` if the run ends within it."""
    config, state = training.config, training.state
    gradients, buffers, memory = training.gradients, training.buffers, training.memory
    training.take_notice()
    with closing(micro_batches):
        for micro_batch in training.clock.waiting(micro_batches):
            piece = micro_batch.piece
            if piece.is_first:
                if not training.stopping.may_go_on():
                    return None
                if training.num_changes != training.feed.num_changes:
                    training.look_again()
                training.before_batch()
                state.num_batches += 1
                training.ledger.begin(state.num_batches, micro_batch.batch_size, training.feed.layout)
            if training.draws:
                seed = derive_seed(config.seed, TRAINING, state.num_batches, piece.index)
                training.hardware.set_generators(seed, training.draws)
            attempt = memory.attempt(micro_batch)
            buffers.before(micro_batch, memory.holds or config.on_nonfinite == "skip")
            with attempt, gradients.context(micro_batch, memory.holds):
                compute_gradients(training, micro_batch)
            if memory.must_redo() or (piece.is_last and not take_step(training, micro_batch)):
                cut_finer(training)
            elif piece.is_last and state.step == config.max_steps:
                break
    totals = training.ledger.exchange()
    check_finite(training, totals.fault)
    check_weight(training, totals)
    return totals


def compute_gradients(training: Training, micro_batch: MicroBatch) -> None:
    """Run a micro-batch forward and backward; of what that takes, only loss, gradients and buffers stay in memory."""
    prepared = training.prepared
    micro_batch.data = training.hardware.place(micro_batch.data)
    with prepared.stance(micro_batch.is_full):
        evenly = training.gradients.weighs_samples
        forward = training.objective(prepared.model, micro_batch, evenly, training.joined)
    check_loss(forward.loss, needs_grad=True)
    training.gradients.backward(forward, micro_batch)
    training.buffers.after(micro_batch)
    training.ledger.add(micro_batch, forward)
    if training.probe is not None:
        training.probe.look_within_training(training.objective, micro_batch, forward)


def cut_finer(training: Training) -> None:
    """Undo what has been computed of a batch that does not fit in memory; the feed brings it again, cut finer."""
    training.gradients.clear()
    training.buffers.undo()
    training.ledger.drop()
    training.state.num_batches -= 1
    layout = training.memory.finer()
    training.gradients.layout = training.buffers.layout = layout
    training.feed.recut(layout)


def take_step(training: Training, micro_batch: MicroBatch) -> bool:
    """Update the weights with the gradients of one batch, whose last micro-batch is given.

    Returns:
        Whether that is done with; not where memory has run out, and the batch has to come again.
    """
    config, state, prepared = training.config, training.state, training.prepared
    norm, updated, skipped = None, False, False
    with training.memory.update(prepared.optimizer):  # type: ignore[arg-type]
        training.gradients.finish(micro_batch.batch_size)
        skipped = config.on_nonfinite == "skip" and must_skip(training)
        if not skipped:
            if config.max_grad_norm is not None:
                norm = prepared.clip(training.gradients.parameters, config.max_grad_norm)
            training.buffers.finish(min(micro_batch.batch_size, training.feed.layout.num_micro_batches))
            updated = prepared.step()
    if training.memory.exceeded:
        return False
    state.position = micro_batch.batch_number + 1
    training.batches[state.num_batches] = state.data_pass, micro_batch.batch_number
    training.gradients.clear()
    if skipped:
        training.buffers.undo()
        state.num_skipped += 1
        return True
    if updated:
        if norm is not None:
            training.norm_sum = training.norm_sum + norm.to(widest_float(norm.device))
            training.num_norms += 1
        state.step += 1
        training.schedule.after_step(state.step)
    if state.num_batches % config.report_every == 0:
        state.recent_loss, fault = training.ledger.report()
        check_finite(training, fault)
    if updated and "on_step_end" in training.watched:
        training.call("on_step_end")
    return True


def evaluate(
    prepared: Prepared,
    objective: Objective,
    feed: Feed,
    metrics: Metrics,
    stopping: Stopping | None = None,
    probe: MeanProbe | None = None,
) -> dict[str, float] | None:
    """Return the loss and metrics over all samples of a loader, the same numbers on every process.

    Args:
        prepared: The model.
        objective: The loss.
        feed: Of the loader.
        metrics: Maybe none.
        stopping: With it the end of the run cuts it short, on all processes alike, and `None` is returned.
        probe: Looks whether the functions are means.
    """
    hardware = prepared.hardware
    draws = draws_of(prepared.plain, *objective.functions, *metrics.called)
    feed.refresh()
    evenly = objective.weighs_evenly(feed.rows, feed.may_hold_others)
    for memory in until_it_fits(hardware, feed):
        metrics.reset(hardware.device)
        ledger = Ledger(hardware.device, metrics.totalled, prepared.copies_losses)
        gathered = Gathered(hardware, is_bounded=True) if metrics.whole else None
        with evaluation_pass(prepared, feed, objective.modules) as micro_batches:
            for micro_batch in micro_batches:
                if micro_batch.piece.is_first:
                    if stopping is not None and stopping.interrupts():
                        return None
                    ledger.begin(micro_batch.batch_number, micro_batch.batch_size, feed.layout)
                # No forward exchanges anything, so nobody has to stand in.
                if micro_batch.piece.counts and not memory.exceeded:
                    if draws:
                        hardware.set_generators(derive_seed(feed.seed, EVALUATION, *micro_batch.place), draws)
                    with memory.attempt(micro_batch):
                        forward = evaluated(prepared, objective, micro_batch, evenly)
                        ledger.add(micro_batch, forward, metrics.totals(forward, micro_batch.num_samples))
                        if gathered is not None:
                            gathered.add(micro_batch, pair_of_samples(forward, micro_batch.num_samples))
                        if probe is not None:
                            probe.look(objective, metrics, prepared, micro_batch, forward)
                        del forward  # two outputs in memory are one too many
                if gathered is not None:
                    gathered.after(micro_batch)
    totals = ledger.exchange()
    if probe is not None:
        probe.settle(hardware)
    if stopping is not None and not totals.num_samples:
        raise ValueError("test_loader yields no batch (a stream that can be read once only is used up after a pass).")
    values = totals.metrics | metrics.merge(hardware.num_processes)
    if gathered is not None:
        outputs, targets = gathered.joined() or (None, None)
        values |= hardware.from_main(lambda: metrics.of_all(outputs, targets))
    return {"loss": totals.loss, **metrics.in_order(values)}


def evaluated(prepared: Prepared, objective: Objective, micro_batch: MicroBatch, evenly: bool) -> Forward:
    """Return what a micro-batch gives in an evaluation; it is then on the device."""
    micro_batch.data = prepared.hardware.place(micro_batch.data)
    with prepared.stance(micro_batch.is_full):
        forward = objective(prepared.model, micro_batch, evenly)
    check_loss(forward.loss, needs_grad=False)
    return forward


def predict(prepared: Prepared, feed: Feed) -> Any:
    """Return the model's outputs for every sample in the order of the loader, on the main process, in host memory."""
    hardware, draws = prepared.hardware, draws_of(prepared.plain)
    left_out: set[str] = set()
    for memory in until_it_fits(hardware, feed):
        gathered = Gathered(hardware)
        with evaluation_pass(prepared, feed) as micro_batches:
            for micro_batch in micro_batches:
                if micro_batch.piece.counts and not memory.exceeded:
                    hardware.set_generators(derive_seed(feed.seed, EVALUATION, *micro_batch.place), draws)
                    with memory.attempt(micro_batch):
                        inputs = inputs_of(hardware.place(micro_batch.data))
                        with prepared.stance(micro_batch.is_full):
                            outputs = call_model(prepared.model, inputs)
                        num_samples = micro_batch.num_samples
                        if micro_batch.num_held is not None:  # which goes by the targets
                            num_samples = count_samples(inputs, num_samples) or 0
                        gathered.add(micro_batch, of_samples(outputs, num_samples, left_out))
                gathered.after(micro_batch)
        outputs = gathered.joined()
    if left_out and hardware.is_main:
        warn(f"predict leaves out what has no entry per sample: {', '.join(sorted(left_out))}.", stacklevel=3)
    return outputs


def pair_of_samples(forward: Forward, num_samples: int) -> tuple[Any, Any]:
    """Return outputs and targets of a micro-batch, as far as they have an entry per sample."""
    left_out: set[str] = set()
    outputs, targets = (of_samples(one, num_samples, left_out) for one in (forward.outputs, forward.targets))
    return outputs, targets


# --- the parts of an epoch --------------------------------------------------------------------------------------------


def micro_batches_of_epoch(training: Training) -> Generator[MicroBatch]:
    """Yield what is left of this epoch: of a pass over the data, or of `steps_per_epoch` batches of an endless one."""
    config, state = training.config, training.state
    if config.max_steps is not None and state.step >= config.max_steps:
        return  # resumed at its end
    if config.steps_per_epoch is None:
        if state.data_pass != state.epoch:
            state.data_pass, state.position = state.epoch, 0
        yield from _rest_of_pass(training)
        return
    num_left = config.steps_per_epoch * state.epoch - state.num_batches
    if num_left:
        yield from _first_batches(_passes(training), num_left, training.feed)


def _rest_of_pass(training: Training) -> Generator[MicroBatch]:
    state = training.state
    begins_within = state.position > 0
    micro_batch = None
    for micro_batch in training.feed.micro_batches(state.data_pass, state.position):
        yield micro_batch
    if micro_batch is None and not begins_within:
        raise ValueError("train_loader yields no batch (a stream that can be read once only is used up after a pass).")


def _passes(training: Training) -> Generator[MicroBatch]:
    while True:
        yield from _rest_of_pass(training)
        training.state.data_pass, training.state.position = training.state.data_pass + 1, 0


def _first_batches(micro_batches: Iterable[MicroBatch], num_batches: int, feed: Feed) -> Generator[MicroBatch]:
    for micro_batch in micro_batches:
        layout = feed.layout
        yield micro_batch
        num_batches -= micro_batch.piece.is_last and feed.layout is layout
        if num_batches == 0:
            return


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
def evaluation_pass(prepared: Prepared, feed: Feed, losses: Sequence[nn.Module] = ()) -> Iterator[Iterator[MicroBatch]]:
    """Yield the micro-batches of a loader, the model in evaluation mode, without gradients, all buffers kept."""
    buffers = FixedBuffers([prepared.plain, *losses])
    with evaluation_mode(prepared.plain), torch.no_grad(), closing(feed.micro_batches(1)) as micro_batches:
        yield _each(micro_batches, buffers.restore)


def _each(micro_batches: Iterable[MicroBatch], then: Callable[[], None]) -> Iterator[MicroBatch]:
    for micro_batch in micro_batches:
        yield micro_batch
        then()


def evaluate_epoch(run: Run) -> dict[str, float] | None:
    """Return the scores of the test set, none without one; `None` if the run ends within it."""
    training = run.training
    if run.test_feed is None:
        run.probe.settle(training.hardware)
        return {}
    with training.clock.measured("evaluation_seconds"):
        parts = training.prepared, training.objective, run.test_feed, run.metrics
        return evaluate(*parts, training.stopping, run.probe)


def record(run: Run, train: Totals, test: dict[str, float]) -> float:
    """Write the epoch to the history and return its monitored value."""
    training, history = run.training, run.history
    scores, seconds = dict(test), training.clock.end_epoch()
    history.record(
        train_loss=train.loss,
        test_loss=scores.pop("loss", None),
        learning_rate=training.schedule.learning_rate,
        grad_norm=float(training.norm_sum) / training.num_norms if training.num_norms else None,
        samples_per_second=train.num_samples / (seconds["data_seconds"] + seconds["compute_seconds"]),
        metrics=scores,
        **seconds,
    )
    if run.monitor == "train_loss":
        return train.loss
    if run.monitor == "test_loss":
        return history.test_losses[-1]
    if run.monitor not in scores:
        raise ValueError(f"monitor must be one of {', '.join(scores)} here, got {run.monitor!r}.")
    return scores[run.monitor]


def report_epoch(run: Run) -> None:
    """Tell the epoch to the history, the run folder and the reader."""
    history, state = run.history, run.training.state
    history.best_epoch, history.best_value = state.best_epoch, state.best_value
    row = {"epoch": state.epoch, "step": state.step} | history.last()
    if run.folder is not None:
        run.folder.append_history(row | {"best_epoch": state.best_epoch, "best_value": state.best_value})
    told = f"Epoch {state.epoch}/{run.training.config.num_epochs} - Train Loss: {row['train_loss']:.4f}"
    told += f", Test Loss: {row['test_loss']:.4f}" if "test_loss" in row else ""
    told += "".join(f", {name}: {value:.4f}" for name, value in row["metrics"].items())
    run.announce(styled(told + " (best)", "best") if state.best_epoch == state.epoch else told)
    write_page(run, "running")


def write_page(run: Run, state: str) -> None:
    """Let the page of the run show its present state; while it is running, only as often as that costs nothing."""
    page, folder = run.page, run.folder
    if page is None or folder is None or (state == "running" and not page.is_due()):
        return
    with run.training.clock.measured("saving_seconds"):
        folder.attempt("report.html", lambda: page.write(state))


def must_skip(training: Training) -> bool:
    """Return, on all processes alike, whether a loss of this batch or its gradient is not finite: one read-back."""
    losses = training.ledger.is_finite()
    gradients = [one.grad for one in training.gradients.parameters if one.grad is not None]
    if training.hardware.accelerator.scaler is not None:
        gradients = []  # what overflows in fp16 is skipped by the scaler, which then lowers its scale
    norms = sum_of_norms(gradients)
    are_finite = losses & norms.isfinite() if isinstance(norms, Tensor) else losses
    is_wrong = not are_finite and not (losses and is_finite(gradients))
    return training.hardware.any_process(is_wrong)[0]


_ADVICE = "Lower the learning rate, set max_grad_norm, or look at the data."


def check_finite(training: Training, fault: Fault | None) -> None:
    """End the run, on all processes alike, when a train loss or the weights are not finite.

    Raises:
        NonFiniteError: With the step and the process of the first such loss, and the first such parameters.
    """
    recent, training.batches = training.batches, dict(list(training.batches.items())[-1:])
    if training.config.on_nonfinite != "raise":
        return
    model, state = training.prepared.plain, training.state
    if fault is None and training.is_sound() and math.isfinite(training.norm_sum):
        return
    named = not_finite({name: one for name, one in model.named_parameters() if name not in training.infinite})
    names = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    in_weights = f" Not finite by now: {names}." if named else ""
    first = f"epoch {state.epoch}, step "
    if fault is None:
        first += f"{min(recent, default=state.num_batches)} to {state.num_batches}: a gradient became nan or infinite."
        raise NonFiniteError(f"In {first}{in_weights} {_ADVICE}")
    error = NonFiniteError(
        f"Train loss became {fault.value} in {first}{fault.batch}, process {fault.process}.{in_weights} {_ADVICE}"
    )
    error.places = [recent[number] for number in (fault.batch, fault.batch - 1) if number in recent]
    raise error


def check_weight(training: Training, totals: Totals) -> None:
    """End the run, on all processes alike, when nothing of an epoch weighs anything.

    Raises:
        NonFiniteError: There is no mean then, and nothing to be learned.
    """
    is_empty = totals.num_samples and math.isnan(totals.loss) and totals.fault is None
    if is_empty and training.config.on_nonfinite == "raise":
        raise NonFiniteError(
            f"Every micro-batch of epoch {training.state.epoch} weighs 0, by weight_fn or compute_loss, or since the "
            "loss leaves all of its targets out: its train loss is the mean of nothing."
        )


def check_weights(training: Training) -> None:
    """Find processes whose weights have parted: they would train different models from here on.

    Raises:
        RuntimeError: With the first parameter that differs.
    """
    if training.hardware.num_processes == 1:
        return
    named = list(training.prepared.plain.named_parameters())
    bits = torch.stack([_bits(parameter) for _, parameter in named])
    for (name, _), is_same in zip(named, are_same_everywhere(bits), strict=True):
        if not is_same:
            raise RuntimeError(
                f"The weights differ between the processes, first in {name}. Call the model that compute_loss is "
                "given, not one it has from elsewhere, let nothing in it depend on the process, and set "
                "find_unused_parameters=True if a step can leave parameters without a gradient."
            )


def _bits(parameter: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as whole numbers of 64 bits: the widest are added fastest."""
    values = parameter.detach().contiguous().view(-1)
    if values.storage_offset() * values.element_size() % 8:
        values = values.clone()  # only where such numbers may begin can they be read
    in_bytes = values.view(torch.uint8)
    whole, rest = in_bytes.tensor_split([len(in_bytes) // 8 * 8])
    total = whole.view(torch.int64).sum()
    return total + pad(rest, (0, 8 - len(rest))).view(torch.int64).sum() if len(rest) else total


# --- the two functions of the tutorials -------------------------------------------------------------------------------


class _Session:
    """What the tutorial functions keep with a model: its hardware and what was prepared for it.

    It hangs on the model and lives as long; copies and pickles of the model get `None` in its place.
    """

    def __init__(self) -> None:
        self.hardware = Hardware()
        self.layouts = dict.fromkeys(("train_loader", "test_loader"), self.hardware.layout(None))
        self.config = TrainConfig(on_nonfinite="ignore")
        self.probe = MeanProbe()
        self.epochs: WeakKeyDictionary[DataLoader[Any], int] = WeakKeyDictionary()
        self.kept: WeakKeyDictionary[DataLoader[Any], Rows] = WeakKeyDictionary()
        self.training: Training | None = None
        self._evaluating: Prepared | None = None
        _sessions.add(self)
        if self.hardware.is_main:
            say(self.hardware.describe())

    def __reduce__(self) -> Any:
        return type(None), ()

    def end(self) -> None:
        """Let go of what holds on to the group of processes."""
        self.training = self._evaluating = None

    def feed(self, loader: DataLoader[Any], name: str) -> Feed:
        """Return the micro-batches of a loader."""
        check_loader(loader, name)

        def on_recut(num_micro_batches: int) -> None:
            self.layouts[name] = self.layouts[name]._replace(num_micro_batches=num_micro_batches)
            if self.hardware.is_main:
                say(told_of_recut(name, num_micro_batches))

        pin_memory = self.hardware.device.type == "cuda"
        feed = Feed(loader, self.layouts[name], self.config.seed, pin_memory, on_recut)
        is_new, is_table = loader not in self.epochs, feed.rows is not None and not feed.rows.in_memory
        if is_new:
            feed.check_same_everywhere(name)
            self.epochs[loader] = 0
        if loader in self.kept:
            feed.rows = self.kept[loader]
            return feed
        told = keep_data(feed, self.hardware, self.config.data_in_memory, name)
        if told is not None and is_new and self.hardware.is_main:
            say(told)
        if told is not None and is_table:  # whose values never change
            self.kept[loader] = feed.rows  # type: ignore[assignment]
        return feed

    def train(self, model: nn.Module, loss_fn: Any, optimizer: Optimizer, feed: Feed) -> Training:
        """Return what trains this model with this loss and optimizer."""
        old = self.training
        if old is None or old.prepared.optimizer is not optimizer or old.objective.loss_fn is not loss_fn:
            check_optimizer(optimizer, model)
            keep = old is not None and old.prepared.optimizer is optimizer
            prepared = old.prepared if old and keep else Prepared(self.hardware, model, optimizer)
            state = old.state if old else RunState()
            schedule, stopping = Schedule(None, optimizer), Stopping(None)
            new = assemble(self.config, prepared, Objective(loss_fn), schedule, stopping, state, feed)
            self.training = new
            return new
        old.follow(feed)
        return old

    def evaluating(self, model: nn.Module) -> Prepared:
        """Return what evaluates this model."""
        if self.training is not None:
            return self.training.prepared
        if self._evaluating is None:
            self._evaluating = Prepared(self.hardware, model)
        return self._evaluating


_sessions: WeakSet[_Session] = WeakSet()


@atexit.register  # before the group is left
def _end_sessions() -> None:
    for session in _sessions:
        session.end()


def _session_of(model: nn.Module) -> _Session:
    session = getattr(model, "__dict__", {}).get("_accel_trainer_session")
    if session is None:
        check_model(model)
        session = model.__dict__["_accel_trainer_session"] = _Session()
    return session


def assemble(
    config: TrainConfig,
    prepared: Prepared,
    objective: Objective,
    schedule: Schedule,
    stopping: Stopping,
    state: RunState,
    feed: Feed,
    probe: MeanProbe | None = None,
) -> Training:
    """Put together what makes optimizer steps."""
    hardware, model, layout = prepared.hardware, prepared.plain, feed.layout
    unchanging = dict(model.named_buffers())
    unchanging |= {name: one for name, one in model.named_parameters() if not one.requires_grad}
    objective.to(hardware.device)
    if hardware.num_processes > 1:
        share_from_main(buffer for loss in objective.modules for buffer in loss.buffers())
    form = objective.form
    gradients: Gradients
    changes: ChainSum | TreeSum
    if config.bitwise:
        compiled = {"copies": prepared.reuses_memory, "is_compiled": prepared.is_compiled}
        gradients = TreeGradients(model, hardware.accelerator, layout, **compiled)
        changes = TreeSum(layout)
    else:
        gradients = Gradients(
            model,
            prepared.model,
            hardware.accelerator,
            layout,
            find_unused=config.find_unused_parameters,
            copies=prepared.reuses_memory,
        )
        changes = ChainSum(layout)
    return Training(
        config=config,
        hardware=hardware,
        prepared=prepared,
        objective=objective,
        gradients=gradients,
        buffers=Buffers([model, *objective.modules], layout, changes, hardware.any_process),
        memory=TrainingMemory(hardware, feed),
        schedule=schedule,
        stopping=stopping,
        state=state,
        feed=feed,
        ledger=Ledger(hardware.device, copies=prepared.copies_losses),
        joined=prepared.joined(objective.loss_fn, form) if form is not None else None,  # type: ignore[arg-type]
        infinite=frozenset(not_finite(unchanging)),
        probe=probe,
    )


def told_of_recut(name: str, num_micro_batches: int) -> str:
    """Return what to tell the user when batches turned out not to fit in memory."""
    return (
        f"Out of memory: each batch of {name} is now cut into {num_micro_batches} micro-batches. They became smaller, "
        "which layers that look at their batch, such as BatchNorm, and random ones take notice of."
    )


@contextmanager
def _together(hardware: Hardware) -> Iterator[None]:
    """Let the processes share a failure, and the user's generators and settings stay what they are."""
    shared = shared_failure(hardware.process, hardware.num_processes)
    with shared, fixed_arithmetic(), preserved(*hardware.generators):
        yield


def train_model(
    train_loader: DataLoader[Any],
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    optimizer: Optimizer,
) -> float:
    """Train the model for one epoch and return the mean train loss over its samples.

    Device, processes and precision come from the launch; each batch is divided over the processes. Give the plain
    objects at every call: what the first one prepares is kept as long as the model lives. Each loader counts its own
    epochs, on which the order of its samples depends.

    Args:
        train_loader: A `DataLoader` whose `batch_size` is what one update sees, over all processes.
        model: The model, trained in place.
        loss_fn: `(outputs, targets) -> scalar` mean over the samples.
        optimizer: An optimizer over the model's parameters.

    Raises:
        ValueError: Something that cannot be trained; the message says what and what to do.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.ones(8, 2), torch.ones(8, 1)), batch_size=4)
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> train_model(loader, model, torch.nn.MSELoss(), optimizer) > 0  # doctest: +ELLIPSIS
        CPU...
        True
    """
    session = _session_of(model)
    hardware = session.hardware
    with _together(hardware):
        feed = session.feed(train_loader, "train_loader")
        training = session.train(model, loss_fn, optimizer, feed)
        session.epochs[train_loader] += 1
        training.begin_epoch(training.state.epoch + 1)
        with training_mode(model), training.prepared.attached():
            totals = train_epoch(training, feed.micro_batches(session.epochs[train_loader]))
        training.buffers.share()
        check_weights(training)
    return math.nan if totals is None else totals.loss


def evaluate_model(test_loader: DataLoader[Any], model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> float:
    """Return the mean loss over all samples of a loader, each counted once, the same number on every process.

    Args:
        test_loader: A `DataLoader`; its batches are divided over the processes.
        model: The model, in any mode; it keeps it.
        loss_fn: `(outputs, targets) -> scalar` mean over the samples.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.ones(8, 2), torch.ones(8, 2)), batch_size=4)
        >>> evaluate_model(loader, torch.nn.Identity(), torch.nn.MSELoss())  # doctest: +ELLIPSIS
        CPU...
        0.0
    """
    session = _session_of(model)
    hardware = session.hardware
    with _together(hardware):
        feed = session.feed(test_loader, "test_loader")
        prepared, objective = session.evaluating(model), Objective(loss_fn)
        prepared.put_optimizer("eval")
        objective.to(hardware.device)
        with prepared.attached():
            return evaluate(prepared, objective, feed, Metrics(None), probe=session.probe)["loss"]  # type: ignore[index]
