"""Several test sets, each by its name, and how a monitored value is named after them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader


def by_name(test_loader: Any) -> dict[str, DataLoader[Any]]:
    """Return the test loaders by name; a single one has an empty name."""
    if not isinstance(test_loader, Mapping):
        return {} if test_loader is None else {"": test_loader}
    for name in test_loader:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"The name of a test loader must be a text without a slash, got {name!r}.")
    if not test_loader:
        raise ValueError("test_loader is an empty dictionary: give one loader at least, or None.")
    return dict(test_loader)


def argument_of(name: str) -> str:
    """Return how messages call a test loader."""
    return f"test_loader[{name!r}]" if name else "test_loader"


def parts_of(monitor: str, tests: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of the test set of a monitored value, empty for a single one, and that of the value itself."""
    name, slash, score = monitor.partition("/")
    return (name, score) if slash and name in tests else ("", monitor)
