"""Attention without scores in memory: softmax(scale q k^T + masks) v, with dropout of the softmax.

    s = scale q k^T                         scores of a query i and a key j; then cap tanh(s / cap) where there is a cap
    s + bias + relative[j - i] + mask       learned biases, T5's by place (Raffel et al. 2020), an additive mask
    p = 2^(s log2(e) - lse)                 lse: log2 of the sum of 2^(s log2(e)) over keys that are seen and a sink
    out = m p v                             m = dropout_scale where the hash of (i, j) keeps an element, else 0
    ds = p (m dout v^T - sum(dout out))     dq = scale ds k, dk = scale ds^T q, dv = (m p)^T dout, dbias = sum of ds

The forward goes over the keys once, with a running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022). The
backward computes p and the mask of dropout again, in one kernel by queries and one by keys, without atomics, so that
its result is the same in every run (Dao 2023); the gradient of a bias is a kernel of its own. Blocks of keys outside of
a causal mask or a window are neither read nor multiplied. A sink (Xiao et al. 2024) is a score of each head that has no
key and no value: its gradient is minus the sum of p_sink sum(dout out). For B samples, H heads of
queries and G of keys, of D elements (E those of values) and `itemsize` bytes, the least traffic in bytes is

    forward   itemsize B (H Q (D + E) + G K (D + E)) + 4 B H Q            read q, k, v, write out, lse (float32)
    backward  itemsize B (2 H Q (D + E) + 2 G K (D + E)) + 4 B H Q        read q, k, v, out, dout, lse, write dq, dk, dv

and as much as masks and biases have, read once forward and once backward; a bias's gradient is written once. The sums
of dout out, a float32 for each query, are left out. With dropout int32 hashes of queries and keys are read too.
"""

from typing import Any

import torch
from torch import Tensor

from autopart.kernels import attention_bias, attention_triton
from autopart.kernels.attention_facts import bytes_moved, kept
from autopart.kernels.attention_reference import reference
from autopart.kernels.attention_tiles import compile_ahead, tiles
from autopart.kernels.kernel import Kernel
from autopart.kernels.launch import TRITON_NAMES, launch, runs_on, triton_op

MAX_WIDTH = 256
"""Elements of the widest query, key and value that the kernels take."""
LOG2E = 1.4426950408889634


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, padding: Tensor | None = None,
    bias: Tensor | None = None, relative: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0,
    causal: bool = False, window: int = 0, cap: float = 0.0, even: bool = False, rows: Tensor | None = None,
    columns: Tensor | None = None, threshold: int = 0, dropout_scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Attention of query (B, H, Q, D), key (B, G, K, D) and value (B, G, K, E): shape (B, H, Q, E). By the Triton
    kernels where they apply, else by ``reference``. G divides H: a head of keys serves H / G heads of queries.

    mask             broadcasts to (B, H, Q, K); boolean, true where a query sees a key, or added to the scores. No
                     gradient
    padding          (B, K) boolean, true where a sample has a key. No gradient
    bias             (1 or B, 1 or H, Q, K), added to the scaled scores, with a gradient
    relative         (H, Q + K - 1): relative[j - i + Q - 1] is added to the score of query i and key j, with a gradient
    sinks            (H,): a score of each head beside those of the keys, of no value, with a gradient
    scale            of the products
    causal           query i sees the keys up to i + K - Q
    window           if positive, query i sees keys less than `window` away from i + K - Q
    cap              if positive, scores are cap tanh(s / cap) before anything is added (Gemma 2)
    even             a query that sees no key weighs all keys alike, as where the least number of the dtype is added to
                     the scores of keys that are hidden, in place of biases
    rows, columns    (B, H, Q) and (K,) int32: hashes of places, by which dropout draws (`autopart.kernels.dropout`);
                     None without dropout
    threshold        of dropout: a hash below it drops
    dropout_scale    by which dropout multiplies what it keeps; without rows it has no effect
    compute_dtype    of the softmax, in ``reference``; None for query's dtype

    Unless `even`, a query that sees no key, or whose masks make all scores -inf, has zeros and no gradient. The kernels
    compute scores and softmax in float32. They pass no gradient where all scores of a query are below
    -1e38 / log2(e), as where a mask of the dtype's least number hides all keys. Tensor subclasses, such as fake
    tensors, take ``reference``.
    """
    tensors = (query, key, value, mask, padding, bias, relative, sinks, rows, columns)
    if _kernels_apply(*tensors):
        places = (float(scale), causal, window, float(cap), even and sinks is None)
        return torch.ops.autopart.attention(*tensors, *places, threshold, float(dropout_scale))[0]
    given = (query, key, value, mask, padding, bias, relative, sinks)
    drawn = (rows, columns, threshold, dropout_scale)
    return reference(*given, scale, causal, window, cap, even, *drawn, compute_dtype)


def _kernels_apply(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, bias: Tensor | None,
    relative: Tensor | None, sinks: Tensor | None, rows: Tensor | None, columns: Tensor | None,
) -> bool:  # fmt: skip
    given = [t for t in (mask, padding, bias, relative, sinks, rows, columns) if t is not None]
    added = [t for t in (mask, bias, relative, sinks) if t is not None and t.dtype != torch.bool]
    if any(t.requires_grad for t in (mask, padding) if t is not None) or query.dim() != 4:
        return False
    batch, heads, queries, width = query.shape
    shape = (batch, heads, queries, key.shape[2])
    return (
        {key.dtype, value.dtype} == {query.dtype}
        and all(t.dtype in TRITON_NAMES for t in (query, *added))
        and max(width, value.shape[-1]) <= MAX_WIDTH
        and max(batch, heads) < 2**16
        and (bias is None or (_broadcasts(bias, shape) and bias.shape[:2].numel() < 2**16))
        and (relative is None or relative.shape == (heads, shape[2] + shape[3] - 1))
        and (sinks is None or sinks.shape == (heads,))
        and (rows is None or rows.shape == shape[:3])
        and runs_on(query, key, value, *given)
    )


def _broadcasts(bias: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether only samples and heads of a bias are broadcast."""
    return (
        bias.dim() == 4
        and all(a in (1, b) for a, b in zip(bias.shape[:2], shape, strict=False))
        and (tuple(bias.shape[2:]) == shape[2:])
    )


@triton_op("autopart::attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, bias: Tensor | None,
    relative: Tensor | None, sinks: Tensor | None, rows: Tensor | None, columns: Tensor | None, scale: float,
    causal: bool, window: int, cap: float, even: bool, threshold: int, dropout_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Q, E), and for each query lse, float32."""
    batch, heads, queries, _ = query.shape
    out = _heads_last(query, queries, value.shape[-1])
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    given = (query, key, value, mask, padding, bias, relative, sinks, rows, columns)
    arguments = _arguments(*given, scale, causal, window, cap, even, threshold, dropout_scale)
    options = tiles("forward", query.shape[-1], value.shape[-1], query.dtype, _added(arguments))
    sink = {"sinks": arguments["q"] if sinks is None else sinks.contiguous(), "SINKS": sinks is not None}
    programs = (-(-queries // options["QUERIES"]), heads, batch)
    launch(attention_triton.forward, programs, arguments.pop("q"), **arguments, **sink, out=out, lse=lse, **options)
    return out, lse


@triton_op("autopart::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    padding: Tensor | None, bias: Tensor | None, relative: Tensor | None, sinks: Tensor | None, rows: Tensor | None,
    columns: Tensor | None, scale: float, causal: bool, window: int, cap: float, even: bool, threshold: int,
    dropout_scale: float, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, and of bias, relative and sinks, empty unless `wanted`."""
    (batch, heads, queries, d), (_, served, keys, e) = query.shape, value.shape
    given = (query, key, value, mask, padding, bias, relative, sinks, rows, columns)
    arguments = _arguments(*given, scale, causal, window, cap, even, threshold, dropout_scale)
    g = dout if dout.stride(-1) == 1 else dout.contiguous()
    first, arguments["dout"], arguments["lse"] = arguments.pop("q"), g, lse
    arguments |= dict(zip(("dout_b", "dout_h", "dout_i"), g.stride(), strict=False))
    delta = arguments["delta"] = torch.empty_like(lse)
    dq, dk, dv = _heads_last(query, queries, d), _heads_last(key, keys, d), _heads_last(value, keys, e)
    options = tiles("query", d, e, query.dtype, _added(arguments))
    programs = (-(-queries // options["QUERIES"]), heads, batch)
    launch(attention_triton.query, programs, first, **arguments, out=out, dq=dq, factor=scale, **options)
    options = tiles("key", d, e, query.dtype, _added(arguments))
    programs = (-(-keys // options["KEYS"]), served, batch)
    unseen = torch.isneginf(lse).flatten(1).any(1) if even else lse
    launch(attention_triton.key, programs, first, **arguments, unseen=unseen, dk=dk, dv=dv, factor=scale, **options)
    dbias, drelative, dsinks = (query.new_empty(0) for _ in range(3))
    if bias is not None and wanted[0]:
        dbias = _bias_gradient(bias, first, arguments, d, e)
    if relative is not None and wanted[1]:
        drelative = _relative_gradient(relative, first, arguments, d, e)
    if sinks is not None and wanted[2]:
        chances = torch.exp2(sinks.float()[:, None] * LOG2E - lse)
        dsinks = (chances * delta).sum((0, 2)).neg().to(sinks.dtype)
    return dq, dk, dv, dbias, drelative, dsinks


def _bias_gradient(bias: Tensor, query: Tensor, arguments: dict[str, Any], d: int, e: int) -> Tensor:
    (batch, heads, queries), keys = query.shape[:3], arguments["keys"]
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    over = {"over_b": batch // bias.shape[0], "over_h": heads // bias.shape[1]}
    options = tiles("bias", d, e, query.dtype)
    programs = (-(-queries // options["QUERIES"]), -(-keys // options["KEYS"]), bias.shape[:2].numel())
    launch(attention_bias.bias_gradient, programs, query, **arguments, dbias=dbias, **over, **options)
    return dbias


def _relative_gradient(relative: Tensor, query: Tensor, arguments: dict[str, Any], d: int, e: int) -> Tensor:
    (batch, heads, queries), keys = query.shape[:3], arguments["keys"]
    options = tiles("relative", d, e, query.dtype)
    size = options["KEYS"]
    count = -(-queries // size) + -(-keys // size) - 1
    sums = torch.empty(heads, count, size, size, dtype=torch.float32, device=query.device)
    programs, given = (count, heads), {"sums_of_tiles": sums, "samples": batch}
    launch(attention_bias.relative_gradient, programs, query, **arguments, **given, **options)
    return attention_bias.along_diagonals(sums, queries, keys).to(relative.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.constants = inputs[10:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[5:8])
    gradients = torch.ops.autopart.attention_backward(dout, *ctx.saved_tensors, *ctx.constants, wanted)
    learned = (given if asked else None for given, asked in zip(gradients[3:], wanted, strict=True))
    return *gradients[:3], None, None, *learned, *[None] * 9


_forward.register_autograd(_gradients, setup_context=_save)


def _heads_last(x: Tensor, n: int, width: int) -> Tensor:
    """An empty tensor (samples, heads, n, width), in memory (samples, n, heads, width): a reshape to all heads takes no
    copy."""
    return torch.empty(x.shape[0], n, x.shape[1], width, dtype=x.dtype, device=x.device).transpose(1, 2)


def _added(arguments: dict[str, Any]) -> bool:
    """Whether the kernels read a mask or a bias."""
    return any(arguments[name] for name in ("BIAS", "MASK", "RELATIVE"))


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, bias: Tensor | None,
    relative: Tensor | None, sinks: Tensor | None, rows: Tensor | None, columns: Tensor | None, scale: float,
    causal: bool, window: int, cap: float, even: bool, threshold: int, dropout_scale: float,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that all kernels have."""
    shape = (*query.shape[:3], key.shape[2])
    tensors = {
        name: x if x.stride(-1) == 1 else x.contiguous() for name, x in zip("qkv", (query, key, value), strict=True)
    }
    absent = tensors["q"]
    given = {"padding": padding, "relative": relative, "rows": rows, "columns": columns}
    arguments: dict[str, Any] = dict(tensors)
    arguments |= {name: absent if x is None else x.contiguous() for name, x in given.items()}
    for name, x in tensors.items():
        arguments |= dict(
            zip((f"{name}_b", f"{name}_h", f"{name}_{'i' if name == 'q' else 'j'}"), x.stride(), strict=False)
        )
    for name, added in {"bias": bias, "mask": mask}.items():
        whole = absent if added is None else added.expand(shape)
        if added is not None and whole.stride(-1) > 1:
            whole = added.contiguous().expand(shape)
        arguments[name] = whole
        arguments |= dict(zip([f"{name}_{axis}" for axis in "bhij"], whole.stride(), strict=True))
    return arguments | {
        "heads": query.shape[1], "group": query.shape[1] // key.shape[1], "queries": shape[2], "keys": shape[3],
        "window": window, "scale": LOG2E * (2 * scale / cap if cap else scale), "cap": cap * LOG2E,
        "threshold": threshold, "share": 1.0 if rows is None else dropout_scale, "CAUSAL": causal,
        "WINDOW": window > 0, "CAP": cap > 0, "BIAS": bias is not None, "PADDING": padding is not None,
        "MASK": 0 if mask is None else 2 if mask.dtype == torch.bool else 1, "RELATIVE": relative is not None,
        "EVEN": even, "DROPOUT": rows is not None,
    }  # fmt: skip


KERNEL = Kernel(
    function=attention,
    reference=reference,
    rule="",
    kept=kept,
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={
        "GPT-2 XL": {"d": 64, "dropout": True},
        "Llama-3-8B": {"d": 128},
        "Mixtral-8x7B": {"d": 128, "window": True},
        "Gemma-2-9B": {"d": 256, "cap": True, "window": True, "padding": True, "even": True},
        "gpt-oss-20b": {"d": 64, "window": True, "sinks": True},
        "T5-11B": {"d": 128, "causal": False, "relative": True, "padding": True, "even": True, "dropout": True},
        "MPT-7B": {"d": 128, "mask": 1},
        "a bias of pairs": {"d": 64, "causal": False, "bias": True, "dropout": True},
    },
)
"""Its rule is in `autopart.sharding.rules.attention`."""
