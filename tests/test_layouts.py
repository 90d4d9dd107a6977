"""One run, one result: any number of processes, any cut. The claim of the package, against itself and a plain loop."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from accel_trainer import Callback, Trainer
from accel_trainer.data.order import index_batches
from support import assert_same, loader_of, make_data, make_model, on_processes, quiet, train

pytestmark = pytest.mark.timeout(240)

SIZES = [
    dict(num_samples=n, batch_size=b, drop_last=d)
    for n, b, d in itertools.product((1, 37, 101), (1, 7, 16), (False, True))
    if (n > b and n % b) or not d  # else nothing would be dropped, or everything
]
CUTS = [None, 1, 3, 8]


def all_of(cases):
    return [train(**case) for case in cases]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "num_processes, dtype",
    [
        (1, torch.float32),
        (1, torch.float64),
        (2, torch.float32),
        (2, torch.float64),
        (3, torch.float64),
        (4, torch.float32),
    ],
)
def test_sizes_that_divide_nothing(num_processes, dtype):
    references = all_of([dict(case, dtype=dtype) for case in SIZES])
    cases = [
        dict(case, dtype=dtype, num_micro_batches=cut)
        for case in SIZES
        # A batch of one sample leaves all processes but one without: two cuts tell as much, and its steps are many.
        for cut in (CUTS if case["batch_size"] > 1 else [None, 3])
        if case["batch_size"] > 1 or case["num_samples"] < 101 or num_processes <= 2
    ]
    per_process = on_processes(num_processes, all_of, cases)
    for results in per_process:
        for case, result in zip(cases, results, strict=True):
            key = {name: case[name] for name in SIZES[0]}
            assert_same(references[SIZES.index(key)], result, dtype)


VARIANTS = [
    dict(max_grad_norm=0.5),
    dict(optimizer="adamw", max_grad_norm=0.1),
    dict(steps_per_epoch=4, num_epochs=3),
    dict(max_steps=8),
    dict(schedule_every="epoch"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_clipping_schedules_and_epochs_of_steps(num_processes):
    references = all_of([dict(variant, dtype=torch.float64) for variant in VARIANTS])
    cases = [dict(variant, dtype=torch.float64, num_micro_batches=cut) for variant in VARIANTS for cut in CUTS]
    results = on_processes(num_processes, all_of, cases)[-1]
    for place, result in enumerate(results):
        assert_same(references[place // len(CUTS)], result, torch.float64)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_dropout_and_batchnorm_with_a_fixed_cut(num_processes, dtype):
    cases = [
        dict(dtype=dtype, kind=kind, num_samples=num_samples, batch_size=batch_size, num_micro_batches=cut, lr=0.05)
        for kind in ("dropout", "batchnorm")
        # The last batches of 37 and 101 hold 5 and 21 samples: two or more for each of the micro-batches that have any.
        for num_samples, batch_size, cut in [(37, 16, 1), (101, 20, 3), (112, 16, 8), (96, 32, 8)]
        if (num_samples, batch_size) != (101, 20) or kind == "dropout"
    ]
    cases += [dict(dtype=dtype, kind="batchnorm", num_samples=102, batch_size=16, num_micro_batches=3)]
    references = all_of(cases)
    for results in on_processes(num_processes, all_of, cases):
        for reference, result in zip(references, results, strict=True):
            assert_same(reference, result, dtype)


@pytest.mark.distributed
@pytest.mark.parametrize("batch_size", [12, 20])
def test_two_equal_micro_batches_have_the_same_bits_on_one_process_and_on_two(batch_size):
    case = dict(num_samples=60, batch_size=batch_size, num_micro_batches=2)
    alone = train(**case)
    for (other,) in on_processes(2, all_of, [case]):
        assert other["train_losses"] == alone["train_losses"] and other["test_losses"] == alone["test_losses"]
        assert all(torch.equal(tensor, alone["weights"][name]) for name, tensor in other["weights"].items())


def plain_loop(model, optimizer, loss_fn, loader, num_epochs, max_grad_norm=None):
    """The oracle: a hand-written loop in the trainer's order of samples."""
    losses = []
    for epoch in range(1, num_epochs + 1):
        total, count = 0.0, 0
        for indices in index_batches(loader, 0, epoch):
            inputs, targets = loader.dataset[indices]
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            total += loss.item() * len(targets)
            count += len(targets)
        losses.append(total / count)
    return losses


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("num_samples, batch_size", [(1, 1), (37, 7), (101, 16)])
@pytest.mark.parametrize("kind", ["plain", "batchnorm"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_one_process_and_one_micro_batch_is_a_plain_loop_bit_for_bit(
    make_optimizer, num_samples, batch_size, kind, max_grad_norm
):
    if kind == "batchnorm":
        num_samples += num_samples % batch_size == 1
        if batch_size == 1:
            pytest.skip("BatchNorm needs two samples")
    loader = loader_of(make_data(num_samples), batch_size)
    kind = "plain" if kind == "plain" else "batchnorm"
    ours, theirs = make_model(kind=kind), make_model(kind=kind)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the oracle draws from another place of the generator
    loss_fn = nn.MultiMarginLoss()
    expected = plain_loop(theirs, make_optimizer(theirs.parameters(), lr=0.01), loss_fn, loader, 3, max_grad_norm)
    config = quiet(num_epochs=3, restore_best=False, max_grad_norm=max_grad_norm)
    trainer = Trainer(ours, make_optimizer(ours.parameters(), lr=0.01), loss_fn, config=config)
    assert trainer.fit(loader).train_losses == expected
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_cross_entropy_is_a_plain_loop_bit_for_bit():
    loader = loader_of(make_data(101), 16)
    ours, theirs = make_model(), make_model()
    expected = plain_loop(theirs, torch.optim.Adam(theirs.parameters()), nn.CrossEntropyLoss(), loader, 2)
    trainer = Trainer(
        ours, torch.optim.Adam(ours.parameters()), nn.CrossEntropyLoss(), config=quiet(restore_best=False)
    )
    assert trainer.fit(loader).train_losses == expected
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


class Unused(nn.Module):
    """Some parameters get a gradient never, some only in some micro-batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.used, self.rare, self.never = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, inputs):
        outputs = self.used(inputs)
        return outputs + self.rare(inputs) if inputs[0, 0] > 0 else outputs


def train_unused(find_unused, num_micro_batches=3):
    model = Unused()
    before = model.never.weight.detach().clone()
    absent = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            absent.append([name for name, parameter in model.named_parameters() if parameter.grad is None])
            return super().step(closure)

    config = quiet(num_micro_batches=num_micro_batches, find_unused_parameters=find_unused, restore_best=False)
    trainer = Trainer(model, Watch(model.parameters(), lr=0.1, weight_decay=0.1), nn.CrossEntropyLoss(), config=config)
    trainer.fit(loader_of(make_data(37), 7))
    assert torch.equal(before, model.never.weight)  # no gradient, so weight decay must not touch it
    return absent, {name: tensor.double() for name, tensor in model.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("find_unused", [False, True])
def test_a_parameter_has_no_gradient_if_it_has_none_in_any_micro_batch(find_unused):
    absent, weights = train_unused(find_unused)
    assert any("rare.weight" in names for names in absent) and any("rare.weight" not in names for names in absent)
    for num_processes in (2, 3, 4):
        for other_absent, other_weights in on_processes(num_processes, train_unused, find_unused):
            assert other_absent == absent
            for name, tensor in weights.items():
                torch.testing.assert_close(tensor, other_weights[name], rtol=1e-4, atol=1e-6)


class Late(nn.Module):
    """Leaves a layer out after its first forward."""

    def __init__(self):
        super().__init__()
        self.always, self.first_only = nn.Linear(5, 3), nn.Linear(5, 3)
        self.num_calls = 0

    def forward(self, inputs):
        self.num_calls += 1
        return self.always(inputs) + (self.first_only(inputs) if self.num_calls == 1 else 0)


def train_late():
    model = Late()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    try:
        trainer.fit(loader_of(make_data(37), 8))
    except RuntimeError as error:
        return str(error)


@pytest.mark.distributed
def test_a_parameter_that_loses_its_gradient_is_named_with_the_setting_to_use():
    for message in on_processes(2, train_late):
        assert "first_only.weight" in message and "find_unused_parameters=True" in message


def constant_gradient(num_micro_batches):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    weights = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            result = super().step(closure)
            weights.append(model.weight.item())
            return result

    def compute_loss(model, batch):
        return model(batch[0]).mean()

    data = torch.utils.data.TensorDataset(torch.ones(10, 1))
    config = quiet(num_epochs=1, num_micro_batches=num_micro_batches)
    trainer = Trainer(model, Watch(model.parameters(), lr=1.0), compute_loss=compute_loss, config=config)
    trainer.fit(DataLoader(data, batch_size=4))
    return weights


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_micro_batches", [None, 1, 4])
def test_every_update_of_a_constant_gradient_is_whole_also_the_short_last_one(num_processes, num_micro_batches):
    for weights in on_processes(num_processes, constant_gradient, num_micro_batches):
        torch.testing.assert_close(weights, [-1.0, -2.0, -3.0])


class Odd(nn.Module):
    """Buffers of every kind that a model may keep."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.layer = nn.Linear(5, 3).double()
        self.register_buffer("lowest", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf], dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, inputs):
        if self.training:
            self.lowest.copy_(torch.minimum(self.lowest, inputs.min()))
            self.seen += 1
            if len(self.cache) == 1:
                self.cache = torch.zeros(4)
        return self.layer(inputs)


def train_odd(num_micro_batches):
    model = Odd()
    config = quiet(num_micro_batches=num_micro_batches, restore_best=False, num_epochs=1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=config)
    trainer.fit(loader_of(make_data(37, torch.float64), 7))
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


@pytest.mark.distributed
def test_odd_buffers_do_not_depend_on_the_layout():
    one = train_odd(2)
    assert one["seen"] == 6 and one["mask"] == [0.0, -torch.inf] and -10 < one["lowest"] < 0
    for buffers in on_processes(2, train_odd, 2):
        assert buffers.pop("lowest") == pytest.approx(one["lowest"])
        assert buffers == {name: one[name] for name in buffers}


def train_unfreezing(num_micro_batches=None):
    """Unfreeze a layer after the first epoch; begin with gradients left over from elsewhere."""
    model = make_model(torch.float64)
    model(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    model[0].requires_grad_(False)

    class Unfreeze(Callback):
        def on_epoch_end(self, trainer):
            trainer.model.requires_grad_(True)

    config = quiet(num_epochs=3, num_micro_batches=num_micro_batches)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        callbacks=[Unfreeze()],
        config=config,
    )
    return trainer.fit(loader_of(make_data(37, torch.float64), 7)).train_losses


@pytest.mark.distributed
def test_layers_may_be_unfrozen_between_epochs_and_old_gradients_do_not_count():
    loader = loader_of(make_data(37, torch.float64), 7)
    model = make_model(torch.float64)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for epoch in (1, 2, 3):
        total = 0.0
        for indices in index_batches(loader, 0, epoch):
            inputs, targets = loader.dataset[indices]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
        expected.append(total / 37)
        model.requires_grad_(True)
    assert train_unfreezing() == pytest.approx(expected, rel=1e-12)
    assert train_unfreezing(3) == pytest.approx(expected, rel=1e-10)
    for losses in on_processes(2, train_unfreezing):
        assert losses == pytest.approx(expected, rel=1e-10)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.EmbeddingBag(10, 4, sparse=True)
        self.phase = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, inputs):
        return (self.embedding(inputs).to(torch.complex64) @ self.phase).abs()


def train_sparse(num_micro_batches=None):
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randint(10, (20, 3), generator=generator), torch.randint(3, (20,), generator=generator)
    )
    model = Complex()
    config = quiet(num_micro_batches=num_micro_batches)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=config)
    return trainer.fit(loader_of(data, 6)).train_losses


@pytest.mark.distributed
def test_sparse_gradients_and_complex_parameters_are_added_too():
    one = train_sparse()
    assert train_sparse(3) == pytest.approx(one, rel=1e-5)
    for losses in on_processes(2, train_sparse):
        assert losses == pytest.approx(one, rel=1e-5)


def fit_with_a_late_hook():
    """Add, within an epoch, what draws in a model that drew nothing before."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)

    class Late(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == 1:
                model.register_forward_hook(lambda module, inputs, outputs: outputs * random.random())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(
        model, optimizer, F.cross_entropy, callbacks=[Late()], config=quiet(num_epochs=1, num_micro_batches=2)
    )
    return trainer.fit(loader_of(make_data(8), 4), loader_of(make_data(24), 8)).test_losses


@pytest.mark.distributed
def test_what_draws_since_the_middle_of_an_epoch_draws_alike_in_its_evaluation():
    (whole,) = on_processes(1, fit_with_a_late_hook)
    assert on_processes(2, fit_with_a_late_hook) == [pytest.approx(whole)] * 2
