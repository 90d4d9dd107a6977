"""Rows of numbers are fetched many at a time, kept as tensors where they fit, and equal what one by one would give."""

import multiprocessing
import warnings

import datasets
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import accel_trainer.data.micro_batches as micro_batches
import accel_trainer.devices.memory as memory
from accel_trainer import Callback, Trainer, evaluate_model, train_model
from accel_trainer.data.cut import Layout
from accel_trainer.data.micro_batches import MicroBatchLoader
from accel_trainer.data.sources import MemorySource, SubsetSource, TableSource, divide, tensor_source_of
from accel_trainer.devices.hardware import Hardware
from accel_trainer.devices.memory import keep_data
from accel_trainer.devices.prepared import Placement
from accel_trainer.numbers.objective import Objective
from support import loader_of, make_data, make_model, on_processes, quiet, summary

ALONE = Layout(0, 1, 1)


def all_kinds(num_rows=23):
    rng = numpy.random.default_rng(0)
    return {
        "half": rng.random(num_rows).astype("float16"),
        "single": rng.random((num_rows, 6)).astype("float32"),
        "double": rng.random(num_rows),
        "small": rng.integers(0, 255, num_rows).astype("uint8"),
        "whole": rng.integers(-9, 9, (num_rows, 2, 3)),
        "flag": rng.random(num_rows) > 0.5,
    }


def numeric_tables():
    whole = datasets.Dataset.from_dict(all_kinds())
    image = datasets.Features({"image": datasets.Array2D((3, 4), "float32"), "label": datasets.ClassLabel(2)})
    typed = {"image": numpy.random.default_rng(1).random((23, 3, 4)), "label": [0, 1] * 11 + [0]}
    fixed = datasets.Features({"x": datasets.Sequence(datasets.Value("float32"), length=2)})
    return {
        "all kinds": whole,
        "chosen and mixed rows": whole.shuffle(seed=1).select(range(3, 17)),
        "a slice": whole.select(range(5, 20)),
        "in many pieces": datasets.concatenate_datasets([whole, whole.select(range(7)), whole]),
        "library's own types": datasets.Dataset.from_dict(typed, features=image),
        "lists of fixed length": datasets.Dataset.from_dict({"x": [[1, 2], [3, 4], [5, 6]]}, features=fixed),
    }


def equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("name", numeric_tables())
def test_a_numeric_table_is_read_from_arrow_and_equals_what_the_library_formats(name, kind):
    table = numeric_tables()[name].with_format(kind)
    rows = tensor_source_of(table)
    assert type(rows) is TableSource and rows.sample_nbytes is not None
    indices = [len(table) - 1, 0, 1, 1, len(table) // 2]
    expected = next(iter(DataLoader(table, batch_sampler=[indices])))
    equal(rows(torch.tensor(indices)), expected)
    kept = rows.loaded()
    assert kept.in_memory and kept.nbytes == rows.nbytes == rows.sample_nbytes * len(table)
    equal(kept(torch.tensor(indices)), expected)


def test_a_table_in_one_piece_is_not_copied():
    table = datasets.Dataset.from_dict(all_kinds()).with_format("torch")
    loaded = dict(zip(table.column_names, tensor_source_of(table).loaded()._tensors, strict=True))
    address = table.data["single"].chunk(0).flatten().buffers()[1].address
    assert loaded["single"].data_ptr() == address


def odd_tables():
    return {
        "text": {"x": [1.0, 2.0, 3.0], "y": ["a", "b", "c"]},
        "ragged in the middle": {"x": [[1.0, 2.0], [1.0], [1.0, 2.0], [4.0, 4.0], [1.0, 2.0]]},
        "ragged of the same sum": {"x": [[1.0, 2.0], [1.0, 2.0, 3.0], [4.0, 4.0], [1.0], [1.0, 2.0]]},
        "a missing number": {"x": [1.0, None, 2.0, 3.0, 4.0]},
        "a missing list": {"x": [[1.0], None, [2.0], [2.0], [2.0]]},
        "nested ragged": {"x": [[[1, 2], [3]], [[1, 2], [3]], [[1, 2], [3]]]},
        "dictionaries": {"x": [{"a": 1}, {"a": 2}]},
        "empty": {"x": []},
    }


@pytest.mark.parametrize("name", odd_tables())
def test_any_other_table_is_left_to_the_library(name):
    rows = tensor_source_of(datasets.Dataset.from_dict(odd_tables()[name]).with_format("torch"))
    assert type(rows) is TableSource and rows.sample_nbytes is None


def test_what_is_not_in_torch_or_numpy_format_or_has_a_transform_is_not_rows():
    table = datasets.Dataset.from_dict({"x": [1.0, 2.0]})
    doubled = table.with_transform(lambda columns: {"x": [2 * x for x in columns["x"]]})
    for dataset in (table, doubled, table.with_format("torch", dtype=torch.float64), table.with_format("pandas")):
        assert tensor_source_of(dataset) is None
    batch = next(MicroBatchLoader(DataLoader(doubled, 2), ALONE, 0).micro_batches(1)).data
    assert batch["x"].tolist() == [2, 4]


# --- several at once --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(1, 300), st.booleans())
def test_what_is_fetched_in_one_go_is_what_one_by_one_would_be(length, size, together, cut, limit, by_columns):
    rows = TensorDataset(torch.randn(length, 3), torch.arange(length))
    data = rows
    if by_columns:
        columns = {"x": rows.tensors[0].numpy(), "i": rows.tensors[1].numpy()}
        data = datasets.Dataset.from_dict(columns).with_format("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batches, "_TOGETHER", together)
        patch.setattr(micro_batches, "_TOGETHER_BYTES", limit)
        feed = MicroBatchLoader(DataLoader(data, size, shuffle=True), Layout(0, 1, cut), seed=3)
        seen = [micro_batch.data for micro_batch in feed.micro_batches(2)]
    patch = pytest.MonkeyPatch()
    patch.setattr(micro_batches, "_TOGETHER", 1)
    alone = [
        micro_batch.data for micro_batch in MicroBatchLoader(feed.data_loader, feed.layout, seed=3).micro_batches(2)
    ]
    patch.undo()
    assert len(seen) == len(alone)
    for one, other in zip(seen, alone, strict=True):
        one, other = (list(batch.values()) if by_columns else batch for batch in (one, other))
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in one)


def test_parts_do_not_know_of_each_other():
    whole = torch.arange(64.0).reshape(32, 2)
    one, other = (part[0] for part in divide([whole], [16, 16]))
    weight = torch.ones((), requires_grad=True)
    one.mul_(2)
    one += weight
    assert one.requires_grad and not other.requires_grad and not whole.requires_grad
    assert other.tolist() == torch.arange(32.0, 64).reshape(16, 2).tolist() and other._version == 0


def test_a_model_that_writes_into_its_inputs_harms_nobody():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, inputs):
            inputs.mul_(0.5)
            inputs += self.linear.bias.sum()
            return self.linear(inputs)

    def run(model, data):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(model, optimizer, nn.CrossEntropyLoss(), config=quiet(num_epochs=3)).fit(loader_of(data, 7))
        return model.linear.weight.detach()

    data, before = make_data(37), make_data(37).tensors[0].clone()
    torch.manual_seed(0)
    first = run(Writes(), data)
    torch.manual_seed(0)
    one_by_one = [data[index] for index in range(len(data))]  # a list: nothing is fetched together
    assert torch.equal(data.tensors[0], before)
    assert torch.equal(first, run(Writes(), one_by_one))


def trained_weights(data, batch_size, model=None, callbacks=(), loss_fn=None, **choices):
    torch.manual_seed(0)
    model = model or nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = quiet(num_epochs=1, **choices)
    trainer = Trainer(model, optimizer, loss_fn or nn.CrossEntropyLoss(), callbacks=callbacks, config=config)
    history = trainer.fit(loader_of(data, batch_size, shuffle=False))
    return history.train_losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("num_rows, batch_size", [(1, 1), (33, 1), (65, 1), (17, 16)])
def test_what_is_read_from_a_table_may_be_written_to(num_rows, batch_size, tmp_path):
    """A group of one row is a slice in Arrow: its memory is the table's, or a file's, where writing is a crash."""
    columns = {"x": numpy.ones((num_rows, 16), dtype="float32"), "y": numpy.zeros(num_rows, dtype="int64")}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path)
    for table in (datasets.Dataset.from_dict(columns), datasets.load_from_disk(str(tmp_path))):
        table = table.with_format("torch")
        for micro_batch in MicroBatchLoader(DataLoader(table, batch_size), ALONE, 0).micro_batches(1):
            for tensor in micro_batch.data.values():
                tensor.mul_(2).add_(1)
        assert table[:]["x"].eq(1).all() and table[:]["y"].eq(0).all()


@pytest.mark.parametrize("batch_size", [7, 16])
def test_gradients_flow_into_tensors_of_a_dataset_that_require_them(batch_size):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes, self.layer = nn.Parameter(torch.ones(48, 5)), nn.Linear(5, 3)

        def forward(self, codes):
            return self.layer(codes)

    torch.manual_seed(0)
    model = Decoder()
    data = TensorDataset(model.codes, torch.zeros(48, dtype=torch.int64))
    Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), nn.CrossEntropyLoss(), config=quiet()).fit(
        DataLoader(data, batch_size)
    )
    assert (model.codes.detach() - 1).abs().amin(dim=0).gt(1e-4).all()


def test_what_a_callback_writes_into_the_data_is_seen_by_the_next_batch():
    class Relabel(Callback):
        def __init__(self, targets):
            self.targets = targets

        def on_step_end(self, trainer):
            self.targets.copy_((self.targets + 1) % 3)

    def run(one_by_one):
        data = make_data(40)
        inputs, targets = data.tensors[0], data.tensors[1].clone()
        data = TensorDataset(inputs, targets)
        if one_by_one:
            data.__class__ = type("Mine", (TensorDataset,), {})  # nothing is known of it
        return trained_weights(data, 8, callbacks=[Relabel(targets)])

    (losses, weights), (expected, expected_weights) = run(False), run(True)
    assert losses == expected and all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def test_targets_that_come_to_be_left_out_within_an_epoch_are_an_error():
    class Hide(Callback):
        def on_step_end(self, trainer):
            data.tensors[1][20:] = -100

    data = TensorDataset(*(tensor.clone() for tensor in make_data(40).tensors))
    with pytest.raises(
        RuntimeError, match="Targets that the loss leaves out .* have come into train_loader within an epoch"
    ):
        trained_weights(data, 8, callbacks=[Hide()], num_micro_batches=4)


def test_a_copy_elsewhere_is_looked_at_as_it_is_now():
    """What a device holds follows the host, before it is asked whether targets are left out."""
    data = TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    whole = tensor_source_of(data)
    objective = Objective(nn.CrossEntropyLoss())
    copies = [MemorySource([tensor.clone() for tensor in data.tensors], source=whole)]
    copied = MemorySource([tensor.clone() for tensor in data.tensors], source=whole)
    copies.append(SubsetSource(torch.tensor([1, 2]), copied, Subset(data, [1, 2])))
    assert all(map(objective.weighs_evenly, copies))
    data.tensors[1][2] = -100
    assert not any(map(objective.weighs_evenly, copies))


def test_a_format_that_a_table_gets_within_an_epoch_is_followed_from_the_next_pass_on():
    table = datasets.Dataset.from_dict({"inputs": [[1.0]] * 4, "labels": [[1.0]] * 4}).with_format("torch")
    asked = []

    def noting(columns):
        asked.append(len(columns["inputs"]))
        return {name: torch.ones(len(column), 1) for name, column in columns.items()}

    class Change(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == 2:
                table.set_transform(noting)

    model = nn.Linear(1, 1)
    config = quiet(num_epochs=1, steps_per_epoch=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Trainer(model, optimizer, nn.MSELoss(), callbacks=[Change()], config=config).fit(DataLoader(table, 2))
    assert sum(asked) == 8  # samples, of four batches


def test_a_format_that_a_table_gets_later_is_followed():
    table = datasets.Dataset.from_dict({"inputs": [[1.0]] * 4, "labels": [[1.0]] * 4}).with_format("torch")
    model, loader = nn.Linear(1, 1), DataLoader(table, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = train_model(loader, model, nn.MSELoss(), optimizer)

    def seven(columns):
        return {"inputs": torch.ones(len(columns["inputs"]), 1), "labels": torch.full((len(columns["labels"]), 1), 7.0)}

    table.set_transform(seven)
    assert train_model(loader, model, nn.MSELoss(), optimizer) > before + 5


@pytest.mark.parametrize("indices", [numpy.array([True, False, True]), numpy.array([0.0, 1.0]), [[0, 1]], "01"])
def test_indices_that_are_no_places_are_left_to_the_dataset(indices):
    assert tensor_source_of(Subset(TensorDataset(torch.arange(3)), indices)) is None


@pytest.mark.parametrize("tensor", [torch.zeros(3, dtype=torch.uint16), torch.eye(3).to_sparse()])
def test_tensors_whose_rows_cannot_be_selected_are_left_to_the_dataset(tensor):
    assert tensor_source_of(TensorDataset(tensor)) is None


# --- kept in memory ---------------------------------------------------------------------------------------------------


def table_of(data):
    return datasets.Dataset.from_dict({"x": data.tensors[0].numpy(), "y": data.tensors[1].numpy()})


def in_pairs(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def train_on_table(choice, num_micro_batches=None):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = quiet(data_in_memory=choice, restore_best=False, num_micro_batches=num_micro_batches)
    trainer = Trainer(model, optimizer, None, compute_loss=in_pairs, config=config)
    table = table_of(make_data(37)).with_format("torch")
    test = Subset(table_of(make_data(29)).with_format("numpy"), range(3, 29))
    return summary(trainer.fit(loader_of(table, 7), loader_of(test, 8)), model)


def test_a_run_is_the_same_whether_its_data_is_kept_in_memory_or_not():
    one, other = train_on_table(True), train_on_table(False)
    assert one.pop("weights").keys() == other.pop("weights").keys() and one == other


@pytest.mark.distributed
def test_it_is_the_same_on_two_processes():
    (one, _), (other, _) = (on_processes(2, train_on_table, choice, 4) for choice in ("auto", False))
    assert one["train_losses"] == other["train_losses"] and one["test_losses"] == other["test_losses"]


def kept(data, choice="auto", **kwargs):
    feed = MicroBatchLoader(DataLoader(data, 2, **kwargs), ALONE, 0)
    return keep_data(feed, Hardware(), choice, "train_loader"), feed


def test_a_table_that_fits_is_kept_and_that_is_said(monkeypatch):
    table = table_of(make_data(1000)).with_format("torch")
    told, feed = kept(table, num_workers=2)
    assert told == (
        "train_loader: 1,000 samples are kept as tensors in host memory (0.0 MiB; data_in_memory=False would leave "
        "them where they are)."
    )
    assert feed.source.in_memory and feed._workers is None  # no worker is asked for what lies here
    assert kept(table, False)[0] is None and not kept(table, False)[1].source.in_memory
    monkeypatch.setattr(memory, "free_memory", lambda: 60_000.0)  # the table takes 28,000 bytes
    assert kept(table)[0] is None and kept(table, True)[1].source.in_memory
    monkeypatch.setattr(memory, "free_memory", lambda: 80_000.0)
    assert kept(table)[0] is not None


def some_room(rank_with_room):
    feed = MicroBatchLoader(DataLoader(table_of(make_data(100)).with_format("torch"), 2), ALONE, 0)
    hardware = Hardware()
    memory.free_memory = lambda: 1e12 if hardware.process == rank_with_room else 1.0
    return keep_data(feed, hardware, "auto", "x"), feed.source.in_memory


@pytest.mark.distributed
def test_all_processes_decide_alike():
    assert on_processes(2, some_room, 0) == [(None, False)] * 2


@pytest.mark.parametrize("data", [[1, 2, 3], datasets.Dataset.from_dict({"x": ["a", "b"]}).with_format("torch")])
def test_insisting_on_what_is_not_numbers_is_an_error(data):
    with pytest.raises(ValueError, match="data_in_memory=True needs data that is rows of numbers of one shape"):
        kept(data, True)
    assert kept(data)[0] is None


def test_fit_tells_it_and_the_tutorial_functions_tell_it_once(capsys):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    table = table_of(make_data(20)).rename_columns({"x": "inputs", "y": "labels"}).with_format("torch")
    loader = loader_of(table, 5)
    Trainer(model, optimizer, loss_fn, config=quiet(verbose=True)).fit(loader)
    assert "train_loader: 20 samples are kept as tensors in host memory" in capsys.readouterr().out
    losses = [train_model(loader, model, loss_fn, optimizer) for _ in range(3)]
    assert evaluate_model(loader, model, loss_fn) < losses[0]
    assert capsys.readouterr().out.count("kept as tensors") == 1


def test_tensors_that_the_user_changes_between_epochs_are_seen():
    data = TensorDataset(torch.zeros(8, 1), torch.zeros(8, 1))
    loader, model = DataLoader(data, 4), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = train_model(loader, model, nn.MSELoss(), optimizer)
    data.tensors[1].add_(5)
    assert train_model(loader, model, nn.MSELoss(), optimizer) > before + 5


def test_a_table_on_the_disk_gives_no_warning(tmp_path):
    table_of(make_data(30)).save_to_disk(tmp_path)
    table = datasets.load_from_disk(str(tmp_path)).with_format("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, feed = kept(table)
        batch = next(feed.micro_batches(1)).data
    batch["x"].add_(1)  # a copy: the file stays as it is
    equal(next(feed.micro_batches(1)).data, table[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["auto", False])
def test_data_on_the_gpu_gives_the_same_run_as_data_on_the_host(choice):
    first, second = (train_on_table(one) for one in (choice, False))
    assert first["train_losses"] == second["train_losses"] and first["test_losses"] == second["test_losses"]
    feed = MicroBatchLoader(DataLoader(make_data(40), 4, shuffle=True), ALONE, 0, pin_memory=True)
    hardware = Hardware()
    told = keep_data(feed, hardware, choice, "train_loader")
    assert (told is not None) == (choice == "auto" and hardware.device.type == "cuda")
    place = Placement(hardware.device)
    on_device = [place(micro_batch.data)[1].cpu() for micro_batch in feed.micro_batches(1)]
    plain = [micro_batch.data[1] for micro_batch in MicroBatchLoader(feed.data_loader, ALONE, 0).micro_batches(1)]
    assert torch.equal(torch.cat(on_device), torch.cat(plain))


class BreaksOnce(torch.utils.data.IterableDataset):
    """A stream that fails in its first pass, as the file beside it says."""

    def __init__(self, path, error):
        self.path, self.error = path, error

    def __iter__(self):
        for number in range(24):
            if number == 9 and not self.path.exists():
                self.path.touch()
                raise self.error("no such line")
            yield torch.ones(5), torch.tensor(number % 3)


@pytest.mark.parametrize("error", [RuntimeError, KeyError])
@pytest.mark.parametrize("persistent", [False, True])
def test_an_error_of_the_data_is_not_hidden_by_the_end_of_the_workers_who_can_be_started_again(
    tmp_path, error, persistent
):
    before = set(multiprocessing.active_children())  # persistent ones of another test
    loader = DataLoader(BreaksOnce(tmp_path / "seen", error), 8, num_workers=1, persistent_workers=persistent)
    model = make_model()
    config = quiet(num_epochs=1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), config=config)
    with pytest.raises(error, match="no such line") as raised:
        trainer.fit(loader)
    assert raised.value.__context__ is None and set(multiprocessing.active_children()) <= before
    assert len(trainer.fit(loader).train_losses) == 1
