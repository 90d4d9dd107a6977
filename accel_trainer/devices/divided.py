"""A model that is divided over the processes: torch's `fully_shard` (FSDP2), called directly.

Accelerate's `prepare` would leave the whole model in one piece unless told the names of its blocks, lose the random
numbers of recomputed dropout, trip over buffers, and train a patchwork where the processes have begun with different
weights.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..base.dtensors import is_cut, make_mesh
from ..base.exchange import any_process, gather_objects, host_group
from ..errors import HardwareError
from ..numbers.reductions import share_from_main
from .divisible import check_by_element, check_can_be_divided, check_is_same_everywhere
from .meta_device import materialise
from .sharding import Sharding
from .successors import noting_successors
from .units import units_of

_LARGEST_SHARE = 1 / 16  # of the device's memory, that whole gradients may take between two micro-batches


@dataclass
class Shards:
    """A model that is divided over the processes.

    Attributes:
        units: The modules that are gathered one at a time, the model itself last.
        mesh: Of the processes: parts, or replicas and parts.
        is_accumulated_whole: Whether the gradients of all but the last micro-batch wait, whole, on each process.
        recomputed: Modules that compute their activations again in the backward, and their forward that does so.
    """

    units: list[Any]
    mesh: Any
    is_accumulated_whole: bool = False
    recomputed: dict[nn.Module, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.units[-1]  # type: ignore[no-any-return]

    def own_weights(self, unit: nn.Module) -> list[nn.Parameter]:
        """Return the weights that are gathered with a unit: not those of units within."""
        modules = set(unit.modules()) - {unit}
        inner = {id(weight) for other in self.units if other in modules for weight in other.parameters()}
        return [weight for weight in unit.parameters() if id(weight) not in inner]

    @property
    def num_parts(self) -> int:
        """Into how many parts each tensor is divided."""
        return int(self.mesh.size(self.mesh.ndim - 1))

    @property
    def group(self) -> torch.distributed.ProcessGroup:
        """The processes that have the parts of one replica."""
        return self.mesh.get_group(self.mesh.ndim - 1)  # type: ignore[no-any-return]

    @property
    def replicas(self) -> torch.distributed.ProcessGroup | None:
        """The processes that have the same part as this one; `None` where there is one replica."""
        return self.mesh.get_group(0) if self.mesh.ndim > 1 else None

    def use_sums(self, reductions: Sequence[Any] = ()) -> None:
        """Let gradients be added up, not averaged; by reductions of our own, if there is one for each unit.

        A reduction is told of each call of its unit, by `note_call`.
        """
        hooks = _emptied(_counting, self.model)
        for unit, reduction in zip(self.units, reductions, strict=False):
            unit.set_custom_reduce_scatter(reduction)
            hooks.append(unit.register_forward_pre_hook(reduction.note_call))
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
            if hasattr(unit, "set_reduce_scatter_unused_params"):  # since torch 2.13: where some processes use them
                unit.set_reduce_scatter_unused_params(True)

    def start_backward(self, is_last: bool, adds_each: bool) -> None:
        """Prepare the backward of a micro-batch, the last one of this process or not.

        With `adds_each` its gradients are added over the processes at once. Replicas are added up after the last.
        """
        self.model.set_requires_gradient_sync(is_last or adds_each)  # type: ignore[operator]
        self.model.set_is_last_backward(is_last)  # type: ignore[operator]
        if self.replicas is not None:
            self.model.set_requires_all_reduce(is_last)  # type: ignore[operator]

    @contextmanager
    def compared_calls(self) -> Iterator[None]:
        """Refuse (ValueError) a model of which the processes call other units in this block: they would wait for ever.

        A unit is gathered where it is called, so all processes must call the same ones in the same order. One that
        fills what it is given is refused too.
        """
        name_of = {module: name or "the model" for name, module in self.model.named_modules()}
        all_names = [*(name_of[unit] for unit in self.units), "nothing more of the model"]

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def compare(name: str, *_: Any) -> None:
            if sum(any_process([name == one for one in all_names])) > 1:
                names = gather_objects(name)
                other = next(process for process, found in enumerate(names) if found != names[0])
                raise ValueError(
                    f"Process 0 calls {names[0]} where process {other} calls {names[other]}. A part of a divided model "
                    "that is gathered by itself must be used by all processes, whatever their samples. Name the "
                    "classes of the blocks to gather, so that such a part is within one or in none: by the model's "
                    "_no_split_modules, or fsdp_transformer_layer_cls_to_wrap."
                )

        called = zip(self.units, all_names, strict=False)
        hooks = [hook for unit in self.units[:-1] for hook in _refuse_to_fill(unit, name_of[unit])]
        hooks += [unit.register_forward_pre_hook(partial(compare, name), prepend=True) for unit, name in called]
        hooks.append(self.model.register_forward_hook(partial(compare, all_names[-1])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def give_up(self) -> None:
        """Keep only the own rows of what a forward without a backward has left gathered."""
        for unit in self.units:
            unit.reshard()

    def watch_gradients(self, note: Callable[[str], object]) -> None:
        """Call a function with the name of each parameter that gets a gradient in a backward of this process.

        It takes the place of another one that was called so far. All processes call it.
        """
        names = {id(unit): name for name, unit in self.model.named_modules()}
        hooks = _emptied(_watching, self.model)
        for unit in self.units:
            unit.unshard()
            prefix = names[id(unit)]
            for name, weight in unit.named_parameters():
                if weight.requires_grad and not is_cut(weight):
                    full_name = f"{prefix}.{name}" if prefix else name
                    hooks.append(weight.register_post_accumulate_grad_hook(partial(_note_name, note, full_name)))
            unit.reshard()


_Hooks = WeakKeyDictionary[nn.Module, list[Any]]  # of each divided model, which stays so from trainer to trainer
_watching: _Hooks = WeakKeyDictionary()
_counting: _Hooks = WeakKeyDictionary()


def _emptied(hooks_of: _Hooks, model: nn.Module) -> list[Any]:
    """Return the list of a model's hooks, which are removed."""
    hooks = hooks_of.setdefault(model, [])
    while hooks:
        hooks.pop().remove()
    return hooks


def _refuse_to_fill(unit: nn.Module, name: str) -> tuple[Any, Any]:
    """Refuse (ValueError) a unit that fills a list or dictionary for others, of which torch gives it a copy.

    Returns:
        Its hooks, which do so until they are removed.
    """
    given: list[Any] = []  # kept for the time of the call, so that no other object has their ids

    def note(unit: nn.Module, args: Any, kwargs: Any) -> None:
        given[:] = tree_leaves((args, kwargs))

    def look_for_more(unit: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        if torch.is_grad_enabled() and {*map(id, tree_leaves((args, kwargs)))} - {*map(id, given)}:
            raise ValueError(
                f"{name} fills a list or dictionary that it is given. A part of a divided model that is gathered by "
                "itself is given copies of them: let it return what it adds."
            )
        given.clear()

    before = unit.register_forward_pre_hook(note, with_kwargs=True)
    return before, unit.register_forward_hook(look_for_more, with_kwargs=True)


def _note_name(note: Callable[[str], object], name: str, _: Tensor) -> None:
    note(name)


def divide(
    model: nn.Module,
    sharding: Sharding,
    accelerator: Accelerator,
    seed: int,
    optimizer: Optimizer | None = None,
    bitwise: bool = False,
) -> Shards:
    """Divide a model over the processes, in place, if the optimizer can train its parts; all processes call it.

    All begin with the main process's weights. What is on the meta device, there or on others, gets memory one unit at
    a time. A model that was divided before stays as it is. The parameters are new ones; see `noting_successors`.

    Raises:
        HardwareError: The launch asks for replicas that there are no processes for, or torch is too old.
        ValueError: The model or the optimizer cannot be divided.
    """
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise HardwareError(f"sharding needs torch 2.9 or later; this is {torch.__version__}.")
    if not torch.distributed.is_initialized():  # one process, which torch's functions want to be a group too
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if optimizer is not None:
        check_by_element(optimizer, accelerator.device, bitwise)
    sizes = sharding.mesh_sizes(int(accelerator.process_index), int(accelerator.num_processes))
    of_before = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if of_before and of_before[0] is not model:
        raise ValueError(
            "A part of the model was divided by an earlier run, and stays so. Build it anew, with the weights of that "
            "run (load_best)."
        )
    if of_before:
        units: list[Any] = [*of_before[1:], model]
        mesh = next(weight for weight in model.parameters() if is_cut(weight)).device_mesh  # type: ignore[attr-defined]
    else:
        units = _checked_units(model, sharding, accelerator, bitwise)
        mesh = make_mesh(accelerator.device.type, sizes)
        if accelerator.device.type == "cpu":
            _give_memory_back()
        with noting_successors(model):
            for unit in units:
                _divide_unit(unit, model, sharding, accelerator, mesh, seed)
    blocks = (units[:-1] or units) if sharding.recomputes else []
    recomputed: dict[nn.Module, Any] = {block: partial(_recomputing, block.forward) for block in blocks}
    fits_whole = not any_process([not _fits_whole(model, accelerator)])[0]  # hosts may have other memory
    return Shards(units, mesh, fits_whole, recomputed)


def _checked_units(model: nn.Module, sharding: Sharding, accelerator: Accelerator, bitwise: bool) -> list[Any]:
    """Return the units of a model that can be divided, with a unit for each BatchNorm where that has its precision."""
    check_is_same_everywhere(model)
    units = units_of(model, sharding.blocks)
    if accelerator.mixed_precision != "no":
        units = [*(one for one in model.modules() if isinstance(one, _BatchNorm) and one not in units), *units]
    check_can_be_divided(model, units, bitwise)
    return units


def _give_memory_back() -> None:
    """Let the C library return large tensors to the system when they are freed: glibc would keep them, and fragment.

    A divided model would take as much as a whole one. It is a setting of the process, and has no way back.
    """
    with suppress(OSError, AttributeError):  # another system, or another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**23)


_M_MMAP_THRESHOLD = -3  # of malloc.h


def _divide_unit(
    unit: nn.Module, model: nn.Module, sharding: Sharding, accelerator: Accelerator, mesh: Any, seed: int
) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    materialise(unit, model, seed)
    whole = _undivided(unit)
    share_from_main((tensor for tensor in whole if tensor.device.type == "cpu"), host_group())
    share_from_main(tensor for tensor in whole if tensor.device.type != "cpu")
    pinned = accelerator.device.type == "cuda"
    fully_shard(
        unit,
        mesh=mesh,
        reshard_after_forward=sharding.frees_after_forward if unit is not model else None,
        mp_policy=_precision_of(accelerator, unit, is_outermost=unit is model),
        offload_policy=CPUOffloadPolicy(pin_memory=pinned) if sharding.offloads else OffloadPolicy(),
    )


def _undivided(unit: nn.Module) -> list[Tensor]:
    """Return the tensors of a unit that are still whole."""
    tensors = (*unit.parameters(), *unit.buffers())
    return [tensor for tensor in tensors if not is_cut(tensor) and tensor.layout == torch.strided]


def _precision_of(accelerator: Accelerator, unit: nn.Module, is_outermost: bool) -> Any:
    """Return the precision in which a unit computes; gradients are added, and outputs returned, in full precision.

    BatchNorm computes in full precision, that of its buffers.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if lower is None:
        return MixedPrecisionPolicy()
    full = torch.float32
    if isinstance(unit, _BatchNorm):
        return MixedPrecisionPolicy(full, full, full if is_outermost else lower)
    return MixedPrecisionPolicy(lower, full, full if is_outermost else None)


def _fits_whole(model: nn.Module, accelerator: Accelerator) -> bool:
    """Return whether whole gradients may wait on each process between micro-batches: by total, not by free memory."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    num_bytes = sum(weight.numel() * max(4, weight.element_size()) for weight in trained)
    if accelerator.device.type == "cuda":
        total = torch.cuda.get_device_properties(accelerator.device).total_memory
    else:
        total = psutil.virtual_memory().total
        num_bytes *= int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
    return bool(num_bytes <= _LARGEST_SHARE * total)


def _recomputing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a forward whose activations are computed again in the backward, with the same random numbers."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
