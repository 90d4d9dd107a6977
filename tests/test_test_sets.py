"""Several test sets: each has its losses and metrics, and any of them may choose the best epoch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accel_trainer import History, Loss, NonFiniteError, Trainer
from support import correct, loader_of, make_data, make_model, on_processes, quiet


def with_size(model, batch):
    outputs = model(batch[0])
    return Loss(F.cross_entropy(outputs, batch[1]), None, outputs, batch[1], {"size": outputs.square().mean()})


def fit_sets(names=("val", "ood"), compute_loss=None, run_dir=None, lr=0.3, **choices):
    model = make_model(torch.float64)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=lr),
        None if compute_loss else nn.CrossEntropyLoss(),
        compute_loss=compute_loss,
        metrics={"accuracy": correct},
        whole_metrics={"number": lambda outputs, targets: len(outputs)},
        config=quiet(run_dir=run_dir, **{"num_epochs": 4, "num_micro_batches": 3, **choices}),
    )
    sets = {name: loader_of(make_data(20 + 9 * number, torch.float64), 8) for number, name in enumerate(names)}
    tests = sets if names != ("",) else sets[""]
    history = trainer.fit(loader_of(make_data(37, torch.float64), 8), tests)
    return history, trainer


def test_each_set_has_the_scores_that_it_has_alone():
    history, _ = fit_sets()
    alone, _ = fit_sets(("",))
    assert history.test_losses == alone.test_losses == history.metrics["val/loss"]
    for name in ("accuracy", "number"):
        assert history.metrics[f"val/{name}"] == alone.metrics[name]
    assert list(history.metrics) == [
        f"{set}/{name}" for set in ("val", "ood") for name in ("loss", "accuracy", "number")
    ]
    assert history.metrics["ood/number"] == [29.0] * 4 and history.metrics["ood/loss"] != history.test_losses
    assert history.train_losses == alone.train_losses


@pytest.mark.parametrize(
    "monitor, choices, best",
    [
        ("test_loss", {}, min),
        ("ood/loss", {}, min),
        ("ood/accuracy", {"mode": "max"}, max),
        ("ood/size", {"mode": "max", "compute_loss": with_size}, max),
    ],
)
def test_any_score_chooses_the_best_epoch(monitor, choices, best, tmp_path):
    history, trainer = fit_sets(monitor=monitor, run_dir=tmp_path / "run", **choices)
    values = history.test_losses if monitor == "test_loss" else history.metrics[monitor]
    assert history.best_value == best(values) and history.best_epoch == values.index(best(values)) + 1
    name = "ood" if "/" in monitor else "val"
    loader = loader_of(make_data({"val": 20, "ood": 29}[name], torch.float64), 8)
    score = monitor.partition("/")[2] or "loss"
    assert trainer.evaluate(loader)[score] == pytest.approx(history.best_value, rel=1e-12)
    assert History.load(tmp_path / "run").metrics == history.metrics


@pytest.mark.parametrize(
    "monitor, choices, message",
    [
        ("accuracy", {}, "monitor must be one of test_loss, train_loss, val/loss, val/accuracy, .*, got 'accuracy'"),
        ("new/loss", {}, "got 'new/loss'"),
        ("ood/f1", {}, "got 'ood/f1'"),
        ("ood/accuracy", {}, "monitor='ood/accuracy' needs a mode"),
        ("ood/kl", {"compute_loss": with_size, "mode": "min"}, "one of test_loss, train_loss, size here, got 'kl'"),
        ("test_loss", {"names": ()}, "test_loader is an empty dictionary"),
        ("test_loss", {"names": ("a/b",)}, "must be a text without a slash, got 'a/b'"),
        ("test_loss", {"names": (1,)}, "must be a text without a slash, got 1"),
    ],
)
def test_what_cannot_be_monitored_or_named(monitor, choices, message):
    with pytest.raises(ValueError, match=message):
        fit_sets(monitor=monitor, **choices)


def test_what_is_no_loader_is_refused_by_its_name():
    model = make_model()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    with pytest.raises(TypeError, match=r"test_loader\['val'\] must be"):
        trainer.fit(loader_of(make_data(8)), {"val": [1, 2]})


def summary_of(**choices):
    history, trainer = fit_sets(**choices)
    return history.test_losses, history.metrics, [one.tolist() for one in trainer.model.parameters()]


def resumed(run_dir):
    return summary_of(run_dir=run_dir, resume="auto", bitwise=True)


@pytest.mark.distributed
def test_several_sets_on_two_processes_and_after_an_interruption(tmp_path):
    expected = summary_of(bitwise=True)
    summary_of(run_dir=tmp_path / "run", resume="auto", bitwise=True, max_steps=7)
    assert all(found == expected for found in on_processes(2, resumed, tmp_path / "run"))


def test_a_fault_is_recorded_for_each_set():
    with pytest.raises(NonFiniteError), torch.autograd.set_detect_anomaly(False):
        fit_sets(lr=math.inf)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=math.inf)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"accuracy": correct}, config=quiet())
    with pytest.raises(NonFiniteError):
        trainer.fit(loader_of(make_data(8), 4), {"a": loader_of(make_data(8)), "b": loader_of(make_data(8))})
    assert list(trainer.history.metrics) == ["a/loss", "a/accuracy", "b/loss", "b/accuracy"]
    assert all(map(math.isnan, (trainer.history.test_losses[0], trainer.history.metrics["b/accuracy"][0])))
