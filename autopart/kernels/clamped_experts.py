"""A mixture's experts with biases and clamped gates, each for the tokens that a router gave to it.

For x (t, d), and k experts of each token with weights w (t, k); up (experts, d, 2 f) with the bias a (experts, 2 f),
down (experts, f, d) with the bias b (experts, d), and sorted pairs as in `experts`,

    hidden = rows up[expert]                                   `grouped_matmul`
    inner  = gated unit of hidden + a[expert]                  `clamped_gate`
    y[t]   = sum over j of w[t, j] (inner down[expert])        `grouped_matmul`, `expert_rows.unpermute`
           + sum over j of w[t, j] b[expert]                   W b, for W (t, experts): w at its numbers, else 0

Backward keeps what that of `experts` keeps, and the numbers of experts. With g = dy, e the expert of pair p, and its
token's row of g as g[p],

    dw[p] = inner[p] . (g[p] down[e]) + (g b^T)[p],    db = W^T g,    da = sums of dhidden by expert

The least traffic is the sum over the kernels that are called. Sources: those of `experts` and `clamped_gate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopart.kernels import clamped_gate, expert_rows, expert_sort, grouped_matmul
from autopart.kernels import experts as plain
from autopart.kernels.kernel import Bytes, Kernel


def reference(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    """`clamped_experts` by a gathered copy of every pair's weights, as transformers' batched_mm_experts_forward writes
    it for gpt-oss."""
    number, chosen = ids.reshape(-1), weights.reshape(-1)
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    hidden = torch.bmm(rows.unsqueeze(1), up[number]).squeeze(1) + up_bias[number]
    inner = clamped_gate.gate_reference(hidden, alpha, limit)
    out = torch.bmm(inner.unsqueeze(1), down[number]).squeeze(1) + down_bias[number]
    return (out * chosen.unsqueeze(-1)).view(*ids.shape, -1).sum(dim=1).to(x.dtype)


def clamped_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    alpha: float,
    limit: float,
    first: int = 0,
    biased: bool = True,
) -> Tensor:
    """The sum of the experts' outputs for every token, times their weights: (t, d).

    x             (t, d)
    up, down      (experts, d, 2 f), whose columns are gates and ups in turns, and (experts, f, d)
    up_bias       (experts, 2 f)
    down_bias     (experts, d)
    weights, ids  (t, k): what the outputs of every token's experts are multiplied by, and the experts' numbers
    alpha, limit  the gate's factor within the sigmoid, and what gate and up are clamped at
    first         the number of the first of these experts. Pairs whose expert is not here give zeros, and have zero
                  gradients
    biased        whether down_bias is added: by one of several calls that have parts of f

    Of tensors on meta it gives the ``reference``'s.
    """
    if x.is_meta:
        return reference(x, up, down, up_bias, down_bias, weights, ids, alpha, limit)
    out: Tensor = _Experts.apply(x, up, down, up_bias, down_bias, weights, ids, alpha, limit, first, biased)
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor, *rest: Any
    ) -> Tensor:
        weights, ids, *ctx.gate, ctx.first, ctx.biased = rest
        pairs = ids.reshape(-1) - ctx.first
        order, place, offsets = expert_sort.sort_by_expert(pairs, len(up))
        gathered = expert_rows.permute(x, order, place)
        hidden = grouped_matmul.grouped_matmul(gathered, up.transpose(1, 2), offsets)
        inner = clamped_gate.clamped_gate(hidden, up_bias, pairs[order], *ctx.gate)
        rows = grouped_matmul.grouped_matmul(inner, down.transpose(1, 2), offsets)
        ctx.save_for_backward(x, up, down, up_bias, down_bias, weights, ids, order, place, offsets, hidden)
        out = expert_rows.unpermute(rows, weights, order, place)
        if not ctx.biased:
            return out
        bias = down_bias.to(out.dtype)
        return out.addmm_(_by_expert(weights, ids - ctx.first, bias), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, up_bias, down_bias, weights, ids, order, place, offsets, hidden = ctx.saved_tensors
        number, chosen = (ids.reshape(-1) - ctx.first)[order], weights.reshape(-1, 1)[order]
        inner = clamped_gate.clamped_gate(hidden, up_bias, number, *ctx.gate)
        weighted, given = (inner * chosen).to(inner.dtype), expert_rows.permute(dy, order, place)
        dinner, ddown = grouped_matmul.gradients(given, weighted, down.transpose(1, 2), offsets)
        del weighted, given
        dinner, dchosen = expert_rows.scaled_gradients(dinner, inner, chosen)
        del inner
        dhidden = clamped_gate.gradients(dinner, hidden, up_bias, number, *ctx.gate)
        del dinner
        da = clamped_gate.sums_by_expert(dhidden, offsets, up_bias.dtype)
        gathered = expert_rows.permute(x, order, place)
        drows, dup = grouped_matmul.gradients(dhidden, gathered, up.transpose(1, 2), offsets)
        dx, dweights = expert_rows.sum_by_token(drows, place, weights.shape[1]), dchosen[place].view(weights.shape)
        db = torch.zeros_like(down_bias)
        if ctx.biased:
            own, bias = ids - ctx.first, down_bias.to(dy.dtype)
            db = (_by_expert(weights, own, bias).t() @ dy).to(db.dtype)
            more = torch.nn.functional.pad(dy @ bias.t(), (0, 1)).gather(1, _or_none(own, bias))
            dweights = (dweights + more).to(weights.dtype)
        return dx, dup.transpose(1, 2), ddown.transpose(1, 2), da, db, dweights, None, None, None, None, None


def _or_none(ids: Tensor, down_bias: Tensor) -> Tensor:
    """The numbers of the experts that are here, and behind them the number of none."""
    return torch.where((ids >= 0) & (ids < len(down_bias)), ids, len(down_bias))


def _by_expert(weights: Tensor, ids: Tensor, down_bias: Tensor) -> Tensor:
    """W (t, experts) in the dtype of down_bias: the weights of a row at the numbers of its experts, and 0 elsewhere."""
    whole = down_bias.new_zeros(len(ids), len(down_bias) + 1)
    return whole.scatter_add_(1, _or_none(ids, down_bias), weights.to(down_bias.dtype))[:, :-1]


def streamed(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    *constants: Any,
) -> Bytes:
    """As `Kernel.streamed`: all but the products of pairs. That of `experts`; in forward biases, numbers of pairs and W
    (written, read), and y once more; in backward the same but y, dhidden, dy twice, and the gradients of biases."""
    pairs = plain.streamed(x, up, down, weights, ids, "silu", True)
    around = up_bias.nbytes + down_bias.nbytes + 16 * ids.numel() + 2 * down_bias.itemsize * len(ids) * len(down_bias)
    hidden = x.itemsize * ids.numel() * up_bias.shape[1]
    return Bytes(
        forward=pairs.forward + around + 2 * x.nbytes,
        backward=pairs.backward + around + hidden + 2 * x.nbytes + up_bias.nbytes + down_bias.nbytes,
    )


def bytes_moved(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    *constants: Any,
) -> Bytes:
    """As `Kernel.bytes_moved`: the sum over the kernels that are called."""
    given = x, up, down, weights, ids, "silu", True
    parts = plain.bytes_moved(*given), plain.streamed(*given), streamed(x, up, down, up_bias, down_bias, weights, ids)
    return Bytes(*(whole - rest + own for whole, rest, own in zip(*parts, strict=True)))


def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x, the weights of experts and of pairs, biases, numbers; order, place, offsets and hidden."""
    x, up, down, up_bias, down_bias, weights, ids, *_ = arguments
    return *plain.kept((x, up, down, weights, ids, "silu", True), outputs), up_bias, down_bias, ids


def workspace(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor,
    down_bias: Tensor,
    weights: Tensor,
    ids: Tensor,
    *constants: Any,
) -> int:
    """Bytes of the temporaries of backward: those of `experts`, and W with what is as large."""
    return plain.workspace(x, up, down, weights, ids, "silu", True) + 2 * down_bias.itemsize * len(ids) * len(down_bias)


KERNEL = Kernel(
    function=clamped_experts,
    reference=reference,
    rule="",
    kept=kept,
    bytes_moved=bytes_moved,
    ahead=clamped_gate.compile_ahead,
    shapes={"gpt-oss-120b": {"f": 2880}},
    no_gradient=(6,),
    on_cpu=False,
    workspace=workspace,
    streamed=streamed,
)
"""Its rule is in `autopart.sharding.rules.contractions`."""
