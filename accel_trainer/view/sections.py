"""Parts of the page as plain data: numbers as people read them, what the model gets wrong, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .assessment import FEW_CLASSES, Details, num_cells

Table = tuple[str, bool, list[str], list[list[str]]]  # heading, whether it is open, header, rows

_MANY_ROWS = 25  # of a table that is folded
_FEW_LAYERS = 12  # of a table that is not


def number(value: Any) -> str:
    """Return a number with four significant digits, and all digits before the point.

    Example:
        >>> [number(value) for value in (0.123456, 12345.678, 1.5e-7, 0.0, 7, None)]
        ['0.1235', '12,346', '1.500e-07', '0', '7', '-']
    """
    if not isinstance(value, float):
        return "-" if value is None else f"{value:,}" if type(value) is int else str(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    size = math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, 3 - size)}f}" if -5 < size < 15 else f"{value:.3e}"


def share(value: float) -> str:
    """Return a share of 1 as a percentage."""
    return f"{100 * value:.1f}\u00a0%"


def by_index(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the metrics with a value for each index, such as one for each class: name -> names of its values."""
    found: dict[str, list[str]] = {}
    for name in names:
        metric, _, index = name.rpartition("/")
        if metric and index.isdigit():
            found.setdefault(metric, []).append(name)
    return {metric: values for metric, values in found.items() if len(values) > 1}


def without_index(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return scores without those that are one of many values of a metric."""
    left_out = {name for names in by_index(scores).values() for name in names}
    return {name: value for name, value in scores.items() if name not in left_out}


def described_evaluations(evaluations: Sequence[dict[str, Any]], is_chosen_by_test: bool) -> tuple[Table, str]:
    """Return the table of all evaluations, and what is to be said of them."""
    names = list(dict.fromkeys(name for evaluation in evaluations for name in without_index(evaluation["scores"])))
    rows = []
    for evaluation in evaluations:
        num_samples = evaluation["num_samples"]
        size = "a stream" if num_samples is None else f"{num_samples:,} samples"
        scores = [number(evaluation["scores"].get(name)) for name in names]
        rows.append([evaluation["data"], *scores, size, f"epoch {evaluation['epoch']}", evaluation["dataset"]])
    table: Table = ("Evaluations", True, ["data", *names, "size", "weights of", "data set"], rows)
    said = "" if not is_chosen_by_test else "The test data chose the best epoch: scores on them are a little too good. "
    return table, said + "Only data that no epoch was trained on or chosen by tell how good the model is."


def assessment(evaluation: dict[str, Any], place: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the page shows of an evaluation's details, and its charts, which go to a place of the page."""
    details: Details = evaluation["details"]
    shown: dict[str, Any] = {
        "place": place,
        "title": f"What the model gets wrong: {evaluation['data']}",
        "notes": [],
        "matrix": [],
        "picture": None,
        "wrong": details["wrong"],
        "index_of": details["index_of"],
        "tables": [],
    }
    if details["num_left_out"]:
        shown["notes"].append(f"{details['num_left_out']:,} left out: without a target, or not finite.")
    if details["kind"] == "regression":
        rows = [[name, *map(number, values)] for name, *values in details["table"]]
        shown["tables"] = [_folded("Errors", ["target", "R2", "MAE", "RMSE"], rows)]
        charts = [chart for one in details["charts"] for chart in _residual_charts(one, len(rows) > 1)]
        if len(charts) < 2 * (len(rows) - 1):
            shown["notes"].append(f"The charts show the first {len(details['charts'])} targets.")
        return shown | {"cards": []}, [chart | {"place": place} for chart in charts]
    shown["notes"].insert(0, f"{details['num_counted']:,} {details['unit']} in {details['num_classes']:,} classes.")
    if details["reading"] is not None:
        shown["notes"].append(details["reading"])
    shown["cards"] = [(name, number(value)) for name, value in details["summary"]]
    shown["picture"] = details["picture"]
    shown["names"] = [row[0] for row in details["per_class"]]
    shown["is_tall"] = max(map(len, shown["names"])) > 3
    shown["matrix"] = _matrix_rows(shown["names"], details["matrix"] or [])
    confusions = [[a, b, f"{count:,}", share(part)] for a, b, count, part in details["confusions"]]
    classes = [[name, *map(number, values)] for name, *values in details["per_class"]]
    header = ["class", "precision", "recall", "F1", "support"]
    if details["num_classes"] > FEW_CLASSES:
        worst = sorted(details["per_class"], key=lambda row: row[3])[:10]
        rows = [[name, *map(number, values)] for name, *values in worst]
        shown["tables"].append(("The classes with the lowest F1", True, header, rows))
    shown["tables"].append(_folded("Every class", header, classes))
    if confusions:
        table = _folded("Confused most often", ["target", "predicted as", "how often", "of the target"], confusions)
        shown["tables"].insert(0, table)
    return shown, []


def _folded(heading: str, header: list[str], rows: list[list[str]]) -> Table:
    return heading, len(rows) <= _MANY_ROWS, header, rows


def _matrix_rows(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[tuple[str, list[tuple[str, int, str]]]]:
    """Return for each target its name and cells: the count, its share of the row in percent, and a sentence on it."""
    rows = []
    for y, (name, counts) in enumerate(zip(names, matrix, strict=False)):
        total = max(sum(counts), 1)
        cells = []
        for x, (other, count) in enumerate(zip(names, counts, strict=False)):
            verdict = "right" if x == y else f"seen as {other}"
            cells.append((f"{count:,}" if count else "", round(100 * count / total), f"{name}, {verdict}: {count:,}"))
        rows.append((name, cells))
    return rows


def _residual_charts(chart: Details, are_several: bool) -> list[dict[str, Any]]:
    of = f" of {chart['name']}" if are_several else ""
    columns, rows = num_cells()
    residuals = {name: chart[name] for name in ("points", "cells", "x", "y")} | {"columns": columns, "rows": rows}
    low, high = chart["range"]
    return [
        {"kind": "residuals", "title": f"Residuals{of} (target - prediction)", "axis": "prediction", **residuals},
        {
            **{"kind": "histogram", "title": f"Histogram of the residuals{of}", "axis": "residual", "unit": "samples"},
            **{"counts": chart["histogram"], "x": [low, high]},
        },
    ]


def described_model(layers: Sequence[list[Any]], optimizer: dict[str, Any]) -> list[Table]:
    """Return the tables of the model's layers and of the optimizer's settings."""
    tables: list[Table] = []
    if layers:
        total = sum(row[3] for row in layers)
        frozen = sum(row[3] for row in layers if not row[4])
        said = f"Layers of the model ({len(layers):,}, {total:,} parameters{f', {frozen:,} frozen' if frozen else ''})"
        header = ["layer", "type", "shape", "parameters", *(["trained"] if frozen else [])]
        rows = [
            [name, kind, shape, f"{count:,}" if count else "", *(["yes" if is_trained else ""] if frozen else [])]
            for name, kind, shape, count, is_trained in layers
        ]
        tables.append((said, len(rows) <= _FEW_LAYERS, header, rows))
    if optimizer:
        groups = optimizer["groups"]
        names = dict.fromkeys(name for group in groups for name in group)
        several = [f"group {place}" for place in range(1, len(groups) + 1)] if len(groups) > 1 else ["value"]
        rows = [[name, *(_setting(group.get(name, "-")) for group in groups)] for name in names]
        tables.append((f"Optimizer: {optimizer['name']}", False, ["setting", *several], rows))
    return tables


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return f"{value:,}" if type(value) is int else str(value)


def compared(values: Sequence[Any], shown: Callable[[Any], str] = number) -> list[str]:
    r"""Return the values of several runs, each but the first with its difference to the first.

    Example:
        >>> compared([4, 5, None])
        ['4', '5 (+1, +25.0\xa0%)', '-']
    """
    first, texts = values[0], []
    for place, value in enumerate(values):
        text = shown(value) if value is not None else "-"
        if place and _is_number(value) and _is_number(first) and value != first:
            difference = value - first
            parts = [("+" if difference > 0 else "-") + shown(abs(difference))]
            parts += [f"{100 * difference / abs(first):+.1f}\u00a0%"] if first else []
            text += f" ({', '.join(parts)})"
        texts.append(text)
    return texts


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300
