"""Every run says where its time went, and gives one line of advice when a part is out of proportion."""

import signal
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from accel_trainer import Callback, History, Trainer
from accel_trainer.data import micro_batches
from accel_trainer.data.cut import Layout
from accel_trainer.data.micro_batches import MicroBatchLoader
from accel_trainer.view.words import advice_on_time
from support import loader_of, make_data, make_model, quiet

PARTS = ("data_seconds", "compute_seconds", "evaluation_seconds", "saving_seconds")


class Slow(Dataset):
    def __init__(self, num_samples, seconds):
        self.seconds, self.inner = seconds, make_data(num_samples)

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return self.inner[index]


def fit(train, test=None, **choices):
    model = make_model()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet(**choices)
    )
    return trainer.fit(train, test)


def test_waiting_computing_and_evaluating_are_told_apart(tmp_path):
    history = fit(loader_of(Slow(20, 0.01), 5), loader_of(Slow(10, 0.01), 5), run_dir=tmp_path / "run")
    for epoch in range(2):
        assert 0.2 <= history.data_seconds[epoch] <= 1
        assert 0.1 <= history.evaluation_seconds[epoch] <= 0.9
        parts = [getattr(history, name)[epoch] for name in PARTS]
        assert sum(parts) == pytest.approx(history.epoch_seconds[epoch])
        in_training = history.data_seconds[epoch] + history.compute_seconds[epoch]
        assert history.samples_per_second[epoch] == pytest.approx(20 / in_training)
    assert history.saving_seconds[1] > 0  # of the checkpoint at the end of the first epoch
    assert History.load(tmp_path / "run").data_seconds == history.data_seconds


class SlowThenInterrupted(Callback):
    def on_step_end(self, trainer):
        time.sleep(0.1)
        if trainer.state.step == 3:
            signal.raise_signal(signal.SIGINT)


def test_the_time_before_an_interrupt_counts(tmp_path):
    choices, slow = {"num_epochs": 1, "run_dir": tmp_path / "run"}, [SlowThenInterrupted()]
    model, loader = make_model(), loader_of(Slow(20, 0.01), 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=slow, config=quiet(**choices))
    assert trainer.fit(loader).num_epochs == 0
    again = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(**choices, resume=True))
    history = again.fit(loader)
    assert history.epoch_seconds[0] >= 0.5 and 0.2 <= history.data_seconds[0] <= 1


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ({"data_seconds": [4.0, 4.2]}, "41 % of the time waits for data: more workers."),
        ({"data_seconds": [4.0, 4.2], "evaluation_seconds": [8.0, 8.0]}, "80 % of the time evaluates"),
        ({"saving_seconds": [2.0, 2.0]}, "20 % of the time waits for checkpoints: less often."),
        ({"data_seconds": [2.0, 2.0]}, None),
        ({"epoch_seconds": [0.2, 0.2], "data_seconds": [0.2, 0.2]}, None),
    ],
)
def test_one_line_of_advice_for_the_part_that_is_most_out_of_proportion(seconds, expected):
    series = {
        "epoch_seconds": [10.0, 10.0],
        "data_seconds": [0.0],
        "evaluation_seconds": [0.0],
        "saving_seconds": [0.0],
    }
    remedies = {"data_seconds": "more workers", "evaluation_seconds": "fewer", "saving_seconds": "less often"}
    told = advice_on_time(series | seconds, remedies)
    assert told == expected if expected is None else told.startswith(expected)


def test_no_advice_without_a_remedy():
    series = {"epoch_seconds": [10.0], "data_seconds": [9.0], "evaluation_seconds": [0.0], "saving_seconds": [0.0]}
    assert advice_on_time(series, {"data_seconds": None}) is None and advice_on_time(series, {}) is None


def test_a_run_that_waits_for_its_data_says_so(capsys, monkeypatch):
    monkeypatch.setattr("accel_trainer.view.words._LEAST_SECONDS", 0.1)
    fit(loader_of(Slow(20, 0.01), 5), num_epochs=1, verbose=True)
    assert "% of the time waits for data: raise num_workers of train_loader (now 0)." in capsys.readouterr().out
    fit(loader_of(make_data(2000), 5), num_epochs=1, verbose=True)
    assert "of the time" not in capsys.readouterr().out


def test_the_clock_is_read_twice_a_micro_batch(monkeypatch):
    reads = []
    loader = MicroBatchLoader(DataLoader(make_data(20), 2), Layout(0, 1, 1), seed=0)
    monkeypatch.setattr(micro_batches, "perf_counter", lambda: reads.append(1) or 0.0)
    assert len(list(loader.micro_batches(1))) == 10 and len(reads) == 2 * 11
