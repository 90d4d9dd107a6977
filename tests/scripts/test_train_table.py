"""The example for tables: any file in, a prediction for every row out, and plain words for what is wrong with it."""

import datetime
import functools
import json
import os
import re
import runpy

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from support import ROOT, run_forked, run_here, torchrun

SCRIPT = str(ROOT / "scripts" / "train_table.py")


def run(monkeypatch, capsys, path, *arguments):
    """Run the script in this process; return its exit code and what it printed."""
    options = ["--data", str(path), "--target", "y", "--run_dir", str(path.parent / "run"), "--verbose", "false"]
    return run_here(monkeypatch, capsys, SCRIPT, *options, *arguments)


def predictions(path, name="predictions.csv"):
    return pd.read_csv(path.parent / "run" / name, keep_default_na=False)


@pytest.fixture
def functions():
    return runpy.run_path(SCRIPT)


def numeric_table(num_rows=400, seed=0):
    generator = np.random.default_rng(seed)
    frame = pd.DataFrame(generator.normal(size=(num_rows, 2)), columns=["a", "b"])
    frame["town"] = generator.choice(["north", "south"], num_rows)
    frame["y"] = 5000 + 300 * frame.a - 200 * frame.b + 400 * (frame.town == "north")
    return frame


def test_a_large_csv_with_all_that_tables_have(tmp_path, monkeypatch, capsys):
    num_rows, generator = 50_000, np.random.default_rng(0)
    size, town = generator.normal(100, 20, num_rows), generator.choice(["north", "south", "east, far"], num_rows)
    rare = np.zeros(num_rows, dtype=bool)
    rare[generator.permutation(num_rows)[: num_rows // 200]] = True
    size[rare] += 300
    label = np.where(rare, "rare", np.where(town == "north", "cold", "warm"))
    frame = pd.DataFrame({"size": size, "town": town, "y": label})
    frame["remark"] = [f"row {number} is {value:.3f}" for number, value in enumerate(size)]
    frame["day"] = [str(datetime.date(2020, 1, 1) + datetime.timedelta(days=number)) for number in range(num_rows)]
    frame.loc[frame.index % 100 == 0, "size"] = np.nan
    frame.loc[frame.index % 50 == 1, "town"] = None
    frame.loc[[7, 40_000], "y"] = None
    frame.to_csv(tmp_path / "t.csv", index=False)

    code, printed = run(
        monkeypatch, capsys, tmp_path / "t.csv", "--num_epochs", "2", "--batch_size", "512", "--class_weights"
    )
    assert code == 0, printed
    for line in (
        "remark is left out: free text, 50000 distinct values in 50000 rows",
        "day holds dates: taken as a number of days",
        "Missing values: size 500, town 1000",
        "2 rows without y are predicted, but left out of training",
        "Final evaluation: loss ",
        "Balanced accuracy ",
        "  rare: ",
    ):
        assert line in printed, printed
    told = predictions(tmp_path / "t.csv")
    assert list(told.columns) == ["row", "part", "actual", "prediction", "probability"]
    assert told.part.value_counts().to_dict() == {"train": 31_998, "test": 8_000, "final": 10_000, "": 2}
    assert (told.part == "").to_numpy().nonzero()[0].tolist() == [7, 40_000]
    assert told.actual.tolist() == frame.y.fillna("").tolist()
    assert told.row.tolist() == list(range(1, num_rows + 1)) and told.probability.between(1 / 3, 1).all()
    known = (frame["size"].notna() & frame.town.notna()).to_numpy()
    assert (told.prediction.to_numpy() == label)[known].mean() > 0.99
    assert (told.prediction.to_numpy() == label)[known & rare].mean() > 0.95
    for name in ("config.json", "best/model.safetensors", "predictions.csv"):
        assert (tmp_path / "run" / name).is_file()


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_regression_puts_predictions_back_in_units(tmp_path, monkeypatch, capsys, ending):
    frame, path = numeric_table(), tmp_path / f"t.{ending}"
    frame["truth"] = frame.y
    frame["since"] = pd.Timestamp("2021-05-01") + pd.to_timedelta(np.arange(len(frame)), unit="D")
    frame.loc[3, "y"] = None
    frame.loc[5, "a"] = None
    if ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True, date_format="iso")
    arguments = "--ignore", "truth", "--num_epochs", "40", "--batch_size", "32"
    code, printed = run(monkeypatch, capsys, path, *arguments)
    assert code == 0, printed
    assert "Missing values: a 1\n1 rows without y" in printed and "since holds dates" in printed
    told = predictions(path)
    final = told[told.part == "final"]
    actual = final.actual.astype(float)
    assert actual.tolist() == pytest.approx(frame.truth[final.index].tolist())
    assert told.part[3] == told.actual[3] == ""
    for name, score in (
        ("mean absolute error", mean_absolute_error),
        ("RMSE", root_mean_squared_error),
        ("R2", r2_score),
    ):
        value = float(printed.split(f"{name} ")[1].split()[0].strip(","))
        assert value == pytest.approx(score(actual, final.prediction), rel=1e-4, abs=1e-4)
    error, told = mean_absolute_error(actual, final.prediction), told.prediction
    rest = frame.index != 5
    assert np.corrcoef(told[rest], frame.truth[rest])[0, 1] > 0.99
    assert np.abs(told - frame.truth)[rest].mean() < 60 and error < 60


def test_a_changed_file_is_read_anew(tmp_path, monkeypatch, capsys):
    path = tmp_path / "t.csv"
    for num_rows in (30, 20):
        numeric_table(num_rows).to_csv(path, index=False)
        os.utime(path, (1, 1))
        arguments = "--num_epochs", "1", "--run_dir", str(tmp_path / str(num_rows))
        assert run(monkeypatch, capsys, path, *arguments)[0] == 0
        assert len(pd.read_csv(tmp_path / str(num_rows) / "predictions.csv")) == num_rows


def test_na_is_a_word_among_words_and_missing_among_numbers(tmp_path, monkeypatch, capsys):
    frame = numeric_table(60)
    frame["y"] = np.where(frame.a > 0, "NA", "EU")  # North America
    frame["c"] = frame.b.map("{:.3f}".format)
    frame.loc[:3, "c"] = ["NA", "nan", "None", "-"]
    frame.to_csv(tmp_path / "table.csv", index=False)
    code, printed = run(monkeypatch, capsys, tmp_path / "table.csv", "--num_epochs", "1")
    assert code == 0, printed
    assert "Missing values: c 4" in printed and re.search(r"  NA: [\d.]+ of \d+ rows", printed)


def test_whole_numbers_and_bools_are_classes(tmp_path, monkeypatch, capsys):
    frame = numeric_table(60)
    for name, values in (("int", (frame.a > 0) + 3), ("bool", frame.a > 0), ("text", (frame.a > 0).astype(str))):
        path = tmp_path / ("t.csv" if name == "text" else "t.parquet")
        table = frame.assign(y=values, flag=values)
        table.to_csv(path, index=False) if name == "text" else table.to_parquet(path)
        arguments = "--num_epochs", "1", "--run_dir", str(tmp_path / name)
        code, printed = run(monkeypatch, capsys, path, *arguments)
        assert code == 0 and "accuracy" in printed
        told = pd.read_csv(tmp_path / name / "predictions.csv", dtype=str).prediction
        assert set(told) <= {str(value) for value in values}


def test_columns_of_any_type_are_used_or_left_out(tmp_path, monkeypatch, capsys):
    frame = numeric_table(60)[["a", "y"]]
    frame["born"] = [datetime.date(2000, 1, 1) + datetime.timedelta(days=number) for number in range(60)]
    frame["list"] = [[1, 2]] * 60
    frame["took"] = pd.to_timedelta(np.arange(60), unit="s")
    frame["kind"] = pd.Categorical(["x", "y", None] * 20)
    frame.to_parquet(tmp_path / "t.parquet")
    code, printed = run(monkeypatch, capsys, tmp_path / "t.parquet", "--num_epochs", "1")
    assert code == 0 and "Missing values: kind 20" in printed, printed
    for line in (
        "born holds dates: taken as a number of days",
        "list is left out: its values are of type ndarray",
        "took is left out: its values are of type Timedelta",
    ):
        assert line in printed, printed
    arguments = "--ignore", "kind", "list", "took", "born", "--run_dir", str(tmp_path / "numbers only")
    code, printed = run(monkeypatch, capsys, tmp_path / "t.parquet", "--num_epochs", "1", *arguments)
    assert code == 0 and "Missing values: none" in printed


def test_a_csv_with_an_index_keeps_its_types_to_the_last_row(tmp_path, monkeypatch, capsys):
    frame = numeric_table(12_000)
    frame["code"] = ["7"] * 11_000 + ["A7"] * 500 + ["B"] * 500
    frame["late"] = [1] * 11_000 + [0.5] * 1000
    frame.to_csv(tmp_path / "t.csv", encoding="utf-8-sig")
    arguments = "--num_epochs", "1", "--categories", "code", "--batch_size", "2000"
    code, printed = run(monkeypatch, capsys, tmp_path / "t.csv", *arguments)
    assert code == 0 and "Missing values: none" in printed, printed
    code, printed = run(monkeypatch, capsys, tmp_path / "t.csv")
    assert code == 2 and "column 'code', row 11001: 'A7' is not a number" in printed


def test_two_processes_predict_as_one(tmp_path):
    path = tmp_path / "t.csv"
    numeric_table(203).to_csv(path, index=False)
    printed = []
    for name, start in (("1", functools.partial(run_forked, SCRIPT)), ("2", functools.partial(torchrun, forks=True))):
        arguments = "--data", str(path), "--target", "y", "--num_epochs", "2", "--run_dir", name
        done = start(SCRIPT, *arguments, timeout=90, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[1].count("Missing values") == 1 and printed[1].count("Final evaluation") == 1
    one, two = (pd.read_csv(tmp_path / name / "predictions.csv").prediction for name in "12")
    np.testing.assert_allclose(one, two, rtol=1e-4)


def change(row, name, value):
    frame = numeric_table(40).astype(object)
    frame.loc[row, name] = value
    return frame


LINES = numeric_table(40).to_csv(index=False).splitlines()
WRONG = {
    "too many fields": ([*LINES[:9], LINES[9] + ",1", *LINES[10:]], [], "line 10 has 5 fields, the header has 4"),
    "too few fields": ([*LINES[:9], "1,2", *LINES[10:]], [], "line 10 has 2 fields, the header has 4"),
    "broken after a quote": (
        [*LINES[:4], '1,2,"north\nor south",3', "1"],
        [],
        "line 7 has 1 fields, the header has 4",
    ),
    "text among numbers": (change(16, "a", "wide"), [], "column 'a', row 17: 'wide' is not a number"),
    "text in the target": (change(16, "y", "dear"), [], "column 'y', row 17: 'dear' is not a number"),
    "infinite": (change(4, "b", "-inf"), [], "column 'b', row 5: '-inf' is not a finite number"),
    "no such target": (numeric_table(40), ["--target", "twon"], "there is no column 'twon'; the nearest is 'town'"),
    "one class": (numeric_table(40).assign(y="same"), [], "the target 'y' has one class only, same"),
    "all missing": (numeric_table(40).assign(b=np.nan), [], "column 'b' has no values: leave it out with --ignore b"),
    "text and regression": (numeric_table(40), ["--target", "town", "--task", "regression"], "'town' is text"),
    "too few rows": (numeric_table(2), [], "2 rows with a target are too few"),
    "nothing to predict from": (numeric_table(9), ["--ignore", "a", "b", "town"], "there is no column to predict from"),
    "no data": (["a,y"], [], "t.csv: "),
    "the target left out": (numeric_table(9), ["--ignore", "a", "y"], "--target and --ignore both name 'y'"),
    "no classes": (
        numeric_table(40),
        ["--task", "classification"],
        "the target 'y' has 40 distinct numbers in 40 rows, which are no classes: use --task regression",
    ),
    "no rows in a batch": (numeric_table(9), ["--batch_size", "0"], "--batch_size must be >0, got 0"),
    "a negative rate": (numeric_table(9), ["--learning_rate", "-1"], "--learning_rate must be >0, got -1"),
    "a wrong choice": (numeric_table(9), ["--patience", "0"], "patience must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, capsys, name):
    table, arguments, message = WRONG[name]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(table) + "\n" if isinstance(table, list) else table.to_csv(index=False))
    code, printed = run(monkeypatch, capsys, path, *arguments)
    assert code == 2 and "Traceback" not in printed
    assert message in printed.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text("a,y\n1,2\n")
    (tmp_path / "broken.jsonl").write_text('{"a": 1, "y": 2}\n{"a": 3, "y":\n')
    mixed = [f'{{"a": {value}, "y": {row}}}' for row, value in enumerate(("1", "2", '"x"', "4.5"))]
    (tmp_path / "mixed.jsonl").write_text("\n".join(mixed))
    for name, message in (
        ("t.txt", "t.txt: the ending must be one of .csv, .parquet, .jsonl, .json"),
        ("none.csv", "none.csv: there is no such file"),
        ("broken.jsonl", "broken.jsonl: JSON parse error: Invalid value. in row 1"),
        ("mixed.jsonl", "column 'a', row 3: 'x' is not a number"),
    ):
        code, printed = run(monkeypatch, capsys, tmp_path / name, "--task", "regression")
        last = printed.strip().splitlines()[-1]
        assert code == 2 and "Traceback" not in printed
        assert message in last


def test_means_deviations_and_categories_are_of_the_train_rows(functions):
    size = pd.Series([1.5, 2.5, np.nan, 900.25, np.nan], name="size")
    late = pd.Series([1.5, 2.5, 4.5, 8.5, np.nan], name="late")
    town = pd.Series(["x", "y", "x", "never seen", None], name="town")
    kind = pd.Series([1.0, 2.0, 2.0, 2.0, 7.0], name="kind")
    columns, train = [size, town, late, kind], np.arange(3)
    encodings = [functions["describe"](values, train) for values in columns]
    inputs = functions["encode"](columns, json.loads(json.dumps(encodings, allow_nan=False)))
    of_late = np.array([1.5, 2.5, 4.5])
    expected = [
        (np.array([1.5, 2.5, 2.0, 900.25, 2.0]) - 2.0) / 0.5,
        [0, 0, 1, 0, 1],  # size is missing; late never is in the train rows, so nothing could be learned
        (np.array([1.5, 2.5, 4.5, 8.5, of_late.mean()]) - of_late.mean()) / of_late.std(),
        [1, 2, 1, 0, 0],  # 0 is unseen or missing
        [4, 5, 5, 5, 3],
    ]
    torch.testing.assert_close(inputs, torch.tensor(np.array(expected).T, dtype=torch.float32))


def test_each_class_is_divided_alike_and_by_seed(functions):
    groups = np.repeat([0, 1, 2, -1], [1000, 50, 1, 10])
    parts = list(functions["split_rows"](groups, 3).values())
    assert [[int((groups[part] == group).sum()) for group in range(3)] for part in parts] == [
        [640, 32, 1],
        [160, 8, 0],
        [200, 10, 0],
    ]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1051))
    again, other = (list(functions["split_rows"](groups, seed).values()) for seed in (3, 4))
    assert np.array_equal(parts[0], again[0]) and not np.array_equal(parts[0], other[0])


def predict(monkeypatch, capsys, path, *arguments):
    options = ["--predict", str(path), "--run_dir", str(path.parent / "run"), "--verbose", "false"]
    return run_here(monkeypatch, capsys, SCRIPT, *options, *arguments)


@pytest.mark.parametrize("kind", ["class", "number"])
def test_a_new_table_is_predicted_as_in_training_from_any_format(tmp_path, monkeypatch, capsys, kind):
    frame = numeric_table(120)
    frame["day"] = [str(datetime.date(2020, 1, 1) + datetime.timedelta(days=number)) for number in range(120)]
    frame["rooms"] = np.arange(120) % 5
    frame.loc[frame.index % 10 == 3, "a"] = None
    if kind == "class":
        frame["y"] = np.where(frame.y > 5200, 1, 0)
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert run(monkeypatch, capsys, tmp_path / "t.csv", "--num_epochs", "2")[0] == 0
    trained = predictions(tmp_path / "t.csv").drop(columns=["part", "actual"])

    new = frame.drop(columns="y").assign(day=pd.to_datetime(frame.day))[["rooms", "day", "b", "a", "town"]]
    new[::-1].reset_index(drop=True).to_parquet(tmp_path / "new.parquet")
    code, printed = predict(monkeypatch, capsys, tmp_path / "new.parquet")
    assert code == 0 and "Missing values: a 12\n120 rows are predicted in" in printed, printed
    told = predictions(tmp_path / "t.csv", "predictions_new.csv")
    assert told.row.tolist() == trained.row.tolist()
    pd.testing.assert_frame_equal(told.drop(columns="row")[::-1].reset_index(drop=True), trained.drop(columns="row"))

    new.iloc[:1].assign(town=None, rooms=7, b=None, day="2021-01-01").to_csv(tmp_path / "odd.csv", index=False)
    code, printed = predict(monkeypatch, capsys, tmp_path / "odd.csv", "--output", str(tmp_path / "out.csv"))
    assert code == 0, printed
    assert "Missing values: b 1, town 1\nNo train row lacks b: the mean is taken\n" in printed
    assert "Rows of categories that no train row has: rooms 1 (7)\n1 rows are predicted" in printed
    assert len(pd.read_csv(tmp_path / "out.csv")) == 1


def test_a_table_that_cannot_be_predicted_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    frame = numeric_table(40)
    frame["day"] = pd.Timestamp("2021-05-01") + pd.to_timedelta(np.arange(40), unit="D")
    frame.to_parquet(tmp_path / "t.parquet")
    assert run(monkeypatch, capsys, tmp_path / "t.parquet", "--num_epochs", "1")[0] == 0
    for name, table, message in (
        ("lacks", frame.drop(columns="town"), "no column 'town', which the run was trained with; the nearest is "),
        ("text", frame.astype(object).replace({"a": {frame.a[16]: "wide"}}), "column 'a', row 17: 'wide' is not a nu"),
        ("dates", frame.assign(a=frame.day), "column 'a', row 1: Timestamp('2021-05-01 00:00:00') is not a number"),
        ("no dates", frame.assign(day="soon"), "column 'day', row 1: 'soon' is not a date"),
    ):
        path = tmp_path / f"{name}.{'parquet' if name == 'dates' else 'csv'}"
        table.to_parquet(path) if name == "dates" else table.to_csv(path, index=False)
        code, printed = predict(monkeypatch, capsys, path)
        assert code == 2 and "Traceback" not in printed and message in printed.strip().splitlines()[-1], printed
    code, printed = predict(monkeypatch, capsys, tmp_path / "t.parquet", "--run_dir", str(tmp_path))
    assert code == 2 and f"--run_dir {tmp_path} is no run of this script" in printed
    code, printed = predict(monkeypatch, capsys, tmp_path / "t.parquet", "--output", str(tmp_path / "no/folder/t.csv"))
    assert code == 2 and "no/folder" in printed.splitlines()[-1] and "Traceback" not in printed
    (tmp_path / "run/best/model.safetensors").unlink()
    code, printed = predict(monkeypatch, capsys, tmp_path / "t.parquet")
    assert code == 2 and "No best weights in" in printed.splitlines()[-1]
    code, printed = run_here(monkeypatch, capsys, SCRIPT, "--data", "t.csv")
    assert code == 2 and "give --data and --target to train, or --predict and --run_dir to predict" in printed


def test_a_run_goes_on_with_its_own_table_only(tmp_path, monkeypatch, capsys):
    frame, path = numeric_table(60), tmp_path / "t.csv"
    frame.to_csv(path, index=False)
    assert run(monkeypatch, capsys, path, "--num_epochs", "1")[0] == 0
    code, printed = run(monkeypatch, capsys, path, "--num_epochs", "2")
    assert code == 2 and "holds a run already" in printed.splitlines()[-1] and "Traceback" not in printed
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("best/table.json", "best/model.safetensors")}
    renamed = frame.town.map({"north": "east", "south": "west"})
    for table, arguments, message in (
        (frame.assign(y=frame.y * 7), (), "the mean of the target was "),
        (frame.assign(town=renamed), (), "the categories of column 'town' was ['"),
        (frame.rename(columns={"a": "c"}), (), "column 'a' is missing"),
        (frame[["b", "a", "town", "y"]], (), "its columns have another order"),
        (frame, ("--seed", "5"), "the mean of "),  # other rows train
    ):
        for num_epochs in "12":  # of a run that has ended, and one that goes on
            table.to_csv(path, index=False)
            arguments = *arguments, "--resume", "auto", "--num_epochs", num_epochs
            code, printed = run(monkeypatch, capsys, path, *arguments)
            told = printed.strip().splitlines()[-1]
            assert code == 2 and "Traceback" not in printed
            assert message in told and "--data is not as in the run" in told and len(told) < 600
            assert all((tmp_path / "run" / name).read_bytes() == content for name, content in kept.items())
    frame.to_csv(path, index=False)
    assert run(monkeypatch, capsys, path, "--resume", "auto", "--num_epochs", "2")[0] == 0
    assert (tmp_path / "run/best/table.json").read_bytes() == kept["best/table.json"]
    for checkpoint in (tmp_path / "run/checkpoints").glob("*/model.safetensors"):
        checkpoint.write_bytes(b"damaged")
    code, printed = run(monkeypatch, capsys, path, "--resume", "auto", "--num_epochs", "3")
    told = printed.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in printed and "can be used" in told


def test_a_run_that_fails_at_once_leaves_its_folder_to_the_next(tmp_path, monkeypatch, capsys):
    class Fails(torch.optim.AdamW):
        def step(self, closure=None):
            raise ZeroDivisionError

    numeric_table(30).to_csv(tmp_path / "t.csv", index=False)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch.optim, "AdamW", Fails)
        run(patch, capsys, tmp_path / "t.csv", "--num_epochs", "1")
    assert run(monkeypatch, capsys, tmp_path / "t.csv", "--num_epochs", "1")[0] == 0


def test_the_options_come_from_the_config(tmp_path, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, tmp_path / "t.csv", "--print_config", "--patience", "3")
    assert code == 0 and "patience: 3" in printed and "target: y" in printed
    numeric_table(30).to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "run.yaml").write_text("num_epochs: 1\nignore: [a, b]\ncategories: [town]\n")
    code, printed = run(monkeypatch, capsys, tmp_path / "t.csv", "--config", str(tmp_path / "run.yaml"))
    assert code == 0 and "Best epoch 1 of 1" in printed
