"""What a model gets right and wrong: the numbers of scikit-learn, and the samples that are most wrong."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from importlib.util import find_spec
from typing import Any

import numpy
from torch import Tensor

from ..base.console import warn
from .answers import CLASS_AXES
from .forms import fits
from .samples import class_names, index_in_whole, shown_sample, whole

Details = dict[str, Any]  # as `evaluations.json` keeps them; their form is in `_FORMS`

NUM_WRONG = 12  # samples that are shown
FEW_CLASSES = 20  # of which a matrix with numbers can be read
_MOST_ROWS = 2_000  # of the table of classes
_NUM_CONFUSIONS = 15
_NUM_CHARTS = 4  # targets of a regression that get a chart
_MOST_POINTS = 2_000  # in a chart; more samples are counted in cells
_CELLS = (64, 40)
_BARS = 40
_SIDE = 512  # pixels of the picture of a large matrix, at most

_FAULTS = {
    1: "targets that are class indices from 0 to {last} (or {ignored}); the target of sample {position} is none",
    2: (
        "one class per target; in sample {position} the targets add up to more or less than 1 (several classes at "
        "once, or a mask: give a mask scores of shape (batch, 1, ...))"
    ),
}


def check_library(kind: str) -> None:
    """Refuse a report that scikit-learn and matplotlib are missing for."""
    missing = [name for name, module in (("scikit-learn", "sklearn"), ("matplotlib",) * 2) if find_spec(module) is None]
    if missing:
        raise ImportError(f"report={kind!r} needs {' and '.join(missing)}: pip install 'accel_trainer[report]'.")


def assess(kind: str, answers: dict[str, Any], dataset: Any) -> Details:
    """Return the details of an evaluation, of the answers to all samples; the wrong samples by their position only.

    Raises:
        ValueError: The targets are none that this kind of report is for; the message names a sample.
    """
    columns = {name: _array(column) for name, column in answers["columns"].items()}
    num_samples = len(next(iter(columns.values()), ()))
    if not num_samples:
        raise ValueError(f"report={kind!r} needs at least one sample; the loader has none.")
    if kind == "regression":
        return {"num_samples": num_samples} | _regression(columns)
    _check_targets(columns["fault"], answers["num_classes"])
    names = class_names(dataset, answers["num_classes"])
    if answers["counts"] is None:
        return {"num_samples": num_samples} | _of_samples(columns, names, answers["reading"])
    tables, axes = _array(answers["counts"]), answers["axes"]
    return {"num_samples": num_samples} | _of_parts(columns, tables, names, answers["reading"], axes)


def show_wrong(wrong: list[Details], dataset: Any, indices: dict[int, Any] | None) -> Details:
    """Return the wrong samples by their indices, with picture or text; by their positions if `indices` is `None`."""
    if not indices:
        where = "position in the order of the loader, from 0" if wrong else ""
        return {"index_of": where, "wrong": wrong}
    shown = []
    for one in wrong:
        index, picture, text = indices[one["index"]], None, None
        try:
            picture, text = shown_sample(dataset, index)
        except Exception as error:  # a data set that cannot be asked twice is no error of the evaluation
            warn(f"Could not read sample {index} again: {error!r}.")
        index = index_in_whole(dataset, index)
        shown.append(one | {"index": index if isinstance(index, int) else str(index), "picture": picture, "text": text})
    is_part = whole(dataset) is not dataset
    return {"index_of": "index in the whole data set" if is_part else "index in the data set", "wrong": shown}


def _array(column: Tensor) -> Any:
    return (column.double() if column.is_floating_point() else column).numpy()


def _check_targets(faults: Any, num_classes: int) -> None:
    position = int(numpy.argmax(faults))
    if faults[position]:
        needed = _FAULTS[int(faults[position])].format(last=num_classes - 1, ignored=-100, position=position)
        raise ValueError(f'report="classification" needs {needed}. Is it report="regression"?')


# --- classification ---------------------------------------------------------------------------------------------------


def _of_samples(columns: dict[str, Any], names: list[str], reading: str | None) -> Details:
    """Return the details where each sample has one target."""
    score, targets = columns["score"], columns["target"]
    note = None
    if "prediction" in columns:
        is_known = ~numpy.isnan(columns["normaliser"])
        predictions = columns["prediction"]
        losses, certainties = _log_probabilities(columns, reading)
    else:
        is_known = ~numpy.isnan(score)
        score = numpy.nan_to_num(score, nan=0.5)
        predictions, losses, certainties = _of_single_scores(score, targets, reading)
        note = _reading_note(score, score, reading)
    is_counted = (targets >= 0) & is_known
    codes, counts = numpy.unique(targets[is_counted] * len(names) + predictions[is_counted], return_counts=True)
    details = _confusion(codes, counts, names, "samples", int((~is_counted).sum()))
    wrong = numpy.flatnonzero(is_counted & (predictions != targets))
    wrong = wrong[numpy.argsort(-losses[wrong], kind="stable")][:NUM_WRONG]
    shown = [
        {
            "target": f"{names[targets[position]]} (p\u00a0{math.exp(-losses[position]):.2g})",
            "prediction": f"{names[predictions[position]]} (p\u00a0{math.exp(certainties[position]):.2g})",
            "note": "",
        }
        for position in wrong
    ]
    return details | {"reading": note, "wrong": _with_positions(wrong, shown)}


def _log_probabilities(columns: dict[str, Any], reading: str | None) -> tuple[Any, Any]:
    """Return for each sample -log p of its target and log p of the prediction."""
    score, of_target = columns["score"], columns["target_score"]
    if reading is None and columns["is_distribution"].all():
        with numpy.errstate(divide="ignore"):
            return -numpy.log(of_target), numpy.log(score)
    with numpy.errstate(invalid="ignore"):
        return columns["normaliser"] - of_target, score - columns["normaliser"]


def _is_probability(low: Any, high: Any, reading: str | None) -> bool:
    return reading == "probabilities" or (reading is None and bool(low.min() >= 0 and high.max() <= 1))


def _reading_note(low: Any, high: Any, reading: str | None) -> str | None:
    """Return what the page says of how single scores were read, where no loss of torch tells."""
    if reading is not None:
        return None
    if _is_probability(low, high, reading):
        return "Scores were read as probabilities (above 0.5 is class 1), since all lie between 0 and 1."
    return "Scores were read as logits (above 0 is class 1), since not all lie between 0 and 1."


def _of_single_scores(score: Any, targets: Any, reading: str | None) -> tuple[Any, Any, Any]:
    """Return predictions, -log p of the targets and log p of the predictions, of one score per sample."""
    with numpy.errstate(divide="ignore", over="ignore"):
        if _is_probability(score, score, reading):
            predictions = (score > 0.5).astype(int)
            logs = numpy.log(numpy.stack([1 - score, score]))
        else:
            predictions = (score > 0).astype(int)
            logs = -numpy.logaddexp(0, numpy.stack([score, -score]))
    places = numpy.arange(len(score))
    return predictions, -logs[targets.clip(0, 1), places], logs[predictions, places]


def _class_axis(axes: set[tuple[int, ...]]) -> tuple[int, str | None]:
    """Return the axis of the classes: the only one that some micro-batch allows, or the likely one, with a note."""
    certain = {one[0] for one in axes if len(one) == 1}
    if len(certain) > 1:
        raise ValueError(
            'report="classification" needs the classes on one axis of the outputs; by their shapes it is axis 1 in '
            "some batches and the last axis in others. Let the model return (batch, classes, ...) for all."
        )
    if certain:
        return certain.pop(), None
    axis = max(one[0] for one in axes)
    name, other = ("axis 1", "the last axis") if axis == 1 else ("the last axis", "axis 1")
    return axis, f"Classes were read along {name} of the outputs; by their shapes it might be {other} too."


def _of_parts(
    columns: dict[str, Any], tables: Any, names: list[str], reading: str | None, axes: set[tuple[int, ...]]
) -> Details:
    """Return the details where each sample has many targets, such as its pixels."""
    if "low" in columns:
        limits = columns["low"], columns["high"]
        which, note = int(_is_probability(*limits, reading)), _reading_note(*limits, reading)
    else:
        axis, note = _class_axis(axes)
        which = CLASS_AXES.index(axis)
    table, num_parts, num_wrong = tables[which], columns["num_parts"][:, which], columns["num_wrong"][:, which]
    codes = numpy.flatnonzero(table[:-1])
    details = _confusion(codes, table[codes], names, "parts of samples (pixels, tokens)", int(table[-1]))
    shares = num_wrong / numpy.maximum(num_parts, 1)
    wrong = numpy.flatnonzero(num_wrong)
    wrong = wrong[numpy.argsort(-shares[wrong], kind="stable")][:NUM_WRONG]
    shown = [
        {
            "target": "",
            "prediction": "",
            "note": f"{num_wrong[position]:,} of {num_parts[position]:,} parts wrong ({100 * shares[position]:.3g} %)",
        }
        for position in wrong
    ]
    return details | {"reading": note, "wrong": _with_positions(wrong, shown)}


def _with_positions(positions: Any, shown: list[dict[str, str]]) -> list[Details]:
    nothing = {"picture": None, "text": None}
    return [{"index": int(position), **one, **nothing} for position, one in zip(positions, shown, strict=True)]


def _confusion(codes: Any, counts: Any, names: list[str], unit: str, num_left_out: int) -> Details:
    """Return matrix and scores, of how often each pair `target * classes + prediction` occurs."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_recall_fscore_support

    if not counts.sum():
        raise ValueError('report="classification" needs at least one sample with a target; all are left out.')
    num_classes = len(names)
    targets, predictions = numpy.divmod(codes, num_classes)
    given = {"y_true": targets, "y_pred": predictions, "sample_weight": counts}
    is_small = num_classes <= FEW_CLASSES
    labels = numpy.arange(num_classes) if is_small else numpy.unique(numpy.concatenate([targets, predictions]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without samples, which count 0
        scores = precision_recall_fscore_support(**given, labels=labels, zero_division=0)
        macro = precision_recall_fscore_support(**given, average="macro", zero_division=0)
        weighted = precision_recall_fscore_support(**given, average="weighted", zero_division=0)
        summary = [
            ["accuracy", accuracy_score(**given)],
            ["balanced accuracy", balanced_accuracy_score(**given)],
            ["macro precision", macro[0]],
            ["macro recall", macro[1]],
            ["macro F1", macro[2]],
            ["weighted F1", weighted[2]],
        ]
    rows = [[names[label], *row] for label, *row in zip(labels, *(score.tolist() for score in scores), strict=True)]
    rows = [[name, precision, recall, f1, round(support)] for name, precision, recall, f1, support in rows]
    if len(rows) > _MOST_ROWS:
        rows = sorted(rows, key=lambda row: row[3])[:_MOST_ROWS]  # the worst
    totals = numpy.bincount(targets, weights=counts, minlength=num_classes)
    mistakes = numpy.flatnonzero(targets != predictions)
    mistakes = mistakes[numpy.argsort(-counts[mistakes], kind="stable")][:_NUM_CONFUSIONS]
    return {
        "kind": "classification",
        "unit": unit,
        "num_counted": int(counts.sum()),
        "num_left_out": num_left_out,
        "num_classes": num_classes,
        "summary": [[name, float(value)] for name, value in summary],
        "per_class": rows,
        "matrix": _matrix(targets, predictions, counts, num_classes) if is_small else None,
        "picture": None if is_small else _picture(targets, predictions, counts, num_classes),
        "confusions": [
            [names[targets[one]], names[predictions[one]], int(counts[one]), float(counts[one] / totals[targets[one]])]
            for one in mistakes
        ],
    }


def _matrix(targets: Any, predictions: Any, counts: Any, num_classes: int) -> list[list[int]]:
    from sklearn.metrics import confusion_matrix

    labels = numpy.arange(num_classes)
    matrix: Any = confusion_matrix(targets, predictions, labels=labels, sample_weight=counts)
    return matrix.astype(int).tolist()  # type: ignore[no-any-return]


def _picture(targets: Any, predictions: Any, counts: Any, num_classes: int) -> str:
    """Return a large matrix as a picture: the darker a point, the larger its share of the row; classes may share one.

    What is right is blue, what is wrong is orange, on a ground that is left transparent.
    """
    from PIL import Image

    per_point = math.ceil(num_classes / _SIDE)
    side = math.ceil(num_classes / per_point)
    grid = numpy.zeros((side, side))
    numpy.add.at(grid, (targets // per_point, predictions // per_point), counts)
    shares = grid / numpy.maximum(grid.sum(axis=1, keepdims=True), 1)
    pixels = numpy.empty((side, side, 4), dtype=numpy.uint8)
    pixels[..., :3] = (207, 90, 0)
    pixels[numpy.arange(side), numpy.arange(side), :3] = (9, 105, 218)
    pixels[..., 3] = numpy.where(grid > 0, 95 + 160 * numpy.sqrt(shares), 0).round()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# --- regression -------------------------------------------------------------------------------------------------------


def _regression(columns: dict[str, Any]) -> Details:
    targets, predictions = columns["target"].astype(float), columns["prediction"].astype(float)
    is_known = numpy.isfinite(targets).all(axis=1) & numpy.isfinite(predictions).all(axis=1)
    if not is_known.any():
        raise ValueError('report="regression" needs at least one sample with finite numbers; there is none.')
    places = numpy.flatnonzero(is_known)
    targets, predictions = targets[is_known], predictions[is_known]
    residuals = targets - predictions
    names = [f"target {number}" for number in range(1, targets.shape[1] + 1)] if targets.shape[1] > 1 else ["target"]
    spread = targets.std(axis=0)
    sizes = numpy.abs(residuals) / numpy.where(spread > 0, spread, 1)
    worst = sizes.argmax(axis=1)  # of its targets
    wrong = numpy.argsort(-sizes.max(axis=1), kind="stable")[:NUM_WRONG]
    wrong = wrong[sizes.max(axis=1)[wrong] > 0]
    shown = [
        {
            "target": f"{targets[one, worst[one]]:.4g}" + (f" ({names[worst[one]]})" if len(names) > 1 else ""),
            "prediction": f"{predictions[one, worst[one]]:.4g}",
            "note": f"residual {residuals[one, worst[one]]:+.4g}",
        }
        for one in wrong
    ]
    charts = [_chart(name, predictions[:, place], residuals[:, place]) for place, name in enumerate(names)]
    return {
        "kind": "regression",
        "num_counted": len(places),
        "num_left_out": int((~is_known).sum()),
        "table": _errors(targets, predictions, names),
        "charts": charts[:_NUM_CHARTS],
        "wrong": _with_positions(places[wrong], shown),
    }


def _errors(targets: Any, predictions: Any, names: list[str]) -> list[list[Any]]:
    """Return name, R2, MAE and RMSE of each target, and of all where there are several."""
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    columns = [(name, targets[:, place], predictions[:, place]) for place, name in enumerate(names)]
    if len(names) > 1:
        columns.append(("mean of all", targets, predictions))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of R2 of a single sample, which is nan
        functions = (r2_score, mean_absolute_error, root_mean_squared_error)
        return [[name, *(float(function(*pair)) for function in functions)] for name, *pair in columns]


def _chart(name: str, predictions: Any, residuals: Any) -> Details:
    """Return residuals against predictions, as points or counted in cells, and the histogram of the residuals."""
    x, y = _edges(predictions, _CELLS[0]), _edges(residuals, _CELLS[1])
    points: list[list[float]] | None = None
    cells: list[list[int]] = []
    if len(predictions) <= _MOST_POINTS:
        order = numpy.argsort(predictions, kind="stable")
        pairs = zip(predictions[order].tolist(), residuals[order].tolist(), strict=True)
        points = [[float(f"{one:.6g}") for one in pair] for pair in pairs]
    else:
        counts, _, _ = numpy.histogram2d(predictions, residuals, bins=[x, y])
        cells = [[int(i), int(j), int(counts[i, j])] for i, j in numpy.argwhere(counts)]
    bars = _edges(residuals, _BARS)
    return {
        "name": name,
        "points": points,
        "cells": cells,
        "x": [float(x[0]), float(x[-1])],
        "y": [float(y[0]), float(y[-1])],
        "histogram": numpy.histogram(residuals, bins=bars)[0].tolist(),
        "range": [float(bars[0]), float(bars[-1])],
    }


def _edges(values: Any, number: int) -> Any:
    """Return the edges of bins that hold all values."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        half = max(abs(low) * 1e-3, 1e-6)
        low, high = low - half, high + half
    return numpy.linspace(low, high, number + 1)


def num_cells() -> tuple[int, int]:
    """Return into how many columns and rows of cells many samples are counted."""
    return _CELLS


# --- what is read back ------------------------------------------------------------------------------------------------

_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
_WRONG = {
    **{"index": (int, str), "target": str, "prediction": str, "note": str},
    **{"picture": (_PICTURE, None), "text": (str, None)},
}
_SAID = {
    "kind": str,
    "num_samples": int,
    "num_counted": int,
    "num_left_out": int,
    "index_of": str,
    "wrong": [_WRONG, ...],
}
_PAIR = [math.isfinite, math.isfinite]
_CHART = {
    **{"name": str, "points": ([_PAIR, ...], None), "cells": [[int, int, int], ...]},
    **{"x": _PAIR, "y": _PAIR, "histogram": [int, ...], "range": _PAIR},
}
_FORMS: dict[Any, Any] = {
    "classification": _SAID
    | {"unit": str, "num_classes": int, "reading": (str, None), "summary": [[str, float], ...]}
    | {"matrix": ([[int, ...], ...], None), "picture": (_PICTURE, None)}
    | {"per_class": [[str, float, float, float, int], ...], "confusions": [[str, str, int, float], ...]},
    "regression": _SAID | {"table": [[str, float, float, float], ...], "charts": [_CHART, ...]},
}


def is_details(value: Any) -> bool:
    """Return whether something read from a file has the form of details, so that it can be shown."""
    form = _FORMS.get(value.get("kind")) if isinstance(value, dict) and isinstance(value.get("kind"), str) else None
    if form is None or not fits(value, form):
        return False
    return all(value[name] for name in ("table", "charts", "per_class") if name in value)  # none of them is ever empty
