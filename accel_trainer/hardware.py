"""Build the one `Accelerator`, say what was chosen and why, prepare the model, give it back plain."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache, partial, wraps
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    convert_to_fp32,
    recursively_apply,
    send_to_device,
)
from torch import nn
from torch.optim import Optimizer

from .batches import Layout, leaves_of, tensors_in
from .errors import HardwareError
from .exchange import any_process, host_group, share_object
from .fetching import aligned
from .losses import call_model
from .randomness import Draws, seed_all, torch_generators
from .reductions import share_from_main

__all__ = [
    "Hardware",
    "Prepared",
    "check_model",
    "check_optimizer",
    "counts_on_device",
    "fixed_arithmetic",
    "foreign_parameters",
    "num_compilations",
    "place_state",
]

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
        with _without_blanks():
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
        self._here = torch.empty(0, device=self.device).device  # with its index
        self._copying = _stream_of_copies(self._here) if self.device.type == "cuda" else None
        if self.num_processes > 1:
            host_group()  # made here, where all processes come by

    def any_process(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any process; a small exchange between the hosts."""
        return list(flags) if self.num_processes == 1 else any_process(flags)

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
        if not self._on_cpu:
            data = self._copied(data)
        return recursively_apply(aligned, data) if self.bitwise else data

    def _copied(self, data: Any) -> Any:
        if is_on(data, self._here):
            return data
        if self._copying is None or not may_be_streamed(data):
            return send_to_device(data, self.device, non_blocking=True)
        # On a stream of its own the copy runs while the device still computes what was asked before.
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copying):
            placed = send_to_device(data, self.device, non_blocking=True)
        computing.wait_stream(self._copying)
        for tensor in tensors_in(placed):
            if tensor.is_cuda:  # the batch sizes of a packed sequence stay on the host
                tensor.record_stream(computing)  # its memory is not given away before that
        return placed

    def arrived(self, data: Any) -> Any:
        """Return what was copied to the host without waiting, in memory that is not page-locked any more."""
        if self._on_cpu:
            return data
        torch.accelerator.synchronize(self.device)
        return recursively_apply(torch.clone, data)

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Run a function on the main process only and return its result, or raise its error, on all."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (OSError, ValueError) as error:
                outcome[1] = error
        result, problem = share_object(outcome)
        if problem is not None:
            raise problem
        return result

    def describe(self) -> str:
        """Return one line: device, processes and precision, each with where it came from."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        unverified = "" if self.device.type in _VERIFIED else ", not verified by this package"
        launch = "launcher" if os.environ.get("WORLD_SIZE") else "default"
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''} ({launch})"
        return (
            f"{name} ({_device_source(self.device)}{unverified}), {processes}, "
            f"precision {self.precision} ({self._precision_source}){_told_of_tf32(self.device)}"
        )


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


@contextmanager
def fixed_arithmetic(bitwise: bool = False, num_threads: int | None = None) -> Iterator[None]:
    """Decide, in one place, how a run computes: threads, kernels, TF32. The old settings are put back.

    Convolutions in float32 follow what `torch.set_float32_matmul_precision` says of matrix products, which by default
    is full precision; torch would let cuDNN round them to TF32, whose errors are larger than what is promised of runs
    on other layouts.

    Args:
        bitwise: Whether not one bit may differ: deterministic kernels only, one thread unless a number is given.
        num_threads: Threads inside an operation on the CPU; `None` keeps the present number.
    """
    # cuBLAS reads it once, at the first matrix product of a process: a later run of this process may be the one that
    # needs it. Without it products on several streams are not deterministic, and torch refuses them then.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with ExitStack() as old:
        old.callback(_set_tf32_of_convolutions, _tf32_of_convolutions())
        _set_tf32_of_convolutions(uses_tf32())
        if num_threads is not None or bitwise:
            old.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(num_threads or 1)
        if bitwise:
            old.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
            torch.use_deterministic_algorithms(True)
            old.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
            torch.backends.cudnn.benchmark = False
            # It would overwrite all memory that is taken, in case that somebody reads it before writing.
            deterministic: Any = torch.utils.deterministic
            fills = deterministic.fill_uninitialized_memory
            old.callback(setattr, deterministic, "fill_uninitialized_memory", fills)
            deterministic.fill_uninitialized_memory = False
        yield


def uses_tf32() -> bool:
    """Return whether products of float32 matrices are rounded to TF32 on a GPU, as the user has told torch."""
    if hasattr(torch.backends.cudnn, "conv"):  # since torch 2.9, where the older function may refuse to answer
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def _tf32_of_convolutions() -> bool | tuple[str, str]:
    cudnn = torch.backends.cudnn
    try:
        return bool(cudnn.allow_tf32)
    except RuntimeError:  # convolutions and recurrent layers were set apart, by the names that torch has since 2.9
        return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision  # type: ignore[attr-defined]


def _set_tf32_of_convolutions(choice: bool | tuple[str, str]) -> None:
    cudnn = torch.backends.cudnn
    if isinstance(choice, bool):
        cudnn.allow_tf32 = choice
    else:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = choice  # type: ignore[attr-defined]


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
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    cpu = several and not torch.accelerator.is_available()
    _check_precision(mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    return Accelerator(mixed_precision=mixed_precision, cpu=cpu)


_OF_LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


@contextmanager
def _without_blanks() -> Iterator[None]:
    """Take a launcher's variable that is set to nothing as not set; Accelerate takes it for a broken number."""
    blank = [name for name in _OF_LAUNCHERS if os.environ.get(name) == ""]
    for name in blank:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(dict.fromkeys(blank, ""))


def _asks_for_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")


def _meet_after_restart() -> None:
    """Form the group of processes that a launcher has started again.

    The store outlives them, and gloo would find in it the addresses of those that are gone: each attempt gets names of
    its own (huggingface/accelerate and torch up to 2.13 leave them out).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(*address, is_master=False, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    prefixed = torch.distributed.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", store=prefixed, rank=rank, world_size=size)


def _check_built(accelerator: Accelerator, mixed_precision: str | None) -> None:
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size != accelerator.num_processes:
        raise HardwareError(
            f"The launcher started {world_size} processes, but Accelerate sees {accelerator.num_processes}: each would "
            "train alone. An Accelerator or PartialState made before the trainer, without cpu=True, does this: "
            "remove it, or set ACCELERATE_USE_CPU=true."
        )
    if world_size > 1 and accelerator.distributed_type == DistributedType.NO:
        raise HardwareError(
            f"The Accelerator knows of {world_size} processes and would not add up their gradients: each would train "
            'alone. backend="gloo" needs cpu=True beside it, or ACCELERATE_USE_CPU=true.'
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


def _told_of_tf32(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return ", TF32 on (your choice)" if uses_tf32() else ', TF32 off (set_float32_matmul_precision("high") allows it)'


def _device_source(device: torch.device) -> str:
    if _asks_for_cpu():
        return "asked for by ACCELERATE_USE_CPU"
    return "no accelerator found" if device.type == "cpu" and not torch.accelerator.is_available() else "found"


# --- the model --------------------------------------------------------------------------------------------------------

_TRACES = ("forward", "_original_forward", "_is_accelerate_prepared", "_is_torch_compile")


_NOTHING = nullcontext()


class Prepared:
    """A model, and an optimizer, on the hardware: wrapped, moved, in its precision.

    The user's model stays the same object. What hangs on it for the run is there only inside `attached()`.

    Args:
        hardware: Where it goes.
        model: The user's model.
        optimizer: The user's optimizer; `None` to evaluate only.
        compile: Whether to compile the model, or its repeated blocks (`regional`), if the launch does not.

    Attributes:
        model: What to call in place of the user's model.
        reuses_memory: Whether what the model returns, and its gradients, lie in memory that the next call writes to.
        copies_losses: Whether losses may do so: on a GPU the user's own code may be compiled so too.
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
        self._autocast = _autocast_of(hardware.accelerator)
        self._accelerate()
        self._steps_plainly = hardware.accelerator.scaler is None and hardware.device.type != "xla"
        self._how_to_compile, compile = self._settings_of_compiler(compile)
        self.is_compiled = bool(compile)
        self.reuses_memory = self.is_compiled and _uses_cuda_graphs(self._how_to_compile)
        self.copies_losses = self.reuses_memory or hardware.device.type == "cuda"
        self._blocks: dict[nn.Module, Any] = {}
        self._compile(compile)
        self._attached = {name: model.__dict__[name] for name in _TRACES if name in model.__dict__}
        self._detach()

    def _accelerate(self) -> None:
        """Move the model and wrap it for the processes, by Accelerate."""
        hardware, model, optimizer = self.hardware, self.plain, self.optimizer
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
            with _neither_compiling_nor_casting(accelerator):
                self.model = accelerator.prepare_model(model, device_placement=places, evaluation_mode=True)
            if hardware.num_processes > 1:
                tensors = (*model.parameters(), *model.buffers())
                share_from_main([tensor for tensor in tensors if tensor.layout == torch.strided])
            self._accelerated: Any = (
                None if optimizer is None else accelerator.prepare(optimizer, device_placement=[places_state])
            )
        else:
            # Each micro-batch starts from the step's own buffers (gradients.Buffers): no broadcast in the forward.
            handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
            handler.broadcast_buffers = False
            accelerator.ddp_handler = handler
            with warnings.catch_warnings(), _neither_compiling_nor_casting(accelerator):
                # torch 2.13 renames the setting; Accelerate 1.15 knows the old name only.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                placement = [places, places_state]
                self.model, self._accelerated = accelerator.prepare(model, optimizer, device_placement=placement)
        if optimizer is not None and not places_state:
            place_state(optimizer)

    def _settings_of_compiler(
        self, compile: bool | Literal["regional"]
    ) -> tuple[dict[str, Any], bool | Literal["regional"]]:
        """Return how to compile, and what: as the launch says, or the user."""
        plugin = self.hardware.accelerator.state.dynamo_plugin
        if self.hardware.compiler == "no":
            return {}, compile
        by_launch: bool | Literal["regional"] = (
            "regional" if getattr(plugin, "use_regional_compilation", False) else True
        )  # since 1.4
        return plugin.to_kwargs(), compile or by_launch

    def _compile(self, compile: bool | Literal["regional"]) -> None:
        """Cast the model to the precision of the run, and compile it, or each of the blocks that it repeats."""
        if self._autocast is not None:
            self.plain.forward = _cast(self.plain.forward, self._autocast)
        how = self._how_to_compile
        blocks = _repeated_blocks(self.plain) if compile == "regional" else []
        is_wrapped = self.model is not self.plain
        self._is_one_graph = bool(compile) and not blocks and not is_wrapped
        if self._is_one_graph:
            self.model = torch.compile(self.model, **how)
        elif compile and not blocks:
            blocks = [self.plain]  # torch does not look at the code of its own modules within a wrapper
        entries: list[tuple[nn.Module, Any]] = [(block, type(block)) for block in blocks]
        self._blocks = {block: torch.compile(_entry(kind)(block._call_impl), **how) for block, kind in entries}

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
        if not self._is_one_graph or self._how_to_compile.get("fullgraph"):  # the loss was not meant by that
            return None
        compiled = torch.compile(_model_and_loss((type(self.plain), form)), **self._how_to_compile)
        return partial(compiled, self.plain, loss_fn)

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
        if self._steps_plainly:
            self.optimizer.step()  # type: ignore[union-attr]
            return True
        updates: list[bool] = []

        def note(optimizer: Optimizer, *_: Any) -> None:
            found = getattr(optimizer, "found_inf", None)  # by the scaler, for an optimizer that skips by itself
            updates.append(found is None or not found.item())

        handle = self.optimizer.register_step_pre_hook(note)  # type: ignore[union-attr]
        try:
            self._accelerated.step()
        finally:
            handle.remove()
        return any(updates)


@contextmanager
def _neither_compiling_nor_casting(accelerator: Accelerator) -> Iterator[None]:
    """Keep Accelerate from two things that it does by new code hung on the model.

    Compiling by regions it makes copies of modules, which would not follow the user's. Its cast to lower precision
    is a new function for each `prepare`, so that what is compiled around it would be compiled anew.
    """
    plugin = accelerator.state.dynamo_plugin
    backend, casts = plugin.backend, accelerator.native_amp
    plugin.backend, accelerator.native_amp = DynamoBackend.NO, False
    try:
        yield
    finally:
        plugin.backend, accelerator.native_amp = backend, casts


def _autocast_of(accelerator: Accelerator) -> tuple[Any, ...] | None:
    """Return the arguments of `torch.autocast` for a forward in lower precision; `None` where nothing is cast."""
    if not accelerator.native_amp:
        return None
    handler = accelerator.autocast_handler
    options = {} if handler is None else handler.to_kwargs()
    dtype = torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16
    return accelerator.device.type, dtype, options.get("enabled", True), options.get("cache_enabled")


def _cast(forward: Any, autocast: tuple[Any, ...]) -> Any:
    """Return a forward that computes in lower precision and returns full precision.

    A method stays one of its object, so that a copy of the model computes with its own weights.
    """
    if isinstance(forward, MethodType):
        return MethodType(_casting(forward.__func__, autocast), forward.__self__)
    return _casting(forward, autocast)


@lru_cache
def _casting(function: Any, autocast: tuple[Any, ...]) -> Any:
    """Return a function that casts; the same for the same, as compiled code needs it."""
    device_type, dtype, enabled, cache_enabled = autocast

    def called(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype, enabled, cache_enabled):  # a new one: a model may call itself
            outputs = function(*args, **kwargs)
        return convert_to_fp32(outputs)

    return wraps(function)(_own_code(called))


def _own_code(function: Any) -> Any:
    """Return the same function with a code object of its own, whose graphs the compiler counts apart from others'."""
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )


@lru_cache
def _model_and_loss(what: Hashable) -> Any:
    """Return a function that computes a loss with a model, to be compiled; one for each class of models and loss."""

    def compute(model: nn.Module, loss_fn: Callable[[Any, Any], torch.Tensor], inputs: Any, targets: Any) -> Any:
        return loss_fn(call_model(model, inputs), targets)

    return _own_code(compute)


@lru_cache
def _entry(kind: Any) -> Callable[..., Any]:
    """Return a function that makes calls of a class of modules into functions to be compiled.

    Torch passes over the code of its own modules where it stands alone.
    """

    def called(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    own = _own_code(called)
    return lambda call: partial(own, call)


def _uses_cuda_graphs(how: Mapping[str, Any]) -> bool:
    """Return whether code that is compiled so may be replayed in the same memory on a GPU."""
    options = how.get("options") or {}
    return (
        how.get("mode") in ("reduce-overhead", "max-autotune")
        or how.get("backend") == "cudagraphs"
        or bool(options.get("triton.cudagraphs"))
        or os.environ.get("TORCHINDUCTOR_CUDAGRAPHS") == "1"
        or bool(getattr(getattr(sys.modules.get("torch._inductor.config"), "triton", None), "cudagraphs", False))
    )


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


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats: one graph serves all of a kind."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    blocks = [block for module in lists if len({type(block) for block in module}) == 1 for block in module]
    inner = {module for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if block not in inner]


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
            tensor.data = aligned(tensor.data)


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
    several = bitwise or int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "SyncBatchNorm normalises over processes, so the run would depend on their number. Use BatchNorm with a "
            "fixed num_micro_batches, or a layer that does not look at the batch (GroupNorm, LayerNorm)."
        )


def _needs_closure(optimizer: Optimizer) -> bool:
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)  # a scheduler wraps that of the object
    except TypeError:
        return True
    except ValueError:  # of compiled code, which does not tell
        return False
    return False


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
    if _needs_closure(optimizer):
        raise TypeError(
            f"The optimizer {type(optimizer).__name__} wants a closure, to evaluate the loss several times in a step, "
            "which this loop does not do. Use another."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("The model has no trainable parameters: each has requires_grad=False, or there is none.")
    foreign = foreign_parameters(optimizer, model)
    if foreign:
        num_held = sum(len(group["params"]) for group in optimizer.param_groups)
        raise ValueError(
            f"The optimizer holds {len(foreign)} of {num_held} parameters that are not the model's (the first has "
            f"shape {tuple(foreign[0].shape)}). Build it from this model: Optimizer(model.parameters(), ...); a loss "
            "with parameters belongs inside the model."
        )


def foreign_parameters(optimizer: Optimizer, model: nn.Module) -> list[torch.Tensor]:
    """Return the parameters of an optimizer that are not, or no longer, those of a model."""
    own = {id(parameter) for parameter in model.parameters()}
    return [one for group in optimizer.param_groups for one in group["params"] if id(one) not in own]
