"""Find losses, gradients and weights that are not finite, and report where they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from ..base.console import some_of
from ..base.dtensors import local, locals_of
from ..base.exchange import any_process, gather_objects
from ..errors import NonFiniteError
from ..state import TrainState
from .loss_table import Fault, LossTable, MeanNorm, Totals
from .scalars import is_finite, not_finite, sum_of_norms

_ADVICE = "Lower the learning rate, set max_grad_norm, or look at the data."


class FiniteCheck:
    """Check whether a training stays finite; if not, `raise` an error, `skip` the update, or `ignore` it.

    With `is_divided` each process looks at its own rows of the weights, and they tell each other.
    """

    def __init__(
        self, model: nn.Module, on_nonfinite: Literal["raise", "skip", "ignore"], is_divided: bool = False
    ) -> None:
        self._model, self._on_nonfinite, self._is_divided = model, on_nonfinite, is_divided
        unchanging = dict(model.named_buffers())
        unchanging |= {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
        self._infinite = frozenset(not_finite(_own(unchanging)))  # at the start, such as masks
        self._last_checked = 1  # number of a batch in the run

    def is_sound(self) -> bool:
        """Return whether weights and buffers are finite, those aside that never were: one read-back."""
        named = _own(dict((*self._model.named_parameters(), *self._model.named_buffers())))
        is_sound = is_finite([tensor for name, tensor in named.items() if name not in self._infinite])
        return not any_process([not is_sound])[0] if self._is_divided else is_sound

    def is_batch_wrong(self, losses: LossTable, parameters: Sequence[nn.Parameter], has_scaler: bool) -> bool:
        """Return whether a loss of this batch, or its gradient, is not finite on this process: one read-back."""
        # What overflows in fp16 is skipped by the scaler, which then lowers its scale.
        gradients = [] if has_scaler else locals_of(weight.grad for weight in parameters if weight.grad is not None)
        are_losses_finite = losses.is_finite()
        norms = sum_of_norms(gradients)
        are_finite = are_losses_finite & norms.isfinite() if isinstance(norms, Tensor) else are_losses_finite
        return not are_finite and not (are_losses_finite and is_finite(gradients))

    def raise_if_nonfinite(self, fault: Fault | None, norms: MeanNorm, state: TrainState) -> None:
        """End the run, on all processes alike, when a train loss or the weights are not finite.

        Raises:
            NonFiniteError: With the step and the process of the first such loss, and the first such parameters.
        """
        last_checked, self._last_checked = self._last_checked, state.num_batches
        if self._on_nonfinite != "raise":
            return
        if fault is None and self.is_sound() and norms.is_finite():
            return
        weights = _own(dict(self._model.named_parameters()))
        named = not_finite({name: weight for name, weight in weights.items() if name not in self._infinite})
        if self._is_divided:
            found = set().union(*gather_objects(named))
            named = [name for name in weights if name in found]
        in_weights = f" Not finite by now: {some_of(named)}." if named else ""
        first = f"epoch {state.epoch}, step "
        if fault is None:
            first += f"{last_checked} to {state.num_batches}"
            raise NonFiniteError(f"In {first}: a gradient became nan or infinite.{in_weights} {_ADVICE}")
        raise NonFiniteError(
            f"Train loss became {fault.value} in {first}{fault.batch}, process {fault.process}.{in_weights} {_ADVICE}",
            fault.places,
        )

    def raise_if_weightless(self, totals: Totals, epoch: int) -> None:
        """End the run with a NonFiniteError, on all processes alike, when everything in an epoch has the weight 0."""
        is_empty = totals.num_samples and math.isnan(totals.loss) and totals.fault is None
        if is_empty and self._on_nonfinite == "raise":
            raise NonFiniteError(
                f"Every micro-batch of epoch {epoch} weighs 0, by weight_fn or compute_loss, or since the "
                "loss leaves all of its targets out: its train loss is the mean of nothing."
            )


def _own(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the own rows of tensors, by name."""
    return {name: local(tensor) for name, tensor in named.items()}
