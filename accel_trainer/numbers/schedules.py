"""When a learning-rate scheduler steps: once per real update or once per epoch, whatever the number of processes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from ..base.console import warn


class Schedule:
    """The user's scheduler and the moments at which it steps.

    It never goes through `Accelerator.prepare`, which would step it once per process
    (huggingface/accelerate issues 2926, 2142 and 1398).

    Args:
        scheduler: A torch scheduler of this optimizer, or a factory `(optimizer, num_steps) -> scheduler`.
        optimizer: The user's optimizer.
        every: Whether it steps once per `step` or once per `epoch`; `ReduceLROnPlateau` steps per epoch.
        num_steps: Optimizer steps of the whole run, `None` where a loader cannot say.
        num_epochs: Epochs of the run, which a factory gets in place of steps with `every="epoch"`.
    """

    def __init__(
        self,
        scheduler: LRScheduler | Callable[[Optimizer, int], LRScheduler],
        optimizer: Optimizer,
        every: Literal["step", "epoch"] = "step",
        num_steps: int | None = None,
        num_epochs: int = 1,
    ) -> None:
        self.total: int | None = None  # number of steps, or epochs, that a factory was given
        if not hasattr(scheduler, "step"):
            self.total = total = num_steps if every == "step" else num_epochs
            if total is None:
                raise ValueError(
                    "The scheduler is made for a number of steps, and the train loader has no length: "
                    "set max_steps, or steps_per_epoch."
                )
            made = scheduler(optimizer, total)
            if not hasattr(made, "step"):
                raise TypeError(f"The function given as scheduler must return a torch scheduler, got {made!r}.")
            scheduler = made
        check_scheduler(scheduler, optimizer)
        self.scheduler: Any = scheduler
        self._optimizer = optimizer
        self._wants = _wanted(scheduler)
        self._on_plateau = "value" in self._wants and "epoch" not in self._wants
        self._updates = hasattr(scheduler, "step_update")
        self._per_step = every == "step" and not self._wants
        self._has_ended = False

    def after_step(self, num_steps: int) -> None:
        """Step after the `num_steps`-th update of the run; skipped updates do not count."""
        if self._per_step:
            self._step()
        if self._updates:
            self.scheduler.step_update(num_steps)

    def after_epoch(self, num_epochs: int, value: float) -> None:
        """Step after the `num_epochs`-th epoch of the run, with its monitored value."""
        if not self._per_step:
            self._step(*({"epoch": num_epochs, "value": value}[wanted] for wanted in self._wants))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scheduler, and the total that a factory was given."""
        return {"total": self.total, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scheduler; the optimizer has its learning rates already."""
        self.scheduler.load_state_dict(state["scheduler"])

    def is_made_for_another(self, total: int | None) -> bool:
        """Return whether a factory has made this schedule for another total."""
        return self.total is not None and not self._on_plateau and self.total != total

    def catch_up(self, num_steps: int, num_epochs: int) -> list[dict[str, Any]]:
        """Step as often as a run of another length has until now, and return the optimizer's settings after that."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects an update before each
            for number in range(1, (num_steps if self._per_step else num_epochs) + 1):
                self._step(*([number] if self._wants else []))
            if self._updates:
                self.scheduler.step_update(num_steps)
        return settings_of(self._optimizer)

    def _step(self, *wanted: float) -> None:
        if self._has_ended:
            return
        if not isinstance(self.scheduler, OneCycleLR):
            self.scheduler.step(*wanted)
            return
        try:
            self.scheduler.step()
        except ValueError as error:  # it refuses to go beyond its own number of steps
            warn(f"The schedule has ended; the learning rate stays as it is. ({error})", stacklevel=2)
            self._has_ended = True


_NAMES = {"epoch": "epoch", "metrics": "value", "metric": "value", "val_loss": "value", "loss": "value"}


def _wanted(scheduler: object) -> tuple[str, ...]:
    """Return the arguments of the scheduler's `step`: nothing, the number of the epoch, the value, or both.

    Torch's schedulers count themselves, and need nothing but `ReduceLROnPlateau` its value. Those of timm need the
    number, and take the value too; between the epochs they have `step_update(num_updates)`.
    """
    try:
        parameters = inspect.signature(scheduler.step).parameters.values()  # type: ignore[attr-defined]
    except ValueError:  # compiled code has no signature
        return ()
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if not all(name in _NAMES for name in needed):
        raise TypeError(
            f"The scheduler {type(scheduler).__name__} needs {', '.join(needed)} at each step, and this loop can give "
            f"it {', '.join(_NAMES)} only."
        )
    if needed == ["epoch"]:
        needed += [one.name for one in parameters if one.name in ("metric", "metrics")]
    return tuple(_NAMES[name] for name in needed)


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of an optimizer's parameter groups: learning rate, momentum and so on."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def check_scheduler(scheduler: object, optimizer: Optimizer) -> None:
    """Refuse a scheduler that would not move this optimizer's learning rate."""
    if isinstance(scheduler, type):
        name = scheduler.__name__
        raise TypeError(
            f"scheduler is the class {name}; give {name}(optimizer, ...) or a function (optimizer, num_steps)."
        )
    if scheduler is None or (callable(scheduler) and not hasattr(scheduler, "step")):
        return
    if not hasattr(scheduler, "step"):
        raise TypeError(
            f"scheduler must be a torch scheduler or a function (optimizer, num_steps), got {type(scheduler).__name__}."
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("The scheduler was made for another optimizer than the one given to the trainer.")
    _wanted(scheduler)
