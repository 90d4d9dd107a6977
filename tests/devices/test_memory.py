"""Running out of memory: the batch is cut finer and done again, on all processes alike."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from accel_trainer import Trainer, train_model
from accel_trainer.devices.hardware import Hardware
from support import Items, assert_same, correct, loader_of, make_data, make_model, on_processes, quiet, summary

pytestmark = pytest.mark.timeout(120)


class RunsOutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, too_large):
        ctx.too_large = too_large
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.too_large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return gradient, None


class Small(nn.Module):
    """A model on a device that holds so many numbers, in a forward (before or behind the layers) or a backward."""

    def __init__(self, limit, where="forward", process=None, kind="plain", from_call=0, error=None):
        super().__init__()
        self.inner = make_model(torch.float64, kind)
        self.limit, self.where, self.process, self.from_call = limit, where, process, from_call
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        self.num_calls = self.num_failed = 0

    def forward(self, inputs):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        here = self.process in (None, rank) and torch.is_grad_enabled()
        too_large = here and self.num_calls >= self.from_call and inputs.numel() > self.limit
        self.num_calls += here
        self.num_failed += too_large
        outputs = self.inner(inputs)
        if too_large and self.where == "forward":
            raise self.error
        return RunsOutBackward.apply(outputs, too_large) if torch.is_grad_enabled() else outputs


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def fit(model, loader=None, test_loader=None, **choices):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    config = quiet(restore_best=False, **choices)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"accuracy": correct}, config=config)
    history = trainer.fit(loader_of(make_data(37, torch.float64)) if loader is None else loader, test_loader)
    return summary(history, getattr(model, "inner", model))


def fit_all(cases):
    results = []
    for small, loader, choices in cases:
        model = Small(**small)
        results.append((fit(model, loader, **choices), model.num_failed))
    return results


DATA = make_data(37, torch.float64)
CASES = [
    (dict(limit=12), None, {}),
    (dict(limit=24, where="backward"), None, {}),
    (dict(limit=12, process=0), None, dict(report_every=2)),
    (dict(limit=12, process=0), None, dict(steps_per_epoch=2, num_epochs=4)),
    (dict(limit=12, process=0), DataLoader(Stream(DATA), 16), {}),
    (dict(limit=12, process=0), loader_of(DATA, 16, num_workers=2), {}),
    (dict(limit=12, error=RuntimeError("DefaultCPUAllocator: can't allocate memory")), None, {}),
    (dict(limit=12, error=MemoryError()), None, {}),
]


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_the_numbers_stay_the_same(num_processes):
    references = [fit(make_model(torch.float64), loader, **choices) for _, loader, choices in CASES]
    for process, results in enumerate(on_processes(num_processes, fit_all, CASES)):
        for (small, _, _), reference, (result, num_failed) in zip(CASES, references, results, strict=True):
            assert_same(reference, result, torch.float64)
            assert (num_failed > 0) == (small.get("process") in (None, process))


@pytest.mark.distributed
@pytest.mark.parametrize("process", [0, 1])
def test_one_process_of_two_runs_out_and_both_cut_finer(process):
    cases = [(dict(limit=20, process=process, where=where), None, {}) for where in ("forward", "backward")]
    (reference,) = fit_all([(dict(limit=10**6), None, {})])
    for rank, results in enumerate(on_processes(2, fit_all, cases)):
        for result, num_failed in results:
            assert_same(reference[0], result, torch.float64)
            assert num_failed == (rank == process)  # once is enough


def fit_with_buffers():
    """A run that learned its number and one that began with it."""
    several = torch.distributed.is_initialized()
    number = 4 if several else 2
    learned = fit(Small(limit=40 // (number // 2), kind="batchnorm"), loader_of(DATA, 16, drop_last=True))
    known = fit(Small(limit=10**6, kind="batchnorm"), loader_of(DATA, 16, drop_last=True), num_micro_batches=number)
    return learned, known


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_failed_try_leaves_no_trace(num_processes):
    for learned, known in on_processes(num_processes, fit_with_buffers):
        assert learned["train_losses"] == known["train_losses"]
        assert all(torch.equal(tensor, known["weights"][name]) for name, tensor in learned["weights"].items())


def test_it_is_announced_kept_and_recorded(tmp_path, capsys):
    model = Small(limit=25)
    fit(model, run_dir=tmp_path / "run", verbose=True, num_epochs=3)
    printed = capsys.readouterr().out
    assert printed.count("each batch of train_loader is now cut into 2 micro-batches") == 1
    assert printed.count("is now cut into 4 micro-batches") == 1 and "BatchNorm" in printed
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert resolved["num_micro_batches"] == 4
    assert model.num_failed == 2  # never again


def fit_in_two_goes(folder):
    """Return a whole run, and one that has learned its cut, ended within an epoch and goes on."""
    choices = dict(loader=loader_of(DATA, 8), num_epochs=2)
    fit(Small(limit=12), run_dir=f"{folder}/run", max_steps=3, **choices)
    resumed = fit(Small(limit=12), run_dir=f"{folder}/run", resume="auto", **choices)
    return fit(make_model(torch.float64), **choices), resumed


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_goes_on_within_an_epoch_keeps_its_cut(num_processes, tmp_path):
    for whole, resumed in on_processes(num_processes, fit_in_two_goes, str(tmp_path)):
        assert_same(whole, resumed, torch.float64)


def count_exchanges(kind):
    exchanged = []
    original = Hardware.any_process
    Hardware.any_process = lambda self, *flags: exchanged.append(flags) or original(self, *flags)
    try:
        fit(make_model(torch.float64), loader_of(kind(*make_data(160, torch.float64).tensors), 16), num_epochs=3)
    finally:
        Hardware.any_process = original
    return len(exchanged)


@pytest.mark.distributed
def test_nothing_is_exchanged_once_the_memory_is_known():
    once = 2 + 3 + 4  # before the batches are known; once an epoch; and whether to stop, before each and at the end
    assert on_processes(2, count_exchanges, TensorDataset) == [once] * 2  # of 30 batches
    first_pass = once + 8
    assert on_processes(2, count_exchanges, lambda *tensors: Items(TensorDataset(*tensors))) == [first_pass] * 2


class Ragged(Dataset):
    """Samples of one length, but a late one that is long."""

    def __len__(self):
        return 80

    def __getitem__(self, index):
        length = 40 if index == 67 else 4
        return torch.full((length,), 0.1 * (index % 7), dtype=torch.float64), index % 3


def pad(samples):
    inputs = nn.utils.rnn.pad_sequence([inputs for inputs, _ in samples], batch_first=True)
    return inputs, torch.tensor([target for _, target in samples])


class OverLength(nn.Module):
    def __init__(self, limit, from_call=0, process=None):
        super().__init__()
        self.linear = nn.Linear(1, 3, dtype=torch.float64)
        self.guard = Small(limit, process=process, from_call=from_call)
        self.guard.inner = nn.Identity()

    def forward(self, inputs):
        return self.linear(self.guard(inputs).sum(dim=1, keepdim=True))


def fit_ragged(limit, num_workers=0):
    torch.manual_seed(0)
    model = OverLength(limit)
    loader = DataLoader(Ragged(), 8, collate_fn=pad, num_workers=num_workers)
    return fit(model, loader, num_epochs=1), model.guard.num_failed


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_longer_sample_late_in_the_epoch_is_found_out_too(num_processes):
    reference, _ = fit_ragged(10**6)
    results = on_processes(num_processes, fit_ragged, 100)
    assert sum(num_failed for _, num_failed in results) == (1 if num_processes == 2 else 2)
    for result, _ in results:
        assert_same(reference, result, torch.float64)


def fit_failing(limit, from_call=0, process=None, **choices):
    with pytest.raises((torch.OutOfMemoryError, RuntimeError)) as error:
        fit(Small(limit, from_call=from_call, process=process), loader_of(DATA, 8), **choices)
    return str(error.value)


@pytest.mark.parametrize(
    "choices, number", [(dict(num_micro_batches=2), 4), (dict(bitwise=True, num_micro_batches=1), 2)]
)
def test_with_a_number_of_the_user_it_is_an_error_that_names_another(choices, number):
    message = fit_failing(10, **choices)
    assert f"Set num_micro_batches={number} in TrainConfig" in message and "samples of a batch of 8" in message


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_single_sample_that_does_not_fit_is_told_with_its_shapes(num_processes):
    for message in on_processes(num_processes, fit_failing, 4, 0, num_processes - 1):
        assert "a single sample does not fit (shapes (1, 5), (1,))" in message


@pytest.mark.distributed
def test_later_on_several_processes_it_is_an_error_that_names_a_number():
    messages = on_processes(2, fit_failing, 10, 6, 1)
    assert all("Set num_micro_batches=4 in TrainConfig" in message for message in messages)


def evaluate_small():
    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.num_failed = make_model(torch.float64), 0

        def forward(self, inputs):
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            if len(inputs) > 6 and rank == 0:
                self.num_failed += 1
                raise torch.OutOfMemoryError("out of memory")
            return self.inner(inputs)

    limited, free = Limited(), make_model(torch.float64)
    results = []
    for model in (limited, free):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        metrics = {"accuracy": correct}
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics, config=quiet(restore_best=False))
        test = loader_of(make_data(29, torch.float64), 29, shuffle=False)
        history = trainer.fit(loader_of(DATA, 6), test)
        results.append((history.test_losses, history.metrics, trainer.evaluate(test), trainer.predict(test)))
    return results, limited.num_failed


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_evaluation_and_prediction_cut_finer_too(num_processes):
    for process, (results, num_failed) in enumerate(on_processes(num_processes, evaluate_small)):
        limited, free = results
        assert limited[0] == pytest.approx(free[0], rel=1e-12) and limited[1] == free[1]
        assert limited[2] == pytest.approx(free[2], rel=1e-12)
        if process == 0:
            torch.testing.assert_close(limited[3], free[3])
            assert num_failed == (9 if num_processes == 1 else 6)  # once per power of two in fit, evaluate, predict


def test_the_function_of_the_tutorials_cuts_finer_and_keeps_it(capsys):
    model, plain = Small(limit=25), make_model(torch.float64)
    losses = []
    for network in (model, plain):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        loader = loader_of(DATA)
        losses.append([train_model(loader, network, nn.CrossEntropyLoss(), optimizer) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert model.num_failed == 2 and "cut into 4 micro-batches" in capsys.readouterr().out


@pytest.mark.parametrize("failing", [1, 6, 19, 20])
def test_buffers_count_every_batch_once_whenever_memory_runs_out(failing):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner, self.num_calls = nn.BatchNorm1d(5).double(), make_model(torch.float64), 0

        def forward(self, inputs):
            outputs = self.norm(inputs)
            self.num_calls += 1
            if self.num_calls == failing:
                raise torch.OutOfMemoryError("out of memory")
            return self.inner(outputs)

    model = Late()
    fit(model, loader_of(make_data(320, torch.float64), 16), num_epochs=1)
    assert model.norm.num_batches_tracked == 20


class Rare(Ragged):
    """Few samples, two of them long: a pass has no more batches than are tried at first."""

    def __len__(self):
        return 28

    def __getitem__(self, index):
        return torch.full((40 if index in (3, 17) else 4,), 0.1, dtype=torch.float64), index % 3


def fit_rare(limit):
    torch.manual_seed(0)
    model = OverLength(limit)
    return fit(model, DataLoader(Rare(), 7, shuffle=True, collate_fn=pad), num_epochs=6), model.guard.num_failed


@pytest.mark.distributed
def test_short_passes_over_ragged_samples_are_watched_on():
    reference, _ = fit_rare(10**6)
    results = on_processes(2, fit_rare, 150)
    assert sum(num_failed for _, num_failed in results) >= 1
    for result, _ in results:
        assert_same(reference, result, torch.float64)


def test_an_interrupted_batch_is_forgotten():
    def train_twice(is_interrupted):
        model = Small(limit=40, kind="batchnorm")  # cuts into 2
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loader = loader_of(make_data(32, torch.float64), 16, shuffle=False)
        loss_fn = nn.CrossEntropyLoss()
        train_model(loader, model, loss_fn, optimizer)
        if is_interrupted:
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            model.from_call, model.limit, model.error = model.num_calls + 1, 0, KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                train_model(loader, model, loss_fn, optimizer)
            model.limit = 10**6
            model.load_state_dict(before, strict=False)
        train_model(loader, model, loss_fn, optimizer)
        return [buffer for _, buffer in model.named_buffers()]

    for one, other in zip(train_twice(True), train_twice(False), strict=True):
        torch.testing.assert_close(one, other)


class ReadOnce(IterableDataset):
    def __init__(self, data):
        self.iterator = iter(data)

    def __iter__(self):
        return self.iterator


def test_a_stream_that_cannot_be_read_again_is_told():
    class Limited(nn.Linear):
        def forward(self, inputs):
            if len(inputs) > 4:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(inputs)

    model = Limited(5, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=quiet())
    for method in (trainer.evaluate, trainer.predict):
        with pytest.raises(RuntimeError, match="stream cannot be read again"):
            method(DataLoader(ReadOnce(make_data(37)), 8))


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="unrelated"):
        fit(Small(limit=10, error=RuntimeError("unrelated")))


@pytest.mark.gpu
def test_a_real_device_runs_out_of_memory():
    free, total = torch.cuda.mem_get_info()
    width = 4096
    samples = int(total / (width * 4)) // 3  # activations of three layers take more than all memory at once

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, inputs):
            wide = inputs.expand(-1, width)
            for _ in range(4):
                wide = torch.tanh(wide * 1.5)
            return self.linear(wide.mean(dim=1, keepdim=True))

    model = Wide()
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), config=quiet(num_epochs=1))
    data = torch.utils.data.TensorDataset(torch.randn(samples, 1), torch.randn(samples, 1))
    history = trainer.fit(DataLoader(data, samples))
    assert history.num_epochs == 1
