"""What must not cost: read-backs in a step, draws that nobody makes, recompilation, imports before they are needed."""

import copy
import functools
import random
import subprocess
import sys
import time

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import Callback, Trainer, train_model
from accel_trainer.data.randomness import draws_nothing
from accel_trainer.numbers.loss_table import LossTable
from accel_trainer.storage.weights import load_best
from support import ROOT, correct, loader_of, make_data, make_model, on_processes, quiet

# --- nothing waits for the host ---------------------------------------------------------------------------------------


class CountReads(TorchDispatchMode):
    """Count how often a tensor is read back to the host, outside the optimizer's own step."""

    def __init__(self):
        super().__init__()
        self.num_reads, self.is_in_optimizer = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        self.num_reads += func in (*reads, torch.ops.aten.equal.default) and not self.is_in_optimizer
        return func(*args, **(kwargs or {}))

    def leave_out(self, optimizer):
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "is_in_optimizer", True))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "is_in_optimizer", False))


class ReadsByStep(Callback):
    def __init__(self, mode):
        self.mode, self.at_step_end = mode, []

    def on_step_end(self, trainer):
        self.at_step_end.append(self.mode.num_reads)


def reads_per_step(model=None, loss_fn=None, scheduler=None, lr=0.01, optimizer=torch.optim.AdamW, **choices):
    model = model or make_model(kind="batchnorm")
    own = {name: choices.pop(name, None) for name in ("weight_fn", "compute_loss")}
    made = optimizer(model.parameters(), lr=lr)
    mode = CountReads()
    mode.leave_out(made)
    seen = ReadsByStep(mode)
    loss_fn = None if own["compute_loss"] else loss_fn or nn.CrossEntropyLoss()
    config = quiet(**{"num_epochs": 1, "report_every": 10**6, **choices})
    trainer = Trainer(model, made, loss_fn, scheduler=scheduler, callbacks=[seen], config=config, **own)
    with mode:
        trainer.fit(loader_of(make_data(80), 8))
    return [later - sooner for sooner, later in zip(seen.at_step_end, seen.at_step_end[1:], strict=False)]


def one_cycle(optimizer, num_steps):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=num_steps)


class Undecided(nn.Module):
    """The weight of each micro-batch is a tensor on the device."""

    def __call__(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]), (batch[1] != 1).sum()


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"num_micro_batches": 3},
        {"bitwise": True, "num_micro_batches": 4},
        {"max_grad_norm": 0.1},
        {"loss_fn": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 2.0]), ignore_index=1)},
        {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1), "num_micro_batches": 2},
        {"weight_fn": lambda batch: (batch[1] > 0).sum(), "num_micro_batches": 2},
        {"compute_loss": Undecided()},
        {"scheduler": one_cycle, "optimizer": torch.optim.SGD},
        {"mixed_precision": "bf16"},
    ],
    ids=lambda choices: " ".join(choices) or "plain",
)
@pytest.mark.filterwarnings("ignore:loss_fn is no mean")  # not with these weights
def test_no_step_reads_a_tensor_back(choices):
    assert reads_per_step(**choices) == [0] * 9


def test_a_report_reads_and_nothing_in_between_does():
    reads = reads_per_step(report_every=3)
    assert [count > 0 for count in reads] == [False, True] + [False, False, True] * 2 + [False]


def test_the_count_has_teeth():
    class Peeks(nn.Module):
        def forward(self, outputs, targets):
            loss = F.cross_entropy(outputs, targets)
            return loss if loss.item() >= 0 else -loss

    assert reads_per_step(loss_fn=Peeks()) == [1] * 9


def test_a_learning_rate_on_the_device_is_not_read_back():
    reads = reads_per_step(lr=torch.tensor(0.01), optimizer=functools.partial(torch.optim.SGD, foreach=True))
    assert reads == [0] * 9


@pytest.mark.gpu
@pytest.mark.parametrize("choices", [{}, {"num_micro_batches": 2, "max_grad_norm": 1.0}, {"data_in_memory": False}])
def test_no_step_waits_for_the_gpu(choices):
    class Strict(Callback):
        def on_step_end(self, trainer):
            torch.cuda.set_sync_debug_mode("error" if trainer.state.step in range(3, 9) else "default")

    if not torch.cuda.is_available():
        pytest.skip("only CUDA can tell")
    model = make_model(kind="dropout")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True, foreach=True)
    config = quiet(num_epochs=1, report_every=10**6, **choices)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Strict()], config=config)
    try:
        trainer.fit(loader_of(make_data(100), 8))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- what is drawn ----------------------------------------------------------------------------------------------------


class Mine(nn.Linear):
    pass


def changed(thing, name, value):
    setattr(thing, name, value)
    return thing


def hooked(register, hook=lambda *_: None):
    layer = nn.Linear(1, 1)

    (getattr(layer, register, None) or getattr(layer.weight, register))(hook)
    return layer


class Odd(nn.Parameter):
    pass


def traced():
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(1, 1)))


@pytest.mark.parametrize(
    "thing, expected",
    [
        (nn.Linear(1, 1), True),
        (nn.Conv2d(1, 1, 1), True),
        (nn.CrossEntropyLoss(), True),
        (nn.Dropout(), False),
        (nn.RReLU(), False),
        (nn.MultiheadAttention(2, 1, dropout=0.1), False),
        (nn.LSTM(1, 1, 2, dropout=0.1), False),
        (nn.TransformerEncoderLayer(4, 1), False),
        (Mine(1, 1), False),
        (changed(nn.Linear(1, 1), "forward", lambda inputs: inputs), False),
        (changed(nn.Conv1d(1, 1, 1), "_conv_forward", lambda *_: None), False),
        (changed(nn.Linear(1, 1), "weight", Odd(torch.zeros(1, 1))), False),
        (nn.TransformerEncoderLayer(4, 1, activation=lambda inputs: inputs), False),
        (nn.TripletMarginWithDistanceLoss(distance_function=lambda one, other: one - other), False),
        (hooked("register_forward_hook"), False),
        (hooked("register_full_backward_hook"), False),
        (hooked("register_hook"), False),
        (hooked("register_post_accumulate_grad_hook"), False),
        (traced(), False),
    ],
)
def test_generators_are_seeded_where_a_model_may_draw(thing, expected):
    assert draws_nothing(nn.Sequential(nn.ReLU(), thing)) == expected


@pytest.mark.parametrize(
    "thing, expected",
    [
        (torch.optim.SGD([torch.zeros(1)]), True),
        (F.dropout, False),
        (correct, False),
        (functools.partial(F.cross_entropy), False),
        (Callback(), False),
    ],
)
def test_generators_are_seeded_where_what_stands_beside_it_may_draw(thing, expected):
    assert draws_nothing(nn.ReLU(), thing) == expected


def test_what_is_changed_for_all_modules_counts(monkeypatch):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not draws_nothing(nn.ReLU())
    handle.remove()
    assert draws_nothing(nn.ReLU())
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, inputs: inputs)
    assert not draws_nothing(nn.ReLU())


def test_a_layer_that_comes_later_is_seen():
    def run(num_drawn):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Identity(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader, loss_fn = loader_of(make_data(37), 7), nn.CrossEntropyLoss()
        train_model(loader, model, loss_fn, optimizer)
        model[1] = nn.Dropout(0.5)
        torch.rand(num_drawn)
        return train_model(loader, model, loss_fn, optimizer)

    assert run(0) == run(5)


@pytest.mark.filterwarnings("ignore")  # of odd arguments
def test_no_layer_of_torch_that_is_taken_to_draw_nothing_draws():
    """Every module that can be called with a tensor, and is said to draw nothing, leaves the generator alone."""
    tried = 0
    for name in dir(nn):
        kind = getattr(nn, name)
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            continue
        for arguments, shape in (((), (4, 4)), ((4,), (2, 4, 4)), ((4, 4), (4, 4)), ((2,), (2, 2, 8, 8))):
            try:
                module, inputs = kind(*arguments), torch.rand(shape)
                is_certain, state = draws_nothing(module), torch.get_rng_state()
                module(inputs)
            except Exception:
                continue
            tried += 1
            assert not is_certain or torch.equal(state, torch.get_rng_state()), name
    assert tried > 50


def test_python_and_numpy_draw_alike_wherever_user_code_may_draw():
    class Noisy(nn.Module):
        def forward(self, outputs, targets):
            factor = 1 + random.random() + float(numpy.random.rand())
            return F.cross_entropy(outputs * factor, targets)

    def run(disturbed):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(disturbed):
            random.random(), numpy.random.rand()
        return Trainer(model, optimizer, Noisy(), config=quiet()).fit(loader_of(make_data(37), 7)).train_losses

    assert run(0) == run(3)


# --- compiling --------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = F.dropout(self.first(inputs), 0.2, self.training)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden)


@pytest.fixture
def counted(monkeypatch):
    """Let torch.compile count the graphs in place of making them fast."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def fit_blocks(compile, tmp_path=None, num_samples=37, **choices):
    torch.manual_seed(0)
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(num_epochs=3, compile=compile, run_dir=tmp_path, **choices)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=config)
    history = trainer.fit(loader_of(make_data(num_samples), 8), loader_of(make_data(29), 8, shuffle=False))
    return model, history, trainer


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own insides
@pytest.mark.parametrize("compile, num_graphs", [(True, 2), ("regional", 2)])
def test_short_last_batches_are_not_compiled_and_nothing_else_changes(compile, num_graphs, counted, tmp_path):
    """One graph for training and one for evaluation, of the model or of the block that repeats."""
    plain, expected, _ = fit_blocks(False)
    model, history, trainer = fit_blocks(compile, tmp_path / "run")
    assert counted.frame_count == num_graphs
    assert history.train_losses == expected.train_losses and history.test_losses == expected.test_losses
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    load_best(Blocks(), tmp_path / "run")
    assert trainer.evaluate(loader_of(make_data(29), 8, shuffle=False))["loss"] == history.best_value
    assert trainer.predict(loader_of(make_data(29), 8)).shape == (29, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compile", [True, "regional"])
def test_a_compiled_model_follows_what_is_changed_in_the_users(compile, counted):
    class Heats(Callback):
        def on_epoch_end(self, trainer):
            trainer.model.temperature *= 0.5
            if trainer.state.epoch == 2:
                trainer.model.blocks[1] = nn.Identity()

    class Warm(Blocks):
        temperature = 1.0

        def forward(self, inputs):
            return super().forward(inputs) * self.temperature

    def run(compile):
        torch.manual_seed(0)
        model = Warm()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = quiet(num_epochs=3, compile=compile)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Heats()], config=config)
        return trainer.fit(loader_of(make_data(37), 8), loader_of(make_data(29), 8)), model

    (expected, _), (history, model) = run(False), run(compile)
    assert history.train_losses == expected.train_losses and history.test_losses == expected.test_losses
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("regional", ["false", "true"])
def test_what_the_launch_compiles_counts_as_little(monkeypatch, regional):
    torch._dynamo.reset()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", regional)
    torch._dynamo.utils.counters.clear()
    fit_blocks(False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_storm_of_compilations_is_told(counted, capsys):
    class Ragged(torch.utils.data.Dataset):
        def __len__(self):
            return 14

        def __getitem__(self, index):
            return torch.zeros(index + 2), torch.zeros(())

    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, inputs):
            return (inputs * self.weight).sum()

    model = Static()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(num_epochs=1, compile=True, verbose=True)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        Trainer(model, optimizer, lambda outputs, targets: outputs * 1, config=config).fit(DataLoader(Ragged(), 1))
    assert "The model was compiled 14 times: each new shape costs one." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_inductor_trains_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    _, expected, _ = fit_blocks(False)
    _, history, _ = fit_blocks(True, tmp_path / "run")
    assert history.num_epochs == expected.num_epochs and history.test_losses[-1] < history.test_losses[0] * 1.1


# --- starting ---------------------------------------------------------------------------------------------------------


def modules_after(code):
    script = f"import sys\n{code}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


HEAVY = ("torch", "torch._dynamo", "accelerate", "transformers", "datasets", "matplotlib", "sklearn", "pandas")


def test_nothing_is_imported_before_it_is_needed():
    assert modules_after("import accel_trainer") == []
    assert modules_after("from accel_trainer import TrainConfig; TrainConfig(patience=3)") == []
    assert modules_after("import accel_trainer; accel_trainer.config.TrainConfig()") == []
    assert modules_after("from accel_trainer import Trainer, train_model, load_best") == ["torch", "accelerate"]
    assert "Trainer" in modules_after("import accel_trainer; print(*dir(accel_trainer))")


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        (["--help"], 0, "parity"),
        (["parity", "--help"], 0, "--num_micro_batches"),
        (["party"], 2, "invalid choice"),
        (["parity", "--processes", "0"], 2, "must be at least 1"),
        (["parity", "no_such_module:run"], 2, "There is no module 'no_such_module'"),
        (["parity", "--seed", "-1"], 2, "seed must be a whole number"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_the_command_line_answers_without_torch(arguments, code, text):
    script = (
        "import sys\nfrom accel_trainer.tools.cli import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as exit:\n    code = exit.code\n"
        f"assert code == {code}, code\nassert 'torch' not in sys.modules"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    assert text in done.stdout + done.stderr
    assert seconds < 5  # 0.1 here; what is promised is measured in benchmarks/, not on a busy machine


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_loss_table_of_a_long_epoch_does_not_grow(monkeypatch):
    """What has been reported is kept as sums only."""
    sizes, report = [], LossTable.report

    def spied(table):
        sizes.append(sum(len(value) for value in vars(table).values() if isinstance(value, list)))
        return report(table)

    monkeypatch.setattr(LossTable, "report", spied)
    model, data = nn.Linear(1, 1), TensorDataset(torch.zeros(1000, 1), torch.zeros(1000, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(num_epochs=1, report_every=10)
    Trainer(model, optimizer, nn.MSELoss(), config=config).fit(DataLoader(data, 1))
    assert len(sizes) == 100 and max(sizes[1:]) == sizes[1]


def count_messages(num_epochs, report_every=50):
    """Return how often processes exchange something, beside the gradients in the backward."""
    names = ["all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"]
    originals = {name: getattr(torch.distributed, name) for name in names}
    sent = []

    def counted(name):
        return lambda *args, **kwargs: sent.append(name) or originals[name](*args, **kwargs)

    try:
        for name in names:
            setattr(torch.distributed, name, counted(name))
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = quiet(num_epochs=num_epochs, report_every=report_every)
        loaders = loader_of(make_data(40), 4), loader_of(make_data(40), 4)
        Trainer(model, optimizer, F.cross_entropy, metrics={"accuracy": correct}, config=config).fit(*loaders)
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    return len(sent)


@pytest.mark.distributed
def test_an_epoch_costs_six_messages_and_each_report_one():
    short, long, reporting = (on_processes(2, count_messages, *args)[0] for args in ((2,), (5,), (5, 2)))
    assert long - short == 3 * 6
    assert reporting - long == 5 * 4  # of ten steps each; the report of the last leaves its end nothing to exchange


def test_without_restore_best_and_run_dir_no_copy_of_the_weights_is_made(monkeypatch):
    def fail(*_):
        raise AssertionError("copied")

    monkeypatch.setattr("accel_trainer.storage.saver._HostBuffers.copy", fail)
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(restore_best=False))
    assert trainer.fit(loader_of(make_data(20), 5)).best_epoch == 2
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])
