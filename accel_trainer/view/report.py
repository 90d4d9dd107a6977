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
from types import NoneType
from typing import Any

from ..base.codec import checked, encode, flattened, unpack, with_checksum
from ..base.console import warn
from ..history import SERIES, History
from ..storage.files import write_whole
from ..storage.run_folder import is_in_use

_SECONDS = ("data_seconds", "compute_seconds", "evaluation_seconds", "saving_seconds")
_MANY_EPOCHS = 5_000  # of one chart; of more, every second, third, ... is shown


@dataclass(frozen=True)
class RunRecord:
    """What the files of a run folder tell.

    Attributes:
        name: Last part of the folder's path.
        path: The folder.
        history: Of the run so far.
        state: `running`, `finished`, `interrupted`, `failed`, or `broken` off without a word.
        asked: The user's choices by name.
        resolved: What they were resolved to.
        identity: What makes it the run that it is: model, data, loss, optimizer, scheduler.
        environment: Hardware, versions, command line.
        evaluations: Each with its number of samples and its scores.
        changed: When its history was last written, in seconds since 1970.
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
    ) -> RunRecord:
        """Read a run folder.

        Args:
            run_dir: The folder.
            history: Where it is known already; `None` reads it.
            state: Where it is known already; `None` finds out.

        Raises:
            FileNotFoundError: It is no run folder.
            ValueError: A file of it is not as this package writes it; the message names it.
        """
        path = Path(run_dir).expanduser().absolute()
        history = History.load(path) if history is None else history
        config = _read(path / "config.json", {})
        return cls(
            name=path.name,
            path=path,
            history=history,
            state=state or _state_of(path, history),
            asked=config.get("asked", {}),
            resolved=config.get("resolved", {}),
            identity=config.get("identity", {}),
            environment=_read(path / "environment.json", {}),
            evaluations=_read(path / "evaluations.json", []),
            changed=(path / "history.jsonl").stat().st_mtime if (path / "history.jsonl").exists() else time.time(),
        )

    @property
    def monitor(self) -> str:
        """Name of the value that chose the best epoch."""
        return str(self.resolved.get("monitor", self.asked.get("monitor", "test_loss")))

    @property
    def told(self) -> str:
        """How it ended, in words."""
        if self.history.stop_reason is not None:
            return self.history.stop_reason
        of = f" of {self.asked['num_epochs']}" if "num_epochs" in self.asked else ""
        done = f"{self.history.num_epochs}{of} epochs done"
        return f"{done}; it ended without a word, killed perhaps" if self.state == "broken" else done


# What the parts of a file have to be.
_KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "config.json": {"asked": (dict,), "resolved": (dict,), "identity": (dict,)},
    "environment.json": {"versions": (dict,)},
    "evaluations.json": {"num_samples": (int, NoneType), "epoch": (int, NoneType), "scores": (dict,)},
}


def _read(path: Path, default: Any) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if type(content) is not type(default):
            raise ValueError(f"it holds a {type(content).__name__}, not a {type(default).__name__}")
        parts = [_checked_parts(one, path.name) for one in (content if isinstance(content, list) else [content])]
        return parts if isinstance(content, list) else parts[0]
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def _checked_parts(content: Any, file: str) -> dict[str, Any]:
    parts: dict[str, Any] = unpack(checked(content))
    for name, kinds in _KINDS[file].items():
        if not isinstance(parts.get(name, ...), kinds):
            raise ValueError(f"its {name} is {parts.get(name)!r}")
    return parts


def seen_from(path: Path, folder: str | os.PathLike[str] = ".") -> str:
    """Return a path as seen from a folder; the whole, where that is gone or on another drive."""
    try:
        return os.path.relpath(path, folder)
    except (OSError, ValueError):
        return str(path)


def _state_of(path: Path, history: History) -> str:
    if is_in_use(path):
        return "running"
    if (path / "preempted.json").exists():
        return "interrupted"
    if (path / "nonfinite.json").exists():
        return "failed"
    return "broken" if history.stop_reason is None else "finished"


def runs_in(folder: str | os.PathLike[str], left_out: Callable[[str], object] = lambda told: None) -> list[RunRecord]:
    """Return the runs in a folder and below it, the newest first.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    records = []
    for path in folder.rglob("history.jsonl"):
        if path.parent.parent.name == "checkpoints":
            continue
        try:
            records.append(RunRecord.load(path.parent))
        except (OSError, ValueError) as error:
            left_out(f"{path.parent} is left out: {error}")
    return sorted(records, key=lambda record: record.changed, reverse=True)


class LivePage:
    """The page of a run that goes on, written anew at the end of its epochs.

    Writing takes milliseconds; where epochs take no longer, some go by unwritten, so that it costs less than a
    hundredth of the time. The last state is always written.

    Attributes:
        path: Of the page.
        state: What it shows the run to be.
    """

    _SHARE = 0.01

    def __init__(self, run_dir: Path, history: History) -> None:
        self.path = run_dir / "report.html"
        self._run_dir, self._history = run_dir, history
        self._not_before = 0.0
        self.state = "running"

    def is_due(self) -> bool:
        """Return whether it may be written again."""
        return time.perf_counter() >= self._not_before

    def write(self, state: str) -> None:
        """Write it, whole or not at all.

        Raises:
            OSError: It could not be written.
        """
        self.state = state
        is_first = self._not_before == 0.0  # which loads the template too
        started = time.perf_counter()
        try:
            text = render([RunRecord.load(self._run_dir, self._history, state)])
        except ValueError as error:  # a file that someone else has changed
            raise OSError(f"a file beside it cannot be read: {error!r}") from error
        write_whole(self.path, text.encode("utf-8", "replace"), flushed=False)
        ended = time.perf_counter()
        self._not_before = ended + (0.0 if is_first else (ended - started) / self._SHARE)


def page_of(record: RunRecord) -> LivePage:
    """Return the page of a run that has ended."""
    page = LivePage(record.path, record.history)
    page.state = record.state
    return page


def keep_evaluation(page: LivePage, num_samples: int | None, epoch: int | None, scores: Mapping[str, float]) -> None:
    """Add an evaluation of the trained model to its run folder; one that is there already is put last.

    Args:
        page: Of the run.
        num_samples: How many were evaluated; `None` for a stream.
        epoch: Whose weights the model has.
        scores: Loss and metrics by name.
    """
    path, entry = (
        page.path.with_name("evaluations.json"),
        {"num_samples": num_samples, "epoch": epoch, "scores": scores},
    )
    try:
        others = [one for one in _read(path, []) if one != entry]
        kept = [with_checksum(encode(one)) for one in [*others, entry]]
        write_whole(path, (json.dumps(kept, indent=2) + "\n").encode())
        page.write(page.state)
    except Exception as error:  # whatever a library says of the page, it is no error of the evaluation
        warn(f"Could not write {path}: {error}.", stacklevel=3)


_MARK = '<meta name="generator" content="accel_trainer">'


def is_page(path: Path) -> bool:
    """Return whether a file is a page that `render` has made."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return _MARK in file.read(1000)


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent / "page"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    for name in ("uplot.js", "uplot.css", "charts.js", "style.css"):
        environment.globals[name.replace(".", "_")] = Markup((folder / name).read_text(encoding="utf-8"))
    return environment.get_template("report.html")


def render(records: Sequence[RunRecord]) -> str:
    """Return the page of one run, or of several side by side."""
    from markupsafe import Markup

    is_one = len(records) == 1
    if len({record.name for record in records}) < len(records):
        records = [replace(record, name=seen_from(record.path)) for record in records]
    is_running = any(record.state == "running" for record in records)
    data: dict[str, Any] = {"charts": _charts(records[0]) if is_one else _overlays(records), "is_running": is_running}
    if is_one:
        data["table"] = _epochs(records[0].history)
    # In a script, nothing but "</" and "<!" could end it.
    text = json.dumps(data, allow_nan=False, default=str).replace("<", "\\u003c")
    page: str = _template().render(
        mark=Markup(_MARK),
        title=records[0].name if is_one else " / ".join(record.name for record in records),
        runs=records,
        is_running=is_running,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        cards=_cards(records[0]) if is_one else [],
        tables=_tables(records[0]) if is_one else _differences(records),
        data=Markup(text),
    )
    return page


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _named_series(history: History) -> dict[str, list[float]]:
    """Return what was measured per epoch by name, metrics too, without what is empty."""
    known = {name: getattr(history, series) for name, series in SERIES.items()} | history.metrics
    return {name: values for name, values in known.items() if values}


_TITLES = {
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm before clipping", ""),
    "samples_per_second": ("Throughput", "samples per second"),
}


def _charts(record: RunRecord) -> list[dict[str, Any]]:
    """Return the charts of one run: loss, metrics, learning rate, gradient norm, throughput, time."""
    history, series = record.history, _named_series(record.history)
    every = max(1, math.ceil(history.num_epochs / _MANY_EPOCHS))
    epochs = list(range(1, history.num_epochs + 1))[::every]

    def chart(title: str, unit: str, lines: Mapping[str, str], **more: Any) -> dict[str, Any]:
        shown: list[dict[str, Any]] = []
        for name, label in lines.items():
            shown.append({"label": label, "values": _finite(series[name][::every])})
        if history.best_epoch is not None and not more.get("stacked"):
            shown[-1] |= {"best": history.best_epoch, "mark": f"best: epoch {history.best_epoch}"}
        return {"title": title, "unit": unit, "epochs": epochs, "series": shown} | more

    losses: dict[str, str] = {name: name.replace("_", " ") for name in ("train_loss", "test_loss") if name in series}
    charts = [chart("Loss", "", losses, gap=len(losses) == 2)] if losses else []
    charts += [chart(name, "", {name: name}) for name in history.metrics if series.get(name)]
    charts += [chart(*title, {name: title[0].lower()}) for name, title in _TITLES.items() if name in series]
    parts = {name: name.removesuffix("_seconds") for name in _SECONDS if name in series}
    if parts:
        charts.append(chart("Where the time went", "seconds per epoch", parts, stacked=True))
    return charts


def _overlays(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return one chart per quantity, with a curve of each run."""
    per_run = [_named_series(record.history) for record in records]
    names = list(dict.fromkeys(name for series in per_run for name in series))
    names = [name for name in names if not name.endswith("_seconds")] + ["epoch_seconds"]
    longest = max((record.history.num_epochs for record in records), default=0)
    every = max(1, math.ceil(longest / _MANY_EPOCHS))
    charts = []
    for name in names:
        curves = []
        for index, (record, series) in enumerate(zip(records, per_run, strict=True)):
            values = _finite(series.get(name, []))
            if values:
                padded = (values + [None] * (longest - len(values)))[::every]
                best = record.history.best_epoch if name == record.monitor else None
                curves.append({"label": record.name, "values": padded, "colour": index, "best": best})
        if curves:
            title, unit = _TITLES.get(name, (name.replace("_", " ").capitalize(), ""))
            epochs = list(range(1, longest + 1))[::every]
            charts.append({"title": title, "unit": unit, "epochs": epochs, "series": curves})
    return charts


def _epochs(history: History) -> dict[str, Any]:
    series = _named_series(history)
    columns = [[repr(value) for value in values] for values in series.values()]
    rows = [[str(epoch), *row] for epoch, row in enumerate(zip(*columns, strict=False), start=1)]
    return {"header": ["epoch", *series], "rows": rows}


def _cards(record: RunRecord) -> list[tuple[str, str]]:
    history, of = record.history, record.asked.get("num_epochs")
    cards = [("epochs", f"{history.num_epochs} of {of}" if of else str(history.num_epochs))]
    if history.best_epoch is not None:
        cards.append(("best epoch", str(history.best_epoch)))
        cards.append((f"its {record.monitor.replace('_', ' ')}", _number(history.best_value)))
    if record.evaluations:
        last = record.evaluations[-1]
        cards += [(f"final {name}", _number(value)) for name, value in last["scores"].items()]
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


_NO_DIFFERENCE = ("run_dir",)  # which always differs
_Table = tuple[str, bool, list[str], list[list[str]]]


def _tables(record: RunRecord) -> list[_Table]:
    """Return heading, whether it is open, header and rows of each table of one run."""
    tables: list[_Table] = []
    if record.evaluations:
        names = list(dict.fromkeys(name for one in record.evaluations for name in one["scores"]))
        rows = []
        for one in record.evaluations:
            of = "a stream" if one["num_samples"] is None else f"{one['num_samples']:,} samples"
            rows.append([of, f"epoch {one['epoch']}", *(repr(one["scores"].get(name, "")) for name in names)])
        tables.append(("Final evaluation", True, ["of", "weights of", *names], rows))
    environment = {name: value for name, value in record.environment.items() if value is not None}
    machine = {name: environment.pop(name) for name in ("hardware", "platform", "python") if name in environment}
    versions = environment.pop("versions", {})
    tables.append(("Hardware and versions", True, [], _rows(machine | versions | environment)))
    tables.append(("Config", False, [], _rows(record.asked)))
    resolved = record.resolved | {name: one for name, one in record.identity.items() if name not in record.asked}
    tables.append(("What it was resolved to", False, [], _rows(resolved)))
    return tables


def _rows(values: Mapping[str, Any]) -> list[list[str]]:
    return [[name, _shown(value)] for name, value in values.items()]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={one}" for name, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _differences(records: Sequence[RunRecord]) -> list[_Table]:
    """Return what the results of several runs are, and what differs in their configs and machines."""
    header = ["", *(record.name for record in records)]

    def row(name: str, value: Callable[[RunRecord], Any]) -> list[str]:
        return [name, *(_number(value(record)) for record in records)]

    results = [
        row("state", lambda one: one.state),
        row("how it ended", lambda one: one.told),
        row("epochs", lambda one: one.history.num_epochs),
        row("monitored", lambda one: one.monitor),
        row("best epoch", lambda one: one.history.best_epoch),
        row("best value", lambda one: one.history.best_value),
        row("time", lambda one: duration(sum(one.history.epoch_seconds))),
    ]
    finals = [one.evaluations[-1]["scores"] if one.evaluations else {} for one in records]
    for name in dict.fromkeys(name for scores in finals for name in scores):
        results.append([f"final {name}", *(_number(scores.get(name, "-")) for scores in finals)])
    facts = [_facts(record) for record in records]
    differing = [
        [name, *(one.get(name, "-") for one in facts)]
        for name in dict.fromkeys(name for one in facts for name in one)
        if name not in _NO_DIFFERENCE and len({one.get(name) for one in facts}) > 1
    ]
    return [("Results", True, header, results), ("What differs", True, header, differing)]


def _facts(record: RunRecord) -> dict[str, str]:
    """Return what could tell a run from others."""
    nested = record.identity | record.asked | record.resolved | record.environment
    facts = {name: _shown(value) for name, value in flattened(nested).items()}
    if "hardware" in facts:  # without where each choice came from
        facts["hardware"] = re.sub(r" \([^()]*\)", "", facts["hardware"])
    return facts
