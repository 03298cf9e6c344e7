"""Whether a record that was read from a file has the types that its fields declare."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def mistyped(value: Any, kind: Any, where: str = "") -> str:
    """The first part of a value that is not of its declared type, as "stages[0].splits is 'x', not int"; "" if none is.

    An int counts as a float. A bool is no number, and nan is of no type.
    """
    return next(_mistyped(value, kind, where), "")


@lru_cache
def hints(kind: type[Any]) -> Mapping[str, Any]:
    """Field of a record -> its declared type."""
    return get_type_hints(kind)


def _mistyped(value: Any, kind: Any, where: str) -> Iterator[str]:
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        found = [mistyped(value, each, where) for each in args]
        if all(found):
            yield next((text for each, text in zip(args, found, strict=True) if each is not NoneType), "")
    elif origin is Any:
        return
    elif not _is(value, origin):
        shown = value if len(repr(value)) < 40 else type(value).__name__
        yield f"{where.removeprefix('.')} is {shown!r}, not {getattr(kind, '__name__', kind)}"
    elif is_dataclass(kind):
        for each in fields(kind):
            yield from _mistyped(getattr(value, each.name), hints(kind)[each.name], f"{where}.{each.name}")  # type: ignore[arg-type]
    elif origin is tuple and args[-1] is Ellipsis:
        for i, part in enumerate(value):
            yield from _mistyped(part, args[0], f"{where}[{i}]")
    elif origin is tuple:
        if len(value) != len(args):
            yield f"{where.removeprefix('.')} has {len(value)} parts, not {len(args)}"
        for i, (part, each) in enumerate(zip(value, args, strict=False)):
            yield from _mistyped(part, each, f"{where}[{i}]")
    elif args and issubclass(origin, Mapping):
        for key, part in value.items():
            yield from _mistyped(key, args[0], f"a key of {where.removeprefix('.')}")
            yield from _mistyped(part, args[1], f"{where}[{key!r}]")


def _is(value: Any, kind: type[Any]) -> bool:
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and not math.isnan(value)
    return isinstance(value, kind)
