"""A run that is interrupted and goes on is the run that was not: state, position, decisions."""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import accel_trainer.data.order as order
from accel_trainer import Callback, CheckpointError, History, StopTraining, Trainer
from accel_trainer.base.codec import pack, unpack
from accel_trainer.data.cut import Layout
from accel_trainer.data.micro_batches import MicroBatchLoader
from accel_trainer.storage.checkpoints import fault_of, steps_in
from support import assert_same, correct, loader_of, make_data, make_model, on_processes, quiet, summary

pytestmark = pytest.mark.usefixtures("drawn_once")

EVERY_STEP = {"checkpoint_every": 1, "keep_checkpoints": 100}


def linear(optimizer, num_steps):
    return lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=num_steps)


def fit(
    run_dir=None,
    kind="dropout",
    dtype=torch.float32,
    make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    scheduler=linear,
    loader=None,
    callbacks=(),
    model=None,
    data=None,
    loss_fn=None,
    **choices,
):
    """Train 2 epochs of 7 steps; return the summary of the run and its trainer."""
    model = model or make_model(dtype, kind)
    trainer = Trainer(
        model,
        make_optimizer(model.parameters()),
        loss_fn or nn.CrossEntropyLoss(),
        scheduler=scheduler,
        metrics={"accuracy": correct},
        callbacks=callbacks,
        config=quiet(**{"run_dir": run_dir, "restore_best": False, **choices}),
    )
    loader = loader_of(data or make_data(40, dtype), 6) if loader is None else loader
    history = trainer.fit(loader, loader_of(make_data(11, dtype), 4, shuffle=False))
    return summary(history, model), trainer


def same(one, other):
    """Return whether two summaries are equal to the last bit."""
    weights = [one.pop("weights"), other.pop("weights")]
    equal = one == other and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    one["weights"], other["weights"] = weights
    return equal


def only_up_to(step, source, target):
    """Copy a run folder as it was when this step was saved."""
    shutil.copytree(source, target, symlinks=True)
    for number, path in steps_in(target / "checkpoints"):
        if number > step:
            shutil.rmtree(path)


class Crash(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            raise InterruptedError("crash")


def crash(step, run_dir, **choices):
    with pytest.raises(InterruptedError):
        fit(run_dir, callbacks=[*choices.pop("callbacks", ()), Crash(step)], **choices)


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [{}, {"steps_per_epoch": 4, "num_epochs": 4}, {"kind": "batchnorm"}])
def test_resuming_from_every_step_gives_the_same_run(tmp_path, choices):
    expected, _ = fit(**choices, max_grad_norm=0.5)
    whole, _ = fit(tmp_path / "whole", **choices, max_grad_norm=0.5, **EVERY_STEP)
    assert same(whole, expected)
    last = 14 if "steps_per_epoch" not in choices else 16
    assert [step for step, _ in steps_in(tmp_path / "whole/checkpoints")] == list(range(last, 0, -1))
    for step in range(1, last + 1):
        only_up_to(step, tmp_path / "whole", tmp_path / str(step))
        resumed, trainer = fit(tmp_path / str(step), **choices, max_grad_norm=0.5, resume=True)
        assert same(resumed, expected), step
        assert trainer.state.step == last
        rows = [json.loads(line) for line in (tmp_path / str(step) / "history.jsonl").read_text().splitlines()]
        assert [row.get("epoch") for row in rows] == [*range(1, len(expected["train_losses"]) + 1), None]


def leg(run_dir, crash_at, choices):
    try:
        return fit(run_dir, callbacks=[Crash(crash_at)] if crash_at else (), **choices)[0]
    except InterruptedError:
        return None


@pytest.mark.distributed
@pytest.mark.parametrize("bitwise", [True, False])
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path, bitwise):
    fixed = {"kind": "plain"}
    if bitwise:
        fixed = {"num_micro_batches": 3, "kind": "batchnorm", "data": make_data(42, torch.float64)}
    choices = {"dtype": torch.float64, "bitwise": bitwise, "resume": "auto", "checkpoint_every": 1, **fixed}
    expected, _ = fit(tmp_path / "whole", **choices)
    for processes, crash_at in ((1, 3), (2, 6), (4, 10)):
        assert on_processes(processes, leg, tmp_path / "run", crash_at, choices) == [None] * processes
    for resumed in on_processes(1, leg, tmp_path / "run", None, choices):
        if bitwise:
            assert same(resumed, expected)
        assert_same(expected, resumed, torch.float64)
    for resumed in on_processes(2, leg, tmp_path / "run", None, choices):  # finished
        assert same(resumed, expected) or not bitwise
        assert resumed["train_losses"] == History.load(tmp_path / "run").train_losses


def test_more_epochs_and_steps_and_other_cuts_are_free(tmp_path, capsys):
    expected, _ = fit(scheduler=None, num_epochs=4, kind="plain", dtype=torch.float64)
    options = {"scheduler": None, "kind": "plain", "dtype": torch.float64, "resume": "auto"}
    fit(tmp_path / "run", max_steps=4, num_epochs=4, **options)
    fit(tmp_path / "run", max_steps=17, num_epochs=2, **options)
    fit(tmp_path / "run", num_epochs=3, num_micro_batches=2, **options)
    resumed, _ = fit(tmp_path / "run", num_epochs=4, num_micro_batches=5, verbose=True, **options)
    assert_same(expected, resumed, torch.float64)
    assert "Changed since the checkpoint: num_micro_batches 2 -> 5." in capsys.readouterr().out


def test_a_finished_run_returns_its_history_and_trains_nothing(tmp_path):
    class Nothing(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            raise AssertionError("trained")

    expected, _ = fit(tmp_path / "run", restore_best=True)
    before = (tmp_path / "run/history.jsonl").read_bytes()
    resumed, trainer = fit(tmp_path / "run", resume=True, loader=loader_of(Nothing(), 6), restore_best=True)
    assert same(resumed, expected) and trainer.history.stop_reason == "all 2 epochs done"
    assert (tmp_path / "run/history.jsonl").read_bytes() == before


def test_what_a_callback_has_ended_stays_ended(tmp_path):
    class Enough(Callback):
        def on_epoch_end(self, trainer):
            if trainer.state.epoch == 1:
                raise StopTraining("enough")

    expected, trainer = fit(tmp_path / "run", callbacks=[Enough()])
    resumed, again = fit(tmp_path / "run", resume="auto", num_epochs=5, scheduler=linear)
    assert (
        same(resumed, expected) and again.history.stop_reason == trainer.history.stop_reason == "enough after epoch 1"
    )


def test_auto_begins_anew_without_a_checkpoint_and_true_refuses(tmp_path):
    expected, _ = fit()
    with pytest.raises(FileNotFoundError, match="has no checkpoint to go on from"):
        fit(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    crash(9, tmp_path / "run", resume="auto", checkpoint_every=100)  # an epoch recorded, no checkpoint
    assert not (tmp_path / "run/checkpoints").exists() and History.load(tmp_path / "run").num_epochs == 1
    with pytest.raises(FileExistsError, match=r"holds another run, without a checkpoint \(seed differ"):
        fit(tmp_path / "run", resume="auto", seed=3)
    assert same(fit(tmp_path / "run", resume="auto")[0], expected)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"loader": loader_of(make_data(40), 5)}, "batch_size was 6 and is 5; num_batches was 7 and is 8"),
        (
            {"loader": loader_of(make_data(40), 6, shuffle=False)},
            "is 'BatchSampler of SequentialSampler'",
        ),
        ({"data": make_data(41)}, "length of train_loader's dataset was 40 and is 41"),
        ({"loss_fn": nn.MultiMarginLoss()}, "loss was 'CrossEntropyLoss' and is 'MultiMarginLoss'"),
        ({"model": nn.Linear(5, 3)}, "model was 'Sequential' and is 'Linear'"),
        (
            {"make_optimizer": lambda own: torch.optim.Adam(own, lr=0.02)},
            "optimizer was 'AdamW' and is 'Adam'; learning",
        ),
        (
            {"model": nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.ReLU(), nn.Linear(9, 3))},
            r"0.weight is \(8, 5\) in the",
        ),
        (
            {"monitor": "accuracy", "mode": "max"},
            "monitor was 'test_loss' and is 'accuracy'; mode was 'min' and is 'max'",
        ),
    ],
)
def test_another_run_is_refused_by_name_and_leaves_the_folder_alone(tmp_path, changes, named):
    fit(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=named):
        fit(tmp_path / "run", resume="auto", **changes)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after


def test_a_longer_run_makes_its_schedule_anew_and_says_so(tmp_path, capsys):
    fit(tmp_path / "run")
    resumed, _ = fit(tmp_path / "run", resume=True, num_epochs=4, verbose=True)
    longer, _ = fit(num_epochs=4)
    assert resumed["learning_rates"][2:] == longer["learning_rates"][2:]
    assert "The schedule was made for 14 steps and is now made for 28" in capsys.readouterr().out


# --- decisions --------------------------------------------------------------------------------------------------------


class Script(nn.Module):
    """A model whose test loss follows a script, epoch by epoch."""

    def __init__(self, losses):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.losses = torch.tensor([0.0, *losses])

    def forward(self, inputs):
        return (
            inputs[:, 0] * 0
            + self.weight
            + (0 if self.training else self.losses[round(float(self.weight))] - self.weight)
        )


def scripted(losses, run_dir, **choices):
    model = Script(losses)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = quiet(run_dir=run_dir, num_epochs=len(losses), **choices)
    trainer = Trainer(model, optimizer, compute_loss=lambda model, batch: climb(model, batch), config=config)
    history = trainer.fit(loader_of(make_data(4), 4), loader_of(make_data(4), 4))
    return history, trainer


def climb(model, batch):
    return -model(batch[0]).mean() if model.training else model(batch[0]).mean()


def test_best_and_patience_are_not_forgotten(tmp_path):
    losses = [0.5, 0.1, 0.5, 0.6, 0.7, 0.05]
    history, _ = scripted(losses, tmp_path / "run", max_steps=4, patience=3, resume="auto")
    assert history.num_epochs == 4 and history.best_epoch == 2
    history, trainer = scripted(losses, tmp_path / "run", patience=3, resume="auto")
    assert history.num_epochs == 5 and history.stop_reason == "no improvement of test_loss for 3 epochs"
    assert history.best_epoch == 2 and float(trainer.model.weight.detach()) == 2  # the best of before, restored


def test_going_back_goes_back_to_the_best_of_that_time(tmp_path):
    scripted([5, 4, 3, 2], tmp_path / "run", keep_checkpoints=4)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000004")
    state = tmp_path / "run/checkpoints/step_00000003/state.json"
    state.write_text(state.read_text()[:-30])
    with pytest.warns(UserWarning, match="Passed over in .*: step_00000003: state.json has .* bytes in place of"):
        history, trainer = scripted([5, 4, 9, 9], tmp_path / "run", resume=True)
    assert history.test_losses == [5, 4, 9, 9] and history.best_epoch == 2 and float(trainer.model.weight.detach()) == 2


def test_the_best_is_kept_and_steps_are_ordered_by_number(tmp_path):
    history, _ = scripted([5, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4], tmp_path / "run", keep_checkpoints=1)
    assert [path.name for _, path in steps_in(tmp_path / "run/checkpoints")] == ["step_00000011"]
    weights = torch.tensor(0.0)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run/best/model.safetensors")["weight"]
    assert float(weights) == 2
    best, kept = tmp_path / "run/best/model.safetensors", "best/model.safetensors"
    assert (tmp_path / "run/checkpoints/step_00000011" / kept).read_bytes() == best.read_bytes()


def test_the_best_is_on_the_disk_twice_and_no_more(tmp_path):
    scripted([5, 1, 2, 3], tmp_path / "run", keep_checkpoints=3)
    files = [path / "best/model.safetensors" for _, path in steps_in(tmp_path / "run/checkpoints")]
    assert len(files) == 3 and len({file.stat().st_ino for file in files}) == 1  # a link takes no room
    assert not files[0].samefile(tmp_path / "run/best/model.safetensors")
    scripted([5, 1, 2, 3, 4], tmp_path / "run", resume=True)
    (_, newest), *_ = steps_in(tmp_path / "run/checkpoints")
    assert not (newest / "best/model.safetensors").samefile(tmp_path / "run/best/model.safetensors")


# --- positions --------------------------------------------------------------------------------------------------------


class Counting(Dataset):
    """Write down each item that is read, from workers too."""

    def __init__(self, path, length=40):
        self.path, self.data = str(path), make_data(length)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        with open(self.path, "ab", buffering=0) as file:
            file.write(f"{index}\n".encode())
        return self.data[index]

    def counts(self):
        return Counter(map(int, Path(self.path).read_text().split())) if Path(self.path).exists() else Counter()


class Backwards(Sampler):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(torch.randperm(self.length).tolist())

    def __len__(self):
        return self.length


class Varying(Sampler):
    def __iter__(self):
        order = iter(torch.randperm(40).tolist())
        return iter([[next(order) for _ in range(size)] for size in (6, 3, 9, 6, 6, 5, 5)])

    def __len__(self):
        return 7


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["torch", "custom", "batches"])
def test_nothing_is_loaded_to_be_skipped_and_nothing_twice(tmp_path, workers, kind):
    def loader(data):
        if kind == "torch":
            return loader_of(data, 6, num_workers=workers)
        if kind == "custom":
            return DataLoader(data, 6, sampler=Backwards(40), num_workers=workers)
        return DataLoader(data, batch_sampler=Varying(), num_workers=workers)

    expected, _ = fit(loader=loader(make_data(40)))
    crash(11, tmp_path / "run", loader=loader(make_data(40)), checkpoint_every=1)
    data = Counting(tmp_path / "read")
    resumed, trainer = fit(tmp_path / "run", loader=loader(data), resume=True)
    assert same(resumed, expected)
    done = {"torch": 11 - 7, "custom": 11 - 7, "batches": 0}[kind] * 6 if kind != "batches" else 6 + 3 + 9 + 6
    # The crash came before step 11 could be saved: its checkpoint is that of step 10.
    done -= 6
    counts = data.counts()
    assert sum(counts.values()) == 40 - done and max(counts.values()) == 1


class Stream(IterableDataset):
    def __init__(self, log=None):
        self.log = log

    def __iter__(self):
        inputs, targets = make_data(40).tensors
        for index in torch.randperm(40).tolist():
            yield inputs[index], targets[index]


def test_a_stream_is_read_from_its_start_and_says_so(tmp_path, capsys):
    expected, _ = fit(loader=DataLoader(Stream(), 6), scheduler=None)
    crash(10, tmp_path / "run", loader=DataLoader(Stream(), 6), scheduler=None, checkpoint_every=1)
    resumed, _ = fit(tmp_path / "run", loader=DataLoader(Stream(), 6), scheduler=None, resume=True, verbose=True)
    assert same(resumed, expected)
    assert "train_loader is a stream: 2 batches are read to be passed over" in capsys.readouterr().out


def test_the_position_costs_nothing(monkeypatch):
    """No index of 10^7 samples is visited to come to the last of them; `benchmarks/checkpoint.py` has the seconds."""
    slices = []

    class Order:
        def __len__(self):
            return 10**7

        def __getitem__(self, part):
            slices.append(part)
            return torch.arange(part.start, min(part.stop, 10**7))

    monkeypatch.setattr(order, "_own_order", lambda sampler, seed: Order())
    data = torch.utils.data.TensorDataset(torch.zeros(10**7, 1, dtype=torch.uint8))
    feed = MicroBatchLoader(DataLoader(data, 32, shuffle=True), Layout(0, 1, 1), seed=0)
    last = 10**7 // 32 - 1
    assert next(feed.micro_batches(1, last)).batch.number == last
    assert slices == [slice(32 * last, 32 * last + 32, None)]


# --- every kind of state ----------------------------------------------------------------------------------------------


class Nested(torch.optim.SGD):
    """Keep a state of every kind that can be saved."""

    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            count = state.get("count", (0, 0.5))[0] + 1
            state["count"] = (count, 0.5)
            state["deep"] = {"a": [torch.full((2,), count, dtype=torch.int64), -float("inf")], 3: None}
            with torch.no_grad():
                parameter.add_(float(state["deep"]["a"][0][0]) * 1e-3)


def groups(kind):
    def make(parameters):
        first, *others = parameters
        return kind([{"params": [first], "lr": 0.003}, {"params": others}], lr=0.01)

    return make


OPTIMIZERS = {
    **{
        name: groups(getattr(torch.optim, name))
        for name in (
            *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"),
            *("Rprop", "SGD"),
        )
    },
    "Muon": lambda own: torch.optim.Muon([one for one in own if one.ndim == 2], lr=0.01),
    "amsgrad": lambda own: torch.optim.AdamW(own, lr=0.01, amsgrad=True),
    "momentum": lambda own: torch.optim.SGD(own, lr=0.01, momentum=0.9, nesterov=True),
    "centered": lambda own: torch.optim.RMSprop(own, lr=0.01, momentum=0.5, centered=True),
    "foreach": lambda own: torch.optim.AdamW(own, lr=0.01, foreach=True),
    "fused": lambda own: torch.optim.AdamW(own, lr=0.01, fused=True),
    "tensor lr": lambda own: torch.optim.AdamW(own, lr=torch.tensor(0.01), foreach=False),
    "nested": lambda own: Nested(own, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_comes_back(tmp_path, name):
    for dtype in (torch.float32, torch.float64):
        options = {"make_optimizer": OPTIMIZERS[name], "scheduler": None, "dtype": dtype, "kind": "plain"}
        run_dir = tmp_path / str(dtype)
        expected, straight = fit(**options)
        crash(9, run_dir, checkpoint_every=1, **options)
        resumed, trainer = fit(run_dir, resume=True, **options)
        assert same(resumed, expected), name
        for one, other in zip(straight.optimizer.state.values(), trainer.optimizer.state.values(), strict=True):
            assert pack(one, {}, "") == pack(other, {}, "")
            for key, value in one.items():
                if isinstance(value, torch.Tensor):
                    assert value.dtype == other[key].dtype and value.stride() == other[key].stride(), (name, key)


def test_the_state_of_a_sparse_optimizer_comes_back(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(20, 3, sparse=True)

        def forward(self, inputs):
            return self.table((inputs[:, 0].abs() * 5).long())

    def options():
        return {
            "make_optimizer": lambda own: torch.optim.SparseAdam(list(own), lr=0.01),
            "model": Words(),
            "scheduler": None,
        }

    expected, _ = fit(**options())
    crash(9, tmp_path / "run", checkpoint_every=1, **options())
    assert same(fit(tmp_path / "run", resume=True, **options())[0], expected)


def test_a_state_that_cannot_be_saved_is_refused_by_name(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.state[self.param_groups[0]["params"][0]]["odd"] = {"set": {1, 2}}

    with pytest.raises(TypeError, match="0.weight/odd/set is a set; only tensors, numbers, texts"):
        fit(tmp_path / "run", make_optimizer=lambda own: Odd(own, lr=0.1))


SCHEDULERS = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.5),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5, 5, 11], 0.5),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, 8),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 12),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 9),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4, 2),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=14),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 0.05, 5),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0),
    "Sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(optimizer, 9)],
        milestones=[5],
    ),
    "Chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("as_object", [False, True])
def test_the_state_of_every_scheduler_comes_back(tmp_path, name, as_object):
    def options():
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = (
            SCHEDULERS[name](optimizer) if as_object else lambda optimizer, num_steps: SCHEDULERS[name](optimizer)
        )
        return {"model": model, "make_optimizer": lambda own: optimizer, "scheduler": scheduler, "num_epochs": 2}

    expected, straight = fit(**options(), monitor="train_loss")
    crash(10, tmp_path / "run", checkpoint_every=1, **options(), monitor="train_loss")
    resumed, trainer = fit(tmp_path / "run", resume=True, **options(), monitor="train_loss")
    assert same(resumed, expected)
    assert trainer.state.step == straight.state.step == 14
    for one, other in zip(straight.optimizer.param_groups, trainer.optimizer.param_groups, strict=True):
        assert all(one[key] == other[key] for key in one if key != "params")


def test_callbacks_with_a_state_get_it_back(tmp_path):
    class Average(Callback):
        def __init__(self):
            self.weights, self.steps = torch.zeros(3), (0, float("inf"))

        def on_step_end(self, trainer):
            self.weights = 0.9 * self.weights + 0.1 * trainer.model[-1].bias.detach()
            self.steps = (self.steps[0] + 1, float("inf"))

        def state_dict(self):
            return {"weights": self.weights, "steps": self.steps}

        def load_state_dict(self, state):
            self.weights, self.steps = state["weights"], state["steps"]

    straight, first, second = Average(), Average(), Average()
    fit(callbacks=[straight])
    crash(9, tmp_path / "run", checkpoint_every=1, callbacks=[first])
    fit(tmp_path / "run", resume=True, callbacks=[second])
    assert torch.equal(straight.weights, second.weights) and straight.steps == second.steps == (14, float("inf"))
    with pytest.warns(UserWarning, match="has a state of callback .*Average 1, which this run does not have"):
        fit(tmp_path / "run", resume=True)


class Grown(nn.Module):
    """Non-persistent and frozen parts that change, views and strides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("mask", torch.full((2, 2), -float("inf")))
        self.one, self.two = nn.Linear(5, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight if False else nn.Parameter(torch.randn(3, 3).t())
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.two.weight
        self.two.bias.requires_grad_(False)

    def forward(self, inputs):
        if self.training:
            self.seen += 1
        return self.tied(self.two(self.one(inputs))) * (1 + self.seen / 100)


def test_buffers_of_every_kind_and_what_is_frozen_come_back(tmp_path):
    class Unfreeze(Callback):
        def on_epoch_start(self, trainer):
            if trainer.state.epoch == 2 and trainer.state.step == 7:
                trainer.model.two.bias.requires_grad_(True)

    def options():
        return {"model": Grown(), "make_optimizer": lambda own: torch.optim.SGD(own, lr=0.1), "callbacks": [Unfreeze()]}

    expected, _ = fit(**options())
    crash(10, tmp_path / "run", checkpoint_every=1, **options())
    resumed, trainer = fit(tmp_path / "run", resume=True, **options())
    assert same(resumed, expected) and trainer.model.two.bias.requires_grad and float(trainer.model.seen) == 14
    assert trainer.model.tied.weight is trainer.model.two.weight


class Unfilled(nn.Linear):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(5, 3)
        self.register_buffer("filled", None)
        self.register_buffer("table", None, persistent=False)
        self.register_buffer("wide", torch.ones(1).expand(3))

    def forward(self, inputs):
        if self.filled is None:
            self.filled, self.table = torch.ones(3), torch.ones(2)
        return super().forward(inputs) * self.filled * self.wide


def test_buffers_that_are_filled_later_or_repeat_come_back(tmp_path):
    expected, _ = fit(model=Unfilled())
    crash(9, tmp_path / "run", checkpoint_every=1, model=Unfilled())
    assert same(fit(tmp_path / "run", resume=True, model=Unfilled())[0], expected)


def test_an_extra_state_that_could_not_come_back_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return torch.tensor(3)

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="'_extra_state' is a copy made for state_dict"):
        fit(tmp_path / "run", model=Extra(5, 3))


def test_a_run_that_a_schedule_has_moved_goes_on_in_the_same_process(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    trainer = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        scheduler=scheduler,
        callbacks=[Crash(9)],
        config=quiet(run_dir=tmp_path / "run", num_epochs=3, resume="auto"),
    )
    with pytest.raises(InterruptedError):
        trainer.fit(loader_of(make_data(40), 6), loader_of(make_data(11), 4))
    trainer._callbacks.clear()
    assert trainer.fit(loader_of(make_data(40), 6), loader_of(make_data(11), 4)).num_epochs == 3


def test_a_number_found_by_running_out_of_memory_is_kept(tmp_path):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)

        def forward(self, inputs):
            if self.training and len(inputs) > 3:
                raise torch.OutOfMemoryError("out of memory")
            return self.norm(self.inner(inputs))

    crash(9, tmp_path / "run", checkpoint_every=1, model=Small())
    resumed, trainer = fit(tmp_path / "run", resume=True, model=Small())
    assert json.loads((tmp_path / "run/config.json").read_text())["resolved"]["num_micro_batches"] == 2
    assert same(resumed, fit(model=Small())[0])


# --- packing ----------------------------------------------------------------------------------------------------------


def test_plain_data_comes_back_as_it_was():
    import numpy

    value = {
        "numbers": [1, 2.5, -float("inf"), True, None, "text", 10**30],
        "tuple": (1, (2, [3])),
        "keys": {1: "a", (2, 3): "b", None: torch.ones(2)},
        "$odd": {"$tensor": 1},
        "counter": Counter([2, 2, 5]),
        "array": numpy.arange(3.0),
        "complex": torch.ones(2, dtype=torch.complex128),
        "none": torch.zeros(0, 2, dtype=torch.bool),
    }
    tensors = {}
    packed = json.loads(json.dumps(pack(value, tensors, "x")))
    back = unpack(packed, tensors)
    assert type(back["counter"]) is Counter and type(back["tuple"][1]) is tuple
    assert torch.equal(back["complex"], value["complex"]) and (back["array"] == value["array"]).all()
    for name in ("numbers", "tuple", "$odd", "counter"):
        assert back[name] == value[name]
    assert list(back["keys"]) == [1, (2, 3), None] and back["none"].shape == (0, 2)
    for odd in ({1, 2}, object(), b"bytes", torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match="x/odd"):
            pack({"odd": odd}, {}, "x")


def test_every_checkpoint_loads_without_pickle(tmp_path, monkeypatch):
    import pickle

    fit(tmp_path / "run")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not content.startswith((b"PK", b"\x80")), path
    monkeypatch.undo()
    resumed, _ = fit(tmp_path / "run", resume=True)
    assert resumed["best_epoch"] is not None and sys.modules and os.getpid()
    assert all(fault_of(path) is None for _, path in steps_in(tmp_path / "run/checkpoints"))
