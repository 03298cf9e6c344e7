"""What communication costs in the alpha-beta model: a message takes latency + bytes / bandwidth seconds.

Source of the formulas: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication
Operations in MPICH", IJHPCA 19(1), 2005, with their gamma (arithmetic of a reduction) left out:

    all_gather      ring: p - 1 steps, each passing on 1/p of the whole
    reduce_scatter  the same ring run backwards
    all_reduce      reduce_scatter, then all_gather
    all_to_all      pairwise exchange: p - 1 steps of 1/p of a rank's bytes
    broadcast       binomial scatter in ceil(log2 p) steps, then ring all_gather (van de Geijn)

All sizes are in bytes, all results in seconds. `size` is the number p >= 1 of ranks in the group; a group
of one costs nothing. Nothing here contends for a link: every rank has the link's bandwidth to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autopart.hardware.rows import Link


def p2p_seconds(nbytes: float, link: Link) -> float:
    """Send `nbytes` from one rank to another: a + n b."""
    return link.latency_seconds + nbytes / link.bandwidth


def all_gather_seconds(nbytes_of_whole: float, size: int, link: Link) -> float:
    """Give every rank the whole of `nbytes_of_whole`, of which each holds 1/p: (p - 1) (a + n b / p)."""
    return (size - 1) * p2p_seconds(nbytes_of_whole / size, link)


def reduce_scatter_seconds(nbytes_of_whole: float, size: int, link: Link) -> float:
    """Leave each rank 1/p of the sum of p tensors of `nbytes_of_whole`: (p - 1) (a + n b / p)."""
    return all_gather_seconds(nbytes_of_whole, size, link)


def all_reduce_seconds(nbytes: float, size: int, link: Link) -> float:
    """Leave every rank the sum of p tensors of `nbytes`: 2 (p - 1) (a + n b / p)."""
    return reduce_scatter_seconds(nbytes, size, link) + all_gather_seconds(nbytes, size, link)


def all_to_all_seconds(nbytes: float, size: int, link: Link) -> float:
    """Exchange the p parts of the `nbytes` each rank holds: (p - 1) (a + n b / p)."""
    return (size - 1) * p2p_seconds(nbytes / size, link)


def broadcast_seconds(nbytes: float, size: int, link: Link) -> float:
    """Copy `nbytes` from one rank to all: (ceil(log2 p) + p - 1) a + 2 (p - 1) n b / p."""
    steps, sent = (size - 1).bit_length(), (size - 1) / size * nbytes
    return steps * link.latency_seconds + sent / link.bandwidth + all_gather_seconds(nbytes, size, link)


COLLECTIVE_SECONDS: Mapping[str, Callable[[float, int, Link], float]] = {
    "all_reduce": all_reduce_seconds,
    "all_gather": all_gather_seconds,
    "reduce_scatter": reduce_scatter_seconds,
    "all_to_all": all_to_all_seconds,
    "broadcast": broadcast_seconds,
}
