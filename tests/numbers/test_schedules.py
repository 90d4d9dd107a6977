"""The learning rate follows real updates, whatever the layout."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import Callback, Trainer
from support import loader_of, make_data, on_processes, quiet

SCHEDULERS = {
    "step": (lambda optimizer: lr_scheduler.StepLR(optimizer, 5, gamma=0.5), "step"),
    "epoch": (lambda optimizer: lr_scheduler.StepLR(optimizer, 1, gamma=0.5), "epoch"),
    "plateau": (lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=2), "step"),
}


class Rates(Callback):
    """Note the learning rate after each step (of the next update) and after each epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_step_end(self, trainer):
        self.steps.append(trainer.optimizer.param_groups[0]["lr"])

    def on_epoch_end(self, trainer):
        self.epochs.append(trainer.optimizer.param_groups[0]["lr"])


def constant(model, batch):
    return (1.0 + 0 * model(batch[0])).mean()


def rates(name, num_micro_batches, **choices):
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    watch = Rates()
    if name == "factory":
        every = "step"

        def scheduler(optimizer, num_steps):
            return lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=num_steps)
    else:
        make, every = SCHEDULERS[name]
        scheduler = make(optimizer)
    config = quiet(
        **{"num_epochs": 6, "num_micro_batches": num_micro_batches, "schedule_every": every, **choices},
    )
    trainer = Trainer(model, optimizer, scheduler=scheduler, compute_loss=constant, callbacks=[watch], config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about a schedule that steps before its optimizer
        history = trainer.fit(loader_of(make_data(37), 6), loader_of(make_data(5)))
    return watch.steps, watch.epochs, history.learning_rates


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*SCHEDULERS, "factory"])
def test_the_learning_rates_are_those_of_one_process(name):
    expected = rates(name, None)
    assert len(expected[0]) == 42
    for num_processes in (1, 2, 4):
        for num_micro_batches in (None, 3):
            for result in on_processes(num_processes, rates, name, num_micro_batches):
                assert result == expected


def test_a_step_schedule_counts_steps_and_an_epoch_schedule_epochs():
    steps, _, learning_rates = rates("step", None)
    assert steps == [0.5 ** ((step + 1) // 5) for step in range(42)]
    assert learning_rates == [0.5 ** ((step - 1) // 5) for step in (7, 14, 21, 28, 35, 42)]  # of the last update
    steps, epochs, learning_rates = rates("epoch", None)
    assert epochs == [0.5**epoch for epoch in range(1, 7)]
    assert learning_rates == [0.5**epoch for epoch in range(6)]


def test_plateau_takes_one_look_an_epoch():
    _, epochs, _ = rates("plateau", None)
    assert epochs == [1.0, 1.0, 1.0, 0.1, 0.1, 0.1]  # patience 2: the third epoch without improvement is the fourth


@pytest.mark.parametrize("choices", [{}, dict(max_steps=20), dict(steps_per_epoch=4)])
def test_a_factory_gets_the_exact_number_of_steps(choices):
    steps, _, learning_rates = rates("factory", None, **choices)
    assert len(steps) == choices.get("max_steps", 24 if "steps_per_epoch" in choices else 42)
    assert learning_rates[-1] == pytest.approx(4e-6)  # the last update is made at the end value of the schedule


def test_a_factory_with_epochs_gets_their_number():
    seen = []

    def scheduler(optimizer, total):
        seen.append(total)
        return lr_scheduler.LinearLR(optimizer, total_iters=total)

    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = quiet(num_epochs=3, schedule_every="epoch")
    Trainer(model, optimizer, scheduler=scheduler, compute_loss=constant, config=config).fit(loader_of(make_data(8)))
    assert seen == [3]


def test_a_factory_without_a_number_of_steps_is_refused():
    class Unsized:
        def __iter__(self):
            return iter([[0, 1]])

    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(make_data(8), batch_sampler=Unsized())
    trainer = Trainer(
        model, optimizer, scheduler=lambda o, n: lr_scheduler.StepLR(o, n), compute_loss=constant, config=quiet()
    )
    with pytest.raises(ValueError, match="train loader has no length: set max_steps, or steps_per_epoch"):
        trainer.fit(loader)


def test_a_schedule_that_ends_early_stays_and_warns_once():
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=5)
    trainer = Trainer(model, optimizer, scheduler=scheduler, compute_loss=constant, config=quiet())
    with pytest.warns(UserWarning, match="The schedule has ended") as caught:
        history = trainer.fit(loader_of(make_data(40), 4))
    assert len(caught) == 1 and history.num_epochs == 2


class Overflow(torch.autograd.Function):
    """Let the gradient overflow where the batch says so."""

    @staticmethod
    def forward(context, outputs, overflows):
        context.overflows = bool(overflows)
        return outputs.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * (float("inf") if context.overflows else 1.0), None


def test_an_update_skipped_for_overflow_is_no_step():
    """A gradient scaler for the CPU in the place of that of fp16 on a GPU."""

    def make_accelerator():
        accelerator = Accelerator()
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    overflows = torch.zeros(8, 1)
    overflows[[1, 5]] = 1
    data = TensorDataset(torch.ones(8, 5), overflows)

    def compute_loss(model, batch):
        return Overflow.apply(model(batch[0]), batch[1].any()).mean()

    model = nn.Linear(5, 3, bias=False)
    weights = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler, watch = lr_scheduler.StepLR(optimizer, 1, gamma=0.5), Rates()
    trainer = Trainer(
        model,
        optimizer,
        scheduler=scheduler,
        compute_loss=compute_loss,
        callbacks=[watch],
        config=quiet(num_epochs=1, restore_best=False, max_grad_norm=1e6),
        accelerator=make_accelerator,
    )
    trainer.fit(DataLoader(data))
    assert trainer.state.step == 6 and trainer.state.num_batches == 8
    assert watch.steps == [0.5**step for step in range(1, 7)]
    updates = sum(0.5**step for step in range(6))
    torch.testing.assert_close(model.weight, weights - updates / 3)


def test_a_second_run_of_a_factory_begins_where_the_first_began():
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(
        model,
        optimizer,
        scheduler=lambda optimizer, num_steps: lr_scheduler.CosineAnnealingLR(optimizer, num_steps),
        compute_loss=constant,
        config=quiet(),
    )
    loader = loader_of(make_data(37), 6)
    assert trainer.fit(loader).learning_rates == trainer.fit(loader).learning_rates
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = 0.1  # the user's word stands
    assert trainer.fit(loader).learning_rates[0] < 0.1


def test_an_error_of_a_scheduler_is_an_error():
    def explode(step):
        if step > 3:
            raise ValueError("math domain error")
        return 1.0

    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, explode)
    trainer = Trainer(model, optimizer, scheduler=scheduler, compute_loss=constant, config=quiet())
    with pytest.raises(ValueError, match="math domain error"):
        trainer.fit(loader_of(make_data(37), 6))


def test_what_is_no_scheduler_is_refused():
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(TypeError, match="scheduler is the class StepLR; give StepLR"):
        Trainer(model, optimizer, scheduler=lr_scheduler.StepLR, compute_loss=constant)
    trainer = Trainer(
        model, optimizer, scheduler=lambda optimizer, num_steps: None, compute_loss=constant, config=quiet()
    )
    with pytest.raises(TypeError, match="must return a torch scheduler, got None"):
        trainer.fit(loader_of(make_data(37), 6))
