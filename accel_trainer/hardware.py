"""Build the one `Accelerator`, say what was chosen and why, prepare the model, give it back plain."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    broadcast_object_list,
    recursively_apply,
    send_to_device,
)
from torch import nn
from torch.optim import Optimizer

from .batches import Layout, tensors_in
from .errors import HardwareError
from .randomness import Draws, seed_all, torch_generators
from .reductions import any_process, share_from_main

__all__ = ["Hardware", "Prepared", "check_model", "check_optimizer", "fixed_arithmetic"]

_VERIFIED = ("cpu", "cuda")
_PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


class Hardware:
    """What a run computes on: one device per process, and what it does there.

    Args:
        mixed_precision: The user's choice, `None` to take the launch's.
        factory: The user's own function that builds the `Accelerator`.
        bitwise: Whether not one bit may depend on the number of processes.

    Raises:
        HardwareError: The launch or the arguments ask for something that would not happen here.
    """

    def __init__(
        self,
        mixed_precision: str | None = None,
        factory: Callable[[], Accelerator] | None = None,
        bitwise: bool = False,
    ) -> None:
        _check_environment()
        self.bitwise = bitwise
        self._precision_source = _precision_source(mixed_precision, factory)
        self.accelerator = _build(mixed_precision, factory)
        _check_built(self.accelerator, mixed_precision)
        self.device: torch.device = self.accelerator.device
        self.process: int = self.accelerator.process_index
        self.num_processes: int = self.accelerator.num_processes
        self.is_main = self.process == 0
        self.precision: str = self.accelerator.mixed_precision
        self.compiler = str(self.accelerator.state.dynamo_plugin.backend.value).lower()  # of the launch
        self.generators = torch_generators(self.device)
        self._on_cpu = self.device.type == "cpu"
        self._copying: Any = torch.get_device_module(self.device).Stream() if self.device.type == "cuda" else None
        beside = self.num_processes > 1 and self.device.type != "cpu"
        self.host_group = _group_beside(torch.distributed.group.WORLD) if beside else None

    def any_process(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any process; a small exchange between the hosts."""
        return list(flags) if self.num_processes == 1 else any_process(flags, self.host_group)

    def layout(self, num_micro_batches: int | None) -> Layout:
        """Return this process's place; without a number one micro-batch per process, or 8 with `bitwise`."""
        default = 8 if self.bitwise else self.num_processes
        return Layout(self.process, self.num_processes, num_micro_batches or default)

    def set_generators(self, seed: int, draws: Draws) -> None:
        """Seed what dropout and friends draw from.

        Args:
            seed: From 0 to 2**63 - 1.
            draws: Which generators.
        """
        if draws is Draws.ANYTHING:
            seed_all(seed)
        for generator in self.generators:
            generator.manual_seed(seed)

    def place(self, data: Any) -> Any:
        """Return a micro-batch on the device."""
        if self._on_cpu:
            # Matrix products of the same numbers at another offset in memory differ in their last bits.
            return recursively_apply(_aligned, data) if self.bitwise else data
        if self._copying is None:
            return send_to_device(data, self.device, non_blocking=True)
        if all(tensor.is_cuda for tensor in tensors_in(data)):
            return data
        # On a stream of its own the copy runs while the device still computes what was asked before.
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copying):
            placed = send_to_device(data, self.device, non_blocking=True)
        computing.wait_stream(self._copying)
        for tensor in tensors_in(placed):
            if tensor.is_cuda:
                tensor.record_stream(computing)  # its memory is not given away before that
        return placed

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Run a function on the main process only and return its result, or raise its error, on all."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (OSError, ValueError) as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def describe(self) -> str:
        """Return one line: device, processes and precision, each with where it came from."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        unverified = "" if self.device.type in _VERIFIED else ", not verified by this package"
        launch = "launcher" if "WORLD_SIZE" in os.environ else "default"
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''} ({launch})"
        return (
            f"{name} ({_device_source(self.device)}{unverified}), {processes}, "
            f"precision {self.precision} ({self._precision_source})"
        )


@lru_cache(maxsize=1)
def _group_beside(group: object) -> torch.distributed.ProcessGroup:
    """Return a group of the same processes that exchanges host memory: decisions need not wait for a device."""
    beside: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo")
    return beside


@atexit.register
def _leave_groups() -> None:
    """Let gloo's threads end before the interpreter does.

    Torch leaves this to its users, who rarely know: a thread that still lets go of the last exchange's tensors while
    Python is taken down aborts the process, after a training that went well. After an error other processes may still
    wait in an exchange, and so would this.
    """
    if not torch.distributed.is_initialized() or hasattr(sys, "last_value"):
        return
    gc.collect()  # of what still holds a group in a circle
    if torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
    elif _group_beside.cache_info().currsize:
        torch.distributed.destroy_process_group(_group_beside(torch.distributed.group.WORLD))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor that begins where torch's own allocator would let it: at a multiple of 64 bytes."""
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return tensor.clone() if is_plain and tensor.data_ptr() % 64 else tensor


@contextmanager
def fixed_arithmetic(bitwise: bool, num_threads: int | None) -> Iterator[None]:
    """Fix the number of CPU threads and ask for deterministic kernels; put the old settings back.

    Args:
        bitwise: Whether not one bit may differ: deterministic kernels only, one thread unless a number is given.
        num_threads: Threads inside an operation on the CPU; `None` keeps the present number.
    """
    old_threads, old_mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    old_benchmark, old_workspace = torch.backends.cudnn.benchmark, os.environ.get(_WORKSPACE)
    threads = num_threads or (1 if bitwise else None)
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if bitwise:
            os.environ.setdefault(_WORKSPACE, ":4096:8")
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(old_threads)
        if bitwise:
            torch.set_deterministic_debug_mode(old_mode)
            torch.backends.cudnn.benchmark = old_benchmark
            if old_workspace is None:
                os.environ.pop(_WORKSPACE, None)


_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS on several streams is not deterministic, and torch refuses


def _check_environment() -> None:
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", ""):
        raise HardwareError(_accumulation_hint(steps))
    for variable, plugin in _PLUGINS.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            _refuse_plugin(plugin)


def _accumulation_hint(steps: object) -> str:
    return (
        f"gradient_accumulation_steps={steps} is not used here: the loader's batch is what one update sees, on any "
        "number of processes. Multiply batch_size by it and set num_micro_batches in TrainConfig to cut the batch."
    )


def _refuse_plugin(plugin: str) -> None:
    raise HardwareError(
        f"The launch asks for {plugin}, which this version does not support (and which Accelerate silently ignores on "
        "CPU). Launch without it: one process per device, each with the whole model."
    )


def _build(mixed_precision: str | None, factory: Callable[[], Accelerator] | None) -> Accelerator:
    if not torch.accelerator.is_available() or _asks_for_cpu():
        _meet_after_restart()
    if factory is not None:
        accelerator = factory()
        if not isinstance(accelerator, Accelerator):
            raise TypeError(f"accelerator must be a function that returns an Accelerator, got {accelerator!r}.")
        return accelerator
    state = AcceleratorState._shared_state
    if mixed_precision is not None and state and state["_mixed_precision"] != mixed_precision:
        raise HardwareError(
            f"This process already has an Accelerator with mixed_precision={state['_mixed_precision']!r}, and "
            f"Accelerate cannot change it to {mixed_precision!r}. Use the same setting, or a fresh process."
        )
    # Without an accelerator Accelerate would start as many separate trainings as there are processes.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = several and not torch.accelerator.is_available()
    _check_precision(mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    return Accelerator(mixed_precision=mixed_precision, cpu=cpu)


def _asks_for_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")


def _meet_after_restart() -> None:
    """Form the group of processes that a launcher has started again.

    The store outlives them, and gloo would find in it the addresses of those that are gone: each attempt gets names of
    its own (huggingface/accelerate and torch up to 2.13 leave them out).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(*address, is_master=False, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    prefixed = torch.distributed.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", store=prefixed, rank=rank, world_size=size)


def _check_built(accelerator: Accelerator, mixed_precision: str | None) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != accelerator.num_processes:
        raise HardwareError(
            f"The launcher started {world_size} processes, but Accelerate sees {accelerator.num_processes}: each would "
            "train alone. An Accelerator or PartialState made before the trainer, without cpu=True, does this: "
            "remove it, or set ACCELERATE_USE_CPU=true."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise HardwareError(_accumulation_hint(accelerator.gradient_accumulation_steps))
    for name, plugin in (
        ("fsdp_plugin", "FSDP"),
        ("deepspeed_plugin", "DeepSpeed"),
        ("megatron_lm_plugin", "Megatron"),
    ):
        if getattr(accelerator.state, name, None) is not None:
            _refuse_plugin(plugin)
    _check_environment()  # the user's function may have set a plugin, which announces itself there
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        _refuse_plugin(str(accelerator.distributed_type.value))
    if mixed_precision is not None and accelerator.mixed_precision != mixed_precision:
        raise HardwareError(
            f"mixed_precision is {mixed_precision!r} in TrainConfig and {accelerator.mixed_precision!r} in the "
            "Accelerator that was given: set it in one place."
        )
    _check_precision(accelerator.mixed_precision, accelerator.device.type)


def possible_precisions(device_type: str) -> list[str]:
    """Return the precisions that a kind of device can train in here."""
    if device_type == "cpu":
        return ["no", "bf16"]
    if device_type == "cuda":
        return ["no", "fp16", *(["bf16"] if torch.cuda.is_bf16_supported() else []), "fp8"]
    return ["no", "fp16", "bf16"]


def _check_precision(precision: str, device_type: str | None = None) -> None:
    if device_type is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device_type = "cpu" if found is None or _asks_for_cpu() else found.type
    possible = possible_precisions(device_type)
    if precision not in possible:
        raise HardwareError(
            f"Precision {precision!r} is impossible on {device_type.upper()} (Accelerate would silently train in full "
            f"precision). This machine can do: {', '.join(possible)}."
        )


def _precision_source(mixed_precision: str | None, factory: object) -> str:
    if mixed_precision is not None:
        return "argument"
    if factory is not None:
        return "your Accelerator"
    if AcceleratorState._shared_state:
        return "the Accelerator of this process"
    return "launcher or environment" if "ACCELERATE_MIXED_PRECISION" in os.environ else "default"


def _device_source(device: torch.device) -> str:
    if _asks_for_cpu():
        return "asked for by ACCELERATE_USE_CPU"
    return "no accelerator found" if device.type == "cpu" and not torch.accelerator.is_available() else "found"


# --- the model --------------------------------------------------------------------------------------------------------

_TRACES = ("forward", "_original_forward", "_is_accelerate_prepared", "_is_torch_compile")


_NOTHING = nullcontext()


class Prepared:
    """A model, and an optimizer, on the hardware: wrapped, moved, in its precision.

    The user's model stays the same object. What Accelerate hangs on it is there only inside `attached()`.

    Args:
        hardware: Where it goes.
        model: The user's model.
        optimizer: The user's optimizer; `None` to evaluate only.
        compile: Whether to compile the model, or its repeated blocks (`regional`), if the launch does not.

    Attributes:
        model: What to call in place of the user's model.
    """

    def __init__(
        self,
        hardware: Hardware,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        compile: bool | Literal["regional"] = False,
    ) -> None:
        self.hardware, self.plain, self.optimizer = hardware, model, optimizer
        self._before = {name: model.__dict__[name] for name in _TRACES if name in model.__dict__}
        accelerator = hardware.accelerator
        # Under a launcher Accelerate's CPU is "cpu:0", and moving there would copy what is on "cpu": memory that
        # parameters share would part, on several processes only.
        places = hardware.device.type != "cpu"
        if not places:
            model.to("cpu")
        if optimizer is None or hardware.bitwise:
            # Not wrapped: nothing is exchanged, or gradients.TreeGradients does it.
            if hardware.bitwise:
                _realign(model)
            with _not_compiling(accelerator):
                self.model = accelerator.prepare_model(model, device_placement=places, evaluation_mode=True)
            if hardware.num_processes > 1:
                tensors = (*model.parameters(), *model.buffers())
                share_from_main([tensor for tensor in tensors if tensor.layout == torch.strided])
            self._accelerated: Any = (
                None if optimizer is None else accelerator.prepare(optimizer, device_placement=[places])
            )
        else:
            # Each micro-batch starts from the step's own buffers (gradients.Buffers): no broadcast in the forward.
            handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
            handler.broadcast_buffers = False
            accelerator.ddp_handler = handler
            with warnings.catch_warnings(), _not_compiling(accelerator):
                # torch 2.13 renames the setting; Accelerate 1.15 knows the old name only.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                placement = [places, places]
                self.model, self._accelerated = accelerator.prepare(model, optimizer, device_placement=placement)
        self._steps_plainly = accelerator.scaler is None and hardware.device.type != "xla"
        self._blocks = self._compile(compile)
        self._attached = {name: model.__dict__[name] for name in _TRACES if name in model.__dict__}
        self._detach()

    def _compile(self, compile: bool | Literal["regional"]) -> dict[nn.Module, Any]:
        """Compile the model, or return a compiled call for each of the blocks that it repeats."""
        plugin = self.hardware.accelerator.state.dynamo_plugin
        how: dict[str, Any] = {}
        if self.hardware.compiler != "no":
            by_launch: bool | Literal["regional"] = (
                "regional" if getattr(plugin, "use_regional_compilation", False) else True
            )  # since 1.4
            how, compile = plugin.to_kwargs(), compile or by_launch
        self.is_compiled = bool(compile)
        blocks = _repeated_blocks(self.plain) if compile == "regional" else []
        if compile and not blocks:
            self.model = torch.compile(self.model, **how)
        return {block: torch.compile(_inlined(block._call_impl), **how) for block in blocks}

    def stance(self, is_full: bool) -> AbstractContextManager[Any]:
        """Return what a forward runs under: a batch of another size than all others is not worth a graph of its own."""
        if is_full or not self.is_compiled:
            return _NOTHING
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager

    def _detach(self) -> None:
        for name in self._attached:
            self.plain.__dict__.pop(name, None)
        self.plain.__dict__.update(self._before)
        for block in self._blocks:
            block._compiled_call_impl = None

    @contextmanager
    def attached(self) -> Iterator[nn.Module]:
        """Yield what to call in place of the model."""
        self.plain.__dict__.update(self._attached)
        for block, compiled in self._blocks.items():
            block._compiled_call_impl = compiled
        try:
            yield self.model
        finally:
            self._detach()

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale the gradients down to a global norm and return the norm they had."""
        norm: torch.Tensor = self.hardware.accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    def step(self) -> bool:
        """Update the weights; return whether that happened (fp16 skips an update whose gradients overflowed)."""
        if self._steps_plainly:
            self.optimizer.step()  # type: ignore[union-attr]
            return True
        self._accelerated.step()
        return not self._accelerated.step_was_skipped


@contextmanager
def _not_compiling(accelerator: Accelerator) -> Iterator[None]:
    """Keep Accelerate from compiling: by regions it makes copies of modules, which would not follow the user's."""
    plugin = accelerator.state.dynamo_plugin
    backend, plugin.backend = plugin.backend, DynamoBackend.NO
    try:
        yield
    finally:
        plugin.backend = backend


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats: one graph serves all of a kind."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    blocks = [block for module in lists if len({type(block) for block in module}) == 1 for block in module]
    inner = {module for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if block not in inner]


def _inlined(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same: torch passes over the code of its own modules where it stands alone."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return called


def num_compilations() -> int:
    """Return how many graphs this process has compiled so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # nobody else counts them
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def _realign(model: nn.Module) -> None:
    """Move weights that foreign code has placed, such as NumPy's, to where torch would have them."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.layout == torch.strided]
    sharing = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if sharing[storage.data_ptr()] == 1 and storage.nbytes() == tensor.nbytes:
            tensor.data = _aligned(tensor.data)


# --- what the user gave -----------------------------------------------------------------------------------------------


def check_model(model: object, bitwise: bool = False) -> None:
    """Refuse what is not a plain model.

    Args:
        model: What the user gave.
        bitwise: Whether not one bit may depend on the number of processes.

    Raises:
        TypeError: Not a module, or one that is wrapped for several processes already.
        ValueError: A layer whose result depends on the number of processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    renorming = (nn.Embedding, nn.EmbeddingBag)
    if bitwise and any(isinstance(module, renorming) and module.max_norm is not None for module in model.modules()):
        raise ValueError(
            "An embedding with max_norm changes its weights in the forward, by the samples that a process has: "
            "bitwise=True cannot promise anything of it. Leave max_norm out."
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError(f"model is wrapped in {type(model).__name__}. Give the plain model: the trainer wraps it.")
    several = bitwise or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "SyncBatchNorm normalises over processes, so the run would depend on their number. Use BatchNorm with a "
            "fixed num_micro_batches, or a layer that does not look at the batch (GroupNorm, LayerNorm)."
        )


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Refuse an optimizer that would not train this model.

    Raises:
        TypeError: Not a torch optimizer, or one that calls the loss by itself.
        ValueError: A model without trainable parameters, or an optimizer that holds others.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS evaluates the loss several times in a step, which this loop does not do. Use another.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("The model has no trainable parameters: each has requires_grad=False, or there is none.")
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = [tuple(parameter.shape) for parameter in held if id(parameter) not in own]
    if foreign:
        raise ValueError(
            f"The optimizer holds {len(foreign)} of {len(held)} parameters that are not the model's (the first has "
            f"shape {foreign[0]}). Build it from this model: Optimizer(model.parameters(), ...); a loss with "
            "parameters belongs inside the model."
        )
