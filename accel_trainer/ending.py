"""How a run ends: saved, told, and closed, also by an error."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .base.clock import advice
from .base.console import warn
from .data.order import is_stream
from .devices.compiled import num_compilations
from .devices.environment import masked
from .errors import NonFiniteError, ProcessFailedError
from .loop import record
from .numbers.loss_table import Totals
from .run import Run
from .view.reporter import Reporter

LEAVING = ("SIGTERM", "SIGUSR1")  # what ends the program too
# Class of an error -> the state in which it leaves a run; all others: failed. `TrialPruned` is Optuna's.
_ENDS = {"TrialPruned": "pruned", "KeyboardInterrupt": "interrupted"}
_LONGEST_REASON = 300  # characters


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
    run.reporter.report_end(holds_best, how, _advice(run))


_MANY_GRAPHS = 8  # one each for training and evaluation, and some for a model in parts, are as it should be


def _advice(run: Run) -> str | None:
    """Return one line when something takes time out of proportion."""
    training = run.training
    num_graphs = num_compilations() - training.num_graphs_before
    if num_graphs > _MANY_GRAPHS:
        return (
            f"The model was compiled {num_graphs} times: each new shape costs one. Pad samples to few lengths, or set "
            "TORCH_LOGS=recompiles to see why."
        )
    data_loader, source = training.loader.data_loader, training.loader.source
    is_read_here = is_stream(data_loader) or (source is not None and source.in_memory)
    remedies = {
        "data_seconds": None if is_read_here else f"raise num_workers of train_loader (now {data_loader.num_workers})",
        "evaluation_seconds": "evaluate less often with steps_per_epoch, or on fewer samples",
        "saving_seconds": "raise checkpoint_every" if run.folder is not None else None,
    }
    return advice(vars(run.history), remedies)


def record_fault(run: Run, error: NonFiniteError) -> None:
    """Show the epoch whose loss was not finite in the history, as such, and leave a note of the batch."""
    training = run.training
    if run.folder is not None:
        note: dict[str, Any] = {"error": str(error)}
        for name, (data_pass, number) in zip(("batch", "batch before"), error.places, strict=False):
            samples = training.loader.indices_of(data_pass, number)
            note[name] = {"data_pass": data_pass, "number": number, "samples": samples}
        run.folder.write_json("nonfinite.json", note)
    sets = [f"{name}/" if name else "" for name in run.test_loaders]
    named = [name + score for name in sets for score in ("loss", *run.metrics.names)]
    names = ["loss", *(run.history.metrics or named)]  # parts of metrics are known after an epoch
    names += [run.monitor] if run.monitor not in ("test_loss", "train_loss", *names) else []
    scores = dict.fromkeys(names, math.nan) if sets else {}
    record(run, Totals(math.nan, {}, 0, None), scores)
    run.reporter.report_epoch(training.clock)
    report_end(run, is_failed=True)


def report_failure(reporter: Reporter | None, kind: str, message: object) -> None:
    """Leave word in the run folder of the error that ends a run, by the name of its class."""
    state = _ENDS.get(kind, "failed")
    with suppress(Exception):  # whatever happens here, the error itself is what the user is told
        name = f"{kind}: " if state == "failed" and kind != ProcessFailedError.__name__ else ""
        text, *_ = masked([f"{state}: {name}{message}".strip(": ")])[0].splitlines()
        if reporter is not None:
            reporter.report_failure(state, text[:_LONGEST_REASON])
