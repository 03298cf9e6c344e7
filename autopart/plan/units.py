"""Quantities and operators as plans print them."""

COLLECTIVES = {
    "all_gather": "all-gather",
    "all_gather_again": "all-gather (again in backward)",
    "all_reduce": "all-reduce",
    "all_to_all": "all-to-all",
}
"""Functions of `autopart.runtime.collectives` that are one collective -> its name in a printed plan."""


def printed_name(name: str) -> str:
    """An operator's name as plans print it."""
    family, _, rest = name.partition(".")
    if family == "runtime":
        return COLLECTIVES.get(rest, rest)
    return rest if family in ("aten", "autopart") else name


def bytes_text(count: float) -> str:
    """``"41.2 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def seconds_text(value: float) -> str:
    """``"3.10 ms"``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value * 1e6:.2f} us" if value else "0"


def zero_text(zero: int, offload: bool, shard_size: int = 0) -> str:
    """``"ZeRO 2"``, ``"ZeRO 2 over 8 ranks, optimizer on the host"``."""
    among = f" over {shard_size} ranks" if shard_size else ""
    return f"ZeRO {zero}{among}{', optimizer on the host' if offload else ''}"


def counted(number: int, what: str) -> str:
    """``"1 sample"``, ``"4 samples"``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('ch') else 's'}"
