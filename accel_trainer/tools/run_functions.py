"""Run functions: `make_run(config)` returns what `Trainer` takes together with its loaders, for the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..base.console import did_you_mean
from ..config import TrainConfig

_LOADERS = ("train_loader", "test_loader", "final_loader")
_NEEDED = ("model", "optimizer", "train_loader")


def find_run_function(name: str) -> Callable[[TrainConfig], Mapping[str, Any]]:
    """Return the run function of a name such as `my_module:make_run` or `path/to/script.py:make_run`.

    Raises:
        ValueError: There is no such function; the message names the nearest.
    """
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise ValueError(f"A run function is named as my_module:make_run or path/to/script.py:make_run, got {name!r}.")
    module = _import_file(path) if path.endswith(".py") else _import_module(path)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{path} has no function {attribute!r}.{did_you_mean(attribute, known)}")
    return function  # type: ignore[no-any-return]


def _import_module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # the module exists, and imports one that does not
        files = [entry[:-3] for entry in os.listdir() if entry.endswith(".py")]
        raise ValueError(f"There is no module {name!r} here or installed.{did_you_mean(name, files)}") from None


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


def call_run_function(
    name: str, config: TrainConfig, choices: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Call a run function, with the generators seeded, and return the arguments for `Trainer` and the loaders.

    The function may return a `config` of its own, best made of the one that it is given. `choices` are fields that are
    set in both.

    Raises:
        ValueError: It does not return what a run needs.
    """
    from ..data.randomness import seed_all  # with torch: wrong names are reported without it
    from ..trainer import Trainer

    function = find_run_function(name)
    config = replace(config, **choices or {})
    seed_all(config.seed)
    run = function(config)
    if not isinstance(run, Mapping):
        raise ValueError(f"{name} must return a dictionary ({', '.join(_NEEDED)}, ...), got {type(run).__name__}.")
    known = [*inspect.signature(Trainer).parameters, *_LOADERS]
    for key in run:
        if key not in known:
            raise ValueError(
                f"{name} returns {key!r}, which is not among {', '.join(known)}.{did_you_mean(key, known)}"
            )
    for key in _NEEDED:
        if key not in run:
            raise ValueError(f"{name} returns no {key!r}.")
    loaders = {key: value for key, value in run.items() if key in _LOADERS}
    arguments = {"config": config} | {key: value for key, value in run.items() if key not in _LOADERS}
    if choices:
        arguments["config"] = replace(arguments["config"], **choices)
    return arguments, loaders
