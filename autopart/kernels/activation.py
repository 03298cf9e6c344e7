"""Activations of feed-forward blocks, with or without a bias in front, as transformers writes them:

    sigmoid kind    f(x) = x s(z),   z = a x (1 + b x^2),   f'(x) = s(z) + x s(z) (1 - s(z)) a (1 + 3 b x^2)
    erf kind        f(x) = x P(x),   P(x) = (1 + erf(x / sqrt 2)) / 2,   f'(x) = P(x) + x exp(-x^2 / 2) / sqrt(2 pi)
    relu, relu2     f(x) = max(x, 0)^k,   k = 1, 2

Every GELU with a tanh is of the sigmoid kind, because (1 + tanh u) / 2 = s(2 u). Sources: arXiv 1606.08415 (GELU, SiLU
and the approximations of GELU), arXiv 2109.08668 (squared ReLU). Backward keeps the input and the bias alone.

For x of n = rows x d elements of ``itemsize`` bytes, the least traffic in bytes is

    forward   2 itemsize n              read x, write y; with a bias itemsize d more, to read it
    backward  3 itemsize n              read x and dy, write dx; with a bias 2 itemsize d more, to read it, write dbias

The partial sums of dbias, one float32 row for each group of Triton programs, are left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from autopart.kernels.ahead import Usage, compile_kernels
from autopart.kernels.kernel import Bytes, Kernel
from autopart.kernels.launch import TRITON_NAMES, as_rows, jit, launch, power_of_two, processors, runs_on, triton_op

tl: Any = None  # triton.language, which jit binds

ELEMENTS = 2048
"""Elements of x in one tile."""
COLUMNS = 512
"""Most columns of a tile."""
TILES = 8
"""Tiles that a program adds up for the gradient of the bias, at least, where there are so many."""
ROOT = math.sqrt(2.0 / math.pi)


class Activation(NamedTuple):
    """An activation.

    function  as models write it, in plain PyTorch
    kind, a, b  of the formulas on top of this file
    operator  PyTorch's single operator of the same formula, which reads x once and keeps x alone for backward; None
              where there is none but `function`
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    kind: str
    a: float = 0.0
    b: float = 0.0
    operator: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of the Triton functions."""
        return {"KIND": self.kind, "A": self.a, "B": self.b}


class _BloomGelu(torch.autograd.Function):
    """BLOOM's GELU, whose backward is written out: it keeps x alone, and rounds the constants to eight digits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        slope = 0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)
        return slope * dy


def _gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "silu": Activation(functional.silu, "sigmoid", 1.0),
    "relu": Activation(functional.relu, "relu"),
    "relu2": Activation(lambda x: torch.square(functional.relu(x)), "relu2"),
    "gelu": Activation(functional.gelu, "erf"),
    "gelu_python": Activation(lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "erf"),
    "gelu_pytorch_tanh": Activation(_gelu_tanh, "sigmoid", 2 * ROOT, 0.044715),
    "gelu_new": Activation(_gelu_new, "sigmoid", 2 * ROOT, 0.044715, _gelu_tanh),
    "gelu_fast": Activation(_gelu_fast, "sigmoid", 2 * 0.7978845608, 0.044715, _gelu_tanh),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), "sigmoid", 1.702),
    "bloom_gelu": Activation(_BloomGelu.apply, "sigmoid", 2 * 0.79788456, 0.044715),
}
"""Name -> activation. The names are those of ``transformers.activations.ACT2CLS``, and ``bloom_gelu``. In its
``gelu_accurate`` and ``gelu_python_tanh`` are the same operators as in ``gelu_new``. The constants of ``gelu_fast`` are
those of ``gelu_new`` up to a relative 4e-12."""


def reference(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation ``name`` of x (...)."""
    return ACTIVATIONS[name].function(x)


def bias_reference(x: torch.Tensor, bias: torch.Tensor, name: str) -> torch.Tensor:
    """The activation ``name`` of x (..., d) + bias (d,)."""
    return ACTIVATIONS[name].function(x + bias)


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """The activation ``name``, of ``ACTIVATIONS``, of x (..., d): shape (..., d). By the Triton kernels where they
    apply, else by PyTorch's single operator, or by ``reference`` where there is none.

    The kernels compute in float32, as does PyTorch's operator on a CPU. A half-precision x is more accurate by these
    than by ``reference``. The kernels take
    tensors whose dims are in order in memory: of others the results of PyTorch are not contiguous.
    """
    if x.dtype in TRITON_NAMES and in_order(x) and runs_on(x):
        return torch.ops.autopart.activation(x, None, name)
    return (ACTIVATIONS[name].operator or ACTIVATIONS[name].function)(x)


def bias_activation(x: torch.Tensor, bias: torch.Tensor, name: str) -> torch.Tensor:
    """As ``activation``, of x (..., d) + bias (d,)."""
    fitting = x.dtype in TRITON_NAMES and bias.dtype in TRITON_NAMES and bias.shape == x.shape[-1:]
    if fitting and in_order(x) and runs_on(x, bias):
        return torch.ops.autopart.activation(x, bias, name)
    return bias_reference(x, bias, name)


def bytes_moved(x: torch.Tensor, *constants: object) -> Bytes:
    return Bytes(forward=2 * x.itemsize * x.numel(), backward=3 * x.itemsize * x.numel())


def bias_bytes_moved(x: torch.Tensor, bias: torch.Tensor, *constants: object) -> Bytes:
    forward, backward = bytes_moved(x)
    size = bias.itemsize * bias.numel()
    return Bytes(forward=forward + size, backward=backward + 2 * size)


def compile_ahead(
    capability: int,
    d: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "gelu_new",
    biased: bool = True,
) -> dict[str, Usage]:
    """Compile both kernels for contiguous rows of ``d`` elements and compute capability ``capability`` (90 for 9.0)."""
    types = dict.fromkeys(("x", "bias", "y", "dy", "dx"), f"*{TRITON_NAMES[dtype]}") | {"partial": "*fp32"}
    lengths = dict.fromkeys(("x_stride", "dy_stride", "d"), "i32")
    signature = types | lengths | {"rows": "i32", "groups": "i32"}
    aligned = {*types, *(lengths if d % 16 == 0 else ())}
    constexprs = tile(d) | ACTIVATIONS[name].constants | {"BIASED": biased}
    return compile_kernels((forward, backward), signature, constexprs, capability, aligned=aligned)


def in_order(x: torch.Tensor) -> bool:
    """Whether the dims of x, of which there is one at least, are in order in memory."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.dim() > 0 and (0 in strides or sorted(strides, reverse=True) == strides)


def tile(d: int) -> dict[str, int]:
    """Rows and columns of a tile of rows of d elements."""
    columns = min(max(power_of_two(int(d)), 16), COLUMNS)
    return {"ROWS": ELEMENTS // columns, "COLUMNS": columns}


@jit
def value(x, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == "sigmoid":
        z = A * x if B == 0 else A * x * (1 + B * x * x)
        y = x * tl.sigmoid(z)
    elif KIND == "erf":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        y = tl.where(x <= 0, 0.0, x if KIND == "relu" else x * x)
    return y


@jit
def gradient(g, x, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == "sigmoid":
        z = A * x if B == 0 else A * x * (1 + B * x * x)
        slope = A if B == 0 else A * (1 + 3 * B * x * x)
        e = tl.exp(-tl.abs(z))
        scale = 1 / (1 + e)
        g *= tl.where(z < 0, e, 1.0) * scale + x * (e * scale * scale) * slope
    elif KIND == "erf":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        g *= 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    else:
        g = tl.where(x <= 0, 0.0, g if KIND == "relu" else 2 * x * g)
    return g


@jit
def forward(  # type: ignore[no-untyped-def]
    x, bias, y, x_stride, rows, d,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(d, COLUMNS)
    row = ((tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    here = (row < rows) & (column < d)
    h = tl.load(x + row * x_stride + column, mask=here, other=0.0).to(tl.float32)
    if BIASED:
        h += tl.load(bias + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(y + row * d + column, value(h, KIND, A, B).to(y.dtype.element_ty), mask=here)


@jit
def backward(  # type: ignore[no-untyped-def]
    dy, x, bias, dx, partial, dy_stride, x_stride, rows, d, groups,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(d, COLUMNS)
    group = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(group * ROWS, rows, groups * ROWS):
        row = (at + tl.arange(0, ROWS))[:, None]
        here = (row < rows) & (column < d)[None, :]
        h = tl.load(x + row * x_stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        if BIASED:
            h += tl.load(bias + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
        g = gradient(g, h, KIND, A, B)
        dbias += tl.where(here, g, 0.0) if BIASED else 0.0
        tl.store(dx + row * d + column[None, :], g.to(dx.dtype.element_ty), mask=here)
    if BIASED:
        tl.store(partial + group * d + column, tl.sum(dbias, 0), mask=column < d)


@triton_op("autopart::activation", mutates_args=())
def _forward(x: torch.Tensor, bias: torch.Tensor | None, name: str) -> torch.Tensor:
    """The activation of x (..., d) + bias (d,)."""
    h, d = as_rows(x), x.shape[-1]
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    programs = _tiles(len(h), d) * -(-d // tile(d)["COLUMNS"])
    given = h if bias is None else bias.contiguous()
    launch(forward, programs, h, given, y, h.stride(0), len(h), d, **_options(d, name, bias is not None))
    return y


@triton_op("autopart::activation_backward", mutates_args=())
def _backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of bias, the latter without elements where there is no bias."""
    h, g, d = as_rows(x), as_rows(dy), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    groups = _tiles(len(h), d) if bias is None else _groups(len(h), d, x.device)
    partial = torch.empty(0 if bias is None else groups, d, dtype=torch.float32, device=x.device)
    given = h if bias is None else bias.contiguous()
    arguments = (g, h, given, dx, partial, g.stride(0), h.stride(0), len(h), d, groups)
    programs = groups * -(-d // tile(d)["COLUMNS"])
    launch(backward, programs, *arguments, **_options(d, name, bias is not None))
    return dx, x.new_empty(0) if bias is None else partial.sum(0).to(bias.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias, ctx.activation = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.autopart.activation_backward(dy, x, bias, ctx.activation)
    return dx, None if bias is None else dbias, None


_forward.register_autograd(_gradients, setup_context=_save)


def _tiles(rows: int, d: int) -> int:
    """Tiles along the rows."""
    return -(-rows // tile(d)["ROWS"])


def _groups(rows: int, d: int, device: torch.device) -> int:
    """Programs that share the rows in the backward of a bias: eight a multiprocessor, or fewer of ``TILES`` tiles."""
    most = 8 * processors(device) // -(-d // tile(d)["COLUMNS"])
    return max(min(-(-_tiles(rows, d) // TILES), most), 1)


def _options(d: int, name: str, biased: bool) -> dict[str, Any]:
    return tile(d) | ACTIVATIONS[name].constants | {"BIASED": biased, "num_warps": 4, "enable_fp_fusion": True}


KERNELS = (
    Kernel(
        function=activation,
        reference=reference,
        rule="... -> ...",
        kept=lambda arguments, outputs: arguments[:1],
        bytes_moved=bytes_moved,
        ahead=functools.partial(compile_ahead, biased=False),
        shapes={"Nemotron-4-15B": {"d": 24576, "name": "relu2"}, "BLOOM-7B1": {"d": 16384, "name": "bloom_gelu"}},
    ),
    Kernel(
        function=bias_activation,
        reference=bias_reference,
        rule="... d, d -> ... d",
        on_cpu=False,  # where the product adds the bias
        kept=lambda arguments, outputs: arguments[:2],
        bytes_moved=bias_bytes_moved,
        ahead=compile_ahead,
        shapes={"GPT-2 XL": {"d": 6400, "name": "gelu_new"}, "BERT-large": {"d": 4096, "name": "gelu"}},
    ),
)
