"""Rows of devices and links from a TOML file, each checked; the format is told in `autopart.hardware`."""

import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from autopart.errors import PartitionError, closest

from .measured import read_measured, read_wire
from .rows import DTYPES, KINDS, Device, Host, Link, Silicon

_Row = TypeVar("_Row", Device, Link)

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
"""What a row may be called: what the text of a mesh can name."""


SHOWN = 200
"""Characters that are shown of a value that is refused."""


@dataclass(frozen=True)
class Rows:
    """What a file holds, by name. `cuda`: pattern for what the CUDA driver calls a device -> its row."""

    devices: dict[str, Device] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    cuda: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kind:
    """What a field takes: in words, and as a function that gives None for anything else."""

    says: str
    read: Callable[[Any], Any]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _rate(value: Any) -> float | None:
    return float(value) if _number(value) and value > 0 else None


def _seconds(value: Any) -> float | None:
    return float(value) if _number(value) and value >= 0 else None


def _count(value: Any) -> int | None:
    return int(value) if _number(value) and value > 0 and value == int(value) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _rates(value: Any) -> dict[str, float] | None:
    if not isinstance(value, dict) or not value or not value.keys() <= set(DTYPES):
        return None
    rates = {dtype: _rate(rate) for dtype, rate in value.items()}
    return rates if all(rates.values()) else None  # type: ignore[return-value]


def _pattern(value: Any) -> str | None:
    try:
        return re.compile(value).pattern
    except (re.error, TypeError):
        return None


def _pair(value: Any) -> tuple[float, float] | None:
    rates = [_rate(rate) for rate in value] if isinstance(value, list) and len(value) == 2 else [None]
    return tuple(rates) if all(rates) else None  # type: ignore[return-value]


RATE = _Kind("a number above 0", _rate)
SECONDS = _Kind("a number of seconds, at least 0", _seconds)
TIMES = _Kind("a number, at least 0", _seconds)
COUNT = _Kind("a whole number above 0", _count)
TEXT = _Kind("a text that is not empty", _text)
RATES = _Kind(f"a table of dtype = FLOP/s, each above 0, the dtypes among {', '.join(DTYPES)}", _rates)
PATTERN = _Kind("a regular expression", _pattern)
KIND = _Kind(f"one of {', '.join(KINDS)}", lambda value: value if value in KINDS else None)
PAIR = _Kind("two numbers above 0", _pair)

CONSTANTS: Mapping[str, _Kind] = {
    "processors": COUNT,
    "issue": RATE,
    "sustained": RATE,
    "attention": PAIR,
    "source": TEXT,
    "rows": COUNT,
    "ramp": SECONDS,
    "feed": SECONDS,
    "memory": RATE,
    "kernel_seconds": SECONDS,
}
"""The fields of a device's `silicon`."""


HOST_FIELDS: Mapping[str, _Kind] = {
    "memory_bytes": COUNT,
    "bandwidth": RATE,
    "link": RATE,
    "source": TEXT,
    "copied": RATE,
    "updated": RATE,
}
"""The fields of a device's `host`."""


def _record(kind: type[Any], takes: Mapping[str, _Kind]) -> Callable[[Any], Any]:
    """A function that reads a table of a device's row as a record of `kind`, or gives None."""

    def read(value: Any) -> Any:
        if not isinstance(value, dict) or not value.keys() <= takes.keys():
            return None
        found = {key: takes[key].read(given) for key, given in value.items()}
        needed = {f.name for f in fields(kind) if f.default is MISSING}
        return None if None in found.values() or needed - found.keys() else kind(**found)

    return read


SILICON = _Kind(
    "a table of processors, issue, sustained, attention = [forward, backward] and source, and if they are other than "
    "usual rows, ramp, feed, memory, kernel_seconds, all above 0",
    _record(Silicon, CONSTANTS),
)

HOST = _Kind(
    "a table of memory_bytes, bandwidth, link and source, and if they are other than usual copied and updated, all "
    "above 0",
    _record(Host, HOST_FIELDS),
)

MEASURED = _Kind(
    "the tables that `autopart calibrate` writes, of rows of numbers (autopart/hardware/measured.py)", read_measured
)
WIRE = _Kind(MEASURED.says, read_wire)

BESIDES: Mapping[str, _Kind] = {"like": TEXT, "cuda": PATTERN}
"""Fields of a row in a file that are not of the row it makes."""

TAKES: Mapping[type[Any], Mapping[str, _Kind]] = {
    Device: {
        "flops": RATES,
        "memory_bytes": COUNT,
        "bandwidth": RATE,
        "launch_seconds": SECONDS,
        "link": TEXT,
        "inter": TEXT,
        "devices_per_host": COUNT,
        "nics_per_host": COUNT,
        "overlap": TIMES,
        "silicon": SILICON,
        "host": HOST,
        "measured": MEASURED,
        "source": TEXT,
        **BESIDES,
    },
    Link: {
        "bandwidth": RATE,
        "latency_seconds": SECONDS,
        "source": TEXT,
        "kind": KIND,
        "share": RATE,
        "exchange": RATE,
        "wired": COUNT,
        "measured": WIRE,
        "like": TEXT,
    },
}
"""The fields that a row in a file may have."""


def read_rows(path: Path, devices: Mapping[str, Device], links: Mapping[str, Link]) -> Rows:
    """The rows of a file, which may refer to those of `devices` and `links` and to rows above them in the file.

    Raises PartitionError, naming file and row, for a file that cannot be read and for any row that is not whole.
    """
    sections = _sections(path)
    rows = Rows()
    for name, given in sections.get("links", {}).items():
        rows.links[name] = _made(f"{path}: links.{name}", name, given, Link, {**links, **rows.links})
    known = {**links, **rows.links}
    for name, given in sections.get("devices", {}).items():
        where = f"{path}: devices.{name}"
        device = _made(where, name, given, Device, {**devices, **rows.devices})
        for field_name in ("link", "inter"):
            if (link := getattr(device, field_name)) not in known:
                raise _unknown(f"{where}: {field_name} = {link!r}", "link", link, known)
        if "cuda" in given:
            rows.cuda[_value(where, "cuda", given["cuda"], PATTERN)] = name
        rows.devices[name] = device
    return rows


def _sections(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """A file's two tables of rows."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PartitionError(f"cannot read {path}", error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PartitionError(f"{path} is no TOML", str(error)) from error
    for section, rows in data.items():
        if section not in ("devices", "links"):
            raise PartitionError(f"{path}: unknown table {section!r}", try_="[devices.NAME] or [links.NAME]")
        if not isinstance(rows, dict):
            raise PartitionError(f"{path}: {section} is no table of rows", try_=f"[{section}.NAME]")
        for name, row in rows.items():
            if not isinstance(row, dict):
                raise PartitionError(f"{path}: {section}.{name} is no row", try_=f"[{section}.{name}]")
            if not NAME.fullmatch(name):
                raise PartitionError(
                    f"{path}: {section}.{name}: not a name",
                    "the text of a mesh could not name it",
                    "lower-case letters, digits, '-', '_' and '.'",
                )
    return data


def _made(where: str, name: str, given: Mapping[str, Any], kind: type[_Row], known: Mapping[str, _Row]) -> _Row:
    """The row that the fields of a file make, with those of the row it is `like` where it gives none."""
    takes = TAKES[kind]
    for key in given.keys() - takes.keys():
        raise _unknown(f"{where}: unknown field {key!r}", "field", key, takes)
    values = {key: _value(where, key, value, takes[key]) for key, value in given.items()}
    own = {key: value for key, value in values.items() if key not in BESIDES}
    if base := values.get("like"):
        if base not in known:
            raise _unknown(f"{where}: like = {base!r}", "row", base, known)
        taken = {f.name: getattr(known[base], f.name) for f in fields(kind)}
        changed = f" but for {', '.join(own)}" if own else ""
        own = {**taken, "source": f"as {base}{changed}: {taken['source']}", **own}
    own["name"] = name
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.name not in own]
    if needed:
        raise PartitionError(
            f"{where}: without {', '.join(needed)}",
            try_='the field, or like = "ROW" to take what is not given from another row',
        )
    return kind(**own)


def _value(where: str, key: str, value: Any, kind: _Kind) -> Any:
    read = kind.read(value)
    if read is None:
        text = repr(value)
        shown = text[:SHOWN] + "..." * (len(text) > SHOWN)
        raise PartitionError(f"{where}: {key} = {shown}", f"it must be {kind.says}")
    return read


def _unknown(what: str, kind: str, name: str, known: Iterable[str]) -> PartitionError:
    """The error for a name that is not known, with those that are and the closest."""
    known = list(known)
    return PartitionError(
        what, f"no such {kind}; known are {', '.join(known)}", " or ".join(map(repr, closest(name, known)))
    )
