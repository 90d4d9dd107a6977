"""A model and an optimizer on the hardware: moved, wrapped, in their precision, compiled."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from accelerate.utils import DistributedDataParallelKwargs, recursively_apply, send_to_device
from torch import nn
from torch.optim import Optimizer

from ..data.collated import aligned, leaves_of, tensors_in
from ..numbers.reductions import share_from_main
from .compiled import (
    autocast_of,
    cast_forward,
    compilable_call,
    model_and_loss,
    neither_compiling_nor_casting,
    repeated_blocks,
    uses_cuda_graphs,
)
from .hardware import Hardware

_TRACES = ("forward", "_original_forward", "_is_accelerate_prepared", "_is_torch_compile")
_NOTHING = nullcontext()
_Compile = bool | Literal["regional"]


class Prepared:
    """A model, and an optimizer, on the hardware.

    The user's model stays the same object. What hangs on it for the run is there only inside `attached()`.

    Args:
        hardware: Where it goes.
        model: The user's model.
        optimizer: The user's optimizer; `None` to evaluate only.
        compile: Whether to compile the model, or its repeated blocks (`regional`), if the launch does not.

    Attributes:
        user_model: The user's model.
        model: What to call in its place.
        place: Returns a micro-batch on the device.
    """

    def __init__(
        self, hardware: Hardware, model: nn.Module, optimizer: Optimizer | None = None, compile: _Compile = False
    ) -> None:
        self.hardware, self.user_model, self.optimizer = hardware, model, optimizer
        self.place = Placement(hardware.device, hardware.bitwise)
        self._traces = _Traces(model)
        autocast = autocast_of(hardware.accelerator)
        self.model, self._accelerated = _accelerated(hardware, model, optimizer)
        if autocast is not None:
            model.__dict__["forward"] = cast_forward(model.forward, autocast)
        self._compiled = _Compiled(hardware, model, self.model, compile)
        self.model = self._compiled.model
        self._last_rate: float | torch.Tensor = _rate_of(optimizer)
        self._traces.take_off(self._compiled.blocks)

    @property
    def is_compiled(self) -> bool:
        """Whether the model is compiled, as a whole or in parts."""
        return self._compiled.is_compiled

    @property
    def reuses_memory(self) -> bool:
        """Whether what the model returns, and its gradients, lie in memory that the next call writes to."""
        return self._compiled.reuses_memory

    @property
    def copies_losses(self) -> bool:
        """Whether losses may lie in such memory too: on a GPU the user's own code may be compiled so."""
        return self.reuses_memory or self.hardware.device.type == "cuda"

    @property
    def learning_rate(self) -> float:
        """That of the last update (first group of parameters); nan where the optimizer finds its own."""
        return float(self._last_rate)

    def note_learning_rate(self, rate: float | None = None) -> None:
        """Take a learning rate, that of the optimizer unless given, as that of the last update."""
        self._last_rate = _rate_of(self.optimizer) if rate is None else rate

    def joined(
        self, loss_fn: Callable[[Any, Any], torch.Tensor], form: Hashable
    ) -> Callable[[Any, Any], torch.Tensor] | None:
        """Return the model and a loss as one compiled function `(inputs, targets) -> loss`.

        The compiler can then compute the loss together with the last layer, whose outputs need not stand in memory in
        full precision.

        Args:
            loss_fn: `(outputs, targets) -> loss`, which keeps nothing from call to call: what it kept could make the
                compiler begin anew, with the whole model.
            form: What it does, as far as that can differ: code is compiled for each.

        Returns:
            `None` where the model is not compiled as a whole, or is wrapped for several processes.
        """
        how = self._compiled.how
        if not self._compiled.is_one_graph or how.get("fullgraph"):  # the loss was not meant by that
            return None
        return partial(
            torch.compile(model_and_loss((type(self.user_model), form)), **how),
            self.user_model,
            loss_fn,
        )

    def forward_mode(self, is_full: bool) -> AbstractContextManager[Any]:
        """Return what a forward runs under: a batch of another size than all others is not worth a graph of its own."""
        if is_full or not self._compiled.is_compiled:
            return _NOTHING
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager

    @contextmanager
    def attached(self) -> Iterator[nn.Module]:
        """Yield what to call in place of the model."""
        self._traces.put_on(self._compiled.blocks)
        try:
            yield self.model
        finally:
            self._traces.take_off(self._compiled.blocks)

    def put_optimizer(self, mode: Literal["train", "eval"]) -> None:
        """Let an optimizer whose weights differ between training and evaluation, as schedule-free ones, change them."""
        change = getattr(self.optimizer, mode, None)
        if callable(change):
            change()

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale the gradients down to a global norm and return the norm they had."""
        norm: torch.Tensor = self.hardware.accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    def step(self) -> bool:
        """Update the weights; return whether that happened: fp16 skips an update whose gradients overflowed.

        Whether they did is known on the device, so fp16 costs one read-back, which torch makes for most optimizers.
        """
        optimizer: Optimizer = self.optimizer  # type: ignore[assignment]
        rate = _rate_of(optimizer)
        if self._accelerated is None:
            optimizer.step()
            self._last_rate = rate
            return True
        updates: list[bool] = []

        def note(optimizer: Optimizer, *_: Any) -> None:
            found = getattr(optimizer, "found_inf", None)  # by the scaler, for an optimizer that skips by itself
            updates.append(found is None or not found.item())

        handle = optimizer.register_step_pre_hook(note)
        try:
            self._accelerated.step()
        finally:
            handle.remove()
        self._last_rate = rate if any(updates) else self._last_rate
        return any(updates)


def _rate_of(optimizer: Optimizer | None) -> float | torch.Tensor:
    rate = None if optimizer is None else optimizer.param_groups[0].get("lr")
    if rate is None:
        return math.nan
    return rate.clone() if isinstance(rate, torch.Tensor) else float(rate)  # not read back from the device here


class _Traces:
    """What hangs on the user's model for a run."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before, self._attached = _traces_of(model), {}  # type: ignore[var-annotated]

    def put_on(self, blocks: Mapping[nn.Module, Any]) -> None:
        """Hang it on the model; and compiled calls on its blocks."""
        self._model.__dict__.update(self._attached)
        for block, compiled in blocks.items():
            block._compiled_call_impl = compiled

    def take_off(self, blocks: Mapping[nn.Module, Any]) -> None:
        """Give the model back as it was."""
        self._attached = self._attached or _traces_of(self._model)
        for name in self._attached:
            self._model.__dict__.pop(name, None)
        self._model.__dict__.update(self._before)
        for block in blocks:
            block._compiled_call_impl = None


def _traces_of(model: nn.Module) -> dict[str, Any]:
    return {name: model.__dict__[name] for name in _TRACES if name in model.__dict__}


class _Compiled:
    """A model, compiled or not.

    Attributes:
        how: Arguments of `torch.compile`.
        model: What to call.
        is_compiled: Whether anything is.
        is_one_graph: Whether the model is compiled as a whole.
        blocks: Module -> its compiled call.
    """

    def __init__(self, hardware: Hardware, model: nn.Module, wrapped: nn.Module, compile: _Compile) -> None:
        self.how, compile = _settings_of_compiler(hardware, compile)
        self.model: Any = wrapped
        self.is_compiled = bool(compile)
        blocks = repeated_blocks(model) if compile == "regional" else []
        self.is_one_graph = self.is_compiled and not blocks and wrapped is model
        if self.is_one_graph:
            self.model = torch.compile(wrapped, **self.how)
        elif compile and not blocks:
            blocks = [model]  # torch does not look at the code of its own modules within a wrapper
        kinds: list[tuple[nn.Module, Any]] = [(block, type(block)) for block in blocks]
        self.blocks = {
            block: torch.compile(compilable_call(kind)(block._call_impl), **self.how) for block, kind in kinds
        }

    @property
    def reuses_memory(self) -> bool:
        """Whether what it returns lies in memory that the next call writes to (CUDA graphs)."""
        return self.is_compiled and uses_cuda_graphs(self.how)


def _settings_of_compiler(hardware: Hardware, compile: _Compile) -> tuple[dict[str, Any], _Compile]:
    """Return how to compile, and what: as the launch says, or the user."""
    plugin = hardware.accelerator.state.dynamo_plugin
    if hardware.compiler == "no":
        return {}, compile
    by_launch: _Compile = "regional" if getattr(plugin, "use_regional_compilation", False) else True  # since 1.4
    return plugin.to_kwargs(), compile or by_launch


def _accelerated(hardware: Hardware, model: nn.Module, optimizer: Optimizer | None) -> tuple[nn.Module, Any]:
    """Move the model and wrap it for the processes, by Accelerate.

    Returns:
        What to call, and the optimizer where Accelerate has to step it: with a scaler, and on XLA.
    """
    accelerator = hardware.accelerator
    # Under a launcher Accelerate's CPU is "cpu:0", and moving there would copy what is on "cpu": memory that
    # parameters share would part, on several processes only.
    places = hardware.device.type != "cpu"
    # Accelerate would move the counters of steps too, which torch reads on the host in each step.
    places_state = hardware.device.type == "xla"
    if not places:
        model.to("cpu")
    if optimizer is None or hardware.bitwise:
        # Not wrapped: nothing is exchanged, or gradients.TreeGradients does it.
        if hardware.bitwise:
            _realign(model)
        with neither_compiling_nor_casting(accelerator):
            wrapped = accelerator.prepare_model(model, device_placement=places, evaluation_mode=True)
        if hardware.num_processes > 1:
            tensors = (*model.parameters(), *model.buffers())
            share_from_main([tensor for tensor in tensors if tensor.layout == torch.strided])
        accelerated: Any = None
        if optimizer is not None:
            accelerated = accelerator.prepare(optimizer, device_placement=[places_state])
    else:
        # Each micro-batch starts from the step's own buffers (numbers.buffers): no broadcast in the forward.
        handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
        handler.broadcast_buffers = False
        accelerator.ddp_handler = handler
        with warnings.catch_warnings(), neither_compiling_nor_casting(accelerator):
            # torch 2.13 renames the setting; Accelerate 1.15 knows the old name only.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            placement = [places, places_state]
            wrapped, accelerated = accelerator.prepare(model, optimizer, device_placement=placement)
    if optimizer is not None and not places_state:
        place_state(optimizer)
    return wrapped, accelerated if accelerator.scaler is not None or places_state else None


def place_state(optimizer: Optimizer) -> None:
    """Move what an optimizer keeps of a parameter to where that is; the counter of steps, where torch reads it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            own = optimizer.state.get(parameter, {})
            device = parameter.device
            count = device if counts_on_device(group) else torch.device("cpu")
            own.update({key: send_to_device(one, count if key == "step" else device) for key, one in own.items()})


def counts_on_device(group: Mapping[str, Any]) -> bool:
    """Return whether a group of parameters has its counters of steps on the device."""
    return bool(group.get("capturable") or group.get("fused"))


def _realign(model: nn.Module) -> None:
    """Move weights that foreign code has placed, such as NumPy's, to where torch would have them."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.layout == torch.strided]
    sharing = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if sharing[storage.data_ptr()] == 1 and storage.nbytes() == tensor.nbytes:
            tensor.data = aligned(tensor.data)


class Placement:
    """Bring micro-batches to the device.

    Args:
        device: The device.
        aligns: Whether each tensor must begin where torch's own allocator would let it.
    """

    def __init__(self, device: torch.device, aligns: bool = False) -> None:
        self._device, self._aligns = torch.empty(0, device=device).device, aligns  # with its index
        self._copying = _stream_of_copies(self._device) if device.type == "cuda" else None

    def __call__(self, data: Any) -> Any:
        """Return a micro-batch on the device."""
        if self._device.type != "cpu":
            data = self._copied(data)
        return recursively_apply(aligned, data) if self._aligns else data

    def _copied(self, data: Any) -> Any:
        if is_on(data, self._device):
            return data
        if self._copying is None or not may_be_streamed(data):
            return send_to_device(data, self._device, non_blocking=True)
        # On a stream of its own the copy runs while the device still computes what was asked before.
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            placed = send_to_device(data, self._device, non_blocking=True)
        computing.wait_stream(self._copying)
        for tensor in tensors_in(placed):
            if tensor.is_cuda:  # the batch sizes of a packed sequence stay on the host
                tensor.record_stream(computing)  # its memory is not given away before that
        return placed


@lru_cache
def _stream_of_copies(device: torch.device) -> Any:
    """Return the stream of a GPU that copies run on: memory freed on another one could not be used again here."""
    return torch.get_device_module(device).Stream(device)


def is_on(data: Any, device: torch.device) -> bool:
    """Return whether a batch is on the device already, as far as it can be anywhere."""
    return all(
        leaf.device == device if isinstance(leaf, torch.Tensor) else not _moves(leaf) for leaf in leaves_of(data)
    )


def may_be_streamed(data: Any) -> bool:
    """Return whether a batch can be copied on another stream than that which computes with it.

    Torch has to know of both streams, for each tensor: it can be told of plain ones only, and of none in an object.
    """
    plain = (torch.Tensor, nn.Parameter)
    return all(
        type(leaf) in plain and leaf.layout == torch.strided and not leaf.is_nested if _moves(leaf) else True
        for leaf in leaves_of(data)
    )


def _moves(leaf: Any) -> bool:
    return hasattr(leaf, "to")
