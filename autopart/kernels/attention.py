"""Attention without scores in memory: softmax(scale q k^T + masks) v, with dropout of the softmax.

    s = scale q k^T                         scores of a query i and a key j; then cap tanh(s / cap) where there is a cap
    s + slope j + bias + mask               ALiBi (Press et al. 2022), T5's bias (Raffel et al. 2020), an additive mask
    p = 2^(s log2(e) - lse)                 lse: log2 of the sum of 2^(s log2(e)) over the keys that are seen
    out = m p v                             m = dropout_scale where the hash of (i, j) keeps an element, else 0
    ds = p (m dout v^T - sum(dout out))     dq = scale ds k, dk = scale ds^T q, dv = (m p)^T dout, dbias = sum of ds

The forward goes over the keys once, with a running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022). The
backward computes p and the mask of dropout again, in one kernel by queries and one by keys, without atomics, so that
its result is the same in every run (Dao 2023); the gradient of a bias is a kernel of its own. For B samples, H heads of
queries and G of keys, of D elements (E those of values) and `itemsize` bytes, the least traffic in bytes is

    forward   itemsize B (H Q (D + E) + G K (D + E)) + 4 B H Q            read q, k, v, write out, lse (float32)
    backward  itemsize B (2 H Q (D + E) + 2 G K (D + E)) + 4 B H Q        read q, k, v, out, dout, lse, write dq, dk, dv

and as much as masks and bias have, read once forward and once backward; a bias's gradient is written once. The sums of
dout out, a float32 for each query, are left out. With dropout int32 hashes of queries and keys are read too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopart.kernels import attention_triton
from autopart.kernels.attention_tiles import compile_ahead, tiles
from autopart.kernels.dropout import dropped
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, launch, runs_on, triton_op

MAX_WIDTH = 256
"""Elements of the widest query, key and value that the kernels take."""
LOG2E = 1.4426950408889634


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, padding: Tensor | None = None,
    slopes: Tensor | None = None, bias: Tensor | None = None, rows: Tensor | None = None,
    columns: Tensor | None = None, scale: float = 1.0, causal: bool = False, window: int = 0, cap: float = 0.0,
    threshold: int = 0, dropout_scale: float = 1.0, compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Attention as models write it, with a softmax in ``compute_dtype``, or in query's dtype when that is None.
    Arguments as `attention`."""
    scores = torch.matmul(query, _repeated(key, query).transpose(-1, -2)) * scale
    if cap:
        scores = torch.tanh(scores / cap) * cap
    if slopes is not None:
        scores = scores + (slopes[:, None, None] * torch.arange(key.shape[2], device=key.device)).to(scores.dtype)
    if bias is not None:
        scores = scores + bias
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    seen = _seen(query, key, mask, padding, causal, window)
    if seen is not None:
        scores = torch.where(seen, scores, float("-inf"))
    unseen = mask is not None or padding is not None or bias is not None or query.shape[2] > key.shape[2]
    if unseen:
        chances = torch.ops.aten._safe_softmax(scores.to(compute_dtype or scores.dtype), -1).to(query.dtype)
    else:
        chances = torch.softmax(scores, -1, dtype=compute_dtype).to(query.dtype)
    if rows is not None and columns is not None:
        chances = dropped(chances, rows, columns, threshold, dropout_scale)
    return torch.matmul(chances, _repeated(value, query))


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """x (samples, heads, n, d) with each head as often as it serves heads of query."""
    batch, heads, n, d = x.shape
    if heads == query.shape[1]:
        return x
    return x[:, :, None].expand(batch, heads, query.shape[1] // heads, n, d).reshape(batch, query.shape[1], n, d)


def _seen(
    query: Tensor, key: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool, window: int
) -> Tensor | None:
    """Which keys every query sees, by boolean masks and by places; None where it sees all."""
    seen = mask if mask is not None and mask.dtype == torch.bool else None
    if padding is not None:
        seen = padding[:, None, None] if seen is None else seen & padding[:, None, None]
    queries, keys = query.shape[2], key.shape[2]
    if causal or window:
        ahead = torch.arange(keys, device=key.device) - torch.arange(keys - queries, keys, device=key.device)[:, None]
        near = ahead <= 0 if causal else ahead < window
        near = near & (ahead > -window) if window else near
        seen = near if seen is None else seen & near
    return seen


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, padding: Tensor | None = None,
    slopes: Tensor | None = None, bias: Tensor | None = None, rows: Tensor | None = None,
    columns: Tensor | None = None, scale: float = 1.0, causal: bool = False, window: int = 0, cap: float = 0.0,
    threshold: int = 0, dropout_scale: float = 1.0, compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Attention of query (B, H, Q, D), key (B, G, K, D) and value (B, G, K, E): shape (B, H, Q, E). By the Triton
    kernels where they apply, else by ``reference``. G divides H: a head of keys serves H / G heads of queries.

    mask             broadcasts to (B, H, Q, K); boolean, true where a query sees a key, or added to the scores. No
                     gradient
    padding          (B, K) boolean, true where a sample has a key. No gradient
    slopes           (H,) of ALiBi: slope x j is added to the scores. No gradient
    bias             (1 or B, 1 or H, Q, K), added to the scaled scores, with a gradient
    rows, columns    (B, H, Q) and (K,) int32: hashes of places, by which dropout draws (`autopart.kernels.dropout`);
                     None without dropout
    scale            of the products
    causal           query i sees the keys up to i + K - Q
    window           if positive, query i sees keys less than `window` away from i + K - Q
    cap              if positive, scores are cap tanh(s / cap) before anything is added (Gemma 2)
    threshold        of dropout: a hash below it drops
    dropout_scale    by which dropout multiplies what it keeps; without rows it has no effect
    compute_dtype    of the softmax, in ``reference``; None for query's dtype

    A query that sees no key, or whose masks make all scores -inf, has zeros and no gradient. The kernels compute scores
    and softmax in float32. They pass no gradient where all scores of a query are below -1e38 / log2(e), as where a mask
    of the dtype's least number hides all keys. Tensor subclasses, such as fake tensors, take ``reference``.
    """
    tensors = (query, key, value, mask, padding, slopes, bias, rows, columns)
    if _kernels_apply(*tensors):
        constants = (float(scale), causal, window, float(cap), threshold, float(dropout_scale))
        return torch.ops.autopart.attention(*tensors, *constants)[0]
    return reference(*tensors, scale, causal, window, cap, threshold, dropout_scale, compute_dtype)


def _kernels_apply(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, slopes: Tensor | None,
    bias: Tensor | None, rows: Tensor | None, columns: Tensor | None,
) -> bool:  # fmt: skip
    given = [t for t in (mask, padding, slopes, bias, rows, columns) if t is not None]
    added = [t for t in (mask, slopes, bias) if t is not None and t.dtype != torch.bool]
    if any(t.requires_grad for t in given if t is not bias) or query.dim() != 4:
        return False
    batch, heads, queries, width = query.shape
    shape = (batch, heads, queries, key.shape[2])
    return (
        {key.dtype, value.dtype} == {query.dtype}
        and all(t.dtype in TRITON_NAMES for t in (query, *added))
        and max(width, value.shape[-1]) <= MAX_WIDTH
        and max(batch, heads) < 2**16
        and (bias is None or (_broadcasts(bias, shape) and bias.shape[:2].numel() < 2**16))
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
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, slopes: Tensor | None,
    bias: Tensor | None, rows: Tensor | None, columns: Tensor | None, scale: float, causal: bool, window: int,
    cap: float, threshold: int, dropout_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Q, E), and for each query lse, float32."""
    batch, heads, queries, _ = query.shape
    out = _heads_last(query, queries, value.shape[-1])
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    constants = (scale, causal, window, cap, threshold, dropout_scale)
    arguments = _arguments(query, key, value, mask, padding, slopes, bias, rows, columns, *constants)
    options = tiles(
        "forward" if bias is None and mask is None else "added", query.shape[-1], value.shape[-1], query.dtype
    )
    programs = (-(-queries // options["QUERIES"]), heads, batch)
    launch(attention_triton.forward, programs, arguments.pop("q"), **arguments, out=out, lse=lse, **options)
    return out, lse


@triton_op("autopart::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    padding: Tensor | None, slopes: Tensor | None, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None,
    scale: float, causal: bool, window: int, cap: float, threshold: int, dropout_scale: float, bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, and of bias, empty unless asked for."""
    (batch, heads, queries, d), (_, served, keys, e) = query.shape, value.shape
    constants = (scale, causal, window, cap, threshold, dropout_scale)
    arguments = _arguments(query, key, value, mask, padding, slopes, bias, rows, columns, *constants)
    g = dout if dout.stride(-1) == 1 else dout.contiguous()
    first, arguments["dout"], arguments["lse"] = arguments.pop("q"), g, lse
    arguments |= dict(zip(("dout_b", "dout_h", "dout_i"), g.stride(), strict=False))
    arguments["delta"] = torch.empty_like(lse)
    dq, dk, dv = _heads_last(query, queries, d), _heads_last(key, keys, d), _heads_last(value, keys, e)
    options = tiles("query", d, e, query.dtype)
    programs = (-(-queries // options["QUERIES"]), heads, batch)
    launch(attention_triton.query, programs, first, **arguments, out=out, dq=dq, factor=scale, **options)
    options = tiles("key", d, e, query.dtype)
    programs = (-(-keys // options["KEYS"]), served, batch)
    launch(attention_triton.key, programs, first, **arguments, dk=dk, dv=dv, factor=scale, **options)
    if bias is None or not bias_gradient:
        return dq, dk, dv, query.new_empty(0)
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    over = {"over_b": batch // bias.shape[0], "over_h": heads // bias.shape[1]}
    options = tiles("bias", d, e, query.dtype)
    programs = (-(-queries // options["QUERIES"]), -(-keys // options["KEYS"]), bias.shape[:2].numel())
    launch(attention_triton.bias_gradient, programs, first, **arguments, dbias=dbias, **over, **options)
    return dq, dk, dv, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.constants = inputs[9:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[6]
    gradients = torch.ops.autopart.attention_backward(dout, *ctx.saved_tensors, *ctx.constants, wanted)
    return *gradients[:3], None, None, None, gradients[3] if wanted else None, *[None] * 8


_forward.register_autograd(_gradients, setup_context=_save)


def _heads_last(x: Tensor, n: int, width: int) -> Tensor:
    """An empty tensor (samples, heads, n, width), in memory (samples, n, heads, width): a reshape to all heads takes no
    copy."""
    return torch.empty(x.shape[0], n, x.shape[1], width, dtype=x.dtype, device=x.device).transpose(1, 2)


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, padding: Tensor | None, slopes: Tensor | None,
    bias: Tensor | None, rows: Tensor | None, columns: Tensor | None, scale: float, causal: bool, window: int,
    cap: float, threshold: int, dropout_scale: float,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that all kernels have."""
    shape = (*query.shape[:3], key.shape[2])
    tensors = {
        name: x if x.stride(-1) == 1 else x.contiguous() for name, x in zip("qkv", (query, key, value), strict=True)
    }
    absent = tensors["q"]
    given = {"padding": padding, "slopes": slopes, "rows": rows, "columns": columns}
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
        "MASK": 0 if mask is None else 2 if mask.dtype == torch.bool else 1, "SLOPES": slopes is not None,
        "DROPOUT": rows is not None,
    }  # fmt: skip


def bytes_moved(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Bytes:
    batch, heads, queries, d = query.shape
    e = value.shape[-1]
    wide = query.itemsize * batch * (heads * queries * (d + e) + key.shape[1] * key.shape[2] * (d + e))
    read = sum(t.untyped_storage().nbytes() for t in others if isinstance(t, Tensor))
    bias = others[3] if len(others) > 3 else None
    written = bias.numel() * bias.itemsize if isinstance(bias, Tensor) and bias.requires_grad else 0
    lse = 4 * batch * heads * queries
    return Bytes(forward=wide + lse + read, backward=2 * wide + lse + read + written)


def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Query, key, value, masks, bias, hashes, the output, and for each query a log-sum-exp in float32."""
    query = arguments[0]
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return *(t for t in arguments if isinstance(t, Tensor)), outputs[0], lse


def rule(args: tuple[Any, ...], outputs: Sequence[Sequence[int]]) -> str:
    """How the tensors of a call may be split, in the notation of `autopart.sharding.notation`: as ``KERNEL.rule``, for
    masks and biases of any shape. Queries are split where neither `causal` nor `window` counts them.

    args  the call's arguments, with the shapes of tensors in their place and None for what is left out
    """
    query, key, _, mask, _, _, bias = (*args, *[None] * 7)[:7]
    heads = "(h g)" if query[1] > key[1] > 1 else "h"
    q = "q!" if any(args[10:12]) else "q"
    names = ("b", heads, q, "k!")

    def added(shape: Sequence[int] | None) -> str:
        if shape is None:
            return "-"
        return " ".join("1" if n == 1 else name for n, name in zip(shape, names[-len(shape) :], strict=True))

    inputs = (f"b {heads} {q} d!", "b h k! d!", "b h k! e!", added(mask), "b k!", heads, added(bias))
    return f"{', '.join(inputs)}, b {heads} {q}, k! -> b {heads} {q} e!"


KERNEL = Kernel(
    function=attention,
    reference=reference,
    rule="b (h g) q! d!, b h k! d!, b h k! e!, b (h g) q! k!, b k!, (h g), b (h g) q! k!, b (h g) q!, k!"
    " -> b (h g) q! e!",
    kept=kept,
    bytes_moved=bytes_moved,
    ahead=compile_ahead,
    shapes={
        "GPT-2 XL": {"d": 64, "dropout": True},
        "Llama-3-8B": {"d": 128},
        "Mixtral-8x7B": {"d": 128, "window": True},
        "T5-11B": {"d": 128, "causal": False, "bias": True, "padding": True, "dropout": True},
    },
)
