"""One launch over many tensors: a table on the device says where they lie.

Program p of a launch works on CHUNK elements of one tensor. Of T tensors the table has, one row after the other, T
numbers each: the first program of every tensor, its elements, and one row of addresses for each operand of the kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from autopart.kernels.ahead import Usage, compile_kernel
from autopart.kernels.launch import TRITON_NAMES, jit, launch, power_of_two, runs_on

tl: Any = None  # triton.language, which jit binds

BLOCK = 1024
"""Elements that a program holds at once."""
BLOCKS = 16
"""Blocks that a program works on, one after the other."""
CHUNK = BLOCK * BLOCKS
ALIGNMENT = 16
"""Bytes, and elements, that tensors are multiples of where a thread loads several elements at once."""

Optional = torch.Tensor | None


class Shard(NamedTuple):
    """A tensor that an optimizer steps.

    gradient  of the master's shape
    states    the master, then the optimizer's states, of one shape and float32 for the kernels
    weight    the tensor that the new master is also written into, in its dtype; None: there is none
    """

    gradient: torch.Tensor
    states: tuple[torch.Tensor, ...]
    weight: Optional


def kernels_apply(shard: Shard, factor: Optional = None) -> bool:
    """Whether the kernel of an optimizer takes a shard, and the factor of its gradient."""
    changed = shard.states if shard.weight is None else (*shard.states, shard.weight)
    return (
        shard.gradient.dtype in TRITON_NAMES
        and (shard.weight is None or shard.weight.dtype in TRITON_NAMES)
        and all(t.dtype == torch.float32 for t in shard.states)
        and all(t.shape == shard.gradient.shape for t in changed)
        and all(t.is_contiguous() for t in changed)
        and runs_on(shard.gradient, *changed, *(() if factor is None else (factor,)))
    )


def launch_over(
    kernel: Any,
    shards: Sequence[Shard],
    rates: Sequence[Sequence[float]],
    factor: Optional,
    scalars: Sequence[float],
) -> None:
    """Launch an optimizer's kernel once over all shards of the same dtypes and alignment.

    rates    the kernel's numbers for every shard
    scalars  the kernel's numbers for all
    """
    ready = [shard._replace(gradient=shard.gradient.contiguous()) for shard in shards]
    together: dict[Hashable, list[int]] = defaultdict(list)
    for index, shard in enumerate(ready):
        together[form_of(shard)].append(index)
    with torch.no_grad():
        for members in together.values():
            _launch(kernel, [ready[i] for i in members], [rates[i] for i in members], factor, scalars)
    torch.autograd.graph.increment_version([t for shard in ready for t in _operands(shard)[1:]])


def form_of(shard: Shard) -> tuple[torch.device, torch.dtype, torch.dtype | None, bool]:
    """What shards of one launch have in common; last, whether threads load several elements at once."""
    aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in _operands(shard)) and shard.gradient.numel() % ALIGNMENT == 0
    weight = None if shard.weight is None else shard.weight.dtype
    return shard.gradient.device, shard.gradient.dtype, weight, aligned


def _operands(shard: Shard) -> tuple[torch.Tensor, ...]:
    return (shard.gradient, *shard.states, *(() if shard.weight is None else (shard.weight,)))


def _launch(
    kernel: Any, shards: Sequence[Shard], rates: Sequence[Sequence[float]], factor: Optional, scalars: Sequence[float]
) -> None:
    device, gradient, weight, aligned = form_of(shards[0])
    sizes = [shard.gradient.numel() for shard in shards]
    firsts = [0]
    for size in sizes:
        firsts.append(firsts[-1] + -(-size // CHUNK))
    pointers = zip(*([t.data_ptr() for t in _operands(shard)] for shard in shards), strict=True)
    table = _on(device, [firsts[:-1], sizes, *pointers], torch.int64)
    options = constexprs(gradient, weight, len(shards), factor is not None, aligned)
    numbers = _on(device, [*zip(*rates, strict=True)], torch.float32)
    launch(kernel, firsts[-1], table, numbers, table if factor is None else factor, len(shards), *scalars, **options)


def constexprs(
    gradient: torch.dtype, weight: torch.dtype | None, tensors: int, factor: bool, aligned: bool
) -> dict[str, Any]:
    """The constants of an optimizer's kernel."""
    import triton.language as tl

    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {
        "GRADIENT": names[gradient],
        "WEIGHT": None if weight is None else names[weight],
        "FACTOR": factor,
        "ALIGNMENT": ALIGNMENT if aligned else 1,
        "TENSORS": power_of_two(tensors),
        "BLOCKS": BLOCKS,
        "BLOCK": BLOCK,
    }


def _on(device: torch.device, rows: Iterable[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
    """Rows of numbers on a device, without waiting for it."""
    made = torch.tensor([*rows], dtype=dtype, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def scaled(gradient: torch.Tensor, master: torch.Tensor, factor: Optional) -> torch.Tensor:
    """The gradient in the master's dtype, times the factor."""
    g = gradient.to(master.dtype)
    return g if factor is None else g * factor.reshape(())


@jit
def shard_of(  # type: ignore[no-untyped-def]
    table, tensors, ALIGNMENT: tl.constexpr, TENSORS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's tensor, the tensor's elements, and which blocks of them are this program's."""
    program = tl.program_id(0)
    others = tl.arange(0, TENSORS)
    firsts = tl.load(table + others, mask=others < tensors, other=1 << 62)
    at = tl.sum((firsts <= program).to(tl.int32), 0) - 1
    n = tl.multiple_of(tl.load(table + tensors + at), ALIGNMENT)
    start = (program - tl.load(table + at)) * BLOCKS
    return at, n, start, tl.minimum(start + BLOCKS, tl.cdiv(n, BLOCK))


@jit
def operand(table, row, tensors, at, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointer to an operand of this program's tensor, operand 0 being the gradient."""
    address = tl.load(table + (2 + row) * tensors + at)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)


def compile_step(
    kernel: Any,
    scalars: Sequence[str],
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    tensors: int = 256,
    aligned: bool = True,
) -> dict[str, Usage]:
    """Compile the kernel of an optimizer over so many tensors, with gradients and weights of ``dtype`` and a factor,
    for compute capability ``capability`` (90 for 9.0)."""
    signature = {"table": "*i64", "rates": "*fp32", "factor": "*fp64", "tensors": "i32"}
    signature |= dict.fromkeys(scalars, "fp32")
    options = constexprs(dtype, dtype, tensors, True, aligned)
    aligned_names = {"table", "rates", "factor", "tensors"}
    return {"step": compile_kernel(kernel, signature, options, capability, 4, aligned_names)}
