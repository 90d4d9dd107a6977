"""The parts of a run, put together once; `loop` puts them in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .base.clock import Clock
from .base.console import warn
from .callbacks import Callbacks
from .config import TrainConfig
from .data.micro_batches import MicroBatchLoader
from .data.randomness import draws_nothing, generators_kept
from .devices.alike import check_alike, plain_settings
from .devices.arithmetic import fixed_arithmetic
from .devices.board import shared_failure
from .devices.checks import foreign_parameters
from .devices.compiled import num_compilations
from .devices.hardware import Hardware
from .devices.memory import TrainingMemory
from .devices.prepared import Prepared
from .devices.stopping import Stopping
from .history import History
from .numbers.buffers import Buffers
from .numbers.finite import FiniteCheck
from .numbers.gradients import LocalGradients, OverlappedGradients, SummedGradients, TreeGradients
from .numbers.loss_table import LossTable, MeanNorm
from .numbers.means import MeanProbe
from .numbers.metrics import Metrics
from .numbers.objective import Objective
from .numbers.reductions import ChainSum, TreeSum, check_same_weights, share_from_main
from .numbers.schedules import Schedule
from .numbers.sharded_gradients import ShardedGradients, ShardedTreeGradients
from .state import TrainState

if TYPE_CHECKING:  # what keeps and tells of a run stands above it
    from .storage.run_folder import RunFolder
    from .storage.saver import Saver
    from .view.reporter import Reporter


@dataclass
class Training:
    """The parts that make optimizer steps.

    Attributes:
        losses: Of the epoch under way ...
        norms: ... and the gradient's norms, before clipping.
        schedule: `None` without a scheduler.
        joined: Model and loss compiled as one; `None` where they are called one after the other.
        saver: What saves within an epoch; `None` if nothing does.
        probe: Looks whether the loss is a mean; `None` to leave that out.
        weight_is_num_samples: Whether each sample weighs the same, so that all processes know the weight of a batch.
        draws_nothing: Whether no code runs in a step that may draw at random: then nothing needs a seed.
        num_changes: Changes of the data in memory that were looked at.
        num_gone: Parameters of the optimizer that have left the model.
        num_graphs_before: Graphs that the process had compiled before the run.
    """

    config: TrainConfig
    hardware: Hardware
    prepared: Prepared
    objective: Objective
    gradients: LocalGradients | TreeGradients
    buffers: Buffers
    memory: TrainingMemory
    finite: FiniteCheck
    schedule: Schedule | None
    stopping: Stopping
    callbacks: Callbacks
    state: TrainState
    loader: MicroBatchLoader
    losses: LossTable
    clock: Clock
    norms: MeanNorm = field(default_factory=MeanNorm)
    joined: Callable[..., Tensor] | None = None
    saver: Saver | None = None
    probe: MeanProbe | None = None
    weight_is_num_samples: bool = False
    draws_nothing: bool = False
    num_changes: int = 0
    num_gone: int = 0
    num_graphs_before: int = field(default_factory=num_compilations)

    def use_loader(self, loader: MicroBatchLoader) -> None:
        """Take the batches of this loader from here on."""
        self.loader = loader
        self.memory.use_loader(loader)

    def count_epoch(self) -> None:
        """Count the next epoch, and begin its means."""
        self.state.start_epoch()
        self.losses.restart()
        self.norms = MeanNorm()

    def start_epoch(self) -> None:
        """Take in what may have changed since the last epoch; all processes call it together."""
        self._warn_of_gone_parameters()
        self.prepared.put_optimizer("train")
        if self.prepared.is_divided:  # else weights that differ are found at the end of the epoch
            check_alike(plain_settings(self.prepared.optimizer))  # type: ignore[arg-type]
        self.loader.refresh()
        self.num_changes = self.loader.num_changes
        is_even = self._is_evenly_weighted()
        if self.objective.may_leave_out:
            is_even = not self.hardware.any_process(not is_even)[0]
        self.weight_is_num_samples = is_even
        others = (*self.objective.functions, self.prepared.optimizer)
        self.draws_nothing = not self.callbacks.may_draw and draws_nothing(self.prepared.user_model, *others)
        self.gradients.start_epoch()
        self.buffers.start_epoch()

    def end_epoch(self) -> None:
        """Give all processes the same buffers, and find weights that differ; all processes call it together."""
        self.buffers.share()
        shards = self.prepared.shards
        if self.hardware.num_processes > 1 and (shards is None or shards.replicas is not None):
            check_same_weights(self.prepared.user_model, None if shards is None else shards.replicas)

    def _is_evenly_weighted(self) -> bool:
        return self.objective.weighs_evenly(self.loader.source, self.loader.may_hold_others)

    def _warn_of_gone_parameters(self) -> None:
        """Warn of parameters that have left the model: what has come in their place is not trained."""
        optimizer: Any = self.prepared.optimizer
        num_gone = len(foreign_parameters(optimizer, self.prepared.user_model))
        if num_gone > self.num_gone and self.hardware.is_main:
            warn(
                f"The model has changed: {num_gone} of the optimizer's parameters are no part of it any more. What has "
                "come in their place is trained only if it is given to the optimizer (add_param_group)."
            )
        self.num_gone = num_gone

    def check_changed_targets(self) -> None:
        """Refuse data that was changed within an epoch so that its samples do not weigh the same any more.

        Raises:
            RuntimeError: It holds targets now that the loss leaves out.
        """
        self.num_changes = self.loader.num_changes
        if self.weight_is_num_samples and not self._is_evenly_weighted():
            raise RuntimeError(
                "Targets that the loss leaves out (ignore_index) have come into train_loader within an epoch. Change "
                "them between epochs, or give weight_fn."
            )


@dataclass
class Run:
    """The parts that make epochs out of steps.

    Attributes:
        folder: Where the run is kept, on the main process; `None` if it is not.
        test_loaders: What is evaluated after each epoch, by name; a single one has an empty name.
        monitor: Name of the value that does.
        mode: Whether less (`min`) or more (`max`) of it is better.
        announce: Prints a line, on the main process and if the user wants to read any.
    """

    training: Training
    test_loaders: Mapping[str, MicroBatchLoader]
    metrics: Metrics
    history: History
    folder: RunFolder | None
    saver: Saver
    reporter: Reporter
    probe: MeanProbe
    monitor: str
    mode: str
    announce: Callable[[str], None]


@contextmanager
def together(
    hardware: Hardware,
    bitwise: bool = False,
    num_threads: int | None = None,
    before_leaving: Callable[[str, bool], object] = lambda cause, is_lost: None,
    heartbeat_seconds: float = 30.0,
) -> Iterator[Any]:
    """Let the processes share a failure, compute alike, and leave generators and settings as they were.

    `before_leaving` is called before a process is ended because another has failed, with the cause, and whether that
    one is lost. Yields where the processes agree on a stop; `None` with one process.
    """
    with (
        shared_failure(hardware.process, hardware.num_processes, before_leaving, heartbeat_seconds) as votes,
        fixed_arithmetic(bitwise, num_threads),
        generators_kept(*hardware.generators),
    ):
        yield votes


def make_training(
    config: TrainConfig,
    prepared: Prepared,
    objective: Objective,
    schedule: Schedule | None,
    stopping: Stopping,
    callbacks: Callbacks,
    state: TrainState,
    loader: MicroBatchLoader,
    saver: Saver | None = None,
    probe: MeanProbe | None = None,
) -> Training:
    """Put together what makes optimizer steps."""
    hardware, model, layout = prepared.hardware, prepared.user_model, loader.layout
    objective.to(hardware.device)
    if hardware.num_processes > 1:
        share_from_main(buffer for loss in objective.modules for buffer in loss.buffers())
    form = objective.form
    changes = TreeSum(layout) if config.bitwise else ChainSum(layout)
    return Training(
        config=config,
        hardware=hardware,
        prepared=prepared,
        objective=objective,
        gradients=_gradients_of(config, prepared, loader),
        buffers=Buffers([model, *objective.modules], changes, hardware.num_processes, hardware.any_process),
        memory=TrainingMemory(hardware, loader),
        finite=FiniteCheck(model, config.on_nonfinite, is_divided=prepared.is_divided),
        schedule=schedule,
        stopping=stopping,
        callbacks=callbacks,
        state=state,
        loader=loader,
        losses=LossTable(
            hardware.device, has_scalars=objective.compute_loss is not None, copies=prepared.copies_losses
        ),
        clock=Clock(),
        joined=prepared.joined(objective.loss_fn, form) if form is not None else None,  # type: ignore[arg-type]
        saver=saver,
        probe=probe,
    )


def _gradients_of(config: TrainConfig, prepared: Prepared, loader: MicroBatchLoader) -> LocalGradients | TreeGradients:
    model, accelerator, copies = prepared.user_model, prepared.hardware.accelerator, prepared.reuses_memory
    if prepared.shards is not None:
        if config.bitwise:
            return ShardedTreeGradients(model, accelerator, prepared.shards, loader.layout)
        return ShardedGradients(model, accelerator, prepared.shards, config.find_unused_parameters)
    if config.bitwise:
        return TreeGradients(model, accelerator, copies, loader.layout, prepared.is_compiled)
    if loader.layout.num_processes == 1:
        return LocalGradients(model, accelerator, copies)
    kind = SummedGradients if config.find_unused_parameters else OverlappedGradients
    return kind(model, accelerator, copies, prepared.model)
