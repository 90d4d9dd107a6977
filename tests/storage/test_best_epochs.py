"""`keep_best`: the weights of several good epochs stay."""

import pytest
import torch
from torch import nn

from accel_trainer import Callback, Trainer, load_best
from accel_trainer.storage.tensor_files import metadata_of
from support import loader_of, make_data, make_model, on_processes, quiet


class Keep(Callback):
    def __init__(self):
        self.weights = {}

    def on_evaluation_end(self, trainer):
        self.weights[trainer.state.epoch] = [one.detach().clone() for one in trainer.model.parameters()]


def fit_wild(run_dir, callbacks=(), **choices):
    """Train so wildly that the best epochs are not the last ones."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.5)
    config = quiet(run_dir=run_dir, **{"num_epochs": 8, "keep_best": 3, "num_micro_batches": 4, **choices})
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=list(callbacks), config=config)
    return trainer.fit(loader_of(make_data(40), 8), loader_of(make_data(29), 8)), model


def epochs_in(run_dir):
    return sorted(int(path.stem[-8:]) for path in (run_dir / "best").glob("epoch_*.safetensors"))


def ranked(losses, number=3):
    return sorted(range(1, len(losses) + 1), key=lambda epoch: losses[epoch - 1])[:number]


def test_the_best_epochs_stay_each_with_its_weights(tmp_path):
    keeps = Keep()
    history, _ = fit_wild(tmp_path / "run", [keeps])
    best = ranked(history.test_losses)
    assert best != [8, 7, 6] and best != [1, 2, 3]
    assert epochs_in(tmp_path / "run") == sorted(best) and history.best_epoch == best[0]
    for epoch in best:
        model = load_best(make_model(), tmp_path / "run", epoch=epoch)
        assert all(torch.equal(one, kept) for one, kept in zip(model.parameters(), keeps.weights[epoch], strict=True))
        header = metadata_of(tmp_path / "run/best" / f"epoch_{epoch:08d}.safetensors")
        assert header["epoch"] == epoch and header["test_loss"] == history.test_losses[epoch - 1]
    with pytest.raises(FileNotFoundError, match=rf"There are those of the epochs {', '.join(map(str, sorted(best)))}"):
        load_best(make_model(), tmp_path / "run", epoch=99)


def test_the_best_epochs_of_a_metric_to_be_maximised(tmp_path):
    values = iter([0.1, 0.5, 0.3, 0.4, float("nan"), 0.2])
    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        whole_metrics={"good": lambda outputs, targets: next(values)},
        config=quiet(run_dir=tmp_path / "run", num_epochs=6, keep_best=2, monitor="good", mode="max"),
    )
    trainer.fit(loader_of(make_data(8)), loader_of(make_data(8)))
    assert epochs_in(tmp_path / "run") == [2, 4]


def fit_whole(run_dir, **choices):
    history, _ = fit_wild(run_dir, resume="auto", bitwise=True, **choices)  # so wild that rounding would decide
    return history.test_losses


@pytest.mark.distributed
def test_a_run_that_goes_on_keeps_the_same_epochs(tmp_path):
    expected = fit_whole(tmp_path / "whole")
    for steps in (7, 18, 33):
        fit_whole(tmp_path / str(steps), max_steps=steps)
        # as a run that was killed later: files of epochs after the checkpoint
        (tmp_path / str(steps) / "best/epoch_00000008.safetensors").write_bytes(b"of a later epoch")
        assert on_processes(2, fit_whole, tmp_path / str(steps)) == [expected, expected]
        assert epochs_in(tmp_path / str(steps)) == sorted(ranked(expected))
        for epoch in ranked(expected):
            load_best(make_model(), tmp_path / str(steps), epoch=epoch)


def test_without_keep_best_there_is_one_file(tmp_path):
    fit_wild(tmp_path / "run", keep_best=1, num_epochs=2)
    assert [path.name for path in (tmp_path / "run/best").iterdir()] == ["model.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"epochs \(none; see keep_best\)"):
        load_best(make_model(), tmp_path / "run", epoch=1)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"keep_best": 0, "run_dir": "x"}, "keep_best must be at least 1, got 0"),
        ({"keep_best": 2}, "keep_best needs a run_dir, where checkpoints and weights are"),
    ],
)
def test_wrong_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        quiet(**choices)
