"""Train a small network on a table (CSV, Parquet or JSON lines) to predict one of its columns.

accelerate launch scripts/train_table.py --data houses.csv --target price --num_epochs 30
accelerate launch scripts/train_table.py --data patients.parquet --target ill --class_weights --ignore name id
accelerate launch scripts/train_table.py --predict new.csv --run_dir runs/table
"""

import csv
import difflib
import json
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Features, Value, disable_progress_bars, load_dataset
from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import Callback, TrainConfig, Trainer, load_best
from accel_trainer.tools.options import OptionParser, refusals_in_one_line

FORMATS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
NO_NUMBER = {"na", "n/a", "nan", "null", "none", "-", "?"}  # missing, in a column of numbers
NUMBERS = ("integer", "floating", "mixed-integer-float", "decimal")
MAX_WHOLE = 20  # whole numbers with at most as many distinct values are categories
ENCODING = "best/table.json"  # in the run folder: how columns become numbers, for --predict


def read_header(path: Path) -> list[str]:
    """Return the names of a CSV file's columns, or raise a ValueError that names the first broken line."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        names = [name or f"Unnamed: {number}" for number, name in enumerate(next(reader, []))]
        if len(set(names)) < len(names):
            raise ValueError(f"two columns of the header have the name {max(names, key=names.count)!r}")
        line = 2
        for row in reader:
            if row and len(row) != len(names):
                raise ValueError(f"line {line} has {len(row)} fields, the header has {len(names)}")
            line = reader.line_num + 1
    return names


def read_table(path: Path) -> pd.DataFrame:
    """Return the file as it is now, CSV as text; whatever is wrong with it is a ValueError of one line."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the ending must be one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    kind, options = FORMATS[path.suffix.lower()], {}
    try:
        if kind == "csv":
            options["features"] = Features({name: Value("string") for name in read_header(path)})
            options |= {"keep_default_na": False, "na_values": [""]}  # NA may be a word
        elif kind == "json":
            options["chunksize"] = path.stat().st_size + 1  # the type of a column is that of all its rows
        with TemporaryDirectory() as cache:  # not the common one: a changed file is read anew
            options |= {"cache_dir": cache, "keep_in_memory": True}
            return load_dataset(kind, data_files=str(path), split="train", **options).to_pandas()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it so") from error
    except Exception as error:
        raise ValueError(f"{path}: {str(error.__cause__ or error).strip().splitlines()[0]}") from error


def name_of(value: Any) -> str:
    """Return a category as text, the same for 3 and 3.0."""
    return f"{value:.15g}" if isinstance(value, (float, np.floating)) else str(value)


def without_words(known: pd.Series) -> pd.Series:
    """Return the values that are no word for a missing number."""
    return known[~known.map(lambda value: str(value).strip().lower() in NO_NUMBER)]


def kind_of(values: pd.Series, is_category: bool = False) -> tuple[str | None, str]:
    """Return what a column holds, "number", "date" or "category", `None` if it is of no use; and a note.

    Raises:
        ValueError: It has no values; the message names the column.
    """
    name, known = values.name, values.dropna()
    kind = pd.api.types.infer_dtype(known)
    is_text = kind == "string" or (kind.startswith("mixed") and known.map(np.isscalar).all())
    given = without_words(known) if is_text and not is_category else known
    if given.empty:
        raise ValueError(f"column {name!r} has no values: leave it out with --ignore {name}")
    if is_category or kind == "boolean":
        return "category", ""
    if is_text:
        if pd.to_numeric(given, errors="coerce").isna().mean() < 0.5:
            return "number", ""
        if pd.to_datetime(known, format="ISO8601", errors="coerce", utc=True).isna().any():
            is_free = known.nunique() > 0.5 * len(known)
            note = f"{name} is left out: free text, {known.nunique()} distinct values in {len(known)} rows"
            return (None, note) if is_free else ("category", "")
    if is_text or kind in ("date", "datetime", "datetime64"):
        return "date", f"{name} holds dates: taken as a number of days"
    if kind not in NUMBERS:
        return None, f"{name} is left out: its values are of type {type(known.iloc[0]).__name__}"
    return "number", ""


def read_as(values: pd.Series, kind: str) -> pd.Series:
    """Return a column of this kind: categories as text, numbers and days as float64; what is missing is nan.

    Raises:
        ValueError: It has infinite values, or others than of this kind; the message names column and row.
    """
    name, known = values.name, values.dropna()
    if kind == "category":
        return known.map(name_of).reindex(values.index)
    if kind == "date":
        dates = pd.to_datetime(known, format="ISO8601", errors="coerce", utc=True)
        numbers = (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)
    elif pd.api.types.infer_dtype(known) in NUMBERS:
        numbers = known.astype("float64")
    else:
        known = without_words(known)
        numbers = pd.to_numeric(known.map(str), errors="coerce").astype("float64")
    for row in known.index[~np.isfinite(numbers)]:
        problem = f"is not a {'finite number' if np.isinf(numbers[row]) else kind}"
        remedy = f"correct it, or train with --categories {name} or --ignore {name}"
        raise ValueError(f"column {name!r}, row {row + 1}: {known[row]!r} {problem}: {remedy}")
    return numbers.reindex(values.index)


def holds_categories(values: pd.Series) -> bool:
    """Return whether a column from `read_as` is text, or whole numbers with few distinct values."""
    known = values.dropna()
    return known.dtype != "float64" or (known.nunique() <= MAX_WHOLE and bool((known % 1 == 0).all()))


def read_columns(frame: pd.DataFrame, options: Namespace) -> tuple[dict[str, str], str, list[str]]:
    """Return the kind of each column to predict from, that of the target, and notes; refuse what cannot be used."""
    for name in (options.target, *options.ignore, *options.categories):
        check_column(frame, name)
    if options.target in options.ignore:
        raise ValueError(f"--target and --ignore both name {options.target!r}: what is predicted cannot be left out")
    target, _ = kind_of(frame[options.target], options.target in options.categories)
    if target is None:
        raise ValueError(f"the target {options.target!r} holds neither numbers nor classes that come again")
    known = read_as(frame[options.target], target).dropna()
    if known.nunique() == 1:
        raise ValueError(f"the target {options.target!r} has one class only, {name_of(known.iloc[0])}")
    if options.task == "classification" and known.dtype == "float64" and known.nunique() > max(2, 0.5 * len(known)):
        distinct = f"{known.nunique()} distinct numbers in {len(known)} rows"
        raise ValueError(f"the target {options.target!r} has {distinct}, which are no classes: use --task regression")
    if options.task == "regression" and target == "category":
        raise ValueError(f"the target {options.target!r} is text, and regression needs numbers")
    frame = frame.drop(columns=[options.target, *options.ignore])
    found = {name: kind_of(frame[name], name in options.categories) for name in frame}
    kinds = {name: kind for name, (kind, _) in found.items() if kind}
    if not kinds:
        raise ValueError("there is no column to predict from")
    return kinds, target, [note for _, note in found.values() if note]


def check_column(frame: pd.DataFrame, name: str, reason: str = "") -> None:
    """Refuse the name of a column that is not in the table."""
    if name not in frame:
        nearest = difflib.get_close_matches(name, frame.columns, n=1, cutoff=0)
        raise ValueError(f"there is no column {name!r}{reason}; the nearest is {nearest[0]!r}")


def split_rows(groups: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the rows of train (64 %), test (16 %, selects the best epoch) and final (20 %, untouched until the end).

    Args:
        groups: The class of each row: each class is divided like this, so that a rare one is in train; -1 is left out.
        seed: Decides which row goes where.
    """
    generator, parts = np.random.default_rng(seed), []
    for group in np.unique(groups[groups >= 0]):
        rows = generator.permutation(np.flatnonzero(groups == group))
        parts.append(np.split(rows, np.cumsum([round(0.16 * len(rows)), round(0.2 * len(rows))])))
    test, final, train = (np.sort(np.concatenate(rows)) for rows in zip(*parts, strict=True))
    if not (len(test) and len(final)):
        raise ValueError(f"{(groups >= 0).sum()} rows with a target are too few to train, test and evaluate with")
    return {"train": train, "test": test, "final": final}


def describe(values: pd.Series, train: np.ndarray) -> dict[str, Any]:
    """Return how a column becomes numbers: its categories, or mean and scale, of the train rows; as JSON holds it."""
    known = values.iloc[train].dropna()
    if known.empty or holds_categories(values):
        return {"categories": known.unique().tolist()}
    has_missing = len(known) < len(train)
    return {"mean": float(known.mean()), "scale": float(known.std(ddof=0) or 1.0), "has_missing": has_missing}


def encode(columns: list[pd.Series], encodings: list[dict[str, Any]]) -> torch.Tensor:
    """Return inputs of shape (rows, numbers + categorical columns).

    A missing number becomes the mean of the train rows. Where these had missing ones, another number tells it. Each
    categorical column has one more category, for missing and unseen values.
    """
    numbers, codes, num_categories = [], [], 0
    for values, encoding in zip(columns, encodings, strict=True):
        if "categories" in encoding:
            categories = pd.Index(encoding["categories"])
            codes.append(num_categories + 1 + categories.get_indexer(values))  # -1 where there is none
            num_categories += len(categories) + 1
        else:
            numbers.append(((values - encoding["mean"]) / encoding["scale"]).fillna(0.0))
            if encoding["has_missing"]:
                numbers.append(values.isna())
    inputs = np.stack([np.asarray(column, dtype="float32") for column in numbers + codes], axis=1)
    return torch.from_numpy(inputs)


def look_at(columns: list[pd.Series], encodings: list[dict[str, Any]]) -> list[str]:
    """Return what the user should know of the values of a table."""
    missing, never_missing, unseen = [], [], []
    for values, encoding in zip(columns, encodings, strict=True):
        if values.hasnans:
            missing.append(f"{values.name} {values.isna().sum()}")
            never_missing += [values.name] if encoding.get("has_missing") is False else []
        known = values.dropna()
        new = known[~known.isin(encoding.get("categories", known))]
        if len(new):
            unseen.append(f"{values.name} {len(new)} ({', '.join(map(name_of, new.unique()[:3]))})")
    notes = [f"Missing values: {', '.join(missing) or 'none'}"]
    notes += [f"No train row lacks {', '.join(never_missing)}: the mean is taken"] if never_missing else []
    return notes + ([f"Rows of categories that no train row has: {', '.join(unseen)}"] if unseen else [])


class TableModel(nn.Module):
    """Embed the categories, and pass them with the numbers through two hidden layers."""

    def __init__(self, encoding: dict[str, Any]) -> None:
        super().__init__()
        categories = [column["categories"] for column in encoding["columns"] if "categories" in column]
        numbers = [column for column in encoding["columns"] if "categories" not in column]
        self.num_numbers, size = len(numbers) + sum(column["has_missing"] for column in numbers), 8
        self.embedding = nn.Embedding(max(sum(map(len, categories)) + len(categories), 1), size)
        nn.init.zeros_(self.embedding.weight)  # what training never sees has no effect
        classes = encoding["target"]["classes"]
        self.layers = nn.Sequential(
            *(nn.Linear(self.num_numbers + len(categories) * size, 128), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1 if classes is None else len(classes))),
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return outputs of shape (rows, outputs)."""
        numbers, codes = inputs[:, : self.num_numbers], inputs[:, self.num_numbers :].long()
        return self.layers(torch.cat([numbers, self.embedding(codes).flatten(start_dim=1)], dim=1))


def check_encoding(encoding: dict[str, Any], config: TrainConfig) -> None:
    """Refuse to go on with a table whose columns become other numbers than those that the run was trained on."""
    path = Path(config.run_dir or "", ENCODING).expanduser()
    if not (config.resume and config.run_dir and path.is_file()):
        return
    before, now = (
        {"the target": one["target"]} | {f"column {column['name']!r}": column for column in one["columns"]}
        for one in (json.loads(path.read_text()), encoding)
    )
    remedy = f"--data is not as in the run in {config.run_dir}: go on with that table, or give another --run_dir"
    for name in [*before, *now]:
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            difference = f"{name} is {'new' if old is None else 'missing'}"
        else:
            differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            told = [(key, *(shorten(str(one.get(key)), 60) for one in (old, new))) for key in differing]
            difference = "; ".join(f"the {key} of {name} was {first}, now {second}" for key, first, second in told)
        if difference:
            raise ValueError(f"{difference}. {remedy}")
    if list(before) != list(now):
        raise ValueError(f"its columns have another order. {remedy}")


class KeepEncoding(Callback):
    """Write how the columns become numbers into the run folder, once there is something to predict with."""

    def __init__(self, encoding: dict[str, Any]) -> None:
        self.encoding = encoding

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Write it beside the weights, where it is not there yet."""
        if trainer.is_main_process and trainer.config.run_dir is not None:
            path = Path(trainer.config.run_dir, ENCODING).expanduser()
            if not path.exists():
                beside = path.with_suffix(".part")
                beside.write_text(json.dumps(self.encoding, indent=2, allow_nan=False) + "\n")
                os.replace(beside, path)  # whole or not at all


def in_units(outputs: torch.Tensor, target: dict[str, Any]) -> pd.DataFrame:
    """Return what outputs of shape (rows, classes), or (rows, 1), predict: class and probability, or a number."""
    outputs = outputs.double()
    if target["classes"] is None:
        return pd.DataFrame({"prediction": outputs.squeeze(1).numpy() * target["scale"] + target["mean"]})
    best = outputs.softmax(dim=1).max(dim=1)
    return pd.DataFrame({"prediction": np.array(target["classes"])[best.indices], "probability": best.values})


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squared differences, in double precision."""
    return (outputs.double() - targets).square().sum()


class Table(NamedTuple):
    """A table, ready to train on.

    Attributes:
        inputs: Of shape (rows, numbers + categorical columns).
        targets: Classes, -1 where there is none, of shape (rows,); or numbers without a unit, of shape (rows, 1).
        actual: The target in its own unit, classes as text.
        parts: The rows of train, test and final.
        encoding: How columns and target become numbers, as JSON holds it.
        notes: What the user should know.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    actual: pd.Series
    parts: dict[str, np.ndarray]
    encoding: dict[str, Any]
    notes: list[str]


def prepare(frame: pd.DataFrame, options: Namespace) -> Table:
    """Return a table ready to train on, or raise a ValueError that says what is wrong with it."""
    kinds, target_kind, notes = read_columns(frame, options)
    columns = [read_as(frame[name], kind) for name, kind in kinds.items()]
    target = read_as(frame[options.target], target_kind)
    is_class = options.task == "classification" or (options.task == "auto" and holds_categories(target))
    codes, classes = pd.factorize(target, sort=True)  # -1 where it is missing
    parts = split_rows(codes if is_class else np.minimum(codes, 0), options.seed)
    of_columns = [
        {"name": name, "kind": kind} | describe(values, parts["train"])
        for (name, kind), values in zip(kinds.items(), columns, strict=True)
    ]
    notes += look_at(columns, of_columns)
    if target.hasnans:
        notes.append(f"{target.isna().sum()} rows without {target.name} are predicted, but left out of training")
    of_target = {"name": target.name, "kind": target_kind, "classes": None}
    if is_class:
        of_target["classes"], targets = [name_of(value) for value in classes], torch.from_numpy(codes)
        target = target.map(name_of, na_action="ignore")
    else:
        known = target[parts["train"]]
        of_target |= {"mean": float(known.mean()), "scale": float(known.std(ddof=0) or 1.0)}
        scaled = (target - of_target["mean"]) / of_target["scale"]
        targets = torch.tensor(scaled.to_numpy(), dtype=torch.float32).unsqueeze(1)
    encoding = {"target": of_target, "columns": of_columns}
    return Table(encode(columns, of_columns), targets, target, parts, encoding, notes)


def train_table(table: Table, options: Namespace, config: TrainConfig) -> None:
    """Train, evaluate the best weights, and predict every row."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*table.notes, sep="\n")
    classes, whole_metrics = table.encoding["target"]["classes"], {}
    if classes is not None:
        counts = table.targets[table.parts["train"]].bincount()
        weights = counts.sum() / len(classes) / counts if options.class_weights else None
        loss_fn = nn.CrossEntropyLoss(weights)
        metrics = {"accuracy": lambda outputs, targets: outputs.argmax(dim=1) == targets}
    else:
        loss_fn, scale = nn.MSELoss(), table.encoding["target"]["scale"]
        metrics = {"mean_absolute_error": lambda outputs, targets: (outputs - targets).abs().squeeze(1) * scale}
        whole_metrics["RMSE"] = lambda outputs, targets: (squared_error(outputs, targets) / len(targets)).sqrt() * scale
        whole_metrics["R2"] = lambda outputs, targets: (
            1 - squared_error(outputs, targets) / squared_error(targets, targets.double().mean())
        )
    data = {name: TensorDataset(table.inputs[rows], table.targets[rows]) for name, rows in table.parts.items()}
    torch.manual_seed(config.seed)  # the initial weights
    model = TableModel(table.encoding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    more = {"metrics": metrics, "whole_metrics": whole_metrics, "callbacks": [KeepEncoding(table.encoding)]}
    trainer = Trainer(model, optimizer, loss_fn, **more, config=config)
    history = trainer.fit(DataLoader(data["train"], options.batch_size, shuffle=True), DataLoader(data["test"], 1024))
    scores = trainer.evaluate(DataLoader(data["final"], 1024))  # with the weights of the best epoch
    outputs = trainer.predict(DataLoader(TensorDataset(table.inputs), 1024))  # of every row, in their order
    if not trainer.is_main_process:
        return

    print("Final evaluation: " + ", ".join(f"{name.replace('_', ' ')} {score:.4f}" for name, score in scores.items()))
    told = pd.DataFrame({"row": np.arange(1, len(outputs) + 1), "part": "", "actual": table.actual})
    for name, rows in table.parts.items():
        told.loc[rows, "part"] = name
    told = told.join(in_units(outputs, table.encoding["target"]))
    if classes is not None:
        final = told[told.part == "final"]
        is_right = (final.prediction == final.actual).groupby(final.actual)
        print(f"Balanced accuracy {is_right.mean().mean():.4f}, the mean over the classes:")
        for name, of_class in is_right:
            print(f"  {name}: {of_class.mean():.4f} of {len(of_class)} rows")
    if config.run_dir is not None:
        told.to_csv(Path(config.run_dir, "predictions.csv").expanduser(), index=False)
    print(f"Best epoch {history.best_epoch} of {history.num_epochs}; files in {config.run_dir}")


def predict_table(options: Namespace, config: TrainConfig) -> None:
    """Predict every row of a table with the best weights of a run; a table that does not fit is a ValueError."""
    path = Path(config.run_dir or "", ENCODING).expanduser()
    if not path.is_file():
        raise ValueError(f"--run_dir {config.run_dir} is no run of this script: there is no {path}")
    encoding, frame = json.loads(path.read_text()), read_table(Path(options.predict))
    target, of_columns = encoding["target"], encoding["columns"]
    for column in of_columns:
        check_column(frame, column["name"], ", which the run was trained with")
    columns = [read_as(frame[column["name"]], column["kind"]) for column in of_columns]
    inputs = encode(columns, of_columns)
    trainer = Trainer(load_best(TableModel(encoding), config.run_dir), None, nn.MSELoss(), config=config)
    outputs = trainer.predict(DataLoader(TensorDataset(inputs), 1024))
    if not trainer.is_main_process:
        return
    told = pd.DataFrame({"row": np.arange(1, len(outputs) + 1)}).join(in_units(outputs, target))
    output = Path(options.output or Path(config.run_dir, f"predictions_{Path(options.predict).stem}.csv")).expanduser()
    told.to_csv(output, index=False)
    print(*look_at(columns, of_columns), f"{len(told)} rows are predicted in {output}", sep="\n")


def main() -> None:
    """Read the options, and train or predict."""
    parser = OptionParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help=f"the table to train on, with the ending {', '.join(FORMATS)}")
    parser.add_argument("--target", help="the column to predict")
    parser.add_argument("--predict", metavar="TABLE", help="do not train: predict this table with the run in --run_dir")
    parser.add_argument("--output", help="where (default: predictions_TABLE.csv in --run_dir)")
    parser.add_argument("--task", choices=["auto", "regression", "classification"], default="auto")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="COLUMN", help="columns to leave out")
    parser.add_argument("--categories", nargs="+", default=[], metavar="COLUMN", help="columns that are no numbers")
    parser.add_argument("--class_weights", action="store_true", help="give all classes the same weight in the loss")
    parser.add_argument("--batch_size", type=PositiveInt, default=128, help="rows of one update, over all processes")
    parser.add_argument("--learning_rate", type=PositiveFloat, default=1e-3)
    parser.add_config(num_epochs=30, patience=5, num_micro_batches=2, run_dir="runs/table")
    options = parser.parse_args()
    disable_progress_bars()  # those of reading
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors are told below
    if options.predict is None and None in (options.data, options.target):
        parser.error("give --data and --target to train, or --predict and --run_dir to predict")
    config = parser.config_of(options)
    try:
        if options.predict is not None:
            predict_table(options, config)
            return
        table = prepare(read_table(Path(options.data)), options)
        check_encoding(table.encoding, config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    train_table(table, options, config)


if __name__ == "__main__":
    with refusals_in_one_line():
        main()
