"""The runs that `parity` compares when it is given none: small pictures of digits, drawn here, in awkward numbers."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ..config import TrainConfig


def fixed_cut(config: TrainConfig) -> dict[str, Any]:
    """Return a run with BatchNorm and dropout, which look at the micro-batch and at chance."""
    return _run([nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2)])


def free_cut(config: TrainConfig) -> dict[str, Any]:
    """Return the same without such layers."""
    return _run([nn.Conv2d(1, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(), nn.MaxPool2d(2)])


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return for each sample whether the most likely class is the right one."""
    return outputs.argmax(dim=1) == targets


# Five rows of three pixels each: the octal digits of a number, from the top.
_SHAPES = (0o75557, 0o26227, 0o71747, 0o71717, 0o55711, 0o74717, 0o74757, 0o71111, 0o75757, 0o75717)


def draw_digits(num_samples: int) -> TensorDataset:
    """Return pictures of digits, shape (num_samples, 64), from 0 to 1, and the digits, shape (num_samples,).

    Each stands near the middle of 8 x 8 pixels, in noise. They are the same on any machine: Python promises as much of
    its `random`.
    """
    chance = random.Random(0).random
    targets = [int(10 * chance()) for _ in range(num_samples)]
    pictures = torch.tensor([0.3 * chance() for _ in range(num_samples * 64)]).reshape(num_samples, 8, 8)
    pixels = torch.tensor([[shape >> bit & 1 for bit in reversed(range(15))] for shape in _SHAPES]).reshape(10, 5, 3)
    for picture, target in zip(pictures, targets, strict=True):
        top, left = 1 + int(2 * chance()), 2 + int(2 * chance())
        picture[top : top + 5, left : left + 3] += 0.7 * pixels[target]
    return TensorDataset(pictures.flatten(1), torch.tensor(targets))


def _run(layers: list[nn.Module]) -> dict[str, Any]:
    data = draw_digits(1298)
    train, test = TensorDataset(*data[:997]), TensorDataset(*data[997:])
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(12 * 4 * 4, 10))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "loss_fn": nn.CrossEntropyLoss(),
        "metrics": {"accuracy": accuracy},
        "train_loader": DataLoader(train, batch_size=54, shuffle=True),  # 18 batches of 54 and one of 25
        "test_loader": DataLoader(test, batch_size=100),
    }
