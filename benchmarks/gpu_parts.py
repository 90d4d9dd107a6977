"""The parts of `gpu.py`: each finds out one thing about a GPU, in a process of its own.

Importing them touches no GPU, so that a process that has done so can be forked.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import logging
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState
from contenders import CONTENDERS, HAND, OURS, pair
from safetensors.torch import save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset, TensorDataset
from workloads import GPT, SMALL_GPT, TokenLoss, make_task, token_rows

from accel_trainer import Callback, TrainConfig, Trainer
from accel_trainer.tools.launching import run_on_processes
from accel_trainer.tools.recording import digest
from support import loader_of, make_data, make_model


class Finder:
    """Write down what is found.

    Args:
        tell: Takes a finding.
        small: Whether to shrink what is tried.
    """

    def __init__(self, tell: Callable[[dict[str, Any]], None], small: bool) -> None:
        self.tell, self.small = tell, small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"

    def measure(self, name: str, **found: Any) -> None:
        """Write down what has no right answer."""
        self.tell({"name": name, **found})

    def check(self, name: str, function: Callable[[], Any], is_right: Callable[[Any], bool] = bool) -> Any:
        """Write down what a function gives, or its error, and whether that is right."""
        try:
            found = function()
            self.tell({"name": name, "right": is_right(found), "found": found})
            return found
        except Exception as error:
            traceback.print_exc()
            frames = [one for one in traceback.extract_tb(error.__traceback__) if "accel_trainer" in one.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
            text = f"{type(error).__name__}: {str(error)[:500]}"
            self.tell({"name": name, "right": False, "error": text, "where": where})
            return None
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()


def fit(**choices: Any) -> tuple[Any, Any]:
    """Train a small model; return the trainer and its history."""
    names = ("weight_fn", "compute_loss", "metrics", "accelerator", "callbacks", "scheduler")
    own = {name: choices.pop(name) for name in names if name in choices}
    torch.manual_seed(0)
    model = choices.pop("model", make_model)()
    make_optimizer = choices.pop("optimizer", functools.partial(torch.optim.AdamW, lr=0.01))
    loss_fn = choices.pop("loss_fn", nn.CrossEntropyLoss())
    loader = choices.pop("loader", None) or loader_of(choices.pop("data", make_data(96)), choices.pop("batch_size", 8))
    test_loader = choices.pop("test_loader", None)
    config = TrainConfig(**{"num_epochs": 1, "verbose": False, "restore_best": False, **choices})
    loss = None if "compute_loss" in own else loss_fn
    trainer = Trainer(model, make_optimizer(model.parameters()), loss, config=config, **own)
    return trainer, trainer.fit(loader, test_loader)


def losses(**choices: Any) -> list[float]:
    return list(fit(**choices)[1].train_losses)


def outcome(**choices: Any) -> tuple[str, list[float]]:
    """Return what has to be the same to the last bit."""
    trainer, history = fit(**choices)
    return digest(trainer.model.state_dict()), history.train_losses


def apart(one: list[float], other: list[float]) -> float:
    """Return the greatest relative difference."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


# --- right or not -----------------------------------------------------------------------------------------------------


def machine(find: Finder) -> None:
    """What it is, and what is installed."""
    versions = {}
    for name in ("torch", "accelerate", "accel_trainer", "transformers", "lightning", "numpy", "triton", "datasets"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpu = torch.cuda.get_device_name() if find.on_gpu else None
    memory = torch.cuda.mem_get_info() if find.on_gpu else None
    find.measure(
        "machine", python=sys.version.split()[0], versions=versions, gpu=gpu, memory=memory, cpus=os.cpu_count()
    )


class Graph:
    """A batch that is an object with tensors in it."""

    def __init__(self, inputs: Any, targets: Any) -> None:
        self.inputs, self.targets = inputs, targets

    def to(self, device: Any, non_blocking: bool = False) -> Graph:
        """Return it on a device."""
        return Graph(self.inputs.to(device), self.targets.to(device))

    def pin_memory(self) -> Graph:
        """Return it in page-locked memory."""
        return Graph(self.inputs.pin_memory(), self.targets.pin_memory())


def batches(find: Finder) -> None:
    """Batches, weights and metrics of every kind, beside the same training with plain tensors."""

    class Listed(Dataset[Any]):
        def __init__(self, place: Callable[[Any], Any] = lambda tensor: tensor) -> None:
            self.data, self.place = make_data(96), place

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> Any:
            return tuple(map(self.place, self.data[index]))

    def loader(make: Any = None, **how: Any) -> Any:
        def collate(samples: list[Any]) -> Any:
            inputs, targets = zip(*samples, strict=True)
            return make(torch.stack(inputs), torch.stack(targets))

        return DataLoader(Listed(**how), 8, shuffle=True, **({"collate_fn": collate} if make else {}))

    def plain_loss(model: Any, batch: Any) -> Any:
        inputs = batch[0].to_padded_tensor(0.0) if batch[0].is_nested else batch[0]
        return F.cross_entropy(model(inputs.to_dense() if inputs.is_sparse else inputs), batch[1])

    def graph_loss(model: Any, graph: Any) -> Any:
        return F.cross_entropy(model(graph.inputs), graph.targets)

    def nested(inputs: Any, targets: Any) -> Any:
        return torch.nested.as_nested_tensor(list(inputs), layout=torch.jagged), targets

    expected = losses()

    def same(found: list[float]) -> bool:
        return apart(expected, found) < 1e-4

    on_device = loader(place=lambda tensor: tensor.to(find.device))
    sparse = loader(lambda inputs, targets: (inputs.to_sparse(), targets))
    find.check("a data set of tensors on the GPU", lambda: losses(loader=on_device), same)
    find.check("batches that are objects", lambda: losses(loader=loader(Graph), compute_loss=graph_loss), same)
    find.check("sparse batches", lambda: losses(loader=sparse, compute_loss=plain_loss), same)
    find.check("nested batches", lambda: losses(loader=loader(nested), compute_loss=plain_loss), same)
    weight_fns: dict[str, Callable[[Any], Any]] = {
        "a tensor of the host": lambda batch: torch.tensor(float(len(batch[1]))),
        "a tensor of the device": lambda batch: (batch[1] >= 0).sum(),
        "a number": lambda batch: len(batch[1]),
    }
    for name, weight_fn in weight_fns.items():
        find.check(f"the weight is {name}", lambda: losses(weight_fn=weight_fn, num_micro_batches=2), same)  # noqa: B023
    metrics = {"host": lambda outputs, targets: torch.tensor(0.5), "device": lambda o, t: o.argmax(1) == t}
    test_loader = loader_of(make_data(40), 8)
    find.check("metrics of host and device", lambda: fit(metrics=metrics, test_loader=test_loader)[1].metrics)


def fp16(find: Finder) -> None:
    """Updates that the scaler skips are no steps, for optimizers that skip by themselves too."""
    if not find.on_gpu:
        return find.measure("needs a GPU")

    def loss_fn(outputs: Any, targets: Any) -> Any:
        return 100 * F.cross_entropy(outputs, targets)  # scaled by 65,536 its gradients overflow in half precision

    for fused in (False, True):
        for norm in (None, 1.0):

            def counted(fused: bool = fused, norm: float | None = norm) -> dict[str, Any]:
                optimizer = functools.partial(torch.optim.AdamW, lr=0.01, fused=fused)
                how = {"loss_fn": loss_fn, "optimizer": optimizer, "max_grad_norm": norm, "mixed_precision": "fp16"}
                trainer, _ = fit(num_epochs=4, **how)
                own = {int(state["step"]) for state in trainer.optimizer.state.values()}
                return {"counted": trainer.state.step, "optimizer": sorted(own), "batches": trainer.state.num_batches}

            find.check(
                f"steps with overflows, fused {fused}, clipping {norm}",
                counted,
                lambda found: [found["counted"]] == found["optimizer"] and 0 < found["counted"] < found["batches"],
            )


def second_fit(find: Finder) -> None:
    """What a run leaves behind: the optimizer's counters on the host, and no memory."""

    def counters() -> list[str]:
        trainer, _ = fit()
        trainer.fit(loader_of(make_data(96), 8))
        return sorted({str(state["step"].device) for state in trainer.optimizer.state.values()})

    def left() -> int:
        model = nn.Linear(4096, 10)
        data = TensorDataset(torch.zeros(4096, 4096), torch.zeros(4096, dtype=torch.long))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), config=TrainConfig(num_epochs=1, verbose=False))
        trainer.fit(loader_of(data, 512))
        return torch.cuda.memory_allocated() if find.on_gpu else 0

    def left_by_the_second() -> int:
        before = left()  # what libraries keep for themselves, such as the workspaces of cuBLAS
        return left() - before

    find.check("counters of steps stay on the host", counters, lambda found: found == ["cpu"])
    gc.collect()
    gc.disable()
    told = "bytes that a second run with 64 MiB of data leaves on the GPU"
    find.check(told, left_by_the_second, lambda found: found < 2**20)
    gc.enable()


def bits(find: Finder) -> None:
    """The same bits wherever the data is, again, and resumed within an epoch, also for rows of odd lengths."""

    def model(size: int) -> Any:
        return nn.Sequential(nn.Linear(size, 96), nn.Tanh(), nn.Linear(96, 10))

    def rows(size: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        targets = torch.randint(0, 10, (300,), generator=generator)
        return TensorDataset(torch.randn(300, size, generator=generator), targets)

    def run(size: int, **choices: Any) -> Any:
        how = {"batch_size": 50, "bitwise": True, "num_micro_batches": 8, "num_epochs": 2}
        return outcome(model=functools.partial(model, size), data=rows(size), **how | choices)

    def resumed(size: int) -> bool:
        whole = run(size)
        with tempfile.TemporaryDirectory() as folder:
            kept = {"run_dir": f"{folder}/run", "checkpoint_every": 4}
            run(size, **kept, max_steps=4)
            return bool(run(size, **kept, resume=True) == whole)

    for size in (13, 64, 333):
        find.check(f"{size} features: again", lambda: run(size) == run(size))  # noqa: B023
        find.check(f"{size} features: data on the host", lambda: run(size) == run(size, data_in_memory=False))  # noqa: B023
        find.check(f"{size} features: resumed within an epoch", lambda: resumed(size))  # noqa: B023
    for dtype in (torch.float32, torch.bfloat16):
        for size in (13, 30, 333, 1000):
            made = [torch.randn(shape, device=find.device, dtype=dtype) for shape in ((513, size), (96, size), (96,))]
            table, *weights = made
            offsets = [row for row in (1, 2, 3, 7) if not torch.equal(
                F.linear(table[row : row + 64], *weights), F.linear(table[row : row + 64].clone(), *weights)
            )]  # fmt: skip
            find.measure(f"products of a slice and of its copy, {size} of {dtype}", rows_that_differ=offsets)

    def convolutions(precision: str) -> float:
        torch.set_float32_matmul_precision(precision)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(256, 3, 16, 16, generator=generator)
        data = TensorDataset(images, torch.randint(0, 10, (256,), generator=generator))
        layers = (nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        how: dict[str, Any] = {
            "model": lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 256, 10)),
            "optimizer": functools.partial(torch.optim.SGD, lr=0.01),
            **{"data": data, "batch_size": 64, "num_epochs": 3},
        }
        start = [one.detach().clone() for layer in layers for one in layer.parameters()]
        runs = []
        for cut in (1, 3):
            for layer_parameter, value in zip(nn.Sequential(*layers).parameters(), start, strict=True):
                layer_parameter.data = value.clone()
            runs.append(losses(num_micro_batches=cut, **how))
        torch.set_float32_matmul_precision("highest")
        return apart(*runs)

    find.check(
        "convolutions cut in 1 and in 3: difference of the losses", lambda: convolutions("highest"), _within(1e-5)
    )
    find.check("the same under TF32", lambda: convolutions("high"), lambda found: True)


def _within(bound: float) -> Callable[[float], bool]:
    return lambda found: found <= bound


def after_product(find: Finder) -> None:
    """Bits after a matrix product that came before the trainer: torch refuses, and the message has the remedy."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.ones(8, 8, device=find.device) @ torch.ones(8, 8, device=find.device)

    def run() -> str:
        try:
            return str(losses(bitwise=True))
        except RuntimeError as error:
            return str(error)

    find.check("bitwise after a product", run, lambda found: found[0] == "[" or "Start the program with" in found)


def waits(find: Finder) -> None:
    """No step waits for the GPU, but with `on_nonfinite="skip"` and fp16, once."""
    if not find.on_gpu:
        return find.measure("needs a GPU")
    seen: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message) and "prototype" not in str(message):
            stack = traceback.extract_stack()
            frames = [one for one in stack if "/accel_trainer/" in one.filename] or stack
            seen[f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}"] += 1

    warnings.simplefilter("always")
    warnings.showwarning = note

    class Watch(Callback):
        def on_step_end(self, trainer: Any) -> None:
            torch.cuda.set_sync_debug_mode("warn" if 3 <= trainer.state.num_batches < 8 else "default")

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.register_buffer("scale", torch.ones(5))

        def forward(self, inputs: Any) -> Any:
            return self.layer(inputs * self.scale)

    def loss(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    fused = functools.partial(torch.optim.AdamW, lr=0.01, fused=True)
    batchnorm = functools.partial(make_model, kind="batchnorm")
    configurations: dict[str, dict[str, Any]] = {
        "plain": {},
        "cut": {"num_micro_batches": 4},
        "data on the host": {"data_in_memory": False},
        "clipping": {"max_grad_norm": 1.0},
        "fused": {"optimizer": fused},
        "ignore_index, cut": {"loss_fn": nn.CrossEntropyLoss(ignore_index=1), "num_micro_batches": 2},
        "class weights": {"loss_fn": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 2.0]))},
        "compute_loss, cut": {"compute_loss": loss, "num_micro_batches": 2},
        "compute_loss, bitwise": {"compute_loss": loss, "bitwise": True, "num_micro_batches": 4},
        "weights of the host": {"weight_fn": lambda batch: torch.tensor(8.0), "num_micro_batches": 2},
        "own buffers, cut": {"model": Scaled, "num_micro_batches": 4},
        "batchnorm, cut": {"model": batchnorm, "num_micro_batches": 2},
        "bitwise": {"bitwise": True, "num_micro_batches": 4},
        "bf16": {"mixed_precision": "bf16"},
        "skip": {"on_nonfinite": "skip", "num_micro_batches": 2},
        "fp16": {"mixed_precision": "fp16"},
        "fp16, fused": {"mixed_precision": "fp16", "optimizer": fused},
    }
    for name, choices in configurations.items():
        seen.clear()
        allowed = 1 if name in ("skip", "fp16", "fp16, fused") else 0

        def per_step(choices: dict[str, Any] = choices) -> dict[str, float]:
            fit(callbacks=[Watch()], report_every=10**6, data=make_data(100), **choices)
            return {where: count / 5 for where, count in seen.items()}

        find.check(f"waits in a step: {name}", per_step, lambda found: sum(found.values()) <= allowed)  # noqa: B023
        torch.cuda.set_sync_debug_mode("default")


def _one_of(several: bool, bitwise: bool) -> Any:
    """Train as one of the processes that share a GPU, over gloo."""
    how: dict[str, Any] = {"num_micro_batches": 4, "bitwise": bitwise, "num_epochs": 2, "max_grad_norm": 1.0}
    if several:
        handler = InitProcessGroupKwargs(backend="gloo")
        on_cpu = not torch.cuda.is_available()
        how["accelerator"] = lambda: Accelerator(cpu=on_cpu, kwargs_handlers=[handler])
    return outcome(model=functools.partial(make_model, kind="batchnorm"), data=make_data(64), batch_size=16, **how)


def two_processes(find: Finder) -> None:
    """Two processes on one GPU are one."""

    def run(bitwise: bool) -> Any:
        how: dict[str, Any] = {"timeout": 100, "environment": {"LOCAL_RANK": "0"}}  # the same GPU
        shared = run_on_processes(2, _one_of, True, bitwise, **how)[0]
        alone = run_on_processes(1, _one_of, False, bitwise, timeout=100)[0]
        return alone == shared if bitwise else apart(alone[1], shared[1])

    find.check("two processes and one: difference of the losses", lambda: run(False), _within(1e-5))
    find.check("two processes and one: the same bits", lambda: run(True))


def _divided(number: int, bitwise: bool) -> Any:
    """Train a divided model in one of the processes that share a GPU; a world of one is a group too."""
    if number == 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    how: dict[str, Any] = {"num_micro_batches": 4, "num_epochs": 2, "max_grad_norm": 1.0, "bitwise": bitwise}
    how["sharding"] = "full"
    if number > 1:
        handler = InitProcessGroupKwargs(backend="gloo")
        on_cpu = not torch.cuda.is_available()
        how["accelerator"] = lambda: Accelerator(cpu=on_cpu, kwargs_handlers=[handler])
    return outcome(model=functools.partial(make_model, kind="batchnorm"), data=make_data(64), batch_size=16, **how)


def divided(find: Finder) -> None:
    """A model that is divided over a world of one, and over two processes on one GPU, is one that is not."""

    def run(number: int, bitwise: bool) -> Any:
        how: dict[str, Any] = {"timeout": 100, "environment": {"LOCAL_RANK": "0"}}  # the same GPU
        found = run_on_processes(number, _divided, number, bitwise, **how)[0]
        alone = run_on_processes(1, _one_of, False, bitwise, timeout=100)[0]
        return alone == found if bitwise else apart(alone[1], found[1])

    for number in (1, 2):
        find.check(f"divided over {number}: difference of the losses", lambda: run(number, False), _within(1e-5))  # noqa: B023
        find.check(f"divided over {number}: the same bits", lambda: run(number, True))  # noqa: B023


def graphs(find: Finder) -> None:
    """Compiled code: no more graphs than two, and the memory of CUDA graphs is copied in time."""

    def loss(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    if find.small:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "AOT_EAGER"

    def compiled(**choices: Any) -> int:
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        test_loader = loader_of(make_data(40), 8)
        trainer, _ = fit(compile=True, mixed_precision="bf16", test_loader=test_loader, **choices)
        for _ in range(2):
            trainer.evaluate(test_loader)
        trainer.predict(test_loader)
        trainer.fit(loader_of(make_data(96), 8), test_loader)
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)

    find.check("graphs of two runs in bf16", compiled, lambda found: found == 2)
    expected = {cut: losses(num_epochs=2, num_micro_batches=cut) for cut in (1, 2)}
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "AOT_EAGER" if find.small else "INDUCTOR"
    os.environ["ACCELERATE_DYNAMO_MODE"] = "reduce-overhead"
    for name, cut, own in (("", 1, {}), (", cut", 2, {}), (", compute_loss", 1, {"compute_loss": loss})):
        torch._dynamo.reset()
        how = {"num_epochs": 2, "report_every": 3, "num_micro_batches": cut, **own}
        find.check(
            f"reduce-overhead{name}: difference of the losses",
            lambda: apart(expected[cut], losses(model=make_model, **how)),  # noqa: B023
            _within(1e-4),
        )


def memory(find: Finder) -> None:
    """A batch that does not fit is cut until it does, and the losses are those of that cut from the start."""
    context, rows = (16, 64) if find.small else (1024, 768)
    train, _ = token_rows(rows, 1, context)

    def run(cut: int | None) -> tuple[list[float], int, float]:
        torch.manual_seed(0)
        large = functools.partial(GPT, layers=12, width=768, heads=12, vocabulary=50_304, context=context)
        model = SMALL_GPT() if find.small else large()
        how: dict[str, Any] = {"num_epochs": 1, "max_steps": 2, "report_every": 1, "restore_best": False}
        config = TrainConfig(num_micro_batches=cut, mixed_precision="bf16", **how)
        found: list[int] = []
        trainer = Trainer(model, torch.optim.AdamW(model.parameters(), lr=1e-4), TokenLoss(), config=config)
        told, before = [], Trainer._announcer
        Trainer._announcer = lambda self, hardware: told.append  # type: ignore[method-assign,assignment]
        began = time.perf_counter()
        try:
            history = trainer.fit(DataLoader(train, rows // 2))
        finally:
            Trainer._announcer = before  # type: ignore[method-assign]
        found = [int(line.split(" micro-batches")[0].split()[-1]) for line in told if "Out of memory" in line]
        return history.train_losses, max(found, default=cut or 1), round(time.perf_counter() - began, 1)

    found = find.check("cut until it fits", lambda: run(None), lambda found: find.small or found[1] > 1)
    if found is not None:
        cut = found[1]
        find.check(f"cut in {cut} from the start", lambda: run(cut), lambda again: apart(found[0], again[0]) < 1e-3)


# --- how fast ---------------------------------------------------------------------------------------------------------

STEPS = 10, 60  # what is timed: from the end of the one to the end of the other


class Timed:
    """Milliseconds a step between two steps, by a hook that every optimizer calls."""

    def __init__(self, find: Finder, first: int, last: int) -> None:
        self.first, self.last, self.num_steps, self.times = first, last, 0, {0: time.perf_counter()}
        self.on_gpu = find.on_gpu
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.handle = register_optimizer_step_post_hook(self.note)

    def note(self, *_: Any) -> None:
        """Take the time, where it is needed, once the device has come so far."""
        self.num_steps += 1
        if self.num_steps in (1, self.first, self.last):
            if self.on_gpu:
                torch.cuda.synchronize()
            self.times[self.num_steps] = time.perf_counter()

    def result(self) -> dict[str, float]:
        """Return what was measured."""
        self.handle.remove()
        spent = self.times[self.last] - self.times[self.first]
        return {
            "step_ms": round(1e3 * spent / (self.last - self.first), 3),
            "first_step_s": round(self.times[1] - self.times[0], 2),
            "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if self.on_gpu else 0,
        }


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(min(8, os.cpu_count() or 1))
        yield


def _timed(find: Finder, name: str, workload: str, **how: Any) -> dict[str, float]:
    task = make_task(workload, "tensors", find.small, num_epochs=1)
    timed = Timed(find, *((2, 4) if find.small else STEPS))
    test_loss = CONTENDERS[name](task)
    return {**timed.result(), "test_loss": round(test_loss, 4), **how}


def _told_as_ratio(find: Finder, name: str, turns: list[tuple[float, float]]) -> None:
    """Write down our throughput as a part of the hand-written loop's, turn by turn, and whether it keeps up."""
    ratios = [round(reference / own, 4) for reference, own in turns]
    is_right = None if find.small else statistics.median(ratios) >= 0.99
    find.tell({"name": f"{name}: throughput beside the hand-written loop", "ratios": ratios, "right": is_right})


def gpt2(find: Finder) -> None:
    """GPT-2 of 124 million parameters, compiled and in bf16: the hand-written loop and ours in turn."""
    turns = []
    with _quiet():
        for number in range(1 if find.small else 3):
            measured = {}
            for who in (HAND, OURS) if number % 2 == 0 else (OURS, HAND):
                measured[who] = _timed(find, who, "gpt2")
                find.measure("gpt2", who=who, turn=number, **measured[who])
            turns.append((measured[HAND]["step_ms"], measured[OURS]["step_ms"]))
    _told_as_ratio(find, "gpt2", turns)


def peer(find: Finder, name: str) -> None:
    """The same by another trainer."""
    who = {"transformers": "transformers Trainer", "lightning": "Lightning Trainer"}[name]
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return find.measure("gpt2", who=who, missing=True)
    with _quiet():
        find.measure("gpt2", who=who, **_timed(find, who, "gpt2"))


def resnet(find: Finder) -> None:
    """ResNet-50 in bf16, uncut and cut in two: the hand-written loop and ours in turn."""

    def by_hand(task: Any, cut: int) -> None:
        for batch in task.loaders()[0]:
            inputs, targets = (one.to(task.device, non_blocking=True) for one in pair(batch))
            task.optimizer.zero_grad()
            for some, own in zip(inputs.chunk(cut), targets.chunk(cut), strict=True):
                with task.autocast():
                    loss = task.loss_fn(task.model(some), own) / cut
                loss.backward()
            task.optimizer.step()

    def ours(task: Any, cut: int) -> None:
        precision: Any = "bf16" if task.bf16 else None
        how: dict[str, Any] = {"num_epochs": 1, "verbose": False, "restore_best": False}
        config = TrainConfig(num_micro_batches=cut if cut > 1 else None, mixed_precision=precision, **how)
        Trainer(task.model, task.optimizer, task.loss_fn, config=config).fit(task.loaders()[0])

    with _quiet():
        for cut in (1, 2):
            turns = []
            for number in range(1 if find.small else 3):
                measured = {}
                sides = (("hand-written loop", by_hand), ("accel_trainer", ours))
                for who, function in sides if number % 2 == 0 else sides[::-1]:
                    task = make_task("resnet50", "tensors", find.small, num_epochs=1)
                    timed = Timed(find, *((1, 2) if find.small else (4, 20)))
                    function(task, cut)
                    measured[who] = timed.result()
                    find.measure("resnet50", who=who, cut=cut, turn=number, **measured[who])
                turns.append((measured["hand-written loop"]["step_ms"], measured["accel_trainer"]["step_ms"]))
            _told_as_ratio(find, f"resnet50 cut in {cut}", turns)


def save(find: Finder) -> None:
    """What checkpoints cost, beside writing as many bytes at once."""
    task = make_task("gpt2", "tensors", find.small, num_epochs=1)
    steps = 4 if find.small else 32
    for every in (10**6, steps // 4):
        with tempfile.TemporaryDirectory() as folder:
            how: dict[str, Any] = {"max_steps": steps, "mixed_precision": "bf16", "verbose": False}
            config = TrainConfig(num_epochs=1, run_dir=f"{folder}/run", checkpoint_every=every, **how)
            began = time.perf_counter()
            trainer = Trainer(task.model, task.optimizer, task.loss_fn, config=config)
            history = trainer.fit(DataLoader(task.train, task.batch_size, shuffle=True))
            seconds = round(time.perf_counter() - began, 2)
            find.measure("save", every=every, fit_s=seconds, saving_s=history.saving_seconds)
    states = task.optimizer.state_dict()["state"]
    tensors = {name: one.detach().cpu().clone() for name, one in task.model.state_dict().items()}
    tensors |= {
        f"{place}/{name}": one.detach().cpu().clone() for place, own in states.items() for name, one in own.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        save_file(tensors, f"{folder}/plain")
        with open(f"{folder}/plain") as file:
            os.fsync(file.fileno())
        seconds, mib = round(time.perf_counter() - began, 2), round(os.path.getsize(f"{folder}/plain") / 2**20)
    find.measure("save", plain_s=seconds, mib=mib)
