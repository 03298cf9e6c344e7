"""The state-space scan of Mamba-2 in chunks, which is also linear attention with a decay for each head.

For every batch and head, with positions l, x_l (p), keys b_l and queries c_l (n), scales t_l, log decays a_l <= 0, and
a state S (p, n) that begins with zeros

    S_l = exp(a_l) S_{l-1} + t_l x_l b_l^T,    y_l = S_l c_l + skip x_l

In a chunk whose sums of log decays are s_l = a_1 + ... + a_l, with the state S before the chunk and q its last position

    y_l  = sum over m <= l of exp(s_l - s_m) (c_l . b_m) t_m x_m + exp(s_l) S c_l + skip x_l
    S'   = exp(s_q) S + sum over m of exp(s_q - s_m) t_m x_m b_m^T

One kernel goes from chunk to chunk with the state, in float32; others take all chunks at a time. Only the inputs are
kept: the backward computes the states again, then their gradients R from the last chunk to the first. With the state S'
and the gradient R behind the chunk the gradient of a log decay is

    da_i = sum over l >= i in the chunk of (c_l . dc_l - b_l . db_l) + sum of R S'

Gradients of keys and queries are written for each head in float32, and summed over the heads of a group.

For d elements of x, g of keys and queries together, r = batch x length x heads, and ``itemsize`` bytes the least
traffic in bytes is

    forward   itemsize (d + g) + 4 d + 8 r        read x, keys, queries, scales and decays, write y
    backward  itemsize (2 d + 2 g) + 4 d + 16 r   read those and dy, write their gradients

to which states (p n for each chunk and head, float32) and the gradients of each head add.

Sources: Dao & Gu, arXiv 2405.21060 (SSD, Mamba-2); Yang et al., arXiv 2312.06635 (gated linear attention).
"""

import functools
from typing import Any

import torch

from autopart.kernels import scan_kernels
from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, interprets, launch, runs_on, triton_op
from autopart.kernels.scan_kernels import CHUNK, tile, warps

MAX_HEAD, MAX_STATE, MAX_STATES = 64, 128, 256
"""Widest heads, widest states of one scan, and widest states that are scanned as several: y is a sum over their
columns."""

Optional = torch.Tensor | None


def reference(
    x: torch.Tensor,
    scales: Optional,
    log: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    skip: Optional,
    chunk: int,
) -> torch.Tensor:
    """`scan` by separate operators in float32 at least, as transformers' Mamba-2 writes it."""
    _, length, heads, _ = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    b, c = (t.to(wide).repeat_interleave(heads // t.shape[2], dim=2, output_size=heads) for t in (keys, queries))
    pad = (chunk - length % chunk) % chunk
    skipped = None if skip is None else skip[..., None] * _padded(x, pad)
    if scales is not None:
        x = x * scales[..., None].to(wide)
    x, log, b, c = (_in_chunks(_padded(t, pad), chunk) for t in (x, log.to(wide), b, c))
    log = log.permute(0, 3, 1, 2)
    sums = torch.cumsum(log, dim=-1)
    chances = torch.einsum("bclhn,bcshn->bclsh", c, b) * torch.exp(_segments(log)).permute(0, 2, 3, 4, 1)
    within = torch.einsum("bclsh,bcshp->bclhp", chances, x)
    b = b * torch.exp(sums[:, :, :, -1:] - sums).permute(0, -2, -1, 1)[..., None]
    states = torch.einsum("bclhn,bclhp->bchpn", b, x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = torch.exp(_segments(torch.nn.functional.pad(sums[:, :, :, -1], (1, 0)))).transpose(1, 3)
    states = torch.einsum("bzch,bzhpn->bchpn", between, states)[:, :-1]
    before = torch.einsum("bclhn,bchpn->bclhp", c, states) * torch.exp(sums).permute(0, 2, 3, 1)[..., None]
    y = (within + before).contiguous().reshape(x.shape[0], length + pad, heads, x.shape[4])
    y = y if skipped is None else y + skipped
    return y[:, :length] if pad > 0 else y


def scan(
    x: torch.Tensor,
    scales: Optional,
    log: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    skip: Optional,
    chunk: int,
) -> torch.Tensor:
    """y (batch, length, heads, p), float32, or float64 where x is.

    x              (batch, length, heads, p)
    scales         (batch, length, heads): the step sizes of a state-space model; None for 1
    log            (batch, length, heads): log decays, none above 0. Mamba-2 has A times the step sizes
    keys, queries  (batch, length, groups, n): B and C of a state-space model; groups divide the heads
    skip           (heads,): D of a state-space model; None for 0
    chunk          positions of a chunk of ``reference``. The value does not depend on it

    By the Triton kernels where they apply, else by ``reference``. The kernels take differences of sums of log decays in
    a chunk, so that decays of less than exp(-1000) at some positions cost the others digits.
    """
    if _kernels_apply(x, scales, log, keys, queries, skip):
        first, *others = zip(keys.split(MAX_STATE, 3), queries.split(MAX_STATE, 3), strict=True)
        y = torch.ops.autopart.scan(x, scales, log, *first, skip)
        for sides in others:
            y = y + torch.ops.autopart.scan(x, scales, log, *sides, None)
        return y
    return reference(x, scales, log, keys, queries, skip, chunk)


def _padded(x: torch.Tensor, pad: int) -> torch.Tensor:
    """x (batch, length, ...) with ``pad`` zeros behind the last position."""
    return torch.nn.functional.pad(x, [0, 0] * (x.dim() - 2) + [0, pad, 0, 0], mode="constant", value=0)


def _in_chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """x (batch, length, ...) as (batch, chunks, chunk, ...)."""
    return x.reshape(x.shape[0], x.shape[1] // chunk, chunk, *x.shape[2:])


def _segments(x: torch.Tensor) -> torch.Tensor:
    """Sums of x (..., q) over the places after m up to l: (..., l, m), minus infinity for l < m."""
    q = x.shape[-1]
    ones = torch.ones(q, q, device=x.device, dtype=torch.bool)
    x = x[..., None].expand(*x.size(), q).masked_fill(~torch.tril(ones, diagonal=-1), 0)
    return torch.cumsum(x, dim=-2).masked_fill(~torch.tril(ones, diagonal=0), -torch.inf)


def bytes_moved(x: torch.Tensor, scales: Optional, log: torch.Tensor, *rest: Any) -> Bytes:
    both, words = rest[0].nbytes + rest[1].nbytes, log.nbytes + (0 if scales is None else scales.nbytes)
    wide = 4 * x.numel()
    return Bytes(x.nbytes + wide + both + words, 2 * x.nbytes + wide + 2 * both + 2 * words)


def _temporaries(x: torch.Tensor, keys: torch.Tensor) -> tuple[int, int]:
    """Bytes of the states, and of the gradients of keys for each head, float32."""
    batch, length, heads, p = x.shape
    n = keys.shape[3]
    size = tile(p, min(n, MAX_STATE), length, keys.dtype == torch.float32)
    states = batch * heads * -(-length // size["Q"]) * size["P"] * size["N"] * -(-n // MAX_STATE)
    return 4 * states, 4 * batch * length * heads * n


def workspace(x: torch.Tensor, scales: Optional, log: torch.Tensor, keys: torch.Tensor, *rest: Any) -> int:
    """As `Kernel.workspace`: states and their gradients, and gradients of keys and queries for each head."""
    return 2 * sum(_temporaries(x, keys))


def streamed(x: torch.Tensor, scales: Optional, log: torch.Tensor, keys: torch.Tensor, *rest: Any) -> Bytes:
    """As `Kernel.streamed`: in forward states are written and read, and what makes them is read again. In backward
    states are written, and read twice; their gradients written, and read three times; and the gradients of keys and of
    queries for each head written, and read twice. Each further scan of wide states takes x and dy once more, and adds
    its y and dx to the others'."""
    states, sides = _temporaries(x, keys)
    again = x.nbytes + keys.nbytes + log.nbytes + (0 if scales is None else scales.nbytes)
    more, wide = -(-keys.shape[3] // MAX_STATE) - 1, 4 * x.numel()
    return Bytes(
        again + 2 * states + more * (2 * x.nbytes + 4 * wide), 7 * states + 6 * sides + more * (5 * x.nbytes + wide)
    )


def compile_ahead(capability: int, p: int = 64, n: int = 128, dtype: torch.dtype = torch.bfloat16) -> dict[str, Usage]:
    """Compile all kernels, with scales and skip, for compute capability ``capability`` (90 for 9.0)."""
    signature = dict.fromkeys(("x", "scales", "keys", "queries", "skip", "dx"), f"*{TRITON_NAMES[dtype]}")
    more = ("log", "y", "dy", "states", "dstates", "out", "dscales", "dskip")
    signature |= dict.fromkeys(more, "*fp32")
    aligned = {*signature, *(name for name, size in (("p", p), ("n", n)) if size % 16 == 0)}
    signature |= dict.fromkeys(("length", "heads", "groups", "p", "n"), "i32")
    options = {"SCALES": True, "SKIP": True, "REVERSE": False, "WIDE": False, "PRECISION": "ieee"}
    exact = dtype == torch.float32
    options |= tile(p, n, CHUNK, exact)
    kernels = scan_kernels.states, scan_kernels.output, scan_kernels.inputs, scan_kernels.sides
    return compile_kernels(kernels, signature, options, capability, warps(p, n, exact), aligned)


@triton_op("autopart::scan", mutates_args=())
def _forward(
    x: torch.Tensor,
    scales: torch.Tensor | None,
    log: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    skip: torch.Tensor | None,
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    sizes, chunks, options = _sizes(x, keys)
    inputs = _contiguous(x, scales, log, keys, queries, skip)
    states = _states(inputs[0], inputs[1], inputs[2], inputs[3], scales is not None, False)
    flags = {"SCALES": scales is not None, "SKIP": skip is not None, **options}
    launch(scan_kernels.output, chunks * len(states), *inputs, states, y, *sizes, **flags)
    return y


@triton_op("autopart::scan_backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    log: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    skip: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, scales, log, keys, queries and skip; without elements for what is None."""
    sizes, chunks, options = _sizes(x, keys)
    inputs, given = _contiguous(x, scales, log, keys, queries, skip), dy.contiguous()
    x, t, log, keys, queries = inputs[:5]
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    states, dstates = _states(x, t, log, keys, scales is not None, False), _states(given, t, log, queries, False, True)
    count = len(states) * chunks
    dx, dscales = torch.empty_like(x), new(0 if scales is None else log.shape)
    dskip = new(count if skip is not None else 0)
    flags = {"SCALES": scales is not None, **options}
    outputs = dstates, dx, dscales, dskip
    launch(scan_kernels.inputs, count, given, *inputs, *outputs, *sizes, SKIP=skip is not None, **flags)
    dqueries, dkeys = (new(*log.shape, keys.shape[3]) for _ in range(2))
    launch(scan_kernels.sides, count, given, x, t, log, keys, states, dqueries, *sizes, REVERSE=False, **flags)
    launch(scan_kernels.sides, count, given, x, t, log, queries, dstates, dkeys, *sizes, REVERSE=True, **flags)
    dskip = dskip.view(len(x), -1, chunks).sum((0, 2)) if skip is not None else dskip
    of_log = _log_gradient(keys, queries, dkeys, dqueries, states, dstates, options["Q"])
    return dx, dscales, of_log, _by_group(dkeys, keys), _by_group(dqueries, queries), dskip


def _states(
    x: torch.Tensor, scales: torch.Tensor, log: torch.Tensor, keys: torch.Tensor, scaled: bool, reverse: bool
) -> torch.Tensor:
    """(batch x heads, chunks, P, N), float32: the state before each chunk, or the gradient of that behind it."""
    sizes, chunks, options = _sizes(x, keys)
    out = torch.empty(x.shape[0] * x.shape[2], chunks, options["P"], options["N"], dtype=torch.float32, device=x.device)
    flags = {"SCALES": scaled, "REVERSE": reverse, **options}
    launch(scan_kernels.states, len(out), x, scales, log, keys, out, *sizes, **flags)
    return out


def _log_gradient(
    keys: torch.Tensor,
    queries: torch.Tensor,
    dkeys: torch.Tensor,
    dqueries: torch.Tensor,
    states: torch.Tensor,
    dstates: torch.Tensor,
    q: int,
) -> torch.Tensor:
    """The gradient of the log decays (batch, length, heads), as on top of this file."""
    batch, length, heads, n = dkeys.shape
    groups = (batch, length, keys.shape[2], heads // keys.shape[2], n)
    ds = torch.einsum("blghn,blgn->blgh", dqueries.view(groups), queries.float())
    ds = ds - torch.einsum("blghn,blgn->blgh", dkeys.view(groups), keys.float())
    ds = _padded(ds.view(batch, length, heads), -length % q).unflatten(1, (-1, q))
    later = ds.flip(2).cumsum(2).flip(2)
    behind = torch.einsum("zcpn,zcpn->zc", dstates[:, :-1], states[:, 1:])
    behind = torch.nn.functional.pad(behind, (0, 1)).view(batch, heads, -1).transpose(1, 2)
    return (later + behind[:, :, None]).flatten(1, 2)[:, :length].contiguous()


def _by_group(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The sum over the heads of a group: (batch, length, groups, n), in the dtype of ``like``."""
    batch, length, groups, n = like.shape
    return gradient.view(batch, length, groups, -1, n).sum(3).to(like.dtype)


def _sizes(x: torch.Tensor, keys: torch.Tensor) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    """Sizes that all kernels take, number of chunks, and options. Products of float32 are made as torch's are; in
    Triton's interpreter all are of float32."""
    _, length, heads, p = x.shape
    groups, n = keys.shape[2:]
    precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"
    exact = keys.dtype == torch.float32 and precision == "ieee"
    options: dict[str, Any] = {"PRECISION": precision, **tile(p, n, length, exact)}
    options |= {"WIDE": interprets(), "num_warps": warps(p, n, exact)}
    chunks = -(-length // options["Q"])
    return (length, heads, groups, p, n), chunks, options


def _contiguous(*given: Optional) -> list[torch.Tensor]:
    """The tensors in contiguous memory, and the first in place of what is None, which is not read."""
    assert given[0] is not None
    return [(given[0] if t is None else t).contiguous() for t in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[Optional, ...]:
    given = ctx.saved_tensors
    found = torch.ops.autopart.scan_backward(dy, *given)
    return tuple(None if t is None else d.to(t.dtype) for t, d in zip(given, found, strict=True))


_forward.register_autograd(_gradients, setup_context=_save)


def _kernels_apply(
    x: torch.Tensor, scales: Optional, log: torch.Tensor, keys: torch.Tensor, queries: torch.Tensor, skip: Optional
) -> bool:
    wide = [t for t in (scales, log, skip) if t is not None]
    return pays(x, scales, log, keys, queries, skip) and runs_on(x, keys, queries, *wide)


def pays(
    x: torch.Tensor,
    scales: Optional,
    log: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    skip: Optional,
    *rest: int,
) -> bool:
    """As `Kernel.pays`: whether the kernels take these dtypes and sizes."""
    return (
        x.dtype in TRITON_NAMES
        and keys.dtype == queries.dtype == x.dtype
        and log.dtype == torch.float32
        and all(t.dtype in TRITON_NAMES for t in (scales, skip) if t is not None)
        and x.shape[3] <= MAX_HEAD
        and keys.shape[3] <= MAX_STATES
    )


KERNEL = Kernel(
    function=scan,
    reference=reference,
    rule="",
    kept=lambda arguments, outputs: tuple(t for t in arguments if isinstance(t, torch.Tensor)),
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={"Mamba2-2.7B": {"p": 64, "n": 128}, "Zamba2-2.7B": {"p": 64, "n": 64}},
    pays=pays,
    on_cpu=False,
    workspace=workspace,
    streamed=streamed,
)
"""Its rule is in `autopart.sharding.rules.contractions`."""
