"""A thin, exact training loop around Hugging Face Accelerate: the same run on any hardware.

Example:
    >>> import torch
    >>> from accel_trainer import TrainConfig, Trainer
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> inputs = torch.linspace(0, 1, 32).reshape(-1, 1)
    >>> loader = DataLoader(TensorDataset(inputs, 2 * inputs), batch_size=8, shuffle=True)
    >>> model = torch.nn.Linear(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> trainer = Trainer(model, optimizer, torch.nn.MSELoss(), config=TrainConfig(num_epochs=5, verbose=False))
    >>> history = trainer.fit(loader, loader)
    >>> len(history.test_losses)
    5
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import Callback
    from .config import TrainConfig
    from .errors import CheckpointError, HardwareError, NonFiniteError, ProcessFailedError, StopTraining
    from .functions import evaluate_model, train_model
    from .history import History
    from .numbers.forward import Loss
    from .numbers.weight_average import WeightAverage
    from .storage.weights import load_best
    from .tools.launching import launch
    from .trainer import Trainer

__all__ = [
    "Callback",
    "CheckpointError",
    "HardwareError",
    "History",
    "Loss",
    "NonFiniteError",
    "ProcessFailedError",
    "StopTraining",
    "TrainConfig",
    "Trainer",
    "WeightAverage",
    "evaluate_model",
    "launch",
    "load_best",
    "train_model",
]
__version__ = "0.1.0"

# Each name is imported when it is first used (PEP 562): the command line answers --help before torch is loaded.
_HOMES = {
    "Callback": "callbacks",
    "History": "history",
    "Loss": "numbers.forward",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "WeightAverage": "numbers.weight_average",
    "evaluate_model": "functions",
    "launch": "tools.launching",
    "load_best": "storage.weights",
    "train_model": "functions",
}


if not TYPE_CHECKING:  # which would take any name for granted

    def __getattr__(name: str) -> Any:
        if name in __all__:
            value = getattr(importlib.import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
