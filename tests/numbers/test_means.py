"""Sums that are no means are found, told, and computed of all outputs where asked; samples count as they come."""

import contextlib
import io
import itertools
import math
import warnings
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from accel_trainer import Callback, NonFiniteError, Trainer, evaluate_model
from accel_trainer.data.collated import count_samples
from support import correct, loader_of, make_data, make_model, on_processes, quiet

# --- what is no mean --------------------------------------------------------------------------------------------------


def regression(num_samples=40):
    torch.manual_seed(0)
    inputs = torch.randn(num_samples, 5)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True) + torch.randn(num_samples, 1))


def warnings_of(loss_fn, metrics=None, dataset=None, model=None, how="fit", batch_size=16, **choices):
    """Return the warnings of a run or an evaluation."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(regression() if dataset is None else dataset, batch_size=batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(model, optimizer, loss_fn, metrics=metrics, config=quiet(), **choices)
        {"fit": lambda: trainer.fit(loader, loader), "train": lambda: trainer.fit(loader)}.get(
            how, lambda: [trainer.evaluate(loader) for _ in range(2)]
        )()
    texts = [str(one.message) for one in caught]
    assert all(texts.count(text) == 1 for text in trainer.doubts.values())
    return texts


def rmse(outputs, targets):
    return F.mse_loss(outputs, targets).sqrt()


class PairLoss(nn.Module):
    """Each sample against all others of its micro-batch."""

    def forward(self, outputs, targets):
        return F.relu(0.1 - (outputs - outputs.T)).mean() + F.l1_loss(outputs, targets)


class Dice(nn.Module):
    def __init__(self):
        super().__init__()
        self.squash = nn.Sigmoid()

    def forward(self, outputs, targets):
        scores = self.squash(outputs)
        return 1 - 2 * (scores * (targets > 0)).sum() / (scores.sum() + (targets > 0).sum())


@pytest.mark.parametrize("how", ["fit", "train", "evaluate"])
@pytest.mark.parametrize("loss_fn", [rmse, PairLoss(), Dice(), partial(F.mse_loss, reduction="mean").__call__])
def test_a_loss_that_is_no_mean_is_told_once(loss_fn, how):
    if isinstance(loss_fn, (nn.Module, type(rmse))):
        (told,) = warnings_of(loss_fn, how=how)
        assert told.startswith("loss_fn is no mean over samples: over 16 samples it is ")
        assert "weight_fn" in told and "num_micro_batches" in told
    else:
        assert warnings_of(loss_fn, how=how) == []


def test_what_is_told_are_the_right_numbers():
    (told,) = warnings_of(rmse, how="evaluate")
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    inputs, targets = (one[:16] for one in regression().tensors)
    with torch.no_grad():
        whole = rmse(model(inputs), targets)
        halves = (rmse(model(inputs[:8]), targets[:8]) + rmse(model(inputs[8:]), targets[8:])) / 2
    assert f"it is {whole:.4g}, but over their halves {halves:.4g} in the mean" in told


def r2(outputs, targets):
    return 1 - (outputs - targets).square().sum() / (targets - targets.mean()).square().sum()


def correlation(outputs, targets):
    return float(numpy.corrcoef(outputs.numpy().ravel(), targets.numpy().ravel())[0, 1])


class Spread:
    """A metric that is an object."""

    def __call__(self, outputs, targets):
        return (outputs - targets).std()


@pytest.mark.parametrize("metric", [r2, correlation, Spread(), lambda outputs, targets: (outputs - targets).max()])
def test_a_metric_that_is_no_mean_is_told_once_by_its_name(metric):
    (told,) = warnings_of(nn.MSELoss(), {"mine": metric, "error": lambda outputs, targets: (outputs - targets).abs()})
    assert told.startswith("The metric 'mine' is no mean over samples") and "whole_metrics" in told


CLASSES = TensorDataset(*make_data(48).tensors)


@pytest.mark.parametrize(
    ("loss_fn", "metrics"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 20.0])), {"accuracy": correct}),
        (
            nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1),
            {"accuracy": lambda o, t: correct(o, t).float().mean()},
        ),
        (lambda outputs, targets: F.nll_loss(outputs.log_softmax(1), targets), {"top": lambda o, t: [1.0] * len(t)}),
        (nn.MultiMarginLoss(), {"number": lambda o, t: numpy.ones(len(t))}),
        (lambda o, t: (F.cross_entropy(o, t, reduction="none") * torch.rand(len(t))).mean(), None),  # cannot be told
    ],
)
@pytest.mark.parametrize("batch_size", [2, 5, 16])
def test_means_are_no_reason_to_warn(loss_fn, metrics, batch_size):
    for how in ("fit", "train", "evaluate"):
        assert warnings_of(loss_fn, metrics, CLASSES, make_model(), how, batch_size) == []


def test_outputs_of_another_shape_than_the_targets_are_told():
    inputs, targets = regression().tensors
    (told,) = [one for one in warnings_of(nn.L1Loss(), None, TensorDataset(inputs, targets[:, 0])) if "no mean" in one]
    assert "Outputs have the shape (16, 1) and targets (16,): compared as they are" in told and "no mean" in told


def test_looking_changes_nothing():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, outputs, targets):
            self.calls += 1
            return F.cross_entropy(outputs, targets) * (1 + 0.01 * self.calls)

    model, loss_fn = make_model(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = Trainer(model, optimizer, loss_fn, config=quiet(num_epochs=2)).fit(loader_of(make_data(24), 8))
    assert loss_fn.calls == 6 and history.num_epochs == 2
    Trainer(model, None, loss_fn, config=quiet()).evaluate(loader_of(make_data(24), 8))
    assert loss_fn.calls == 9


def test_functions_that_leave_traces_are_called_as_often_as_asked():
    seen, calls, beta = [], 0, [0.0]

    def collects(outputs, targets):
        seen.extend(outputs[:, 0].tolist())
        return (outputs - targets).abs()[:, 0]

    def counts(outputs, targets):
        nonlocal calls
        calls += 1
        return F.mse_loss(outputs, targets)

    def anneals(outputs, targets):
        beta[0] += 0.1
        return beta[0] * F.mse_loss(outputs, targets)

    def writes(outputs, targets):  # into what it is given
        outputs.sub_(targets)
        return outputs.abs()[:, 0]

    for loss_fn in (counts, anneals):
        seen.clear()
        assert warnings_of(loss_fn, {"collects": collects}) == []
        assert len(seen) == 80  # 40 in each of two epochs
    assert calls == 12 and beta[0] == pytest.approx(1.2)  # 3 batches in training and test, in two epochs
    model = nn.Identity()
    trainer = Trainer(model, None, nn.L1Loss(), metrics={"written": writes}, config=quiet())
    inputs = torch.arange(8.0)[:, None]
    assert trainer.evaluate(loader_of(TensorDataset(inputs, torch.ones(8, 1)), 4))["written"] == pytest.approx(2.75)


class CountsCalls:
    """An object that cannot be copied for a look, since it computes with the model, or beside the loss."""

    def __init__(self, function):
        self.function, self.num_calls = function, 0

    def __call__(self, *args):
        self.num_calls += 1
        return self.function(*args)


class HoldsModel(nn.Module):
    num_calls = 0

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(5, 1)

    def forward(self, outputs, targets):
        self.num_calls += 1
        return F.mse_loss(outputs, targets) + self.model.weight.square().sum()


def test_objects_that_count_are_called_as_often_as_asked():
    loader = loader_of(regression(), 16)
    computes = CountsCalls(lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
    weighs, holds = CountsCalls(lambda batch: len(batch[0])), HoldsModel()
    for counter, given in (
        (computes, {"compute_loss": computes}),
        (weighs, {"loss_fn": nn.MSELoss(), "weight_fn": weighs}),
        (holds, {"loss_fn": holds}),
    ):
        Trainer(nn.Linear(5, 1), None, **given, config=quiet()).evaluate(loader)
        assert counter.num_calls == 3


def test_what_is_first_seen_in_single_samples_is_looked_at_later():
    trainer = Trainer(nn.Linear(5, 1), None, rmse, config=quiet())
    trainer.evaluate(loader_of(regression(), 1))
    assert not trainer.doubts
    with pytest.warns(UserWarning, match="loss_fn is no mean"):
        trainer.evaluate(loader_of(regression(), 8))


def test_half_precision_within_a_metric_is_no_reason_to_warn():
    assert warnings_of(nn.MSELoss(), {"half": lambda o, t: (o - t).abs().half().mean()}) == []


def test_labels_that_only_the_train_set_leaves_out_are_told():
    inputs, targets = make_data(40).tensors
    partly = targets.clone()
    partly[1::3] = -1
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, lambda o, t: F.cross_entropy(o, t, ignore_index=-1), config=quiet())
    with pytest.warns(UserWarning, match="loss_fn is no mean"):
        trainer.fit(loader_of(TensorDataset(inputs, partly), 10, False), loader_of(TensorDataset(inputs, targets), 10))


def test_the_tutorial_function_tells_too():
    with pytest.warns(UserWarning, match="loss_fn is no mean"):
        evaluate_model(loader_of(regression(), 8), nn.Linear(5, 1), rmse)


def told_on_processes():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(nn.Linear(5, 1), None, rmse, metrics={"r2": r2}, config=quiet())
        trainer.evaluate(loader_of(regression(), 16, shuffle=False))
    return sorted(trainer.doubts), len([one for one in caught if "no mean" in str(one.message)])


def test_all_processes_know_and_one_tells():
    assert on_processes(2, told_on_processes) == [(["loss_fn", "r2"], 2), (["loss_fn", "r2"], 0)]


class Focal(nn.CrossEntropyLoss):
    """Class weights, and the mean over the samples."""

    def forward(self, outputs, targets):
        loss = F.cross_entropy(outputs, targets, self.weight, ignore_index=self.ignore_index, reduction="none")
        return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


class Doubled(nn.CrossEntropyLoss):
    """Class weights, and what torch divides by."""

    def forward(self, outputs, targets):
        return 2 * super().forward(outputs, targets)


class OfLogs(nn.NLLLoss):
    """Its own way to torch's mean."""

    def forward(self, outputs, targets):
        loss = F.nll_loss(
            outputs.log_softmax(1), targets, self.weight, ignore_index=self.ignore_index, reduction="none"
        )
        kept = targets != self.ignore_index
        weight = kept.float() if self.weight is None else self.weight[targets.where(kept, 0)] * kept
        return loss.sum() / weight.sum()


class Annealed(Focal):
    """It counts its calls, which nobody else's may change."""

    num_calls = 0

    def forward(self, outputs, targets):
        self.num_calls += 1
        return super().forward(outputs, targets)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 5.0, 20.0])])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("kind", [Focal, Doubled, OfLogs, Annealed])
def test_a_subclass_of_torchs_losses_weighs_as_its_own_forward_does(kind, weight, ignore_index):
    loss_fn, model = kind(weight, ignore_index=ignore_index), make_model()
    inputs, targets = make_data(40).tensors
    targets = targets.sort().values  # so that the micro-batches differ
    with torch.no_grad():
        whole = loss_fn(model(inputs), targets).item()
    for cut in (1, 3, 8):
        config = quiet(num_micro_batches=cut)
        scores = Trainer(model, None, loss_fn, config=config).evaluate(
            loader_of(TensorDataset(inputs, targets), 40, False)
        )
        assert scores["loss"] == pytest.approx(whole, rel=1e-5)
    assert getattr(loss_fn, "num_calls", 13) == 13


# --- compute_loss -----------------------------------------------------------------------------------------------------


def token_batches(num_samples=8, num_tokens=6):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (num_samples, num_tokens), generator=generator)
    for row, kept in enumerate(torch.randint(1, num_tokens, (num_samples,), generator=generator).tolist()):
        labels[row, kept:] = -100
    inputs = torch.randn(num_samples, num_tokens, 3, generator=generator)
    return [{"inputs": one, "labels": other} for one, other in zip(inputs, labels, strict=True)]


def token_loss(model, batch):
    return F.cross_entropy(model(batch["inputs"]).flatten(0, 1), batch["labels"].flatten())


def weighed_token_loss(model, batch):
    return token_loss(model, batch), (batch["labels"] != -100).sum()


@pytest.mark.parametrize("how", ["fit", "train", "evaluate"])
def test_labels_that_are_left_out_are_weighed_or_told(how):
    model = nn.Linear(3, 4)
    (told,) = warnings_of(None, dataset=token_batches(), model=model, how=how, batch_size=4, compute_loss=token_loss)
    assert "compute_loss" in told and "(loss, " in told
    assert warnings_of(None, None, token_batches(), model, how, 4, compute_loss=weighed_token_loss) == []
    weight_fn = lambda batch: (batch["labels"] != -100).sum()  # noqa: E731
    assert warnings_of(None, None, token_batches(), model, how, 4, compute_loss=token_loss, weight_fn=weight_fn) == []


def test_labels_left_out_in_equal_numbers_are_told_too():
    batches = token_batches()
    for one in batches:
        one["labels"] = torch.tensor([1, 2, -100, -100, -100, -100])
    (told,) = warnings_of(None, None, batches, nn.Linear(3, 4), "evaluate", 4, compute_loss=token_loss)
    assert told.startswith("Labels hold -100")


INVALID = [math.inf, math.nan, -1.0, 1e38]


@pytest.mark.filterwarnings("ignore:loss_fn is no mean")
@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize(
    "weight", [*map(torch.tensor, INVALID), torch.tensor(-3), torch.tensor(1e308, dtype=torch.float64)]
)
def test_a_weight_that_no_mean_can_be_taken_with_moves_nothing(weight, bitwise, cut):
    for how in (
        {"weight_fn": lambda batch: weight},
        {"compute_loss": lambda model, batch: (weighed(model, batch), weight)},
    ):
        model = make_model()
        before = [one.tolist() for one in model.parameters()]
        loss_fn = nn.CrossEntropyLoss() if "weight_fn" in how else None
        config = quiet(num_micro_batches=cut, bitwise=bitwise)
        trainer = Trainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss_fn, config=config, **how
        )
        with pytest.raises(ValueError, match="weight of a micro-batch must be at least 0.*in batch 1, on process 0"):
            trainer.fit(loader_of(make_data(24), 8))
        assert [one.tolist() for one in model.parameters()] == before
        with pytest.raises(ValueError, match="weight of a micro-batch"):
            trainer.evaluate(loader_of(make_data(24), 8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float16, torch.bool])
def test_weights_of_a_small_type_are_added_without_overflow(dtype):
    data = TensorDataset(torch.ones(8, 1), torch.full((8, 1), 3.0))
    weight = torch.tensor({torch.int16: 20000, torch.float16: 30000.0, torch.bool: True}.get(dtype, 100), dtype=dtype)
    for cut in (1, 2, 8):
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        config = quiet(num_epochs=1, num_micro_batches=cut)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(model, optimizer, nn.MSELoss(), weight_fn=lambda batch: weight, config=config).fit(loader_of(data, 8))
        assert model.weight.item() == pytest.approx(0.6)


def weighed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def with_one_bad_weight():
    rank = torch.distributed.get_rank()
    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        compute_loss=lambda model, batch: (weighed(model, batch), torch.tensor(-1.0 if rank else 1.0)),
        config=quiet(),
    )
    with pytest.raises(ValueError, match="in batch 1, on process 1, it was not"):
        trainer.fit(loader_of(make_data(24), 8))


def test_the_process_whose_weight_it_was_is_named():
    on_processes(2, with_one_bad_weight)


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_an_epoch_of_which_nothing_weighs_anything_is_an_error(weight):
    def run(**choices):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = quiet(**choices)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), weight_fn=lambda batch: weight, config=config)
        return trainer.fit(loader_of(make_data(24), 8))

    with pytest.raises(NonFiniteError, match="Every micro-batch of epoch 1 weighs 0"):
        run()
    assert all(map(math.isnan, run(on_nonfinite="ignore").train_losses))


# --- of all outputs at once -------------------------------------------------------------------------------------------


def f1(outputs, targets):
    """Of the three classes, and their mean."""
    predicted = outputs.argmax(1)
    scores = []
    for label in range(3):
        hits = ((predicted == label) & (targets == label)).sum()
        scores.append(float(2 * hits / ((predicted == label).sum() + (targets == label).sum()).clamp(min=1)))
    return {"macro": sum(scores) / 3, "classes": scores}


def whole_scores(cut=None, batch_size=7, **choices):
    metrics = {"f1": f1, "worst": lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none").max()}
    config = quiet(num_micro_batches=cut, num_epochs=2, **choices)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), metrics={"accuracy": correct}, whole_metrics=metrics, config=config
    )
    test_loader = loader_of(make_data(53), batch_size, shuffle=False)
    history = trainer.fit(loader_of(make_data(24), 8, shuffle=False), test_loader)
    return history.metrics, trainer.evaluate(test_loader), history.best_epoch


def test_whole_metrics_are_those_of_all_outputs():
    history, scores, _ = whole_scores(restore_best=False)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = []
    for _ in range(2):
        for inputs, targets in loader_of(make_data(24), 8, shuffle=False):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        inputs, targets = make_data(53).tensors
        with torch.no_grad():
            expected.append(
                (f1(model(inputs), targets), F.cross_entropy(model(inputs), targets, reduction="none").max())
            )
    assert list(history) == ["accuracy", "f1/macro", "f1/classes/0", "f1/classes/1", "f1/classes/2", "worst"]
    assert history["f1/macro"] == pytest.approx([one["macro"] for one, _ in expected])
    assert history["f1/classes/2"] == pytest.approx([one["classes"][2] for one, _ in expected])
    assert history["worst"] == pytest.approx([worst.item() for _, worst in expected], rel=1e-5)
    assert scores["f1/macro"] == history["f1/macro"][-1] and next(iter(scores)) == "loss"


@pytest.mark.parametrize("batch_size", [1, 7, 53])
def test_whole_metrics_are_the_same_on_any_layout(batch_size):
    alone, _, best = whole_scores(cut=4, batch_size=batch_size, bitwise=True, monitor="f1/macro", mode="max")
    for history, scores, epoch in on_processes(
        2, partial(whole_scores, cut=4, batch_size=batch_size, bitwise=True, monitor="f1/macro", mode="max")
    ):
        assert history == alone and epoch == best and math.isfinite(scores["worst"])


def test_whole_metrics_are_refused_where_they_cannot_be():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="whole metric 'f1' must be a function"):
        Trainer(model, None, loss_fn, whole_metrics={"f1": 3})
    with pytest.raises(ValueError, match="Two metrics are named 'f1'"):
        Trainer(model, None, loss_fn, metrics={"f1": correct}, whole_metrics={"f1": f1})
    with pytest.raises(TypeError, match="whole_metrics must be a dictionary"):
        Trainer(model, None, loss_fn, whole_metrics=[f1])
    trainer = Trainer(model, None, loss_fn, whole_metrics={"text": lambda outputs, targets: "good"}, config=quiet())
    with pytest.raises(TypeError, match="'text' must return numbers, got a str"):
        trainer.evaluate(loader_of(make_data(8), 8))


def test_a_part_that_a_metric_does_not_return_is_told_by_those_that_it_does():
    with pytest.raises(ValueError, match="monitor must be one of accuracy, f1/macro.*here, got 'f1/micro'"):
        whole_scores(monitor="f1/micro", mode="max")


@pytest.mark.parametrize("fault_at", [1, 2])
def test_a_fault_is_named_where_a_part_of_a_metric_is_monitored(fault_at):
    class Breaks(Callback):
        def on_epoch_start(self, trainer):
            if trainer.state.epoch == fault_at:
                trainer.model[0].weight.data.fill_(math.nan)

    model = make_model()
    config = quiet(num_epochs=2, monitor="f1/macro", mode="max")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, optimizer, nn.CrossEntropyLoss(), whole_metrics={"f1": f1}, callbacks=[Breaks()], config=config
    )
    with pytest.raises(NonFiniteError):
        trainer.fit(loader_of(make_data(24), 8), loader_of(make_data(24), 8))
    assert math.isnan(trainer.history.metrics["f1/macro"][-1]) and trainer.history.num_epochs == fault_at


def test_outputs_that_would_fill_the_memory_end_in_an_error(monkeypatch):
    monkeypatch.setattr("accel_trainer.devices.gathering.free_memory", lambda: 1000.0)
    trainer = Trainer(make_model(), None, nn.CrossEntropyLoss(), whole_metrics={"f1": f1}, config=quiet())
    assert "f1/macro" in trainer.evaluate(loader_of(make_data(20), 8))  # 12 + 8 bytes per sample
    with pytest.raises(ValueError, match="whole metrics.*more than half of the free memory"):
        trainer.evaluate(loader_of(make_data(30), 8))


def test_an_object_may_return_several_values():
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average=None)
    model = make_model()
    trainer = Trainer(model, None, nn.CrossEntropyLoss(), metrics={"accuracy": metric}, config=quiet())
    scores = trainer.evaluate(loader_of(make_data(40), 8))
    inputs, targets = make_data(40).tensors
    predicted = model(inputs).argmax(1)
    for label in range(3):
        right = (predicted[targets == label] == label).float().mean().item()
        assert scores[f"accuracy/{label}"] == pytest.approx(right)


def test_metrics_without_a_test_loader_are_told(capsys):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(verbose=True)
    Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"accuracy": correct}, config=config).fit(
        loader_of(make_data(8), 8)
    )
    assert "There is no test_loader: accuracy cannot be computed." in capsys.readouterr().out


def told_at_the_start(kind, **choices):
    model = make_model(kind=kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(verbose=True, **choices)).fit(
            loader_of(make_data(24), 8)
        )
    return printed.getvalue().count("The model has BatchNorm, which sees the micro-batch of its process")


@pytest.mark.distributed
def test_batchnorm_under_a_cut_by_processes_is_told_in_one_line():
    assert on_processes(2, told_at_the_start, "batchnorm") == [1, 0]
    assert on_processes(2, told_at_the_start, "plain") == [0, 0]
    assert on_processes(2, partial(told_at_the_start, "batchnorm", num_micro_batches=2)) == [0, 0]
    assert told_at_the_start("batchnorm") == 0


# --- samples that a collate function leaves out, adds or joins --------------------------------------------------------


class WithGaps(Dataset):
    """Some samples cannot be read."""

    def __init__(self, num_samples=24):
        self.inputs, self.targets = make_data(num_samples).tensors

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return None if index % 5 in (0, 1) or index < 4 else (self.inputs[index], self.targets[index])


class ManyAtOnce(WithGaps):
    """The same, for a list of indices."""

    def __getitems__(self, indices):
        return [item for item in map(super().__getitem__, indices) if item is not None]


class OfLists(WithGaps):
    """The same, batches made by the dataset."""

    def __getitem__(self, indices):
        return leave_out([super(OfLists, self).__getitem__(index) for index in indices])


def leave_out(items):
    return default_collate([item for item in items if item is not None])


def leave_out_as_dictionary(items):
    inputs, targets = leave_out(items)
    return {"inputs": inputs, "labels": targets}


def twice_if_odd(items):
    inputs, targets = leave_out(items)
    odd = targets == 1
    return torch.cat([inputs, inputs[odd]]), torch.cat([targets, targets[odd]])


def as_lists(items):
    kept = [item for item in items if item is not None]
    return torch.stack([inputs for inputs, _ in kept]), [int(targets) for _, targets in kept]


def on_lists(outputs, targets):
    return F.cross_entropy(outputs, torch.as_tensor(targets))


LOADERS = {
    "pairs": lambda **how: DataLoader(WithGaps(), collate_fn=leave_out, **how),
    "dictionaries": lambda **how: DataLoader(WithGaps(), collate_fn=leave_out_as_dictionary, **how),
    "more": lambda **how: DataLoader(WithGaps(), collate_fn=twice_if_odd, **how),
    "lists": lambda **how: DataLoader(WithGaps(), collate_fn=as_lists, **how),
    "many at once": lambda **how: DataLoader(ManyAtOnce(), **how),
    "subset": lambda **how: DataLoader(Subset(ManyAtOnce(), range(24)), **how),
    "workers": lambda **how: DataLoader(WithGaps(), collate_fn=leave_out, num_workers=1, **how),
}


def kept_samples(kind):
    data = WithGaps()
    items = [item for item in map(data.__getitem__, range(24)) if item is not None]
    return twice_if_odd(items) if kind == "more" else default_collate(items)


def fit_with_gaps(kind, cut):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = quiet(num_epochs=1, num_micro_batches=cut, restore_best=False)
    metrics = {"accuracy": lambda outputs, targets: correct(outputs, torch.as_tensor(targets))}
    trainer = Trainer(model, optimizer, on_lists, metrics=metrics, config=config)
    loader = LOADERS[kind](batch_size=24)
    history = trainer.fit(loader, loader)
    return history.train_losses[0], trainer.evaluate(loader), [one.tolist() for one in model.parameters()]


@pytest.mark.parametrize("kind", LOADERS)
def test_samples_that_are_left_out_or_added_weigh_what_they_are(kind):
    inputs, targets = kept_samples(kind)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train_loss = F.cross_entropy(model(inputs), targets)
    train_loss.backward()
    optimizer.step()
    with torch.no_grad():
        outputs = model(inputs)
    expected = [one.flatten().tolist() for one in model.parameters()]
    results = [fit_with_gaps(kind, cut) for cut in (1, 2, 3)]
    results += on_processes(2, fit_with_gaps, kind, 3) if kind != "workers" else []
    for loss, scores, weights in results:
        assert loss == pytest.approx(train_loss.item(), rel=1e-5)
        assert scores["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-5)
        assert scores["accuracy"] == pytest.approx(correct(outputs, targets).float().mean().item())
        for one, other in zip(weights, expected, strict=True):
            assert torch.tensor(one).flatten().tolist() == pytest.approx(other, abs=1e-6)


def test_batches_of_a_dataset_that_answers_lists_weigh_what_they_hold():
    loader = DataLoader(OfLists(), batch_size=None, sampler=[list(range(14)), list(range(14, 24))])
    inputs, targets = kept_samples("pairs")
    model = make_model()
    loss = Trainer(model, None, nn.CrossEntropyLoss(), config=quiet(num_micro_batches=2)).evaluate(loader)["loss"]
    assert loss == pytest.approx(F.cross_entropy(model(inputs), targets).item(), rel=1e-5)


def test_predictions_of_what_is_left():
    model = make_model()
    trainer = Trainer(model, None, nn.CrossEntropyLoss(), config=quiet(num_micro_batches=2))
    inputs, _ = kept_samples("pairs")
    assert torch.allclose(trainer.predict(LOADERS["pairs"](batch_size=24)), model(inputs))


class Sequences(IterableDataset):
    def __init__(self, lengths):
        self.lengths = lengths

    def __iter__(self):
        return iter([(torch.ones(length, 2), torch.tensor([float(length)])) for length in self.lengths])


class SumsUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, packed):
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        is_there = torch.arange(padded.shape[1]) < lengths[:, None]
        return (self.layer(padded) * is_there[:, :, None]).sum(1)


def test_packed_sequences_of_a_stream_count_as_sequences():
    def collate(items):
        sequences = pack_sequence([inputs for inputs, _ in items], enforce_sorted=False)
        return sequences, torch.stack([targets for _, targets in items])

    torch.manual_seed(0)
    model, lengths = SumsUp(), [1, 2, 9, 4, 1]
    outputs = [model.layer(torch.ones(length, 2)).sum(0, keepdim=True) for length in lengths]
    expected = sum(
        F.mse_loss(one, torch.tensor([[float(length)]])).item() for one, length in zip(outputs, lengths, strict=True)
    )
    loader = DataLoader(Sequences(lengths), batch_size=2, collate_fn=collate)
    assert Trainer(model, None, nn.MSELoss(), config=quiet()).evaluate(loader)["loss"] == pytest.approx(expected / 5)


def test_lists_of_two_samples_are_no_pairs():
    data = [{"x": torch.full((5,), float(index))} for index in range(5)]
    others = [torch.full((5,), float(index)) for index in range(5)]

    def mean(model, batch):
        return torch.stack([model(one["x"] if isinstance(one, dict) else one).mean() for one in batch]).mean()

    for samples in (data, others):
        for size, cut in itertools.product((1, 2, 3, 5), (1, 2)):
            trainer = Trainer(nn.Identity(), None, compute_loss=mean, config=quiet(num_micro_batches=cut))
            assert trainer.evaluate(DataLoader(samples, batch_size=size, collate_fn=list))["loss"] == pytest.approx(2.0)


def test_sequences_may_come_time_first():
    data = [(torch.full((length + 1,), float(length)), torch.zeros(length + 1)) for length in range(6)]

    def collate(items):
        return tuple(pad_sequence([item[place] for item in items], padding_value=math.nan) for place in (0, 1))

    def loss_fn(outputs, targets):
        return outputs.nanmean(0).mean()

    for cut in (1, 2, 3):
        trainer = Trainer(
            nn.Identity(), None, loss_fn, metrics={"m": lambda o, t: o.nanmean(0)}, config=quiet(num_micro_batches=cut)
        )
        scores = trainer.evaluate(DataLoader(data, batch_size=4, collate_fn=collate))
        assert scores["loss"] == pytest.approx(2.5) and scores["m"] == pytest.approx(2.5)


class Reuses(nn.Module):
    """Its outputs lie in memory that the next call writes to."""

    def __init__(self):
        super().__init__()
        self.memory = torch.zeros(8, 3)

    def forward(self, inputs):
        return torch.mul(inputs, 2, out=self.memory[: len(inputs)])


def test_outputs_in_memory_that_is_written_to_again_are_kept():
    inputs = torch.randn(20, 3)
    data = TensorDataset(inputs, torch.zeros(20, 3))
    mean = {"mean": lambda outputs, targets: outputs.mean()}
    trainer = Trainer(Reuses(), None, nn.MSELoss(), whole_metrics=mean, config=quiet())
    assert torch.equal(trainer.predict(loader_of(data, 8)), 2 * inputs)
    assert trainer.evaluate(loader_of(data, 8))["mean"] == pytest.approx(2 * inputs.mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("batch", "asked", "expected"),
    [
        ((torch.ones(7, 2), torch.ones(3)), 5, 3),
        ((pack_sequence([torch.ones(3), torch.ones(1)]), torch.ones(2, 1)), None, 2),
        ([torch.ones(4, 2), [1, 2, 3, 4]], 5, 4),
        ((torch.ones(4, 2), ["a", "b", "c", "d"]), None, 4),
        ((tuple(torch.ones(3, 8, 8) for _ in range(5)), tuple({"boxes": torch.ones(n, 4)} for n in range(5))), 5, 5),
        ((tuple(torch.ones(3, 8, 8) for _ in range(4)), tuple({"boxes": torch.ones(2, 4)} for _ in range(4))), None, 4),
        ((torch.ones(4, 3, 8, 8), torch.ones(9, 6)), 4, 4),  # images, and boxes with the number of theirs
        ((torch.ones(8, 2), torch.ones(4)), 4, 4),  # two views of each
        ({"images": torch.ones(4, 3, 8, 8), "labels": torch.ones(0, 6)}, 4, 4),
        ({"inputs": torch.ones(6, 2), "mask": torch.ones(6)}, 8, 6),
        ({"nodes": torch.ones(30, 2), "edges": torch.ones(2, 90), "labels": torch.ones(4)}, 4, 4),
        ({"nodes": torch.ones(30, 2), "edges": torch.ones(2, 90)}, 4, 4),
        ({"input_ids": torch.ones(1, 50), "labels": torch.ones(1, 50)}, 4, 4),
        ({"input_ids": torch.ones(3, 50), "labels": torch.ones(3, 50)}, 4, 3),
        (torch.ones(3, 2), 4, 3),
        (object(), 4, 4),
        ("text", None, None),
        ((torch.ones(3, 2), None), 4, 3),
        ((torch.ones(0, 2), torch.ones(0)), 4, 0),
    ],
)
def test_a_batch_is_counted_by_its_targets(batch, asked, expected):
    assert count_samples(batch, asked) == expected
