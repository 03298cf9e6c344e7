"""A stable sort of (token, expert) pairs by expert: a sort by counting, without atomics.

A router gives each of t tokens k experts. The s = t k pairs are sorted by expert, pairs of one expert in their order:

    order[p]    the pair in sorted place p, whose token is order[p] // k
    place[i]    the sorted place of pair i: the inverse of order
    offsets     (experts + 1,): expert e has the sorted places offsets[e]:offsets[e + 1]

One kernel counts the experts of each block of pairs; a sum of the counts over experts and blocks gives the first place
of every expert's pairs in every block; another kernel counts within the block. The least traffic is

    32 s bytes:  read the int64 ids to count and to place, write order and place

to which a word for each block and expert adds. The way is that of a radix sort's pass: Merrill & Grimshaw, High
performance and scalable radix sorting, Parallel Processing Letters 21 (2011).
"""

from __future__ import annotations

from typing import Any

import torch

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import jit, launch, power_of_two, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

MAX_EXPERTS = 511
SORTED = 8192
"""Pairs times experts that a Triton program holds at a time."""


def reference(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sort_by_expert` by torch's stable sort."""
    own = torch.where((ids >= 0) & (ids < experts), ids, experts)
    order = own.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    return order, place, torch.searchsorted(own[order], torch.arange(experts + 1, device=ids.device))


def sort_by_expert(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """order (s,), place (s,) and offsets (experts + 1,), all int64, of the experts' numbers ids (s,), int64.

    Numbers that are none of 0 ... experts - 1 come last, from the place offsets[experts] on. By the Triton kernels, a
    sort by counting, where they apply, else by ``reference``.
    """
    if ids.dtype == torch.int64 and ids.dim() == 1 and experts <= MAX_EXPERTS and runs_on(ids):
        return torch.ops.autopart.sort_by_expert(ids, experts)
    return reference(ids, experts)


def bytes_moved(ids: torch.Tensor, experts: int) -> Bytes:
    return Bytes(32 * len(ids), 0)


def compile_ahead(capability: int, experts: int = 8) -> dict[str, Usage]:
    """Compile both kernels for compute capability ``capability`` (90 for 9.0)."""
    pointers = dict.fromkeys(("ids", "order", "place"), "*i64") | dict.fromkeys(("counts", "bases"), "*i32")
    signature = pointers | dict.fromkeys(("s", "blocks", "experts"), "i32")
    return compile_kernels((count, put), signature, _block(experts), capability, aligned=pointers)


@jit
def count(  # type: ignore[no-untyped-def]
    ids, counts, s, blocks, experts, PAIRS: tl.constexpr, EXPERTS: tl.constexpr
):
    """How often every expert occurs in a block of pairs; counts is (experts + 1, blocks)."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    expert = tl.arange(0, EXPERTS)
    own = tl.load(ids + pair, mask=pair < s, other=-1)
    own = tl.where((own >= 0) & (own < experts), own, experts).to(tl.int32)
    hits = ((own[:, None] == expert[None, :]) & (pair < s)[:, None]).to(tl.int32)
    tl.store(counts + expert * blocks + tl.program_id(0), tl.sum(hits, 0), mask=expert <= experts)


@jit
def put(  # type: ignore[no-untyped-def]
    ids, bases, order, place, s, blocks, experts, PAIRS: tl.constexpr, EXPERTS: tl.constexpr
):
    """Write a block's pairs to their places: bases (experts + 1, blocks) has the first of an expert and block."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    expert = tl.arange(0, EXPERTS)
    own = tl.load(ids + pair, mask=pair < s, other=-1)
    own = tl.where((own >= 0) & (own < experts), own, experts).to(tl.int32)
    hits = ((own[:, None] == expert[None, :]) & (pair < s)[:, None]).to(tl.int32)
    base = tl.load(bases + expert * blocks + tl.program_id(0), mask=expert <= experts, other=0)
    places = tl.sum(hits * (tl.cumsum(hits, 0) - 1 + base[None, :]), 1).to(tl.int64)
    tl.store(place + pair, places, mask=pair < s)
    tl.store(order + places, pair.to(tl.int64), mask=pair < s)


@triton_op("autopart::sort_by_expert", mutates_args=())
def _sort(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given, block, s = ids.contiguous(), _block(experts), len(ids)
    blocks = -(-s // block["PAIRS"])
    counts = torch.empty(experts + 1, blocks, dtype=torch.int32, device=ids.device)
    launch(count, blocks, given, counts, s, blocks, experts, **block)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    bases = (ends - counts.view(-1)).view(experts + 1, blocks)
    order, place = torch.empty_like(given), torch.empty_like(given)
    launch(put, blocks, given, bases, order, place, s, blocks, experts, **block)
    return order, place, bases[:, 0].to(torch.int64)


def _block(experts: int) -> dict[str, int]:
    """Pairs and experts in a Triton program of the sort; the last expert is that of the others."""
    among = power_of_two(experts + 1)
    return {"PAIRS": min(SORTED // among, 512), "EXPERTS": among}


KERNEL = Kernel(
    function=sort_by_expert,
    reference=reference,
    rule="s! -> s!, s!, o!",
    kept=lambda arguments, outputs: (),  # a sort has no gradient
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={"Mixtral-8x7B": {"experts": 8}, "Qwen3-30B-A3B": {"experts": 128}},
)
