"""Seconds on a device of several kinds: ranks wait for the slowest of them at every collective."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np

from autopart.hardware.rows import kinds_of

Function = TypeVar("Function", bound=Callable[..., Any])


def of_slowest(function: Function) -> Function:
    """A function whose last argument is a `Device`, and whose result is seconds: a number, an array, or a tuple or
    record of these. Of a device of several kinds (`rows.Slowest`) the result is the longest seconds of any kind,
    element by element."""

    @wraps(function)
    def longest(*arguments: Any) -> Any:
        *given, device = arguments
        found = [function(*given, kind) for kind in kinds_of(device)]
        return found[0] if len(found) == 1 else _longest(found)

    return cast(Function, longest)


def _longest(found: Sequence[Any]) -> Any:
    """The element-wise maximum of results of one shape."""
    first = found[0]
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]
        return replace(first, **{name: _longest([getattr(each, name) for each in found]) for name in names})
    if isinstance(first, tuple):
        return tuple(map(_longest, zip(*found, strict=True)))
    return max(found) if isinstance(first, float) else np.maximum.reduce(found)
