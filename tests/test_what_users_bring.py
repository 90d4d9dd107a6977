"""Optimizers, data sets, models and callbacks of other libraries: taken by their documented interface, or refused."""

import copy
import math
import warnings
from functools import partial

import datasets
import numpy
import pytest
import torch
import torch.nn.functional as F
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
)

from accel_trainer import Callback, CheckpointError, StopTraining, Trainer, evaluate_model, train_model
from support import correct, loader_of, make_data, make_model, on_processes, quiet

# --- optimizers -------------------------------------------------------------------------------------------------------


class Averaging(torch.optim.Optimizer):
    """SGD whose weights in evaluation are their mean so far, by the interface of schedule-free optimizers."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr, "num_steps": 0, "train_mode": False})

    @torch.no_grad()
    def _swap(self, mode):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for parameter in group["params"]:
                    if "other" in self.state[parameter]:
                        kept = parameter.clone()
                        parameter.copy_(self.state[parameter]["other"])
                        self.state[parameter]["other"].copy_(kept)
            group["train_mode"] = mode

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["num_steps"] += 1
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["lr"])
                mean = self.state[parameter].setdefault("other", parameter.clone())
                mean.lerp_(parameter, 1 / group["num_steps"])


def averaged_by_hand(num_epochs):
    model = make_model()
    optimizer, losses = Averaging(model.parameters()), []
    for _ in range(num_epochs):
        optimizer.train()
        for inputs, targets in loader_of(make_data(24), 8, shuffle=False):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        optimizer.eval()
        inputs, targets = make_data(24).tensors
        losses.append(F.cross_entropy(model(inputs), targets).item())
    return model, losses


def averaged(num_epochs, run_dir=None, **choices):
    model = make_model()
    optimizer = Averaging(model.parameters())
    config = quiet(num_epochs=num_epochs, run_dir=run_dir, **choices)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
    history = trainer.fit(loader_of(make_data(24), 8, shuffle=False), loader_of(make_data(24), 24, shuffle=False))
    return model, history.test_losses


@pytest.mark.parametrize("restore_best", [True, False])
def test_an_optimizer_is_put_into_evaluation_for_tests_saves_and_the_end(restore_best):
    by_hand, expected = averaged_by_hand(4)
    model, losses = averaged(4, restore_best=restore_best)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert all(map(torch.allclose, model.parameters(), by_hand.parameters()))


@pytest.mark.parametrize("max_steps", [4, 6])
def test_such_an_optimizer_goes_on_within_and_between_epochs(max_steps, tmp_path):
    _, expected = averaged(4)
    averaged(4, tmp_path / "run", max_steps=max_steps)
    _, losses = averaged(4, tmp_path / "run", resume=True)
    assert losses == expected


def test_the_tutorial_functions_put_it_there_too():
    _, expected = averaged_by_hand(3)
    model, losses = make_model(), []
    optimizer, loss_fn = Averaging(model.parameters()), nn.CrossEntropyLoss()
    train, test = loader_of(make_data(24), 8, shuffle=False), loader_of(make_data(24), 24, shuffle=False)
    for _ in range(3):
        train_model(train, model, loss_fn, optimizer)
        losses.append(evaluate_model(test, model, loss_fn))
    assert losses == pytest.approx(expected, rel=1e-6)


class WantsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class WantsMore(torch.optim.SGD):
    def step(self, loss_value, closure=None):
        return super().step(closure)


class MayHaveClosure(torch.optim.SGD):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


def test_an_optimizer_that_cannot_step_alone_is_refused_before_training():
    model = make_model()
    for kind in (WantsClosure, WantsMore):
        with pytest.raises(TypeError, match=f"The optimizer {kind.__name__} wants a closure"):
            Trainer(model, kind(model.parameters(), lr=0.1), nn.CrossEntropyLoss())
    trainer = Trainer(model, MayHaveClosure(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    assert trainer.fit(loader_of(make_data(8), 4)).num_epochs == 2


class OwnRate(torch.optim.SGD):
    """An optimizer that finds its learning rate by itself."""

    def __init__(self, parameters, remove):
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group["own"] = group.pop("lr")
            if not remove:
                group["lr"] = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["own"])


@pytest.mark.parametrize("remove", [True, False])
def test_an_optimizer_without_a_learning_rate_trains_and_goes_on(remove, tmp_path):
    def run(run_dir=None, **choices):
        model = make_model()
        config = quiet(num_epochs=3, run_dir=run_dir, **choices)
        trainer = Trainer(model, OwnRate(model.parameters(), remove), nn.CrossEntropyLoss(), config=config)
        return trainer.fit(loader_of(make_data(24), 8), loader_of(make_data(24), 8))

    expected = run()
    assert all(map(math.isnan, expected.learning_rates))
    run(tmp_path / "run", max_steps=4)
    assert run(tmp_path / "run", resume=True).test_losses == expected.test_losses


def resumed_and_whole(make_optimizer, tmp_path, callbacks=lambda: (), max_steps=4, scheduler=None, **choices):
    """Return the test losses of a run that was stopped and went on, and of one that was left alone."""

    def run(run_dir, **more):
        model = make_model()
        config = quiet(num_epochs=4, run_dir=run_dir, resume="auto", **choices, **more)
        optimizer = make_optimizer(model)
        trainer = Trainer(
            model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks(), scheduler=scheduler, config=config
        )
        return trainer.fit(loader_of(make_data(24), 8), loader_of(make_data(24), 8)).test_losses

    run(tmp_path / "parts", max_steps=max_steps)
    return run(tmp_path / "parts"), run(tmp_path / "whole")


class Lookahead(torch.optim.Optimizer):
    """Slow weights that follow those of an optimizer inside; a state of a form of its own."""

    def __init__(self, inner, takes_back=True):
        self.inner, self.takes_back = inner, takes_back
        super().__init__([{"params": group["params"]} for group in inner.param_groups], {})
        self.param_groups = inner.param_groups
        self.slow = [parameter.detach().clone() for group in self.param_groups for parameter in group["params"]]
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.num_steps += 1
        if self.num_steps % 3 == 0:
            fast = [parameter for group in self.param_groups for parameter in group["params"]]
            for slow, parameter in zip(self.slow, fast, strict=True):
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)

    def state_dict(self):
        return {"fast": self.inner.state_dict(), "slow": [one.clone() for one in self.slow], "count": self.num_steps}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["fast"])
        self.param_groups = self.inner.param_groups
        if self.takes_back:
            self.slow, self.num_steps = state["slow"], state["count"]


class WithCommonState(torch.optim.SGD):
    """A state that belongs to no parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        self.state["steps"] = self.state.get("steps", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=-group["lr"] / self.state["steps"])


class WithFunction(torch.optim.SGD):
    """A setting of a group that is a function."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr, momentum=0.9)
        for group in self.param_groups:
            group["scale"] = lambda gradient: gradient.sign()

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = group["scale"](parameter.grad)
        return super().step(closure)


def two_in_one(model):
    halves = list(model.parameters())
    return Lookahead(torch.optim.Adam([{"params": halves[:1]}, {"params": halves[1:], "lr": 0.01}], lr=0.1))


@pytest.mark.parametrize("max_steps", [4, 6])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        two_in_one,
        lambda model: WithCommonState(model.parameters(), lr=0.5),
        lambda model: WithFunction(model.parameters(), lr=0.05),
    ],
    ids=["own form", "common state", "function"],
)
def test_an_optimizer_with_a_state_of_its_own_form_goes_on(make_optimizer, max_steps, tmp_path):
    resumed, whole = resumed_and_whole(make_optimizer, tmp_path, max_steps=max_steps)
    assert resumed == whole and len(set(whole)) == 4


def test_an_optimizer_that_does_not_take_back_its_state_is_told(tmp_path):
    def make_optimizer(model):
        return Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), takes_back=False)

    with pytest.raises(CheckpointError, match="Lookahead does not take back.*another own/slow/0"):
        resumed_and_whole(make_optimizer, tmp_path)


def test_an_optimizer_whose_state_cannot_be_saved_is_refused_before_training(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {"state": {0: {1, 2}}, "param_groups": super().state_dict()["param_groups"]}

    seen = []
    with pytest.raises(TypeError, match="own/state/0 is a set"):
        resumed_and_whole(lambda model: Odd(model.parameters(), lr=0.1), tmp_path, callbacks=lambda: seen or [])
    assert not list((tmp_path / "parts").glob("checkpoints/*"))


class Unfreezes(Callback):
    """Lets one part after the other be trained, with a learning rate of its own."""

    def on_epoch_start(self, trainer):
        if trainer.state.epoch == 2:
            first = next(trainer.model.children())
            first.requires_grad_(True)
            trainer.optimizer.add_param_group({"params": list(first.parameters()), "lr": 0.01})


@pytest.mark.parametrize("max_steps", [2, 3, 5, 7])
def test_groups_of_parameters_that_a_callback_adds_go_on(max_steps, tmp_path):
    def make_optimizer(model):
        first, *others = model.children()
        first.requires_grad_(False)
        return torch.optim.Adam([one for part in others for one in part.parameters()], lr=0.05)

    resumed, whole = resumed_and_whole(make_optimizer, tmp_path, lambda: [Unfreezes()], max_steps)
    assert resumed == whole and len(set(whole)) == 4


class Replaces(Callback):
    """Changes the structure of the model on the way."""

    def on_epoch_end(self, trainer):
        if trainer.state.epoch == 2:
            trainer.model[-1] = nn.Linear(*reversed(trainer.model[-1].weight.shape))


class Prunes(Callback):
    def on_epoch_end(self, trainer):
        if trainer.state.epoch == 2:
            prune.l1_unstructured(trainer.model[0], "weight", amount=0.5)


class Drops(Callback):
    def on_epoch_start(self, trainer):
        if trainer.state.epoch == 3:
            trainer.model[1] = nn.Identity()
            trainer.model.extend([nn.Linear(3, 3)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("restore_best", [True, False])
@pytest.mark.parametrize("kind", [Replaces, Prunes, Drops])
def test_a_model_whose_structure_changes_trains_on(kind, restore_best, tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = quiet(num_epochs=4, run_dir=tmp_path / "run", restore_best=restore_best)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[kind()], config=config)
    history = trainer.fit(loader_of(make_data(24), 8), loader_of(make_data(24), 8))
    assert history.num_epochs == 4 and (tmp_path / "run/checkpoints/step_00000012").is_dir()


def test_parameters_that_have_left_the_model_and_weights_that_fit_no_more_are_told():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Replaces()], config=quiet(num_epochs=3))
    with pytest.warns(UserWarning, match="2 of the optimizer's parameters are no part of it any more"):
        trainer.fit(loader_of(make_data(24), 8))

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Prunes()], config=quiet(num_epochs=3))
    with pytest.warns(UserWarning, match="best weights.*unexpected 0.weight"):
        trainer.fit(loader_of(make_data(24), 8))


# --- schedulers -------------------------------------------------------------------------------------------------------


class ByNumber:
    """A scheduler like those of timm: it wants the number of the epoch, and that of the update."""

    def __init__(self, optimizer):
        self.optimizer, self.calls = optimizer, []

    def step(self, epoch, metric=None):
        self.calls.append(("epoch", epoch, metric is not None))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + epoch)

    def step_update(self, num_updates, metric=None):
        self.calls.append(("update", num_updates))

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


@pytest.mark.parametrize("schedule_every", ["step", "epoch"])
def test_a_scheduler_that_wants_numbers_is_given_them(schedule_every, tmp_path):
    made = []

    def scheduler(optimizer, num_steps):
        made.append(ByNumber(optimizer))
        return made[-1]

    def make_optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    resumed, whole = resumed_and_whole(make_optimizer, tmp_path, scheduler=scheduler, schedule_every=schedule_every)
    updates = [("update", number) for number in range(1, 13)]
    expected = [
        call for epoch in range(4) for call in (*updates[3 * epoch : 3 * epoch + 3], ("epoch", epoch + 1, True))
    ]
    assert made[-1].calls == expected and resumed == whole


class OwnPlateau:
    def __init__(self, optimizer):
        self.optimizer, self.values = optimizer, []

    def step(self, metrics):
        self.values.append(metrics)

    def state_dict(self):
        return {}


class WantsTheModel(OwnPlateau):
    def step(self, model):
        pass


def test_a_scheduler_that_wants_the_value_is_given_it_and_others_are_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = OwnPlateau(optimizer)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), scheduler=plateau, config=quiet(num_epochs=3))
    assert plateau.values == trainer.fit(loader_of(make_data(24), 8), loader_of(make_data(8), 8)).test_losses
    with pytest.raises(TypeError, match="WantsTheModel needs model at each step"):
        Trainer(model, optimizer, nn.CrossEntropyLoss(), scheduler=WantsTheModel(optimizer))


# --- weights that are what they are by design -------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self, value, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.mask = nn.Parameter(torch.tensor([0.0, 0.0, value]).to(dtype), requires_grad=False)
        self.register_buffer("scale", torch.ones(3).to(dtype))

    def forward(self, inputs):
        return self.layer(inputs) * self.scale.float() + self.mask.float()


def two_classes(num_samples=24):
    inputs, targets = make_data(num_samples).tensors
    return TensorDataset(inputs, targets % 2)


@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_frozen_weights_that_were_never_finite_are_no_fault(value, on_nonfinite, tmp_path):
    model = Masked(-math.inf)
    if math.isnan(value):
        model.unused = nn.Parameter(torch.tensor(value), requires_grad=False)
    optimizer = torch.optim.SGD(model.layer.parameters(), lr=0.1)
    config = quiet(run_dir=tmp_path / "run", on_nonfinite=on_nonfinite)
    history = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config).fit(loader_of(two_classes(), 8))
    assert all(map(math.isfinite, history.train_losses)) and history.best_epoch == 2


def test_frozen_weights_that_become_infinite_are_one():
    class Breaks(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == 2:
                trainer.model.mask.data.fill_(-math.inf)

    model = Masked(0.0)
    optimizer = torch.optim.SGD(model.layer.parameters(), lr=0.0)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Breaks()], config=quiet())
    with pytest.raises(ArithmeticError, match="mask"):
        trainer.fit(loader_of(two_classes(), 8))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_enough_for_what_is_frozen(dtype, tmp_path):
    model, plain = Masked(1.0, dtype), Masked(1.0)
    plain.layer.load_state_dict(copy.deepcopy(model.layer.state_dict()))
    losses = []
    for one in (model, plain):
        optimizer = torch.optim.SGD(one.layer.parameters(), lr=0.1)
        trainer = Trainer(one, optimizer, nn.CrossEntropyLoss(), config=quiet(num_micro_batches=2))
        losses.append(trainer.fit(loader_of(make_data(24), 8)).train_losses)
    assert losses[0] == losses[1]


# --- buffers that belong to the weights -------------------------------------------------------------------------------


class Centred(nn.Module):
    """A loss that follows the mean of the outputs, and counts its calls, while the model is trained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, outputs, targets):
        if torch.is_grad_enabled():
            self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0)  # a new tensor at each call
            self.num_calls += 1
        return F.cross_entropy(outputs - 3 * self.centre, targets)


class Around(nn.Module):
    """The same inside of another."""

    def __init__(self):
        super().__init__()
        self.inner = Centred()

    def forward(self, outputs, targets):
        return self.inner(outputs, targets)


def centred_by_hand(num_epochs, cut):
    """Return test losses, and the centre and count after each epoch: each micro-batch starts from the batch's."""
    model, centre, count, rows = make_model(), torch.zeros(3), 0, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(num_epochs):
        for inputs, targets in loader_of(make_data(24), 8, shuffle=False):
            optimizer.zero_grad()
            after = []
            for own, labels in zip(inputs.chunk(cut), targets.chunk(cut), strict=True):
                outputs = model(own)
                after.append(0.9 * centre + 0.1 * outputs.detach().mean(0))
                (F.cross_entropy(outputs - 3 * after[-1], labels) / cut).backward()
            centre, count = sum(after) / cut, count + 1
            optimizer.step()
        inputs, targets = make_data(24).tensors
        rows.append((F.cross_entropy(model(inputs) - 3 * centre, targets).item(), centre, count))
    return rows


def centred(run_dir=None, cut=2, kind=Centred, num_epochs=3, lr=0.5, **choices):
    model, loss_fn = make_model(), kind()
    config = quiet(num_epochs=num_epochs, num_micro_batches=cut, run_dir=run_dir, **choices)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=lr), loss_fn, config=config)
    loader = loader_of(make_data(24), 8, shuffle=False)
    history = trainer.fit(loader, loader)
    inner = getattr(loss_fn, "inner", loss_fn)
    return history.test_losses, inner.centre.tolist(), inner.num_calls.item(), trainer.evaluate(loader)["loss"]


@pytest.mark.parametrize("kind", [Centred, Around])
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_the_buffers_of_a_loss_move_once_per_step(cut, kind):
    expected = centred_by_hand(3, cut)
    losses, centre, count, evaluated = centred(cut=cut, kind=kind, restore_best=False)
    assert losses == pytest.approx([loss for loss, _, _ in expected], rel=1e-5)
    assert centre == pytest.approx(expected[-1][1].tolist(), rel=1e-5) and count == 9
    assert evaluated == pytest.approx(losses[-1], rel=1e-6)


@pytest.mark.parametrize("bitwise", [False, True])
def test_the_buffers_of_a_loss_are_those_of_all_processes(bitwise):
    alone = centred(cut=4, bitwise=bitwise)
    for result in on_processes(2, partial(centred, cut=4, bitwise=bitwise)):
        assert result[0] == (alone[0] if bitwise else pytest.approx(alone[0], rel=1e-6))
        assert result[1] == pytest.approx(alone[1], rel=1e-6) and result[2] == alone[2]


@pytest.mark.parametrize("max_steps", [3, 4, 8])
def test_the_buffers_of_a_loss_go_on(max_steps, tmp_path):
    expected = centred(num_epochs=4)
    centred(tmp_path / "run", num_epochs=4, max_steps=max_steps)
    assert centred(tmp_path / "run", num_epochs=4, resume=True) == expected


class WithPlainState(nn.Module):
    def __init__(self, **state):
        super().__init__()
        self.state = nn.Module()
        vars(self.state).update(state)

    def forward(self, outputs, targets):
        for name, value in list(vars(self.state).items()):
            if name in ("count", "mean"):
                setattr(self.state, name, value + 1)
            if name == "last":
                value.append(1.0)
        return F.cross_entropy(outputs, targets)


class CallsAndCounts:
    count = 0

    def loss(self, model, batch):
        self.count = self.count + 1
        return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("loss_fn", "told"),
    [
        (WithPlainState(count=0), "Module.count"),
        (WithPlainState(mean=torch.zeros(2), constant=3), "Module.mean"),
        (WithPlainState(last=[0.0]), "Module.last"),
        (WithPlainState(constant=3, table=torch.ones(3)), None),
        (nn.CrossEntropyLoss(), None),
        (CallsAndCounts().loss, "CallsAndCounts.count"),
    ],
)
def test_a_state_of_a_loss_that_cannot_be_kept_is_told(loss_fn, told, tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"compute_loss": loss_fn} if hasattr(loss_fn, "__self__") else {"loss_fn": loss_fn}
    for run_dir, expected in ((tmp_path / "run", told), (None, None)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(model, optimizer, **given, config=quiet(run_dir=run_dir)).fit(loader_of(make_data(8), 8))
        assert [expected in str(one.message) for one in caught] == ([] if expected is None else [True])


def test_a_model_whose_files_would_lack_trained_weights_is_refused():
    class Leaves(nn.Linear):
        def state_dict(self, *args, **kwargs):
            return {name: one for name, one in super().state_dict(*args, **kwargs).items() if name != "bias"}

    for is_trained in (True, False):
        model = Leaves(5, 3)
        model.bias.requires_grad_(is_trained)
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
        if is_trained:
            with pytest.raises(TypeError, match="leaves out bias, which is trained"):
                trainer.fit(loader_of(make_data(8), 8))
        else:
            assert trainer.fit(loader_of(make_data(8), 8)).num_epochs == 2


def calls_a_part():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        optimizer,
        compute_loss=lambda model, batch: F.cross_entropy(model[-1](model[:-1](batch[0])), batch[1]),
        config=quiet(),
    )
    with pytest.raises(RuntimeError, match="call it as model"):
        trainer.fit(loader_of(make_data(24), 8))


@pytest.mark.distributed
def test_a_part_of_the_model_that_is_called_on_several_processes_is_told():
    on_processes(2, calls_a_part)


class Drifting(nn.Module):
    """A model whose outputs drift away by a buffer that its files leave out."""

    def __init__(self, step=1.0):
        super().__init__()
        self.layer, self.step = nn.Linear(5, 3), step
        self.register_buffer("shift", torch.zeros(3), persistent=False)

    def forward(self, inputs):
        if self.training:
            self.shift += self.step * torch.tensor([1.0, 0.0, -1.0])
        return self.layer(inputs) + self.shift


def drifting(run_dir=None, **choices):
    torch.manual_seed(0)
    model = Drifting()
    config = quiet(num_epochs=4, run_dir=run_dir, **choices)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), nn.CrossEntropyLoss(), config=config)
    loader = loader_of(make_data(24), 8)
    history = trainer.fit(loader, loader)
    return history.best_epoch, history.best_value, trainer.evaluate(loader)["loss"], model.shift.tolist()


def test_the_model_of_the_best_epoch_has_its_own_buffers(tmp_path):
    epoch, best, evaluated, shift = drifting()
    assert (epoch, shift) == (1, [3.0, 0.0, -3.0]) and evaluated == pytest.approx(best, rel=1e-6)
    for result in on_processes(2, drifting):
        assert result[0] == 1 and result[2] == pytest.approx(result[1], rel=1e-6)
    drifting(tmp_path / "run", max_steps=7)  # the best is that of a process that has ended
    assert drifting(tmp_path / "run", resume=True) == (epoch, best, evaluated, shift)


def test_the_loss_of_the_best_epoch_has_its_own_buffers():
    losses, _, _, evaluated = centred(lr=3.0, num_epochs=6)
    assert losses.index(min(losses)) < 5 and evaluated == pytest.approx(min(losses), rel=1e-6)


def test_what_a_callback_leaves_after_the_best_epoch_is_not_what_is_given_back():
    class Shrinks(Callback):
        def on_epoch_end(self, trainer):
            trainer.model[0].weight.data.mul_(0.5)

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Shrinks()], config=quiet(num_epochs=3))
    loader = loader_of(make_data(24), 8)
    history = trainer.fit(loader, loader)
    assert history.best_epoch == 3 and trainer.evaluate(loader)["loss"] == pytest.approx(history.best_value, rel=1e-6)


class Freezes(Callback):
    """Puts a layer into evaluation mode for good."""

    def on_epoch_start(self, trainer):
        if trainer.state.epoch == 2:
            trainer.model[1].eval()


@pytest.mark.parametrize("max_steps", [5, 6, 8])
def test_modes_that_a_callback_has_set_go_on(max_steps, tmp_path):
    def run(run_dir, **choices):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        config = quiet(num_epochs=4, run_dir=run_dir, resume="auto", **choices)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Freezes()], config=config)
        return trainer.fit(loader_of(make_data(24), 8)).train_losses, model[1].training

    run(tmp_path / "parts", max_steps=max_steps)
    assert run(tmp_path / "parts") == run(tmp_path / "whole") and run(tmp_path / "other")[1]


def test_parts_that_are_trained_in_evaluation_mode_are_named(capsys):
    """As those of `from_pretrained` within a module of one's own are."""

    def said_of(change):
        encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(8, 3)})
        change(model)
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            compute_loss=lambda model, batch: nn.functional.cross_entropy(
                model["head"](model["encoder"](batch[0])), batch[1]
            ),
            config=quiet(num_epochs=1, verbose=True),
        )
        trainer.fit(loader_of(make_data(8), 4))
        return capsys.readouterr().out

    expected = "so without dropout, though trained: encoder. The model was given so, as from_pretrained returns it"
    assert expected in said_of(lambda model: model["encoder"].eval())
    meant = (
        lambda model: model.eval(),  # as a whole: the training puts it into training mode
        lambda model: model["encoder"][1].eval(),
        lambda model: model["encoder"][2].eval(),
        lambda model: model["encoder"].eval().requires_grad_(False),
    )
    assert not any("without dropout" in said_of(change) for change in meant)


def test_a_callback_that_is_not_called_again_is_named(tmp_path, capsys):
    def run(max_steps):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = quiet(run_dir=tmp_path / "run", resume="auto", max_steps=max_steps, verbose=True)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Freezes()], config=config)
        trainer.fit(loader_of(make_data(24), 8))
        return capsys.readouterr().out

    assert "not called again" not in run(4)
    assert "on_epoch_start of Freezes is not called again" in run(None)


class Grows(Callback):
    """Gives the model layers and buffers on the way."""

    def __init__(self, hook, epoch, change):
        setattr(self, hook, lambda trainer: change(trainer.model) if trainer.state.epoch == epoch else None)


def put_norm(model):
    model[0] = nn.Sequential(model[0], nn.BatchNorm1d(model[0].out_features, affine=False))


def put_buffer(model):
    def count(module, inputs):
        if module.training:
            module.count += 1

    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    model.register_forward_pre_hook(count)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("hook", "epoch", "change", "expected"),
    [
        ("on_fit_start", 0, put_norm, 9),
        ("on_epoch_start", 2, put_norm, 6),
        ("on_epoch_end", 1, put_norm, 6),
        ("on_fit_start", 0, put_buffer, 9),
    ],
)
def test_what_a_callback_adds_counts_steps_too(hook, epoch, change, expected):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(num_epochs=3, num_micro_batches=4, restore_best=False)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Grows(hook, epoch, change)], config=config)
    trainer.fit(loader_of(make_data(24), 8))
    counts = [buffer.item() for name, buffer in model.named_buffers() if name.endswith(("count", "tracked"))]
    assert counts == [expected]


# --- data that changes between epochs ---------------------------------------------------------------------------------


def samples_by_epoch(dataset, change, num_epochs=2, **how):
    """Return the samples of each epoch when the data is changed after the first."""
    seen = [[]]

    class Changes(Callback):
        def on_epoch_end(self, trainer):
            seen.append([])
            if trainer.state.epoch == 1:
                change()

    def compute_loss(model, batch):
        seen[-1] += (batch[0] if isinstance(batch, (list, tuple)) else batch).flatten().tolist()
        return model(torch.ones(1, 1)).mean()

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(num_epochs=num_epochs)
    Trainer(model, optimizer, compute_loss=compute_loss, callbacks=[Changes()], config=config).fit(
        DataLoader(dataset, **{"batch_size": 3, **how})
    )
    return [sorted(epoch) for epoch in seen[:num_epochs]]


def numbers(count=8):
    return TensorDataset(torch.arange(float(count)).view(count, 1))


@pytest.mark.parametrize("kind", [list, numpy.array, torch.tensor, tuple])
def test_a_subset_that_is_given_other_samples_shows_them(kind):
    subset = Subset(numbers(), kind([0, 1, 2]))
    assert samples_by_epoch(subset, lambda: setattr(subset, "indices", kind([4, 5, 6, 7])), shuffle=True) == [
        [0, 1, 2],
        [4, 5, 6, 7],
    ]


def test_a_subset_whose_list_is_changed_in_place_shows_it():
    subset = Subset(numbers(), [0, 1])
    assert samples_by_epoch(subset, lambda: subset.indices.extend([4, 5])) == [[0, 1], [0, 1, 4, 5]]
    assert samples_by_epoch(subset, lambda: subset.indices.__setitem__(0, 7)) == [[0, 1, 4, 5], [1, 4, 5, 7]]
    inner = Subset(numbers(), [0, 1, 2, 3])
    outer = Subset(inner, [0, 1])
    assert samples_by_epoch(outer, lambda: setattr(inner, "indices", [6, 5, 4, 3])) == [[0, 1], [5, 6]]


def test_a_subset_of_another_whole_shows_it():
    subset = Subset(numbers(), [0, 1])
    whole = TensorDataset(torch.arange(8.0).view(8, 1) + 10)
    assert samples_by_epoch(subset, lambda: setattr(subset, "dataset", whole)) == [[0, 1], [10, 11]]


@pytest.mark.parametrize("count", [4, 6])
def test_tensors_that_are_replaced_are_seen(count):
    data = numbers(4)
    other = (torch.arange(float(count)).view(count, 1) + 10,)
    assert samples_by_epoch(data, lambda: setattr(data, "tensors", other), shuffle=True) == [
        [0, 1, 2, 3],
        [float(number + 10) for number in range(count)],
    ]


class Seeded(IterableDataset):
    """A stream that is shuffled by the epoch it is told."""

    def __init__(self, first):
        self.first, self.epoch = first, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch))
        return iter((order + self.first).float().tolist())


class Wrapped(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChainDataset([Seeded(0), Seeded(8)]),
        lambda: Wrapped(Seeded(0)),
        lambda: ChainDataset([Wrapped(Seeded(0)), Wrapped(Wrapped(Seeded(8)))]),
    ],
    ids=["chain", "wrapper", "both"],
)
def test_streams_within_others_are_told_the_epoch(make):
    orders = [[], [], []]

    def compute_loss(model, batch):
        orders[trainer.state.epoch - 1] += batch.tolist()
        return model(torch.ones(1, 1)).mean()

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, compute_loss=compute_loss, config=quiet(num_epochs=3))
    trainer.fit(DataLoader(make(), batch_size=4))
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


class Once(IterableDataset):
    """A stream that can be read once."""

    def __init__(self):
        self.items = iter([make_data(16)[index] for index in range(16)])

    def __iter__(self):
        return self.items


def test_a_test_stream_that_ends_for_good_is_told():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(num_epochs=3))
    with pytest.raises(ValueError, match="test_loader yields no batch"):
        trainer.fit(loader_of(make_data(16), 8), DataLoader(Once(), batch_size=8))
    assert trainer.history.num_epochs == 1


class Unsized(Sampler):
    def __init__(self):
        pass

    def __iter__(self):
        return iter(range(10))

    def __len__(self):
        raise NotImplementedError


class UnsizedData(Dataset):
    def __getitem__(self, index):
        return make_data(10)[index]

    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize("dataset", [make_data(10), UnsizedData()], ids=["sampler", "both"])
def test_what_cannot_say_its_length_trains(dataset, tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(run_dir=tmp_path / "run", verbose=True)
    loader = DataLoader(dataset, batch_size=5, sampler=Unsized())
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
    assert trainer.fit(loader, loader).num_epochs == 2 and trainer.state.step == 4


class OwnIteration(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch[0] * 2, batch[1]


class OwnMethod(DataLoader):
    def describe(self):
        return "a loader"


def test_a_loader_that_iterates_by_itself_is_refused_with_the_remedy():
    model = make_model()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    for call in (trainer.fit, trainer.evaluate, trainer.predict):
        with pytest.raises(
            TypeError, match="OwnIteration, whose own __iter__ would not be used.*Give a plain DataLoader"
        ):
            call(OwnIteration(make_data(16), 8))
    assert trainer.fit(OwnMethod(make_data(16), 8)).num_epochs == 2


def parts_of_processes(kind):
    """Return what is said to data of which each process has a part of its own."""
    rank = torch.distributed.get_rank()
    inputs, targets = make_data(24).tensors
    table = datasets.Dataset.from_dict({"x": inputs.tolist(), "labels": targets.tolist()})
    stream = table.to_iterable_dataset()
    made = {
        "table": lambda: split_dataset_by_node(table, rank, 2).with_format("torch"),
        "python table": lambda: split_dataset_by_node(table, rank, 2),
        "stream": lambda: split_dataset_by_node(stream, rank, 2).with_format("torch"),
        "changed stream": lambda: split_dataset_by_node(stream, rank, 2).shuffle(seed=1).map(lambda row: row),
        "chain": lambda: ChainDataset([split_dataset_by_node(stream, rank, 2), stream]),
        "tensors": lambda: TensorDataset(inputs[rank::2], targets[rank::2]),
        "no seed": lambda: TensorDataset(inputs + rank, targets),
        "subset": lambda: Subset(TensorDataset(inputs[rank::2], targets[rank::2]), range(10)),
        "joined": lambda: ConcatDataset(
            [TensorDataset(inputs, targets), TensorDataset(inputs[rank::2], targets[rank::2])]
        ),
        "whole table": lambda: table.with_format("torch"),
        "whole stream": lambda: stream.with_format("torch"),
        "whole": lambda: ConcatDataset(
            [TensorDataset(inputs, targets), Subset(TensorDataset(inputs, targets), [3, 4])]
        ),
    }[kind]()
    model = make_model()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    try:
        return trainer.fit(DataLoader(made, batch_size=8)).num_epochs
    except ValueError as error:
        return str(error)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind",
    ["table", "python table", "stream", "changed stream", "chain", "tensors", "no seed", "subset", "joined"],
)
def test_data_that_is_divided_over_the_processes_is_refused(kind):
    for told in on_processes(2, parts_of_processes, kind):
        assert "train_loader has other samples on each process" in told and "split_dataset_by_node" in told


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["whole table", "whole stream", "whole"])
def test_data_that_is_not_divided_is_taken(kind):
    assert on_processes(2, parts_of_processes, kind) == [2, 2]


# --- predictions ------------------------------------------------------------------------------------------------------


class Rich(nn.Module):
    """What models return beside their scores: a loss, a cache, a text, nothing."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(5, 3), kind

    def forward(self, inputs):
        scores = self.layer(inputs)
        return {
            "dictionary": {"loss": scores.mean(), "scores": scores, "cache": object(), "name": "a", "none": None},
            "tuple": (scores.mean(), scores, "a"),
            "nested": {"scores": scores, "hidden": {"last": scores + 1, "norm": scores.norm()}, "layers": [scores, 3]},
        }[self.kind]


@pytest.mark.parametrize("num_micro_batches", [None, 2])
def test_predict_takes_what_has_an_entry_per_sample_and_names_the_rest(num_micro_batches):
    expected = {}
    for kind, left_out in (
        ("dictionary", "['cache'], ['loss'], ['name']"),
        ("tuple", "[0], [2]"),
        ("nested", "['hidden']['norm'], ['layers'][1]"),
    ):
        model = Rich(kind)
        inputs = make_data(10).tensors[0]
        expected = model.layer(inputs)
        trainer = Trainer(model, None, nn.CrossEntropyLoss(), config=quiet(num_micro_batches=num_micro_batches))
        with pytest.warns(UserWarning) as caught:
            outputs = trainer.predict(loader_of(make_data(10), 4))
        assert [str(one.message) for one in caught] == [f"predict leaves out what has no entry per sample: {left_out}."]
        take = {"dictionary": lambda out: out["scores"], "tuple": lambda out: out[1]}
        found = take.get(kind, lambda out: out["hidden"]["last"] - 1)(outputs)
        assert torch.allclose(found, expected, atol=1e-6)
    assert list(outputs) == ["scores", "hidden", "layers"]


def test_predict_without_anything_per_sample_says_so():
    class Useless(nn.Linear):
        def forward(self, inputs):
            return {"loss": super().forward(inputs).mean()}

    trainer = Trainer(Useless(5, 3), None, nn.CrossEntropyLoss(), config=quiet())
    with pytest.raises(ValueError, match="predict joins outputs along the samples"):
        trainer.predict(loader_of(make_data(10), 4))


# --- callbacks --------------------------------------------------------------------------------------------------------


def stopped(reason):
    class Stops(Callback):
        def on_epoch_end(self, trainer):
            raise StopTraining(reason)

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Stops()], config=quiet(num_epochs=5))
    history = trainer.fit(loader_of(make_data(16), 8))
    return history.num_epochs, history.stop_reason


REASONS = [None, "", ValueError("too good"), 3, ["a", "b"]]


@pytest.mark.parametrize("reason", REASONS, ids=repr)
def test_a_wish_to_stop_counts_whatever_its_reason(reason):
    num_epochs, said = stopped(reason)
    assert num_epochs == 1 and (str(reason) if reason else "a callback asked for it") in said


@pytest.mark.distributed
def test_a_wish_to_stop_counts_on_two_processes_too():
    for reason in (None, ValueError("too good")):
        outcomes = on_processes(2, stopped, reason)
        assert outcomes[0] == outcomes[1] == stopped(reason)


@pytest.mark.parametrize("thing", ["a model", None, 3, correct])
def test_what_is_no_model_is_named(thing):
    loader = loader_of(make_data(8), 4)
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        train_model(loader, thing, nn.CrossEntropyLoss(), optimizer)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        evaluate_model(loader, thing, nn.CrossEntropyLoss())


# --- losses and metrics -----------------------------------------------------------------------------------------------


class Focal(nn.CrossEntropyLoss):
    """One that asks its base class for no mean and takes it itself."""

    def __init__(self, **options):
        super().__init__(reduction="none", **options)

    def forward(self, outputs, targets):
        each = super().forward(outputs, targets)
        return ((1 - torch.exp(-each)) ** 2 * each).mean()


class OfLogits(nn.CrossEntropyLoss):
    """One that leaves the mean to its base class."""

    def forward(self, outputs, targets):
        return super().forward(outputs.float(), targets)


WEIGHT = torch.tensor([1.0, 5.0, 20.0])


@pytest.mark.parametrize("num_micro_batches", [1, 2, 5])
@pytest.mark.parametrize("kind", [Focal, OfLogits, nn.CrossEntropyLoss])
def test_a_loss_is_the_mean_that_its_own_class_takes(kind, num_micro_batches):
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3), torch.randn(10, 4)
    labels, loss_fn = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2]), kind(weight=WEIGHT)
    config = quiet(num_micro_batches=num_micro_batches)
    loss = Trainer(model, None, loss_fn, config=config).evaluate(DataLoader(TensorDataset(inputs, labels), 10))["loss"]
    assert loss == pytest.approx(loss_fn(model(inputs), labels).item(), rel=1e-5)


def test_a_loss_for_each_sample_is_still_refused():
    for loss_fn in (nn.CrossEntropyLoss(reduction="none"), nn.MSELoss(reduction="none"), nn.MSELoss(reduction="sum")):
        with pytest.raises(ValueError, match="reduction"):
            Trainer(make_model(), None, loss_fn, config=quiet())
    each = type("Each", (nn.CrossEntropyLoss,), {"forward": lambda self, o, t: nn.CrossEntropyLoss.forward(self, o, t)})
    with pytest.raises(ValueError, match="one number|scalar"):
        Trainer(make_model(), None, each(reduction="none"), config=quiet()).evaluate(loader_of(make_data(8), 4))


def test_a_metric_of_several_values_is_named():
    trainer = Trainer(
        make_model(), None, nn.CrossEntropyLoss(), config=quiet(), metrics={"scores": lambda o, t: {"a": 1, "b": 2}}
    )
    with pytest.raises(TypeError, match="'scores' must return one value per sample or their mean, got a dict"):
        trainer.evaluate(loader_of(make_data(8), 4))
