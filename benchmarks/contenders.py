"""One function per contender of `peers.py`.

Each trains a task as its own documentation begins, and returns the last test loss. Progress bars, checkpoints, loggers
and summaries are off. What a contender needs is imported when it is called.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from workloads import Task

HAND, LIMIT, OURS, DDP = "hand-written loop", "whole-batch slices", "accel_trainer", "hand-written DDP"
Batches = Iterable[Any]


def pair(batch: Any) -> tuple[Tensor, Tensor]:
    return (batch["inputs"], batch["labels"]) if isinstance(batch, dict) else batch


# --- by hand ----------------------------------------------------------------------------------------------------------


def tutorial_loop(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Batches,
    test: Batches,
    *,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    autocast: AbstractContextManager[Any] | None = None,
    device: torch.device | None = None,
    reduce: Callable[[Tensor], Any] = lambda total: None,
) -> float:
    """Train and test, epoch by epoch, and keep the best weights; losses are read once per pass."""
    autocast = autocast or nullcontext()

    def loss_of(batch: Any) -> tuple[Tensor, int]:
        inputs, targets = pair(batch)
        if device is not None:
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast:
            return task.loss_fn(model(inputs), targets), len(targets)

    train_losses, test_losses, best_state = [], [], {}
    for epoch in range(task.num_epochs):
        if isinstance(getattr(train, "sampler", None), DistributedSampler):
            train.sampler.set_epoch(epoch)
        model.train()
        total = torch.zeros((), device=task.device)
        for batch in train:
            optimizer.zero_grad()
            loss, size = loss_of(batch)
            backward(loss)
            optimizer.step()
            total += loss.detach() * size
        reduce(total)
        train_losses.append(total.item() / len(task.train))

        model.eval()
        total = torch.zeros((), device=task.device)
        with torch.no_grad():
            for batch in test:
                loss, size = loss_of(batch)
                total += loss * size
        reduce(total)
        test_losses.append(total.item() / len(task.test))
        if test_losses[-1] < min(test_losses[:-1], default=math.inf):
            best_state = copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return test_losses[-1]


def hand_written(task: Task) -> float:
    how: dict[str, Any] = {"autocast": task.autocast(), "device": task.device}
    return tutorial_loop(task, task.compiled_model(), task.optimizer, *task.loaders(), **how)


class Slices:
    """A loader that takes whole batches from tensors."""

    def __init__(self, data: Any, task: Task, shuffle: bool) -> None:
        whole = data.tensors if hasattr(data, "tensors") else (data["inputs"][:], data["labels"][:])
        self.inputs, self.targets = (tensor.to(task.device) for tensor in whole)
        self.batch_size, self.shuffle = task.batch_size, shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = (torch.randperm if self.shuffle else torch.arange)(len(self.targets), device=self.targets.device)
        return ((self.inputs[rows], self.targets[rows]) for rows in order.split(self.batch_size))


def whole_slices(task: Task) -> float:
    slices = Slices(task.train, task, shuffle=True), Slices(task.test, task, shuffle=False)
    return tutorial_loop(task, task.compiled_model(), task.optimizer, *slices, autocast=task.autocast())


def hand_written_ddp(task: Task) -> float:
    """Each process takes its share of every batch."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")

    def loader(data: Any, shuffle: bool) -> DataLoader[Any]:
        share = task.batch_size // distributed.get_world_size()
        sampler = DistributedSampler(data, shuffle=shuffle, seed=torch.initial_seed())
        return DataLoader(data, share, sampler=sampler, **task.workers)

    model = nn.parallel.DistributedDataParallel(task.model)
    task.kept = [loader(task.train, shuffle=True), loader(task.test, shuffle=False)]
    return tutorial_loop(task, model, task.optimizer, *task.kept, device=task.device, reduce=distributed.all_reduce)


# --- by others --------------------------------------------------------------------------------------------------------


def ours(task: Task) -> float:
    from accel_trainer import TrainConfig, Trainer

    choices: dict[str, Any] = {"mixed_precision": "bf16"} if task.bf16 else {}
    choices |= {"compile": True} if task.compiled else {}
    config = TrainConfig(num_epochs=task.num_epochs, verbose=False, **choices)
    return Trainer(task.model, task.optimizer, task.loss_fn, config=config).fit(*task.loaders()).test_losses[-1]


def bare_accelerate(task: Task) -> float:
    from accelerate import Accelerator

    choices: dict[str, Any] = {"mixed_precision": "bf16"} if task.bf16 else {}
    choices |= {"dynamo_backend": "inductor"} if task.compiled else {}
    accelerator = Accelerator(**choices)
    prepared = accelerator.prepare(task.model, task.optimizer, *task.loaders())
    return tutorial_loop(task, *prepared, backward=accelerator.backward)


def fabric(task: Task) -> float:
    from lightning import Fabric

    fabric = Fabric(accelerator="auto", devices=1, precision="bf16-mixed" if task.bf16 else "32-true")
    fabric.launch()
    model, optimizer = fabric.setup(task.compiled_model(), task.optimizer)
    return tutorial_loop(task, model, optimizer, *fabric.setup_dataloaders(*task.loaders()), backward=fabric.backward)


def lightning_trainer(task: Task) -> float:
    import lightning

    class Module(lightning.LightningModule):
        """The model with its loss and optimizer."""

        def __init__(self) -> None:
            super().__init__()
            self.model = task.compiled_model()

        def loss_of(self, batch: Any) -> Tensor:
            """Return the mean loss of a batch."""
            inputs, targets = pair(batch)
            return task.loss_fn(self.model(inputs), targets)

        def training_step(self, batch: Any, index: int) -> Tensor:
            """Return the loss to be minimised."""
            loss = self.loss_of(batch)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            """Report the loss."""
            self.log("test_loss", self.loss_of(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """Return the optimizer."""
            return task.optimizer

    trainer = lightning.Trainer(
        max_epochs=task.num_epochs,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if task.bf16 else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Module(), *task.loaders())
    return float(trainer.callback_metrics["test_loss"])


class WithLoss(nn.Module):
    """A model as the Trainer of transformers wants it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.loss_fn = task.model, task.loss_fn

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and outputs."""
        outputs = self.model(inputs)
        return {"loss": self.loss_fn(outputs, labels), "logits": outputs}


def transformers_trainer(task: Task) -> float:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=f"{tempfile.gettempdir()}/transformers_trainer",
        num_train_epochs=task.num_epochs,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=task.batch_size,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        bf16=task.bf16,
        torch_compile=task.compiled,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=task.num_workers,
        dataloader_persistent_workers=task.num_workers > 0,
    )
    columns = getattr(task.train, "column_names", None)  # without them the rows are tuples
    trainer = Trainer(
        WithLoss(task),
        arguments,
        data_collator=None
        if columns
        else lambda rows: dict(zip(("inputs", "labels"), default_collate(rows), strict=True)),
        train_dataset=task.train,
        eval_dataset=task.test,
        optimizers=(task.optimizer, None),
    )
    trainer.train()
    return [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line][-1]


def pytorch_accelerated(task: Task) -> float:
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.callbacks import MoveModulesToDeviceCallback, TerminateOnNaNCallback

    class PairTrainer(Trainer):
        """Takes dictionaries too."""

        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            """Return loss and outputs of a train batch."""
            return super().calculate_train_batch_loss(pair(batch))

        def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
            """Return loss and outputs of a test batch."""
            return super().calculate_eval_batch_loss(pair(batch))

    callbacks = (MoveModulesToDeviceCallback, TerminateOnNaNCallback)
    trainer = PairTrainer(task.model, task.loss_fn, task.optimizer, callbacks=callbacks)
    trainer.train(
        train_dataset=task.train,
        num_epochs=task.num_epochs,
        eval_dataset=task.test,
        per_device_batch_size=task.batch_size,
        train_dataloader_kwargs=task.workers,
        eval_dataloader_kwargs=task.workers,
    )
    return trainer.run_history.get_latest_metric("eval_loss_epoch")


def ignite_engine(task: Task) -> float:
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Loss
    from ignite.utils import convert_tensor

    def prepare_batch(batch: Any, device: Any, non_blocking: bool) -> Any:
        return convert_tensor(pair(batch), device=device, non_blocking=non_blocking)

    train_loader, test_loader = task.loaders()
    how = {"device": task.device, "prepare_batch": prepare_batch}
    trainer = create_supervised_trainer(task.model, task.optimizer, task.loss_fn, **how)
    evaluator = create_supervised_evaluator(task.model, metrics={"loss": Loss(task.loss_fn)}, **how)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(test_loader))
    trainer.run(train_loader, max_epochs=task.num_epochs)
    return evaluator.state.metrics["loss"]


class PairRows(Dataset[Any]):
    """Rows of a table as skorch wants them: inputs and target."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [pair(row) for row in self.table.__getitems__(rows)]


def skorch_net(task: Task) -> float:
    from skorch import NeuralNet
    from skorch.helper import predefined_split

    are_tables = hasattr(task.train, "column_names")
    train, test = (PairRows(data) if are_tables else data for data in (task.train, task.test))
    net = NeuralNet(
        task.model,
        criterion=task.loss_fn,
        optimizer=task.workload.optimizer,
        batch_size=task.batch_size,
        max_epochs=task.num_epochs,
        train_split=predefined_split(test),
        callbacks__print_log=None,
        iterator_train__shuffle=True,
        device=task.device,
        **{f"optimizer__{name}": value for name, value in task.workload.settings.items()},
        **{f"iterator_{part}__{name}": value for part in ("train", "valid") for name, value in task.workers.items()},
    )
    net.fit(train, y=None)
    return net.history[-1, "valid_loss"]


CONTENDERS: dict[str, Callable[[Task], float]] = {
    HAND: hand_written,
    LIMIT: whole_slices,
    OURS: ours,
    "bare Accelerate": bare_accelerate,
    "Lightning Fabric": fabric,
    "Lightning Trainer": lightning_trainer,
    "transformers Trainer": transformers_trainer,
    "pytorch-accelerated": pytorch_accelerated,
    "Ignite": ignite_engine,
    "skorch": skorch_net,
    DDP: hand_written_ddp,
}
PEERS = {  # contender -> distribution
    "bare Accelerate": "accelerate",
    "Lightning Fabric": "lightning",
    "Lightning Trainer": "lightning",
    "transformers Trainer": "transformers",
    "pytorch-accelerated": "pytorch-accelerated",
    "Ignite": "pytorch-ignite",
    "skorch": "skorch",
}
ON_GPU = (HAND, OURS, "bare Accelerate", "Lightning Fabric", "Lightning Trainer", "transformers Trainer")
IN_GROUPS = (DDP, OURS)
