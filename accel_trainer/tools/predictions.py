"""The predictions of a run as a table: one row per sample, with its index in the data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..data.order import dataset_order, is_stream
from ..storage.files import put_in_place

_WRITERS: dict[str, Callable[[Dataset, str], object]] = {
    ".parquet": Dataset.to_parquet,
    ".csv": Dataset.to_csv,
    ".jsonl": Dataset.to_json,
}


def check_output(output: str) -> Path:
    """Return the path of a table, or raise a `ValueError` if its ending names no known form."""
    path = Path(output).expanduser()
    if path.suffix not in _WRITERS:
        raise ValueError(f"--output must end with {', '.join(_WRITERS)}, got {output!r}.")
    return path


def write_predictions(path: Path, outputs: Any, loader: DataLoader[Any], ragged: object = None) -> int:
    """Write what `Trainer.predict` returned for a loader and `ragged`, and return the number of rows.

    The columns are `index`, that of the sample in its whole data set (its position in a stream), and `output`, or a
    column for each part of a dictionary or tuple. An output that is not one number is a list; in a CSV file each number
    of a vector has a column of its own. Where a name is taken, as `index` is, the column has an underscore more.
    """
    columns = _by_free_name(_columns("output", outputs, ragged == "list"))
    num_rows = len(next(iter(columns.values()), []))
    if is_stream(loader):
        indices = list(range(num_rows))
    else:
        indices = [_whole(loader.dataset, index) for index in dataset_order(loader)]
    if len(indices) != num_rows:  # a collate function has left samples out, or added some
        raise ValueError(f"The model gave {num_rows} outputs for {len(indices)} samples: no index belongs to each.")
    if path.suffix == ".csv":
        columns = _by_free_name(_one_number_each(columns))
    table = Dataset.from_dict({"index": indices} | columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _without_progress_bars():
        put_in_place(path, lambda beside: _WRITERS[path.suffix](table, str(beside)))
    return num_rows


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Let the datasets library draw none in this block."""
    if not is_progress_bar_enabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _by_free_name(pairs: Iterable[tuple[str, list[Any]]]) -> dict[str, list[Any]]:
    """Return columns by names that differ from each other and from `index`."""
    columns: dict[str, list[Any]] = {}
    for name, values in pairs:
        while name == "index" or name in columns:
            name += "_"
        columns[name] = values
    return columns


def _columns(name: str, outputs: Any, are_lists: bool) -> Iterator[tuple[str, list[Any]]]:
    """Yield the columns that outputs make, by name; with `are_lists` a list of tensors holds one for each sample."""
    is_column = isinstance(outputs, Tensor) or (
        are_lists and isinstance(outputs, list) and isinstance(outputs[0], Tensor)
    )
    if is_column:
        yield name, [_plain(one) for one in outputs]
    elif isinstance(outputs, Mapping):
        for key, part in outputs.items():
            yield from _columns(str(key) if name == "output" else f"{name}_{key}", part, are_lists)
    elif isinstance(outputs, (list, tuple)):
        for number, part in enumerate(outputs):
            yield from _columns(f"{name}_{number}", part, are_lists)


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (value.double() if value.dtype in (torch.bfloat16, torch.float16) else value).tolist()


def _one_number_each(columns: Mapping[str, list[Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Yield columns with one number in each cell, of vectors that all have the same length."""
    for name, values in columns.items():
        lengths = {len(value) if isinstance(value, list) else None for value in values}
        if lengths <= {None} or len(lengths) > 1:
            yield name, values
        else:
            for number, column in enumerate(zip(*values, strict=True)):
                yield from _one_number_each({f"{name}_{number}": list(column)})


def _whole(dataset: Any, index: Any) -> Any:
    """Return the index in the data set that a subset is of."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    return index
