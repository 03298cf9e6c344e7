"""The options by which `autopart show --timeline` is told what is slow."""

import re
from typing import Annotated

import typer

from autopart.errors import PartitionError
from autopart.plan.stragglers import Stragglers

_SLOW = re.compile(r"(?:rank (\d+)|host (\d+)|stages (\d+)-(\d+))=([\d.]+)")

SlowDevices = Annotated[
    str | None, typer.Option(metavar="SHARE", help='with --timeline: how many devices are slow, as "1%"')
]
SlowSpeed = Annotated[float, typer.Option(help="speed of a slow device / that of the others")]
Slow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHAT=SPEED",
        help='with --timeline: "rank 5=0.8", "host 3=0.5" (its network cards), "stages 0-1=0.5"; may be repeated',
    ),
]
Jitter = Annotated[
    str | None,
    typer.Option(metavar="SHARE", help='with --timeline: standard deviation of the seconds of computing, as "2%"'),
]
SlowSeed = Annotated[int, typer.Option(help="seed by which slow devices and jitter are drawn")]


def stragglers_of(
    devices: str | None, speed: float, slow: list[str] | None, jitter: str | None, seed: int
) -> Stragglers | None:
    """What the options say is slow; None where they say nothing. Raises PartitionError for text that is not known."""
    if not (devices or slow or jitter):
        return None
    ranks, hosts, stages = dict[int, float](), dict[int, float](), dict[tuple[int, int], float]()
    for text in slow or []:
        match = _SLOW.fullmatch(text.strip())
        if match is None:
            raise PartitionError(f"--slow {text!r} is not known", try_='"rank 5=0.8", "host 3=0.5" or "stages 0-1=0.5"')
        rank, host, a, b, value = match.groups()
        found = _number("--slow", value)
        if rank or host:
            (ranks if rank else hosts)[int(rank or host)] = found
        else:
            stages[int(a), int(b)] = found
    share, varying = _share("--slow-devices", devices), _share("--jitter", jitter)
    return Stragglers(share, speed, ranks, hosts, stages, varying, seed=seed)


def _share(option: str, text: str | None) -> float:
    """A share, of text such as "1%", "1 %" or "0.01"; 0 where there is none."""
    if text is None:
        return 0.0
    number = text.strip().removesuffix("%")
    return _number(option, number) / (100 if number != text.strip() else 1)


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PartitionError(f"{option} {text!r} is no number", try_=f"{option} 1%") from None
