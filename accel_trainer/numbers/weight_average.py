"""An average of the weights, which is evaluated and kept in place of the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ..callbacks import Callback

if TYPE_CHECKING:
    from ..trainer import Trainer


class WeightAverage(Callback):
    """Evaluate an average of the weights; choose the best epoch by it, and save it as the best weights.

    The training itself goes on with its own weights. The average is that of `torch.optim.swa_utils`, of all weights
    that are trained and all floating-point buffers, such as the running statistics of BatchNorm. It is a function of
    the weights alone: the same on any number of processes, and a run that goes on from a checkpoint goes on with it.

    Args:
        decay: How much the average counts in each update of itself, greater than 0 and less than 1 (exponential moving
            average, EMA); `None` lets all weights count the same (stochastic weight averaging, Izmailov et al., 2018).
        update_every: Whether the average takes in the weights after each `step` or after each `epoch`.
        start_epoch: The first epoch, 1-based, whose weights it takes in; before it the last weights are evaluated.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> ema = WeightAverage(decay=0.99)
        >>> swa = WeightAverage(decay=None, update_every="epoch", start_epoch=10)
    """

    def __init__(
        self, decay: float | None = 0.999, update_every: Literal["step", "epoch"] = "step", start_epoch: int = 1
    ) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay must be greater than 0 and less than 1, or None, got {decay!r}.")
        if update_every not in ("step", "epoch"):
            raise ValueError(f"update_every must be 'step' or 'epoch', got {update_every!r}.")
        if type(start_epoch) is not int or start_epoch < 1:
            raise ValueError(f"start_epoch must be a whole number of at least 1, got {start_epoch!r}.")
        self._decay, self._update_every, self._start_epoch = decay, update_every, start_epoch
        self._average: dict[str, Tensor] = {}
        self._num_averaged = 0
        self._is_loaded = False
        self._put_aside: list[tuple[Tensor, Tensor]] = []  # weights of the model, and their values in the training

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin anew, or go on from the average of a checkpoint."""
        if not self._is_loaded:
            self._average, self._num_averaged = {}, 0
        self._is_loaded, self._put_aside = False, []

    def on_step_end(self, trainer: Trainer) -> None:
        """Take in the weights of this step."""
        if self._update_every == "step" and trainer.state.epoch >= self._start_epoch:
            self._take_in(trainer.model)

    def on_evaluation_start(self, trainer: Trainer) -> None:
        """Give the model the average."""
        if self._update_every == "epoch" and trainer.state.epoch >= self._start_epoch:
            self._take_in(trainer.model)
        self._put_aside = [(tensor, tensor.clone()) for tensor, _ in self._pairs(trainer.model)]
        self._put_in(trainer.model)

    def on_evaluation_end(self, trainer: Trainer) -> None:
        """Give the model back the weights of the training."""
        with torch.no_grad():
            for tensor, value in self._put_aside:
                tensor.copy_(value)
        self._put_aside = []

    def on_fit_end(self, trainer: Trainer) -> None:
        """Leave the average in the model, where the run does not restore the best."""
        if not trainer.config.restore_best:
            self._put_in(trainer.model)

    def state_dict(self) -> dict[str, Any]:
        """Return the average, and how many weights it has taken in."""
        return {"average": dict(self._average), "num_averaged": self._num_averaged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._average, self._num_averaged = dict(state["average"]), int(state["num_averaged"])
        self._is_loaded = True

    @torch.no_grad()
    def _take_in(self, model: nn.Module) -> None:
        """Update the average; a weight that is new in it, or has another shape now, begins with its present value."""
        averages, values = [], []
        for name, tensor in _trained(model).items():
            average = self._average.get(name)
            if average is None or average.shape != tensor.shape:
                # In single precision at least: small changes would be lost in others.
                wide = torch.promote_types(tensor.dtype, torch.float32)
                self._average[name] = tensor.detach().to(wide, copy=True)
                continue
            self._average[name] = average = average.to(tensor.device)
            averages.append(average)
            values.append(tensor.detach().to(average.dtype))
        if averages:
            update: Any = get_swa_multi_avg_fn if self._decay is None else partial(get_ema_multi_avg_fn, self._decay)
            update()(averages, values, self._num_averaged)
        self._num_averaged += 1

    @torch.no_grad()
    def _put_in(self, model: nn.Module) -> None:
        for tensor, average in self._pairs(model):
            tensor.copy_(average)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor of the model that has an average, and its average."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        pairs = [(tensors[name].detach(), average) for name, average in self._average.items() if name in tensors]
        return [(tensor, average) for tensor, average in pairs if tensor.shape == average.shape]


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained, and the buffers that can be averaged, by name."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {**trained, **buffers}
