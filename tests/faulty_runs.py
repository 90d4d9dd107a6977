"""Run functions for the parity command: a sound one, and one with each fault it must name."""

import numpy
import torch
import torch.distributed
from torch import nn
from torch.utils.data import DataLoader, Dataset

from support import correct, make_data


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def num_processes():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def sound(config, model=None, data=None, loss_fn=None):
    model = model or nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss_fn": loss_fn or nn.CrossEntropyLoss(),
        "metrics": {"accuracy": correct},
        "train_loader": DataLoader(data or make_data(37), batch_size=16, shuffle=True),
        "test_loader": DataLoader(make_data(29), batch_size=8),
    }


class LossOfProcess(nn.CrossEntropyLoss):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets) * (1 + 0.1 * rank())


def loss_of_process(config):
    return sound(config, loss_fn=LossOfProcess())


class OwnGenerator(Dataset):
    def __init__(self):
        self.data, self.generator = make_data(37), numpy.random.default_rng(0)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, target = self.data[index]
        return inputs + self.generator.normal().__float__(), target


def own_generator(config):
    return sound(config, data=OwnGenerator())


class HiddenState(nn.Module):
    """Subtracts a running mean that it keeps beside its buffers."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, inputs):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(dim=0)
        return inputs - self.mean


def hidden_state(config):
    return sound(config, nn.Sequential(nn.Linear(5, 8), nn.Tanh(), HiddenState(), nn.Linear(8, 3)))


def averaged_per_process(config):
    run = sound(config)

    def average(*_):
        for parameter in run["model"].parameters():
            parameter.grad /= num_processes()

    run["optimizer"].register_step_pre_hook(average)
    return run


def of_two_buffers(config):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, inputs):
            return inputs

    run = sound(config, nn.Sequential(nn.Linear(5, 8), Counting(), nn.Linear(8, 3)))

    def count(*_):
        run["model"][1].seen += rank() + num_processes()

    run["optimizer"].register_step_pre_hook(count)
    return run


def breaks(config):
    run = sound(config)
    if num_processes() > 1 or True:
        run["loss_fn"] = lambda outputs, targets: 1 / (rank() - 1) + nn.functional.cross_entropy(outputs, targets)
    return run


def with_dropout(config):
    return sound(config, nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 3)))


def misspelt(config):
    run = sound(config)
    run["train_loadr"] = run.pop("train_loader")
    return run


def returns_a_list(config):
    return []
