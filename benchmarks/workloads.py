"""What the contenders of `peers.py` train: models, data, and how the data reaches them.

    tiny          MLP 64-64-10, SGD, batch 32, 16,384 random rows labelled by a fixed linear teacher
    digits        the same on scikit-learn's handwritten digits
    cnn           two convolutions on images like Fashion-MNIST, AdamW, batch 64
    transformer   GPT of 10 million parameters, AdamW, batch 8 x 32 tokens
    gpt2          GPT-2 of 124 million parameters, fused AdamW, batch 16 x 1,024 tokens, bf16, compiled; on a GPU
    resnet50      ResNet-50, SGD, batch 128 images of 224 x 224, bf16, compiled; on a GPU

Some of the made-up targets are random, so that the loss has a floor and the last one can be compared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

NUM_CLASSES = 10
Tables = tuple[TensorDataset, TensorDataset]  # for training, for testing


# --- what is trained --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A model, its data, and how it is trained.

    Args:
        make_model: Returns a new model.
        make_tables: Returns the rows to train on and those to test on.
        optimizer: A class of optimizers; `settings` are its arguments.
        batch_size: Of training and testing.
        num_epochs: Of a timed piece, for each kind of data that it is measured with by default.
        loss_fn: `(outputs, targets) -> mean`.
        on_gpu: It is too large for a CPU, and is trained compiled and in bf16.
        tokens: In one sample; 1 where samples are counted themselves.
        flops: Of forward and backward of one sample.
    """

    make_model: Callable[[], nn.Module]
    make_tables: Callable[[], Tables]
    optimizer: type[torch.optim.Optimizer]
    settings: dict[str, Any]
    batch_size: int
    num_epochs: dict[str, int]
    loss_fn: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    on_gpu: bool = False
    tokens: int = 1
    flops: Callable[[], float] | None = None


def tiny(small: bool) -> Workload:
    return Workload(
        make_mlp,
        lambda: taught_rows(*(64, 32) if small else (16_384, 4_096)),
        torch.optim.SGD,
        {"lr": 0.01},
        batch_size=32,
        num_epochs={"tensors": 4, "dataset": 2, "workers": 2},
    )


def digits(small: bool) -> Workload:
    epochs = {"tensors": 2, "dataset": 2, "workers": 2} if small else {"tensors": 60, "dataset": 60, "workers": 10}
    return Workload(make_mlp, digits_rows, torch.optim.SGD, {"lr": 0.01}, batch_size=32, num_epochs=epochs)


def cnn(small: bool) -> Workload:
    return Workload(
        make_cnn,
        lambda: noisy_rows(*(64, 32) if small else (2_048, 512)),
        torch.optim.AdamW,
        {"lr": 3e-4},
        batch_size=64,
        num_epochs={"tensors": 3, "dataset": 1, "workers": 2},
    )


def transformer(small: bool) -> Workload:
    context = 16 if small else 32
    return Workload(
        lambda: SMALL_GPT() if small else GPT(layers=10, width=256, heads=4, vocabulary=8_192, context=context),
        lambda: token_rows(64, 16, context),
        torch.optim.AdamW,
        {"lr": 3e-4},
        batch_size=8,
        num_epochs={"tensors": 2},
        loss_fn=TokenLoss(),
    )


def gpt2(small: bool) -> Workload:
    context = 16 if small else 1_024

    def make_model() -> GPT:
        return SMALL_GPT() if small else GPT(layers=12, width=768, heads=12, vocabulary=50_304, context=context)

    return Workload(
        make_model,
        lambda: token_rows(*(64, 16) if small else (1_024, 64), context),
        torch.optim.AdamW,
        {"lr": 3e-4, "fused": True},
        batch_size=16,
        num_epochs={"tensors": 2},
        loss_fn=TokenLoss(),
        on_gpu=True,
        tokens=context,
        flops=lambda: gpt_flops(make_model()),
    )


def resnet50(small: bool) -> Workload:
    rows, size = ((16, 8), 32) if small else ((2_560, 256), 224)
    return Workload(
        ResNet50,
        lambda: image_rows(*rows, size),
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9},
        batch_size=8 if small else 128,
        num_epochs={"tensors": 3},
        on_gpu=True,
        flops=lambda: image_flops(ResNet50(), size),
    )


WORKLOADS: dict[str, Callable[[bool], Workload]] = {  # called with true they take a moment and mean nothing
    "tiny": tiny,
    "digits": digits,
    "cnn": cnn,
    "transformer": transformer,
    "gpt2": gpt2,
    "resnet50": resnet50,
}


# --- one training of it -----------------------------------------------------------------------------------------------


@dataclass
class Task:
    """One training from the first weights, as every contender gets it."""

    workload: Workload
    train: Any
    test: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    num_epochs: int
    num_workers: int
    device: torch.device
    bf16: bool
    compiled: bool
    kept: list[Any] = field(default_factory=list)  # a user's loaders live as long as the script, and so do its workers

    @property
    def loss_fn(self) -> nn.Module:
        """The loss, a mean over the samples."""
        return self.workload.loss_fn

    @property
    def batch_size(self) -> int:
        """Samples per update."""
        return self.workload.batch_size

    @property
    def workers(self) -> dict[str, Any]:
        """The arguments of a loader that say who fetches."""
        return {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}

    def loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return the loaders as a user makes them."""
        how = {"batch_size": self.batch_size, "pin_memory": self.device.type == "cuda", **self.workers}
        self.kept = [DataLoader(self.train, shuffle=True, **how), DataLoader(self.test, **how)]
        return self.kept[0], self.kept[1]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return what a hand-written loop wraps its forward in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def compiled_model(self) -> nn.Module:
        """Return the model as a hand-written loop uses it."""
        return torch.compile(self.model) if self.compiled else self.model  # type: ignore[return-value]


@functools.cache
def task_data(name: str, data: str, small: bool) -> tuple[Any, Any]:
    """Return what the loaders read for training and testing; made once in a process."""
    tables = WORKLOADS[name](small).make_tables()
    if data != "dataset":
        return tables
    import datasets

    columns = ({"inputs": table.tensors[0].numpy(), "labels": table.tensors[1].numpy()} for table in tables)
    train, test = (datasets.Dataset.from_dict(one).with_format("torch") for one in columns)
    return train, test


def make_task(name: str, data: str, small: bool, num_epochs: int | None = None) -> Task:
    workload = WORKLOADS[name](small)
    train, test = task_data(name, data, small)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = workload.make_model().to(device)
    on_gpu = workload.on_gpu and device.type == "cuda"
    return Task(
        workload,
        train,
        test,
        model,
        workload.optimizer(model.parameters(), **workload.settings),
        num_epochs or workload.num_epochs.get(data, 1),
        num_workers=2 if data == "workers" else 0,
        device=device,
        bf16=on_gpu,
        compiled=on_gpu and not small,
    )


# --- data -------------------------------------------------------------------------------------------------------------


def split(inputs: Tensor, targets: Tensor, num_train: int) -> Tables:
    return (
        TensorDataset(inputs[:num_train].clone(), targets[:num_train].clone()),
        TensorDataset(inputs[num_train:].clone(), targets[num_train:].clone()),
    )


def taught_rows(num_train: int, num_test: int) -> Tables:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_train + num_test, 64, generator=generator)
    teacher = torch.randn(64, NUM_CLASSES, generator=generator)
    return split(inputs, (inputs @ teacher).argmax(1), num_train)


def digits_rows() -> Tables:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return split(torch.tensor(digits.data / 16).float()[order], torch.tensor(digits.target).long()[order], 1_437)


def noisy_classes(num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the classes of rows, and targets of which a fifth are random."""
    classes, targets = torch.randint(0, NUM_CLASSES, (2, num_rows), generator=generator)
    return classes, torch.where(torch.rand(num_rows, generator=generator) < 0.8, classes, targets)


def noisy_rows(num_train: int, num_test: int) -> Tables:
    """Images of 28 x 28, a row each: one of ten patterns under noise."""
    generator = torch.Generator().manual_seed(0)
    classes, targets = noisy_classes(num_train + num_test, generator)
    patterns = torch.randn(NUM_CLASSES, 28 * 28, generator=generator)
    return split(patterns[classes] + torch.randn(len(classes), 28 * 28, generator=generator), targets, num_train)


def image_rows(num_train: int, num_test: int, size: int) -> Tables:
    """Images of bytes: one of ten coarse patterns under noise."""
    generator = torch.Generator().manual_seed(0)
    classes, targets = noisy_classes(num_train + num_test, generator)
    coarse = torch.randint(0, 128, (NUM_CLASSES, 3, 8, 8), generator=generator, dtype=torch.uint8)
    patterns = coarse.repeat_interleave(size // 8, dim=2).repeat_interleave(size // 8, dim=3)
    images = torch.randint(0, 128, (len(classes), 3, size, size), generator=generator, dtype=torch.uint8)
    return split(images.add_(patterns[classes]), targets, num_train)


def token_rows(num_train: int, num_test: int, context: int) -> Tables:
    """Sequences over 64 tokens: the next one follows from the last, or in a fifth of the places from nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (num_train + num_test, context + 1), generator=generator)
    follows = torch.rand(rows.shape, generator=generator) < 0.8
    for place in range(1, context + 1):
        rows[:, place] = torch.where(follows[:, place], (5 * rows[:, place - 1] + 3) % 64, rows[:, place])
    return split(rows[:, :-1], rows[:, 1:], num_train)


# --- models -----------------------------------------------------------------------------------------------------------


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, NUM_CLASSES))


def make_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, NUM_CLASSES)),
    )


class TokenLoss(nn.Module):
    """Cross entropy over all tokens."""

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the mean for scores of shape `(batch, tokens, vocabulary)`."""
        return functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Attention to what came before, and an MLP, each added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return as many hidden states as are given."""
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.attention_in(self.norm_1(hidden)).chunk(3, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norm_2(hidden))


class GPT(nn.Module):
    """GPT-2 without dropout; the head is the embedding."""

    def __init__(self, *, layers: int, width: int, heads: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.apply(self._start)
        for block in self.blocks:
            for last in (block.attention_out, block.mlp[-1]):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * layers))
        self.head.weight = self.tokens.weight

    @staticmethod
    def _start(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores of the next token, of shape `(batch, tokens, vocabulary)`."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


SMALL_GPT = functools.partial(GPT, layers=2, width=32, heads=2, vocabulary=128, context=16)


class Bottleneck(nn.Module):
    """Three convolutions and a way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        nn.init.zeros_(self.path[-1].weight)  # a block begins as its way around
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels != 4 * width:
            self.around = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return `4 * width` channels."""
        return functional.relu(self.path(images) + self.around(images))


class ResNet50(nn.Module):
    """ResNet-50 in channels_last; takes bytes, so that a batch moves as bytes."""

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [], 64
        for width, number, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(number):
                blocks.append(Bottleneck(channels, width, stride if index == 0 else 1))
                channels = 4 * width
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.MaxPool2d(3, 2, padding=1), *blocks),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1_000)),
        ).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores of 1,000 classes."""
        return self.layers((images.float() / 128 - 1).contiguous(memory_format=torch.channels_last))


# --- floating-point operations ----------------------------------------------------------------------------------------


def gpt_flops(model: GPT) -> float:
    """Return those of forward and backward of a sequence: 6 a parameter and token, and attention (PaLM, appendix B)."""
    parameters = sum(parameter.numel() for parameter in model.parameters()) - model.places.weight.numel()
    context, width = model.places.weight.shape
    return context * (6.0 * parameters + 12.0 * len(model.blocks) * width * context)


def image_flops(model: nn.Module, size: int) -> float:
    """Return those of forward and backward of one image: counted forward, and twice that backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    return 3.0 * counter.get_total_flops()
