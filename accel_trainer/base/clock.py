"""The time of a run: waiting for data, computing, evaluating, saving."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_PARTS = ("data_seconds", "evaluation_seconds", "saving_seconds")


class Clock:
    """Measure the parts of each epoch; time that is not measured computes, or waits for the device.

    Epochs follow each other without a gap: what is saved after one counts for the next.
    """

    def __init__(self) -> None:
        self._waited_before = 0.0
        self.restore({})

    def restore(self, spent: Mapping[str, float]) -> None:
        """Begin an epoch, or go on with one that had taken these seconds, as `spent` returned them."""
        self._spent = {part: float(spent.get(part, 0.0)) for part in _PARTS}
        self._started = time.perf_counter() - float(spent.get("epoch_seconds", 0.0))

    def spent(self, waited: float) -> dict[str, float]:
        """Return the seconds of the epoch so far: `epoch_seconds`, its parts, and `compute_seconds`, the rest.

        `waited` are the seconds that the whole run has waited for training data.
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
