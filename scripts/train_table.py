"""Train a small network on a table (CSV, Parquet or JSON lines) to predict one of its columns.

accelerate launch scripts/train_table.py --data houses.csv --target price --num_epochs 30
accelerate launch scripts/train_table.py --data patients.parquet --target ill --class_weights --ignore name id
"""

import csv
import difflib
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from datasets import Features, Value, disable_progress_bars, load_dataset
from jsonargparse import Namespace
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel_trainer import Trainer
from accel_trainer.tools.options import OptionParser

FORMATS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
NO_NUMBER = {"na", "n/a", "nan", "null", "none", "-", "?"}  # missing, in a column of numbers
MAX_WHOLE = 20  # whole numbers with at most as many distinct values are categories


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


def read_column(values: pd.Series, is_category: bool = False) -> tuple[pd.Series | None, str]:
    """Return a column as float64, or as text where it holds categories, or `None` if it is of no use; and a note.

    Args:
        values: The column as it is in the table.
        is_category: Whether to take it as categories, whatever it holds.

    Raises:
        ValueError: It has no values, infinite ones, or text among numbers; the message names column and row.
    """
    name, known, note = values.name, values.dropna(), ""
    if known.empty:
        raise ValueError(f"column {name!r} has no values: leave it out with --ignore {name}")
    kind = pd.api.types.infer_dtype(known)
    if is_category or kind == "boolean":
        return known.map(str).reindex(values.index), note
    if kind == "string" or (kind.startswith("mixed") and known.map(np.isscalar).all()):
        given = known[~known.map(lambda value: str(value).strip().lower() in NO_NUMBER)]
        if given.empty:
            raise ValueError(f"column {name!r} has no values: leave it out with --ignore {name}")
        numbers = pd.to_numeric(given, errors="coerce")
        is_text = numbers.isna()
        if is_text.mean() < 0.5:
            for row in given.index[is_text]:
                remedy = f"correct it, or use --categories {name} or --ignore {name}"
                raise ValueError(f"column {name!r}, row {row + 1}: {known[row]!r} is not a number: {remedy}")
            kind, known = "floating", numbers
        elif pd.to_datetime(known, format="ISO8601", errors="coerce", utc=True).notna().all():
            kind, known = "datetime", pd.to_datetime(known, format="ISO8601", utc=True)
        elif known.nunique() > 0.5 * len(known):
            return None, f"{name} is left out: free text, {known.nunique()} distinct values in {len(known)} rows"
        else:
            return known.map(str).reindex(values.index), note
    if kind in ("date", "datetime", "datetime64"):
        known = (pd.to_datetime(known, utc=True) - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)
        note = f"{name} holds dates: taken as a number of days"
    elif kind not in ("integer", "floating", "mixed-integer-float", "decimal"):
        return None, f"{name} is left out: its values are of type {type(known.iloc[0]).__name__}"
    known = known.astype("float64")
    for row in known.index[np.isinf(known)]:
        raise ValueError(f"column {name!r}, row {row + 1}: {known[row]} is not a finite number")
    return known.reindex(values.index), note


def holds_categories(values: pd.Series) -> bool:
    """Return whether a column from `read_column` is text, or whole numbers with few distinct values."""
    known = values.dropna()
    return known.dtype != "float64" or (known.nunique() <= MAX_WHOLE and bool((known % 1 == 0).all()))


def read_columns(frame: pd.DataFrame, options: Namespace) -> tuple[list[pd.Series], pd.Series, list[str]]:
    """Return the columns to predict from, the target, and what the user should know; refuse what cannot be used."""
    for name in (options.target, *options.ignore, *options.categories):
        if name not in frame:
            nearest = difflib.get_close_matches(name, frame.columns, n=1, cutoff=0)[0]
            raise ValueError(f"there is no column {name!r}; the nearest is {nearest!r}")
    target, _ = read_column(frame[options.target], options.target in options.categories)
    if target is None:
        raise ValueError(f"the target {options.target!r} holds neither numbers nor classes that come again")
    if target.nunique() == 1:
        raise ValueError(f"the target {options.target!r} has one class only, {target.dropna().iloc[0]}")
    if options.task == "regression" and target.dtype != "float64":
        raise ValueError(f"the target {options.target!r} is text, and regression needs numbers")
    frame = frame.drop(columns=[options.target, *options.ignore])
    read = [read_column(frame[name], name in options.categories) for name in frame]
    columns, notes = [values for values, _ in read if values is not None], [note for _, note in read if note]
    if not columns:
        raise ValueError("there is no column to predict from")
    missing = [f"{values.name} {values.isna().sum()}" for values in columns if values.hasnans]
    notes.append(f"Missing values: {', '.join(missing) or 'none'}")
    if target.isna().any():
        notes.append(f"{target.isna().sum()} rows without {options.target} are predicted, but left out of training")
    return columns, target, notes


def split_rows(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    return train, test, final


def encode(columns: list[pd.Series], train: np.ndarray) -> tuple[torch.Tensor, int, int]:
    """Return inputs of shape (rows, numbers + categorical columns), the number of numbers and that of all categories.

    Means, deviations and categories are those of the train rows. A missing number becomes the mean, and another number
    tells that it was missing. Each categorical column has one more category, for missing and unseen values.
    """
    numbers, codes, num_categories = [], [], 0
    for values in columns:
        known = values.iloc[train].dropna()
        if holds_categories(values):
            categories = pd.Index(known.unique())
            codes.append(num_categories + 1 + categories.get_indexer(values))  # -1 where there is none
            num_categories += len(categories) + 1
        else:
            numbers.append(((values - known.mean()) / (known.std(ddof=0) or 1.0)).fillna(0.0))
            if len(known) < len(train):
                numbers.append(values.isna())
    inputs = np.stack([np.asarray(column, dtype="float32") for column in numbers + codes], axis=1)
    return torch.from_numpy(inputs), len(numbers), num_categories


class TableModel(nn.Module):
    """Embed the categories, and pass them with the numbers through two hidden layers."""

    def __init__(self, num_inputs: int, num_numbers: int, num_categories: int, num_outputs: int) -> None:
        super().__init__()
        self.num_numbers, size = num_numbers, 8
        self.embedding = nn.Embedding(max(num_categories, 1), size)
        nn.init.zeros_(self.embedding.weight)  # what training never sees has no effect
        self.layers = nn.Sequential(
            *(nn.Linear(num_numbers + (num_inputs - num_numbers) * size, 128), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, num_outputs)),
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return outputs of shape (rows, outputs)."""
        numbers, codes = inputs[:, : self.num_numbers], inputs[:, self.num_numbers :].long()
        return self.layers(torch.cat([numbers, self.embedding(codes).flatten(start_dim=1)], dim=1))


def main() -> None:
    """Read the options and the table, train, evaluate the best weights, and predict every row."""
    parser = OptionParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help=f"the table, with the ending {', '.join(FORMATS)}")
    parser.add_argument("--target", required=True, help="the column to predict")
    parser.add_argument("--task", choices=["auto", "regression", "classification"], default="auto")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="COLUMN", help="columns to leave out")
    parser.add_argument("--categories", nargs="+", default=[], metavar="COLUMN", help="columns that are no numbers")
    parser.add_argument("--class_weights", action="store_true", help="give all classes the same weight in the loss")
    parser.add_argument("--batch_size", type=int, default=128, help="rows of one update, over all processes")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_config(num_epochs=30, patience=5, num_micro_batches=2, run_dir="runs/table")
    options = parser.parse_args()
    disable_progress_bars()  # those of reading
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors are told below
    config = parser.config_of(options)
    try:
        columns, target, notes = read_columns(read_table(Path(options.data)), options)
        is_class = options.task == "classification" or (options.task == "auto" and holds_categories(target))
        codes, classes = pd.factorize(target, sort=True)  # -1 where it is missing
        train, test, final = split_rows(codes if is_class else np.minimum(codes, 0), config.seed)
    except ValueError as error:
        parser.error(str(error))
    if int(os.environ.get("RANK", 0)) == 0:
        print(*notes, sep="\n")

    inputs, num_numbers, num_categories = encode(columns, train)
    if is_class:
        targets, num_outputs = torch.from_numpy(codes), len(classes)
        names = np.array([f"{value:.15g}" if isinstance(value, float) else value for value in classes])
        weights = len(train) / len(classes) / np.bincount(codes[train])
        loss_fn = nn.CrossEntropyLoss(torch.tensor(weights, dtype=torch.float32) if options.class_weights else None)
        metrics = {"accuracy": lambda outputs, targets: outputs.argmax(dim=1) == targets}
    else:
        mean, scale, num_outputs = target[train].mean(), target[train].std(ddof=0) or 1.0, 1
        targets = torch.tensor(((target - mean) / scale).to_numpy(), dtype=torch.float32).unsqueeze(1)
        loss_fn = nn.MSELoss()
        metrics = {"mean_absolute_error": lambda outputs, targets: (outputs - targets).abs().squeeze(1) * scale}
    train_data, test_data, final_data = (TensorDataset(inputs[rows], targets[rows]) for rows in (train, test, final))

    torch.manual_seed(config.seed)  # the initial weights
    model = TableModel(inputs.shape[1], num_numbers, num_categories, num_outputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    trainer = Trainer(model, optimizer, loss_fn, metrics=metrics, config=config)
    history = trainer.fit(DataLoader(train_data, options.batch_size, shuffle=True), DataLoader(test_data, 1024))
    scores = trainer.evaluate(DataLoader(final_data, 1024))  # with the weights of the best epoch
    outputs = trainer.predict(DataLoader(TensorDataset(inputs), 1024))  # of every row, in their order
    if not trainer.is_main_process:
        return

    print("Final evaluation: " + ", ".join(f"{name.replace('_', ' ')} {score:.4f}" for name, score in scores.items()))
    table = pd.DataFrame({"row": np.arange(1, len(inputs) + 1)})
    if is_class:
        best = outputs.double().softmax(dim=1).max(dim=1)
        table["prediction"], table["probability"] = names[best.indices.numpy()], best.values.numpy()
        is_right = pd.Series(best.indices.numpy() == codes)[final].groupby(names[codes[final]])
        print(f"Balanced accuracy {is_right.mean().mean():.4f}, the mean over the classes:")
        for name, of_class in is_right:
            print(f"  {name}: {of_class.mean():.4f} of {len(of_class)} rows")
    else:
        table["prediction"] = outputs.squeeze(1).double().numpy() * scale + mean
    if config.run_dir is not None:
        table.to_csv(Path(config.run_dir, "predictions.csv"), index=False)
    print(f"Best epoch {history.best_epoch} of {history.num_epochs}; files in {config.run_dir}")


if __name__ == "__main__":
    main()
