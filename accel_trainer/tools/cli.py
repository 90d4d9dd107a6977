"""The command line: `accel_trainer COMMAND`, `python -m accel_trainer`, `accelerate launch -m accel_trainer`.

train, evaluate, check and parity work on a run function, named as `my_module:make_run` or `path/to/script.py:make_run`:
it takes a `TrainConfig` and returns a dictionary of what `Trainer` takes, with its loaders.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from ..base.console import complain, is_first_rank, nearest, show
from ..config import TrainConfig
from ..errors import HardwareError, ProcessFailedError

if TYPE_CHECKING:
    from .parity import Row


_RUN = "your run function, as my_module:make_run or path/to/script.py:make_run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for what is not as it should be, 2 for wrong arguments."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except UnicodeDecodeError as error:
        return _fail(f"--config names a file that is no text: {error}.")
    if options.command in _BY_ONE and not is_first_rank():
        return 0
    try:
        return _COMMANDS[options.command](options[options.command])
    except (ValueError, TypeError, OSError, HardwareError) as error:
        if not _is_told(error):
            raise
        return _fail(str(error))


def _is_told(error: Exception) -> bool:
    """Return whether this package raised it on purpose: what it says is enough, where others need their traceback."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    return Path(__file__).parent.parent in Path(raised.filename).parents and str(raised.line).startswith("raise ")


_LARGEST_CONFIG = 2**16  # characters
_DEEPEST_CONFIG = 10  # lists and dictionaries in one another


def _load_plain(text: str) -> Any:
    """Return what YAML holds, without references: a few lines of them stand for any amount of data.

    Raises:
        YAMLError: There are some, or it is too large, or too deep.
    """
    if len(text) > _LARGEST_CONFIG:
        raise yaml.YAMLError(f"it has more than {_LARGEST_CONFIG} characters")
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"references such as *{event.anchor} are not taken")
        if depth > _DEEPEST_CONFIG:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST_CONFIG} deep")
    return get_loader("yaml")(text)


set_loader("plain yaml", _load_plain, (yaml.YAMLError,))


class _Parser(ArgumentParser):
    """Tell a wrong argument in one line, with the nearest right one; on several processes once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"parser_mode": "plain yaml"} | options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split())
        for wrong in re.findall(r"--\w+", text) or re.findall(r"'(\w+)'", text):
            near = nearest(wrong, self._words())
            if near not in (None, wrong):
                text += f" Did you mean {near}?"
                break
        raise SystemExit(_fail(text))

    def _words(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            for name, parser in (action.choices or {}).items() if isinstance(action.choices, dict) else ():
                yield name
                if isinstance(parser, _Parser):
                    yield from parser._words()


def _parser() -> _Parser:
    parser = _Parser(prog="accel_trainer", description="One training run on any hardware.")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, (told, fill) in _FILL.items():
        sub = _Parser(description=f"{told[0].upper()}{told[1:]}.")
        fill(sub)
        commands.add_subcommand(name, sub, help=told)
    return parser


def _fill_train(parser: _Parser) -> None:
    parser.add_argument("run", type=str, help=_RUN)
    _add_config(parser)


def _fill_evaluate(parser: _Parser) -> None:
    parser.add_argument("run", type=str, help=_RUN)
    parser.add_argument("run_dir", type=str, help="folder of a run, whose best weights are evaluated")
    parser.add_argument("--loader", type=str, help="final_loader, test_loader or train_loader (default: the first)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="what is printed")


def _fill_check(parser: _Parser) -> None:
    parser.add_argument("run", type=str, help=_RUN)
    _add_config(parser)


def _fill_report(parser: _Parser) -> None:
    parser.add_argument("runs", type=str, nargs="+", help="run folders; several are put side by side")
    parser.add_argument("--output", type=str, help="the page to write (default: report.html, of one run in its folder)")


def _fill_runs(parser: _Parser) -> None:
    parser.add_argument("folder", type=str, nargs="?", default="runs", help="looked through for runs")


def _fill_parity(parser: _Parser) -> None:
    parser.add_argument("run", type=str, nargs="?", help=f"{_RUN} (default: handwritten digits)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of CPU processes")
    parser.add_argument("--num_micro_batches", type=int, default=8, help="the fixed number of most rows")
    parser.add_argument("--num_epochs", type=int, default=2, help="epochs of each run")
    parser.add_argument("--max_steps", type=int | None, help="steps of each run at most")
    parser.add_argument("--seed", type=int, default=0, help="seed of each run")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds that one run may take")
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--format", choices=("table", "json", "markdown"), default="table", help="what is printed")
    printed.add_argument("--markdown", action="store_true", help="a table for a README or an issue")


def _add_config(parser: _Parser) -> None:
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    parser.add_class_arguments(TrainConfig)


_FILL = {
    "train": ("train a run function under this launch, and evaluate its final_loader", _fill_train),
    "evaluate": ("evaluate the best weights of a run", _fill_evaluate),
    "check": (
        "try two steps on the full layout: does it fit, agree, save, load, and how long will it take",
        _fill_check,
    ),
    "parity": ("train under every layout of this machine and compare with what is promised", _fill_parity),
    "report": ("write the page of a run, or of several side by side", _fill_report),
    "runs": ("list the runs in a folder", _fill_runs),
}


def _config_of(options: Namespace, **more: Any) -> TrainConfig:
    return TrainConfig(**{name: options[name] for name in TrainConfig.__dataclass_fields__} | more)


def _made(name: str, config: TrainConfig) -> tuple[Any, dict[str, Any]]:
    """Return the `Trainer` of a run function and its loaders."""
    _check_run_function(name)
    from ..trainer import Trainer
    from .run_functions import make_run

    of_trainer, loaders = make_run(name, config)
    return Trainer(**{"config": config, "loss_fn": None} | of_trainer), loaders


def _train(options: Namespace) -> int:
    trainer, loaders = _made(options.run, _config_of(options))
    trainer.fit(loaders["train_loader"], loaders.get("test_loader"))
    if "final_loader" in loaders:
        _print_scores("Final evaluation", trainer.evaluate(loaders["final_loader"]), trainer.is_main_process)
    return 0


def _print_scores(told: str, scores: dict[str, float], is_main: bool) -> None:
    if is_main:
        show(f"{told}: {', '.join(f'{name} {value:.4f}' for name, value in scores.items())}")


def _evaluate(options: Namespace) -> int:
    _check_run_function(options.run)
    from ..view.report import RunRecord, keep_evaluation, page_of

    record = RunRecord.load(options.run_dir)
    asked = {name: value for name, value in record.asked.items() if name in TrainConfig.__dataclass_fields__}
    try:
        config = TrainConfig(**asked | {"run_dir": None, "resume": False, "checkpoint_every": None})
    except ValueError as error:
        raise ValueError(f"{record.path / 'config.json'} cannot be used: {error}") from error
    trainer, loaders = _made(options.run, config)
    name = options.loader or next(one for one in ("final_loader", "test_loader", "train_loader") if one in loaders)
    if name not in loaders:
        raise ValueError(f"{options.run} returns no {name!r}, but {', '.join(loaders)}.")
    from ..storage.tensor_files import metadata_of
    from ..storage.weights import load_best

    load_best(trainer.model, record.path)
    epoch = metadata_of(record.path / "best" / "model.safetensors")["epoch"]  # a disk that was full has an older one
    scores = trainer.evaluate(loaders[name])
    if trainer.is_main_process:
        num_samples = len(loaders[name].dataset) if hasattr(loaders[name].dataset, "__len__") else None
        keep_evaluation(page_of(record), num_samples, epoch, scores)
    if options.format == "json":
        show(json.dumps(scores) if trainer.is_main_process else "", end="\n" if trainer.is_main_process else "")
    else:
        told = f"{name} with the weights of epoch {epoch}"
        _print_scores(told, scores, trainer.is_main_process)
    return 0


def _check(options: Namespace) -> int:
    from .preflight import check

    _check_run_function(options.run)
    run_dir = None if options.run_dir is None else os.path.expanduser(options.run_dir)
    return check(options.run, _config_of(options, run_dir=None, resume=False, checkpoint_every=None), run_dir)


def _report(options: Namespace) -> int:
    from ..storage.files import write_whole
    from ..view.report import RunRecord, is_page, render

    records = [RunRecord.load(one) for one in options.runs]
    default = records[0].path / "report.html" if len(records) == 1 else Path("report.html")
    output = Path(options.output).expanduser() if options.output else default
    if output == Path("report.html") and output.exists() and not is_page(output):
        raise FileExistsError(f"{output} is there already and no page of this command: give another name as --output.")
    try:
        write_whole(output, render(records).encode("utf-8", "replace"))
    except OSError as error:
        return _fail(f"{output} cannot be written: {error.strerror}.")
    show(str(output))
    return 0


def _runs(options: Namespace) -> int:
    from ..view.report import runs_in, seen_from

    folder = os.path.expanduser(options.folder)
    records = runs_in(folder, left_out=complain)
    cells = [("run", "state", "epochs", "best epoch", "best value", "changed", "how it ended")]
    for record in records:
        history, of = record.history, record.asked.get("num_epochs", "?")
        best = "-" if history.best_value is None else f"{record.monitor} {history.best_value:.5g}"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.changed))
        name, epochs = seen_from(record.path, folder), f"{history.num_epochs}/{of}"
        cells.append((name, record.state, epochs, str(history.best_epoch or "-"), best, when, record.told))
    show("\n".join(_aligned(cells)) if records else f"No runs in {folder}.")
    return 0


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of a table whose columns are as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _parity(options: Namespace) -> int:
    if options.run is not None:
        _check_run_function(options.run)
    for name in ("processes", "num_micro_batches", "timeout"):
        least = min(options[name]) if name == "processes" else options[name]
        if least < 1:
            raise ValueError(f"--{name} must be at least 1, got {least}.")
    asked = {name: options[name] for name in ("num_epochs", "max_steps", "seed")}
    config = TrainConfig(**asked, verbose=False, restore_best=False)

    import torch

    from .parity import Parity, plan

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cases = plan(options.run, options.processes, options.num_micro_batches, num_gpus)
    rows: list[Row] = []
    try:
        with _ended_by_sigterm():
            rows.extend(Parity(config, _say, options.timeout).rows(cases))
    except ProcessFailedError as error:
        return _fail(f"the run fails under the first layout already, one process: {error}{_hint(str(error))}")
    except KeyboardInterrupt:
        _say("Interrupted.")
    show(
        {"table": _table, "markdown": _markdown, "json": _json}["markdown" if options.markdown else options.format](
            rows
        )
    )
    if len(rows) < len(cases) and not any(row.case.promise == "cut" and not row.kept for row in rows):
        return 130
    return 1 if any(row.kept is False for row in rows) else 0


def _check_run_function(name: str) -> None:
    """Refuse a run function that cannot be found or imported, before anything runs."""
    from .run_functions import find_run_function

    try:
        with contextlib.redirect_stdout(sys.stderr):
            find_run_function(name)
    except Exception as error:
        if _is_told(error):
            raise
        told = f"{name.partition(':')[0]} cannot be imported: {type(error).__name__}: {error}"
        raise ValueError(told) from error


def _hint(error: str) -> str:
    if "Expected more than 1 value per channel" in error:
        return "BatchNorm needs two samples in every micro-batch: use a smaller --num_micro_batches, or drop_last=True."
    return ""


def _fail(text: str) -> int:
    if is_first_rank():
        complain(f"error: {text}")
    return 2


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that no process is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    complain(text)


_TITLES = ("layout", "device", "seconds", "train loss", "test loss", "difference", "weights", "verdict")


def _cells(row: Row) -> list[str]:
    test_loss = "-" if row.test_loss is None else repr(row.test_loss)
    numbers = [
        f"{row.seconds:.1f}",
        repr(row.train_loss),
        test_loss,
        f"{row.difference:.1e}" if row.difference else "0",
    ]
    return [row.case.layout, row.case.device, *numbers, row.weights[:12], row.verdict]


def _json(rows: list[Row]) -> str:
    from ..base.codec import encode

    return json.dumps([encode(row.to_dict()) for row in rows], indent=2)


def _table(rows: list[Row]) -> str:
    lines: list[str] = []
    for name, cells in _blocks(rows):
        lines += ["", name, *_aligned([_TITLES, *cells])]
    return "\n".join([*lines, "", *_notes(rows), _summary(rows)])


def _markdown(rows: list[Row]) -> str:
    lines: list[str] = []
    for name, cells in _blocks(rows):
        lines += [f"`{name}`", "", _line(_TITLES), _line(["---"] * len(_TITLES)), *map(_line, cells), ""]
    return "\n".join([*lines, *_notes(rows), _summary(rows)])


def _blocks(rows: list[Row]) -> list[tuple[str, list[list[str]]]]:
    """Return the rows of each run function under its name."""
    blocks: dict[str, list[list[str]]] = {}
    for row in rows:
        blocks.setdefault(row.case.run, []).append(_cells(row))
    return list(blocks.items())


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _notes(rows: list[Row]) -> list[str]:
    """Return where rows part from the row they are compared with, each below its layout."""
    notes: list[str] = []
    for row in rows:
        if row.explanation:
            lines = row.explanation.strip().splitlines()
            shown = lines if len(lines) <= 6 else [lines[0], *lines[-5:]]  # of a traceback
            notes += [f"{row.case.device}, {row.case.layout}: {row.verdict}", *(f"    {line}" for line in shown), ""]
    return notes


def _summary(rows: list[Row]) -> str:
    broken, kept = (sum(row.kept is value for row in rows) for value in (False, True))
    unjudged = sum(row.kept is None and row.case.promise not in ("none", "cut") for row in rows)
    also = f" {unjudged} could not be judged: see above." if unjudged else ""
    told = f"{broken} of {broken + kept} promises broken." if broken else f"{kept} of {kept} promises kept."
    return told + also


_BY_ONE = ("report", "runs", "parity")  # for what one process does, whatever the launch
_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "check": _check,
    "parity": _parity,
    "report": _report,
    "runs": _runs,
}
