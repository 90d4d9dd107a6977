"""Weights that were frozen all the time are not in the files; their digests are, and they come back all the same."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from accel_trainer import Callback, CheckpointError, Trainer, load_best
from accel_trainer.storage.tensor_files import metadata_of
from support import loader_of, make_data, on_processes, quiet

STEPS = 5  # to an epoch


def make_frozen(seed=1, tied=False):
    """Make an encoder, which is frozen, and a head."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Linear(32, 3))
    model[0].requires_grad_(False)
    if tied:
        model.append(nn.Linear(3, 3))
        model.append(nn.Linear(3, 3))
        model[4].weight = model[3].weight
        model[3].requires_grad_(False)
    return model


def train_frozen(run_dir=None, callbacks=(), seed=1, tied=False, train_all=True, **choices):
    model = make_frozen(seed, tied)
    parameters = model.parameters() if train_all else [one for one in model.parameters() if one.requires_grad]
    config = quiet(run_dir=run_dir, num_micro_batches=4, **{"num_epochs": 4, **choices})
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=list(callbacks), config=config)
    history = trainer.fit(loader_of(make_data(40), 8), loader_of(make_data(29), 8))
    return history, model


def names_in(path):
    return set(safetensors.torch.load_file(path))


FROZEN = {"0.weight", "0.bias"}
TRAINED = {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked", "2.weight", "2.bias"}


@pytest.mark.parametrize("train_all", [True, False])
def test_files_hold_what_was_trained_and_the_digests_of_the_rest(tmp_path, train_all):
    _, model = train_frozen(tmp_path / "run", train_all=train_all)
    for path in (tmp_path / "run/best/model.safetensors", *(tmp_path / "run").glob("checkpoints/*/model.safetensors")):
        assert names_in(path) == TRAINED and set(metadata_of(path)["left_out"]) == FROZEN
    fresh = load_best(make_frozen(), tmp_path / "run")
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in fresh.state_dict().items())
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*20")
    assert load_best(make_frozen(), checkpoint).state_dict().keys() == model.state_dict().keys()


def test_other_frozen_weights_are_refused(tmp_path, capsys):
    train_frozen(tmp_path / "run", num_epochs=1, verbose=True)
    assert "2 frozen weights are left out of the files: to go on and to load, build" in capsys.readouterr().out
    other = make_frozen(seed=2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"leaves out weights that were frozen, .* others in 0.weight, 0.bias. Build"):
        load_best(other, tmp_path / "run")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in before.items())
    with pytest.raises(ValueError, match="same pretrained weights, .* in the same type"):
        load_best(make_frozen().half(), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"The checkpoint leaves out weights .* 0.weight, 0.bias"):
        train_frozen(tmp_path / "run", seed=2, resume=True)


def end_of(run_dir=None, callbacks=(), **choices):
    history, model = train_frozen(run_dir, callbacks, **choices)
    return history.train_losses, history.test_losses, [tensor.tolist() for tensor in model.state_dict().values()]


class Unfreezes(Callback):
    """Unfreeze the encoder in the third epoch, as for a fine-tuning; steps are wild then, and epoch 2 is best."""

    def on_epoch_start(self, trainer):
        if trainer.state.epoch == 3:
            trainer.model[0].requires_grad_(True)
            trainer.optimizer.param_groups[0]["lr"] = 20.0


class Teaches(Callback):
    """Write to frozen weights, as to those of a teacher, from the third epoch on."""

    def on_step_end(self, trainer):
        if trainer.state.epoch >= 3:
            trainer.model[0].weight.data.mul_(1.5)


class Shuffles(Callback):
    """Change the order of frozen weights only, as of a queue, from the third epoch on."""

    def on_step_end(self, trainer):
        if trainer.state.epoch >= 3:
            weight = trainer.model[0].weight
            weight.data.copy_(weight.data.roll(1, 0) if trainer.state.step % 2 else weight.data.flip(1))


class BestWeights(Callback):
    def on_evaluation_end(self, trainer):
        if trainer.state.best_epoch == trainer.state.epoch:
            self.kept = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("kind", [Unfreezes, Teaches, Shuffles])
@pytest.mark.parametrize("has_folder", [True, False])
def test_what_changes_later_is_saved_and_the_best_weights_are_whole(kind, has_folder, tmp_path):
    keeps, run_dir = BestWeights(), tmp_path / "run" if has_folder else None
    history, model = train_frozen(run_dir, [kind(), keeps])
    assert history.best_epoch == 2 or kind is Shuffles
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, keeps.kept[name]), name
    if has_folder:
        (last,) = (tmp_path / "run").glob("checkpoints/*20/model.safetensors")
        assert "0.weight" in names_in(last)
        best = tmp_path / "run/best/model.safetensors"
        assert names_in(best) == (TRAINED if history.best_epoch == 2 else TRAINED | {"0.weight"})
        fresh = load_best(make_frozen(), tmp_path / "run")
        assert all(torch.equal(one, model.state_dict()[name]) for name, one in fresh.state_dict().items())


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [None, Unfreezes, Teaches])
def test_a_run_that_goes_on_ends_as_one_left_alone(kind, tmp_path):
    """Also on another number of processes; only the main one knows what is left out."""
    callbacks = [] if kind is None else [kind()]
    expected = end_of(bitwise=True, callbacks=callbacks)
    for steps in (STEPS - 2, 2 * STEPS, 2 * STEPS + 3):
        how = {"run_dir": tmp_path / str(steps), "resume": "auto", "bitwise": True, "callbacks": callbacks}
        end_of(max_steps=steps, **how)
        for found in on_processes(2, end_of_resumed, how):
            assert found == expected, steps


def end_of_resumed(how):
    return end_of(**how)


def test_a_program_that_freezes_nothing_any_more_goes_on_with_what_was_frozen(tmp_path, monkeypatch):
    expected, _ = train_frozen(num_epochs=3)
    train_frozen(tmp_path / "run", num_epochs=3, max_steps=STEPS + 2)
    monkeypatch.setitem(globals(), "make_frozen", lambda *how, make=make_frozen: make(*how).requires_grad_(True))
    found, model = train_frozen(tmp_path / "run", num_epochs=3, resume=True)
    assert found.test_losses == expected.test_losses and not model[0].weight.requires_grad


def test_tied_frozen_weights_are_left_out_under_both_names(tmp_path):
    _, model = train_frozen(tmp_path / "run", tied=True)
    left_out = metadata_of(tmp_path / "run/best/model.safetensors")["left_out"]
    assert set(left_out) == {*FROZEN, "3.weight", "3.bias", "4.weight"}
    fresh = load_best(make_frozen(tied=True), tmp_path / "run")
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in fresh.state_dict().items())
    train_frozen(tmp_path / "run", tied=True, resume=True, num_epochs=5)


def test_checkpoints_that_hold_everything_are_read(tmp_path):
    """As those were written before."""
    expected = end_of(num_epochs=3)
    train_frozen(tmp_path / "run", num_epochs=3, max_steps=7)
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*07")
    state = json.loads((checkpoint / "state.json").read_text())
    assert set(state.pop("left_out")) == FROZEN
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    whole = weights | {name: make_frozen().state_dict()[name] for name in FROZEN}
    header = {"format": "pt", "accel_trainer": json.dumps({"aliases": {}, "step": 7, "epoch": 2})}
    safetensors.torch.save_file(whole, checkpoint / "model.safetensors", header)
    (checkpoint / "state.json").write_text(json.dumps(state))
    from accel_trainer.storage.files import size_and_digest

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] |= {name: size_and_digest(checkpoint / name) for name in ("model.safetensors", "state.json")}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert end_of(tmp_path / "run", num_epochs=3, resume=True, seed=1) == expected
