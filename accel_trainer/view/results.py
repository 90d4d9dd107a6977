"""Where the results of an evaluation are kept, and what its report is made of."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch.utils.data import DataLoader

from ..data.order import dataset_order, index_batches, is_stream
from ..data.randomness import EVALUATION, derive_seed, seed_all
from ..devices.hardware import Hardware
from ..storage.checkpoints import BEST
from ..storage.weight_files import metadata_of
from .answers import KINDS
from .assessment import Details, assess, check_library, show_wrong
from .gathered_answers import GatheredAnswers
from .report import LivePage, RunFiles, keep_evaluation
from .samples import describe_dataset


class Results:
    """Where the evaluations of a trained model are kept: with its run, if that has a folder.

    The page is known on the main process only.

    Attributes:
        epoch: The epoch whose weights the model has; `None` before a run has ended.
    """

    def __init__(self, page: LivePage | None = None, epoch: int | None = None) -> None:
        self._page, self.epoch = page, epoch
        self._data: dict[str, weakref.ref[Any]] = {}  # of the run, by what they were for

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": {}}  # references of this process

    @classmethod
    def of(cls, run_dir: str | os.PathLike[str]) -> Results:
        """Return those of a run that has ended, whose best weights the model has."""
        record = RunFiles.load(run_dir)
        epoch = metadata_of(record.path / BEST)["epoch"]  # a disk that was full has an older one
        return cls(LivePage(record.path, record.history, record.state), int(epoch))

    def note_data(self, loaders: Mapping[str, Any]) -> None:
        """Note the loaders of a run, by what they are for."""
        for name, loader in loaders.items():
            with suppress(TypeError):  # of a list, say, that nothing refers to weakly
                self._data[name] = weakref.ref(getattr(loader, "dataset", None))

    def note_end(self, page: LivePage | None, epoch: int) -> None:
        """Note the page of a run that has ended, and the epoch whose weights the model has."""
        self._page, self.epoch = page, epoch

    def check_report(self, report: str | None, has_folder: bool) -> None:
        """Refuse a report of another kind, or for which there is no folder or library, before anything is computed."""
        if report is None:
            return
        if report not in KINDS:
            raise ValueError(f"report must be one of {', '.join(KINDS)}, or None, got {report!r}.")
        if not has_folder:
            raise ValueError(
                f"report={report!r} is written to the folder of a run, and there is none: call fit with a run_dir in "
                "TrainConfig before, or give evaluate the run_dir of a run whose weights the model holds."
            )
        check_library(report)

    def keep(
        self, loader: DataLoader[Any], scores: Mapping[str, float], details: Details | None, name: str | None
    ) -> None:
        """Keep an evaluation of a loader with the run, on the main process; without a folder nothing is kept."""
        if self._page is None:
            return
        roles = (role for role, dataset in self._data.items() if dataset() is loader.dataset)
        entry = {
            "data": name or next(roles, "final"),
            "dataset": describe_dataset(loader.dataset),
            "num_samples": None if is_stream(loader) else len(dataset_order(loader)),
            "epoch": self.epoch,
            "scores": scores,
        }
        keep_evaluation(self._page, entry, details)


def details_of(answers: GatheredAnswers, loader: DataLoader[Any], seed: int, hardware: Hardware) -> Details | None:
    """Return what the report of an evaluation shows, on the main process; `None` on the others, which call it too."""
    joined, details = answers.joined(), {}

    def assessed() -> list[int]:
        details.update(assess(answers.kind, joined, loader.dataset))  # type: ignore[arg-type]
        return [wrong["index"] for wrong in details["wrong"]]

    positions = hardware.from_main(assessed)
    # On all processes alike: a sampler may count how often it was asked.
    indices, total = ({}, 0) if is_stream(loader) else _samples_at(loader, seed, positions)
    if not hardware.is_main:
        return None
    seed_all(derive_seed(seed, EVALUATION))  # what a transform draws is the same in every report
    is_known = total == details["num_samples"]  # a collate function may leave some out, or add some
    return details | show_wrong(details["wrong"], loader.dataset, indices if is_known else None)


def _samples_at(loader: DataLoader[Any], seed: int, positions: Sequence[int]) -> tuple[dict[int, Any], int]:
    """Return the samples at some positions (0-based) of the first pass over a map-style dataset, and their number.

    They are given as what the sampler yields for them, their indices as a rule.
    """
    found, start = {}, 0
    for indices in index_batches(loader, seed, 1):
        for position in positions:
            if start <= position < start + len(indices):
                found[position] = indices[position - start]
        start += len(indices)
    return found, start
