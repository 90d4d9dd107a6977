"""The picture of a run: train and test loss per epoch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy

from ..base.extras import require
from .steps import steps_of

if TYPE_CHECKING:
    from ..history import History


def draw_losses(target: str | os.PathLike[str] | BinaryIO, history: History, **options: Any) -> None:
    """Draw train and test loss per epoch, the gap shaded and the best epoch marked, into an image file.

    What was read back of the train loss within the epochs is a thin line behind them.

    The ending of the file chooses the format, unless the options of `savefig` name one. The figure is made without
    pyplot, which would choose a screen and keep it alive.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that brings it.
    """
    require("matplotlib", no="picture of the losses")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context({"text.usetex": False}):  # chosen for papers; this machine may have no LaTeX
        # As wide as a column of a paper, with letters that can be read at half the size.
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        places, by_step = points_by_step(history)
        if places:
            axes.plot(places, by_step, linewidth=0.8, color="#0969da", alpha=0.45, label="train loss by step")
        marker = "o" if history.num_epochs <= 40 else None
        train_losses, test_losses, best_epoch = history.train_losses, history.test_losses, history.best_epoch
        epochs = range(1, history.num_epochs + 1)
        for label, losses, colour in (("train loss", train_losses, "#0969da"), ("test loss", test_losses, "#cf5a00")):
            if losses:
                axes.plot(epochs, losses, marker=marker, markersize=4, linewidth=2, color=colour, label=label)
        if len(test_losses) == len(train_losses):
            axes.fill_between(epochs, train_losses, test_losses, color="#cf5a00", alpha=0.12, linewidth=0)
        if best_epoch is not None:
            axes.axvline(best_epoch, color="#57606a", linestyle="--", linewidth=1.5, label=f"best epoch ({best_epoch})")
        axes.set_xlabel("epoch", fontsize=14)
        axes.set_ylabel("loss", fontsize=14)
        axes.tick_params(labelsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if history.num_epochs == 1 and not places:
            axes.set_xticks([1])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=13)
        figure.savefig(target, **{"dpi": 200, **options})


def points_by_step(history: History) -> tuple[list[float], list[Any]]:
    """Return what was read back of the train loss: the epochs done by then, with fractions, and the losses."""
    curves, ends = steps_of(history), [0, *history.epoch_steps]
    known = [place for place, step in enumerate(curves.steps) if step <= ends[-1]]
    steps, losses = [curves.steps[place] for place in known], [curves.train_losses[place] for place in known]
    return numpy.interp(steps, ends, range(len(ends))).tolist(), losses
