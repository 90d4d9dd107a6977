"""The command line: `accel_trainer COMMAND`, `python -m accel_trainer`, `accelerate launch -m accel_trainer`.

train, evaluate, predict, check and parity work on a run function, named as `my_module:make_run` or
`path/to/script.py:make_run`: it takes a `TrainConfig` and returns a dictionary of what `Trainer` takes, with its
loaders.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from .. import __version__
from ..base.console import complain, is_first_rank, show
from ..config import TrainConfig
from ..errors import ProcessFailedError
from .options import REFUSALS, OptionParser, config_of, fail, is_raised_here

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from ..trainer import Trainer
    from ..view.report import RunFiles
    from .parity import Row


_LOADER = "final_loader, test_loader (of several test_loader/NAME) or train_loader (default: the first)"
_OUTPUT = "the page to write (default: report.html, of one run in its folder)"
_REPORT = "also put into the run's report what the model gets wrong: confusion matrix, or residuals"
_RUN = "your run function, as my_module:make_run or path/to/script.py:make_run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for what is not as it should be, 2 for wrong arguments."""
    try:
        parsed = _parser().parse_args(arguments)
    except UnicodeDecodeError as error:
        return fail(f"--config names a file that is not text: {error}.")
    if parsed.command in _ON_ONE_PROCESS and not is_first_rank():
        return 0
    options = parsed[parsed.command]
    try:
        if options.get("run") is not None:
            _check_run_function(options.run)
        function, _ = _COMMANDS[parsed.command]
        return function(options)
    except REFUSALS as error:
        if not is_raised_here(error):
            raise
        return fail(str(error))


def _parser() -> OptionParser:
    parser = OptionParser(prog="accel_trainer", description="One training run on any hardware.", version=__version__)
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    parsers = {}
    for name, (_, text) in _COMMANDS.items():
        parsers[name] = OptionParser(description=f"{text[0].upper()}{text[1:]}.")
        commands.add_subcommand(name, parsers[name], help=text)

    for name in ("train", "evaluate", "predict", "check"):
        parsers[name].add_argument("run", type=str, help=_RUN)
    for name in ("train", "check"):
        parsers[name].add_config()

    for name in ("evaluate", "predict"):
        parsers[name].add_argument("run_dir", type=str, help="folder of a run, whose best weights are taken")
        parsers[name].add_argument("--loader", type=str, help=_LOADER)
    predict = parsers["predict"]
    predict.add_argument(
        "--output", type=str, default="predictions.parquet", help="the table: .parquet, .csv or .jsonl"
    )
    predict.add_argument("--ragged", type=_list_or_number, help="of several lengths: list, or a number to fill up with")
    evaluate = parsers["evaluate"]
    evaluate.add_argument("--report", choices=("classification", "regression"), help=_REPORT)
    evaluate.add_argument("--format", choices=("table", "json"), default="table", help="what is printed")

    _add_parity_options(parsers["parity"])
    export = parsers["export"]
    export.add_argument("run", type=str, nargs="?", help=f"{_RUN}, whose model writes its own files")
    export.add_argument("run_dir", type=str, help="folder of the run")
    export.add_argument("--output", type=str, help="the new folder (default: export, in that of the run)")
    export.add_argument("--push", type=str, metavar="NAME", help="upload it to this model repository, as user/name")
    export.add_argument("--private", action="store_true", help="let only you see that repository")

    parsers["report"].add_argument("runs", type=str, nargs="+", help="run folders; several are put side by side")
    parsers["report"].add_argument("--output", type=str, help=_OUTPUT)
    parsers["runs"].add_argument("folder", type=str, nargs="?", default="runs", help="looked through for runs")
    return parser


def _add_parity_options(parity: OptionParser) -> None:
    parity.add_argument("run", type=str, nargs="?", help=f"{_RUN} (default: small pictures of digits)")
    parity.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of CPU processes")
    parity.add_argument("--num_micro_batches", type=int, default=8, help="the fixed number of most rows")
    parity.add_argument("--num_epochs", type=int, default=2, help="epochs of each run")
    parity.add_argument("--max_steps", type=int | None, help="steps of each run at most")
    parity.add_argument("--seed", type=int, default=0, help="seed of each run")
    parity.add_argument("--timeout", type=int, default=1800, help="seconds that one run may take")
    printed = parity.add_mutually_exclusive_group()
    printed.add_argument("--format", choices=("table", "json", "markdown"), default="table", help="what is printed")
    printed.add_argument("--markdown", action="store_true", help="a table for a README or an issue")


def _list_or_number(text: str) -> str | float:
    return text if text == "list" else float(text)


def _check_run_function(name: str) -> None:
    """Refuse a run function that cannot be found or imported, before anything runs."""
    from .run_functions import find_run_function

    try:
        with contextlib.redirect_stdout(sys.stderr):
            find_run_function(name)
    except Exception as error:
        if is_raised_here(error):
            raise
        path = name.partition(":")[0]
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error


def _train(options: Namespace) -> int:
    from ..trainer import Trainer
    from .run_functions import call_run_function

    arguments, loaders = call_run_function(options.run, config_of(options))
    trainer = Trainer(**arguments)
    trainer.fit(loaders["train_loader"], loaders.get("test_loader"))
    if "final_loader" in loaders:
        scores = trainer.evaluate(loaders["final_loader"])
        if trainer.is_main_process:
            _print_scores("Final evaluation", scores)
    return 0


def _print_scores(title: str, scores: dict[str, float]) -> None:
    show(f"{title}: {', '.join(f'{name} {value:.4f}' for name, value in scores.items())}")


def _call_as_in(record: RunFiles, run: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Call a run function with the config of a run; return the arguments for `Trainer` and the loaders."""
    from .run_functions import call_run_function

    asked = {name: value for name, value in record.asked.items() if name in TrainConfig.__dataclass_fields__}
    try:
        config = TrainConfig(**asked | {"run_dir": None, "resume": False, "checkpoint_every": None})
    except ValueError as error:
        raise ValueError(f"{record.path / 'config.json'} cannot be used: {error}") from error
    return call_run_function(run, config)


def _trained(options: Namespace) -> tuple[Trainer, DataLoader[Any], str, RunFiles]:
    """Return a trainer whose model has the best weights of a run, a loader of the run function, its name, the run."""
    from ..storage.weights import load_best
    from ..trainer import Trainer
    from ..view.report import RunFiles

    record = RunFiles.load(options.run_dir)
    arguments, given = _call_as_in(record, options.run)
    tests = given.pop("test_loader", None)
    several = isinstance(tests, Mapping)
    named = {f"test_loader/{name}": one for name, one in tests.items()} if several else {"test_loader": tests}
    loaders = {name: given[name] for name in ("final_loader",) if name in given}
    loaders |= {name: one for name, one in named.items() if one is not None} | given
    name = options.loader or next(iter(loaders))
    if name not in loaders:
        raise ValueError(f"{options.run} returns no {name!r}, but {', '.join(loaders)}.")
    trainer = Trainer(**arguments)
    load_best(trainer.model, record.path)
    return trainer, loaders[name], name, record


def _evaluate(options: Namespace) -> int:
    from ..storage.weight_files import metadata_of

    trainer, loader, name, record = _trained(options)
    scores = trainer.evaluate(loader, options.report, name=name.replace("_loader", ""), run_dir=record.path)
    if not trainer.is_main_process:
        return 0
    if options.format == "json":
        show(json.dumps(scores))
    else:
        epoch = metadata_of(record.path / "best" / "model.safetensors")["epoch"]  # older, if the disk was full
        _print_scores(f"{name} with the weights of epoch {epoch}", scores)
    return 0


def _predict(options: Namespace) -> int:
    from .predictions import check_output, write_predictions

    path = check_output(options.output)
    trainer, loader, name, _ = _trained(options)
    outputs = trainer.predict(loader, options.ragged)
    if trainer.is_main_process:
        show(f"{write_predictions(path, outputs, loader, options.ragged)} rows of {name} are predicted in {path}")
    return 0


def _check(options: Namespace) -> int:
    from .preflight import check

    return check(options.run, config_of(options, resume=False, checkpoint_every=None))


def _export(options: Namespace) -> int:
    from ..view.report import RunFiles
    from .export import export, push

    record = RunFiles.load(options.run_dir)
    model = _call_as_in(record, options.run)[0]["model"] if options.run is not None else None
    name = None if options.push is None else options.push.rpartition("/")[2]
    folder = export(record.path, options.output or record.path / "export", model, name)
    show(str(folder))
    if options.push is not None:
        try:
            show(push(folder, options.push, options.private))
        except Exception as error:  # a wrong name, not logged in, no network: the client has many kinds
            text, *_ = f"{type(error).__name__}: {error}".splitlines()
            if isinstance(error, ValueError):  # a name that the Hub takes from nobody
                return fail(f"not uploaded ({text}). With a name that it takes: hf upload NAME {quote(str(folder))}")
            command = f"hf upload {quote(options.push)} {quote(str(folder))}"
            return fail(f"not uploaded ({text}). Once `hf auth login` is done: {command}")
    return 0


def _report(options: Namespace) -> int:
    from ..storage.files import write_whole
    from ..view.report import RunFiles, is_page, render

    records = [RunFiles.load(folder) for folder in options.runs]
    default = records[0].path / "report.html" if len(records) == 1 else Path("report.html")
    output = Path(options.output).expanduser() if options.output else default
    if output == Path("report.html") and output.exists() and not is_page(output):
        raise FileExistsError(f"{output} is there already and no page of this command: give another name as --output.")
    try:
        write_whole(output, render(records).encode("utf-8", "replace"))
    except OSError as error:
        return fail(f"{output} cannot be written: {error.strerror}.")
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
        cells.append((name, record.state, epochs, str(history.best_epoch or "-"), best, when, record.outcome))
    show("\n".join(_aligned(cells)) if records else f"No runs in {folder}.")
    return 0


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of a table whose columns are as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _parity(options: Namespace) -> int:
    for name in ("processes", "num_micro_batches", "timeout"):
        least = min(options[name]) if name == "processes" else options[name]
        if least < 1:
            raise ValueError(f"--{name} must be at least 1, got {least}.")
    asked = {name: options[name] for name in ("num_epochs", "max_steps", "seed")}
    config = TrainConfig(**asked, verbose=False, restore_best=False)

    import torch

    from ..base.codec import encode
    from .launching import sigterm_interrupts
    from .parity import Parity, plan

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cases = plan(options.run, options.processes, options.num_micro_batches, num_gpus)
    rows: list[Row] = []
    try:
        with sigterm_interrupts():  # no process is left behind
            rows.extend(Parity(config, complain, options.timeout).rows(cases))
    except ProcessFailedError as error:
        hint = _NORM_HINT if "Expected more than 1 value per channel" in str(error) else ""
        return fail(f"the run fails under the first layout already, one process: {error}{hint}")
    except KeyboardInterrupt:
        complain("Interrupted.")
    if options.format == "json":
        show(json.dumps([encode(row.to_dict()) for row in rows], indent=2))
    else:
        show(_parity_page(rows, options.markdown or options.format == "markdown"))
    if len(rows) < len(cases) and not any(row.case.promise == "cut" and not row.kept for row in rows):
        return 130
    return 1 if any(row.kept is False for row in rows) else 0


_NORM_HINT = "BatchNorm needs two samples in every micro-batch: use a smaller --num_micro_batches, or drop_last=True."
_TITLES = ("layout", "device", "seconds", "train loss", "test loss", "difference", "weights", "verdict")


def _parity_page(rows: list[Row], is_markdown: bool) -> str:
    """Return a table for each run function, where rows differ from their references, and how many promises hold."""
    lines = [] if is_markdown else [""]
    for name, group in itertools.groupby(rows, lambda row: row.case.run):
        cells = [_TITLES, *map(_cells, group)]
        lines += [f"`{name}`", "", *_markdown(cells), ""] if is_markdown else [name, *_aligned(cells), ""]
    for row in rows:
        if row.explanation:
            text = row.explanation.strip().splitlines()
            shown = text if len(text) <= 6 else [text[0], *text[-5:]]  # of a traceback
            lines += [f"{row.case.device}, {row.case.layout}: {row.verdict}", *(f"    {line}" for line in shown), ""]
    broken, kept = (sum(row.kept is value for row in rows) for value in (False, True))
    unjudged = sum(row.kept is None and row.case.promise not in ("none", "cut") for row in rows)
    also = f" {unjudged} could not be judged: see above." if unjudged else ""
    summary = f"{broken} of {broken + kept} promises broken." if broken else f"{kept} of {kept} promises kept."
    return "\n".join([*lines, summary + also])


def _cells(row: Row) -> tuple[str, ...]:
    test_loss = "-" if row.test_loss is None else repr(row.test_loss)
    difference = f"{row.difference:.1e}" if row.difference else "0"
    numbers = f"{row.seconds:.1f}", repr(row.train_loss), test_loss, difference
    return row.case.layout, row.case.device, *numbers, row.weights[:12], row.verdict


def _markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of a Markdown table, whose first line has the titles."""
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


_ON_ONE_PROCESS = ("report", "runs", "parity", "export")  # whatever the launch
_COMMANDS = {
    "train": (_train, "train a run function under this launch, and evaluate its final_loader"),
    "evaluate": (_evaluate, "evaluate the best weights of a run"),
    "predict": (_predict, "predict with the best weights of a run, into a table with the index of each sample"),
    "check": (_check, "try two steps on the full layout: does it fit, agree, save, load, and how long will it take"),
    "parity": (_parity, "train under every layout of this machine and compare with what is promised"),
    "export": (_export, "write the best weights of a run with a model card, for the Hugging Face Hub"),
    "report": (_report, "write the page of a run, or of several side by side"),
    "runs": (_runs, "list the runs in a folder"),
}
