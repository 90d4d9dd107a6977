"""The loop: what happens in an epoch, in order. `fit` and `train_epoch` are the documentation of the package."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing

from .data.micro_batches import Batch, MicroBatch
from .data.order import no_batch
from .data.randomness import TRAINING, derive_seed, seed_all
from .evaluation import evaluate, evaluation_mode
from .numbers.loss_table import Totals
from .numbers.objective import check_loss
from .run import Run, Training


def fit(run: Run) -> str:
    """Train until something ends the run and return the reason, in words."""
    training, config, state = run.training, run.training.config, run.training.state
    reason = reason_to_end(run)
    while reason is None:
        if state.epoch == run.history.num_epochs:  # all begun epochs are recorded: no run goes on within one
            training.count_epoch()
            training.callbacks.call("on_epoch_start")
        train = train_epoch(training, rest_of_epoch(training))
        if train is None:
            return f"{training.stopping.reason} in epoch {state.epoch}"  # an epoch cut short is not recorded

        training.end_epoch()
        if state.step == config.max_steps:
            run.saver.save_last(training)  # not after an epoch cut short: with more steps the run goes on within it
        value = evaluate_epoch(run, train)
        if value is None:
            return f"{training.stopping.reason} in epoch {state.epoch}"
        if training.schedule is not None:
            training.schedule.after_epoch(run.history.num_epochs, value)
        run.reporter.report_epoch(training.clock)
        if "on_epoch_end" in training.callbacks.heard:
            with evaluation_mode(training.prepared.user_model):  # a callback may look at it, and change its modes
                training.callbacks.call("on_epoch_end")
        reason = reason_to_end(run)
        state.finished = reason if training.stopping.kind == "callback" else None  # what else ends a run may change
        run.saver.after_epoch(training)
    return reason


def reason_to_end(run: Run) -> str | None:
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


# --- steps ------------------------------------------------------------------------------------------------------------


def train_epoch(training: Training, micro_batches: Generator[MicroBatch]) -> Totals | None:
    """Make the optimizer steps of one epoch and return its mean loss; `None` if the run ends within it."""
    training.start_epoch()
    with closing(micro_batches):
        for batch, pieces in by_batch(micro_batches):
            if not training.stopping.may_go_on():
                return None
            save_if_due(training)
            start_batch(training, batch)
            for micro_batch in pieces:
                seed_generators(training, micro_batch)
                forward_backward(training, micro_batch)
                if training.memory.exceeded:  # on this process
                    break
            is_done = not training.memory.must_redo() and take_step(training, batch)
            if not is_done:
                cut_finer(training)  # the loader yields the same batch again, in more micro-batches
            elif is_epoch_done(training):
                break
    totals = training.losses.exchange()
    training.finite.raise_if_nonfinite(totals.fault, training.norms, training.state)
    training.finite.raise_if_weightless(totals, training.state.epoch)
    return totals


def by_batch(micro_batches: Iterator[MicroBatch]) -> Iterator[tuple[Batch, Iterator[MicroBatch]]]:
    """Yield each batch with its micro-batches, which are fetched as they are iterated."""
    for first in micro_batches:
        yield first.batch, pieces_of(first, micro_batches)


def pieces_of(first: MicroBatch, others: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield the micro-batches of one batch of this process, and fetch nothing beyond the last."""
    micro_batch = first
    yield micro_batch
    while not micro_batch.piece.is_last:
        micro_batch = next(others)
        yield micro_batch


def save_if_due(training: Training) -> None:
    """Save a checkpoint after so many steps, or when the processes have agreed to."""
    saver = training.saver
    if saver is not None and (training.state.step >= saver.next_step or training.stopping.save_is_due):
        saver.save(training)


def start_batch(training: Training, batch: Batch) -> None:
    """Count the batch, and let the parts of a step begin it."""
    state = training.state
    if training.num_changes != training.loader.num_changes:  # data was changed in place
        training.check_changed_targets()
    state.num_batches += 1
    training.losses.start_batch(state.num_batches, batch, state.data_pass)
    training.memory.start_batch(batch)
    can_undo = training.memory.is_deferred or training.config.on_nonfinite == "skip"
    training.buffers.start_batch(batch, can_undo)
    training.gradients.start_batch(batch, training.weight_is_num_samples)


def seed_generators(training: Training, micro_batch: MicroBatch) -> None:
    """Set what dropout and friends draw from: a function of seed, batch and micro-batch."""
    if not training.draws_nothing:
        seed = derive_seed(training.config.seed, TRAINING, training.state.num_batches, micro_batch.piece.index)
        seed_all(seed, training.hardware.generators)


def forward_backward(training: Training, micro_batch: MicroBatch) -> None:
    """Run a micro-batch forward and backward; of what that takes, only loss, gradients and buffers stay in memory."""
    prepared, memory = training.prepared, training.memory
    memory.measure(micro_batch)
    training.buffers.start_micro_batch(micro_batch)
    # Running out of memory ends the block and is noted. Of a deferred batch nothing is sent before it is known to fit.
    with memory.trying(micro_batch), training.gradients.context(micro_batch, memory.is_deferred):
        micro_batch.move(prepared.to_device)
        with prepared.forward_mode(micro_batch.batch.is_full):
            forward = training.objective(prepared.model, micro_batch, training.weight_is_num_samples, training.joined)
        check_loss(forward.loss, needs_grad=True)
        training.gradients.backward(forward, micro_batch)
        training.buffers.end_micro_batch(micro_batch)
        training.losses.add(micro_batch, forward)
        if training.probe is not None and training.probe.wants_training:
            training.probe.look_within_training(training.objective, micro_batch, forward)


def take_step(training: Training, batch: Batch) -> bool:
    """Update the weights with the gradients of one batch.

    Returns:
        Whether that is done; not where memory has run out, and the batch has to come again.
    """
    config, state, prepared = training.config, training.state, training.prepared
    norm, is_updated, is_skipped = None, False, False
    with training.memory.trying_update(prepared.optimizer):  # type: ignore[arg-type]
        training.gradients.finish()
        is_skipped = config.on_nonfinite == "skip" and must_skip(training)
        if not is_skipped:
            if config.max_grad_norm is not None:
                norm = prepared.clip(training.gradients.parameters, config.max_grad_norm)
            training.buffers.finish()
            is_updated = prepared.step()  # false where fp16 has overflowed
    if training.memory.exceeded:
        return False
    training.gradients.clear()
    state.position = batch.number + 1
    if is_skipped:
        training.buffers.undo()
        state.num_skipped += 1
        return True
    if is_updated:
        if norm is not None:
            training.norms.add(norm)
        state.step += 1
    if state.num_batches % config.report_every == 0:
        report(training)  # while the optimizer has the learning rates of this update
    if is_updated:
        if training.schedule is not None:
            training.schedule.after_step(state.step)
        if "on_step_end" in training.callbacks.heard:
            training.callbacks.call("on_step_end")
    return True


def report(training: Training) -> None:
    """Read back the loss of the steps since the last report; raise an error where it is not finite."""
    training.state.recent_loss = training.losses.report()
    training.finite.raise_if_nonfinite(training.losses.fault, training.norms, training.state)
    training.callbacks.call("on_report")


def must_skip(training: Training) -> bool:
    """Return, on all processes alike, whether a loss of this batch or its gradient is not finite."""
    has_scaler = training.hardware.accelerator.scaler is not None
    is_wrong = training.finite.is_batch_wrong(training.losses, training.gradients.parameters, has_scaler)
    return training.hardware.any_process(is_wrong)[0]


def cut_finer(training: Training) -> None:
    """Undo what has been computed of a batch that does not fit in memory; the loader brings it again, cut finer."""
    training.gradients.clear()
    training.buffers.undo()
    training.losses.drop_batch()
    training.state.num_batches -= 1
    training.memory.halve()


# --- the parts of an epoch --------------------------------------------------------------------------------------------


def rest_of_epoch(training: Training) -> Generator[MicroBatch]:
    """Yield what is left of this epoch: of a pass over the data, or of an endless one with `steps_per_epoch`."""
    config, state = training.config, training.state
    if config.max_steps is not None and state.step >= config.max_steps:
        return  # resumed at its end
    if config.steps_per_epoch is None:
        if state.data_pass != state.epoch:
            state.data_pass, state.position = state.epoch, 0
        yield from rest_of_pass(training)
        return
    while not is_epoch_done(training):
        yield from rest_of_pass(training)
        if not is_epoch_done(training):
            state.data_pass, state.position = state.data_pass + 1, 0


def rest_of_pass(training: Training) -> Generator[MicroBatch]:
    """Yield what is left of a pass over the data."""
    state = training.state
    starts_within, micro_batch = state.position > 0, None
    for micro_batch in training.loader.micro_batches(state.data_pass, state.position):
        yield micro_batch
    if micro_batch is None and not starts_within:
        raise no_batch("train_loader")


def is_epoch_done(training: Training) -> bool:
    """Return whether the epoch, or the run, ends here before the data does."""
    config, state = training.config, training.state
    if config.max_steps is not None and state.step >= config.max_steps:
        return True
    return config.steps_per_epoch is not None and state.num_batches >= config.steps_per_epoch * state.epoch


def evaluate_epoch(run: Run, train: Totals) -> float | None:
    """Evaluate, record the epoch, and keep the weights if they are the best so far.

    Returns:
        The monitored value; `None` if the run ends within the evaluation.
    """
    training, config, state = run.training, run.training.config, run.training.state
    training.prepared.put_optimizer("eval")  # schedule-free ones have other weights then
    training.callbacks.call("on_evaluation_start")
    try:
        test = evaluate_test_set(run)
        if test is None:
            return None
        value = record(run, train, test)
        # With on_nonfinite="raise" weights that are not finite have been an error by now.
        is_sound = config.on_nonfinite == "raise" or training.finite.is_sound()
        if is_sound and state.update_best(value, run.mode, config.min_delta):
            run.saver.keep_best(training, {"epoch": state.epoch, run.monitor: value})
        if config.keep_best > 1 and is_sound:
            best_epochs = run.history.best_epochs(run.monitor, run.mode, config.keep_best)
            run.saver.keep_epochs(training, best_epochs, {"epoch": state.epoch, run.monitor: value})
        return value
    finally:
        training.callbacks.call("on_evaluation_end")


def evaluate_test_set(run: Run) -> dict[str, float] | None:
    """Return the scores of the test set, none without one; `None` if the run ends within it.

    Scores of several sets carry their names, and the loss of the first has the name of a single one too.
    """
    training, scores = run.training, dict[str, float]()
    if not run.test_loaders:
        run.probe.settle(training.hardware.device, training.hardware.is_main)
    with training.clock.measured("evaluation_seconds"):
        for name, loader in run.test_loaders.items():
            found = evaluate(training.prepared, training.objective, loader, run.metrics, training.stopping, run.probe)
            if found is None:
                return None
            scores.setdefault("loss", found["loss"])
            scores |= {f"{name}/{score}": value for score, value in found.items()} if name else found
    return scores


def record(run: Run, train: Totals, test: dict[str, float]) -> float:
    """Write the epoch to the history and return its monitored value."""
    training, history = run.training, run.history
    scores, seconds = dict(test), training.clock.end_epoch(training.loader.seconds)
    history.record(
        train_loss=train.loss,
        test_loss=scores.pop("loss", None),
        learning_rate=training.prepared.learning_rate,
        grad_norm=training.norms.mean(),
        samples_per_second=train.num_samples / (seconds["data_seconds"] + seconds["compute_seconds"]),
        metrics=scores,
        train_metrics=train.scalars,
        step=training.state.step,
        **seconds,
    )
    if run.monitor == "train_loss":
        return train.loss
    if run.monitor == "test_loss":
        return history.test_losses[-1]
    if run.monitor not in scores:
        raise ValueError(f"monitor must be one of {', '.join(scores)} here, got {run.monitor!r}.")
    return scores[run.monitor]
