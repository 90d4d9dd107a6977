"""Models that are divided over the processes: torch's `fully_shard` (FSDP2), called directly.

What the launch asks for is read from Accelerate's plugin; its `prepare` is not used. It would leave the whole model in
one piece unless told the names of its blocks, lose the random numbers of recomputed dropout, trip over buffers, and
train a patchwork where the processes have begun with different weights.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary
from zlib import crc32

import psutil
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, recursively_apply
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from ..base.console import printable
from ..base.dtensors import cut_like, is_cut, make_mesh
from ..base.exchange import any_process, gather_objects, host_group
from ..data.randomness import WEIGHTS, derive_seed, generators_kept, seed_all
from ..errors import HardwareError
from ..numbers.reductions import share_from_main
from .by_element import check_by_element
from .compiled import repeated_blocks
from .hosts import place_of

Kind = Literal["full", "hybrid"]

_USES_FSDP, _USES_PARALLELISM = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"
_OTHERS = {"TP": "tensor parallelism", "CP": "context parallelism", "SP": "sequence parallelism"}
_LARGEST_SHARE = 1 / 16  # of the device's memory, that whole gradients may take between two micro-batches


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharding:
    """How a model is to be divided over the processes.

    Attributes:
        kind: `full` over all processes; `hybrid` over those of a host, with a replica on each.
        source: Where the wish comes from, in words.
        sizes: Replicas, and parts of each; `None` for what `kind` says.
        frees_after_forward: Whether a block's weights are given up after its forward and gathered again.
        offloads: Whether weights, gradients and optimizer state are kept in host memory.
        recomputes: Whether the activations within a block are computed again in the backward.
        blocks: Names of the classes of the blocks; empty to find them.
    """

    kind: Kind
    source: str
    sizes: tuple[int, int] | None = None
    frees_after_forward: bool = True
    offloads: bool = False
    recomputes: bool = False
    blocks: tuple[str, ...] = ()

    def mesh_sizes(self, process: int, num_processes: int) -> tuple[int, ...]:
        """Return the sizes of the mesh: parts, or replicas and parts of each."""
        sizes = self.sizes
        if sizes is None and self.kind == "hybrid" and num_processes > 1:
            hosts = {len(processes) for processes in place_of(process).hosts}
            if len(hosts) > 1:
                raise HardwareError(
                    f"sharding='hybrid' puts a replica on each host, and the hosts have {sorted(hosts)} processes. "
                    "Start equally many on each, or use sharding='full'."
                )
            sizes = num_processes // min(hosts), min(hosts)
        if sizes is None or sizes == (1, num_processes):
            return (num_processes,)
        if sizes[1] < 2:
            raise HardwareError(
                "The launch asks for replicas of one process each, of which every process would have the whole model. "
                "Use sharding='full', or leave sharding out."
            )
        if sizes[0] * sizes[1] != num_processes:
            raise HardwareError(
                f"The launch asks for {sizes[0]} replicas of {sizes[1]} processes each, and there are {num_processes}."
            )
        return sizes

    def check_precision(self, precision: str) -> None:
        """Refuse a precision in which a divided model does not train."""
        if precision == "fp16" and self.offloads:
            raise HardwareError(
                "fp16 with weights in host memory (fsdp_offload_params) is not supported: its gradients cannot be "
                "checked for overflow there. Use bf16, or leave out the offload."
            )
        if precision == "fp8":
            raise HardwareError("fp8 is not supported for a divided model, whose scales torch keeps whole. Use bf16.")

    def is_worthwhile(self, num_processes: int, precision: str) -> bool:
        """Return whether there is anything to do: with one process only where it computes in another way then."""
        return num_processes > 1 or torch.distributed.is_initialized() or self.offloads or precision != "no"


def asked_for(kind: Kind | None, accelerator: Accelerator | None = None) -> Sharding | None:
    """Return how the user, or the launch, wants models to be divided; `None` for models that are whole everywhere.

    Raises:
        HardwareError: FSDP1, or another kind of parallelism.
    """
    sizes = _sizes_of_launch(accelerator)
    plugin = getattr(accelerator.state, "fsdp_plugin", None) if accelerator is not None else None
    if plugin is None and is_asked_for():
        plugin = FullyShardedDataParallelPlugin()
    if plugin is None and kind is None:
        if sizes is not None:
            raise HardwareError(
                "The launch asks for a parallelism config without FSDP. Launch with --use_fsdp --fsdp_version 2, or "
                "set sharding='hybrid' in TrainConfig."
            )
        return None
    source = "argument" if kind is not None else "launcher"
    sharding = Sharding(kind or ("hybrid" if sizes is not None and sizes[0] > 1 else "full"), source, sizes)
    return sharding if plugin is None else _with_plugin(sharding, plugin)


def is_asked_for() -> bool:
    """Return whether the launch asks for FSDP."""
    return is_set(_USES_FSDP)


def is_set(variable: str) -> bool:
    """Return whether a variable of the environment says yes."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def _sizes_of_launch(accelerator: Accelerator | None) -> tuple[int, int] | None:
    """Return replicas and parts of Accelerate's parallelism config; refuse other kinds of parallelism."""
    config = None if accelerator is None else getattr(accelerator, "parallelism_config", None)
    if config is None and not is_set(_USES_PARALLELISM):
        return None

    def size_of(name: str) -> int:
        given = getattr(config, f"{name.lower()}_size", None)
        return int(given or os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE") or 1)

    for name, words in _OTHERS.items():
        if size_of(name) > 1:
            raise HardwareError(
                f"The launch asks for {words} ({name.lower()}_size={size_of(name)}), which is not supported: it needs "
                "changes inside the model. Divide the model over the processes instead (sharding='full')."
            )
    return size_of("DP_REPLICATE"), size_of("DP_SHARD")


def _with_plugin(sharding: Sharding, plugin: FullyShardedDataParallelPlugin) -> Sharding:
    if plugin.fsdp_version != 2:
        raise HardwareError(
            "The launch asks for FSDP version 1, which is not supported. Launch with --fsdp_version 2 (fsdp_version: 2 "
            "in the yaml of accelerate config), or set sharding='full' in TrainConfig."
        )
    if plugin.activation_checkpointing_offload:
        raise HardwareError("fsdp_activation_checkpointing_offload is not supported. Leave it out.")
    if plugin.ignored_modules is not None:
        raise HardwareError("fsdp_ignored_modules is not supported: every parameter is divided. Leave it out.")
    names = plugin.transformer_cls_names_to_wrap or ()
    return replace(
        sharding,
        frees_after_forward=bool(plugin.reshard_after_forward),
        offloads=bool(plugin.cpu_offload),
        recomputes=bool(plugin.activation_checkpointing),
        blocks=tuple(name.strip() for name in ([names] if isinstance(names, str) else names)),
    )


@contextmanager
def unknown_to_accelerate() -> Iterator[None]:
    """Let an `Accelerator` be built in this block that leaves dividing the model to us: it keeps devices and launch."""
    hidden = {name: os.environ.pop(name) for name in (_USES_FSDP, _USES_PARALLELISM) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


# --- units ------------------------------------------------------------------------------------------------------------


def units_of(model: nn.Module, names: tuple[str, ...] = ()) -> list[nn.Module]:
    """Return the modules that are gathered and given up one at a time, the model itself last.

    They are the blocks that the model repeats, or those of the classes with these names. In a model without any they
    are its parts, apart from small ones. What belongs to none of them is gathered for as long as the model computes, so
    a part whose weights are used from outside of it, as tied ones are, is no unit.

    Raises:
        ValueError: There is no class of such a name in the model.
    """
    wanted = set(names or getattr(model, "_no_split_modules", None) or ())
    of_classes = [module for module in model.modules() if type(module).__name__ in wanted]
    missing = set(names) - {type(module).__name__ for module in of_classes}
    if missing:
        raise ValueError(
            f"The launch wants to divide the model by blocks of the class {', '.join(sorted(missing))}, and the model "
            f"has none: fsdp_transformer_layer_cls_to_wrap is the name of the class that it repeats."
        )
    least = _num_elements(model) // 64
    repeated = [part for block in repeated_blocks(model) for part in _called(block, 1)]
    blocks = of_classes or repeated or list(_large_parts(model, least))
    found = [block for block in dict.fromkeys(blocks) if block is not model and _is_a_unit(block, model)]
    inner = {module for block in found for module in block.modules() if module is not block}
    return [*(block for block in found if block not in inner), model]


def _num_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _large_parts(module: nn.Module, least: int) -> Iterator[nn.Module]:
    """Yield the parts of a module, and of its containers, that hold at least so many elements.

    Parts of parts are left together: code of their own may call some of them on some processes only.
    """
    for child in module.children():
        if isinstance(child, nn.Sequential):
            yield from _large_parts(child, least)
        else:
            yield from _called(child, least)


def _called(module: nn.Module, least: int) -> Iterator[nn.Module]:
    """Yield a module of at least so many elements, or the parts of one that only holds others, and is never called."""
    if type(module).forward is nn.Module.forward:
        yield from _large_parts(module, least)
    elif _num_elements(module) >= least:
        yield module


def _is_a_unit(block: nn.Module, model: nn.Module) -> bool:
    """Return whether a module has weights, and none that other parts of the model have too."""
    inside = set(block.modules())
    own = {id(weight) for module in inside for weight in module._parameters.values() if weight is not None}
    elsewhere = (module for module in model.modules() if module not in inside)
    outside = {id(weight) for module in elsewhere for weight in module._parameters.values() if weight is not None}
    return bool(own) and not own & outside


# --- dividing ---------------------------------------------------------------------------------------------------------


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
    recomputed: dict[nn.Module, Callable[..., Any]] = field(default_factory=dict)

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
        hooks = _counting.setdefault(self.model, [])
        while hooks:
            hooks.pop().remove()
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

        A unit is gathered where it is called, so all processes must call the same ones in the same order.
        """

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def compare(name: str, *_: Any) -> None:
            names = gather_objects(name)
            if len(set(names)) > 1:
                other = next(process for process, found in enumerate(names) if found != names[0])
                raise ValueError(
                    f"Process 0 calls {names[0]} where process {other} calls {names[other]}. A part of a divided model "
                    "that is gathered by itself must be used by all processes, whatever their samples. Name the "
                    "classes of the blocks to gather, so that such a part is within one or in none: by the model's "
                    "_no_split_modules, or fsdp_transformer_layer_cls_to_wrap."
                )

        name_of = {module: name or "the model" for name, module in self.model.named_modules()}
        hooks = [unit.register_forward_pre_hook(partial(compare, name_of[unit]), prepend=True) for unit in self.units]
        hooks.append(self.model.register_forward_hook(partial(compare, "nothing more of the model")))
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
        hooks = _watching.setdefault(self.model, [])
        while hooks:
            hooks.pop().remove()
        for unit in self.units:
            unit.unshard()
            prefix = names[id(unit)]
            for name, weight in unit.named_parameters():
                if weight.requires_grad and not is_cut(weight):
                    full_name = f"{prefix}.{name}" if prefix else name
                    hooks.append(weight.register_post_accumulate_grad_hook(partial(_note_name, note, full_name)))
            unit.reshard()


# The hooks of each divided model.
_watching: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
_counting: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


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
    """Divide a model over the processes, in place, and let the optimizer train its parts; all processes call it.

    All begin with the main process's weights. What is on the meta device, there or on others, gets memory one unit at
    a time. A model that was divided before stays as it is.

    Raises:
        HardwareError: The launch asks for replicas that there are no processes for, or torch is too old.
        ValueError: The model or the optimizer cannot be divided.
    """
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise HardwareError(f"sharding needs torch 2.9 or later; this is {torch.__version__}.")
    if not torch.distributed.is_initialized():  # one process, which torch's functions want to be a group too
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    sizes = sharding.mesh_sizes(int(accelerator.process_index), int(accelerator.num_processes))
    names_before = {id(weight): name for name, weight in model.named_parameters()}
    units: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if units:
        units = [*units[1:], model]
        mesh = next(weight for weight in model.parameters() if is_cut(weight)).device_mesh  # type: ignore[attr-defined]
    else:
        _check_is_same_everywhere(model)
        units = units_of(model, sharding.blocks)
        if accelerator.mixed_precision != "no":
            units = [*(one for one in model.modules() if isinstance(one, _BatchNorm) and one not in units), *units]
        _check_can_be_divided(model, units, bitwise)
        if optimizer is not None:
            check_by_element(optimizer, accelerator.device, bitwise)
        mesh = make_mesh(accelerator.device.type, sizes)
        if accelerator.device.type == "cpu":
            _give_memory_back()
        for unit in units:
            _divide_unit(unit, model, sharding, accelerator, mesh, seed)
        if optimizer is not None:
            train_instead(optimizer, names_before, dict(model.named_parameters()))
    recomputed: dict[nn.Module, Callable[..., Any]] = {}
    if sharding.recomputes:
        blocks = units[:-1] or units
        recomputed = {block: partial(_recomputing, block.forward) for block in blocks}
    fits_whole = not any_process([not _fits_whole(model, accelerator)])[0]  # hosts may have other memory
    return Shards(units, mesh, fits_whole, recomputed)


def _give_memory_back() -> None:
    """Let the C library return large tensors to the system when they are freed: glibc would keep them, and fragment.

    A divided model would take as much as a whole one. It is a setting of the process, and has no way back.
    """
    with suppress(OSError, AttributeError):  # another system, or another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**23)


_M_MMAP_THRESHOLD = -3  # of malloc.h


def _check_is_same_everywhere(model: nn.Module) -> None:
    """Refuse (ValueError) a model that is not built alike on all processes: they would wait for each other."""
    form = {name: (*one.shape, str(one.dtype), one.requires_grad) for name, one in model.named_parameters()}
    form |= {name: (*one.shape, str(one.dtype)) for name, one in model.named_buffers()}
    forms = gather_objects(form)
    for process, other in enumerate(forms):
        wrong = [name for name in {**forms[0], **other} if forms[0].get(name) != other.get(name)]
        if wrong or list(forms[0]) != list(other):
            where = wrong[0] if wrong else "the order of its parts"
            raise ValueError(
                f"The model is not the same on all processes: process {process} has "
                f"{_told(other.get(where))} where process 0 has {_told(forms[0].get(where))}, in {where}. "
                "Build it from the config alone, and freeze the same weights everywhere."
            )


def _told(form: tuple[Any, ...] | None) -> str:
    if form is None:
        return "nothing"
    sizes = tuple(size for size in form if type(size) is int)
    frozen = ", frozen" if form[-1] is False else ""
    return f"{sizes} {next(text for text in form if isinstance(text, str)).removeprefix('torch.')}{frozen}"


def _check_can_be_divided(model: nn.Module, units: list[nn.Module], bitwise: bool) -> None:
    """Refuse (ValueError) weights that torch cannot divide, by their names; others are put in order for it."""
    for name, weight in model.named_parameters():
        if not weight.ndim:
            raise ValueError(f"{name} is a single number, which has no rows to divide: give it the shape (1,).")
        if not weight.numel():
            raise ValueError(f"{name} has the shape {tuple(weight.shape)}, with nothing in it to divide: leave it out.")
        if weight.layout != torch.strided or weight.is_complex():
            kind = "complex" if weight.is_complex() else "sparse"
            raise ValueError(f"{name} is {kind}: only dense real weights can be divided.")
        if not weight.is_contiguous():
            if bitwise:
                raise ValueError(
                    f"{name} is not contiguous (as with channels_last), and a divided model is: it would be computed "
                    "in another order, so bitwise=True cannot promise anything of it. Give it contiguous weights."
                )
            weight.data = weight.data.contiguous()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(f"{name} has sparse gradients, which cannot be divided: use sparse=False there.")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ValueError(f"{name} has a max_norm, which changes weights in the forward: leave it out.")
    seen: set[int] = set()
    for unit in units:
        trained = [weight for weight in unit.parameters() if weight.requires_grad and id(weight) not in seen]
        seen |= set(map(id, trained))
        kinds = {str(weight.dtype).removeprefix("torch.") for weight in trained}
        if len(kinds) > 1:
            raise ValueError(
                f"The weights of {type(unit).__name__} that are trained are {' and '.join(sorted(kinds))}, and are "
                "gathered together: give them one type."
            )


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


def train_instead(optimizer: Optimizer, names: Mapping[int, str], new: Mapping[str, nn.Parameter]) -> None:
    """Let an optimizer train new parameters in place of those by the same names, with what it knows of them so far.

    Args:
        optimizer: Holds the old parameters.
        names: Name of each by its id.
        new: The new ones by name: what memory was given, or the own rows of the old ones.
    """
    state = dict(optimizer.state)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        before, group["params"] = group["params"], [new[names[id(old)]] for old in group["params"]]
        for old, weight in zip(before, group["params"], strict=True):
            if old in state:
                optimizer.state[weight] = {key: _cut_as(weight, value) for key, value in state[old].items()}


def _cut_as(weight: nn.Parameter, value: Any) -> Any:
    """Return the own rows of a value of the optimizer's state, where it has an entry for each element of a weight."""
    is_by_element = isinstance(value, Tensor) and value.shape == weight.shape and not is_cut(value)
    return cut_like(value, weight) if is_by_element and is_cut(weight) else value


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


# --- an undivided model that is one to the last bit -------------------------------------------------------------------


@contextmanager
def joined_inputs(model: nn.Module) -> Iterator[None]:
    """Let the gradients of what a unit is given be added up within the unit first, as in a divided model.

    Where several units are given the same tensor, as the blocks of a decoder the output of an encoder, the order of the
    sum would be another one else.
    """
    *units, _ = units_of(model)
    hooks = [unit.register_forward_pre_hook(_joined, with_kwargs=True) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _joined(unit: nn.Module, args: Any, kwargs: Any) -> Any:
    given: list[Tensor] = []  # one that is given twice counts twice
    if torch.is_grad_enabled():
        recursively_apply(_noted, (args, kwargs), given)
    if not given:
        return None
    copies = iter(_Identity.apply(*given))  # type: ignore[no-untyped-call]
    return recursively_apply(lambda tensor: next(copies) if tensor.requires_grad else tensor, (args, kwargs))


def _noted(tensor: Tensor, given: list[Tensor]) -> Tensor:
    if tensor.requires_grad:
        given.append(tensor)
    return tensor


class _Identity(torch.autograd.Function):
    """One node for all inputs of a unit, which waits for all of their gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Any:
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients


# --- the meta device --------------------------------------------------------------------------------------------------


def check_can_be_materialised(model: nn.Module) -> None:
    """Refuse (ValueError) a model on the meta device with a part that does not know its first weights."""
    without = [
        name
        for name, module in model.named_modules()
        if _is_on_meta(module) and not callable(getattr(module, "reset_parameters", None))
    ]
    if without:
        names = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
        raise ValueError(
            printable(
                f"The model is on the meta device, and {names} cannot be given first weights there: add a method "
                "reset_parameters() that sets its own parameters and buffers."
            )
        )


def _is_on_meta(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and tensor.device.type == "meta" for tensor in tensors)


def materialise(unit: nn.Module, model: nn.Module, seed: int) -> None:
    """Give what a part of a model has on the meta device host memory, and first weights by its `reset_parameters`.

    They are a function of the seed and the name of the module, the same on every process and device.
    """
    inside = set(unit.modules())
    found = [(name, module) for name, module in model.named_modules() if module in inside and _is_on_meta(module)]
    made: dict[int, nn.Parameter] = {}
    for _, module in found:
        for key, weight in module._parameters.items():
            if weight is not None and weight.device.type == "meta":
                if id(weight) not in made:  # tied ones stay so
                    made[id(weight)] = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
                module._parameters[key] = made[id(weight)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
    with generators_kept():
        for name, module in found:
            if callable(getattr(module, "reset_parameters", None)):
                seed_all(derive_seed(seed, WEIGHTS, crc32(name.encode())))
                module.reset_parameters()
