"""The picture of a run: train and test loss per epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, BinaryIO


def figure_of_losses(train_losses: Sequence[float], test_losses: Sequence[float], best_epoch: int | None) -> Any:
    """Return a matplotlib figure of train and test loss per epoch, the gap shaded and the best epoch marked.

    It is made without pyplot, which would choose a screen and keep it alive.

    Args:
        train_losses: One per epoch.
        test_losses: One per epoch, or none at all.
        best_epoch: The epoch to mark, 1-based.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Of a column's width in a paper, with letters that can be read at half the size.
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    marker = "o" if len(train_losses) <= 40 else None
    epochs = range(1, len(train_losses) + 1)
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
    if len(epochs) == 1:
        axes.set_xticks([1])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=13)
    return figure


def draw_losses(
    target: str | os.PathLike[str] | BinaryIO,
    train_losses: Sequence[float],
    test_losses: Sequence[float],
    best_epoch: int | None,
    **options: Any,
) -> None:
    """Draw the figure into an image file; its ending chooses the format.

    Args:
        target: Where to; with a `format` among the options also an open file.
        train_losses: One per epoch.
        test_losses: One per epoch, or none at all.
        best_epoch: The epoch to mark, 1-based.
        **options: Of `savefig`.
    """
    from matplotlib import rc_context

    with rc_context({"text.usetex": False}):  # chosen for papers; this machine may have no LaTeX
        figure_of_losses(train_losses, test_losses, best_epoch).savefig(target, **{"dpi": 200, **options})
