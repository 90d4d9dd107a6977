"""Losses, weights and metrics: one number, one meaning, under every layout."""

import functools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from accelerate.state import PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from accel_trainer import Callback, Trainer
from accel_trainer.data.cut import Layout, cut, run_of
from accel_trainer.data.micro_batches import Batch, MicroBatch
from accel_trainer.numbers.forward import Forward
from accel_trainer.numbers.loss_table import LossTable
from accel_trainer.numbers.metrics import Metrics
from accel_trainer.numbers.objective import Objective
from support import assert_same, correct, loader_of, make_data, make_model, on_processes, quiet, summary


def token_data(num_samples=23, length=4, dtype=torch.float64):
    """Classes per position, of which many are to be ignored; some samples have none that counts."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(num_samples, length, 5, generator=generator, dtype=dtype)
    targets = torch.randint(0, 3, (num_samples, length), generator=generator)
    targets[torch.rand(num_samples, length, generator=generator) < 0.4] = -100
    targets[::4] = -100
    return TensorDataset(inputs, targets)


class PerToken(nn.Module):
    """Map (batch, length, 5) to (batch, 3 classes, length)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.layer(inputs).transpose(1, 2)


def log_probabilities(inputs):
    return F.log_softmax(inputs, dim=1)


class LogPerToken(PerToken):
    def forward(self, inputs):
        return log_probabilities(super().forward(inputs))


WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def count_tokens(batch):
    return (batch[1] != -100).sum()


def mean_over_tokens(model, batch):
    inputs, targets = batch
    kept = targets != -100
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    return losses.sum() / kept.sum().clamp_min(1), kept.sum()


def summed_squares(outputs, targets):
    """A mean over the samples' tokens that the trainer knows nothing of; its weight is given beside it."""
    kept = (targets != -100).unsqueeze(1)
    return (outputs.square() * kept).sum() / kept.sum().clamp_min(1)


LOSSES = {
    "class weights": dict(loss_fn=nn.CrossEntropyLoss(weight=WEIGHT)),
    "ignore_index": dict(loss_fn=nn.CrossEntropyLoss()),
    "another ignore_index": dict(loss_fn=nn.CrossEntropyLoss(ignore_index=1), shift=True),
    "label smoothing": dict(loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1)),
    "smoothing and class weights": dict(loss_fn=nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1)),
    "nll": dict(loss_fn=nn.NLLLoss(weight=WEIGHT), model=LogPerToken),
    "function": dict(loss_fn=F.cross_entropy),
    "partial": dict(loss_fn=functools.partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.2)),
    "weight_fn": dict(loss_fn=summed_squares, weight_fn=count_tokens),
    "compute_loss": dict(compute_loss=mean_over_tokens),
}


def train_weighted(name, num_micro_batches=None):
    case = dict(LOSSES[name])
    model = case.pop("model", PerToken)().double()
    data = token_data()
    if case.pop("shift", False):
        data = TensorDataset(data.tensors[0], data.tensors[1].clamp_min(0))
    gradients = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
            return super().step(closure)

    config = quiet(num_micro_batches=num_micro_batches, restore_best=False)
    trainer = Trainer(model, Watch(model.parameters(), lr=0.1), config=config, **case)
    history = trainer.fit(loader_of(data, 6), loader_of(data, 5))
    return summary(history, model), gradients


@functools.cache
def reference(name):
    return train_weighted(name)


def all_weighted(num_micro_batches):
    return {name: train_weighted(name, num_micro_batches) for name in LOSSES}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "num_processes, num_micro_batches", [(1, 3), (1, 8), (2, None), (2, 3), (2, 8), (3, None), (3, 8), (4, 3)]
)
def test_weighted_losses_have_the_same_gradients_and_reports_under_every_layout(num_processes, num_micro_batches):
    for results in on_processes(num_processes, all_weighted, num_micro_batches):
        for name, (one, gradients) in results.items():
            expected, expected_gradients = reference(name)
            assert_same(expected, one, torch.float64)
            torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if "loss_fn" in LOSSES[name] and "weight_fn" not in LOSSES[name]]
)
def test_a_weighted_test_loss_is_the_loss_of_the_whole_set(name):
    case = dict(LOSSES[name])
    data = token_data()
    if case.pop("shift", False):
        data = TensorDataset(data.tensors[0], data.tensors[1].clamp_min(0))
    model = case.pop("model", PerToken)().double()
    whole = case["loss_fn"](model(data.tensors[0]), data.tensors[1]).item()
    scores = Trainer(model, None, case["loss_fn"], config=quiet()).evaluate(loader_of(data, 5))
    assert scores["loss"] == pytest.approx(whole, rel=1e-12)


def test_soft_targets_divide_by_the_number_of_samples():
    inputs, targets = torch.randn(10, 5), torch.rand(10, 3).softmax(1)
    model, loss_fn = nn.Linear(5, 3), nn.CrossEntropyLoss()
    scores = Trainer(model, None, loss_fn, config=quiet()).evaluate(loader_of(TensorDataset(inputs, targets), 4))
    assert scores["loss"] == pytest.approx(loss_fn(model(inputs), targets).item(), rel=1e-6)


def sample_values(num_samples, num_micro_batches=None):
    """Return train and test loss where the loss of a sample is its number."""

    def compute_loss(model, batch):
        return (batch[0] + 0 * model(batch[0])).mean()

    data = TensorDataset(torch.arange(float(num_samples)).reshape(-1, 1))
    model = nn.Linear(1, 1)
    config = quiet(num_epochs=1, num_micro_batches=num_micro_batches)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), compute_loss=compute_loss, config=config)
    history = trainer.fit(DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=4))
    return history.train_losses[0], history.test_losses[0], trainer.evaluate(DataLoader(data, batch_size=4))["loss"]


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [1, 3, 9, 10, 11])
def test_each_sample_counts_once_in_every_loss(num_processes, num_samples):
    for num_micro_batches in (None, 3):
        for losses in on_processes(num_processes, sample_values, num_samples, num_micro_batches):
            assert losses == ((num_samples - 1) / 2,) * 3


def constant_loss(num_micro_batches):
    def compute_loss(model, batch):
        return (1.0 + 0 * model(batch[0])).mean()

    model, data = nn.Linear(5, 1), make_data(10)
    config = quiet(num_epochs=1, num_micro_batches=num_micro_batches)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), compute_loss=compute_loss, config=config)
    history = trainer.fit(loader_of(data, 4), loader_of(data, 4))
    return history.train_losses + history.test_losses


@pytest.mark.distributed
@pytest.mark.parametrize("num_micro_batches", [None, 4])
def test_accumulation_does_not_scale_a_reported_loss(num_micro_batches):
    assert constant_loss(num_micro_batches) == [1.0, 1.0]
    assert on_processes(2, constant_loss, num_micro_batches) == [[1.0, 1.0]] * 2


# --- metrics ----------------------------------------------------------------------------------------------------------


def mean_correct(outputs, targets):
    return correct(outputs, targets).double().mean()


def python_number(outputs, targets):
    return correct(outputs, targets).double().mean().item()


class Counted(torchmetrics.SumMetric):
    """Counts samples; would show one that is counted twice."""

    def update(self, outputs, targets):
        super().update(len(targets))


def evaluate_metrics(num_samples, num_micro_batches=None):
    torch.manual_seed(0)
    # Probabilities: torchmetrics guesses from the values of each update whether they are logits.
    model = nn.Sequential(nn.Linear(5, 3), nn.Softmax(dim=1)).double()
    metrics = {
        "per_sample": correct,
        "mean": mean_correct,
        "number": python_number,
        "object": torchmetrics.Accuracy(task="multiclass", num_classes=3, average="micro"),
        "listing": torchmetrics.AUROC(task="multiclass", num_classes=3),
        "sum": Counted(),
    }
    config = quiet(num_micro_batches=num_micro_batches)
    trainer = Trainer(model, None, nn.CrossEntropyLoss(), metrics=metrics, config=config)
    scores = trainer.evaluate(loader_of(make_data(num_samples, torch.float64), 4))
    assert trainer.evaluate(loader_of(make_data(num_samples, torch.float64), 4)) == scores  # starts afresh
    return scores


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_metrics_are_those_of_the_whole_set_on_every_process(num_processes):
    torch.manual_seed(0)
    model, (inputs, targets) = nn.Linear(5, 3).double(), make_data(33, torch.float64).tensors
    exact = correct(model(inputs), targets).double().mean().item()
    one = evaluate_metrics(33)
    for scores in on_processes(num_processes, evaluate_metrics, 33):
        assert list(scores) == ["loss", "per_sample", "mean", "number", "object", "listing", "sum"]
        assert scores["sum"] == 33
        for name in ("per_sample", "mean", "number", "object"):
            assert scores[name] == pytest.approx(exact, rel=1e-6)
        assert scores["listing"] == pytest.approx(one["listing"], rel=1e-6)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
def test_metrics_of_fewer_samples_than_processes():
    one = evaluate_metrics(1)
    for scores in on_processes(3, evaluate_metrics, 1):
        assert scores == pytest.approx(one)


def test_a_metric_of_another_shape_is_refused_with_the_shapes():
    trainer = Trainer(nn.Linear(5, 3), None, nn.CrossEntropyLoss(), metrics={"odd": lambda outputs, targets: outputs})
    with pytest.raises(ValueError, match=r"'odd' must return one value per sample.*for 4 samples.*\(4, 3\)"):
        trainer.evaluate(loader_of(make_data(8), 4))


def test_metrics_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="metric 'x' must be callable"):
        Metrics({"x": 3})
    with pytest.raises(ValueError, match="'loss' of a metric is taken"):
        Metrics({"loss": correct})


# --- what a loss must be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.MSELoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        functools.partial(F.mse_loss, reduction="sum"),
    ],
)
def test_a_loss_that_is_no_mean_is_refused(loss_fn):
    with pytest.raises(ValueError, match=r"has reduction='(sum|none)'.*use reduction='mean'"):
        Objective(loss_fn)


@pytest.mark.parametrize("arguments", [(None, None), (nn.MSELoss(), lambda model, batch: None)])
def test_exactly_one_of_loss_fn_and_compute_loss(arguments):
    with pytest.raises(ValueError, match="Give either loss_fn or compute_loss"):
        Objective(*arguments)


def test_a_loss_class_instead_of_an_instance_is_refused():
    with pytest.raises(TypeError, match=r"loss_fn is the class MSELoss; give an instance: MSELoss\(\)"):
        Objective(nn.MSELoss)


@pytest.mark.parametrize(
    "compute_loss, message",
    [
        (lambda model, batch: model(batch[0]).mean(0), r"must be a scalar .*got shape \(3,\)"),
        (lambda model, batch: model(batch[0]).mean().detach(), "does not require grad"),
        (lambda model, batch: (model(batch[0]).mean(), -1), "weight of a micro-batch must be a number of at least 0"),
        (lambda model, batch: (model(batch[0]).mean(), torch.ones(2)), r"must be one number, got shape \(2,\)"),
    ],
)
def test_a_loss_that_cannot_be_trained_is_refused_before_the_first_update(compute_loss, message):
    model = nn.Linear(5, 3)
    before = model.weight.detach().clone()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), compute_loss=compute_loss, config=quiet())
    with pytest.raises(ValueError, match=message):
        trainer.fit(loader_of(make_data(8), 4))
    assert torch.equal(model.weight, before)


def test_a_loss_that_is_no_tensor_is_refused():
    model = nn.Linear(5, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda o, t: 1.0, config=quiet())
    with pytest.raises(TypeError, match="loss must be a tensor, got float"):
        trainer.fit(loader_of(make_data(8), 4))


class Dictionaries(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"x": torch.full((5,), float(index)), "label": index % 3, "note": "kept"}


class ByName(nn.Linear):
    def forward(self, features, shift=0.0):
        return super().forward(features + shift)


class Two(nn.Linear):
    def forward(self, x, y):
        return super().forward(x + y)


class Whole(nn.Linear):
    def forward(self, batch):
        return super().forward(batch["x"])


def test_batches_that_a_model_cannot_take_are_named_by_their_keys():
    by_name = r"unexpected keyword argument 'note' \(The model was called with the entries x, note of a batch by name"
    whole = "the entries x, note of a batch as 1 argument, "
    for kind, message in ((nn.Linear, whole), (ByName, whole), (Two, by_name)):
        trainer = Trainer(kind(5, 3), None, nn.CrossEntropyLoss(), config=quiet())
        with pytest.raises(TypeError, match=f"{message}.* leave out of the samples, or give compute_loss"):
            trainer.evaluate(DataLoader(Dictionaries(), batch_size=4))


def test_a_model_of_one_argument_is_given_the_dictionary():
    torch.manual_seed(0)
    model = Whole(5, 3)
    trainer = Trainer(model, None, nn.CrossEntropyLoss(), config=quiet())
    inputs = torch.arange(10.0)[:, None].expand(-1, 5)
    expected = model({"x": inputs})
    found = trainer.evaluate(DataLoader(Dictionaries(), batch_size=4))["loss"]
    assert found == pytest.approx(nn.functional.cross_entropy(expected, torch.arange(10) % 3).item())
    assert torch.allclose(trainer.predict(DataLoader(Dictionaries(), batch_size=4)), expected)


def test_compute_loss_sees_every_key_and_dictionaries_of_two_need_none():
    seen = []

    def compute_loss(model, batch):
        seen.append(batch["note"])
        return F.cross_entropy(model(batch["x"]), batch["label"])

    model = nn.Linear(5, 3)
    Trainer(model, None, compute_loss=compute_loss, config=quiet()).evaluate(DataLoader(Dictionaries(), batch_size=5))
    assert seen[0] == ["kept"] * 5 and {word for batch in seen for word in batch} == {"kept"}

    pairs = [{"label": index % 3, "x": torch.full((5,), float(index))} for index in range(10)]  # targets first
    scores = Trainer(model, None, nn.CrossEntropyLoss(), config=quiet()).evaluate(DataLoader(pairs, batch_size=5))
    whole = F.cross_entropy(model(torch.stack([pair["x"] for pair in pairs])), torch.tensor([i % 3 for i in range(10)]))
    assert scores["loss"] == pytest.approx(whole.item(), rel=1e-6)


# --- nothing is kept, nothing is read ---------------------------------------------------------------------------------


def test_neither_losses_nor_outputs_outlive_their_step():
    alive = weakref.WeakSet()
    most = 0

    def loss_fn(outputs, targets):
        nonlocal most
        loss = F.cross_entropy(outputs, targets)
        most = max(most, len(alive))
        alive.add(outputs)
        alive.add(loss)
        return loss

    model = nn.Linear(5, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, config=quiet())
    history = trainer.fit(loader_of(make_data(64), 4), loader_of(make_data(64), 4))
    assert most <= 2 and not alive
    assert all(type(loss) is float for loss in history.train_losses + history.test_losses)


def test_memory_does_not_grow_with_the_steps():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    levels = []

    class Watch(Callback):
        def on_epoch_end(self, trainer):
            levels.append(resident())

    model = nn.Linear(5, 3)
    config = quiet(num_epochs=6, report_every=10**6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Watch()], config=config)
    trainer.fit(loader_of(make_data(2000), 2))
    assert levels[-1] - levels[1] < 4 * 2**20  # 4,000 steps later


class CountReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Count the moments at which a tensor's value comes to the host."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.reads.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MultiMarginLoss()])
@pytest.mark.parametrize("num_micro_batches", [None, 3])
def test_an_ordinary_step_reads_nothing_back(loss_fn, num_micro_batches):
    mode = CountReads()
    per_step = []

    class Watch(Callback):
        def on_step_end(self, trainer):
            per_step.append(len(mode.reads))

    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = quiet(num_epochs=1, num_micro_batches=num_micro_batches, max_grad_norm=1.0)
    with mode:
        Trainer(model, optimizer, loss_fn, callbacks=[Watch()], config=config).fit(loader_of(make_data(240), 12))
    assert len(per_step) == 20
    assert len(set(per_step)) == 1


def test_the_sums_are_exact_over_many_blocks_and_reports():
    table, layout = LossTable(torch.device("cpu")), Layout(0, 1, 1)

    def add(number, value):
        batch = Batch(number, 3, layout)
        table.start_batch(number, batch)
        (piece,) = cut(3, layout)
        table.add(MicroBatch(None, piece, batch), Forward(torch.tensor(value, dtype=torch.float64), 3))

    for number in range(1300):
        add(number, float(number))
        if number == 700:
            assert table.report() == 350.0 and table.fault is None
    totals = table.exchange()
    assert totals.loss == 1299 / 2 and totals.fault is None
    add(1300, math.nan)
    fault = table.exchange().fault
    assert fault.batch == 1300 and fault.places == ((1, 1300), (1, 1299))


def keep_a_table(num_processes, num_micro_batches, sizes, wrong):
    """Let losses be their batch and place, but one nan; return the mean as read in two goes, and the fault."""
    process = PartialState(cpu=True).process_index if num_processes > 1 else 0
    layout = Layout(process, num_processes, num_micro_batches)
    table = LossTable(torch.device("cpu"))
    for number, size in enumerate(sizes):
        batch = Batch(number, size, layout)
        table.start_batch(number, batch)
        for piece in cut(size, layout):
            micro_batch = MicroBatch(None, piece, batch)
            loss = math.nan if (number, piece.index) == wrong else number + piece.index / 10
            table.add(micro_batch, Forward(torch.tensor(loss, dtype=torch.float64), micro_batch.num_samples))
        if number == 1:
            table.report()
    totals = table.exchange()
    return totals.loss, totals.num_samples, totals.fault


@pytest.mark.distributed
@pytest.mark.parametrize("num_micro_batches", [1, 3, 4])
def test_every_process_adds_up_all_rows_whoever_has_them(num_micro_batches):
    sizes = [5, 1, 2, 7]  # shorter than the cut too, so that a process has a stand-in
    mean, num_samples, _ = keep_a_table(1, num_micro_batches, sizes, None)
    rows = [
        (number + piece.index / 10, piece.stop - piece.start)
        for number, size in enumerate(sizes)
        for piece in cut(size, Layout(0, 1, num_micro_batches))
    ]
    assert mean == pytest.approx(sum(loss * weight for loss, weight in rows) / 15, rel=1e-15) and num_samples == 15
    for processes in (2, 3):
        assert (
            on_processes(processes, keep_a_table, processes, num_micro_batches, sizes, None)
            == [(mean, 15, None)] * processes
        )
        last = (3, num_micro_batches - 1)
        owner = next(one for one in range(processes) if last[1] in run_of(Layout(one, processes, num_micro_batches)))
        for _, _, fault in on_processes(processes, keep_a_table, processes, num_micro_batches, sizes, last):
            assert math.isnan(fault.value) and (fault.batch, fault.process) == (3, owner)


class Batches(IterableDataset):
    def __init__(self, sizes):
        self.sizes = sizes

    def __iter__(self):
        return iter([(torch.ones(size, 5), torch.zeros(size, dtype=torch.int64)) for size in self.sizes])


@pytest.mark.parametrize("sizes", [[4, 0, 4], [4, 4, 0]])
@pytest.mark.parametrize("report_every", [1, 2])
def test_batches_without_samples_count_nothing(sizes, report_every):
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, optimizer, F.cross_entropy, config=quiet(num_epochs=1, report_every=report_every))
    history = trainer.fit(DataLoader(Batches(sizes), batch_size=None))
    expected = F.cross_entropy(model(torch.ones(1, 5)), torch.zeros(1, dtype=torch.int64)).item()
    assert history.train_losses == pytest.approx([expected])
    assert math.isnan(trainer.evaluate(DataLoader(Batches([0, 0]), batch_size=None))["loss"])


# --- what weighs nothing, and what hides its weight -------------------------------------------------------------------


def train_masked(kind, num_micro_batches=None):
    """The second half of each batch is padding: a micro-batch of it divides by zero."""
    torch.manual_seed(5)
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0] * 3, dtype=torch.float64)
    data = TensorDataset(torch.randn(24, 5, dtype=torch.float64), mask)
    model = nn.Linear(5, 1).double()

    def squares(outputs, kept):
        return (outputs.squeeze(1) ** 2 * kept).sum() / kept.sum()

    arguments = {
        "compute_loss": dict(compute_loss=lambda model, batch: (squares(model(batch[0]), batch[1]), batch[1].sum())),
        "number": dict(compute_loss=lambda model, batch: (squares(model(batch[0]), batch[1]), batch[1].sum().item())),
        "weight_fn": dict(loss_fn=squares, weight_fn=lambda batch: batch[1].sum()),
        "nothing": dict(compute_loss=lambda model, batch: (squares(model(batch[0]), batch[1]), 0.0)),
    }[kind]
    config = quiet(num_micro_batches=num_micro_batches, restore_best=False, on_nonfinite="ignore")
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config, **arguments)
    history = trainer.fit(DataLoader(data, batch_size=8))
    return history.train_losses, model.weight.detach()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["compute_loss", "number", "weight_fn", "nothing"])
def test_a_micro_batch_that_weighs_nothing_adds_nothing_even_if_it_divides_by_zero(kind):
    losses, weight = train_masked(kind)
    assert weight.isfinite().all()
    results = [train_masked(kind, 2), train_masked(kind, 4), *on_processes(2, train_masked, kind)]
    for other_losses, other_weight in results:
        assert other_losses == pytest.approx(losses, rel=1e-10, nan_ok=True)
        torch.testing.assert_close(other_weight, weight, rtol=1e-10, atol=0)


class Reshaping(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return super().forward(outputs.double(), targets)


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own insides
@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss().forward,
        Reshaping(),
        torch.compile(nn.CrossEntropyLoss(), backend="eager"),
        torch.compile(F.cross_entropy, backend="eager"),
        nn.CrossEntropyLoss(weight=WEIGHT),
    ],
)
def test_cross_entropy_in_disguise_is_weighed_by_what_it_divides_by(loss_fn):
    model = PerToken().double()
    data = token_data()
    whole = loss_fn(model(data.tensors[0]), data.tensors[1]).item()
    scores = Trainer(model, None, loss_fn, config=quiet(num_micro_batches=3)).evaluate(loader_of(data, 5))
    assert scores["loss"] == pytest.approx(whole, rel=1e-10)


def test_class_weights_take_targets_of_bytes():
    targets = torch.tensor([0, 1, 2, 1, 0], dtype=torch.uint8)
    objective = Objective(nn.NLLLoss(weight=WEIGHT))
    assert objective._divisor(targets) == pytest.approx(WEIGHT[targets.long()].sum())


def test_weights_may_be_numbers_of_numpy():
    import numpy

    model = nn.Linear(5, 3)
    arguments = dict(weight_fn=lambda batch: numpy.float32(len(batch[0])), config=quiet())
    data = loader_of(make_data(10), 4)
    scores = Trainer(model, None, nn.MultiMarginLoss(), **arguments).evaluate(data)
    assert scores == pytest.approx(Trainer(model, None, nn.MultiMarginLoss(), config=quiet()).evaluate(data))


def drawing_model(num_micro_batches):
    """Draws from every generator in the loss, as mixup does."""
    import random

    import numpy

    def compute_loss(model, batch):
        factor = numpy.random.beta(1, 1) + random.random() + torch.rand(())
        return factor * F.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    numpy.random.seed(None)
    config = quiet(num_micro_batches=num_micro_batches)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), compute_loss=compute_loss, config=config)
    return trainer.fit(loader_of(make_data(16, torch.float64), 8)).train_losses


@pytest.mark.distributed
def test_draws_in_the_model_do_not_depend_on_the_process_or_the_mood():
    one = drawing_model(2)
    for losses in [drawing_model(2), *on_processes(2, drawing_model, 2)]:
        assert losses == pytest.approx(one, rel=1e-10)


def unmergeable():
    metrics = {"r": torchmetrics.PearsonCorrCoef()}
    model = nn.Linear(5, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), metrics=metrics, config=quiet())
    data = TensorDataset(torch.randn(8, 5), torch.randn(8, 1))
    try:
        trainer.fit(loader_of(data, 4), loader_of(data, 4))
    except TypeError as error:
        return str(error), trainer.state.step


@pytest.mark.distributed
def test_a_metric_that_cannot_be_merged_is_refused_before_training():
    for message, step in on_processes(2, unmergeable):
        assert "The metric 'r' cannot be merged over processes" in message and step == 0
    with pytest.raises(TypeError, match="metrics must be a dictionary of names and metrics, got list"):
        Metrics([correct])


def test_micro_batches_of_classes_that_weigh_nothing_do_no_harm():
    def losses(num_micro_batches):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 2)
        loss_fn = torch.nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0]))
        data = TensorDataset(torch.randn(64, 5), (torch.arange(64) % 32 >= 8).long())
        config = quiet(num_micro_batches=num_micro_batches)
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, config=config)
        return trainer.fit(DataLoader(data, 32)).train_losses

    assert losses(8) == pytest.approx(losses(1), rel=1e-5)


@pytest.mark.parametrize("weight", [math.inf, 1e308, math.nan, -1.0, "3"])
def test_a_weight_that_no_mean_can_be_taken_with_is_refused_before_an_update(weight):
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"weight_fn": lambda batch: weight, "config": quiet()}
    with pytest.raises(ValueError, match="The weight of a micro-batch must be a number of at least 0 and below 1e30"):
        Trainer(model, optimizer, nn.CrossEntropyLoss(), **how).fit(loader_of(make_data(16), 8))
    assert all(map(torch.equal, before, model.parameters()))
