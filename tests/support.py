"""Tiny models, fixed data, and processes to run them on."""

import functools
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import accelerate.commands.launch
import torch
import torch.distributed
import torch.distributed.run
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from accel_trainer import TrainConfig, Trainer
from accel_trainer.base.dtensors import cut_of, is_cut, local
from accel_trainer.base.exchange import gather_objects

ROOT = Path(__file__).parent.parent

# Processes, `sharding` and variables of the layouts of a divided model, two replicas among them.
TWO_BY_TWO = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
LAYOUTS = {"2": (2, "full", {}), "3": (3, "full", {}), "4": (4, "full", {}), "2x2": (4, "hybrid", TWO_BY_TWO)}


def _call_and_keep(function, folder, *args):
    result = function(*args)
    rank = torch.distributed.get_rank()  # debug_launcher sets no RANK
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))


def on_processes(num_processes, function, *args):
    """Fork processes that all call the function; return what each returned."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with tempfile.TemporaryDirectory() as folder:
        if num_processes == 1:
            return [function(*args)]
        debug_launcher(_call_and_keep, (function, folder, *args), num_processes)
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(num_processes)]


def put_together(tensors):
    """Return tensors by name, the whole of those that are divided, by one exchange."""
    parts = gather_objects({name: local(one).detach() for name, one in tensors.items() if is_cut(one)})
    return {
        name: torch.cat([part[name] for part in parts[: cut_of(one).number]]) if is_cut(one) else one
        for name, one in tensors.items()
    }


def on_fork(function):
    """Return what a function gives in a fork: one process alone makes a group, which others would inherit."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=lambda: results.put(function()))
    process.start()
    result = results.get(timeout=60)
    process.join()
    return result


def _begin(main, output, errors, argv, env, cwd):
    """Turn this fork into the program that it stands for."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = list(map(str, argv))
    warnings.resetwarnings()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    main()


def run_forked(main, *argv, env=None, cwd=None, timeout=90):
    """Call what a program begins with in a fork of this process, which has imported already what takes it seconds.

    For programs whose own start and end are not asked about: theirs are those of a process of multiprocessing.

    Args:
        main: A function, or the path of a script.
        *argv: The name of the program and its arguments.
        env: All its variables.
        cwd: Its folder.
        timeout: Seconds that it may take.

    Returns:
        What `subprocess.run` does.
    """
    if not callable(main):
        main = functools.partial(runpy.run_path, str(main), run_name="__main__")
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        how = main, output.fileno(), errors.fileno(), argv, {**os.environ, **(env or {})}, cwd or os.getcwd()
        process = multiprocessing.get_context("fork").Process(target=_begin, args=how)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired(str(argv), timeout)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(list(argv), process.exitcode, *texts)


def run_here(monkeypatch, capsys, script, *arguments):
    """Run a script in this process; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", [Path(script).name, *arguments])
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        code = exit.code or 0
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def torchrun(path, *args, num_processes=2, options=(), forks=False, **how):
    """Run a script under torchrun, which itself is a fork of this process; return what `subprocess.run` does.

    Args:
        path: Of the script.
        *args: For the script.
        num_processes: How many.
        options: More of torchrun's own.
        forks: Whether torchrun forks its processes in place of starting interpreters.
        **how: The variables, the folder and the seconds of `run_forked`.
    """
    start = ["--standalone", f"--nproc_per_node={num_processes}", *options]
    start += ["--run-path", "--start-method=fork"] if forks else []
    return run_forked(torch.distributed.run.main, "torchrun", *start, str(path), *args, **how)


def launch(script, num_processes=2, launcher="torchrun", timeout=90, env=None, args=()):
    """Start a real launcher on a script given as text; return the finished process with its output.

    The processes that it launches are interpreters of their own.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script.py")
        path.write_text(script)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": folder, **(env or {})}
        how = {"env": environment, "cwd": folder, "timeout": timeout}
        if launcher == "torchrun":
            return torchrun(path, *args, num_processes=num_processes, **how)
        if launcher == "accelerate":
            options = [
                *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
                *(f"--num_processes={num_processes}", "--main_process_port=0"),
                *(["--multi_gpu"] if num_processes > 1 else []),
            ]
            return run_forked(accelerate.commands.launch.main, "accelerate-launch", *options, str(path), *args, **how)
        return subprocess.run([sys.executable, str(path), *args], capture_output=True, text=True, **how)


class Items(Dataset):
    """The samples of another data set, one by one."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


def make_data(num_samples, dtype=torch.float32, num_classes=3, num_features=5):
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, num_features, generator=generator, dtype=torch.float64)
    targets = (inputs[:, 0] * 2 + inputs[:, 1] > 0).long() + (inputs[:, 2] > 0.5).long()
    return TensorDataset(inputs.to(dtype), targets % num_classes)


def make_model(dtype=torch.float32, kind="plain"):
    torch.manual_seed(1)
    middle = {
        "plain": [nn.Tanh()],
        "dropout": [nn.Dropout(0.4), nn.Tanh()],
        "batchnorm": [nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2)],
    }[kind]
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.Linear(8, 3)).to(dtype)


def correct(outputs, targets):
    return outputs.argmax(dim=1) == targets


def quiet(**choices):
    return TrainConfig(**{"num_epochs": 2, "verbose": False, **choices})


def loader_of(dataset, batch_size=16, shuffle=True, **kwargs):
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, **kwargs)


def summary(history, model):
    """Return all that must be equal under every layout."""
    return {
        "train_losses": history.train_losses,
        "test_losses": history.test_losses,
        "learning_rates": history.learning_rates,
        "grad_norms": history.grad_norms,
        "metrics": history.metrics,
        "best_epoch": history.best_epoch,
        "weights": {name: tensor.double() for name, tensor in model.state_dict().items()},
    }


def train(
    num_samples=37, batch_size=7, dtype=torch.float32, kind="plain", drop_last=False, optimizer="sgd", lr=0.1, **choices
):
    """Train a tiny model and return its summary."""
    model = make_model(dtype, kind)
    optimizers = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    }
    loss_fn = choices.pop("loss_fn", None) or nn.CrossEntropyLoss()
    trainer = Trainer(
        model,
        optimizers[optimizer](model.parameters()),
        loss_fn,
        scheduler=lambda optimizer, num_steps: torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, 0.1, total_iters=num_steps
        ),
        metrics={"accuracy": correct},
        weight_fn=choices.pop("weight_fn", None),
        config=quiet(restore_best=False, **choices),
    )
    data = make_data(num_samples, dtype)
    test = make_data(29, dtype)
    history = trainer.fit(loader_of(data, batch_size, drop_last=drop_last), loader_of(test, 8, shuffle=False))
    return summary(history, model)


TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.float64: (1e-10, 1e-9)}


def assert_same(one, other, dtype=torch.float32):
    """Compare two summaries within what DESIGN promises of different layouts."""
    relative, of_weights = TOLERANCE[dtype]
    for name in ("train_losses", "test_losses", "learning_rates", "grad_norms"):
        torch.testing.assert_close(
            torch.tensor(one[name], dtype=torch.float64),
            torch.tensor(other[name], dtype=torch.float64),
            rtol=relative,
            atol=relative * 1e-2,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert one["metrics"].keys() == other["metrics"].keys()
    for name, values in one["metrics"].items():
        assert values == other["metrics"][name], name
    for name, tensor in one["weights"].items():
        distance = (tensor - other["weights"][name]).norm() / tensor.norm().clamp_min(1e-12)
        assert distance <= of_weights, f"{name}: {distance:.3e}"
    if dtype == torch.float64:
        assert one["best_epoch"] == other["best_epoch"]
