"""The page of a run, or of several side by side: one self-contained HTML file."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import EllipsisType
from typing import Any

from ..base.codec import checked, encode, flattened, unpack, with_checksum
from ..base.console import warn
from ..base.extras import is_installed, require
from ..history import PARTS_OF_EPOCH, SERIES, History
from ..storage.files import put_in_place, write_whole
from ..storage.run_folder import is_in_use
from .assessment import Details, is_details
from .assessment_pictures import draw_assessment, draw_wrong_samples
from .described import LAYERS, OPTIMIZER
from .forms import Form, fits
from .sections import (
    Table,
    assessment,
    by_index,
    compared,
    described_evaluations,
    described_model,
    number,
    without_index,
)
from .steps import Steps, steps_of


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run folder say.

    Attributes:
        state: `running`, `finished`, `interrupted`, `failed`, `pruned`, or `broken` where the run left no sign of its
            end.
        asked: The user's choices by name.
        resolved: What these choices were resolved to.
        identity: What a resumed run must share: model, data, loss, optimizer, scheduler.
        layers: The layers of the model, as `layers_of` describes them.
        optimizer: The optimizer's settings, as `optimizer_of` describes them.
        steps: What was measured by step.
        changed: When the history was last written, in seconds since 1970.
    """

    name: str
    path: Path
    history: History
    state: str
    asked: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    layers: list[list[Any]] = field(default_factory=list)
    optimizer: dict[str, Any] = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)
    environment: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    changed: float = 0.0

    @classmethod
    def load(
        cls, run_dir: str | os.PathLike[str], history: History | None = None, state: str | None = None
    ) -> RunFiles:
        """Read a run folder, also its history and state where they are `None`.

        Raises:
            ValueError: A file is not as this package writes it; the message names the file.
        """
        path = Path(run_dir).expanduser().absolute()
        history = History.load(path) if history is None else history
        config = _read(path / "config.json", {})
        failure = {} if history.stop_reason is not None else _read(path / "failed.json", {})
        if failure:
            history.end(failure["reason"])
        return cls(
            name=path.name,
            path=path,
            history=history,
            state=state or _state_of(path, history, failure.get("state")),
            **{name: config.get(name, {}) for name in ("asked", "resolved", "identity", "optimizer")},
            layers=config.get("layers", []),
            steps=steps_of(history),
            environment=_read(path / "environment.json", {}),
            evaluations=_told_apart(_read(path / "evaluations.json", [])),
            changed=(path / "history.jsonl").stat().st_mtime if (path / "history.jsonl").exists() else time.time(),
        )

    @property
    def monitor(self) -> str:
        """Name of the value that chose the best epoch."""
        return str(self.resolved.get("monitor", self.asked.get("monitor", "test_loss")))

    @property
    def outcome(self) -> str:
        """Why the run ended, or how far it has come, in words."""
        if self.history.stop_reason is not None:
            return self.history.stop_reason
        of = f" of {self.asked['num_epochs']}" if "num_epochs" in self.asked else ""
        done = f"{self.history.num_epochs}{of} epochs done"
        return f"{done}; it ended without a word, killed perhaps" if self.state == "broken" else done


# File -> the forms that its entries must have. A config of an older version has no layers and no optimizer.
_FORMS: dict[str, dict[str, Form]] = {
    "config.json": {
        **{"asked": dict, "resolved": dict, "identity": dict},
        **{"layers": (LAYERS, EllipsisType), "optimizer": (OPTIMIZER, EllipsisType)},
    },
    "environment.json": {"versions": dict},
    "failed.json": {"state": str, "reason": str},
    "evaluations.json": {
        **{"data": str, "dataset": str, "num_samples": (int, None), "epoch": (int, None), "scores": dict},
        "details": (dict, None),
    },
}


def _read(path: Path, default: Any) -> Any:
    """Return the content of a JSON file, a dictionary or a list of them like the default, its checksums checked."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if type(content) is not type(default):
            raise ValueError(f"it holds a {type(content).__name__}, not a {type(default).__name__}")
        records = [unpack(checked(record)) for record in (content if isinstance(content, list) else [content])]
        for record in records:
            for name, form in _FORMS[path.name].items():
                if not fits(record.get(name, ...), form):
                    raise ValueError(f"its {name} is {record.get(name)!r}")
            if record.get("details") is not None and not is_details(record["details"]):
                raise ValueError("its details are not those of an evaluation")
        return records if isinstance(content, list) else records[0]
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def _told_apart(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return evaluations whose data have names of their own: of several that are `final`, the second is `final (2)`."""
    names: list[str] = []
    for evaluation in evaluations:
        name, number = evaluation["data"], 1
        while name in names:
            number += 1
            name = f"{evaluation['data']} ({number})"
        names.append(name)
    return [{**one, "data": name} for one, name in zip(evaluations, names, strict=True)]


def seen_from(path: Path, folder: str | os.PathLike[str] = ".") -> str:
    """Return a path as seen from a folder; the whole path where the folder is gone or on another drive."""
    try:
        return os.path.relpath(path, folder)
    except (OSError, ValueError):
        return str(path)


def _state_of(path: Path, history: History, how_it_failed: str | None) -> str:
    if is_in_use(path):
        return "running"
    if how_it_failed is not None:
        return how_it_failed
    if (path / "preempted.json").exists():
        return "interrupted"
    if (path / "nonfinite.json").exists():
        return "failed"
    return "broken" if history.stop_reason is None else "finished"


def runs_in(folder: str | os.PathLike[str], left_out: Callable[[str], object] = lambda message: None) -> list[RunFiles]:
    """Return the runs in a folder and below it, the newest first; `left_out` gets a message for each unreadable run."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    folders = [path.parent for path in folder.rglob("history.jsonl") if path.parent.parent.name != "checkpoints"]
    records = []
    for run_dir in folders:
        try:
            records.append(RunFiles.load(run_dir))
        except (OSError, ValueError) as error:
            left_out(f"{run_dir} is left out: {error}")
    return sorted(records, key=lambda record: record.changed, reverse=True)


class LivePage:
    """The page of a run, which `write` brings up to date at the end of an epoch.

    Writing takes milliseconds. Where epochs take no longer, `is_due` passes over some, so that the page costs less than
    a hundredth of the time.
    """

    _SHARE = 0.01

    def __init__(self, run_dir: Path, history: History, state: str = "running") -> None:
        self.path = run_dir / "report.html"
        self._history, self.state, self._not_before = history, state, 0.0

    def is_due(self) -> bool:
        """Return whether the page may be written again."""
        return time.perf_counter() >= self._not_before

    def write(self, state: str) -> None:
        """Write the page, whole or not at all; nothing without jinja2, as the start of the run has said."""
        self.state = state
        if not is_installed("jinja2"):
            return
        is_first = self._not_before == 0.0  # loads the template too
        started = time.perf_counter()
        try:
            text = render([RunFiles.load(self.path.parent, self._history, state)])
        except ValueError as error:  # somebody else has changed a file
            raise OSError(f"a file beside it cannot be read: {error!r}") from error
        write_whole(self.path, text.encode("utf-8", "replace"), flushed=False)
        ended = time.perf_counter()
        self._not_before = ended + (0.0 if is_first else (ended - started) / self._SHARE)


_NUM_DETAILED = 3  # evaluations, the last ones, of which the details are kept


def keep_evaluation(page: LivePage, entry: Mapping[str, Any], details: Details | None = None) -> None:
    """Put an evaluation of the trained model last in `evaluations.json`, in place of an equal one, and on the page.

    Args:
        page: Of the run.
        entry: `data` and `dataset`, what was evaluated in words; `num_samples`, `None` for a stream; `epoch`, whose
            weights the model has; `scores`.
        details: What a report shows of it; the folder then gets its pictures too.
    """
    path = page.path.with_name("evaluations.json")
    try:
        others = [other for other in _read(path, []) if other != {**entry, "details": other["details"]}]
        entries = [*others, {**entry, "details": details}]
        detailed = [one for one in entries if one["details"] is not None][-_NUM_DETAILED:]
        entries = [one if one in detailed else {**one, "details": None} for one in entries]
        lines = [json.dumps(with_checksum(encode(one))) for one in entries]
        write_whole(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
        if details is not None:
            _draw(path.parent, details)
        page.write(page.state)
    except Exception as error:  # a page that a library cannot make is no error of the evaluation
        warn(f"Could not write {path}: {error}.", stacklevel=3)


def _draw(folder: Path, details: Details) -> None:
    """Write the pictures of an evaluation; that of wrong samples goes where the last evaluation has none."""
    put_in_place(folder / f"{details['kind']}.png", lambda path: draw_assessment(path, details))
    if any(one["picture"] is not None for one in details["wrong"]):
        put_in_place(folder / "wrong_samples.png", lambda path: draw_wrong_samples(path, details))
    else:
        (folder / "wrong_samples.png").unlink(missing_ok=True)


_MARK = '<meta name="generator" content="accel_trainer">'


def is_page(path: Path) -> bool:
    """Return whether `render` has made a file."""
    return _MARK in path.read_text(encoding="utf-8", errors="replace")[:1000]


@functools.cache
def _template() -> Any:
    require("jinja2", no="page of a run")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "page"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    for name in ("uplot.js", "uplot.css", "charts.js", "style.css"):
        environment.globals[name.replace(".", "_")] = (folder / name).read_text(encoding="utf-8")
    return environment.get_template("report.html")


def render(records: Sequence[RunFiles]) -> str:
    """Return the page of one run, or of several side by side.

    Raises:
        ImportError: jinja2 is not installed; the message names the extra that brings it.
    """
    if len({record.name for record in records}) < len(records):
        records = [replace(record, name=seen_from(record.path)) for record in records]
    is_running = any(record.state == "running" for record in records)
    first, is_one = records[0], len(records) == 1
    evaluations, note = described_evaluations(first.evaluations, first.monitor != "train_loss")
    detailed = [one for one in reversed(first.evaluations) if one["details"] is not None] if is_one else []
    assessments = [assessment(one, f"assessment-{number}") for number, one in enumerate(detailed)]
    page: str = _template().render(
        mark=_MARK,
        runs=records,
        is_running=is_running,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        cards=_cards(first) if is_one else [],
        evaluations=evaluations if is_one and first.evaluations else None,
        note=note,
        assessments=[shown for shown, _ in assessments],
        tables=_tables(first) if is_one else _differences(records),
        data={
            "charts": [
                *(_charts(first) if is_one else _overlays(records)),
                *(one for _, of in assessments for one in of),
            ],
            "table": _epochs(first.history) if is_one else None,
            "is_running": is_running,
        },
    )
    return page


_TITLES = {
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm before clipping", ""),
    "samples_per_second": ("Throughput", "samples per second"),
}
_MANY_EPOCHS = 5_000  # in one chart; of more epochs, every second, third, ... is shown
_SHORT = 60.0  # seconds of a run whose time nobody asks about
_MOST_CURVES = 8  # of learning rates


def _chart(x: Sequence[int], title: str, unit: str, curves: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    every = 1 if "spanned" in more else max(1, math.ceil(len(x) / _MANY_EPOCHS))
    for curve in curves:
        values = [value if value is not None and math.isfinite(value) else None for value in curve["values"]]
        curve["values"] = (values + [None] * (len(x) - len(values)))[::every]
    basics = {"kind": "curves", "title": title, "unit": unit, "axis": "epoch", "place": "charts"}
    return basics | {"x": list(x)[::every], "series": curves} | more


def _named_series(history: History) -> dict[str, list[float]]:
    """Return what was measured per epoch, metrics too, by name; names without a value are left out."""
    known = {name: getattr(history, series) for name, series in SERIES.items()} | history.metrics
    known |= {f"train {name}": values for name, values in history.train_metrics.items()}
    return {name: values for name, values in known.items() if values}


def _by_set(history: History) -> dict[str, dict[str, str]]:
    """Return score -> test set -> name of its series; a single test set has an empty name."""
    sets = [name.removesuffix("/loss") for name in history.metrics if name.endswith("/loss")] or [""]
    found: dict[str, dict[str, str]] = {}
    for name in history.metrics:
        of = next((one for one in sets if name.startswith(f"{one}/")), "")
        found.setdefault(name.removeprefix(f"{of}/"), {})[of] = name
    return found


def _tables_by_index(record: RunFiles) -> list[Table]:
    """Return a table for each metric with a value for each index, which would be as many charts."""
    history, by_set = record.history, _by_set(record.history)
    last: dict[str, Any] = record.evaluations[-1] if record.evaluations else {"scores": {}}
    epochs = {f"best epoch ({history.best_epoch})": history.best_epoch} if history.best_epoch is not None else {}
    epochs["last epoch"] = history.num_epochs
    tables: list[Table] = []
    for metric, scores in by_index(by_set).items():
        sets = by_set[scores[0]]
        header = [f"{of}, {epoch}" if of else epoch for of in sets for epoch in epochs]
        header += [f"evaluation: {last['data']}"] if scores[0] in last["scores"] else []
        rows = []
        for score in scores:
            values = [history.metrics[name][epoch - 1] for name in by_set[score].values() for epoch in epochs.values()]
            values += [last["scores"][score]] if score in last["scores"] else []
            rows.append([score.rpartition("/")[2], *map(number, values)])
        tables.append((metric, True, ["index", *header], rows))
    return tables


def _charts(record: RunFiles) -> list[dict[str, Any]]:
    """Return the charts of one run: loss, metrics, learning rate, gradient norm, and the time of a long run."""
    history, series = record.history, _named_series(record.history)
    charts = []

    def add(title: str, unit: str, labels: Mapping[str, str], **more: Any) -> None:
        curves: list[dict[str, Any]] = [
            {"label": label, "values": series[name]} for name, label in labels.items() if name in series
        ]
        if history.best_epoch is not None and curves and not more.get("stacked"):
            curves[-1] |= {"best": history.best_epoch, "mark": f"best: epoch {history.best_epoch}"}
        if curves:
            charts.append(_chart(range(1, history.num_epochs + 1), title, unit, curves, **more))

    add("Loss", "", {"train_loss": "train loss", "test_loss": "test loss"}, gap="test_loss" in series)
    by_set = _by_set(history)
    for name in without_index(dict.fromkeys([*by_set, *history.train_metrics])):
        curves = {f"train {name}": f"train {name}"} | {key: key for key in by_set.get(name, {}).values()}
        add("Loss of each test set" if name == "loss" else name, "", curves)
    charts += _charts_by_step(record.steps)
    shown = ["grad_norm"] if record.steps.learning_rates or _is_constant(history.learning_rates) else list(_TITLES)[:2]
    shown += ["samples_per_second"] if _is_long(history) else []
    for name in shown:
        title, unit = _TITLES[name]
        add(title, unit, {name: title.lower()}, place="more")
    if _is_long(history):
        parts = {name: name.removesuffix("_seconds") for name in PARTS_OF_EPOCH}
        add("Where the time went", "seconds per epoch", parts, stacked=True, place="more")
    return charts


def _charts_by_step(steps: Steps) -> list[dict[str, Any]]:
    """Return the charts of loss and learning rates by step; groups of one learning rate share a curve."""
    charts = []
    if any(loss is not None for loss in steps.train_losses):
        curves: list[dict[str, Any]] = [{"label": "train loss", "values": steps.train_losses}]
        charts.append(_chart(steps.steps, "Train loss by step", "", curves, axis="step"))
    groups: dict[tuple[float | None, ...], list[int]] = {}
    for group, rates in enumerate(steps.learning_rates, start=1):
        groups.setdefault(tuple(rates), []).append(group)
    shown = [(list(rates), numbers) for rates, numbers in groups.items() if not _is_constant(rates)]
    if shown:
        shown += [(list(rates), numbers) for rates, numbers in groups.items() if _is_constant(rates)]
        curves = [{"label": _group_label(numbers, len(groups)), "values": rates} for rates, numbers in shown]
        charts.append(_chart(steps.steps, "Learning rate by step", "", curves[:_MOST_CURVES], axis="step"))
    return charts


def _group_label(numbers: Sequence[int], num_curves: int) -> str:
    if num_curves == 1:
        return "learning rate"
    if len(numbers) == 1:
        return f"group {numbers[0]}"
    return f"groups {', '.join(map(str, numbers[:3]))}{', ...' * (len(numbers) > 3)}"


def _is_constant(values: Sequence[float | None]) -> bool:
    return len(set(values)) <= 1


def _is_long(history: History) -> bool:
    return sum(history.epoch_seconds) >= _SHORT


def _overlays(records: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return one chart per quantity, with a curve of each run."""
    per_run = [_named_series(record.history) for record in records]
    are_long, have_rates = any(_is_long(record.history) for record in records), any(map(_rate_of, records))
    left_out = [] if are_long else ["samples_per_second"]
    left_out += ["learning_rate"] if have_rates else []
    names = dict.fromkeys(name for series in per_run for name in series if not name.endswith("_seconds"))
    longest = max(record.history.num_epochs for record in records)
    charts = []
    for name in [*(name for name in names if name not in left_out), *(["epoch_seconds"] if are_long else [])]:
        curves = []
        for colour, (record, series) in enumerate(zip(records, per_run, strict=True)):
            best = record.history.best_epoch if name == record.monitor else None
            if name in series:
                curves.append({"label": record.name, "values": series[name], "colour": colour, "best": best})
        if curves:
            title, unit = _TITLES.get(name, (name.replace("_", " ").capitalize(), ""))
            charts.append(_chart(range(1, longest + 1), title, unit, curves))
    charts += _overlay_by_step("Train loss by step", records, [record.steps.train_losses for record in records])
    return charts + _overlay_by_step("Learning rate by step", records, [_rate_of(record) for record in records])


def _rate_of(record: RunFiles) -> list[float | None]:
    """Return the learning rates by step of the last group whose rate changes, as a head's does; empty without one."""
    changing = [rates for rates in record.steps.learning_rates if not _is_constant(rates)]
    return changing[-1] if changing else []


def _overlay_by_step(
    title: str, records: Sequence[RunFiles], values: Sequence[list[float | None]]
) -> list[dict[str, Any]]:
    """Return a chart with a curve of each run that has one, over the steps of all; none if no run has."""
    steps = sorted(
        {step for record, curve in zip(records, values, strict=True) if curve for step in record.steps.steps}
    )
    curves = []
    for colour, (record, curve) in enumerate(zip(records, values, strict=True)):
        by_step = dict(zip(record.steps.steps, curve, strict=False))
        if curve:
            shown = [by_step.get(step) for step in steps]
            curves.append({"label": record.name, "values": shown, "colour": colour})
    return [_chart(steps, title, "", curves, axis="step", spanned=True)] if curves else []


def _epochs(history: History) -> dict[str, Any]:
    """Return the table of all epochs, with every digit."""
    series = _named_series(history)
    rows = [[str(epoch), *map(repr, row)] for epoch, row in enumerate(zip(*series.values(), strict=False), start=1)]
    return {"header": ["epoch", *series], "rows": rows}


def _cards(record: RunFiles) -> list[tuple[str, str]]:
    history, num_epochs = record.history, record.asked.get("num_epochs")
    cards = [("epochs", f"{history.num_epochs} of {num_epochs}" if num_epochs else str(history.num_epochs))]
    if history.best_epoch is not None:
        cards.append(("best epoch", str(history.best_epoch)))
        cards.append((f"its {record.monitor.replace('_', ' ')}", number(history.best_value)))
    if record.evaluations:
        last = record.evaluations[-1]
        cards += [(f"{last['data']} {name}", number(value)) for name, value in without_index(last["scores"]).items()]
    if history.epoch_seconds:
        cards.append(("time", duration(sum(history.epoch_seconds))))
    if history.learning_rates and _is_constant(history.learning_rates) and not record.steps.learning_rates:
        cards.append(("learning rate", f"{history.learning_rates[0]:.4g}"))
    if history.samples_per_second and _is_long(history):
        cards.append(("samples per second", f"{history.samples_per_second[-1]:,.0f}"))
    return cards


def duration(seconds: float) -> str:
    """Return seconds as people say them: `0.042 s`, `4.2 s`, `3 min 05 s`, `2 h 03 min`."""
    if seconds < 1 or not math.isfinite(seconds):
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _tables(record: RunFiles) -> list[Table]:
    tables = _tables_by_index(record) + described_model(record.layers, record.optimizer)
    environment = {name: value for name, value in record.environment.items() if value is not None}
    machine = {name: environment.pop(name) for name in ("hardware", "platform", "python") if name in environment}
    identity = {name: value for name, value in record.identity.items() if name not in record.asked}
    for heading, is_open, values in (
        ("Hardware and versions", False, machine | environment.pop("versions", {}) | environment),
        ("Config", False, record.asked),
        ("What it was resolved to", False, record.resolved | identity),
    ):
        tables.append((heading, is_open, [], [[name, _shown(value)] for name, value in values.items()]))
    return tables


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={inner}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _differences(records: Sequence[RunFiles]) -> list[Table]:
    """Return what the results of several runs are, beside those of the first, and what differs in their configs."""
    histories = [record.history for record in records]
    rows = [
        ["state", *(record.state for record in records)],
        ["how it ended", *(record.outcome for record in records)],
        ["monitored", *(record.monitor for record in records)],
        ["epochs", *compared([history.num_epochs for history in histories])],
        ["best epoch", *compared([history.best_epoch for history in histories])],
        ["best value", *compared([history.best_value for history in histories])],
        ["time", *compared([sum(history.epoch_seconds) for history in histories], duration)],
    ]
    scores = [_scores(record) for record in records]
    for name in dict.fromkeys(name for run in scores for name in run):
        rows.append([name, *compared([run.get(name) for run in scores])])
    facts = [_facts(record) for record in records]
    names = dict.fromkeys(name for run in facts for name in run if name != "run_dir")  # which always differs
    differing = [
        [name, *(run.get(name, "-") for run in facts)] for name in names if len({run.get(name) for run in facts}) > 1
    ]
    header = ["", *(record.name for record in records)]
    baseline = f"Results, and their differences to {records[0].name}, the baseline"
    return [(baseline, True, header, rows), ("What differs", True, header, differing)]


def _scores(record: RunFiles) -> dict[str, float]:
    """Return the last scores on each of a run's evaluated data, by the names of both."""
    scores: dict[str, float] = {}
    for evaluation in record.evaluations:
        scores |= {f"{evaluation['data']} {name}": value for name, value in evaluation["scores"].items()}
        details = evaluation["details"] or {}
        if details.get("kind") == "classification":
            summary = dict(details["summary"])
            main = {name: summary[name] for name in ("accuracy", "macro F1") if name in summary}
            scores |= {f"{evaluation['data']} {name}": value for name, value in main.items()}
        elif details:
            errors = zip(("R2", "MAE", "RMSE"), details["table"][-1][1:], strict=True)
            scores |= {f"{evaluation['data']} {name}": value for name, value in errors}
    return scores


def _facts(record: RunFiles) -> dict[str, str]:
    """Return what could distinguish a run from other runs."""
    nested = record.identity | record.asked | record.resolved | record.environment
    facts = {name: _shown(value) for name, value in flattened(nested).items()}
    if "hardware" in facts:  # shown without the sources of its choices
        facts["hardware"] = re.sub(r" \([^()]*\)", "", facts["hardware"])
    return facts
