"""An average of the weights, which is evaluated and kept in place of the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ..base.dtensors import cut_like, is_cut, local
from ..callbacks import Callback
from .scalars import not_finite

if TYPE_CHECKING:
    from ..trainer import Trainer


class WeightAverage(Callback):
    """Evaluate an average of the weights; choose the best epoch by it, and save it as the best weights.

    The training itself goes on with its own weights. The average is that of `torch.optim.swa_utils`, of all weights
    that are trained and all floating-point buffers that are finite at first, such as the running statistics of
    BatchNorm. A weight that is unfrozen later has an average from then on. It is a function of the weights alone: the
    same on any number of processes, and a run that goes on from a checkpoint goes on with it.

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
        self._counts: dict[str, int] = {}  # how many weights each average has taken in
        self._epoch = 0  # the last that was taken in, with `update_every="epoch"`
        self._is_loaded = False
        self._put_aside: list[tuple[Tensor, Tensor]] = []  # weights of the model, and their values in the training

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin anew, or go on from the average of a checkpoint."""
        if not self._is_loaded:
            self._average, self._counts, self._epoch = {}, {}, 0
        self._is_loaded, self._put_aside = False, []
        weights = dict(trainer.model.named_parameters())
        for name, average in self._average.items():  # a checkpoint gives them whole
            if name in weights and is_cut(weights[name]) and not is_cut(average):
                self._average[name] = cut_like(average, weights[name])

    def on_step_end(self, trainer: Trainer) -> None:
        """Take in the weights of this step."""
        if self._update_every == "step" and trainer.state.epoch >= self._start_epoch:
            self._take_in(trainer.model)

    def on_evaluation_start(self, trainer: Trainer) -> None:
        """Give the model the average."""
        epoch = trainer.state.epoch
        if self._update_every == "epoch" and epoch >= self._start_epoch and epoch > self._epoch:
            self._take_in(trainer.model)
            self._epoch = epoch  # an evaluation that was cut short is done again
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
        """Return the average, how it is made, and how far it has come."""
        how = [self._decay, self._update_every, self._start_epoch]
        return {"how": how, "average": dict(self._average), "counts": dict(self._counts), "epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; a `ValueError` says that it was another average."""
        how = [self._decay, self._update_every, self._start_epoch]
        if list(state["how"]) != how:
            raise ValueError(
                "The checkpoint's WeightAverage has decay, update_every and start_epoch "
                f"{list(state['how'])}, and this one has {how}: set that back, or begin a new run."
            )
        self._average, self._counts = dict(state["average"]), dict(state["counts"])
        self._epoch, self._is_loaded = int(state["epoch"]), True

    @torch.no_grad()
    def _take_in(self, model: nn.Module) -> None:
        """Update the average; a weight that is new in it, or has another shape now, begins with its present value."""
        known: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # by count: averages and present values
        for name, tensor in self._tensors(model).items():
            average = self._average.get(name)
            if average is None or average.shape != tensor.shape:
                # In single precision at least: small changes would be lost in others.
                wide = torch.promote_types(tensor.dtype, torch.float32)
                self._average[name], self._counts[name] = tensor.detach().to(wide, copy=True), 1
                continue
            self._average[name] = average = average.to(tensor.device)
            averages, values = known.setdefault(self._counts[name], ([], []))
            averages.append(local(average))
            values.append(local(tensor).detach().to(average.dtype))
            self._counts[name] += 1
        update: Any = get_swa_multi_avg_fn if self._decay is None else partial(get_ema_multi_avg_fn, self._decay)
        for count, (averages, values) in known.items():
            update()(averages, values, count)

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what has an average, and what is trained now, and buffers that may change, by name.

        Buffers that are not finite, such as masks, are left out: their average would be nan.
        """
        trained = {n: one for n, one in model.named_parameters() if one.requires_grad or n in self._average}
        buffers = {n: one for n, one in model.named_buffers() if one.is_floating_point()}
        new = {n: one for n, one in buffers.items() if n not in self._average}
        masks = list(new) if self._average else not_finite(new)
        return {**trained, **{n: one for n, one in buffers.items() if n not in masks}}

    @torch.no_grad()
    def _put_in(self, model: nn.Module) -> None:
        for tensor, average in self._pairs(model):
            tensor.copy_(average)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor of the model that has an average, and its average."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        pairs = [(tensors[name].detach(), average) for name, average in self._average.items() if name in tensors]
        return [(tensor, average) for tensor, average in pairs if tensor.shape == average.shape]
