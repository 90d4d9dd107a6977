"""The user's metrics: means over samples, objects that keep their own sums, and functions of all outputs at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..base.exchange import gather_objects
from .forward import Forward


class Metrics:
    """The user's metrics over one evaluation.

    `metrics` are functions `(outputs, targets) -> per-sample values or their mean` and torchmetrics objects, `whole`
    functions of the outputs and targets of all samples, each by its name. An object, or a function of all outputs, may
    return several values, as a dictionary or a vector: each is then called by the name of the metric, a slash, and its
    own name or number.
    """

    def __init__(self, metrics: Mapping[str, Any] | None, whole: Mapping[str, Any] | None = None) -> None:
        metrics = _taken_apart(metrics)
        for argument, given in (("metrics", metrics), ("whole_metrics", whole)):
            if given is not None and (not isinstance(given, Mapping) or hasattr(given, "compute")):
                raise TypeError(f"{argument} must be a dictionary of names and metrics, got {type(given).__name__}.")
        self.functions: dict[str, Callable[[Any, Any], Any]] = {}
        self.whole: dict[str, Callable[[Any, Any], Any]] = dict(whole or {})
        self._objects: dict[str, Any] = {}
        self.names = (*(metrics or ()), *self.whole)
        for name in self.names:
            if name in ("loss", "train_loss", "test_loss"):
                raise ValueError(f"The name {name!r} of a metric is taken by the trainer's own numbers.")
            if self.names.count(name) > 1:
                raise ValueError(f"Two metrics are named {name!r}.")
        for name, function in self.whole.items():
            if not callable(function) or hasattr(function, "update"):
                raise TypeError(
                    f"The whole metric {name!r} must be a function of (outputs, targets), got {function!r}."
                )
        # By name, since their sums are exchanged in this order: a dictionary made of a set has another on each process.
        for name, metric in sorted((metrics or {}).items()):
            if all(hasattr(metric, method) for method in ("update", "compute", "reset")):
                self._objects[name] = metric
            elif callable(metric):
                self.functions[name] = metric
            else:
                raise TypeError(f"The metric {name!r} must be callable or a torchmetrics object, got {metric!r}.")

    @property
    def called(self) -> list[Any]:
        """The user's functions and objects that are called for each micro-batch."""
        return [*self.functions.values(), *self._objects.values()]

    def better(self, name: str) -> Literal["min", "max"] | None:
        """Return whether a lower or a higher value is better, `None` if the metric does not say so itself."""
        higher = getattr(self._objects.get(name), "higher_is_better", None)
        return None if higher is None else "max" if higher else "min"

    def check_merging(self) -> None:
        """Refuse (TypeError), before anything is trained, objects whose states cannot be merged over processes."""
        for name, metric in self._objects.items():
            try:
                copied = copy.deepcopy(metric)
                copied.merge_state(copy.deepcopy(metric))
                mergeable = all(callable(reduce) for reduce in getattr(copied, "_reductions", {}).values())
            except (AttributeError, RuntimeError):
                mergeable = False
            if not mergeable:
                raise TypeError(
                    f"The metric {name!r} cannot be merged over processes ({type(metric).__name__} of torchmetrics; "
                    "1.6 or newer can merge most). Give a function of (outputs, targets), or use one process."
                )

    def check_bitwise(self) -> None:
        """Refuse (TypeError) objects that keep other sums than counts, whose last bits depend on the layout."""
        for name, metric in self._objects.items():
            if not _only_counts(metric):
                raise TypeError(
                    f"The metric {name!r} is a {type(metric).__name__} object, which adds up in an order of its own: "
                    "with bitwise=True give an object that only counts, such as an accuracy of torchmetrics, or a "
                    "function of (outputs, targets) that returns one value per sample."
                )

    def reset(self, device: torch.device) -> None:
        """Begin an evaluation."""
        for name, metric in self._objects.items():
            metric.reset()
            self._objects[name] = metric.to(device) if hasattr(metric, "to") else metric

    def totals(self, forward: Forward, num_samples: int) -> list[float | Tensor]:
        """Return the sum of each metric over the samples of a micro-batch, and update the objects."""
        for metric in self._objects.values():
            metric.update(forward.outputs, forward.targets)
        return [
            total_of(name, function(forward.outputs, forward.targets), num_samples)
            for name, function in self.functions.items()
        ]

    def merge(self, num_processes: int) -> dict[str, float]:
        """Return the value of each object over all processes."""
        values: dict[str, float] = {}
        for name, metric in self._objects.items():
            values |= _named_values(name, (metric if num_processes == 1 else _merged(metric)).compute())
        return values

    def of_all(self, outputs: Any, targets: Any) -> dict[str, float]:
        """Return the value of each function of all outputs; nan where there are none."""
        values: dict[str, float] = {}
        for name, function in self.whole.items():
            values |= _named_values(name, math.nan if outputs is None else function(outputs, targets))
        return values

    def in_order(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return values in the order in which the user gave the metrics."""
        return {
            name: value
            for metric in self.names
            for name, value in values.items()
            if metric_of(name, self.names) == metric
        }


def _taken_apart(metrics: Any) -> Any:
    """Return metrics in which the members of a collection of torchmetrics stand for themselves."""
    if hasattr(metrics, "compute") and hasattr(metrics, "items"):
        return dict(metrics.items())
    if not isinstance(metrics, Mapping):
        return metrics
    apart: dict[str, Any] = {}
    for name, metric in metrics.items():
        inner = _taken_apart(metric) if hasattr(metric, "items") else None
        apart |= {name: metric} if inner is None else {f"{name}/{key}": one for key, one in inner.items()}
    return apart


def _only_counts(metric: Any) -> bool:
    """Return whether a torchmetrics object keeps whole numbers only, whose sums do not depend on their order."""
    defaults, reductions = getattr(metric, "_defaults", {}), getattr(metric, "_reductions", {})
    are_counts = (isinstance(one, Tensor) and not one.is_floating_point() for one in defaults.values())
    are_sums = (
        getattr(one, "__name__", "") in ("dim_zero_sum", "dim_zero_max", "dim_zero_min") for one in reductions.values()
    )
    return bool(defaults) and all(are_counts) and all(are_sums)


def metric_of(name: str, names: tuple[str, ...]) -> str | None:
    """Return the metric that a value belongs to: its name is that of the metric, or begins with it and a slash."""
    return next((one for one in names if name == one or name.startswith(f"{one}/")), None)


def _named_values(name: str, result: Any) -> dict[str, float]:
    """Return the value, or the several values, of the result of a metric, by name."""
    if isinstance(result, Mapping):
        return {
            key: one for inner, value in result.items() for key, one in _named_values(f"{name}/{inner}", value).items()
        }
    try:
        values = torch.as_tensor(result)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"The metric {name!r} must return numbers, got a {type(result).__name__}.") from error
    if values.ndim == 0:
        return {name: float(values)}
    return {f"{name}/{index}": float(value) for index, value in enumerate(values.flatten().tolist())}


def total_of(name: str, result: Any, num_samples: int) -> float | Tensor:
    """Return the sum over the samples of the result of a metric: a value for each, or their mean.

    Raises:
        TypeError: The result is neither.
        ValueError: It has values, but not one per sample.
    """
    if isinstance(result, (int, float)):
        return result * num_samples
    try:
        value: Tensor = torch.as_tensor(result).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"The metric {name!r} must return one value per sample or their mean, got a {type(result).__name__}: give "
            "each of its values a metric of its own."
        ) from error
    if value.ndim == 0:
        return value * num_samples
    if value.numel() != num_samples:
        raise ValueError(
            f"The metric {name!r} must return one value per sample or their mean: for {num_samples} samples it "
            f"returned shape {tuple(value.shape)}."
        )
    return value.sum()  # whole numbers and booleans are counted exactly


def _merged(metric: Any) -> Any:
    # Processes without samples are left out: merging an empty state fails for some metrics.
    parts = gather_objects(copy.deepcopy(metric).cpu() if metric.update_count else None)
    first, *others = [part for part in parts if part is not None] or [copy.deepcopy(metric)]
    for other in others:
        first.merge_state(other)
    first.distributed_available_fn = lambda: False  # compute() would add the processes once more
    return first
