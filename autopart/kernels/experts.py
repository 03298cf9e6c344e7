"""A mixture's experts: gated linear units, each for the tokens that a router gave to it, through five kernels.

For x (t, d), and k experts of each token with weights w (t, k); up (experts, 2 f, d) and down (experts, d, f):

    order, place = the pairs (token, expert) sorted by expert       `expert_sort`
    rows         = x, once for each pair, in this order             `expert_rows.permute`
    hidden       = rows up[expert]^T                                `grouped_matmul`
    inner        = f(gate) u of the halves gate, u of hidden        `gated.gated_halves`
    y[t]         = sum over j of w[t, j] (inner down[expert]^T)     `grouped_matmul`, `expert_rows.unpermute`

For s = t k pairs, backward keeps hidden, order and place, s (2 f) elements and 16 s bytes, and makes rows and inner
again. The rows that are summed are not kept: with g[p] = dy of the token of pair p, and e its expert,

    dinner[p] = w[p] (g[p] down[e]),    dw[p] = inner[p] . (g[p] down[e])
    ddown[e]  = sum over the pairs p of e of the outer products g[p] (w[p] inner[p])

The least traffic is the sum over the kernels that are called. Sources: Gale et al., arXiv 2211.15841; Tan et al.,
arXiv 2403.08245, whose backward too takes the gradient of the weights in front of the last product.
"""

from typing import Any

import torch
from torch import Tensor

from autopart.kernels import expert_rows, expert_sort, gated, grouped_matmul
from autopart.kernels.kernel import Bytes, Kernel


def reference(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, name: str = "silu", transposed: bool = False
) -> Tensor:
    """`experts` by a gathered copy of every pair's weights, as transformers' batched_mm_experts_forward writes it."""

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        if transposed:
            return torch.bmm(rows.unsqueeze(1), weight).squeeze(1)
        return torch.bmm(weight, rows.unsqueeze(-1)).squeeze(-1)

    number, chosen = ids.reshape(-1), weights.reshape(-1)
    rows = x.repeat_interleave(ids.shape[-1], dim=0)
    inner = gated.halves_reference(product(rows, up[number]), name)
    out = product(inner, down[number]) * chosen.unsqueeze(-1)
    return out.view(*ids.shape, -1).sum(dim=1).to(x.dtype)


def experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    name: str = "silu",
    transposed: bool = False,
    first: int = 0,
) -> Tensor:
    """The sum of the experts' outputs for every token, times their weights: (t, d).

    x             (t, d)
    up, down      (experts, 2 f, d) and (experts, d, f), or (experts, d, 2 f) and (experts, f, d) where ``transposed``
    weights, ids  (t, k): what the outputs of every token's experts are multiplied by, and the experts' numbers
    name          the activation of the first half of up's product, of ``activation.ACTIVATIONS``
    first         the number of the first of these experts. Pairs whose expert is not here give zeros, and have zero
                  gradients

    Of tensors on meta it gives the ``reference``'s, as sorted pairs would be read on the host.
    """
    if x.is_meta:
        return reference(x, up, down, weights, ids, name, transposed)
    out: Tensor = _Experts.apply(x, *_rows_first(up, down, transposed), weights, ids, name, first)
    return out


def _rows_first(up: Tensor, down: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Weights as (experts, outputs, inputs)."""
    return (up.transpose(1, 2), down.transpose(1, 2)) if transposed else (up, down)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, name: str, first: int
    ) -> Tensor:
        pairs = ids.reshape(-1) - first if first else ids.reshape(-1)
        order, place, offsets = expert_sort.sort_by_expert(pairs, len(up))
        hidden = grouped_matmul.grouped_matmul(expert_rows.permute(x, order, place), up, offsets)
        rows = grouped_matmul.grouped_matmul(gated.gated_halves(hidden, name), down, offsets)
        ctx.name = name
        ctx.save_for_backward(x, up, down, weights, order, place, offsets, hidden)
        return expert_rows.unpermute(rows, weights, order, place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, weights, order, place, offsets, hidden = ctx.saved_tensors
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            inner = gated.gated_halves(hidden, ctx.name)
        chosen = weights.reshape(-1, 1)[order]
        weighted = (inner.detach() * chosen).to(inner.dtype)
        dinner, ddown = grouped_matmul.gradients(expert_rows.permute(dy, order, place), weighted, down, offsets)
        del weighted
        dinner, dchosen = expert_rows.scaled_gradients(dinner, inner.detach(), chosen)
        (dhidden,) = torch.autograd.grad(inner, hidden, dinner)
        del inner, dinner
        drows, dup = grouped_matmul.gradients(dhidden, expert_rows.permute(x, order, place), up, offsets)
        dx = expert_rows.sum_by_token(drows, place, weights.shape[1])
        return dx, dup, ddown, dchosen[place].view(weights.shape), None, None, None


def _of_pairs(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    """up, down, order, offsets, rows, hidden and inner, on meta."""
    up, down = (t.to("meta") for t in _rows_first(up, down, transposed))
    order = torch.empty(ids.numel(), dtype=torch.int64, device="meta")
    offsets = order.new_empty(len(up) + 1)
    rows, hidden, inner = (x.new_empty(len(order), n, device="meta") for n in (x.shape[1], up.shape[1], down.shape[2]))
    return up, down, order, offsets, rows, hidden, inner


def streamed(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, name: str = "silu", transposed: bool = False
) -> Bytes:
    """As `Kernel.streamed`: all but the products. Backward multiplies inner by the weights, as dinner."""
    _, _, order, _, rows, hidden, inner = _of_pairs(x, up, down, ids, transposed)
    sort = expert_sort.bytes_moved(order, len(up))
    gather = expert_rows.permute_bytes_moved(x, order, order)
    gate = gated.halves_bytes_moved(hidden)
    back = expert_rows.unpermute_bytes_moved(rows, weights, order, order)
    return Bytes(
        forward=sort.forward + gather.forward + gate.forward + back.forward,
        backward=2 * gather.forward + gather.backward + gate.forward + gate.backward + 5 * inner.nbytes,
    )


def bytes_moved(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, name: str = "silu", transposed: bool = False
) -> Bytes:
    """As `Kernel.bytes_moved`: the sum over the kernels that are called."""
    rows_first, back, _, offsets, rows, _, inner = _of_pairs(x, up, down, ids, transposed)
    first = grouped_matmul.bytes_moved(rows, rows_first, offsets)
    second = grouped_matmul.bytes_moved(inner, back, offsets)
    rest = streamed(x, up, down, weights, ids, name, transposed)
    return Bytes(*(sum(parts) for parts in zip(first, second, rest, strict=True)))


def kept(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x, the weights of experts and of pairs; order, place, offsets and hidden."""
    x, up, down, weights, ids, *rest = arguments
    _, _, order, offsets, _, hidden, _ = _of_pairs(x, up, down, ids, rest[1] if len(rest) > 1 else False)
    return x, up, down, weights, order, torch.empty_like(order), offsets, hidden


def workspace(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, name: str = "silu", transposed: bool = False
) -> int:
    """Bytes of the temporaries of backward: of the last product's g, weighted, inner and dinner, or of the first one's
    inner's gradients, rows and drows."""
    _, _, _, _, rows, hidden, inner = _of_pairs(x, up, down, ids, transposed)
    return max(rows.nbytes + 3 * inner.nbytes, inner.nbytes + hidden.nbytes, hidden.nbytes + 2 * rows.nbytes)


KERNEL = Kernel(
    function=experts,
    reference=reference,
    rule="",
    kept=kept,
    bytes_moved=bytes_moved,
    ahead=lambda capability: {},
    shapes={},
    no_gradient=(4,),
    on_cpu=False,
    workspace=workspace,
    streamed=streamed,
)
"""Its rule is in `autopart.sharding.rules.contractions`. It has no Triton functions of its own."""
