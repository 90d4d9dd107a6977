"""The hardware of a run, and why it was chosen."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator

from ..base.exchange import any_process, host_group, share_object
from ..data.cut import Layout
from ..data.randomness import torch_generators
from .accelerator import (
    build_accelerator,
    check_accelerator,
    check_environment,
    device_source,
    precision_source,
    without_blank_variables,
)
from .arithmetic import tf32_message
from .hosts import meeting_anew
from .sharding import Kind, Sharding, asked_for


class Hardware:
    """The hardware of a run: one device per process.

    Args:
        mixed_precision: The user's choice; `None` to take the launch's.
        factory: The user's own function that builds the `Accelerator`.
        bitwise: Whether not one bit may depend on the number of processes.
        sharding: The user's choice; `None` to take the launch's.

    Attributes:
        process: Index of this process, 0-based.
        sharding: How models are to be divided over the processes; `None` for models that are whole on each.

    Raises:
        HardwareError: The launch or the arguments ask for something that would not happen here.
    """

    def __init__(
        self,
        mixed_precision: str | None = None,
        factory: Callable[[], Accelerator] | None = None,
        bitwise: bool = False,
        sharding: Kind | None = None,
    ) -> None:
        check_environment()
        asked_for(sharding)  # before anything is built
        self.bitwise = bitwise
        self._precision_source = precision_source(mixed_precision, factory)
        with without_blank_variables(), meeting_anew():
            self.accelerator = build_accelerator(mixed_precision, factory)
        check_accelerator(self.accelerator, mixed_precision)
        self.device: torch.device = self.accelerator.device
        self.process, self.num_processes = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.precision = str(self.accelerator.mixed_precision)
        asked = asked_for(sharding, self.accelerator)
        is_worthwhile = asked is not None and asked.is_worthwhile(self.num_processes, self.precision)
        self.sharding: Sharding | None = asked if is_worthwhile else None
        if asked is not None:
            asked.check_precision(self.precision)
        self.generators = torch_generators(self.device)
        if self.num_processes > 1:
            host_group()  # made here, where all processes call it

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.process == 0

    @property
    def compiler(self) -> str:
        """The compiler that the launch asks for; `no` without one."""
        return str(self.accelerator.state.dynamo_plugin.backend.value).lower()

    def any_process(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any process; a small exchange between the hosts."""
        return list(flags) if self.num_processes == 1 else any_process(flags)

    def layout(self, num_micro_batches: int | None) -> Layout:
        """Return the layout; without a number with one micro-batch per process, or 8 with `bitwise`."""
        default = 8 if self.bitwise else self.num_processes
        in_rounds = self.sharding is not None
        return Layout(self.process, self.num_processes, num_micro_batches or default, in_rounds)

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Run a function on the main process only and return its result, or raise its error, on all."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (OSError, ValueError) as raised:
                outcome[1] = raised
        result, error = share_object(outcome)
        if error is not None:
            raise error
        return result

    def describe(self) -> str:
        """Return one line: device, processes and precision, each with its source."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        unverified = "" if self.device.type in ("cpu", "cuda") else ", not verified by this package"
        launch = "launcher" if os.environ.get("WORLD_SIZE") else "default"
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''} ({launch})"
        divided = "" if self.sharding is None else f", model divided ({self.sharding.kind}, {self.sharding.source})"
        return (
            f"{name} ({device_source(self.device)}{unverified}), {processes}{divided}, "
            f"precision {self.precision} ({self._precision_source}){tf32_message(self.device)}"
        )
