"""The user's loss over one micro-batch, and its weight."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..data.collated import TARGET_NAMES, tensors_in
from ..data.micro_batches import MicroBatch
from ..data.sources import TensorSource
from .forward import Forward, forward_of
from .loss_functions import Weight, check_reduction, divisor_of, form_of, unwrap_partial

_Joined = Callable[..., Tensor]


def target_name_of(batch: Any) -> str | None:
    """Return the key of the targets of a dictionary, one of `TARGET_NAMES`; `None` for any other batch."""
    if not isinstance(batch, Mapping):
        return None
    return next((name for name in TARGET_NAMES if name in batch), None)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch: a pair, or a dictionary with an entry named label(s) or target(s).

    The inputs of a dictionary are its other entries.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    name = target_name_of(batch)
    if name is not None and len(batch) > 1:
        return {key: value for key, value in batch.items() if key != name}, batch[name]
    held = f"the keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    hint = "."
    if isinstance(batch, (tuple, list)):
        held += f" of {len(batch)}"
        if len(batch) == 1:
            hint = ": TensorDataset(inputs, inputs) for an autoencoder, whose targets are its inputs."
    raise TypeError(
        "loss_fn needs batches of (inputs, targets), or dictionaries with an entry named "
        f"{', '.join(TARGET_NAMES)}; got {held}{hint} Give compute_loss(model, batch) for any other batch."
    )


def inputs_of(batch: Any) -> Any:
    """Return what the model is called with: the first of a pair or single, or a dictionary without its targets."""
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise TypeError(f"predict calls the model with the first of a pair or single; a batch has {len(batch)}.")
        return batch[0]
    return batch if target_name_of(batch) is None or len(batch) == 1 else split_batch(batch)[0]


class Objective:
    """The user's loss and its weight.

    Args:
        loss_fn: `(outputs, targets) -> scalar` mean over the samples.
        compute_loss: `(model, batch) -> loss`, `(loss, weight)` or `Loss`, instead of `loss_fn`.
        weight_fn: `(batch) -> weight` of a micro-batch, called before the forward.
        metrics: The names of the metrics: if there are any, `compute_loss` has to return outputs and targets.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        compute_loss: Callable[[nn.Module, Any], Any] | None = None,
        weight_fn: Callable[[Any], Weight] | None = None,
        metrics: Sequence[str] = (),
    ) -> None:
        if (loss_fn is None) == (compute_loss is None):
            raise ValueError("Give either loss_fn or compute_loss (then loss_fn=None), not both and not none.")
        for name, function in (("loss_fn", loss_fn), ("compute_loss", compute_loss), ("weight_fn", weight_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}.")
        if isinstance(loss_fn, type):
            raise TypeError(f"loss_fn is the class {loss_fn.__name__}; give an instance: {loss_fn.__name__}().")
        check_reduction(loss_fn)
        self.loss_fn, self.compute_loss, self.weight_fn = loss_fn, compute_loss, weight_fn
        self._metrics = tuple(metrics)
        self._expected: str | None = None
        self._divisor = divisor_of(loss_fn) if weight_fn is None else None
        self._known: WeakKeyDictionary[TensorSource, tuple[Any, bool]] = (
            WeakKeyDictionary()
        )  # version of the data, answer
        weight = None if self._divisor is None else self._divisor.keywords["weight"]
        # torch's gradient of a micro-batch that has only classes of weight 0 is nan.
        self._has_weightless_class = weight is not None and bool((weight == 0).any())

    def __reduce__(self) -> Any:
        given = self.loss_fn, self.compute_loss, self.weight_fn, self._metrics
        return type(self), given  # without answers about the data

    def expect(self, scalar: str | None) -> None:
        """Demand of `compute_loss` a scalar of this name from here on, if there is one."""
        self._expected = scalar

    def with_loss(self, loss_fn: Callable[[Any, Any], Tensor]) -> Objective:
        """Return a copy of this objective with another loss of the same form."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, loss_fn=loss_fn)
        return other

    @property
    def may_leave_out(self) -> bool:
        """Whether the loss leaves out some targets, so that only the data tells if each sample weighs the same."""
        return self._divisor is not None and self.compute_loss is None

    def weighs_evenly(self, source: TensorSource | None, may_hold_others: bool = False) -> bool:
        """Return whether each sample weighs as much as any other, so that all processes know the weight of a batch.

        If the loss leaves targets out, this depends on the data, which is searched if it is in memory (one read-back).
        With `may_hold_others` a micro-batch may have more samples, or fewer, than indices.
        """
        if self.compute_loss is not None or self.weight_fn is not None or may_hold_others:
            return False
        if self._divisor is None:
            return True
        if source is None or source.sample_nbytes is None or not source.in_memory:
            return False
        if self._divisor.keywords["weight"] is not None:
            return False
        if source not in self._known or self._known[source][0] != source.version:
            _, targets = split_batch(source.columns)
            left_out = not targets.is_floating_point() and (targets == self._divisor.keywords["ignore_index"]).any()
            self._known[source] = source.version, not left_out
        return self._known[source][1]

    @property
    def functions(self) -> list[Any]:
        """The user's functions that run in a forward."""
        given = (self.loss_fn, self.compute_loss, self.weight_fn)
        return [unwrap_partial(function)[0] for function in given if function is not None]

    def state_outside(self) -> dict[str, str]:
        """Return the numbers that these functions keep as attributes, by name: each process has its own."""
        owners = [getattr(function, "__self__", function) for function in self.functions]
        parts = [part for owner in owners for part in (owner.modules() if isinstance(owner, nn.Module) else [owner])]
        return {
            f"{type(part).__name__}.{name}": repr(value.tolist() if isinstance(value, Tensor) else value)
            for part in parts
            for name, value in getattr(part, "__dict__", {}).items()
            if name != "training" and _is_small(value)
        }

    @property
    def modules(self) -> list[nn.Module]:
        """The modules among these functions, whose buffers change as those of the model do."""
        return [function for function in self.functions if isinstance(function, nn.Module)]

    def to(self, device: torch.device) -> None:
        """Move the modules, with their class weights and buffers, to the device of the model."""
        for module in self.modules:
            module.to(device)

    @property
    def form(self) -> Hashable | None:
        """A key of what the loss computes, if it may be compiled together with the model; `None` if it may not.

        Losses of one form differ in nothing that compiled code depends on.
        """
        if self.compute_loss is not None or self.weight_fn is not None or self._has_weightless_class:
            return None
        function, keywords = unwrap_partial(self.loss_fn)
        form = form_of(function)
        settings = tuple(sorted((name, repr(value)) for name, value in keywords.items()))
        return None if form is None else (form, settings)

    def __call__(
        self, model: nn.Module, micro_batch: MicroBatch, is_even: bool, joined: _Joined | None = None
    ) -> Forward:
        """Run the model on a micro-batch, which is on the device, and return its loss and weight (0 for padding).

        With `is_even` each sample is known to weigh the same. `joined`, for a `loss_fn` with a `form`, computes the
        loss of targets and the model's arguments in place of model and `loss_fn`.
        """
        if self.compute_loss is None and self.weight_fn is None:
            forward = self._forward(model, micro_batch, is_even, joined)
            if self._has_weightless_class:
                forward.mute(list(tensors_in(forward.outputs)))
        else:
            outputs: list[Tensor] = []  # all tensors that the model returns
            with model.register_forward_hook(lambda module, inputs, output: outputs.extend(tensors_in(output))):
                forward = self._forward(model, micro_batch, is_even, joined)
            forward.check_weight()
            forward.mute(outputs)
        if micro_batch.piece.is_padding:
            forward.leave_out()
        return forward

    def _forward(self, model: nn.Module, micro_batch: MicroBatch, is_even: bool, joined: _Joined | None) -> Forward:
        batch = micro_batch.data
        weight: Weight = micro_batch.num_samples if self.weight_fn is None else self.weight_fn(batch)
        if self.compute_loss is not None:
            forward = forward_of(self.compute_loss(model, batch), weight)
            scalars = forward.scalars or {}
            if self._metrics and (forward.outputs is None or forward.targets is None):
                raise ValueError(
                    "Metrics need the model's outputs and the targets, which compute_loss keeps to itself: let it "
                    "return accel_trainer.Loss(loss, weight, outputs, targets)."
                )
            for name in scalars:
                if name in self._metrics:
                    raise ValueError(f"A metric and a scalar of compute_loss are both named {name!r}.")
            if self._expected is not None and self._expected not in scalars:
                names = ", ".join(("test_loss", "train_loss", *scalars))
                raise ValueError(f"monitor must be a metric or one of {names} here, got {self._expected!r}.")
            return forward
        inputs, targets = split_batch(batch)
        if joined is None:
            outputs = call_model(model, inputs)
            loss = self.loss_fn(outputs, targets)  # type: ignore[misc]
        else:
            arguments, named = arguments_of(model, inputs)
            outputs, loss = None, joined(targets, *arguments, **named)
        if self._divisor is not None and not is_even:
            weight = self._divisor(targets)
        return Forward(loss, weight, outputs, targets)


def _is_small(value: Any) -> bool:
    """Return whether a value is a number, or a few of them, such as a loss counts or averages."""
    if isinstance(value, Tensor):
        return value.numel() < 1000
    if isinstance(value, (list, tuple, deque)):
        return len(value) < 1000 and all(map(_is_small, value))
    return type(value) in (bool, int, float)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model with `arguments_of` the inputs."""
    if isinstance(inputs, Tensor):  # known at once: the other questions cost a microsecond
        return model(inputs)
    arguments, named = arguments_of(model, inputs)
    try:
        return model(*arguments, **named)
    except TypeError as error:
        if not isinstance(inputs, (Mapping, tuple, list)):
            raise
        what = f"the entries {', '.join(map(str, inputs))}" if isinstance(inputs, Mapping) else f"{len(inputs)} inputs"
        how = "by name" if named else f"as {len(arguments)} argument{'s' if len(arguments) > 1 else ''}"
        raise TypeError(
            f"{error} (The model was called with {what} of a batch {how}, as its forward seemed to want. What it does "
            "not take, leave out of the samples, or give compute_loss(model, batch).)"
        ) from error


def arguments_of(model: nn.Module, inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return what the model is called with: one argument, or several, by name or in order.

    The entries of a dictionary are arguments by name. If the forward has one argument without a default, and knows none
    of that name, it is given the dictionary, or the one entry that there is. The items of a tuple or list are arguments
    in order if the forward takes any number, or has two or more without a default. Anything else is one argument.
    """
    if not isinstance(inputs, (Mapping, tuple, list)) or hasattr(inputs, "_fields"):
        return (inputs,), {}
    needed, known = _signature(type(unwrapped(model)).forward)
    if not isinstance(inputs, Mapping):
        return (inputs, {}) if len(needed) > 1 or "*" in known else ((inputs,), {})
    if len(inputs) == 1:
        (name, value), *_ = inputs.items()
        if isinstance(value, (Mapping, tuple, list)):
            return arguments_of(model, value)
        return ((), inputs) if name in known or "**" in known else ((value,), {})
    return ((inputs,), {}) if len(needed) == 1 and needed[0] not in inputs else ((), inputs)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model within what compiling and several processes wrap around it."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@functools.lru_cache
def _signature(forward: Callable[..., Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the arguments without a default of the forward of a class, and all names that it takes, with * and **."""
    try:
        _, *parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return (), frozenset(["**"])
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    needed = (one.name for one in parameters if one.kind not in stars and one.default is one.empty)
    return tuple(needed), frozenset(stars.get(one.kind, one.name) for one in parameters)


def usable(weight: Weight) -> Weight:
    """Return a weight to compute with: a wrong one, which is negative until it is read and refused, counts as 0."""
    return weight.clamp_min(0) if isinstance(weight, Tensor) else weight


def check_loss(loss: object, needs_grad: bool) -> None:
    """Refuse a loss that is no tensor (TypeError), no scalar, or has no gradient to compute (ValueError)."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"The loss must be a tensor, got {type(loss).__name__}.")
    if loss.ndim != 0:
        raise ValueError(f"The loss must be a scalar (a mean over the samples), got shape {tuple(loss.shape)}.")
    if needs_grad and not loss.requires_grad:
        raise ValueError(
            "The loss does not require grad: nothing connects it with the model's parameters. Compute it from the "
            "model's outputs, without detach(), item() or torch.no_grad()."
        )
