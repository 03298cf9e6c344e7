"""Which sizes are measured, and for how long."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What is measured, and for how long.

    products         values of m, n and k of products, in every combination of at most `flops` FLOPs
    flops            FLOPs of the largest product
    sequences        tokens of attention
    heads            elements of a head of attention
    flops_attention  FLOPs of each attention, about
    streams          bytes that operators move
    messages         bytes of collectives and messages
    parameters       bytes of a parameter that is updated
    held             bytes of results that are held at once
    window           seconds of a case in a round
    """

    products: tuple[int, ...]
    flops: float
    sequences: tuple[int, ...]
    heads: tuple[int, ...]
    flops_attention: float
    streams: tuple[int, ...]
    messages: tuple[int, ...]
    parameters: tuple[int, ...]
    held: int
    window: float


KIB, MIB = 2**10, 2**20


FULL: Mapping[str, Sizes] = {
    "cpu": Sizes(
        products=(16, 64, 256, 1024, 4096), flops=2.2e9, sequences=(64, 256, 1024), heads=(32, 64, 128),
        flops_attention=1.5e8, streams=(4 * KIB, 64 * KIB, MIB, 8 * MIB, 32 * MIB),
        messages=(4 * KIB, 128 * KIB, MIB, 8 * MIB, 32 * MIB), parameters=(4 * KIB, 256 * KIB, 4 * MIB, 16 * MIB),
        held=64 * MIB, window=0.04,
    ),
    "cuda": Sizes(
        products=(64, 256, 1024, 4096, 16384), flops=3e12, sequences=(256, 1024, 4096), heads=(64, 128),
        flops_attention=3e11, streams=(64 * KIB, MIB, 16 * MIB, 256 * MIB),
        messages=(64 * KIB, MIB, 16 * MIB, 256 * MIB), parameters=(64 * KIB, 4 * MIB, 64 * MIB), held=2**30,
        window=0.02,
    ),
}  # fmt: skip


QUICK: Mapping[str, Sizes] = {
    type_: Sizes(
        products=(64, 256), flops=full.flops, sequences=(64, 128), heads=(32,), flops_attention=1e7,
        streams=(4 * KIB, 256 * KIB), messages=(4 * KIB, 256 * KIB), parameters=(4 * KIB, 256 * KIB), held=MIB,
        window=0.002,
    )
    for type_, full in FULL.items()
}  # fmt: skip
