"""How a run ends: saved, told, and closed, also by an error."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .base.console import warn
from .errors import NonFiniteError
from .loop import record
from .numbers.loss_table import Totals
from .run import Run
from .view.words import advice_of

LEAVING = ("SIGTERM", "SIGUSR1")  # what ends the program too


@contextmanager
def closed_at_the_end(run: Run) -> Iterator[None]:
    """See the last write through, and leave the folder to others; one that holds nothing is removed."""
    try:
        yield
    except KeyboardInterrupt:
        run.saver.close(at_once=True)
        raise
    except BaseException:
        _close(run)
        raise
    _close(run)


def _close(run: Run) -> None:
    run.saver.close()
    if run.folder is None:
        return
    if run.saver.lost is not None:
        warn(f"No checkpoint of this run could be written: {run.saver.lost}", stacklevel=2)
    if not run.history.num_epochs:
        run.folder.discard()  # if it has no checkpoint either: the next try may have the name


def save_the_end(run: Run) -> bool:
    """Save the last checkpoint, mark an interruption, and return whether the program leaves too."""
    state, kind = run.training.state, run.training.stopping.kind
    if kind == "callback":
        state.finished = run.history.stop_reason
    if kind != "callback" or run.history.num_epochs:
        run.saver.save(run.training)
        run.saver.finish()
    if kind in (None, "callback"):
        return False
    if run.folder is not None:
        is_saved = run.saver.is_saved(state)
        mark = {"step": state.step, "epoch": state.epoch, "is_saved": is_saved, "reason": run.history.stop_reason}
        run.folder.write_json("preempted.json", mark | {"time": time.time()})
        if is_saved:
            run.announce(f'Step {state.step} is saved in {run.folder.path}: resume="auto" goes on from it.')
    return kind in LEAVING


def report_end(run: Run, holds_best: bool = False, is_failed: bool = False) -> None:
    """Say how the run has ended, on the screen and in its files."""
    run.saver.finish()
    is_whole = run.training.stopping.kind in (None, "callback")
    how = "failed" if is_failed else "finished" if is_whole else "interrupted"
    run.reporter.report_end(holds_best, how, advice_of(run))


def record_fault(run: Run, error: NonFiniteError) -> None:
    """Show the epoch whose loss was not finite in the history, as such, and leave a note of the batch."""
    training = run.training
    if run.folder is not None:
        note: dict[str, Any] = {"error": str(error)}
        for name, (data_pass, number) in zip(("batch", "batch before"), error.places, strict=False):
            samples = training.loader.indices_of(data_pass, number)
            note[name] = {"data_pass": data_pass, "number": number, "samples": samples}
        run.folder.write_json("nonfinite.json", note)
    prefixes = [f"{name}/" if name else "" for name in run.test_loaders]
    named = [prefix + score for prefix in prefixes for score in ("loss", *run.metrics.names)]
    known = run.history.metrics or named  # parts of metrics are known after an epoch
    names = ["loss", *known, *({run.monitor} - {"train_loss", "test_loss"})] if prefixes else []
    record(run, Totals(math.nan, {}, 0, None), dict.fromkeys(names, math.nan))
    run.reporter.report_epoch(training.clock)
    report_end(run, is_failed=True)
