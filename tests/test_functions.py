"""The two functions of the tutorials, word for word, under every launcher."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

from accel_trainer import evaluate_model, train_model
from support import launch, loader_of, make_data, make_model, on_processes, quiet
from test_layouts import plain_loop

TUTORIAL = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from accel_trainer import evaluate_model, train_model

torch.manual_seed(0)
inputs = torch.randn(101, 4)
targets = (inputs.sum(1) > 0).long()
train_loader = DataLoader(TensorDataset(inputs[:70], targets[:70]), batch_size=8, shuffle=True)
test_loader = DataLoader(TensorDataset(inputs[70:], targets[70:]), batch_size=8)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
num_epochs = 3
train_losses, test_losses = [], []

for epoch in range(num_epochs):
    train_loss = train_model(train_loader, model, loss_fn, optimizer)
    test_loss = evaluate_model(test_loader, model, loss_fn)
    train_losses.append(train_loss)
    test_losses.append(test_loss)
    print(f"Epoch {epoch + 1}/{num_epochs} - Train Loss: {train_loss:.4f}, Test Loss: {test_loss:.4f}")
"""

THREADS = """
import atexit, os
@atexit.register  # what is registered first runs last
def show_threads_of_groups():
    tasks = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    os.write(1, f"threads {[task for task in tasks if 'gloo' in task]}\\n".encode())
"""

CURE = """
from accelerate import PartialState
PartialState().print("printed once")
"""


def test_the_tutorial_loop_runs_word_for_word_and_gives_the_same_numbers_everywhere():
    alone = launch(TUTORIAL, launcher="python")
    assert alone.returncode == 0, alone.stderr
    lines = [line for line in alone.stdout.splitlines() if line.startswith("Epoch")]
    assert len(lines) == 3
    for launcher, num_processes in (("torchrun", 2), ("accelerate", 2)):
        done = launch(THREADS + TUTORIAL + CURE, num_processes, launcher)
        assert done.returncode == 0, done.stderr
        printed = re.findall(r"Epoch \d/3 - Train Loss: \d\.\d{4}, Test Loss: \d\.\d{4}", done.stdout)
        assert sorted(printed) == sorted(lines * num_processes)  # the user's own print prints everywhere ...
        assert done.stdout.count("printed once") == 1  # ... but for the cure that the README shows
        assert re.findall("threads (.*)", done.stdout) == ["[]"] * num_processes  # which could end it with an abort


def test_one_process_is_a_plain_loop_bit_for_bit():
    ours, theirs = make_model(), make_model()
    loader, loss_fn = loader_of(make_data(37), 7), nn.MultiMarginLoss()
    expected = plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), loss_fn, loader, 3)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    assert [train_model(loader, ours, loss_fn, optimizer) for _ in range(3)] == expected
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


def tutorial():
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    model = make_model(torch.float64)
    if rank:
        nn.init.normal_(model[0].weight)  # the main process's weights count
    loader, other = loader_of(make_data(37, torch.float64), 7), loader_of(make_data(20, torch.float64), 6)
    test_loader, loss_fn = loader_of(make_data(11, torch.float64), 4), nn.CrossEntropyLoss()
    losses = [evaluate_model(test_loader, model, loss_fn)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses += [train_model(loader, model, loss_fn, optimizer) for _ in range(2)]
    losses += [train_model(other, model, loss_fn, optimizer), evaluate_model(test_loader, model, loss_fn)]
    losses += [evaluate_model(test_loader, model, nn.MultiMarginLoss())]
    losses += [train_model(loader, model, nn.MultiMarginLoss(), torch.optim.Adam(model.parameters(), lr=0.01))]
    return losses


@pytest.mark.distributed
def test_any_number_of_calls_with_other_loaders_losses_and_optimizers():
    one = tutorial()
    for num_processes in (2, 3):
        for losses in on_processes(num_processes, tutorial):
            assert losses == pytest.approx(one, rel=1e-10)


def test_each_loader_counts_its_own_epochs():
    orders = []

    def loss_fn(outputs, targets):
        orders[-1].extend(outputs[:, 0].tolist())
        return outputs.mean()

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first, second = (
        loader_of(torch.utils.data.TensorDataset(torch.arange(9.0).reshape(9, 1), torch.zeros(9)), 4) for _ in "ab"
    )
    for loader in (first, first, second, first, second):
        orders.append([])
        train_model(loader, model, loss_fn, optimizer)
    assert orders[0] != orders[1] and orders[0] == orders[2] and orders[1] == orders[4] != orders[3]


def test_modes_and_frozen_modules_are_kept():
    model = make_model(kind="batchnorm")
    model[1].eval()
    modes = [module.training for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_model(loader_of(make_data(16), 8), model, nn.CrossEntropyLoss(), optimizer)
    evaluate_model(loader_of(make_data(16), 8), model, nn.CrossEntropyLoss())
    assert [module.training for module in model.modules()] == modes
    assert model[1].num_batches_tracked == 0


def test_what_is_kept_lives_as_long_as_the_model_and_does_not_travel():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_model(loader_of(make_data(8)), model, nn.CrossEntropyLoss(), optimizer)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        loss = evaluate_model(loader_of(make_data(8)), copied, nn.CrossEntropyLoss())
        assert loss == evaluate_model(loader_of(make_data(8)), model, nn.CrossEntropyLoss())
    assert "forward" not in model.__dict__
    alive = weakref.ref(model)
    del model, optimizer, copied
    gc.collect()
    assert alive() is None


def test_bad_arguments_are_named():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = loader_of(make_data(8))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got DataLoader"):
        train_model(model, loader, nn.CrossEntropyLoss(), optimizer)
    with pytest.raises(TypeError, match="train_loader must be a torch.utils.data.DataLoader, got TensorDataset"):
        train_model(make_data(8), model, nn.CrossEntropyLoss(), optimizer)
    with pytest.raises(ValueError, match="not the model's"):
        train_model(loader, model, nn.CrossEntropyLoss(), torch.optim.SGD(make_model().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="reduction='sum'"):
        train_model(loader, model, nn.CrossEntropyLoss(reduction="sum"), optimizer)
    assert quiet().seed == 0
