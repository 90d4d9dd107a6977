"""Libraries that only the extra `report` of this package brings: whether they are there, and what is said if not."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(library: str) -> bool:
    """Return whether a library can be imported, without importing it."""
    return find_spec(library) is not None


def without(*libraries: str, no: str) -> str | None:
    """Return one line on what there cannot be without some libraries; `None` where all of them are installed.

    Example:
        >>> without("no_such_library", no="picture")
        "No picture without no_such_library: pip install 'accel_trainer[report]'."
    """
    missing = " and ".join(library for library in libraries if not is_installed(library))
    return f"No {no} without {missing}: pip install 'accel_trainer[report]'." if missing else None


def require(*libraries: str, no: str) -> None:
    """Raise an error that says what there cannot be without these libraries, where one is missing.

    Raises:
        ImportError: With one line that names the library and the extra.
    """
    message = without(*libraries, no=no)
    if message is not None:
        raise ImportError(message)
