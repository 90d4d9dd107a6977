"""The two functions of the tutorials: `train_model` and `evaluate_model`."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .base.tracebacks import ends_in_users_lines
from .callbacks import Callbacks
from .config import TrainConfig
from .data.micro_batches import MicroBatchLoader
from .data.order import check_loader
from .data.sources import TensorSource
from .devices.checks import check_model, check_optimizer
from .devices.hardware import Hardware
from .devices.memory import keep_data
from .devices.prepared import Prepared
from .devices.stopping import Stopping
from .evaluation import evaluate, training_mode
from .loop import train_epoch
from .numbers.means import MeanProbe
from .numbers.metrics import Metrics
from .numbers.objective import Objective
from .run import Training, make_training, together
from .state import TrainState
from .view.screen import recut_message, say


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
        self.kept: WeakKeyDictionary[DataLoader[Any], TensorSource] = WeakKeyDictionary()
        self.training: Training | None = None
        self._evaluating: Prepared | None = None
        _sessions.add(self)
        self._say(self.hardware.describe())

    def __reduce__(self) -> Any:
        return type(None), ()

    def end(self) -> None:
        """Let go of what holds on to the group of processes."""
        self.training = self._evaluating = None

    def loader(self, data_loader: DataLoader[Any], name: str) -> MicroBatchLoader:
        """Return the micro-batches of a loader."""
        check_loader(data_loader, name)

        def on_recut(num_micro_batches: int) -> None:
            self.layouts[name] = self.layouts[name]._replace(num_micro_batches=num_micro_batches)
            self._say(recut_message(name, num_micro_batches))

        pin_memory = self.hardware.device.type == "cuda"
        loader = MicroBatchLoader(data_loader, self.layouts[name], self.config.seed, pin_memory, on_recut)
        is_new, is_table = data_loader not in self.epochs, loader.source is not None and not loader.source.in_memory
        if is_new:
            loader.check_same_everywhere(name)
            self.epochs[data_loader] = 0
        if data_loader in self.kept:
            loader.use_source(self.kept[data_loader])
            return loader
        message = keep_data(loader, self.hardware, self.config.data_in_memory, name)
        if message is not None and is_new:
            self._say(message)
        if message is not None and is_table:  # whose values never change
            self.kept[data_loader] = loader.source  # type: ignore[assignment]
        return loader

    def _say(self, text: str) -> None:
        if self.hardware.is_main:
            say(text)

    def train(self, model: nn.Module, loss_fn: Any, optimizer: Optimizer, loader: MicroBatchLoader) -> Training:
        """Return what trains this model with this loss and optimizer."""
        old = self.training
        if old is not None and old.prepared.optimizer is optimizer and old.objective.loss_fn is loss_fn:
            old.use_loader(loader)
            return old
        check_optimizer(optimizer, model)
        is_prepared = old is not None and old.prepared.optimizer is optimizer
        prepared = old.prepared if old and is_prepared else Prepared(self.hardware, model, optimizer)
        state = old.state if old else TrainState()
        parts = prepared, Objective(loss_fn), None, Stopping(None), Callbacks(), state, loader
        self.training = make_training(self.config, *parts)
        return self.training

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


@ends_in_users_lines
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
    with together(hardware):
        loader = session.loader(train_loader, "train_loader")
        training = session.train(model, loss_fn, optimizer, loader)
        session.epochs[train_loader] += 1
        training.count_epoch()
        with training_mode(model), training.prepared.attached():
            totals = train_epoch(training, loader.micro_batches(session.epochs[train_loader]))
        training.end_epoch()
    return math.nan if totals is None else totals.loss


@ends_in_users_lines
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
    with together(hardware):
        loader = session.loader(test_loader, "test_loader")
        prepared, objective = session.evaluating(model), Objective(loss_fn)
        prepared.put_optimizer("eval")
        objective.to(hardware.device)
        with prepared.attached():
            return evaluate(prepared, objective, loader, Metrics(None), probe=session.probe)["loss"]  # type: ignore[index]
