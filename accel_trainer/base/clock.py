"""Where the time of a run goes: waiting for data, computing, evaluating, saving."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

PARTS = ("data_seconds", "evaluation_seconds", "saving_seconds")


class Clock:
    """Measure the parts of one epoch after the other; what is not measured computes, or waits for the device.

    Epochs follow each other without a gap: what is saved after one counts for the next.
    """

    def __init__(self) -> None:
        self._waited_before = 0.0
        self.restore({})

    def restore(self, spent: Mapping[str, float]) -> None:
        """Begin an epoch, or go on with one that has taken as much already as `spent` said then."""
        self._spent = {part: float(spent.get(part, 0.0)) for part in PARTS}
        self._started = time.perf_counter() - float(spent.get("epoch_seconds", 0.0))

    def spent(self, waited: float) -> dict[str, float]:
        """Return the seconds of the epoch so far: `epoch_seconds`, its parts, and `compute_seconds`, the rest.

        Args:
            waited: Seconds that the run has waited for training data.
        """
        whole = time.perf_counter() - self._started
        parts = self._spent | {"data_seconds": self._spent["data_seconds"] + waited - self._waited_before}
        return {"epoch_seconds": whole, **parts, "compute_seconds": whole - sum(parts.values())}

    def end_epoch(self, waited: float) -> dict[str, float]:
        """Return what the epoch took, as `spent` does, and begin the next."""
        spent = self.spent(waited)
        self._waited_before = waited
        self.restore({})
        return spent

    @contextmanager
    def measured(self, part: str) -> Iterator[None]:
        """Count the block as a part of the epoch."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - started


# Part -> the share of a run from which on it is out of proportion, and what it does with the time.
_SHARES = {
    "data_seconds": (0.25, "waits for data"),
    "evaluation_seconds": (0.5, "evaluates the test set"),
    "saving_seconds": (0.15, "waits for checkpoints"),
}
_LEAST_SECONDS = 5.0  # of a run that is worth advice


def advice(series: Mapping[str, Sequence[float]], remedies: Mapping[str, str | None]) -> str | None:
    """Return one line when a part of a run takes a time out of proportion, else `None`.

    Args:
        series: Seconds per epoch of the whole, `epoch_seconds`, and of each part.
        remedies: Part -> what helps against it; one without a remedy is passed over.
    """
    whole = sum(series["epoch_seconds"])
    if whole < _LEAST_SECONDS:
        return None
    shares = {part: sum(series[part]) / whole for part in _SHARES if remedies.get(part) is not None}
    excess = {part: share - _SHARES[part][0] for part, share in shares.items()}
    worst = max(excess, key=lambda part: excess[part], default=None)
    if worst is None or excess[worst] <= 0:
        return None
    return f"{shares[worst]:.0%} of the time {_SHARES[worst][1]}: {remedies[worst]}.".replace("%", " %", 1)
