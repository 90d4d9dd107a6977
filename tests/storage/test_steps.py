"""What is recorded by step, and the hooks that hear of reports and checkpoints."""

import json
import signal

import pytest
import torch
from torch import nn

from accel_trainer import Callback, History, StopTraining, Trainer
from accel_trainer.storage.checkpoints import fault_of
from support import loader_of, make_data, make_model, on_processes, quiet


class Watch(Callback):
    """Keep the learning rates of each update, which the schedule changes after it."""

    def __init__(self):
        self.rates, self.reported, self.checkpoints = [], [], []

    def on_fit_start(self, trainer):
        self.before = [group["lr"] for group in trainer.optimizer.param_groups]

    def on_step_end(self, trainer):
        self.rates.append(self.before)
        self.on_fit_start(trainer)

    def on_report(self, trainer):
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        self.reported.append((trainer.state.step, trainer.state.recent_loss, rates))

    def on_checkpoint(self, trainer, path):
        self.checkpoints.append((path.name, fault_of(path)))


def train_reported(run_dir=None, watch=None, report_every=3, **choices):
    model = make_model(torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.02}]
    trainer = Trainer(
        model,
        torch.optim.SGD(groups, momentum=0.9),
        nn.CrossEntropyLoss(),
        scheduler=lambda optimizer, num_steps: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[0.1, 0.02], total_steps=num_steps
        ),
        callbacks=[watch] if watch is not None else [],
        config=quiet(run_dir=run_dir, report_every=report_every, num_micro_batches=2, **{"num_epochs": 3, **choices}),
    )
    return trainer.fit(loader_of(make_data(37, torch.float64), 8))


def of_steps(history):
    return history.steps, history.step_losses, history.step_learning_rates


def test_each_report_has_the_mean_loss_since_the_last_and_all_learning_rates(tmp_path):
    watch = Watch()
    by_step = train_reported(watch=watch, report_every=1)
    assert by_step.steps == list(range(1, 16)) and by_step.step_learning_rates == watch.rates
    assert watch.rates[0] != watch.rates[1] and len(watch.rates[0]) == 2
    history = train_reported(tmp_path / "run")
    assert history.steps == [3, 6, 9, 12, 15]  # five steps to an epoch
    sizes = [8, 8, 8, 8, 5] * 3
    for step, loss in zip(history.steps, history.step_losses, strict=True):
        start = max(step - 3, (step - 1) // 5 * 5)
        products = [by_step.step_losses[at] * sizes[at] for at in range(start, step)]
        assert loss == pytest.approx(sum(products) / sum(sizes[start:step]), rel=1e-12)
    assert history.step_learning_rates == [watch.rates[step - 1] for step in history.steps]
    rows = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    found = [(row["step"], row["train_loss"], row["learning_rates"]) for row in rows]
    assert found == list(zip(*of_steps(history), strict=True))
    assert of_steps(History.load(tmp_path / "run")) == of_steps(history)


@pytest.mark.distributed
def test_every_process_has_the_same_reports():
    expected = of_steps(train_reported())
    for found in on_processes(2, lambda: of_steps(train_reported())):
        assert found[0] == expected[0] and found[2] == expected[2]
        assert found[1] == pytest.approx(expected[1], rel=1e-10)


def test_a_run_that_goes_on_has_the_reports_of_one_left_alone(tmp_path):
    whole = of_steps(train_reported())
    for steps in (1, 4, 5, 11):

        class Interrupts(Callback):
            def on_step_end(self, trainer, last=steps):
                if trainer.state.step == last:
                    signal.raise_signal(signal.SIGINT)

        how = {"run_dir": tmp_path / str(steps), "resume": "auto", "checkpoint_every": steps}
        assert train_reported(watch=Interrupts(), **how).stop_reason.startswith("interrupted")
        with open(tmp_path / str(steps) / "steps.jsonl", "a") as file:  # of steps after the checkpoint, and half a line
            file.write('{"step": 14, "train_loss": 9.0, "learning_rates": [1.0]}\n{"step": 15, "tra')
        assert of_steps(train_reported(**how)) == whole
        assert of_steps(History.load(tmp_path / str(steps))) == whole


def test_damaged_lines_are_left_out(tmp_path):
    train_reported(tmp_path / "run")
    path = tmp_path / "run/steps.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace('"step": 6', '"step": 7')
    path.write_text("\n".join([lines[0], lines[1], "[]", "7", *lines[2:-1], lines[-1][:20]]))
    assert History.load(tmp_path / "run").steps == [3, 9, 12]
    path.unlink()
    assert History.load(tmp_path / "run").steps == []


def test_steps_that_cannot_be_written_are_no_error(tmp_path):
    class Blocks(Callback):
        def on_report(self, trainer):
            path = tmp_path / "run/steps.jsonl"
            if trainer.state.step == 3:
                path.rename(tmp_path / "aside")
                path.mkdir()
            elif trainer.state.step == 9:
                path.rmdir()

    with pytest.warns(UserWarning, match=r"Could not write .*steps\.jsonl"):
        history = train_reported(tmp_path / "run", Blocks())
    assert history.steps == [3, 6, 9, 12, 15]
    assert History.load(tmp_path / "run").steps == [12, 15]


def test_a_new_run_has_steps_of_its_own(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/steps.jsonl").write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"holds steps\.jsonl, which the run would write over"):
        train_reported(tmp_path / "run")


def test_a_callback_may_end_the_run_at_a_report():
    class Enough(Callback):
        def on_report(self, trainer):
            raise StopTraining(f"loss {trainer.state.recent_loss > 0}")

    history = train_reported(watch=Enough())
    assert history.stop_reason == "loss True in epoch 1" and history.steps == [3]


def checkpoints_heard(run_dir):
    watch = Watch()
    train_reported(run_dir, watch, checkpoint_every=4, keep_checkpoints=9)
    return watch.checkpoints


@pytest.mark.distributed
def test_the_main_process_hears_of_each_checkpoint_when_it_is_whole(tmp_path):
    expected = [(f"step_{step:08d}", None) for step in (4, 8, 12, 15)]
    assert checkpoints_heard(tmp_path / "one") == expected
    assert on_processes(2, checkpoints_heard, tmp_path / "two") == [expected, []]


class Late(Callback):
    """A callback that has a state only once the run has begun."""

    def on_fit_start(self, trainer):
        self.seen = getattr(self, "seen", 0)

    def on_step_end(self, trainer):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_the_state_of_a_callback_is_asked_after_the_start(tmp_path):
    train_reported(tmp_path / "run", Late(), num_epochs=1)
    again = Late()
    train_reported(tmp_path / "run", again, num_epochs=2, resume=True)
    assert again.seen == 10

    class Wrong(Late):
        def state_dict(self):
            return {"seen": object()}

    with pytest.raises(TypeError, match=r"callback .*Wrong 1/seen is a object; only tensors"):
        train_reported(tmp_path / "other", Wrong())
    assert not (tmp_path / "other/checkpoints").exists()
