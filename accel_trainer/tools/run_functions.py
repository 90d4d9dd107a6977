"""Run functions: `make_run(config)` returns what `Trainer` takes together with its loaders, for the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..base.console import nearest
from ..config import TrainConfig

_LOADERS = ("train_loader", "test_loader", "final_loader")
_OF_TRAINER = (
    "model",
    "optimizer",
    "loss_fn",
    "scheduler",
    "metrics",
    "callbacks",
    "compute_loss",
    "weight_fn",
    "accelerator",
    "config",
)
_NEEDED = ("model", "optimizer", "train_loader")


def find_run_function(name: str) -> Callable[[TrainConfig], Mapping[str, Any]]:
    """Return the run function of this name.

    Args:
        name: `my_module:make_run`, or `path/to/script.py:make_run`.

    Raises:
        ValueError: There is no such function; the message names the nearest.
    """
    place, separator, attribute = name.partition(":")
    if not separator or not place or not attribute:
        raise ValueError(f"A run function is named as my_module:make_run or path/to/script.py:make_run, got {name!r}.")
    module = _import_file(place) if place.endswith(".py") else _import_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{place} has no function {attribute!r}.{_nearest(attribute, known)}")
    found: Callable[[TrainConfig], Mapping[str, Any]] = function
    return found


def _import_module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # the module is there, and misses another one
        files = [entry[:-3] for entry in os.listdir() if entry.endswith(".py")]
        raise ValueError(f"There is no module {name!r} here or installed.{_nearest(name, files)}") from None


def _import_file(path: str) -> Any:
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path!r}.")
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _nearest(name: str, known: list[str]) -> str:
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"


def make_run(name: str, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Call a run function, with the generators seeded, and return the arguments for `Trainer` and the loaders.

    It may return a `config` of its own, best made of the one that it is given.

    Raises:
        ValueError: It does not return what a run needs.
    """
    from ..data.randomness import seed_all  # with torch: wrong names are told without it

    function = find_run_function(name)
    seed_all(config.seed)
    run = function(config)
    if not isinstance(run, Mapping):
        raise ValueError(f"{name} must return a dictionary ({', '.join(_NEEDED)}, ...), got {type(run).__name__}.")
    known = [*_OF_TRAINER, *_LOADERS]
    for key in run:
        if key not in known:
            raise ValueError(f"{name} returns {key!r}, which is not among {', '.join(known)}.{_nearest(key, known)}")
    for key in _NEEDED:
        if key not in run:
            raise ValueError(f"{name} returns no {key!r}.")
    of_trainer = {key: value for key, value in run.items() if key in _OF_TRAINER}
    return of_trainer, {key: value for key, value in run.items() if key in _LOADERS}
