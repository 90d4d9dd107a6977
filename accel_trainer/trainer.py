"""What the user holds."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader

from .base.clock import advice
from .base.console import warn
from .base.exchange import meet
from .callbacks import Callback, Callbacks
from .config import TrainConfig
from .data.cut import Layout, describe_batch
from .data.micro_batches import MicroBatchLoader
from .data.order import check_loader, dataset_order, is_stream, num_batches, sampler_of
from .data.workers import like_loader
from .devices.agreement import Stopping
from .devices.checks import check_model, check_optimizer
from .devices.compiled import num_compilations
from .devices.environment import describe_environment
from .devices.hardware import Hardware
from .devices.memory import keep_data
from .devices.prepared import Prepared
from .errors import NonFiniteError
from .evaluation import evaluate, predict, trained_while_evaluating, training_mode
from .history import History
from .loop import fit, record
from .numbers.loss_table import Totals
from .numbers.means import MeanProbe
from .numbers.metrics import Metrics, metric_of
from .numbers.objective import Objective
from .numbers.own_loss import computes_its_loss, own_loss
from .numbers.schedules import Schedule, check_scheduler, settings_of
from .run import Run, make_training, together
from .state import TrainState
from .storage.identity import identity_of
from .storage.resume import begin, check_states, find
from .storage.run_folder import RunFolder
from .storage.saver import Saver, finish_writes, seconds_between_saves
from .storage.weights import checked_state, save_for_library
from .view.notebook import LiveCurve, in_notebook
from .view.report import LivePage, keep_evaluation
from .view.reporter import Reporter
from .view.screen import ProgressBar, recut_message, say, wants_bar
from .view.trackers import Trackers


class Trainer:
    """Train a model on whatever hardware the script was launched on.

    Making one touches no device, no seed and no process group; that happens inside `fit`, `evaluate` and `predict`.

    Args:
        model: Any `nn.Module`; it stays the same object and comes back plain.
        optimizer: An optimizer over the model's parameters; `None` to evaluate and predict only.
        loss_fn: `(outputs, targets) -> scalar` mean over the samples; `None` with `compute_loss`, and for models that
            compute their own loss from batches that are dictionaries with labels, as those of transformers do.
        scheduler: A torch scheduler, or a function `(optimizer, num_steps) -> scheduler` that is given the exact
            number of steps of the run (of epochs, with `schedule_every="epoch"`).
        metrics: Name -> `(outputs, targets) -> per-sample values, shape (batch,), or their mean`, or a torchmetrics
            object; computed on the test set.
        whole_metrics: Name -> `(outputs, targets) -> value`, or a dictionary or vector of values: for what is no mean
            over samples, such as F1, R2 or a correlation. They are given the outputs and targets of the whole test set,
            joined along the samples, in host memory, on the main process.
        callbacks: Observers of the run.
        config: The user's other choices.
        compute_loss: `(model, batch) -> loss`, `(loss, weight)` or `Loss` (with outputs and targets for metrics, and
            further scalars), for batches that are not (inputs, targets).
        weight_fn: `(batch) -> weight` of a micro-batch, where it is not its number of samples; tokens, for example.
        accelerator: A function that builds the `Accelerator`, for plugins and handlers of one's own.

    Attributes:
        history: What the last `fit` measured.
        state: Where it stands.

    Raises:
        TypeError: An argument of the wrong kind.
        ValueError: An argument that cannot be trained with.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.ones(8, 2), torch.ones(8, 1)), batch_size=4)
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> config = TrainConfig(num_epochs=3, verbose=False)
        >>> history = Trainer(model, optimizer, torch.nn.MSELoss(), config=config).fit(loader, loader)
        >>> history.best_epoch
        3
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        scheduler: LRScheduler | Callable[[Optimizer, int], LRScheduler] | None = None,
        metrics: Mapping[str, Any] | None = None,
        whole_metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        callbacks: Iterable[Callback] = (),
        config: TrainConfig | None = None,
        compute_loss: Callable[[nn.Module, Any], Any] | None = None,
        weight_fn: Callable[[Any], Any] | None = None,
        accelerator: Callable[[], Accelerator] | None = None,
    ) -> None:
        self.config = TrainConfig() if config is None else config
        if not isinstance(self.config, TrainConfig):
            raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}.")
        check_model(model, self.config.bitwise)
        if optimizer is not None:
            check_optimizer(optimizer, model)
            check_scheduler(scheduler, optimizer)
        if accelerator is not None and (isinstance(accelerator, Accelerator) or not callable(accelerator)):
            raise TypeError("accelerator must be a function that builds the Accelerator: lambda: Accelerator(...).")
        if loss_fn is None and compute_loss is None and computes_its_loss(model):
            compute_loss = own_loss
        self.model, self.optimizer = model, optimizer
        self._metrics = Metrics(metrics, whole_metrics)
        self._objective = Objective(loss_fn, compute_loss, weight_fn, needs_outputs=bool(self._metrics.names))
        self._probe = MeanProbe()
        if self.config.bitwise:
            self._metrics.check_bitwise()
        if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
            raise TypeError(f"callbacks must be a list of Callback objects, got {callbacks!r}.")
        self._callbacks = list(callbacks)
        Callbacks(self._callbacks)  # refuses what would never be called
        self._scheduler = scheduler
        self._make_accelerator = accelerator
        self._settings_at_first = [] if optimizer is None else settings_of(optimizer)
        self._settings_before: list[dict[str, Any]] = []
        self._settings_after: list[dict[str, Any]] | None = None
        self.history = History()
        self.state = TrainState()
        self._page: LivePage | None = None
        self._epoch_held: int | None = None  # whose weights the model has
        self._trackers: Trackers | None = None
        self.is_main_process = True

    # --- fit ----------------------------------------------------------------------------------------------------------

    def fit(self, train_loader: DataLoader[Any], test_loader: DataLoader[Any] | None = None) -> History:
        """Train, and return the history; the model then holds the weights of the best epoch.

        Each call is a new run from the present weights, unless `resume` lets it go on from a checkpoint. The train
        loader's `batch_size` is what one update sees, on any number of processes.

        A first Ctrl-C, or the time limit, ends the run after the step under way, saves a checkpoint and returns.
        SIGTERM and SIGUSR1 do the same and leave the program with exit code 143 (0 where the launcher would restart).

        Args:
            train_loader: What to train on.
            test_loader: What chooses the best epoch; without it the train loss does.

        Raises:
            ValueError: Something that cannot be trained; nothing has been then.
            FileExistsError: `run_dir` holds a run already.
            HardwareError: The launch asks for something impossible.
            CheckpointError: There are checkpoints and none can be used, or they are of another run.
            NonFiniteError: A train loss or the weights became nan or infinite.
            ProcessFailedError: Another process of the run failed.
        """
        if self.optimizer is None:
            raise ValueError("fit needs an optimizer; this Trainer was made without one.")
        self.history, self.state, self._page, self._trackers = History(), TrainState(), None, None
        with self._session() as (hardware, votes):
            monitor = self._check_fit(train_loader, test_loader)
            if hardware.num_processes > 1:
                self._metrics.check_merging()
            seconds = seconds_between_saves(self.config.checkpoint_every) if hardware.is_main else None
            stopping = Stopping(votes, self.config.time_limit_seconds, hardware.any_process, seconds)
            with training_mode(self.model), stopping.on_signals():
                run = self._prepare(hardware, stopping, monitor, train_loader, test_loader)
                try:
                    with run.training.prepared.attached(), _closed_at_the_end(run):
                        self._fit(run)
                finally:
                    if self._trackers is not None:
                        self._trackers.close()
                    self._settings_after = settings_of(self.optimizer)
        if stopping.kind in _LEAVING:
            restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
            raise SystemExit(0 if restarts else 143)
        return self.history

    def _check_fit(self, train_loader: DataLoader[Any], test_loader: DataLoader[Any] | None) -> str:
        """Refuse what cannot be trained, and return the name of what is monitored."""
        check_loader(train_loader, "train_loader")
        if test_loader is not None:
            check_loader(test_loader, "test_loader")
        monitor = self.config.monitor
        known = ["test_loss", "train_loss", *(self._metrics.names if test_loader is not None else ())]
        may_be_scalar = self._objective.compute_loss is not None and test_loader is not None
        is_known = monitor in known[:2] or metric_of(monitor, tuple(known[2:])) is not None
        self._objective.expect(None if is_known else monitor)
        if not is_known and not may_be_scalar:
            hint = " (metrics are computed on the test loader)" if test_loader is None else ""
            raise ValueError(f"monitor must be one of {', '.join(known)}{hint}, got {monitor!r}.")
        return "train_loss" if test_loader is None else monitor

    def _mode(self, monitor: str) -> str:
        """Return whether less or more of the monitored value is better."""
        own = "min" if monitor in ("test_loss", "train_loss") else self._metrics.better(monitor)
        mode = self.config.mode or own
        if mode is None:
            raise ValueError(
                f"monitor={monitor!r} needs a mode in TrainConfig: 'max' where more is better, as for an accuracy, or "
                "'min' where less is, as for an error."
            )
        return mode

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_trackers": None}  # connections of this process

    def _prepare(
        self,
        hardware: Hardware,
        stopping: Stopping,
        monitor: str,
        train_loader: DataLoader[Any],
        test_loader: DataLoader[Any] | None,
    ) -> Run:
        """Put the parts of a run together, where it begins or goes on."""
        config, announce, optimizer = self.config, self._announcer(hardware), self.optimizer
        self._rewind(optimizer)  # type: ignore[arg-type]
        identity = self._identity(train_loader, test_loader) | {"mode": self._mode(monitor)}
        found = find(config, hardware, identity, announce)
        schedule = self._schedule(train_loader)
        reporter = Reporter(found.folder, self.history, self.state, monitor, config.num_epochs, announce)
        micro_batches = self._loader(train_loader, hardware, "train_loader", reporter.report_recut)
        tests = None
        if test_loader is not None:
            tests = self._loader(test_loader, hardware, "test_loader", reporter.report_recut)
        checked_state(self.model)
        prepared = Prepared(hardware, self.model, optimizer, config.compile)
        for line in self._start_lines(hardware, train_loader, test_loader):
            announce(line)
        for name, loader in (("train_loader", micro_batches), ("test_loader", tests)):
            message = None if loader is None else keep_data(loader, hardware, config.data_in_memory, name)
            if message is not None:
                announce(message)
        shown = self._all_callbacks(hardware, train_loader, found.folder)
        callbacks = Callbacks([reporter, *shown], self, stopping.request)
        on_checkpoint = functools.partial(callbacks.call, "on_checkpoint")
        saver = Saver(config, found.folder, hardware.is_main, self.history, identity, self._callbacks, on_checkpoint)
        parts = prepared, self._objective, schedule, stopping, callbacks, self.state, micro_batches
        training = make_training(config, *parts, saver if config.run_dir is not None else None, self._probe)
        outcome = self._metrics, self.history, found.folder, saver, reporter, self._probe
        run = Run(training, tests, *outcome, monitor, identity["mode"], announce)
        begin(run, found, identity, self._callbacks)
        if found.folder is not None:
            choices = {"asked": asdict(config), "resolved": _resolved(run), "identity": identity}
            reporter.report_start(choices, describe_environment(hardware.describe()))
        return run

    def _schedule(self, train_loader: DataLoader[Any]) -> Schedule | None:
        if self._scheduler is None:
            return None
        config, num_steps = self.config, _num_steps(self.config, train_loader)
        return Schedule(self._scheduler, self.optimizer, config.schedule_every, num_steps, config.num_epochs)  # type: ignore[arg-type]

    def _start_lines(
        self, hardware: Hardware, train_loader: DataLoader[Any], test_loader: DataLoader[Any] | None
    ) -> Iterator[str]:
        """Yield what is to be said before the first step."""
        config = self.config
        yield _start_line(hardware, train_loader, hardware.layout(config.num_micro_batches), config)
        if test_loader is None and self._metrics.names:
            yield f"There is no test_loader: {', '.join(self._metrics.names)} cannot be computed."
        is_free = config.num_micro_batches is None and not config.bitwise
        has_norm = any(isinstance(module, _BatchNorm) for module in self.model.modules())
        if hardware.num_processes > 1 and is_free and has_norm:
            yield _ON_BATCH_NORM
        evaluating = trained_while_evaluating(self.model)
        if evaluating:
            names = ", ".join(evaluating[:3]) + (f" and {len(evaluating) - 3} more" if len(evaluating) > 3 else "")
            yield f"In evaluation mode, so without dropout, though trained: {names}. {_ON_EVALUATING}"

    def _all_callbacks(
        self, hardware: Hardware, train_loader: DataLoader[Any], folder: RunFolder | None
    ) -> list[Callback]:
        """Return the user's callbacks, and those that show the run."""
        config, callbacks = self.config, list(self._callbacks)
        shows = hardware.is_main and config.verbose
        if shows and wants_bar():
            num_steps = config.steps_per_epoch or num_batches(train_loader)
            callbacks.append(ProgressBar(num_steps, _num_steps(config, train_loader), train_loader.batch_size))
        if shows and in_notebook():
            callbacks.append(LiveCurve())
        if hardware.is_main and config.trackers:
            run_dir, is_resumed = (None, False) if folder is None else (folder.path, folder.resumed is not None)
            self._trackers = Trackers(config.trackers, config.project, run_dir, asdict(config), is_resumed)
            callbacks.append(self._trackers)
        return callbacks

    def _identity(self, train_loader: DataLoader[Any], test_loader: DataLoader[Any] | None) -> dict[str, Any]:
        functions = {
            "loss": self._objective.loss_fn or self._objective.compute_loss,
            "weight_fn": self._objective.weight_fn,
            "scheduler": self._scheduler,
            "optimizer": self.optimizer,
        }
        loaders = {"train_loader": train_loader, "test_loader": test_loader}
        settings, names = self._settings_at_first, self._metrics.names
        return identity_of(self.config, self.model, settings, functions, loaders, names)

    def _fit(self, run: Run) -> None:
        history, state = self.history, self.state
        training, kept = run.training, self._objective.state_outside()
        try:
            training.callbacks.call("on_fit_start")
            check_states(self._callbacks)
            history.end(fit(run))
            leaves = _save_the_end(run)
        except NonFiniteError as error:
            history.end(str(error))
            _record_fault(run, error)
            raise
        self._warn_of_state(run, kept)
        training.prepared.put_optimizer("eval")
        holds_best = False
        if self.config.restore_best and state.best_epoch is not None and not leaves:
            # Always: a callback may have changed the weights, on some processes only.
            holds_best = run.saver.restore_best(self.model, self._objective.modules, training.hardware.num_processes)
        if holds_best and run.folder is not None:
            folder = run.folder.best_path
            run.folder.attempt("best", lambda: save_for_library(self.model, folder))
        self._epoch_held = state.best_epoch if holds_best else state.epoch
        _report_end(run, holds_best)
        self._page = run.reporter.page
        training.callbacks.call("on_fit_end")

    def _warn_of_state(self, run: Run, before: Mapping[str, str]) -> None:
        """Warn of what the loss has changed in itself, where that is lost or differs between the processes."""
        hardware, now = run.training.hardware, self._objective.state_outside()
        changed = [name for name, value in now.items() if before.get(name) != value]
        if changed and hardware.is_main and (hardware.num_processes > 1 or run.folder is not None):
            warn(
                f"The loss has changed {', '.join(changed)}, which is no buffer: each process has its own, and a run "
                "that goes on begins with the first value again. Keep it with register_buffer in an nn.Module.",
                stacklevel=4,
            )

    def _rewind(self, optimizer: Optimizer) -> None:
        """Let a scheduler factory of a second run begin where that of the first did, not at its last learning rate.

        What the user has set in between stands.
        """
        if self._scheduler is None or hasattr(self._scheduler, "step"):
            return
        if self._settings_after is not None and self._settings_after == settings_of(optimizer):
            for group, settings in zip(optimizer.param_groups, self._settings_before, strict=True):
                group.pop("initial_lr", None)
                group.update(settings)
        self._settings_before = settings_of(optimizer)

    @property
    def doubts(self) -> dict[str, str]:
        """Loss and metrics that were found to be no means over samples, by name, and what is to be said of each."""
        return dict(self._probe.doubts)

    # --- evaluate and predict -----------------------------------------------------------------------------------------

    def evaluate(self, loader: DataLoader[Any]) -> dict[str, float]:
        """Return `{"loss": ..., **metrics}` over all samples of a loader, the same numbers on every process.

        Call it on every process: they share the work.

        After a `fit` with a `run_dir`, the scores are kept in its `evaluations.json` and shown in its `report.html`.

        Args:
            loader: Its batches are divided over the processes; each sample counts once. An empty one gives nan.

        Raises:
            TypeError: Not a plain `DataLoader`.
        """
        with self._evaluating() as prepared:
            check_loader(loader, "loader", may_be_empty=True)
            if prepared.hardware.num_processes > 1:
                self._metrics.check_merging()
            micro_batches = self._loader(loader, prepared.hardware, "loader")
            self._objective.to(prepared.hardware.device)
            scores: dict[str, float] = evaluate(  # type: ignore[assignment]
                prepared, self._objective, micro_batches, self._metrics, probe=self._probe
            )
            if self._page is not None and prepared.hardware.is_main:
                num_samples = None if is_stream(loader) else len(dataset_order(loader))
                keep_evaluation(self._page, num_samples, self._epoch_held, scores)
            return scores

    def predict(self, loader: DataLoader[Any], ragged: float | Literal["list"] | None = None) -> Any:
        """Return the model's outputs for every sample once, in dataset order, in host memory.

        Call it on every process: they share the work.

        The order and repetitions of a shuffling sampler are put aside: a loader over the whole dataset gives its
        samples from first to last, one over a subset gives that subset in dataset order. The model is called with
        what a batch holds: a tensor, the first of a pair, or a dictionary of arguments without its labels.

        Args:
            loader: Whose dataset to predict; its batches are divided over the processes.
            ragged: What becomes of outputs of several lengths, such as one per token: `"list"` returns a list with a
                tensor for each sample in place of a tensor, a number fills them up to the longest. Where the batch has
                an `attention_mask` of that shape, what it masks is left out. `None` for outputs of one length only.

        Returns:
            Tensors of shape `(samples, ...)` in the structure of the model's outputs, on the main process; `None` on
            the others. Outputs that are for the next call of the model (`keys_to_ignore_at_inference` of transformers)
            are left out, as is what has no entry per sample, with a warning.

        Raises:
            ValueError: Outputs of several lengths, and `ragged` is `None`.
        """
        if ragged not in (None, "list") and (isinstance(ragged, bool) or not isinstance(ragged, (int, float))):
            raise ValueError(f"ragged must be a number, 'list' or None, got {ragged!r}.")
        with self._evaluating() as prepared:
            check_loader(loader, "loader", may_be_empty=True)
            return predict(prepared, self._loader(_in_dataset_order(loader), prepared.hardware, "loader"), ragged)

    # --- parts --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _session(self) -> Iterator[tuple[Hardware, Any]]:
        config = self.config
        hardware = Hardware(config.mixed_precision, self._make_accelerator, config.bitwise)
        self.is_main_process = hardware.is_main
        finish = functools.partial(finish_writes, timeout=20.0)
        with together(hardware, config.bitwise, config.num_threads, finish) as votes, _hinted():
            yield hardware, votes
            if hardware.num_processes > 1:
                meet()  # who leaves first may take the store with it

    @contextmanager
    def _evaluating(self) -> Iterator[Prepared]:
        with self._session() as (hardware, _):
            prepared = Prepared(hardware, self.model, compile=self.config.compile)
            with prepared.attached():
                yield prepared

    def _announcer(self, hardware: Hardware) -> Callable[[str], None]:
        return say if hardware.is_main and self.config.verbose else lambda text: None

    def _loader(
        self,
        data_loader: DataLoader[Any],
        hardware: Hardware,
        name: str,
        report_recut: Callable[[str, int], None] | None = None,
    ) -> MicroBatchLoader:
        """Return the micro-batches of a loader."""

        def announce(name: str, num_micro_batches: int) -> None:
            self._announcer(hardware)(recut_message(name, num_micro_batches))

        layout = hardware.layout(self.config.num_micro_batches)
        is_fixed = self.config.num_micro_batches is not None or self.config.bitwise
        on_recut = None if is_fixed else functools.partial(report_recut or announce, name)
        may_be_pairs = self._objective.compute_loss is None
        pin_memory = hardware.device.type == "cuda"
        loader = MicroBatchLoader(data_loader, layout, self.config.seed, pin_memory, on_recut, may_be_pairs)
        loader.check_same_everywhere(name)
        return loader


@contextmanager
def _hinted() -> Iterator[None]:
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
_LEAVING = ("SIGTERM", "SIGUSR1")  # what ends the program too


@contextmanager
def _closed_at_the_end(run: Run) -> Iterator[None]:
    """See the last write through, and leave the folder to others; one that holds nothing is removed."""
    page = run.reporter.page
    try:
        yield
    except KeyboardInterrupt:
        run.saver.close(at_once=True)
        raise
    except BaseException:
        if page is not None and page.state == "running":
            run.reporter.write_page("failed")
        _close(run)
        raise
    _close(run)


def _close(run: Run) -> None:
    run.saver.close()
    if run.folder is None:
        return
    if run.saver.lost is not None:
        warn(f"No checkpoint of this run could be written: {run.saver.lost}", stacklevel=2)
    if not run.history.num_epochs:
        run.folder.discard()  # if it has no checkpoint either: the next try may have the name


def _save_the_end(run: Run) -> bool:
    """Save the last checkpoint, mark an interruption, and return whether the program leaves too."""
    state, kind = run.training.state, run.training.stopping.kind
    if kind == "callback":
        state.finished = run.history.stop_reason
    if kind != "callback" or run.history.num_epochs:
        run.saver.save(run.training)
        run.saver.finish()
    if kind in (None, "callback"):
        return False
    if run.folder is not None:
        is_saved = run.saver.is_saved(state)
        mark = {"step": state.step, "epoch": state.epoch, "is_saved": is_saved, "reason": run.history.stop_reason}
        run.folder.write_json("preempted.json", mark | {"time": time.time()})
        if is_saved:
            run.announce(f'Step {state.step} is saved in {run.folder.path}: resume="auto" goes on from it.')
    return kind in _LEAVING


def _resolved(run: Run) -> dict[str, Any]:
    """Return what the user's choices were resolved to."""
    training, data_loader = run.training, run.training.loader.data_loader
    return {
        "device": str(training.hardware.device),
        "num_processes": training.hardware.num_processes,
        "num_micro_batches": training.loader.layout.num_micro_batches,
        "num_micro_batches_of_test": run.test_loader.layout.num_micro_batches if run.test_loader else None,
        "num_threads": torch.get_num_threads(),
        "mixed_precision": training.hardware.precision,
        "batch_size": data_loader.batch_size,
        "num_batches": num_batches(data_loader),
        "num_parameters": sum(parameter.numel() for parameter in training.prepared.user_model.parameters()),
        "num_steps": _num_steps(training.config, data_loader),
        "monitor": run.monitor,
    }


def _report_end(run: Run, holds_best: bool = False, is_failed: bool = False) -> None:
    run.saver.finish()
    is_whole = run.training.stopping.kind in (None, "callback")
    how = "failed" if is_failed else "finished" if is_whole else "interrupted"
    run.reporter.report_end(holds_best, how, _advice(run))


_MANY_GRAPHS = 8  # one each for training and evaluation, and some for a model in parts, are as it should be


def _advice(run: Run) -> str | None:
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
    return advice(vars(run.history), remedies)


def _record_fault(run: Run, error: NonFiniteError) -> None:
    """Show the epoch whose loss was not finite in the history, as such, and leave a note of the batch."""
    training = run.training
    if run.folder is not None:
        note: dict[str, Any] = {"error": str(error)}
        for name, (data_pass, number) in zip(("batch", "batch before"), error.places, strict=False):
            samples = training.loader.indices_of(data_pass, number)
            note[name] = {"data_pass": data_pass, "number": number, "samples": samples}
        run.folder.write_json("nonfinite.json", note)
    names = ["loss", *(run.history.metrics or run.metrics.names)]  # parts of metrics are known after an epoch
    names += [run.monitor] if run.monitor not in ("test_loss", "train_loss", *names) else []
    scores = {} if run.test_loader is None else dict.fromkeys(names, math.nan)
    record(run, Totals(math.nan, {}, 0, None), scores)
    run.reporter.report_epoch(training.clock)
    _report_end(run, is_failed=True)


def _num_steps(config: TrainConfig, train_loader: DataLoader[Any]) -> int | None:
    """Return the optimizer steps of the whole run; `None` where the loader cannot say."""
    per_epoch = config.steps_per_epoch or num_batches(train_loader)
    totals = [None if per_epoch is None else per_epoch * config.num_epochs, config.max_steps]
    return min((total for total in totals if total is not None), default=None)


def _in_dataset_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader like this one that yields each of its samples once, in dataset order."""
    if is_stream(loader):
        return loader
    size = getattr(sampler_of(loader), "batch_size", None) or 1
    batches = BatchSampler(dataset_order(loader), size, drop_last=False)
    if loader.batch_sampler is None:  # batch_size=None: the dataset answers lists of indices
        return like_loader(loader, batch_size=None, sampler=batches)
    return like_loader(loader, batch_sampler=batches)
