"""What a run computes on, and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import recursively_apply

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

_VERIFIED = ("cpu", "cuda")


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
        check_environment()
        self.bitwise = bitwise
        self._precision_source = precision_source(mixed_precision, factory)
        with without_blank_variables():
            self.accelerator = build_accelerator(mixed_precision, factory)
        check_accelerator(self.accelerator, mixed_precision)
        self.device: torch.device = self.accelerator.device
        self.generators = torch_generators(self.device)
        if self.num_processes > 1:
            host_group()  # made here, where all processes come by

    @property
    def process(self) -> int:
        """Index of this process, 0-based."""
        return int(self.accelerator.process_index)

    @property
    def num_processes(self) -> int:
        """Processes of the run."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.process == 0

    @property
    def precision(self) -> str:
        """The precision of the forward."""
        return str(self.accelerator.mixed_precision)

    @property
    def compiler(self) -> str:
        """The compiler that the launch asks for; `no` without one."""
        return str(self.accelerator.state.dynamo_plugin.backend.value).lower()

    def any_process(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any process; a small exchange between the hosts."""
        return list(flags) if self.num_processes == 1 else any_process(flags)

    def layout(self, num_micro_batches: int | None) -> Layout:
        """Return this process's place; without a number one micro-batch per process, or 8 with `bitwise`."""
        default = 8 if self.bitwise else self.num_processes
        return Layout(self.process, self.num_processes, num_micro_batches or default)

    def arrived(self, data: Any) -> Any:
        """Return what was copied to the host without waiting, in memory that is not page-locked any more."""
        if self.device.type == "cpu":
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
            f"{name} ({device_source(self.device)}{unverified}), {processes}, "
            f"precision {self.precision} ({self._precision_source}){tf32_message(self.device)}"
        )
