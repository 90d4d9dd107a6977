"""The predict command: a table with the index of each sample."""

import math
import re

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from accel_trainer import Trainer, load_best
from accel_trainer.tools.cli import main
from accel_trainer.tools.predictions import write_predictions
from support import loader_of, make_data, make_model, quiet, torchrun

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

def make_run(config):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(data, 8, shuffle=True),
        "test_loader": {
            "low": DataLoader(Subset(data, range(9)), 4),
            "odd": DataLoader(Subset(data, range(9, 30, 2)), 4),
        },
    }

if __name__ == "__main__":
    import sys
    from accel_trainer.tools.cli import main
    sys.exit(main(sys.argv[1:]))
"""


def read(path):
    kind = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}[path.suffix]
    table = datasets.load_dataset(kind, data_files=str(path), cache_dir=str(path.parent / "cache"), split="train")
    return table.with_format(None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A script with a run function, and a run of it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "mine.py").write_text(SCRIPT)
    main(["train", f"{folder}/mine.py:make_run", "--num_epochs=2", f"--run_dir={folder}/run", "--verbose=false"])
    return folder


def expected_of(run):
    model = load_best(make_model(), run / "run")
    inputs = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(inputs)


@pytest.mark.parametrize("name, output", [("odd", "odd.parquet"), ("low", "deep/low.csv"), ("odd", "odd.jsonl")])
def test_each_row_has_the_index_in_the_whole_data_set(run, name, output, capsys):
    arguments = ["predict", f"{run}/mine.py:make_run", str(run / "run"), "--loader", f"test_loader/{name}"]
    assert main([*arguments, "--output", str(run / output)]) == 0
    table = read(run / output)
    indices = list(range(9)) if name == "low" else list(range(9, 30, 2))
    assert table["index"] == indices and f"{len(indices)} rows of test_loader/{name}" in capsys.readouterr().out
    if output.endswith(".csv"):
        assert table.column_names == ["index", "output_0", "output_1", "output_2"]
        outputs = torch.tensor([table[f"output_{number}"] for number in range(3)]).T
    else:
        outputs = torch.tensor(table["output"])
    torch.testing.assert_close(outputs, expected_of(run)[indices])


@pytest.mark.distributed
def test_two_processes_write_the_same_table(run):
    options = [f"{run}/mine.py:make_run", run / "run", "--loader", "train_loader", "--output", run / "two.parquet"]
    ended = torchrun(run / "mine.py", "predict", *map(str, options), forks=True)
    assert ended.returncode == 0, ended.stderr
    table = read(run / "two.parquet")
    assert table["index"] == list(range(30))
    torch.testing.assert_close(torch.tensor(table["output"]), expected_of(run))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--output", "x.xlsx"], r"--output must end with .parquet, .csv, .jsonl, got 'x.xlsx'"),
        (["--loader", "final_loader"], "returns no 'final_loader', but test_loader/low, test_loader/odd, train_loader"),
        (["--ragged", "pad"], "pad"),
    ],
)
def test_wrong_options(run, options, message, capsys):
    code = None
    try:
        code = main(["predict", f"{run}/mine.py:make_run", str(run / "run"), *options])
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and re.search(message, capsys.readouterr().err)


class Parts(nn.Module):
    def forward(self, inputs):
        return {"sum": inputs.sum(1), "half": inputs.bfloat16(), "pair": (inputs > 0, inputs[:, :0])}


def test_parts_and_several_lengths_are_columns(tmp_path):
    data = make_data(5)
    trainer, loader = Trainer(Parts(), None, nn.MSELoss(), config=quiet()), loader_of(data, 2)
    outputs = trainer.predict(loader)
    assert write_predictions(tmp_path / "parts.parquet", outputs, loader) == 5
    table = read(tmp_path / "parts.parquet")
    assert table.column_names == ["index", "sum", "half", "pair_0", "pair_1"]
    assert (
        torch.tensor(table["sum"]) == pytest.approx(data.tensors[0].sum(1))
        and table["pair_0"][0] == (data.tensors[0][0] > 0).tolist()
    )
    ragged = [torch.arange(float(length)) for length in (3, 1, 2, 3, 1)]
    write_predictions(tmp_path / "ragged.parquet", ragged, loader, "list")
    assert read(tmp_path / "ragged.parquet")["output"] == [one.tolist() for one in ragged]
    same = [torch.ones(2) for _ in range(5)]  # one for each sample, though all have one length
    write_predictions(tmp_path / "same.parquet", same, loader, "list")
    assert read(tmp_path / "same.parquet")["output"] == [[1.0, 1.0]] * 5


class Coinciding(nn.Module):
    def forward(self, inputs):
        return {"index": inputs[:, 0], "logits": inputs[:, :2], "logits_0": inputs[:, 4], "index_": inputs[:, 3]}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_no_column_is_lost_to_another_of_its_name(tmp_path, ending, capfd):
    inputs = make_data(5).tensors[0]
    loader = loader_of(make_data(5), 2)
    outputs = Trainer(Coinciding(), None, nn.MSELoss(), config=quiet()).predict(loader)
    write_predictions(tmp_path / f"all.{ending}", outputs, loader)
    assert capfd.readouterr().err == ""  # no bar of another library
    table = read(tmp_path / f"all.{ending}")
    expected = {"index": range(5), "index_": inputs[:, 0], "index__": inputs[:, 3]}
    if ending == "csv":
        expected |= {"logits_0": inputs[:, 0], "logits_1": inputs[:, 1], "logits_0_": inputs[:, 4]}
    else:
        expected |= {"logits": inputs[:, :2], "logits_0": inputs[:, 4]}
    assert set(table.column_names) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(table[name]), torch.stack([torch.as_tensor(one) for one in values]))


def test_nested_subsets_and_outputs_for_other_samples(tmp_path):
    data = TensorDataset(torch.arange(10.0).reshape(-1, 1))
    inner = Subset(Subset(data, [8, 6, 4, 2]), [3, 0])
    loader = DataLoader(inner, 2)
    outputs = Trainer(nn.Identity(), None, nn.MSELoss(), config=quiet()).predict(loader)
    write_predictions(tmp_path / "inner.csv", outputs, loader)
    table = read(tmp_path / "inner.csv")
    assert table["index"] == [2, 8] and table["output_0"] == [2.0, 8.0]
    with pytest.raises(ValueError, match="The model gave 3 outputs for 2 samples"):
        write_predictions(tmp_path / "wrong.csv", torch.ones(3), loader)
    assert not (tmp_path / "wrong.csv").exists() and not math.isnan(table["output_0"][0])
