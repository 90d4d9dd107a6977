"""Averages of the weights: evaluated, chosen by, saved and restored in place of the last ones."""

import copy
import math
import pickle
import signal

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from accel_trainer import Callback, Trainer, WeightAverage, load_best
from support import correct, loader_of, make_data, make_model, on_processes, quiet

KINDS = {
    "ema": lambda: WeightAverage(0.8),
    "ema from epoch 2": lambda: WeightAverage(0.8, start_epoch=2),
    "ema by epoch": lambda: WeightAverage(0.5, update_every="epoch"),
    "swa": lambda: WeightAverage(None),
    "swa by epoch": lambda: WeightAverage(None, update_every="epoch", start_epoch=2),
}


def train_averaged(name="ema", kind="batchnorm", dtype=torch.float64, callbacks=(), run_dir=None, **choices):
    model = make_model(dtype, kind)
    choices = {"num_epochs": 4, "num_micro_batches": 4, **choices}
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
        nn.CrossEntropyLoss(),
        metrics={"accuracy": correct},
        callbacks=[*callbacks, KINDS[name]()],
        config=quiet(run_dir=run_dir, **choices),
    )
    history = trainer.fit(loader_of(make_data(40, dtype), 8), loader_of(make_data(29, dtype), 8))
    return history, model, trainer


class ByHand(Callback):
    """Average with torch's own model of averages, and evaluate it by a trainer of its own."""

    def __init__(self, name):
        self.name, self.losses, self.averaged, self.weights = name, [], None, []

    def on_step_end(self, trainer):
        if self.name in ("ema", "swa") or (self.name == "ema from epoch 2" and trainer.state.epoch >= 2):
            self._take_in(trainer)

    def on_evaluation_end(self, trainer):  # the weights are those of the training again
        by_epoch = self.name == "ema by epoch" or (self.name == "swa by epoch" and trainer.state.epoch >= 2)
        if by_epoch:
            self._take_in(trainer)
        model = copy.deepcopy(trainer.model if self.averaged is None else self.averaged.module)
        self.weights.append(model.state_dict())
        loader = loader_of(make_data(29, torch.float64), 8)
        scores = Trainer(model, None, nn.CrossEntropyLoss(), config=quiet(num_micro_batches=4)).evaluate(loader)
        self.losses.append(scores["loss"])

    def _take_in(self, trainer):
        if self.averaged is None:
            decays = {"ema": 0.8, "ema from epoch 2": 0.8, "ema by epoch": 0.5}
            how = get_ema_multi_avg_fn(decays[self.name]) if self.name in decays else None
            self.averaged = AveragedModel(trainer.model, multi_avg_fn=how, use_buffers=True)
        self.averaged.update_parameters(trainer.model)


@pytest.mark.parametrize("name", KINDS)
def test_the_average_of_torch_is_evaluated_chosen_and_restored(name):
    by_hand = ByHand(name)
    history, model, _ = train_averaged(name, callbacks=[by_hand])
    assert history.test_losses == pytest.approx(by_hand.losses, rel=1e-9)
    best = by_hand.weights[history.best_epoch - 1]
    assert history.test_losses[history.best_epoch - 1] == min(history.test_losses)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, best[key], rtol=1e-9, atol=1e-12)


def test_the_training_itself_is_not_changed():
    plain, averaged = ([], [])
    for weights, name in ((plain, None), (averaged, "ema")):
        model = make_model(torch.float64)

        class Keep(Callback):
            def on_epoch_end(self, trainer, weights=weights):
                weights.append([weight.tolist() for weight in trainer.model.parameters()])

        callbacks = [Keep()] if name is None else [KINDS[name](), Keep()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, config=quiet())
        trainer.fit(loader_of(make_data(40, torch.float64), 8), loader_of(make_data(29, torch.float64), 8))
    assert plain == averaged


def test_the_best_weights_on_the_disk_are_the_average(tmp_path):
    history, model, trainer = train_averaged(run_dir=tmp_path / "run")
    fresh = load_best(make_model(torch.float64, "batchnorm"), tmp_path / "run")
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in fresh.state_dict().items())
    loader = loader_of(make_data(29, torch.float64), 8)
    assert trainer.evaluate(loader)["loss"] == pytest.approx(min(history.test_losses), rel=1e-12)


def test_without_restoring_the_best_the_last_average_stays():
    by_hand = ByHand("ema")
    _, model, _ = train_averaged(callbacks=[by_hand], restore_best=False)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, by_hand.weights[-1][key], rtol=1e-9, atol=1e-12)


def bits_of(name="ema", bitwise=True):
    history, model, _ = train_averaged(name, bitwise=bitwise, dtype=torch.float32)
    return history.test_losses, [tensor.tolist() for tensor in model.state_dict().values()]


@pytest.mark.distributed
def test_not_one_bit_depends_on_the_number_of_processes():
    expected = bits_of()
    for num_processes in (2, 3):
        assert all(found == expected for found in on_processes(num_processes, bits_of))


def losses_of(name):
    return train_averaged(name)[0].test_losses


@pytest.mark.distributed
def test_averages_are_the_same_under_every_layout():
    for name in ("ema", "swa by epoch"):
        expected = losses_of(name)
        assert all(found == pytest.approx(expected, rel=1e-9) for found in on_processes(2, losses_of, name))


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_goes_on_has_the_average_of_one_left_alone(name, tmp_path):
    whole, weights, _ = train_averaged(name)
    for steps in (3, 8, 15):  # five to an epoch
        how = {"run_dir": tmp_path / str(steps), "resume": "auto"}
        train_averaged(name, max_steps=steps, **how)
        resumed, model, _ = train_averaged(name, **how)
        assert resumed.test_losses == whole.test_losses and resumed.best_epoch == whole.best_epoch
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights.parameters(), strict=True))


class Interrupts(Callback):
    def __init__(self):
        self.seen = []

    def on_evaluation_start(self, trainer):
        self.seen.append("start")
        if trainer.state.epoch == 2:
            signal.raise_signal(signal.SIGINT)

    def on_evaluation_end(self, trainer):
        self.seen.append("end")

    def on_epoch_end(self, trainer):
        self.seen.append("epoch")


def test_an_evaluation_that_is_cut_short_puts_the_weights_back(tmp_path):
    whole, weights, _ = train_averaged(num_epochs=3)
    interrupts, how = Interrupts(), {"num_epochs": 3, "run_dir": tmp_path / "run", "resume": "auto"}
    stopped, _, _ = train_averaged(callbacks=[interrupts], **how)
    assert stopped.num_epochs == 1 and interrupts.seen == ["start", "end", "epoch", "start", "end"]
    resumed, model, _ = train_averaged(**how)
    assert resumed.test_losses == whole.test_losses and resumed.train_losses == whole.train_losses
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights.parameters(), strict=True))


def test_a_second_fit_begins_a_new_average():
    callback = WeightAverage(0.9)
    losses = []
    for _ in range(2):
        model = make_model(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[callback], config=quiet())
        test_loader = loader_of(make_data(29, torch.float64), 8)
        losses.append(trainer.fit(loader_of(make_data(40, torch.float64), 8), test_loader).test_losses)
    assert losses[0] == losses[1]
    assert pickle.loads(pickle.dumps(callback)).state_dict()["counts"] == callback.state_dict()["counts"] != {}


def test_two_averages_beside_each_other_do_not_change_the_training():
    plain, _, _ = train_averaged(kind="plain", restore_best=False)
    second = KINDS["swa"]()
    both, _, _ = train_averaged(kind="plain", restore_best=False, callbacks=[second])
    assert both.train_losses == plain.train_losses and second.state_dict()["counts"]["0.weight"] == 20


@pytest.mark.parametrize("name", ["ema by epoch", "swa by epoch"])
def test_an_epoch_whose_evaluation_was_cut_short_is_taken_in_once(name, tmp_path):
    whole, _, _ = train_averaged(name, num_epochs=3)
    how = {"num_epochs": 3, "run_dir": tmp_path / "run", "resume": "auto"}
    assert train_averaged(name, callbacks=[Interrupts()], **how)[0].num_epochs == 1
    assert train_averaged(name, **how)[0].test_losses == whole.test_losses


class Unfreezes(Callback):
    def __init__(self, back_again=False):
        self.back_again, self.weights = back_again, []

    def on_fit_start(self, trainer):
        trainer.model[0].requires_grad_(self.back_again)

    def on_epoch_start(self, trainer):
        if trainer.state.epoch == 3:
            trainer.model[0].requires_grad_(not self.back_again)

    def on_evaluation_start(self, trainer):  # before the average is put in
        self.weights.append(trainer.model[0].weight.detach().clone())


def test_a_weight_that_is_unfrozen_has_an_average_from_then_on():
    unfreezes = Unfreezes()
    average = WeightAverage(None, update_every="epoch")
    model = make_model(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    config = quiet(num_epochs=4, restore_best=False)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[unfreezes, average], config=config)
    trainer.fit(loader_of(make_data(40, torch.float64), 8), loader_of(make_data(29, torch.float64), 8))
    expected = (unfreezes.weights[2] + unfreezes.weights[3]) / 2
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_average_of_a_weight_that_is_frozen_later_goes_on_to_it():
    model = make_model(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    config = quiet(num_epochs=12, restore_best=False)
    callbacks = [Unfreezes(back_again=True), WeightAverage(0.5)]
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, config=config)
    trainer.fit(loader_of(make_data(40, torch.float64), 8), loader_of(make_data(29, torch.float64), 8))
    last = callbacks[0].weights[-1]
    torch.testing.assert_close(model[0].weight.detach(), last, rtol=1e-9, atol=1e-9)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make_model(torch.float64, "batchnorm")
        self.register_buffer("mask", torch.full((3, 3), -math.inf, dtype=torch.float64).triu(1))

    def forward(self, inputs):
        return self.inner(inputs) + (self.mask.exp().sum() - 6)


def test_buffers_that_are_not_finite_are_left_out():
    model, average = Masked(), WeightAverage(0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[average], config=quiet(num_micro_batches=2))
    history = trainer.fit(loader_of(make_data(40, torch.float64), 8), loader_of(make_data(29, torch.float64), 8))
    assert all(map(math.isfinite, history.test_losses)) and "mask" not in average.state_dict()["average"]
    assert "inner.1.running_mean" in average.state_dict()["average"]


def test_another_average_does_not_go_on_with_this_one(tmp_path):
    train_averaged("ema", run_dir=tmp_path / "run", num_epochs=1)
    with pytest.raises(ValueError, match=r"start_epoch \[0.8, 'step', 1\], and this one has"):
        train_averaged("swa", run_dir=tmp_path / "run", resume=True)


def test_an_error_in_the_evaluation_puts_the_weights_back():
    keeps, model = Unfreezes(back_again=True), make_model(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    how = {"metrics": {"odd": lambda outputs, targets: 1 / 0}, "callbacks": [keeps, WeightAverage(0.8)]}
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), **how, config=quiet())
    with pytest.raises(ZeroDivisionError):
        trainer.fit(loader_of(make_data(40, torch.float64), 8), loader_of(make_data(29, torch.float64), 8))
    assert torch.equal(model[0].weight, keeps.weights[0])


def test_half_precision_is_averaged_in_single():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(0.999)

    class Grow(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            model.weight.add_(1.0)

    loader = loader_of(torch.utils.data.TensorDataset(torch.ones(64, 1).bfloat16(), torch.ones(64, 1).bfloat16()), 1)
    config = quiet(num_epochs=1)
    trainer = Trainer(model, Grow(model.parameters(), lr=0.1), nn.MSELoss(), callbacks=[average], config=config)
    trainer.fit(loader)
    (found,) = average.state_dict()["average"].values()
    expected = 2.0
    for value in range(3, 66):
        expected += 0.001 * (value - expected)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"decay": 1.0}, "decay must be greater than 0 and less than 1, or None, got 1.0"),
        ({"decay": 0}, "decay must be greater than 0"),
        ({"update_every": "batch"}, "update_every must be 'step' or 'epoch', got 'batch'"),
        ({"start_epoch": 0}, "start_epoch must be a whole number of at least 1, got 0"),
        ({"start_epoch": 1.5}, "start_epoch must be a whole number"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightAverage(**arguments)
