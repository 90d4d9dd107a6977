"""Whether something read from a file has the form in which it was written, so that it can be shown."""

from __future__ import annotations

import math
import re
from typing import Any

_LARGEST = 2**53  # of whole numbers: larger ones are no counts, and no floats

Form = Any
"""A type; `None`; `math.isfinite` for such a float; a pattern of a text; a tuple of forms, of which one is met; a list
of forms, or of one of them and `...` for any number of items; a dictionary of forms."""


def fits(value: Any, form: Form) -> bool:
    """Return whether a value has a form.

    Example:
        >>> fits([["a", 1.0], ["b", None]], [[str, (float, None)], ...])
        True
        >>> fits({"a": True}, {"a": int})
        False
    """
    if form is None:
        return value is None
    if form is int:
        return type(value) is int and abs(value) <= _LARGEST
    if isinstance(form, type):
        return type(value) is form
    if form is math.isfinite:
        return type(value) is float and math.isfinite(value)
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value) is not None
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, dict):
        return type(value) is dict and value.keys() == form.keys() and all(fits(value[key], form[key]) for key in form)
    if type(value) is not list:
        return False
    forms = form[:1] * len(value) if form[-1] is ... else form
    return len(forms) == len(value) and all(map(fits, value, forms))
