"""Run functions for the parity command: a sound one, and one with each fault it must name."""

import os
import time
from dataclasses import replace

import numpy
import torch
import torch.distributed
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from accel_trainer import Callback, StopTraining
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


def breaks_on_one_process(config):
    def loss_fn(outputs, targets):
        if rank() == 1:
            raise ZeroDivisionError("shape a|b")
        return nn.functional.cross_entropy(outputs, targets)

    return sound(config, loss_fn=loss_fn)


def breaks_everywhere(config):
    raise FileNotFoundError("dataset not found")


def dies(config):
    def loss_fn(outputs, targets):
        if rank() == 1:
            os._exit(3)
        return nn.functional.cross_entropy(outputs, targets)

    return sound(config, loss_fn=loss_fn)


def hangs(config):
    def loss_fn(outputs, targets):
        if num_processes() > 1:
            time.sleep(1000)
        return nn.functional.cross_entropy(outputs, targets)

    return sound(config, loss_fn=loss_fn)


def with_dropout(config):
    return sound(config, nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 3)))


class FunctionalDropout(nn.Linear):
    def forward(self, inputs):
        return nn.functional.dropout(super().forward(inputs), 0.3, self.training)


def with_functional_dropout(config):
    return sound(config, nn.Sequential(FunctionalDropout(5, 8), nn.Linear(8, 3)))


def local_dataset_with_a_worker(config):
    class Local(OwnGenerator):
        def __getitem__(self, index):
            inputs, target = self.data[index]
            return inputs + torch.rand(1), target

    run = sound(config)
    run["train_loader"] = DataLoader(Local(), batch_size=16, num_workers=1)
    return run


def biased_before_norm(config):
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    run = sound(config, model, data=make_data(320))
    run["optimizer"] = torch.optim.AdamW(model.parameters(), lr=0.01)
    run["train_loader"] = DataLoader(make_data(320), batch_size=32, shuffle=True)
    return run


def down_to_zero(config):
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, inputs @ torch.ones(5, 1))
    model = nn.Linear(5, 1)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5),
        "loss_fn": nn.MSELoss(),
        "train_loader": DataLoader(data, batch_size=16, shuffle=True),
    }


def nan_on_test(config):
    run = sound(config)
    run["loss_fn"] = lambda outputs, targets: (
        nn.functional.cross_entropy(outputs, targets) * (1.0 if torch.is_grad_enabled() else float("nan"))
    )
    return run


def evaluated_by_process(config):
    def loss_fn(outputs, targets):
        scale = 1 if torch.is_grad_enabled() else 1 + rank()
        return nn.functional.cross_entropy(outputs, targets) * scale

    return sound(config, loss_fn=loss_fn)


def metric_of_process(config):
    run = sound(config)
    run["metrics"] = {"odd": lambda outputs, targets: correct(outputs, targets) + float(rank())}
    return run


def begins_by_process(config):
    torch.manual_seed(int(os.environ.get("WORLD_SIZE", "1")))
    return sound(config)


def sparse_by_process(config):
    model = nn.Sequential(nn.EmbeddingBag(7, 4, sparse=True), nn.Linear(4, 3))
    data = TensorDataset(torch.randint(0, 7, (37, 3)), torch.randint(0, 3, (37,)))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": LossOfProcess(),
        "train_loader": DataLoader(data, batch_size=16),
    }


class Slightly(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) * (1 + 1e-3 * rank())


def slightly_by_process(config):
    return sound(config, nn.Sequential(Slightly(5, 8), nn.Linear(8, 3)))


def parts_at_the_end(config):
    """A callback changes the weights after the last check."""

    class Last(Callback):
        def on_fit_end(self, trainer):
            with torch.no_grad():
                trainer.model[0].weight += rank()

    run = sound(config)
    run["callbacks"] = [Last()]
    return run


class CountsWhole(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        if self.training:
            self.seen += (inputs > 0).sum()
        return inputs * (1 + 1e-3 * self.seen)


def counts_whole(config):
    return sound(config, nn.Sequential(nn.Linear(5, 8), CountsWhole(), nn.Linear(8, 3)))


def own_config(config):
    run = sound(config)
    run["config"] = replace(config, max_grad_norm=0.1, bitwise=False, num_micro_batches=1)
    return run


def stops_at_once(config):
    class Stop(Callback):
        def on_step_end(self, trainer):
            raise StopTraining("enough")

    run = sound(config)
    run["callbacks"] = [Stop()]
    return run


def talkative(config):
    print("this goes to stderr")
    return sound(config)


def misspelt(config):
    run = sound(config)
    run["train_loadr"] = run.pop("train_loader")
    return run


def returns_a_list(config):
    return []


def over_pairs(config):
    """The loss compares each sample with all others of its micro-batch."""

    def loss_fn(outputs, targets):
        similar = torch.nn.functional.normalize(outputs) @ torch.nn.functional.normalize(outputs).T
        return torch.nn.functional.cross_entropy(5 * similar, torch.arange(len(outputs)))

    return sound(config, loss_fn=loss_fn)


class Steep(nn.Module):
    """Multiplies what differs in its inputs, as kinks do, and equal inputs by nothing."""

    def forward(self, inputs):
        return inputs + 0.1 * torch.sin(1e5 * inputs.detach())


def multiplies_rounding(config):
    model = nn.Sequential(nn.Linear(5, 8), Steep(), nn.Tanh(), nn.Linear(8, 3))
    return sound(config, model, data=make_data(160))


def multiplies_rounding_and_errs(config):
    """The same, and from the fourth step on a gradient depends on the process."""
    run = multiplies_rounding(config)
    weight, steps = run["model"][3].weight, []
    run["optimizer"].register_step_post_hook(lambda *_: steps.append(None))
    weight.register_hook(lambda gradient: gradient * (1 + 1e-3 * (len(steps) >= 3) * (num_processes() - 1)))
    return run
