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
from typing import Any

from ..base.codec import checked, encode, flattened, unpack, with_checksum
from ..base.console import warn
from ..base.extras import is_installed, require
from ..history import PARTS_OF_EPOCH, SERIES, History
from ..storage.files import write_whole
from ..storage.run_folder import is_in_use


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run folder say.

    Attributes:
        state: `running`, `finished`, `interrupted`, `failed`, `pruned`, or `broken` where the run left no sign of its
            end.
        asked: The user's choices by name.
        resolved: What these choices were resolved to.
        identity: What a resumed run must share: model, data, loss, optimizer, scheduler.
        changed: When the history was last written, in seconds since 1970.
    """

    name: str
    path: Path
    history: History
    state: str
    asked: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
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
            **{name: config.get(name, {}) for name in ("asked", "resolved", "identity")},
            environment=_read(path / "environment.json", {}),
            evaluations=_read(path / "evaluations.json", []),
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


# File -> the types that its entries must have.
_TYPES: dict[str, dict[str, Any]] = {
    "config.json": {"asked": dict, "resolved": dict, "identity": dict},
    "environment.json": {"versions": dict},
    "failed.json": {"state": str, "reason": str},
    "evaluations.json": {"num_samples": int | None, "epoch": int | None, "scores": dict},
}


def _read(path: Path, default: Any) -> Any:
    """Return the content of a JSON file, a dictionary or a list of them like the default, its checksums checked."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if type(content) is not type(default):
            raise ValueError(f"it holds a {type(content).__name__}, not a {type(default).__name__}")
        records = [unpack(checked(record)) for record in (content if isinstance(content, list) else [content])]
        for record in records:
            for name, kind in _TYPES[path.name].items():
                if not isinstance(record.get(name, ...), kind):
                    raise ValueError(f"its {name} is {record.get(name)!r}")
        return records if isinstance(content, list) else records[0]
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


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


def keep_evaluation(page: LivePage, num_samples: int | None, epoch: int | None, scores: Mapping[str, float]) -> None:
    """Put an evaluation of the trained model last in `evaluations.json`, in place of an equal entry.

    The number of samples is `None` for a stream; the epoch is the one whose weights the model has.
    """
    path = page.path.with_name("evaluations.json")
    entry = {"num_samples": num_samples, "epoch": epoch, "scores": scores}
    try:
        entries = [other for other in _read(path, []) if other != entry] + [entry]
        kept = [with_checksum(encode(one)) for one in entries]
        write_whole(path, (json.dumps(kept, indent=2) + "\n").encode())
        page.write(page.state)
    except Exception as error:  # a page that a library cannot make is no error of the evaluation
        warn(f"Could not write {path}: {error}.", stacklevel=3)


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
    page: str = _template().render(
        mark=_MARK,
        runs=records,
        is_running=is_running,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        cards=_cards(first) if is_one else [],
        tables=_tables(first) if is_one else _differences(records),
        data={
            "charts": _charts(first) if is_one else _overlays(records),
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


def _chart(num_epochs: int, title: str, unit: str, curves: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    every = max(1, math.ceil(num_epochs / _MANY_EPOCHS))
    for curve in curves:
        values = [value if math.isfinite(value) else None for value in curve["values"]]
        curve["values"] = (values + [None] * (num_epochs - len(values)))[::every]
    return {"title": title, "unit": unit, "epochs": list(range(1, num_epochs + 1, every)), "series": curves} | more


def _named_series(history: History) -> dict[str, list[float]]:
    """Return what was measured per epoch, metrics too, by name; names without a value are left out."""
    known = {name: getattr(history, series) for name, series in SERIES.items()} | history.metrics
    return {name: values for name, values in known.items() if values}


def _charts(record: RunFiles) -> list[dict[str, Any]]:
    """Return the charts of one run: loss, metrics, learning rate, gradient norm, throughput, time."""
    history, series = record.history, _named_series(record.history)
    charts = []

    def add(title: str, unit: str, labels: Mapping[str, str], **more: Any) -> None:
        curves: list[dict[str, Any]] = [
            {"label": label, "values": series[name]} for name, label in labels.items() if name in series
        ]
        if history.best_epoch is not None and curves and not more.get("stacked"):
            curves[-1] |= {"best": history.best_epoch, "mark": f"best: epoch {history.best_epoch}"}
        if curves:
            charts.append(_chart(history.num_epochs, title, unit, curves, **more))

    add("Loss", "", {"train_loss": "train loss", "test_loss": "test loss"}, gap="test_loss" in series)
    for name in history.metrics:
        add(name, "", {name: name})
    for name, (title, unit) in _TITLES.items():
        add(title, unit, {name: title.lower()})
    parts = {name: name.removesuffix("_seconds") for name in PARTS_OF_EPOCH}
    add("Where the time went", "seconds per epoch", parts, stacked=True)
    return charts


def _overlays(records: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return one chart per quantity, with a curve of each run."""
    per_run = [_named_series(record.history) for record in records]
    names = dict.fromkeys(name for series in per_run for name in series if not name.endswith("_seconds"))
    longest = max(record.history.num_epochs for record in records)
    charts = []
    for name in [*names, "epoch_seconds"]:
        curves = []
        for colour, (record, series) in enumerate(zip(records, per_run, strict=True)):
            best = record.history.best_epoch if name == record.monitor else None
            if name in series:
                curves.append({"label": record.name, "values": series[name], "colour": colour, "best": best})
        if curves:
            title, unit = _TITLES.get(name, (name.replace("_", " ").capitalize(), ""))
            charts.append(_chart(longest, title, unit, curves))
    return charts


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
        cards.append((f"its {record.monitor.replace('_', ' ')}", _number(history.best_value)))
    if record.evaluations:
        cards += [(f"final {name}", _number(value)) for name, value in record.evaluations[-1]["scores"].items()]
    if history.epoch_seconds:
        cards.append(("time", duration(sum(history.epoch_seconds))))
    if history.samples_per_second:
        cards.append(("samples per second", f"{history.samples_per_second[-1]:,.0f}"))
    return cards


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Return seconds as people say them: `0.042 s`, `4.2 s`, `3 min 05 s`, `2 h 03 min`."""
    if seconds < 1 or not math.isfinite(seconds):
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


_Table = tuple[str, bool, list[str], list[list[str]]]  # heading, whether it is open, header, rows


def _tables(record: RunFiles) -> list[_Table]:
    tables: list[_Table] = []
    if record.evaluations:
        names = list(dict.fromkeys(name for evaluation in record.evaluations for name in evaluation["scores"]))
        rows = []
        for evaluation in record.evaluations:
            num_samples, scores = evaluation["num_samples"], evaluation["scores"]
            data = "a stream" if num_samples is None else f"{num_samples:,} samples"
            rows.append([data, f"epoch {evaluation['epoch']}", *(repr(scores.get(name, "")) for name in names)])
        tables.append(("Final evaluation", True, ["of", "weights of", *names], rows))
    environment = {name: value for name, value in record.environment.items() if value is not None}
    machine = {name: environment.pop(name) for name in ("hardware", "platform", "python") if name in environment}
    identity = {name: value for name, value in record.identity.items() if name not in record.asked}
    for heading, is_open, values in (
        ("Hardware and versions", True, machine | environment.pop("versions", {}) | environment),
        ("Config", False, record.asked),
        ("What it was resolved to", False, record.resolved | identity),
    ):
        tables.append((heading, is_open, [], [[name, _shown(value)] for name, value in values.items()]))
    return tables


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={inner}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _differences(records: Sequence[RunFiles]) -> list[_Table]:
    """Return what the results of several runs are, and what differs in their configs and machines."""
    results: dict[str, list[Any]] = {
        "state": [record.state for record in records],
        "how it ended": [record.outcome for record in records],
        "epochs": [record.history.num_epochs for record in records],
        "monitored": [record.monitor for record in records],
        "best epoch": [record.history.best_epoch for record in records],
        "best value": [record.history.best_value for record in records],
        "time": [duration(sum(record.history.epoch_seconds)) for record in records],
    }
    finals = [record.evaluations[-1]["scores"] if record.evaluations else {} for record in records]
    for name in dict.fromkeys(name for scores in finals for name in scores):
        results[f"final {name}"] = [scores.get(name, "-") for scores in finals]
    facts = [_facts(record) for record in records]
    names = dict.fromkeys(name for run in facts for name in run if name != "run_dir")  # which always differs
    differing = [
        [name, *(run.get(name, "-") for run in facts)] for name in names if len({run.get(name) for run in facts}) > 1
    ]
    header = ["", *(record.name for record in records)]
    rows = [[name, *map(_number, values)] for name, values in results.items()]
    return [("Results", True, header, rows), ("What differs", True, header, differing)]


def _facts(record: RunFiles) -> dict[str, str]:
    """Return what could distinguish a run from other runs."""
    nested = record.identity | record.asked | record.resolved | record.environment
    facts = {name: _shown(value) for name, value in flattened(nested).items()}
    if "hardware" in facts:  # shown without the sources of its choices
        facts["hardware"] = re.sub(r" \([^()]*\)", "", facts["hardware"])
    return facts
