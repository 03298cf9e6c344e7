"""Tiles of the kernels of `autopart.kernels.attention`, and what the kernels need of a GPU with them."""

from typing import Any

import torch

from autopart.kernels import attention_bias, attention_triton
from autopart.kernels.ahead import Usage, compile_kernel
from autopart.kernels.launch import TRITON_NAMES, interprets, power_of_two

TILES = {
    ("forward", 2): {64: (128, 64, 8, 1), 128: (128, 64, 8, 0), 256: (64, 32, 8, 1)},
    ("forward added", 2): {64: (64, 64, 8, 1), 128: (64, 32, 8, 1), 256: (64, 32, 8, 1)},
    ("query", 2): {64: (128, 64, 8, 1), 128: (64, 64, 8, 1), 256: (64, 32, 8, 1)},
    ("query added", 2): {64: (64, 64, 8, 0), 128: (64, 64, 8, 1), 256: (64, 32, 8, 1)},
    ("key", 2): {64: (32, 128, 8, 1), 128: (32, 64, 8, 0), 256: (32, 32, 8, 1)},
    ("key added", 2): {64: (32, 64, 8, 1), 128: (16, 64, 8, 0), 256: (32, 32, 8, 1)},
    ("bias", 2): {64: (64, 32, 8, 0), 128: (64, 32, 8, 0), 256: (32, 32, 4, 0)},
    ("relative", 2): {64: (64, 64, 8, 0), 128: (32, 32, 4, 0), 256: (32, 32, 4, 0)},
    ("forward", 4): {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 0)},
    ("forward added", 4): {64: (64, 32, 8, 0), 128: (32, 32, 8, 0), 256: (16, 32, 8, 0)},
    ("query", 4): {64: (32, 32, 8, 1), 128: (32, 32, 8, 0), 256: (16, 32, 8, 0)},
    ("key", 4): {64: (32, 32, 8, 1), 128: (32, 32, 8, 0), 256: (16, 16, 4, 0)},
    ("bias", 4): {64: (32, 32, 8, 0), 128: (32, 32, 8, 0), 256: (16, 16, 4, 0)},
    ("relative", 4): {64: (32, 32, 8, 0), 128: (32, 32, 8, 0), 256: (16, 16, 4, 0)},
}
"""(Kernel, bytes of an element) -> width up to which it holds -> queries and keys of a tile, warps, and whether a loop
of its own goes over the tiles whose queries see all keys. "added": with a bias or a mask, where that has tiles of its
own.

The tiles are the largest of those tried whose kernels spill no registers in half precision at `KERNEL.shapes`. In
float32 products are sums of three in tf32, and wide heads spill some."""


_HALVES = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "bias", "dbias", "relative", "sinks")


def tiles(kernel: str, d: int, e: int, dtype: torch.dtype, added: bool = False) -> dict[str, Any]:
    """The constants of a kernel for widths d of keys and e of values, and its warps. `added`: with a bias or a mask."""
    name = f"{kernel} added" if added and (f"{kernel} added", dtype.itemsize) in TILES else kernel
    by_width = TILES[name, dtype.itemsize]
    queries, keys, warps, split = by_width[next(width for width in by_width if max(d, e) <= width)]
    return {
        "D": d, "E": e, "BLOCK_D": max(power_of_two(d), 16), "BLOCK_E": max(power_of_two(e), 16), "QUERIES": queries,
        "KEYS": keys, "STAGES": 4 // dtype.itemsize, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "FLOAT": interprets(), "num_warps": warps,
        **({} if kernel in ("bias", "relative") else {"SPLIT": split}),
    }  # fmt: skip


def compile_ahead(
    capability: int, d: int = 128, e: int = 0, dtype: torch.dtype = torch.bfloat16, causal: bool = True,
    window: bool = False, cap: bool = False, mask: int = 0, padding: bool = False, bias: bool = False,
    relative: bool = False, sinks: bool = False, even: bool = False, dropout: bool = False,
) -> dict[str, Usage]:  # fmt: skip
    """Compile the kernels for heads of ``d`` elements, ``e`` those of values (0 for d), and compute capability
    ``capability`` (90 for 9.0); ``mask`` 1 for an added and 2 for a boolean one."""
    types = dict.fromkeys(_HALVES, f"*{TRITON_NAMES[dtype]}")
    types |= {"mask": "*i1" if mask == 2 else types["q"], "padding": "*i1", "unseen": "*i1"}
    types |= dict.fromkeys(("lse", "delta", "sums_of_tiles"), "*fp32") | dict.fromkeys(("rows", "columns"), "*i32")
    strides = [f"{x}_{axis}" for x in ("q", "k", "v", "dout", "bias", "mask") for axis in "bhij"]
    sizes = (*strides, "heads", "group", "queries", "keys", "window", "threshold", "over_b", "over_h", "samples")
    signature = types | dict.fromkeys(sizes, "i32") | dict.fromkeys(("scale", "cap", "share", "factor"), "fp32")
    flags = {
        "CAUSAL": causal, "WINDOW": window, "CAP": cap, "BIAS": bias, "MASK": mask, "PADDING": padding,
        "RELATIVE": relative, "SINKS": sinks, "EVEN": even, "DROPOUT": dropout, "bias_j": 1, "mask_j": 1,
    }  # fmt: skip
    kernels = {name: getattr(attention_triton, name) for name in ("forward", "query", "key")}
    kernels |= {"bias": attention_bias.bias_gradient} if bias else {}
    kernels |= {"relative": attention_bias.relative_gradient} if relative else {}
    usage = {}
    for name, kernel in kernels.items():
        chosen = tiles(name, d, e or d, dtype, bool(bias or mask or relative))
        warps = chosen.pop("num_warps")
        aligned = {*types, *strides, "queries", "keys"}
        usage[name] = compile_kernel(kernel, signature, flags | chosen, capability, warps, aligned)
    return usage
