"""What ranks on devices of several kinds have together: the slowest of each number."""

from collections.abc import Iterable, Sequence

from autopart.errors import PartitionError
from autopart.hardware.rows import Device, Host, Link, Slowest


def slower(links: Iterable[Link]) -> Link:
    """The link of the least bandwidth; of equal ones that of the most latency."""
    return min(links, key=lambda link: (link.bandwidth * link.share, -link.latency_seconds))


def slowest(devices: Sequence[Device]) -> Device:
    """What ranks on some devices have together; where all are equal, that device. Raises PartitionError for devices of
    different `Device.type`."""
    kinds = tuple({device: None for device in devices})
    if len(kinds) == 1:
        return kinds[0]
    types = {kind.type: kind.name for kind in kinds}
    if len(types) > 1:
        raise PartitionError(
            f"{' and '.join(types.values())} in one mesh", f"{' and '.join(types)} devices do not run one program"
        )
    share = min(kind.overlapped_share for kind in kinds)
    names = [kind.name for kind in kinds]
    return Slowest(
        name="+".join(dict.fromkeys(names)),
        flops={dtype: min(k.flops[dtype] for k in kinds) for dtype in kinds[0].flops if _all_compute(kinds, dtype)},
        memory_bytes=min(kind.memory_bytes for kind in kinds),
        bandwidth=min(kind.bandwidth for kind in kinds),
        launch_seconds=max(kind.launch_seconds for kind in kinds),
        link=kinds[0].link,
        source=f"the worst numbers of {' and '.join(names)}",
        overlap=1 / share if share else 0.0,
        host=_worst_host([kind.host_share for kind in kinds]),
        kinds=kinds,
    )


def _all_compute(kinds: Iterable[Device], dtype: str) -> bool:
    return all(dtype in kind.flops for kind in kinds)


def _worst_host(shares: Sequence[Host | None]) -> Host | None:
    """The least of each number that a device has of its host; None where a host is not known."""
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return None
    source = "; ".join(dict.fromkeys(share.source for share in known))
    numbers = ("memory_bytes", "bandwidth", "link", "copied", "updated")
    return Host(source=source, **{name: min(getattr(share, name) for share in known) for name in numbers})
