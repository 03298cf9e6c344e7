"""Gated linear units: an activation f of the gate times the up-projection.

    y = f(g) u,    dg = dy u f'(g),    du = dy f(g)

SwiGLU has f = SiLU, GEGLU a GELU, ReGLU a ReLU (arXiv 2002.05202); f and f' are on top of ``activation``. Backward
keeps g and u alone. These are two tensors, or the halves of one product, whose gradient is then one tensor too.

For y of n = rows x d elements of ``itemsize`` bytes, the least traffic in bytes is

    forward   3 itemsize n      read g and u, write y
    backward  5 itemsize n      read g, u and dy, write dg and du
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from autopart.kernels.activation import ACTIVATIONS, gradient, in_order, tile, value
from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, as_rows, jit, launch, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds


def reference(gate: torch.Tensor, up: torch.Tensor, name: str = "gelu") -> torch.Tensor:
    """The activation ``name``, of ``activation.ACTIVATIONS``, of gate (..., d), times up (..., d)."""
    return ACTIVATIONS[name].function(gate) * up


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU of gate (..., d) times up (..., d)."""
    return reference(gate, up, "silu")


def reglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """ReLU of gate (..., d) times up (..., d)."""
    return reference(gate, up, "relu")


def halves_reference(x: torch.Tensor, name: str = "silu", gate_first: bool = True) -> torch.Tensor:
    """The activation ``name`` of one half of x (..., 2 d) times the other half; the gate is the first one or the
    second."""
    first, second = x.chunk(2, dim=-1)
    return reference(first, second, name) if gate_first else reference(second, first, name)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU of gate (..., d) times up (..., d): shape (..., d). By the Triton kernels where they apply, else by
    ``reference``.

    The kernels compute in float32, so half-precision tensors are more accurate by the kernels than by ``reference``.
    They read any rows whose elements are adjacent, such as halves of a product, without a copy, and take tensors whose
    dims are in order in memory.
    """
    return geglu(gate, up, "silu")


def geglu(gate: torch.Tensor, up: torch.Tensor, name: str = "gelu") -> torch.Tensor:
    """As ``swiglu``, with the activation ``name`` of ``activation.ACTIVATIONS``."""
    fitting = gate.dtype in TRITON_NAMES and up.dtype in TRITON_NAMES and gate.shape == up.shape
    if fitting and in_order(gate) and in_order(up) and runs_on(gate, up):
        return torch.ops.autopart.gated(gate, up, name)
    return reference(gate, up, name)


def reglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As ``swiglu``, with ReLU."""
    return geglu(gate, up, "relu")


def gated_halves(x: torch.Tensor, name: str = "silu", gate_first: bool = True) -> torch.Tensor:
    """``geglu`` of the halves of x (..., 2 d): shape (..., d). The gradient of x is made without a concatenation."""
    if x.dtype in TRITON_NAMES and in_order(x) and x.shape[-1] % 2 == 0 and runs_on(x):
        return torch.ops.autopart.gated_halves(x, name, gate_first)
    return halves_reference(x, name, gate_first)


def bytes_moved(gate: torch.Tensor, up: torch.Tensor, *constants: object) -> Bytes:
    size = gate.itemsize * gate.numel()
    return Bytes(forward=3 * size, backward=5 * size)


def halves_bytes_moved(x: torch.Tensor, *constants: object) -> Bytes:
    size = x.itemsize * x.numel() // 2
    return Bytes(forward=3 * size, backward=5 * size)


def compile_ahead(
    capability: int, d: int = 14336, dtype: torch.dtype = torch.bfloat16, name: str = "silu"
) -> dict[str, Usage]:
    """Compile both kernels for rows of ``d`` elements and compute capability ``capability`` (90 for 9.0)."""
    types = dict.fromkeys(("gate", "up", "y", "dy", "dx"), f"*{TRITON_NAMES[dtype]}")
    lengths = dict.fromkeys(("gate_stride", "up_stride", "dy_stride", "dx_stride", "to_gate", "to_up", "d"), "i32")
    signature = types | lengths | {"rows": "i32"}
    aligned = {*types, *(lengths if d % 16 == 0 else ())}
    constexprs = tile(d) | ACTIVATIONS[name].constants
    return compile_kernels((forward, backward), signature, constexprs, capability, aligned=aligned)


@jit
def forward(  # type: ignore[no-untyped-def]
    gate, up, y, gate_stride, up_stride, rows, d,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(d, COLUMNS)
    row = ((tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    here = (row < rows) & (column < d)
    g = tl.load(gate + row * gate_stride + column, mask=here, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row * d + column, (value(g, KIND, A, B) * u).to(y.dtype.element_ty), mask=here)


@jit
def backward(  # type: ignore[no-untyped-def]
    dy, gate, up, dx, dy_stride, gate_stride, up_stride, dx_stride, to_gate, to_up, rows, d,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(d, COLUMNS)
    row = ((tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    here = (row < rows) & (column < d)
    h = tl.load(dy + row * dy_stride + column, mask=here, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=here, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=here, other=0.0).to(tl.float32)
    at = dx + row * dx_stride + column
    tl.store(at + to_gate, gradient(h * u, g, KIND, A, B).to(dx.dtype.element_ty), mask=here)
    tl.store(at + to_up, (h * value(g, KIND, A, B)).to(dx.dtype.element_ty), mask=here)


def _launch_forward(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    g, u = as_rows(gate), as_rows(up)
    rows, d = g.shape
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    launch(forward, _programs(rows, d), g, u, y, g.stride(0), u.stride(0), rows, d, **_options(d, name))
    return y


def _launch_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, dx: torch.Tensor, places: tuple[int, int, int], name: str
) -> None:
    """Write the gradients into dx; ``places`` are the elements from row to row, to the gate's, and to the other's."""
    h, g, u = as_rows(dy), as_rows(gate), as_rows(up)
    rows, d = g.shape
    arguments = (h, g, u, dx, h.stride(0), g.stride(0), u.stride(0), *places, rows, d)
    launch(backward, _programs(rows, d), *arguments, **_options(d, name))


@triton_op("autopart::gated", mutates_args=())
def _forward(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    """The activation of gate (..., d) times up (..., d)."""
    return _launch_forward(gate, up, name)


@triton_op("autopart::gated_backward", mutates_args=())
def _backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    """Gradients of gate and of up, one behind the other: (2, ..., d), in the finer dtype of both."""
    dx = torch.empty((2, *gate.shape), dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    _launch_backward(dy, gate, up, dx, (gate.shape[-1], 0, gate.numel()), name)
    return dx


@triton_op("autopart::gated_halves", mutates_args=())
def _halves_forward(x: torch.Tensor, name: str, gate_first: bool) -> torch.Tensor:
    """The activation of one half of x (..., 2 d) times the other."""
    return _launch_forward(*_halves(x, gate_first), name)


@triton_op("autopart::gated_halves_backward", mutates_args=())
def _halves_backward(dy: torch.Tensor, x: torch.Tensor, name: str, gate_first: bool) -> torch.Tensor:
    """Gradient of x (..., 2 d)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d = dy.shape[-1]
    _launch_backward(dy, *_halves(x, gate_first), dx, (2 * d, *((0, d) if gate_first else (d, 0))), name)
    return dx


def _halves(x: torch.Tensor, gate_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate and the other half."""
    first, second = x.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    gate, up = ctx.saved_tensors
    dgate, dup = torch.ops.autopart.gated_backward(dy, gate, up, ctx.activation)
    return dgate.to(gate.dtype), dup.to(up.dtype), None


def _halves_save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, *ctx.constants = inputs
    ctx.save_for_backward(x)


def _halves_gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.autopart.gated_halves_backward(dy, *ctx.saved_tensors, *ctx.constants), None, None


_forward.register_autograd(_gradients, setup_context=_save)
_halves_forward.register_autograd(_halves_gradients, setup_context=_halves_save)


def _programs(rows: int, d: int) -> int:
    size = tile(d)
    return -(-rows // size["ROWS"]) * -(-d // size["COLUMNS"])


def _options(d: int, name: str) -> dict[str, Any]:
    return tile(d) | ACTIVATIONS[name].constants | {"num_warps": 4, "enable_fp_fusion": True}


def _pair(
    function: Callable[..., Any], pattern: Callable[..., Any], name: str, shapes: dict[str, dict[str, Any]]
) -> Kernel:
    """The record of a kernel of a gate and an up-projection, compiled ahead with the activation ``name``."""
    return Kernel(
        function=function,
        reference=pattern,
        rule="..., ... -> ...",
        kept=lambda arguments, outputs: arguments[:2],
        bytes_moved=bytes_moved,
        ahead=functools.partial(compile_ahead, name=name),
        shapes=shapes,
    )


KERNELS = (
    _pair(swiglu, swiglu_reference, "silu", {"Llama-3-8B": {"d": 14336}, "Mixtral-8x7B": {"d": 14336}}),
    _pair(geglu, reference, "gelu_new", {"T5-v1.1-XXL": {"d": 10240}}),
    _pair(reglu, reglu_reference, "relu", {"T5 of arXiv 2002.05202": {"d": 2048}}),
    Kernel(
        function=gated_halves,
        reference=halves_reference,
        rule="... (2 d) -> ... d",
        kept=lambda arguments, outputs: arguments[:1],
        bytes_moved=halves_bytes_moved,
        ahead=compile_ahead,
        shapes={"Mixtral-8x7B": {"d": 14336}, "Phi-3-mini": {"d": 8192}},
    ),
)
