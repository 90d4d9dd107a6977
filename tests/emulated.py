"""A GPU, emulated: a device without numbers on which every wait of the host is an error, or is counted.

Training runs on torch's `meta` device: an operation that mixes its tensors with those of the host is an error there,
as on a GPU. What would make the host wait for a GPU is counted by the line that does it:

- reads: a number or a tensor that comes back to the host;
- constructions: a tensor made on the device from numbers of the host, or copied there without `non_blocking`.

What is read is 1, so losses are, and all is finite.
"""

import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from support import ROOT

aten = torch.ops.aten
DEVICE = torch.device("meta")


def is_there(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.device == DEVICE


class _Operations(TorchDispatchMode):
    """Answer what would read from the device, and note it; note what is copied there and waited for."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = not kwargs.get("non_blocking", False)
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default) and is_there(args[0]):
            self.note("read")
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.equal.default and is_there(args[0]):
            self.note("read")
            return True
        if func is aten._to_copy.default:
            target = kwargs.get("device")
            if is_there(args[0]) and target is not None and target.type == "cpu":
                if waits:
                    self.note("read")
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if not is_there(args[0]) and target == DEVICE and waits:
                self.note("construction")
        if func is aten.copy_.default:
            into, source = args[:2]
            waits = waits and not (len(args) > 2 and args[2])
            if is_there(source) and not is_there(into):
                if waits:
                    self.note("read")
                return into.fill_(1)
            if is_there(into) and not is_there(source) and waits:
                self.note("construction")
        return func(*args, **kwargs)


class _Constructors(TorchFunctionMode):
    """Note tensors that are made on the device from numbers: they are copied there, and operations do not see it."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.MAKERS and not isinstance(args[0], torch.Tensor):
            device = kwargs.get("device")
            if device is not None and torch.device(device) == DEVICE:
                self.note("construction")
        return func(*args, **kwargs)


class EmulatedGpu:
    """Use as a context manager around a training; `waits` counts by step, kind and line of the package."""

    def __init__(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: self.note("synchronization"))
        # torch casts to lower precision on devices that it knows; what is around that is the same.
        monkeypatch.setattr("torch.autocast", lambda *_: nullcontext())
        self.waits = Counter()
        self.step = 0
        self.is_in_optimizer = False
        self._modes = _Constructors(self.note), _Operations(self.note)

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, kind):
        """Count a wait, at the innermost line of the package that leads to it; torch's own optimizers are left out."""
        if not self.is_in_optimizer:
            self.waits[self.step, kind, _place()] += 1

    def watch(self, optimizer):
        """Leave out what the optimizer does in its own step."""
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "is_in_optimizer", True))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "is_in_optimizer", False))

    def in_steps(self, first, last):
        """Return the waits of the steps from first to last, by kind and line."""
        found = Counter()
        for (step, kind, place), count in self.waits.items():
            if first <= step <= last:
                found[kind, place] += count
        return dict(found)


def _place():
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
    own = [frame for frame in frames if Path(frame.filename).parent.name == "accel_trainer"] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}"
