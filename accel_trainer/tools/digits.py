"""The runs that `parity` compares when it is given none: scikit-learn's handwritten digits, in awkward numbers."""

from __future__ import annotations

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


def _run(layers: list[nn.Module]) -> dict[str, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("The built-in run needs scikit-learn: pip install 'accel_trainer[demo]'.") from None
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(12 * 4 * 4, 10))
    train, test = TensorDataset(inputs[:997], targets[:997]), TensorDataset(inputs[997:1298], targets[997:1298])
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "loss_fn": nn.CrossEntropyLoss(),
        "metrics": {"accuracy": accuracy},
        "train_loader": DataLoader(train, batch_size=54, shuffle=True),  # 18 batches of 54 and one of 25
        "test_loader": DataLoader(test, batch_size=100),
    }
