"""The command line: `python -m accel_trainer parity [my_module:make_run]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .parity import Row

__all__ = ["main"]

# Imports of torch wait until the arguments are known to be right.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for a broken promise, 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    code: int = options.command(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m accel_trainer", description="One training run on any hardware.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    parity = commands.add_parser(
        "parity",
        help="train under every layout of this machine and compare",
        description="Train a small model under every layout this machine has - processes, GPUs, precision, "
        "micro-batches, bitwise on and off - and compare losses and weights with what is promised. Exit code 1: a "
        "promise is broken.",
    )
    parity.set_defaults(command=_parity)
    parity.add_argument(
        "run",
        nargs="?",
        help="your own run function, as my_module:make_run or path/to/script.py:make_run: it takes a TrainConfig and "
        "returns a dictionary of what Trainer takes, with train_loader and test_loader (default: handwritten digits)",
    )
    parity.add_argument(
        "--processes",
        type=_at_least_one,
        nargs="+",
        default=[1, 2, 3, 4],
        help="numbers of CPU processes (default: 1 2 3 4)",
    )
    parity.add_argument(
        "--num_micro_batches", type=_at_least_one, default=8, help="the fixed number of most rows (default: 8)"
    )
    parity.add_argument("--num_epochs", type=_at_least_one, default=2, help="epochs of each run (default: 2)")
    parity.add_argument("--max_steps", type=_at_least_one, help="steps of each run at most (default: no limit)")
    parity.add_argument("--seed", type=int, default=0, help="seed of each run (default: 0)")
    parity.add_argument(
        "--timeout", type=_at_least_one, default=1800, help="seconds that one run may take (default: 1800)"
    )
    printed = parity.add_mutually_exclusive_group()
    printed.add_argument("--format", choices=("table", "json", "markdown"), default="table", help="(default: table)")
    printed.add_argument(
        "--markdown", dest="format", action="store_const", const="markdown", help="a table for a README or an issue"
    )
    return parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


# --- parity -----------------------------------------------------------------------------------------------------------


def _parity(options: argparse.Namespace) -> int:
    from .config import TrainConfig

    try:
        if options.run is not None:
            _check_run_function(options.run)
        config = TrainConfig(
            num_epochs=options.num_epochs,
            max_steps=options.max_steps,
            seed=options.seed,
            verbose=False,
            restore_best=False,
        )
    except ValueError as error:
        return _fail(str(error))

    import torch

    from .errors import ProcessFailedError
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
    print({"table": _table, "markdown": _markdown, "json": _json}[options.format](rows))
    if len(rows) < len(cases) and not any(row.case.promise == "cut" and row.kept is None for row in rows):
        return 130
    return 1 if any(row.kept is False for row in rows) else 0


def _check_run_function(name: str) -> None:
    """Refuse a run function that cannot be found or imported, before anything runs."""
    from .run_functions import find_run_function

    try:
        with contextlib.redirect_stdout(sys.stderr):
            find_run_function(name)
    except (ValueError, SystemExit):
        raise
    except Exception as error:
        raise ValueError(f"{name.partition(':')[0]} cannot be imported: {type(error).__name__}: {error}") from error


def _hint(error: str) -> str:
    if "Expected more than 1 value per channel" in error:
        return "BatchNorm needs two samples in every micro-batch: use a smaller --num_micro_batches, or drop_last=True."
    return ""


def _fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
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
    print(text, file=sys.stderr, flush=True)


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
    from .history import encode

    return json.dumps([encode(row.to_dict()) for row in rows], indent=2)


def _table(rows: list[Row]) -> str:
    lines: list[str] = []
    for name, cells in _blocks(rows):
        widths = [max(len(text) for text in column) for column in zip(_TITLES, *cells, strict=True)]
        lines += ["", name]
        for line in [_TITLES, *cells]:
            lines.append("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
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
