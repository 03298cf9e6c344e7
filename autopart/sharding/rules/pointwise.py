"""Operators that work element by element."""

from autopart.sharding.rules.base import Args, Linear, Rule, argument, is_tensor

POINTWISE = """abs absolute arccos arccosh arcsin arcsinh arctan arctanh clip fix acos acosh angle asin asinh
    atan atanh bitwise_not ceil celu clamp clamp_max clamp_min cos cosh digamma elu erf erfc erfinv exp exp2
    expm1 floor frac gelu hardsigmoid hardshrink hardswish hardtanh i0 isfinite isinf isnan isneginf isposinf
    leaky_relu lgamma log log10 log1p log2 log_sigmoid logical_not logit mish mvlgamma nan_to_num reciprocal
    relu relu6 round round.decimals rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink
    special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr special_ndtri sqrt square tan
    tanh threshold trunc pow.Tensor_Scalar float_power.Tensor_Scalar add.Scalar sub.Scalar rsub.Scalar ne.Scalar
    eq.Scalar gt.Scalar ge.Scalar lt.Scalar le.Scalar bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar
    bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor_Scalar __and__.Scalar __or__.Scalar
    __xor__.Scalar copysign.Scalar greater.Scalar greater_equal.Scalar less.Scalar less_equal.Scalar
    not_equal.Scalar subtract.Scalar divide.Scalar_mode remainder.Scalar fmod.Scalar floor_divide.Scalar
    div.Scalar_mode zeros_like ones_like full_like zero""".split()
BINARY = """add.Tensor sub.Tensor mul.Tensor div.Tensor pow.Tensor_Tensor float_power.Tensor_Tensor maximum
    minimum min.other max.other fmax fmin eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor
    __and__.Tensor __or__.Tensor __xor__.Tensor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor
    bitwise_left_shift.Tensor bitwise_right_shift.Tensor logical_and logical_or logical_xor atan2
    remainder.Tensor fmod.Tensor div.Tensor_mode floor_divide copysign.Tensor heaviside hypot igamma igammac
    ldexp.Tensor logaddexp logaddexp2 nextafter xlogy.Tensor special_xlog1py special_zeta gcd lcm
    clamp_min.Tensor clamp_max.Tensor isclose rsub.Tensor subtract.Tensor multiply.Tensor divide.Tensor
    true_divide.Tensor greater.Tensor greater_equal.Tensor less.Tensor less_equal.Tensor arctan2
    not_equal.Tensor complex polar""".split()
LINEAR_BINARY = {"add.Tensor": 2, "sub.Tensor": 2, "subtract.Tensor": 2, "rsub.Tensor": 2, "complex": 2,
                 "mul.Tensor": 1, "div.Tensor": 1, "multiply.Tensor": 1, "divide.Tensor": 1,
                 "true_divide.Tensor": 1}  # fmt: skip
SAME = """alias clone contiguous detach lift_fresh_copy _to_copy neg negative mul.Scalar div.Scalar
    multiply.Scalar divide.Scalar conj_physical positive deg2rad rad2deg""".split()


def _masked_by_zero(args: Args) -> Linear:
    return (0,) if argument(args, 2) == 0 else ()


def _residual_dropout(args: Args, outputs: object) -> str:
    """(x, bias or None, residual)."""
    return "... d, d, ... d -> ... d" if is_tensor(args[1]) else "..., -, ... -> ..."


RULES: dict[str, Rule] = {f"aten.{n}": Rule("... -> ...") for n in POINTWISE}
RULES |= {f"aten.{n}": Rule("..., ... -> ...", linear=LINEAR_BINARY.get(n, 0)) for n in BINARY}
RULES |= {f"aten.{n}": Rule("... -> ...", linear=-1) for n in SAME}
RULES |= {
    "aten.where.self": Rule("..., ..., ... -> ...", linear=(1, 2)),
    "aten.where.Scalar": Rule("... -> ..."),
    "aten.where.ScalarOther": Rule("..., ... -> ..."),
    "aten.where.ScalarSelf": Rule("..., -, ... -> ..."),
    "aten.masked_fill.Scalar": Rule("..., ... -> ...", linear=_masked_by_zero),
    "aten.masked_fill.Tensor": Rule("..., ...,  -> ..."),
    "aten.fill.Tensor": Rule("..., -> ...", linear=2),
    "aten.copy": Rule("..., ... -> ...", linear=2),
    "aten.lerp.Scalar": Rule("..., ... -> ...", linear=2),
    "aten.fill.Scalar": Rule("... -> ..."),
    "aten.addcmul": Rule("..., ..., ... -> ..."),
    "aten.addcdiv": Rule("..., ..., ... -> ..."),
    "aten.lerp.Tensor": Rule("..., ..., ... -> ..."),
    "aten.clamp.Tensor": Rule("..., ..., ... -> ..."),
    "aten.clip.Tensor": Rule("..., ..., ... -> ..."),
    "aten.frexp.Tensor": Rule("... -> ..., ..."),
    "aten.native_dropout": Rule("... -> ..., ..."),
    "aten.dropout": Rule("... -> ..."),
    "autopart.dropout": Rule("... -> ...", linear=1),
    "autopart.residual_dropout": Rule(_residual_dropout, linear=lambda args: () if is_tensor(args[1]) else (0, 2)),
    "autopart.stochastic_depth": Rule("..., ... -> ...", linear=2),
    "autopart.returned": Rule("... -> ..."),
}
RULES |= {f"aten.{n}": Rule("-, ... -> ...") for n in ("pow.Scalar", "float_power.Scalar", "polygamma")}
