"""A model's answers for all samples, of all processes: what the report of an evaluation is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..base.exchange import gather_on_main
from ..devices.gathering import Gathered, join
from ..devices.hardware import Hardware
from ..libraries.transformers import own_loss, predicts_next
from ..numbers.forward import Forward
from ..numbers.objective import Objective
from .answers import Answers, Kind, answers_of, reading_of


class GatheredAnswers(Gathered):
    """Reduce the answers of each micro-batch to a few numbers per sample, and gather these in order.

    A sample of a classification takes 30 bytes on the main process. What has many targets per sample, such as the
    pixels of an image, is counted: that takes two tables of classes x classes on each process.
    """

    def __init__(self, kind: Kind, objective: Objective, model: nn.Module, hardware: Hardware) -> None:
        self.kind, self._reading = kind, reading_of(objective.loss_fn)
        self._self_scoring = model if objective.compute_loss is own_loss else None
        super().__init__(hardware, is_bounded=True)

    def start(self) -> None:
        """Begin, from the first sample."""
        super().start()
        self._counts: Tensor | None = None
        self._num_classes = 0
        self._axes: set[tuple[int, ...]] = set()

    def part_of(self, given: Forward, num_samples: int) -> dict[str, Tensor]:
        """Return the columns of numbers, and count."""
        answers: Answers = answers_of(
            self.kind,
            given,
            num_samples,
            self._reading,
            self._self_scoring is not None and predicts_next(self._self_scoring),  # known after its first loss
        )
        self._num_classes = answers.num_classes
        self._axes.add(answers.axes)
        if answers.counts is not None:
            self._counts = answers.counts if self._counts is None else self._counts + answers.counts
        return answers.columns

    def joined(self) -> dict[str, Any] | None:
        """Return columns, counts, classes and the axes that they may be on, on the main process; `None` on the others.

        Whole numbers are added, so the counts are the same on any number of processes.
        """
        columns = join(self.parts())
        mine = None if self._counts is None else self._counts.cpu()
        everyone = gather_on_main((mine, self._num_classes, self._axes))
        if not self.hardware.is_main:
            return None
        counts = [counts for counts, _, _ in everyone if counts is not None]
        return {
            "columns": columns or {},
            "counts": sum(counts[1:], counts[0]) if counts else None,
            "num_classes": max(number for _, number, _ in everyone),
            "axes": set().union(*(axes for _, _, axes in everyone)),
            "reading": self._reading.scores,
        }
