"""The pictures of an evaluation's report: classification.png or regression.png, and wrong_samples.png."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

from .assessment import Details, num_cells
from .sections import number

_BLUE, _ORANGE, _QUIET = "#0969da", "#cf5a00", "#57606a"


def draw_assessment(path: Path, details: Details) -> None:
    """Draw what an evaluation has found, as PNG."""
    (_draw_classification if details["kind"] == "classification" else _draw_regression)(path, details)


def draw_wrong_samples(path: Path, details: Details) -> None:
    """Draw the pictures of the most wrong samples, each with its index, target and prediction, as PNG."""
    from matplotlib.image import imread

    shown = [one for one in details["wrong"] if one["picture"] is not None]
    num_rows = -(-len(shown) // 4)
    figure = _figure(8.0, 2.6 * num_rows)
    for place, one in enumerate(shown, start=1):
        axes = figure.add_subplot(num_rows, 4, place)
        axes.imshow(imread(io.BytesIO(base64.b64decode(one["picture"].partition(",")[2])), format="png"))
        axes.set_axis_off()
        said = (
            f"{one['target']}\nseen as {one['prediction']}"
            if one["target"]
            else one["note"].replace(" parts", "\nparts")
        )
        title = f"{one['index']}: {said}"
        axes.set_title("\n".join(_short(line, 30) for line in title.split("\n")), fontsize=8, parse_math=False)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    # LaTeX, chosen for papers, may not be on this machine; names of classes may have letters that the font lacks.
    with rc_context({"text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(path, format="png", dpi=150)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _draw_classification(path: Path, details: Details) -> None:
    """Draw the confusion matrix, with numbers or as a picture, and beside it F1 by class, or what is confused most."""
    scores, is_small = dict(details["summary"]), details["matrix"] is not None
    side = max(4.2, 0.42 * details["num_classes"]) if is_small else 5.5
    figure = _figure(2 * side, side)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    figure.suptitle(f"accuracy {number(scores['accuracy'])}, macro F1 {number(scores['macro F1'])}", fontsize=13)
    if is_small:
        _draw_matrix(left, details)
        _draw_bars(right, details["per_class"])
    else:
        _draw_large_matrix(left, details)
        _draw_confusions(right, details["confusions"])
    left.set_xlabel("prediction", fontsize=12)
    left.set_ylabel("target", fontsize=12)
    _save(figure, path)


def _draw_matrix(axes: Any, details: Details) -> None:
    matrix, names = details["matrix"], [_short(row[0], 16) for row in details["per_class"]]
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(matrix):
        for x, count in enumerate(row):
            if count:
                colour = "white" if shares[y][x] > 0.5 else "black"
                size = 9 if len(names) <= 12 and count < 10_000 else 7
                axes.text(x, y, f"{count}", ha="center", va="center", color=colour, fontsize=size)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0, parse_math=False)
    axes.set_yticks(places, names, parse_math=False)


def _draw_bars(axes: Any, rows: list[list[Any]]) -> None:
    places = range(len(rows))
    axes.barh(places, [row[3] for row in rows], color=_BLUE)
    axes.set_yticks(places, [_short(row[0], 16) for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1", fontsize=12)
    axes.grid(axis="x", alpha=0.3)


def _draw_large_matrix(axes: Any, details: Details) -> None:
    from matplotlib.image import imread

    picture = imread(io.BytesIO(base64.b64decode(details["picture"].partition(",")[2])), format="png")
    edge = details["num_classes"]
    axes.imshow(picture, extent=(0, edge, edge, 0), interpolation="nearest")


def _draw_confusions(axes: Any, confusions: list[list[Any]]) -> None:
    axes.set_axis_off()
    lines = [
        f"{_short(target, 22)} seen as {_short(prediction, 22)}: {count} ({share:.0%})"
        for target, prediction, count, share in confusions
    ]
    text = "\n".join(["confused most often:", "", *lines])
    axes.text(0, 1, text, va="top", fontsize=9, linespacing=1.5, parse_math=False, transform=axes.transAxes)


def _draw_regression(path: Path, details: Details) -> None:
    """Draw residuals against predictions, and their histogram, for each target."""
    charts, rows = details["charts"], details["table"]
    figure = _figure(10.0, 3.8 * len(charts))
    grid = figure.subplots(len(charts), 2, squeeze=False, width_ratios=(1.5, 1))
    for (left, right), chart, (name, r2, mae, rmse) in zip(grid, charts, rows, strict=False):
        title = f"{name}: " * (len(charts) > 1) + f"R2 {number(r2)}, MAE {number(mae)}, RMSE {number(rmse)}"
        left.set_title(title, fontsize=12, parse_math=False)
        _draw_residuals(left, chart)
        low, high = chart["range"]
        width = (high - low) / len(chart["histogram"])
        starts = [low + place * width for place in range(len(chart["histogram"]))]
        right.bar(starts, chart["histogram"], width=width, align="edge", color=_BLUE)
        right.axvline(0, color=_QUIET, linestyle="--", linewidth=1.2)
        right.set_xlabel("residual = target - prediction", fontsize=11)
        right.set_ylabel("samples", fontsize=11)
    _save(figure, path)


def _draw_residuals(axes: Any, chart: Details) -> None:
    if chart["points"] is not None:
        axes.scatter(*zip(*chart["points"], strict=True), s=10, alpha=0.5, color=_BLUE, linewidths=0)
    else:
        import numpy
        from matplotlib.colors import LogNorm

        columns, rows = num_cells()
        counts = numpy.full((rows, columns), numpy.nan)
        for x, y, count in chart["cells"]:
            counts[y, x] = count
        extent = (*chart["x"], *chart["y"])
        shown = axes.imshow(
            counts, origin="lower", extent=extent, aspect="auto", cmap="viridis_r", norm=LogNorm(vmin=1)
        )
        axes.figure.colorbar(shown, ax=axes, label="samples per cell")
    axes.axhline(0, color=_ORANGE, linestyle="--", linewidth=1.2)
    axes.set_xlabel("prediction", fontsize=11)
    axes.set_ylabel("residual", fontsize=11)
    axes.grid(alpha=0.3)
