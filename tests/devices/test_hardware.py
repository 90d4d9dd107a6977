"""Hardware is chosen aloud; what would silently not happen is refused."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import nn

from accel_trainer import HardwareError, TrainConfig, Trainer
from accel_trainer.devices.accelerator import possible_precisions
from accel_trainer.devices.hardware import Hardware
from accel_trainer.numbers.scalars import widest_float
from support import ROOT, launch, loader_of, make_data, make_model, on_processes, quiet


def trainer_of(model=None, **arguments):
    model = model or make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), **{"config": quiet(), **arguments})


def fit(**arguments):
    return trainer_of(**arguments).fit(loader_of(make_data(8), 4))


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1, which is not supported. Launch with --fsdp_version 2"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism config without FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "Precision 'fp16' is impossible on CPU.*can do: no, bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "Precision 'fp8' is impossible on CPU"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "gradient_accumulation_steps=4 is not used here.*set num_micro_batches",
        ),
    ],
)
def test_what_the_launch_asks_for_and_cannot_be_is_refused(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HardwareError, match=message):
        fit()


def test_an_impossible_precision_is_refused_with_the_possible_ones():
    with pytest.raises(HardwareError, match="'fp16' is impossible on CPU .*This machine can do: no, bf16"):
        fit(config=quiet(mixed_precision="fp16"))


@pytest.mark.parametrize(
    "device_type, possible",
    [("cpu", ["no", "bf16"]), ("cuda", ["no", "fp16", "bf16", "fp8"]), ("mps", ["no", "fp16", "bf16"])],
)
def test_the_precisions_of_each_kind_of_device(device_type, possible, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert possible_precisions(device_type) == possible
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert ("bf16" in possible_precisions("cuda")) is False


def test_numbers_cross_in_single_precision_where_the_device_knows_no_other():
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Accelerator(gradient_accumulation_steps=2), "gradient_accumulation_steps=2 is not used here"),
        (lambda: Accelerator(mixed_precision="bf16"), "is 'no' in TrainConfig and 'bf16' in the Accelerator"),
        (lambda: Accelerator(mixed_precision="fp16"), "(impossible on CPU|in TrainConfig)"),
    ],
)
def test_an_accelerator_that_does_something_else_is_refused(make, message):
    with pytest.raises(HardwareError, match=message):
        fit(accelerator=make, config=quiet(mixed_precision="no"))


def test_a_plugin_of_ones_own_accelerator_that_would_be_ignored_is_refused(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # restored afterwards; Accelerate sets it
    with pytest.raises(HardwareError, match="Accelerate drops here. Set sharding='full'"):
        fit(accelerator=lambda: Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin()))


def test_something_else_than_an_accelerator_is_refused():
    with pytest.raises(TypeError, match="must be a function that returns an Accelerator, got 3"):
        fit(accelerator=lambda: 3)


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    Accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        HardwareError, match="launcher started 2 processes, but Accelerate sees 1: each would train alone"
    ):
        fit()


def test_two_trainers_with_other_precisions_in_one_process_are_an_error_and_with_the_same_they_work():
    fit(config=quiet(mixed_precision="bf16"))
    with pytest.raises(HardwareError, match="already has an Accelerator with mixed_precision='bf16'.* to 'no'"):
        fit(config=quiet(mixed_precision="no"))
    first, second = trainer_of(config=quiet(mixed_precision="bf16")), trainer_of()
    assert first.fit(loader_of(make_data(8), 4)).train_losses == second.fit(loader_of(make_data(8), 4)).train_losses
    assert first.state.step == second.state.step == 4


def test_the_line_says_what_and_from_where(monkeypatch):
    assert "precision no (default)" in Hardware().describe()
    assert "precision no (the Accelerator of this process)" in Hardware().describe()
    assert "precision no (argument)" in Hardware("no").describe()
    assert "precision no (your Accelerator)" in Hardware(None, Accelerator).describe()


def test_an_argument_wins_over_the_launch_and_the_line_says_so(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    fit(config=TrainConfig(num_epochs=1, mixed_precision="no"))
    assert "precision no (argument)" in capsys.readouterr().out


def test_the_launch_decides_without_an_argument(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    dtypes = []
    model = make_model()
    model[0].register_forward_hook(lambda module, inputs, outputs: dtypes.append(outputs.dtype))
    fit(config=TrainConfig(num_epochs=1), model=model)
    assert "precision bf16 (launcher or environment)" in capsys.readouterr().out
    assert set(dtypes) == {torch.bfloat16}
    assert model[0].weight.dtype == torch.float32


def bf16_losses(num_micro_batches):
    trainer = trainer_of(config=quiet(mixed_precision="bf16", num_micro_batches=num_micro_batches))
    return trainer.fit(loader_of(make_data(64), 16), loader_of(make_data(32), 16)).train_losses


@pytest.mark.distributed
def test_bf16_on_two_processes_follows_one():
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    one = bf16_losses(2)
    for losses in on_processes(2, bf16_losses, 2):
        assert losses == pytest.approx(one, rel=1e-2)


def own_ddp():
    handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    trainer = trainer_of(accelerator=lambda: Accelerator(cpu=True, kwargs_handlers=[handler]))
    return trainer.fit(loader_of(make_data(37), 7)).train_losses


def default_ddp():
    return trainer_of().fit(loader_of(make_data(37), 7)).train_losses


@pytest.mark.distributed
def test_handlers_of_ones_own_accelerator_are_kept():
    assert on_processes(2, own_ddp) == on_processes(2, default_ddp)


@pytest.mark.distributed
def test_an_accelerator_made_too_early_is_named():
    script = """
from accelerate import Accelerator
accelerator = Accelerator()  # without an accelerator device and cpu=True: a training of its own per process
import torch
from torch.utils.data import DataLoader, TensorDataset
from accel_trainer import Trainer
model = torch.nn.Linear(1, 1)
loader = DataLoader(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), batch_size=2)
Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss()).fit(loader)
"""
    if torch.accelerator.is_available():
        pytest.skip("with an accelerator device this works")
    done = launch(script)
    assert done.returncode != 0
    assert "The launcher started 2 processes, but Accelerate sees 1" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_gpu_follows_the_cpu(precision):
    """Over the first steps, within what each precision allows."""
    cpu = os.environ.copy()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    expected = trainer_of(config=quiet(num_micro_batches=2)).fit(loader_of(make_data(64), 16)).train_losses
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(cpu)
    trainer = trainer_of(config=quiet(num_micro_batches=2, mixed_precision=precision))
    losses = trainer.fit(loader_of(make_data(64), 16), loader_of(make_data(29), 8)).train_losses
    assert losses == pytest.approx(expected, rel=1e-5 if precision == "no" else 2e-2)
    assert next(trainer.model.parameters()).is_cuda


@pytest.mark.gpu
def test_class_weights_move_with_the_model():
    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0])),
        config=quiet(num_micro_batches=3),
    )
    assert len(trainer.fit(loader_of(make_data(64), 16), loader_of(make_data(29), 8)).test_losses) == 2


@pytest.mark.gpu
def test_dropout_on_a_gpu_repeats_and_does_not_depend_on_what_ran_before():
    def losses():
        torch.cuda.manual_seed(torch.randint(100, ()).item())
        model = make_model(kind="dropout")
        return trainer_of(model=model).fit(loader_of(make_data(64), 16)).train_losses

    assert losses() == losses()


# --- settings that have no effect -------------------------------------------------------------------------------------


def test_a_configuration_of_loaders_is_said_to_have_no_effect():
    model = make_model()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        accelerator=lambda: Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True)),
        config=quiet(),
    )
    with pytest.warns(UserWarning, match=r"DataLoaderConfiguration\(split_batches=True\) has no effect"):
        trainer.fit(loader_of(make_data(4)))


def test_a_launch_file_that_the_launcher_takes_no_notice_of_is_said(tmp_path):
    (tmp_path / "script.py").write_text(
        "from torch import nn, ones, optim\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "from accel_trainer import TrainConfig, Trainer\n"
        "model, config = nn.Linear(1, 1), TrainConfig(num_epochs=1, verbose=False)\n"
        "trainer = Trainer(model, optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), config=config)\n"
        "trainer.fit(DataLoader(TensorDataset(ones(4, 1), ones(4, 1)), 2))\n"
    )
    (tmp_path / "launch.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nnum_machines: 1\n"
        "machine_rank: 0\nmixed_precision: 'no'\nuse_cpu: true\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file=launch.yaml", "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0 and "MULTI_CPU, of which its launcher takes no notice" in ended.stderr
