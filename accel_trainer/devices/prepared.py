"""A model and an optimizer on the hardware: moved, wrapped, in their precision, compiled."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, recursively_apply, send_to_device
from torch import nn
from torch.optim import Optimizer

from ..data.collated import aligned, leaves_of, tensors_in
from ..numbers.clipping import clip, norm_by_rows, norm_over
from ..numbers.reductions import share_from_main
from .compiled import (
    autocast_of,
    call,
    cast_forward,
    loss_of_model,
    neither_compiling_nor_casting,
    own_code,
    repeated_blocks,
    uses_cuda_graphs,
)
from .divided import Shards, divide
from .hardware import Hardware
from .meta_device import check_can_be_materialised, is_on_meta, materialise
from .successors import noting_successors, train_newest
from .units import joined_inputs

_TRACES = ("forward", "_original_forward", "_is_accelerate_prepared", "_is_torch_compile")
_NOTHING = nullcontext()
_Compile = bool | Literal["regional"]


class Prepared:
    """A model, and an optimizer, on the hardware.

    The user's model stays the same object. The attributes that a run gives it are there only inside `attached()`.
    Without an optimizer it only evaluates. `compile` compiles the model, or its repeated blocks (`regional`), also if
    the launch does not ask for it. `seed` decides the first weights of a model on the meta device.

    Attributes:
        user_model: The user's model.
        shards: How it is divided over the processes, which it stays; `None` where each has the whole.
        model: The function to call in its place.
        to_device: Returns a micro-batch on the device.
    """

    def __init__(
        self,
        hardware: Hardware,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        compile: _Compile = False,
        seed: int = 0,
    ) -> None:
        self.hardware, self.user_model, self.optimizer = hardware, model, optimizer
        self.to_device = Placement(hardware.device, hardware.bitwise)
        has_no_memory = hardware.device.type != "meta" and any(map(is_on_meta, model.modules()))
        if has_no_memory:
            hardware.from_main(lambda: check_can_be_materialised(model))
        before = {name: model.__dict__[name] for name in _TRACES if name in model.__dict__}
        self.shards: Shards | None = None
        if hardware.sharding is not None:
            self.shards = divide(model, hardware.sharding, hardware.accelerator, seed, optimizer, hardware.bitwise)
        elif has_no_memory:
            with noting_successors(model):
                materialise(model, model, seed)
        if optimizer is not None:
            train_newest(optimizer)
        if self.shards is not None:
            wrapped, scaled = model, _scaled(hardware, optimizer)
        else:
            wrapped, scaled = _accelerated(hardware, model, optimizer)
            autocast = autocast_of(hardware.accelerator)
            if autocast is not None:
                model.__dict__["forward"] = cast_forward(model.forward, autocast)
        self._updates = _Updates(optimizer, scaled)
        self._compiled = _Compiled(hardware, model, wrapped, compile)
        self.model = self._compiled.model
        self._attached = {model: _exchanged(model, _TRACES, before)}
        for block, compiled_call in self._compiled.blocks.items():
            self._attached.setdefault(block, {})["_compiled_call_impl"] = compiled_call
        for block, recomputing in ({} if self.shards is None else self.shards.recomputed).items():
            self._attached.setdefault(block, {})["forward"] = recomputing

    @property
    def is_divided(self) -> bool:
        """Whether each process has some rows of the weights only."""
        return self.shards is not None

    @property
    def is_compiled(self) -> bool:
        """Whether the model is compiled, as a whole or in parts."""
        return self._compiled.is_compiled

    @property
    def reuses_memory(self) -> bool:
        """Whether outputs and gradients lie in memory that the next call of the model writes to (CUDA graphs)."""
        return self.is_compiled and uses_cuda_graphs(self._compiled.how)

    @property
    def copies_losses(self) -> bool:
        """Whether losses may lie in such memory too: on a GPU the user may have compiled the loss that way."""
        return self.reuses_memory or self.hardware.device.type == "cuda"

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last update (first group of parameters); nan where the optimizer has none."""
        return float(self._updates.last_rate)

    def note_learning_rate(self, rate: float | None = None) -> None:
        """Take a learning rate as that of the last update; `None` for the one that the optimizer has now."""
        self._updates.note_rate(rate)

    def joined(self, loss_fn: Callable[[Any, Any], torch.Tensor], form: Hashable) -> Callable[..., torch.Tensor] | None:
        """Return the model and a loss as one compiled function `(targets, *arguments, **named) -> loss`.

        The compiler can then compute the loss together with the last layer, whose outputs need not stand in memory in
        full precision. The loss must have no state, whose changes could make the compiler begin anew, with the whole
        model. It is compiled once for each `form`, which identifies its code.

        Returns:
            `None` where the model is not compiled as a whole, or is wrapped for several processes.
        """
        how = self._compiled.how
        if not self._compiled.is_one_graph or how.get("fullgraph"):  # which was asked of the model, not of the loss
            return None
        compute = torch.compile(own_code(loss_of_model, (type(self.user_model), form)), **how)
        return partial(compute, self.user_model, loss_fn)

    def forward_mode(self, is_full: bool) -> AbstractContextManager[Any]:
        """Return a context manager for a forward: a batch of another size is not worth a graph of its own."""
        if is_full or not self._compiled.is_compiled:
            return _NOTHING
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager

    @contextmanager
    def attached(self) -> Iterator[nn.Module]:
        """Yield the function to call in place of the model, which has the attributes of the run meanwhile."""
        before = [(module, _exchanged(module, new, new)) for module, new in self._attached.items()]
        joins = self.hardware.bitwise and not self.is_divided and not self.is_compiled
        try:
            with joined_inputs(self.user_model) if joins else _NOTHING:
                yield self.model
        finally:
            for module, old in before:
                _exchanged(module, self._attached[module], old)

    def put_optimizer(self, mode: Literal["train", "eval"]) -> None:
        """Let an optimizer with different weights for training and evaluation (schedule-free) exchange them."""
        change = getattr(self.optimizer, mode, None)
        if callable(change):
            change()

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale the gradients down to a global norm and return their norm before."""
        accelerator = self.hardware.accelerator
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients or (self.shards is None and not self.hardware.bitwise):
            norm: torch.Tensor = accelerator.clip_grad_norm_(parameters, max_norm)
            return norm
        if self._updates.scaled is not None:
            accelerator.unscale_gradients(self._updates.scaled)
        group = None if self.shards is None else self.shards.group
        if self.hardware.bitwise or group is None:
            norm = norm_by_rows(gradients, self.hardware.device, group)
        else:
            norm = norm_over(gradients, self.hardware.device, group)
        clip(gradients, max_norm, norm)
        return norm

    def step(self) -> bool:
        """Update the weights; return whether that happened: fp16 skips an update whose gradients overflowed.

        Whether they did is known on the device, so fp16 costs one read-back, which torch makes for most optimizers.
        """
        return self._updates.step()


class _Updates:
    """The updates of an optimizer, and the learning rate of the last one.

    `scaled` is the optimizer where Accelerate has to step it, with a scaler or on XLA; else `None`.
    """

    def __init__(self, optimizer: Optimizer | None, scaled: Any) -> None:
        self._optimizer, self.scaled = optimizer, scaled
        self.last_rate: float | torch.Tensor = _rate_of(optimizer)

    def note_rate(self, rate: float | None) -> None:
        """Take a learning rate as that of the last update; `None` for the one that the optimizer has now."""
        self.last_rate = _rate_of(self._optimizer) if rate is None else rate

    def step(self) -> bool:
        """Update the weights; see `Prepared.step`."""
        optimizer: Optimizer = self._optimizer  # type: ignore[assignment]
        rate = _rate_of(optimizer)
        if self.scaled is None:
            optimizer.step()
            self.last_rate = rate
            return True
        updates: list[bool] = []

        def note(optimizer: Optimizer, *_: Any) -> None:
            found = getattr(optimizer, "found_inf", None)  # the scaler leaves it to optimizers that skip by themselves
            updates.append(found is None or not found.item())

        with optimizer.register_step_pre_hook(note):
            self.scaled.step()
        self.last_rate = rate if any(updates) else self.last_rate
        return any(updates)


def _rate_of(optimizer: Optimizer | None) -> float | torch.Tensor:
    rate = None if optimizer is None else optimizer.param_groups[0].get("lr")
    if rate is None:
        return math.nan
    return rate.clone() if isinstance(rate, torch.Tensor) else float(rate)  # no read-back from the device


def _exchanged(module: nn.Module, names: Iterable[str], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Give a module these attributes in place of those with these names, and return the old ones."""
    before = {name: module.__dict__.pop(name) for name in names if name in module.__dict__}
    module.__dict__.update(attributes)
    return before


class _Compiled:
    """A model, compiled or not, as the launch says, or the user.

    Attributes:
        how: Arguments of `torch.compile`.
        is_compiled: Whether the model or a part of it is compiled.
        is_one_graph: Whether the model is compiled as a whole.
        blocks: Module -> its compiled call.
    """

    def __init__(self, hardware: Hardware, model: nn.Module, wrapped: nn.Module, compile: _Compile) -> None:
        self.how: dict[str, Any] = {}
        if hardware.compiler != "no":
            plugin = hardware.accelerator.state.dynamo_plugin
            self.how = plugin.to_kwargs()
            is_regional = getattr(plugin, "use_regional_compilation", False)  # since Accelerate 1.4
            compile = compile or ("regional" if is_regional else True)
        self.model: Any = wrapped
        self.is_compiled = bool(compile)
        blocks = repeated_blocks(model) if compile == "regional" else []
        self.is_one_graph = self.is_compiled and not blocks and wrapped is model
        if self.is_one_graph:
            self.model = torch.compile(wrapped, **self.how)
        elif compile and not blocks:
            blocks = [model]  # torch does not look at the code of its own modules within a wrapper
        self.blocks = {
            block: torch.compile(partial(own_code(call, (type(block),)), block._call_impl), **self.how)
            for block in blocks
        }


def _accelerated(hardware: Hardware, model: nn.Module, optimizer: Optimizer | None) -> tuple[nn.Module, Any]:
    """Move the model and wrap it for the processes, by Accelerate.

    Returns:
        The model to call, and the optimizer where Accelerate has to step it: with a scaler, and on XLA.
    """
    accelerator = hardware.accelerator
    # Under a launcher Accelerate's CPU is "cpu:0", and moving there would copy what is on "cpu": parameters would no
    # longer share memory, on several processes only.
    moves_model = hardware.device.type != "cpu"
    # Accelerate would move the counters of steps too, which torch reads on the host in each step.
    moves_state = hardware.device.type == "xla"
    if not moves_model:
        model.to("cpu")
    if optimizer is None or hardware.bitwise:
        # Not wrapped: nothing is exchanged, or gradients.TreeGradients does it.
        if hardware.bitwise:
            _realign(model)
        with neither_compiling_nor_casting(accelerator):
            wrapped = accelerator.prepare_model(model, device_placement=moves_model, evaluation_mode=True)
        if hardware.num_processes > 1:
            tensors = (*model.parameters(), *model.buffers())
            share_from_main([tensor for tensor in tensors if tensor.layout == torch.strided])
        accelerated: Any = None
        if optimizer is not None:
            accelerated = accelerator.prepare(optimizer, device_placement=[moves_state])
    else:
        # Each micro-batch starts from the step's own buffers (numbers.buffers): no broadcast in the forward.
        handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
        handler.broadcast_buffers = False
        accelerator.ddp_handler = handler
        with warnings.catch_warnings(), neither_compiling_nor_casting(accelerator):
            # torch 2.13 renames the setting; Accelerate 1.15 knows the old name only.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            placement = [moves_model, moves_state]
            wrapped, accelerated = accelerator.prepare(model, optimizer, device_placement=placement)
    if optimizer is not None and not moves_state:
        place_state(optimizer)
    return wrapped, accelerated if accelerator.scaler is not None or moves_state else None


def _scaled(hardware: Hardware, optimizer: Optimizer | None) -> Any:
    """Return the optimizer of a divided model where a scaler has to step it, `None` elsewhere."""
    scaler = hardware.accelerator.scaler
    if optimizer is None or scaler is None:
        return None
    return AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)


def place_state(optimizer: Optimizer) -> None:
    """Move the optimizer's state of each parameter to its device, and the counter of steps to where torch reads it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                is_on_host = key == "step" and not counts_on_device(group)
                state[key] = send_to_device(value, "cpu" if is_on_host else parameter.device)


def counts_on_device(group: Mapping[str, Any]) -> bool:
    """Return whether a group of parameters has its counters of steps on the device."""
    return bool(group.get("capturable") or group.get("fused"))


def _realign(model: nn.Module) -> None:
    """Move weights in memory of other libraries, such as NumPy's, to addresses that torch would give them."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.layout == torch.strided]
    sharing = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if sharing[storage.data_ptr()] == 1 and storage.nbytes() == tensor.nbytes:
            tensor.data = aligned(tensor.data)


class Placement:
    """Bring micro-batches to the device; with `aligns`, to addresses that torch's own allocator would give them."""

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
        # On another stream the copy runs while the device still computes the micro-batch before.
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
    """Return the one stream for copies to a GPU: memory freed on another stream could not be used again on it."""
    return torch.get_device_module(device).Stream(device)


def is_on(data: Any, device: torch.device) -> bool:
    """Return whether a batch is on the device already, apart from values that cannot be moved."""
    return all(
        leaf.device == device if isinstance(leaf, torch.Tensor) else not hasattr(leaf, "to") for leaf in leaves_of(data)
    )


def may_be_streamed(data: Any) -> bool:
    """Return whether a batch can be copied on another stream than the one which computes with it.

    Torch has to know of both streams for each tensor, which works neither for subclasses of tensors nor in objects.
    """
    return all(
        type(leaf) in (torch.Tensor, nn.Parameter) and leaf.layout == torch.strided and not leaf.is_nested
        for leaf in leaves_of(data)
        if hasattr(leaf, "to")
    )
