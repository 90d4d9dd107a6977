"""What the user holds: how a run ends, what the model holds then, what is refused, what is left behind."""

import copy
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset

import accel_trainer
from accel_trainer import Callback, History, NonFiniteError, StopTraining, TrainConfig, Trainer
from accel_trainer.callbacks import Callbacks
from accel_trainer.numbers.reductions import sum_of_bits
from support import ROOT, correct, launch, loader_of, make_data, make_model, on_processes, quiet, summary, train


class Ramp(nn.Module):
    """A model whose only weight grows by 1 with each step of its optimizer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, inputs):
        return self.weight.expand(len(inputs))


def climb(model, batch):
    """A train loss whose gradient is -1; in evaluation a table of test losses, by the epoch that the weight counts."""
    if torch.is_grad_enabled():
        return -model(batch[0]).mean()
    return model(batch[0]).mean() * 0 + TEST_LOSSES[min(int(model.weight.detach()), len(TEST_LOSSES)) - 1]


TEST_LOSSES = [5.0, 1.0, 2.0, math.nan, 3.0, 4.0, 0.5]
ONE = TensorDataset(torch.zeros(1, 1))


def ramp(callbacks=(), **choices):
    model = Ramp()
    config = quiet(**{"num_epochs": 7, "report_every": 1, **choices})
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=1.0), compute_loss=climb, callbacks=callbacks, config=config
    )
    history = trainer.fit(DataLoader(ONE), DataLoader(ONE))
    return history, float(model.weight.detach()), trainer


# --- how a run ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices, epochs, best, reason",
    [
        (dict(num_epochs=6), 6, 2, "all 6 epochs done"),
        (dict(num_epochs=7), 7, 7, "all 7 epochs done"),
        (dict(patience=4), 6, 2, "no improvement of test_loss for 4 epochs"),
        (dict(patience=1), 3, 2, "no improvement of test_loss for 1 epochs"),
        (dict(patience=5), 7, 7, "all 7 epochs done"),
        (dict(num_epochs=6, min_delta=4.5), 6, 1, "all 6 epochs done"),
        (dict(num_epochs=6, mode="max"), 6, 1, "all 6 epochs done"),
        (dict(max_steps=3), 3, 2, "max_steps=3 reached"),
        (dict(num_epochs=6, monitor="train_loss"), 6, 6, "all 6 epochs done"),
    ],
)
def test_the_model_holds_the_best_epoch_however_the_run_ends(choices, epochs, best, reason):
    history, weight, trainer = ramp(**choices)
    assert (history.num_epochs, history.best_epoch, history.stop_reason) == (epochs, best, reason)
    assert weight == best
    history, weight, trainer = ramp(**choices, restore_best=False)
    assert weight == epochs


class StopAt(Callback):
    def __init__(self, hook, epoch):
        self.hook, self.epoch = hook, epoch

    def on_epoch_end(self, trainer):
        if self.hook == "epoch" and trainer.state.epoch == self.epoch:
            raise StopTraining("enough")

    def on_step_end(self, trainer):
        if self.hook == "step" and trainer.state.epoch == self.epoch:
            raise StopTraining("enough")
        if self.hook == "interrupt" and trainer.state.epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("hook", ["epoch", "step", "interrupt"])
def test_a_callback_and_an_interrupt_leave_the_best_weights_too(hook):
    before = signal.getsignal(signal.SIGINT)
    history, weight, _ = ramp([StopAt(hook, 3)])
    assert weight == history.best_epoch == 2
    assert history.num_epochs == (2 if hook == "interrupt" else 3)  # an interrupt does not wait for the evaluation
    assert history.stop_reason.startswith("interrupted (Ctrl-C)" if hook == "interrupt" else "enough")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("hook", ["step", "interrupt"])
def test_an_epoch_cut_short_is_not_recorded_and_leaves_the_best_weights(hook, tmp_path):
    model = make_model()
    config = quiet(num_epochs=9, run_dir=tmp_path / "run")
    trainer = Trainer(model, sgd(model), nn.CrossEntropyLoss(), callbacks=[StopAt(hook, 3)], config=config)
    history = trainer.fit(loader_of(make_data(37), 8))
    assert history.num_epochs == history.best_epoch == 2 and trainer.state.step == 11
    assert history.stop_reason.endswith("in epoch 3")
    best = accel_trainer.load_best(make_model(), tmp_path / "run")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, best.state_dict()[name])


def test_a_second_interrupt_leaves_at_once():
    class Twice(Callback):
        def on_epoch_end(self, trainer):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(1.1)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(1.0)

    with pytest.raises(KeyboardInterrupt):
        ramp([Twice()])


def test_a_time_limit_ends_the_run():
    class Sleep(Callback):
        def on_step_end(self, trainer):
            threading.Event().wait(0.05)

    history, _, _ = ramp([Sleep()], num_epochs=1000, time_limit_seconds=0.3)
    assert "time limit of 0.3 seconds reached" in history.stop_reason
    assert 2 <= history.num_epochs < 20


def test_without_a_test_loader_the_train_loss_is_monitored():
    model = Ramp()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=1.0), compute_loss=climb, config=quiet(num_epochs=4)
    )
    history = trainer.fit(DataLoader(ONE))
    assert history.test_losses == [] and history.best_epoch == 4 and history.best_value == history.train_losses[-1]


def test_a_nan_never_improves():
    model = Ramp()
    config = quiet(num_epochs=3, on_nonfinite="ignore")

    def compute_loss(model, batch):
        return model(batch[0]).mean() * math.nan

    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), compute_loss=compute_loss, config=config)
    history = trainer.fit(DataLoader(ONE))
    assert history.best_epoch is None and all(math.isnan(loss) for loss in history.train_losses)


def test_overfitting_is_told_in_one_line(capsys):
    history = History(
        train_losses=[1.0, 0.5, 0.3, 0.2, 0.1, 0.05], test_losses=[1.0, 0.6, 0.7, 0.8, 0.9, 1.0], best_epoch=2
    )
    assert history.overfitting().startswith("Overfitting: since epoch 2 the test loss rose from 0.6000 to 1.0000")
    history.test_losses = [1.0, 0.6, 0.5, 0.4, 0.3, 0.2]
    assert history.overfitting() is None
    assert History().overfitting() is None


def test_a_second_fit_is_a_new_run_and_equal_to_that_of_a_fresh_trainer():
    model, other = make_model(kind="dropout"), make_model(kind="dropout")
    loader = loader_of(make_data(37), 4)

    def trainer_of(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(max_steps=5, num_micro_batches=3))

    first = trainer_of(model)
    first.fit(loader)  # stops in the middle of an epoch
    other.load_state_dict(model.state_dict())
    again, fresh = first.fit(loader), trainer_of(other).fit(loader)
    assert again.train_losses == fresh.train_losses
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_a_broken_off_epoch_leaves_no_loader_worker():
    def children():
        done = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True)
        return {
            line
            for line in done.stdout.splitlines()
            if "python" in line and not re.search("resource_tracker|forkserver", line)
        }

    before, children_before = len(os.listdir("/proc/self/task")), children()
    train_loader = loader_of(make_data(400), 4, num_workers=0)
    slow = DataLoader([(item[0], item[1]) for item in train_loader.dataset], 4, num_workers=2)
    model = make_model()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet(max_steps=3)
    )
    trainer.fit(slow)
    assert children() <= children_before
    assert len(os.listdir("/proc/self/task")) <= before + 1


# --- the same decision on every process -------------------------------------------------------------------------------


def decide(kind):
    """End a run by something that only one process sees, or that differs between them."""
    rank = torch.distributed.get_rank()

    class OnlyHere(Callback):
        def on_step_end(self, trainer):
            if kind == "step" and rank == 1 and trainer.state.step == 20:
                raise StopTraining("seen on process 1")
            if kind == "interrupt" and rank == 1 and trainer.state.step == 20:
                os.kill(os.getpid(), signal.SIGINT)

        def on_epoch_end(self, trainer):
            if kind == "epoch" and rank == 1 and trainer.state.epoch == 2:
                raise StopTraining("seen on process 1")

    def by_rank(outputs, targets):
        return torch.tensor(float(rank))

    model = make_model()
    of_metric = {"patience": 2, "monitor": "by_rank", "mode": "min", "num_epochs": 50}
    choices = of_metric if kind == "metric" else {"num_epochs": 2000}
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        metrics={"by_rank": by_rank},
        callbacks=[OnlyHere()],
        config=quiet(**choices),
    )
    history = trainer.fit(loader_of(make_data(37), 7), loader_of(make_data(11), 4))
    return trainer.state.step, history.stop_reason, summary(history, model)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["metric", "step", "epoch", "interrupt"])
def test_all_processes_end_at_the_same_step_for_the_same_reason(kind):
    results = on_processes(3, decide, kind)
    steps, reasons, summaries = zip(*results, strict=True)
    assert len(set(steps)) == 1 and len(set(reasons)) == 1
    for name in ("train_losses", "test_losses", "metrics", "best_epoch"):
        assert summaries[0][name] == summaries[1][name] == summaries[2][name]
    assert {"metric": "no improvement", "interrupt": "interrupted"}.get(kind, "seen on process 1") in reasons[0]
    if kind == "metric":
        assert steps[0] == 18  # a constant metric: the best is the first, then two without improvement
    if kind == "epoch":
        assert steps[0] == 12


def nan_on_one_process(run_dir):
    rank = torch.distributed.get_rank()
    model = make_model()

    def compute_loss(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        bad = rank == 1 and torch.is_grad_enabled() and trainer.state.num_batches == 8
        return loss * math.nan if bad else loss

    config = quiet(num_epochs=5, report_every=3, run_dir=run_dir)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), compute_loss=compute_loss, config=config)
    try:
        trainer.fit(loader_of(make_data(37), 7), loader_of(make_data(11), 4))
    except NonFiniteError as error:
        return str(error), trainer.state.step, trainer.history.train_losses, trainer.history.best_epoch


@pytest.mark.distributed
def test_a_nan_on_one_process_stops_all_and_names_step_and_process(tmp_path):
    results = on_processes(2, nan_on_one_process, tmp_path / "run")
    for message, step, train_losses, best_epoch in results:
        assert message.startswith(
            "Train loss became nan in epoch 2, step 8, process 1. Not finite by now: 0.weight, 0.bias"
        )
        assert step == 9  # the next report
        assert len(train_losses) == 2 and math.isnan(train_losses[1]) and not math.isnan(train_losses[0])
        assert best_epoch == 1
    assert math.isnan(History.load(tmp_path / "run").train_losses[1])
    best = accel_trainer.load_best(make_model(), tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in best.state_dict().values())


# --- one process fails ------------------------------------------------------------------------------------------------

FAILING = """
import os, sys, time, torch
from torch.utils.data import DataLoader, Dataset
from accel_trainer import Callback, TrainConfig, Trainer

kind, rank = sys.argv[1], int(os.environ["RANK"])

class Data(Dataset):
    num_fetched = 0
    def __len__(self):
        return 64
    def __getitem__(self, index):
        Data.num_fetched += 1
        if kind == "data" and rank == 1 and Data.num_fetched > 20:
            raise KeyError("no such sample")
        return torch.ones(4) * index / 64, index % 2

class Here(Callback):
    def on_step_end(self, trainer):
        if kind == "callback" and rank == 1 and trainer.state.step == 5:
            raise KeyError("no such sample")
    def on_epoch_end(self, trainer):
        if kind == "main callback" and trainer.is_main_process:
            raise KeyError("no such sample")

def loss_fn(outputs, targets):
    if kind == "loss" and rank == 1 and trainer.state.step == 5:
        raise KeyError("no such sample")
    return torch.nn.functional.cross_entropy(outputs, targets)

def metric(outputs, targets):
    if kind == "metric" and rank == 1:
        raise KeyError("no such sample")
    return outputs.argmax(1) == targets

model = torch.nn.Linear(4, 2)
loader = DataLoader(Data(), batch_size=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
config = TrainConfig(num_epochs=9)
trainer = Trainer(model, optimizer, loss_fn, metrics={"m": metric}, callbacks=[Here()], config=config)
started = time.time()
try:
    trainer.fit(loader, loader)
finally:
    print(f"left after {time.time() - started:.1f}", flush=True)
    if kind == "stuck" and rank == 1:
        time.sleep(60)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["data", "main callback"])
def test_an_error_on_one_process_ends_all_and_is_printed_first(kind):
    done = launch(FAILING, args=[kind], timeout=60)
    assert done.returncode != 0
    left = [float(seconds) for seconds in re.findall(r"left after (\d+\.\d)", done.stdout)]
    assert len(left) == 2 and max(left) < 10
    rank = 0 if kind == "main callback" else 1
    own_lines = [line for line in done.stderr.splitlines() if not line.startswith(("W1", "*", "[W", "[rank"))]
    first = next(line for line in own_lines if "rror" in line)
    assert first == f"accel_trainer: process {rank} of 2 failed with KeyError: 'no such sample'"
    assert f"Process {rank} failed with KeyError: 'no such sample'" in done.stderr  # what the other one says


def fail(kind, started):
    """The same, forked: return how long this process took to leave, and with what."""
    rank = torch.distributed.get_rank()

    class Here(Callback):
        def on_step_end(self, trainer):
            if kind == "callback" and rank == 1 and trainer.state.step == 5:
                raise KeyError("no such sample")

    def loss_fn(outputs, targets):
        if kind == "loss" and rank == 1 and trainer.state.step == 5:
            raise KeyError("no such sample")
        return nn.functional.cross_entropy(outputs, targets)

    def metric(outputs, targets):
        if kind == "metric" and rank == 1:
            raise KeyError("no such sample")
        return correct(outputs, targets)

    model = make_model()
    trainer = Trainer(model, sgd(model), loss_fn, metrics={"m": metric}, callbacks=[Here()], config=quiet(num_epochs=9))
    try:
        trainer.fit(loader_of(make_data(37), 7), loader_of(make_data(37), 7))
    except KeyError:
        os._exit(3)  # as an uncaught error would, without the tidy end of a test process
    except accel_trainer.ProcessFailedError as error:
        sys.stderr.write(f"peer after {time.monotonic() - started:.1f}: {error}\n")
        os._exit(4)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["loss", "metric", "callback"])
def test_an_error_in_the_users_code_on_one_process_ends_all(kind, capfd):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code"):
        on_processes(2, fail, kind, time.monotonic())
    lines = [line for line in capfd.readouterr().err.splitlines() if "failed with" in line]
    assert lines[0] == "accel_trainer: process 1 of 2 failed with KeyError: 'no such sample'"
    assert all("Process 1 failed with KeyError: 'no such sample'" in line for line in lines[1:])


class HoldOn(Callback):
    """Fail on one process, which then stays alive: its connections do not close."""

    def on_step_end(self, trainer):
        if torch.distributed.get_rank() == 1 and trainer.state.step == 2:
            raise KeyError("held")


def hold_on():
    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        callbacks=[HoldOn()],
        config=quiet(num_epochs=100),
    )
    try:
        trainer.fit(loader_of(make_data(37), 7))
    except KeyError:
        threading.Event().wait(20)


@pytest.mark.distributed
def test_a_process_that_waits_for_one_that_failed_but_lives_ends_itself():
    started = time.time()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 1"):
        on_processes(2, hold_on)
    assert time.time() - started < 10


# --- evaluate and predict ---------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def forward(self, inputs):
        return {"twice": inputs * 2, "pair": (inputs, inputs[:, 0])}


def predict_all(num_samples, **kwargs):
    data = TensorDataset(torch.arange(float(num_samples)).reshape(-1, 1))
    loader = DataLoader(data, **kwargs)
    return Trainer(Twice(), None, nn.MSELoss(), config=quiet()).predict(loader)


@pytest.mark.distributed
@pytest.mark.parametrize("num_samples", [1, 3, 41, 300])
def test_predict_gives_each_sample_once_in_dataset_order_on_the_main_process(num_samples):
    for kwargs in (dict(batch_size=4), dict(batch_size=4, shuffle=True, drop_last=True), dict(batch_size=3)):
        for num_processes in (1, 3):
            main, *others = on_processes(num_processes, _predict, num_samples, kwargs)
            assert others == [None] * (num_processes - 1)
            assert main["twice"].flatten().tolist() == [2.0 * index for index in range(num_samples)]
            assert main["pair"][1].tolist() == [float(index) for index in range(num_samples)]


def _predict(num_samples, kwargs):
    return predict_all(num_samples, **kwargs)


def test_predict_of_a_subset_sampler_gives_that_subset_in_dataset_order():
    subset = SubsetRandomSampler([7, 2, 9])
    for kwargs in (
        dict(batch_size=2, sampler=subset, drop_last=True),
        dict(batch_sampler=[[7, 2], [9]]),
        dict(batch_size=None, sampler=BatchSampler(subset, 2, False)),
    ):
        assert predict_all(10, **kwargs)["pair"][1].tolist() == [2.0, 7.0, 9.0]


def test_predictions_that_do_not_fit_together_are_refused_with_their_shapes():
    class Ragged(nn.Module):
        def forward(self, inputs):
            return torch.zeros(len(inputs), int(inputs[0]) + 1)

    loader = DataLoader(TensorDataset(torch.arange(4.0).reshape(-1, 1)), batch_size=2)
    with pytest.raises(ValueError, match=r"cannot be joined along the samples: Sizes of tensors must match"):
        Trainer(Ragged(), None, nn.MSELoss(), config=quiet()).predict(loader)


def test_an_empty_loader_has_no_value_and_is_no_error():
    trainer = Trainer(nn.Linear(5, 3), None, nn.CrossEntropyLoss(), metrics={"accuracy": correct}, config=quiet())
    loader = DataLoader(TensorDataset(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)), batch_size=4)
    assert all(math.isnan(value) for value in trainer.evaluate(loader).values())
    assert trainer.predict(loader) is None


def own_weights():
    torch.manual_seed(torch.distributed.get_rank())
    model = nn.Linear(5, 3)
    trainer = Trainer(model, None, nn.CrossEntropyLoss(), config=quiet())
    return trainer.evaluate(loader_of(make_data(11), 4))["loss"], model.weight.tolist()


@pytest.mark.distributed
def test_evaluate_uses_the_main_processs_weights_everywhere():
    results = on_processes(2, own_weights)
    assert results[0] == results[1]


def test_modes_are_put_back_also_after_an_error():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    model.train()
    model[1].eval()  # frozen on purpose
    modes = [module.training for module in model.modules()]
    during = []

    def loss_fn(outputs, targets):
        during.append([module.training for module in model.modules()])
        if len(during) == 4:
            raise KeyError("inside an evaluation")
        return nn.functional.cross_entropy(outputs, targets)

    statistics = model[1].running_mean.clone()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, config=quiet())
    with pytest.raises(KeyError):
        trainer.fit(loader_of(make_data(8), 8), loader_of(make_data(8), 8))
    assert during[0] == during[2] == modes and during[1] == [False] * 5
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(statistics, model[1].running_mean)


def batchnorm_buffers(run_dir):
    model = make_model(kind="batchnorm")

    class Look(Callback):
        def on_epoch_end(self, trainer):
            if trainer.is_main_process:
                trainer.model(torch.zeros(4, 5))  # whatever one process does with the model alone

    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        callbacks=[Look()],
        config=quiet(num_epochs=1, run_dir=run_dir),
    )
    trainer.fit(loader_of(make_data(40), 8), loader_of(make_data(11), 4))
    trainer.evaluate(loader_of(make_data(7), 4))
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


@pytest.mark.distributed
def test_buffers_are_the_same_bits_on_every_process_and_in_the_file(tmp_path):
    from safetensors.torch import load_file

    one, two = on_processes(2, batchnorm_buffers, tmp_path / "run")
    assert two["1.num_batches_tracked"] == 5  # counts steps, not micro-batches
    saved = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert two == {name: saved[name].tolist() for name in two}
    assert one == two


def reach_into():
    model = make_model()

    def compute_loss(prepared, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])  # not the model it is given

    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), compute_loss=compute_loss, config=quiet(num_epochs=1)
    )
    try:
        trainer.fit(loader_of(make_data(37), 7))
    except RuntimeError as error:
        return str(error)


@pytest.mark.distributed
def test_weights_that_part_are_found():
    for message in on_processes(2, reach_into):
        assert message.startswith("The weights differ between the processes, first in 0.weight. Call the model that")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (7, 8)])
def test_no_bit_of_a_weight_can_differ_unseen(dtype, shape):
    for offset in (0, 1):
        memory = torch.randn(offset + math.prod(shape)).to(dtype)
        weight = memory[offset:].view(shape)
        bits = sum_of_bits(weight)
        for place in range(weight.nbytes):
            raw = memory[offset:].view(torch.uint8)
            for bit in (0, 7):
                raw[place] ^= 1 << bit
                assert sum_of_bits(weight) != bits
                raw[place] ^= 1 << bit
        assert sum_of_bits(weight) == bits


# --- what is refused before anything is trained -----------------------------------------------------------------------


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_arguments_of_the_wrong_kind_are_refused():
    model = make_model()
    cases = [
        (dict(model=object()), TypeError, "model must be a torch.nn.Module, got object"),
        (dict(model=nn.DataParallel(model)), TypeError, "wrapped in DataParallel. Give the plain model"),
        (dict(optimizer=model.parameters()), TypeError, "optimizer must be a torch.optim.Optimizer, got generator"),
        (dict(optimizer=torch.optim.LBFGS(model.parameters())), TypeError, "The optimizer LBFGS wants a closure"),
        (dict(optimizer=sgd(make_model())), ValueError, r"holds 4 of 4 parameters that are not the model's.*\(8, 5\)"),
        (dict(config={"num_epochs": 3}), TypeError, "config must be a TrainConfig, got dict"),
        (dict(accelerator=3), TypeError, "accelerator must be a function that builds the Accelerator"),
        (dict(scheduler=3), TypeError, "scheduler must be a torch scheduler or a function"),
        (dict(callbacks=[3]), TypeError, "A callback must be an instance of accel_trainer.Callback, got 3"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            Trainer(**{"model": model, "optimizer": sgd(model), "loss_fn": nn.CrossEntropyLoss(), **arguments})


def test_a_scheduler_of_another_optimizer_is_refused():
    model = make_model()
    scheduler = torch.optim.lr_scheduler.StepLR(sgd(model), 1)
    with pytest.raises(ValueError, match="made for another optimizer"):
        Trainer(model, sgd(model), nn.CrossEntropyLoss(), scheduler=scheduler)


def test_a_model_without_trainable_parameters_is_refused():
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        Trainer(model, sgd(model), nn.CrossEntropyLoss())


def test_a_misspelt_hook_is_refused_with_the_nearest_known():
    class Typo(Callback):
        def on_epoch_ends(self, trainer):
            pass

    with pytest.raises(TypeError, match=r"Typo.on_epoch_ends is not a hook .* Did you mean .on_epoch_end.\?"):
        Trainer(make_model(), None, nn.CrossEntropyLoss(), callbacks=[Typo()])


@pytest.mark.parametrize("monitor, with_test", [("accuracies", True), ("accuracy", False)])
def test_an_unknown_monitor_is_refused_with_the_known_ones(monitor, with_test):
    model = make_model()
    trainer = Trainer(
        model, sgd(model), nn.CrossEntropyLoss(), metrics={"accuracy": correct}, config=quiet(monitor=monitor)
    )
    known = (
        "test_loss, train_loss, accuracy" if with_test else "test_loss, train_loss .metrics are computed on the test"
    )
    with pytest.raises(ValueError, match=f"monitor must be one of {known}.*got '{monitor}'"):
        trainer.fit(loader_of(make_data(8)), loader_of(make_data(8)) if with_test else None)


def test_fit_without_an_optimizer_is_refused():
    with pytest.raises(ValueError, match="fit needs an optimizer"):
        Trainer(make_model(), None, nn.CrossEntropyLoss()).fit(loader_of(make_data(8)))


def test_sync_batchnorm_over_processes_is_refused(monkeypatch):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model(kind="batchnorm"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="SyncBatchNorm normalises over processes"):
        Trainer(model, sgd(model), nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    "choices, message",
    [
        (dict(num_epochs=0), "num_epochs must be at least 1, got 0"),
        (dict(patience=0), "patience must be at least 1, got 0"),
        (dict(num_epochs=2.5), "num_epochs must be a whole number, got 2.5"),
        (dict(max_steps=True), "max_steps must be a whole number or None, got True"),
        (dict(num_micro_batches=-1), "num_micro_batches must be at least 1, got -1"),
        (dict(min_delta=-0.1), "min_delta must be a number of at least 0 and finite, got -0.1"),
        (dict(min_delta=math.nan), "min_delta must be a number of at least 0 and finite"),
        (dict(mode="minimum"), "mode must be 'min', 'max' or None, got 'minimum'"),
        (dict(mixed_precision="half"), "mixed_precision must be 'no', 'fp16', 'bf16', 'fp8' or None, got 'half'"),
        (dict(schedule_every="batch"), "schedule_every must be 'step' or 'epoch'"),
        (dict(on_nonfinite="stop"), "on_nonfinite must be 'raise', 'skip' or 'ignore'"),
        (dict(min_delta="0.1"), "min_delta must be a number of at least 0 and finite, got '0.1'"),
        (dict(max_grad_norm=0), "max_grad_norm must be a number greater than 0"),
        (dict(max_grad_norm=math.nan), "max_grad_norm must be a number greater than 0"),
        (dict(max_grad_norm="1"), "max_grad_norm must be a number greater than 0 .or None., got '1'"),
        (dict(time_limit_seconds=-1), "time_limit_seconds must be a number greater than 0"),
        (dict(restore_best="no"), "restore_best must be True or False, got 'no'"),
        (dict(run_dir=5), "run_dir must be a path or None, got 5"),
        (dict(monitor=3), "monitor must be a name, got 3"),
        (dict(resume="yes"), "resume must be True, False or 'auto', got 'yes'"),
        (dict(resume=1), "resume must be True, False or 'auto', got 1"),
        (dict(resume=True), "resume needs a run_dir"),
        (dict(checkpoint_every=10), "checkpoint_every needs a run_dir"),
        (dict(checkpoint_every="10 minutes", run_dir="x"), "checkpoint_every must be steps, minutes such as '10min'"),
        (dict(checkpoint_every=0, run_dir="x"), "checkpoint_every must be steps"),
        (dict(checkpoint_every="0min", run_dir="x"), "checkpoint_every must be steps"),
        (dict(keep_checkpoints=0), "keep_checkpoints must be at least 1, got 0"),
        (dict(seed=-1), "seed must be a whole number from 0"),
        (dict(seed=2**63), "seed must be a whole number from 0"),
    ],
)
def test_a_choice_out_of_its_range_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**choices)


# --- nothing is left behind -------------------------------------------------------------------------------------------


def test_import_and_construction_touch_nothing():
    script = """
import os, random, sys
import numpy, torch
before = torch.get_rng_state(), random.getstate(), dict(os.environ)
import accel_trainer
from accelerate.state import AcceleratorState, PartialState
model = torch.nn.Linear(1, 1)
state = torch.get_rng_state()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = accel_trainer.Trainer(model, optimizer, torch.nn.MSELoss(), config=accel_trainer.TrainConfig(verbose=False))
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert PartialState._shared_state == {} and AcceleratorState._shared_state == {}
assert torch.equal(state, torch.get_rng_state()) and random.getstate() == before[1] and dict(os.environ) == before[2]
assert "matplotlib" not in sys.modules and "datasets" not in sys.modules and "sklearn" not in sys.modules
from accelerate import debug_launcher
from torch.utils.data import DataLoader, TensorDataset
def fit():
    loader = DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), 2)
    assert trainer.fit(loader).num_epochs == 50
if __name__ == "__main__":
    debug_launcher(fit, num_processes=2)
    print("done")
"""
    done = launch(script, launcher="python")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("done")


def test_the_model_comes_back_plain():
    model = make_model()
    before = set(model.__dict__)
    trainer = Trainer(model, sgd(model), nn.CrossEntropyLoss(), config=quiet(mixed_precision="bf16"))
    seen = []

    class Look(Callback):
        def on_step_end(self, trainer):
            seen.append("forward" in model.__dict__)

    trainer._callbacks.append(Look())
    trainer.fit(loader_of(make_data(8)), loader_of(make_data(8)))
    trainer.evaluate(loader_of(make_data(8)))
    assert all(seen)  # Accelerate's autocast hangs on the model during the run ...
    assert set(model.__dict__) == before and type(model) is nn.Sequential  # ... and no longer
    assert trainer.model is model
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    inputs = torch.randn(3, 5)
    assert torch.equal(copied(inputs), model(inputs))


def test_public_objects_can_be_pickled():
    for thing in (quiet(), History([1.0]), StopTraining("x"), Callback(), accel_trainer.errors.HardwareError("y")):
        assert type(pickle.loads(pickle.dumps(thing))) is type(thing)
    assert pickle.loads(pickle.dumps(StopTraining("why"))).reason == "why"


def test_the_public_names_are_these():
    assert sorted(accel_trainer.__all__) == [
        "Callback",
        "CheckpointError",
        "HardwareError",
        "History",
        "Loss",
        "NonFiniteError",
        "ProcessFailedError",
        "StopTraining",
        "TrainConfig",
        "Trainer",
        "WeightAverage",
        "evaluate_model",
        "launch",
        "load_best",
        "train_model",
    ]


# --- what is printed --------------------------------------------------------------------------------------------------


def test_the_lines_of_a_run(capsys):
    model = make_model()
    config = TrainConfig(num_epochs=2, num_micro_batches=2)
    trainer = Trainer(model, sgd(model), nn.CrossEntropyLoss(), config=config)
    history = trainer.fit(loader_of(make_data(37), 8), loader_of(make_data(11)))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == (
        "CPU (no accelerator found), 1 process (default), precision no (default); "
        "batch 8 = 1 process x 2 micro-batches x 4 (micro-batches: argument)"
    )
    assert lines[1] == (
        f"Epoch 1/2 - Train Loss: {history.train_losses[0]:.4f}, Test Loss: {history.test_losses[0]:.4f} (best)"
    )
    assert lines[3] == "Stopped: all 2 epochs done."
    assert lines[4] == f"Best epoch 2: test_loss {history.test_losses[1]:.4f}; the model holds its weights."
    assert err == ""  # no bar where nobody watches


def test_a_bar_in_a_terminal_does_not_break_the_lines():
    script = (
        "import sys, torch; sys.path[:0] = ['tests']\n"
        "from support import *\n"
        "model = make_model()\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "config = TrainConfig(num_epochs=2, report_every=2)\n"
        "Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config).fit(loader_of(make_data(2000), 4))\n"
    )
    # script(1) gives the process a terminal.
    command = ["script", "-qec", f'stty rows 40 cols 100; {sys.executable} -c "{script}"', "/dev/null"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.decode().replace("\r\n", "\n").split("\n")
    assert any("\r" in line and "Epoch 1/2 " in line and "/500  " in line and "samples/s" in line for line in lines)
    assert any("\033[32m" in line for line in lines)  # the best epoch, in colour
    shown = [re.sub(r"\033\[\d*m", "", line.split("\r")[-1]) for line in lines]
    assert sum(line.startswith("Epoch 1/2 - Train Loss: ") for line in shown) == 1
    assert sum(line.startswith("Stopped: all 2 epochs done.") for line in shown) == 1


def test_a_hook_that_nobody_overrides_is_not_called():
    class Loud(Callback):
        def on_epoch_end(self, trainer):
            calls.append("epoch")

    calls = []
    callbacks = Callbacks([Loud(), Callback()])
    assert callbacks.heard == {"on_epoch_end"}
    callbacks.call("on_step_end"), callbacks.call("on_epoch_end")
    assert calls == ["epoch"]


def test_history_to_dict_is_plain_data():
    history, _, _ = ramp(num_epochs=3)
    plain = json.loads(json.dumps(history.to_dict()))
    assert plain["test_losses"] == [5.0, 1.0, 2.0] and plain["best_epoch"] == 2
    assert set(plain) >= {"train_losses", "learning_rates", "metrics", "epoch_seconds", "best_value", "stop_reason"}
    assert train()["metrics"].keys() == {"accuracy"}


# --- found by trying --------------------------------------------------------------------------------------------------


def stop_at_the_end(kind):
    """Full-batch training has one step an epoch: every stop falls on the last step of one."""

    class Here(Callback):
        def on_step_end(self, trainer):
            if kind == "callback" and trainer.is_main_process and trainer.state.step == 5:
                time.sleep(0.6)
                raise StopTraining("enough")

    model = make_model()
    batch_size = 16 if kind == "time" else 3
    config = quiet(num_epochs=10**6, time_limit_seconds=0.3 if kind == "time" else None)
    trainer = Trainer(model, sgd(model), nn.CrossEntropyLoss(), callbacks=[Here()], config=config)
    history = trainer.fit(loader_of(make_data(16), batch_size), loader_of(make_data(8), 8))
    return trainer.state.step, history.num_epochs, history.stop_reason


@pytest.mark.distributed
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["time", "time", "callback"])
def test_a_stop_on_the_last_step_of_an_epoch_is_the_same_for_all(kind):
    one, two = on_processes(2, stop_at_the_end, kind)
    assert one == two


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        history, _, _ = ramp([StopAt("interrupt", 3)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert history.num_epochs == 7


def test_a_run_stopped_in_its_first_epoch_says_so_and_leaves_the_name_free(tmp_path, capsys):
    model = make_model()
    config = TrainConfig(run_dir=tmp_path / "run")
    trainer = Trainer(model, sgd(model), nn.CrossEntropyLoss(), callbacks=[StopAt("step", 1)], config=config)
    history = trainer.fit(loader_of(make_data(37), 8))
    assert history.num_epochs == 0 and "No epoch was finished" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own insides
def test_a_compiled_launch_leaves_nothing_on_the_model(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    model = make_model()
    before = set(model.__dict__)
    Trainer(model, sgd(model), nn.CrossEntropyLoss(), config=quiet()).fit(loader_of(make_data(8), 4))
    assert set(model.__dict__) == before


def test_a_state_that_cannot_be_saved_is_refused_before_the_first_step():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    model = Extra(5, 3)
    trainer = Trainer(model, sgd(model), nn.CrossEntropyLoss(), config=quiet())
    with pytest.raises(TypeError, match="The model's state '_extra_state' is a dict"):
        trainer.fit(loader_of(make_data(8), 4))
    assert trainer.state.step == 0


def test_outputs_that_are_not_one_per_sample_are_left_out_or_refused():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(1, 4, batch_first=True)

        def forward(self, inputs):
            return self.layer(inputs)

    loader = DataLoader(TensorDataset(torch.zeros(16, 3, 1)), batch_size=8)
    with pytest.warns(UserWarning, match=r"predict leaves out what has no entry per sample: \[1\]\[0\], \[1\]\[1\]"):
        outputs, state = Trainer(Recurrent(), None, nn.MSELoss(), config=quiet()).predict(loader)
    assert outputs.shape == (16, 3, 4) and state == (None, None)

    class Turned(Recurrent):
        def forward(self, inputs):
            return self.layer(inputs)[0].transpose(0, 1)

    with pytest.raises(ValueError, match=r"for 8 samples the model returned shape \(3, 8, 4\)"):
        Trainer(Turned(), None, nn.MSELoss(), config=quiet()).predict(loader)


def data_on_one_process_only():
    rank = torch.distributed.get_rank()
    model = make_model()
    trainer = Trainer(model, sgd(model), nn.CrossEntropyLoss(), config=quiet())
    try:
        trainer.fit(DataLoader(make_data(48 if rank == 0 else 0), 8))
    except (ValueError, accel_trainer.ProcessFailedError) as error:
        return str(error)


@pytest.mark.distributed
def test_an_empty_dataset_on_one_process_is_named_on_all():
    one, two = on_processes(2, data_on_one_process_only)
    assert "Process 1 failed with ValueError: train_loader yields no batch" in one
    assert two.startswith("train_loader yields no batch")


@pytest.mark.parametrize("callbacks", [Callback(), None])
def test_callbacks_that_are_no_list_are_refused(callbacks):
    with pytest.raises(TypeError, match="callbacks must be a list of Callback objects"):
        Trainer(make_model(), None, nn.CrossEntropyLoss(), callbacks=callbacks)
