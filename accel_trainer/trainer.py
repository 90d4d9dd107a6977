"""What the user holds."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from .base.exchange import meet
from .base.tracebacks import ends_in_users_lines
from .callbacks import Callback, Callbacks
from .config import TrainConfig, check_with_sharding
from .data.micro_batches import MicroBatchLoader
from .data.order import check_loader, num_batches, num_steps
from .data.streams import can_be_sharded, check_by_shards
from .data.test_sets import argument_of, by_name, parts_of
from .data.workers import in_dataset_order
from .devices.alike import check_alike, choices_of
from .devices.checks import check_model, check_optimizer
from .devices.environment import describe_environment
from .devices.hardware import Hardware
from .devices.memory import keep_data
from .devices.prepared import Prepared
from .devices.sharding import is_asked_for
from .devices.stopping import Stopping
from .devices.successors import train_newest
from .ending import LEAVING, closed_at_the_end, record_fault, report_end, save_the_end
from .errors import NonFiniteError, ProcessFailedError
from .evaluation import evaluate, predict, training_mode
from .history import History
from .libraries.transformers import computes_its_loss, own_loss, save_beside
from .loop import fit
from .numbers.means import MeanProbe
from .numbers.metrics import Metrics, metric_of
from .numbers.objective import Objective
from .numbers.schedules import Schedule, check_scheduler, settings_of
from .run import Run, make_training, together
from .state import TrainState
from .storage.identity import identity_of
from .storage.resume import begin, check_states, find
from .storage.run_folder import RunFolder
from .storage.saver import Saver, finish_writes, seconds_between_saves
from .storage.shared_folder import SharedFolder, check_seen_by_all, wait_for_nobody
from .storage.weights import checked_state, left_out_of
from .view.described import described
from .view.gathered_answers import GatheredAnswers
from .view.notebook import LiveCurve, in_notebook
from .view.reporter import Reporter, report_failure
from .view.results import Results, details_of
from .view.screen import ProgressBar, recut_message, say, wants_bar
from .view.trackers import Trackers
from .view.words import hinted, resolved, start_lines, warn_of_ignored, warn_of_state


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

    @ends_in_users_lines
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
        check_model(model, self.config.bitwise, may_be_divided=self.config.sharding is not None or is_asked_for())
        if optimizer is not None:
            check_optimizer(optimizer, model)
            check_scheduler(scheduler, optimizer)
        if accelerator is not None and (isinstance(accelerator, Accelerator) or not callable(accelerator)):
            raise TypeError("accelerator must be a function that builds the Accelerator: lambda: Accelerator(...).")
        if loss_fn is None and compute_loss is None and computes_its_loss(model):
            compute_loss = own_loss
        self.model, self.optimizer = model, optimizer
        self._metrics = Metrics(metrics, whole_metrics)
        self._objective = Objective(loss_fn, compute_loss, weight_fn, self._metrics.names)
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
        self._results = Results()
        self._trackers: Trackers | None = None
        self._reporter: Reporter | None = None  # of the run that goes on
        self.is_main_process = True

    # --- fit ----------------------------------------------------------------------------------------------------------

    @ends_in_users_lines
    def fit(
        self,
        train_loader: DataLoader[Any],
        test_loader: DataLoader[Any] | Mapping[str, DataLoader[Any]] | None = None,
    ) -> History:
        """Train, and return the history; the model then holds the weights of the best epoch.

        Each call is a new run from the present weights, unless `resume` lets it go on from a checkpoint. The train
        loader's `batch_size` is what one update sees, on any number of processes.

        A first Ctrl-C, or the time limit, ends the run after the step under way, saves a checkpoint and returns.
        SIGTERM and SIGUSR1 do the same and leave the program with exit code 143 (0 where the launcher would restart).
        In a notebook an interrupt does the same and then raises `KeyboardInterrupt`, so that the cells below do not
        run; `history` and the model hold what the run has come to.

        Args:
            train_loader: What to train on.
            test_loader: What chooses the best epoch; without it the train loss does. Of a dictionary of several,
                each is evaluated after each epoch: `History.metrics` and `monitor` know their losses and metrics as
                `name/loss` and `name/metric`, and `test_losses` are those of the first.

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
        self.history, self.state, self._results, self._trackers = History(), TrainState(), Results(), None
        tests = by_name(test_loader)
        self._results.note_data({"train": train_loader, **{name or "test": loader for name, loader in tests.items()}})
        with self._session() as (hardware, votes):
            monitor = self._check_fit(train_loader, tests)
            if hardware.num_processes > 1:
                self._metrics.check_merging()
            seconds = seconds_between_saves(self.config.checkpoint_every) if hardware.is_main else None
            stopping = Stopping(votes, self.config.time_limit_seconds, hardware.any_process, seconds)
            with training_mode(self.model), stopping.on_signals():
                run = self._prepare(hardware, stopping, monitor, train_loader, tests)
                try:
                    with run.training.prepared.attached(), closed_at_the_end(run):
                        self._fit(run)
                finally:
                    if self._trackers is not None:
                        self._trackers.close()
                    self._settings_after = settings_of(self.optimizer)
        if stopping.kind in LEAVING:
            restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
            raise SystemExit(0 if restarts else 143)
        if stopping.kind == "Ctrl-C" and in_notebook():  # or the cells below would run
            raise KeyboardInterrupt(
                "the run has ended in order: the trainer has its history and the model its weights."
            )
        return self.history

    def _check_fit(self, train_loader: DataLoader[Any], tests: Mapping[str, DataLoader[Any]]) -> str:
        """Refuse what cannot be trained, and return the name of what is monitored."""
        check_loader(train_loader, "train_loader")
        for name, loader in tests.items():
            check_loader(loader, argument_of(name))
        monitor, (set_name, score) = self.config.monitor, parts_of(self.config.monitor, tests)
        metrics = self._metrics.names if tests else ()
        named = [f"{name}/{score}" for name in tests if name for score in ("loss", *metrics)]
        known = ["test_loss", "train_loss", *(named or metrics)]
        is_known = monitor in known or (metric_of(score, metrics) is not None and (set_name in tests))
        may_be_scalar = self._objective.compute_loss is not None and set_name in tests
        self._objective.expect(None if is_known else score)
        if not is_known and not may_be_scalar:
            hint = "" if tests else " (metrics are computed on the test loader)"
            raise ValueError(f"monitor must be one of {', '.join(known)}{hint}, got {monitor!r}.")
        return monitor if tests else "train_loss"

    def _mode(self, monitor: str, tests: Mapping[str, DataLoader[Any]]) -> str:
        """Return whether less or more of the monitored value is better."""
        _, score = parts_of(monitor, tests)
        own = "min" if score in ("test_loss", "train_loss", "loss") else self._metrics.better(score)
        mode = self.config.mode or own
        if mode is None:
            raise ValueError(
                f"monitor={monitor!r} needs a mode in TrainConfig: 'max' where more is better, as for an accuracy, or "
                "'min' where less is, as for an error."
            )
        return mode

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_trackers": None, "_reporter": None}  # connections and files of this process

    def _prepare(
        self,
        hardware: Hardware,
        stopping: Stopping,
        monitor: str,
        train_loader: DataLoader[Any],
        test_loaders: Mapping[str, DataLoader[Any]],
    ) -> Run:
        """Put the parts of a run together, where it begins or goes on."""
        config, announce, optimizer = self.config, self._announcer(hardware), self.optimizer
        self._rewind(optimizer)  # type: ignore[arg-type]
        identity = self._identity(train_loader, test_loaders) | {"mode": self._mode(monitor, test_loaders)}
        if hardware.sharding is not None and config.run_dir is not None:
            check_seen_by_all(config.run_dir, hardware)
        found = find(config, hardware, identity, announce)
        schedule = self._schedule(train_loader)
        reporter = Reporter(found.folder, self.history, self.state, monitor, config.num_epochs, announce)
        make = functools.partial(self._loader, hardware=hardware, report_recut=reporter.report_recut, may_shard=True)
        micro_batches = make(train_loader, name="train_loader")
        tests = {name: make(loader, name=argument_of(name)) for name, loader in test_loaders.items()}
        checked_state(self.model)
        warn_of_ignored(hardware.accelerator)
        prepared = Prepared(hardware, self.model, optimizer, config.compile, config.seed)
        in_vain = () if tests else self._metrics.names
        for line in start_lines(hardware, self.model, train_loader, config, in_vain):
            announce(line)
        all_loaders = {"train_loader": micro_batches} | {argument_of(name): loader for name, loader in tests.items()}
        for name, loader in all_loaders.items():
            message = keep_data(loader, hardware, config.data_in_memory, name)
            if message is not None:
                announce(message)
        shown = self._all_callbacks(hardware, train_loader, found.folder)
        callbacks = Callbacks([reporter, *shown], self, stopping.request)
        on_checkpoint = functools.partial(callbacks.call, "on_checkpoint")
        saving = self.history, identity, self._callbacks, on_checkpoint
        saver = Saver(config, self._kept_in(found.folder, prepared), hardware.is_main, *saving, prepared.is_divided)
        parts = prepared, self._objective, schedule, stopping, callbacks, self.state, micro_batches
        training = make_training(config, *parts, saver if config.run_dir is not None else None, self._probe)
        outcome = self._metrics, self.history, found.folder, saver, reporter, self._probe
        run = Run(training, tests, *outcome, monitor, identity["mode"], announce)
        begin(run, found, identity, self._callbacks)
        self._reporter = reporter
        if found.folder is not None:
            choices = {"asked": asdict(config), "resolved": resolved(run), "identity": identity}
            choices |= described(self.model, optimizer)  # type: ignore[arg-type]
            reporter.report_start(choices, describe_environment(hardware.describe()))
        return run

    def _kept_in(self, folder: RunFolder | None, prepared: Prepared) -> RunFolder | SharedFolder | None:
        """Return what the saver writes to: of a divided model a folder that all processes write to together."""
        if self.config.run_dir is None or not prepared.is_divided:
            return folder
        return SharedFolder(self.config.run_dir, folder, prepared.hardware)

    def _schedule(self, train_loader: DataLoader[Any]) -> Schedule | None:
        if self._scheduler is None:
            return None
        config, length = self.config, num_steps(self.config, train_loader)
        return Schedule(self._scheduler, self.optimizer, config.schedule_every, length, config.num_epochs)  # type: ignore[arg-type]

    def _all_callbacks(
        self, hardware: Hardware, train_loader: DataLoader[Any], folder: RunFolder | None
    ) -> list[Callback]:
        """Return the user's callbacks, and those that show the run."""
        config, callbacks = self.config, list(self._callbacks)
        shows = hardware.is_main and config.verbose
        if shows and wants_bar():
            per_epoch = config.steps_per_epoch or num_batches(train_loader)
            callbacks.append(ProgressBar(per_epoch, num_steps(config, train_loader), train_loader.batch_size))
        if shows and in_notebook():
            callbacks.append(LiveCurve())
        if hardware.is_main and config.trackers:
            run_dir, is_resumed = (None, False) if folder is None else (folder.path, folder.resumed is not None)
            self._trackers = Trackers(config.trackers, config.project, run_dir, asdict(config), is_resumed)
            callbacks.append(self._trackers)
        return callbacks

    def _identity(self, train_loader: DataLoader[Any], tests: Mapping[str, DataLoader[Any]]) -> dict[str, Any]:
        functions = {
            "loss": self._objective.loss_fn or self._objective.compute_loss,
            "weight_fn": self._objective.weight_fn,
            "scheduler": self._scheduler,
            "optimizer": self.optimizer,
        }
        tests = tests or {"": None}  # type: ignore[dict-item]
        loaders = {"train_loader": train_loader} | {argument_of(name): loader for name, loader in tests.items()}
        settings, names = self._settings_at_first, self._metrics.names
        return identity_of(self.config, self.model, settings, functions, loaders, names)

    def _fit(self, run: Run) -> None:
        history, state = self.history, self.state
        training, kept = run.training, self._objective.state_outside()
        try:
            training.callbacks.call("on_fit_start")
            check_states(self._callbacks)
            history.end(fit(run))
            leaves = save_the_end(run)
        except NonFiniteError as error:
            history.end(str(error))
            record_fault(run, error)
            raise
        warn_of_state(run, kept)
        training.prepared.put_optimizer("eval")
        holds_best = False
        if self.config.restore_best and state.best_epoch is not None and not leaves:
            # Always: a callback may have changed the weights, on some processes only.
            holds_best = run.saver.restore_best(self.model, self._objective.modules, training.hardware.num_processes)
        if holds_best and run.folder is not None:
            best = run.folder.best_path
            run.folder.attempt("best", lambda: save_beside(self.model, best, is_whole=not left_out_of(best)))
        report_end(run, holds_best)
        epoch = state.best_epoch if holds_best else state.epoch
        self._results.note_end(run.reporter.page, epoch)  # type: ignore[arg-type]
        training.callbacks.call("on_fit_end")

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

    @ends_in_users_lines
    def evaluate(
        self,
        loader: DataLoader[Any],
        report: Literal["classification", "regression"] | None = None,
        *,
        name: str | None = None,
        run_dir: str | os.PathLike[str] | None = None,
    ) -> dict[str, float]:
        """Return `{"loss": ..., **metrics}` over all samples of a loader, the same numbers on every process.

        Call it on every process: they share the work.

        After a `fit` with a `run_dir`, the scores are kept in its `evaluations.json` and shown in its `report.html`.
        With a `report` the page also shows what the model gets wrong, and the folder gets the pictures:
        `classification.png` (confusion matrix, precision, recall and F1 of each class) or `regression.png` (residuals),
        and `wrong_samples.png` where samples are images. The numbers are those of scikit-learn.

        Args:
            loader: Its batches are divided over the processes; each sample counts once. An empty one gives nan.
            report: `"classification"` for scores (batch, classes, ...), or one per target, with class indices or
                one-hot targets; `"regression"` for outputs and targets of one shape, (batch,) or (batch, targets).
                Class indices of -100 are left out; where `loss_fn` is one of torch's own losses, or a partial of one,
                those of its `ignore_index` instead. What a function of yours leaves out is not seen.
                A batch with as many tokens as classes is read as the shapes of the others demand. A model that computes
                its own loss of the next token is judged by the next token. Outputs for torch's Poisson loss are
                exponentiated if that loss does so.
            name: What the page calls these samples. `None` for `train` and `test`, the data of the last `fit`, and
                `final`, any other.
            run_dir: Folder of a run whose best weights the model holds, for the results; `None` for the last `fit`.

        Raises:
            TypeError: Not a plain `DataLoader`.
            ValueError: A report that nothing can be written to, or that outputs and targets are not made for.
            ImportError: The report needs a library of `accel_trainer[report]`.
        """
        has_folder = run_dir is not None or (self.config.run_dir is not None and self._results.epoch is not None)
        self._results.check_report(report, has_folder)
        with self._evaluating() as prepared:
            hardware = prepared.hardware
            check_loader(loader, "loader", may_be_empty=True)
            if hardware.num_processes > 1:
                self._metrics.check_merging()
            results = self._results
            if run_dir is not None:
                results = hardware.from_main(functools.partial(Results.of, run_dir))
            micro_batches = self._loader(loader, hardware, "loader")
            self._objective.to(hardware.device)
            answers = None if report is None else GatheredAnswers(report, self._objective, self.model, hardware)
            scores: dict[str, float] = evaluate(  # type: ignore[assignment]
                prepared, self._objective, micro_batches, self._metrics, probe=self._probe, answers=answers
            )
            details = None if answers is None else details_of(answers, loader, self.config.seed, hardware)
            if hardware.is_main:
                results.keep(loader, scores, details, name)
            return scores

    @ends_in_users_lines
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
            return predict(prepared, self._loader(in_dataset_order(loader), prepared.hardware, "loader"), ragged)

    # --- parts --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _session(self) -> Iterator[tuple[Hardware, Any]]:
        config = self.config
        hardware = Hardware(config.mixed_precision, self._make_accelerator, config.bitwise, config.sharding)
        self.is_main_process = hardware.is_main
        outer = self._reporter  # of a run whose callback evaluates
        try:
            choices = config.bitwise, config.num_threads, self._leave, config.heartbeat_seconds
            with together(hardware, *choices) as votes, hinted():
                check_alike(choices_of(config, hardware))
                if hardware.sharding is not None:
                    check_with_sharding(config)
                yield hardware, votes
                if hardware.num_processes > 1:
                    meet()  # who leaves first may take the store with it
        except BaseException as error:
            if outer is None:
                report_failure(self._reporter, type(error).__name__, error)
            raise
        finally:
            self._reporter = outer

    def _leave(self, cause: str, is_lost: bool) -> None:
        """See the last write through before another process ends this one; not one that would wait for it."""
        if is_lost:
            wait_for_nobody()
        finish_writes(timeout=20.0)
        report_failure(self._reporter, ProcessFailedError.__name__, cause)

    @contextmanager
    def _evaluating(self) -> Iterator[Prepared]:
        with self._session() as (hardware, _):
            prepared = Prepared(hardware, self.model, None, self.config.compile, self.config.seed)
            if self.optimizer is not None:
                train_newest(self.optimizer)  # else what the model has no more would stay in memory
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
        may_shard: bool = False,
    ) -> MicroBatchLoader:
        """Return the micro-batches of a loader; a stream's are read by shards if that may be and is asked for."""

        def announce(name: str, num_micro_batches: int) -> None:
            self._announcer(hardware)(recut_message(name, num_micro_batches))

        layout = hardware.layout(self.config.num_micro_batches)
        is_fixed = self.config.num_micro_batches is not None or self.config.bitwise
        on_recut = None if is_fixed else functools.partial(report_recut or announce, name)
        may_be_pairs = self._objective.compute_loss is None
        pin_memory = hardware.device.type == "cuda"
        by_shards = may_shard and self.config.stream_by_shards
        if by_shards and name == "train_loader":
            check_by_shards(data_loader, name, layout.num_micro_batches)
        elif by_shards:
            by_shards = can_be_sharded(data_loader, layout.num_micro_batches)
        choices = self.config.seed, pin_memory, on_recut, may_be_pairs, by_shards
        loader = MicroBatchLoader(data_loader, layout, *choices)
        loader.check_same_everywhere(name)
        return loader
