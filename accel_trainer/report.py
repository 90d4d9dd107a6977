"""The picture of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence

__all__ = ["draw_losses"]


def draw_losses(
    path: str | os.PathLike[str],
    train_losses: Sequence[float],
    test_losses: Sequence[float],
    best_epoch: int | None,
) -> None:
    """Draw train and test loss per epoch, the best epoch marked, into an image file.

    Args:
        path: Image to write; its ending chooses the format.
        train_losses: One per epoch.
        test_losses: One per epoch, or none at all.
        best_epoch: The epoch to mark, 1-based.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    # The figure is made without pyplot, which would choose a screen and keep the figure alive.
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Drawing needs matplotlib: pip install 'accel_trainer[plot]'", name=error.name
        ) from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, losses in (("train loss", train_losses), ("test loss", test_losses)):
        if losses:
            axes.plot(range(1, len(losses) + 1), losses, marker="o", markersize=3, label=label)
    if best_epoch is not None:
        axes.axvline(best_epoch, color="grey", linestyle="--", label=f"best epoch ({best_epoch})")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
