"""Normalisations, and operators on images of shape (batch, channels, space)."""

from collections.abc import Sequence

from autopart.sharding.notation import Shape
from autopart.sharding.rules.base import (
    Args,
    Rule,
    Text,
    argument,
    is_tensor,
    letters,
    replaced,
    row,
    spelled,
    whole_last,
)


def _layer_norm(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, normalised shape, weight, bias). Further outputs are statistics, of size 1 in the normalised dims."""
    norm = " ".join(f"{n}!" for n in letters(len(args[1]), "n"))
    ones = " ".join("1" * len(args[1]))
    return f"... {norm}, -, {norm}, {norm} -> {', '.join([f'... {norm}', *[f'... {ones}'] * (len(outputs) - 1)])}"


def _batch_norm(training: int | bool) -> Text:
    """Rows of (input, weight, bias, mean, variance, ...). Statistics of the batch are of all samples and pixels, so
    that only channels are split. `training` says whether they are taken, or which argument says so."""

    def text(args: Args, outputs: Sequence[Shape]) -> str:
        batch = training if isinstance(training, bool) else bool(args[training])
        rank = len(args[0])
        x = [f"{n}!" if batch and i != 1 else n for i, n in enumerate(letters(rank))]
        whole = [f"{n}!" if i != 1 else n for i, n in enumerate(letters(rank))]
        x = whole if any(o and o != (0,) for o in outputs[1:]) else x
        vectors = [["d1"] if is_tensor(a) else None for a in args[1:5]]
        return row([x, *vectors], [x, *(["d1"] if o != (0,) else ["e!"] for o in outputs[1:])])

    return text


def _instance_norm(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, weight, bias, mean, variance, whether statistics are the input's). Samples are split unless there are
    running statistics, which all samples change."""
    names = letters(len(args[0]))
    kept = args[5] and argument(args, 3) is not None
    x = [n if i == 1 or (i == 0 and not kept) or not args[5] else f"{n}!" for i, n in enumerate(names)]
    return row([x, *([["d1"]] * 4)], [x])


def _group_norm(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, groups, weight, bias). Channels are split where each is a group."""
    c = "c" if args[1] == args[0][1] else "c!"
    x = ["b", c, *(f"{n}!" for n in letters(len(args[0]) - 2))]
    return row([x, None, [c], [c]], [x])


def _groups(args: Args, outputs: Sequence[Shape]) -> Args:
    return replaced(args, 1, min(args[1], outputs[0][1]))


def _native_group_norm(args: Args, outputs: Sequence[Shape]) -> str:
    """(input, weight, bias, samples, channels, pixels, groups, eps) -> output, mean, reciprocal deviation."""
    g = args[6]
    c = f"(g {args[4] // g})"
    x = ["b", c, *(f"{n}!" for n in letters(len(args[0]) - 2))]
    return row([x, [c], [c]], [x, ["b", "g"], ["b", "g"]])


def _native_groups(args: Args, outputs: Sequence[Shape]) -> Args:
    b, c = outputs[0][:2]
    return (*args[:3], b, c, args[5], args[6] * c // args[4], *args[7:])


def _weight_norm(args: Args, outputs: Sequence[Shape]) -> str:
    """(directions, lengths, dim). There is a length for every index along the dim, or one for all where it is -1."""
    dim = argument(args, 2, 0)
    names = [n if i == dim else f"{n}!" for i, n in enumerate(letters(len(args[0])))]
    lengths = [n if size == args[0][i] != 1 else "1" for i, (n, size) in enumerate(zip(names, args[1], strict=False))]
    return row([names, lengths], [names])


def _prelu(args: Args, outputs: Sequence[Shape]) -> str:
    names = letters(len(args[0]))
    one = not args[1] or args[1][0] == 1
    return row([names, ["1"] * len(args[1]) if one else ["d1"]], [names])


def _im2col(args: Args, outputs: Sequence[Shape]) -> str:
    """(image, window, ...). The output's first dim has the windows of one channel behind those of another."""
    lead, window = letters(len(args[0]) - 3), args[1][0] * args[1][1]
    return row([[*lead, "c", "h!", "w!"]], [[*lead, f"(c {window})", "l!"]])


def _col2im(args: Args, outputs: Sequence[Shape]) -> str:
    """(columns, size, window, ...)."""
    lead, window = letters(len(args[0]) - 2), args[2][0] * args[2][1]
    return row([[*lead, f"(c {window})", "l!"]], [[*lead, "c", "h!", "w!"]])


def _grid_sampler(args: Args, outputs: Sequence[Shape]) -> str:
    """(image, coordinates)."""
    space = len(args[0]) - 2
    to = letters(space, "z")
    return row([["b", "c", *(f"a{i}!" for i in range(space))], ["b", *to, str(space)]], [["b", "c", *to]])


def _affine_grid(args: Args, outputs: Sequence[Shape]) -> str:
    """(matrices, size of the image)."""
    return f"b x! y! -> b {' '.join(f'{n}!' for n in letters(len(args[1]) - 1))}"


def _affine_size(args: Args, outputs: Sequence[Shape]) -> Args:
    return replaced(args, 1, [outputs[0][0], *args[1][1:]])


def _channel_shuffle(args: Args, outputs: Sequence[Shape]) -> str:
    x = spelled(args[0], [1])
    return row([x], [x])


LINEAR = """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    avg_pool1d avg_pool2d avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa""".split()
OTHER = """max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d""".split()


def _spaces(name: str) -> int:
    return next(int(c) for c in name if c.isdigit())


RULES: dict[str, Rule] = {
    "aten.layer_norm": Rule(_layer_norm),
    "aten.native_layer_norm": Rule(_layer_norm),
    "aten.rms_norm": Rule(_layer_norm),
    "aten._fused_rms_norm": Rule(_layer_norm),
    "aten.batch_norm": Rule(_batch_norm(5)),
    "aten.native_batch_norm": Rule(_batch_norm(5)),
    "aten._native_batch_norm_legit_functional": Rule(_batch_norm(5)),
    "aten._native_batch_norm_legit.no_stats": Rule(_batch_norm(3)),
    "aten._native_batch_norm_legit_no_training": Rule(_batch_norm(False)),
    "aten.instance_norm": Rule(_instance_norm),
    "aten.group_norm": Rule(_group_norm, resize=_groups),
    "aten.native_group_norm": Rule(_native_group_norm, resize=_native_groups),
    "aten._weight_norm": Rule(_weight_norm, linear=(1,)),
    "aten.prelu": Rule(_prelu),
    "aten.im2col": Rule(_im2col, linear=-1),
    "aten.col2im": Rule(_col2im, linear=-1),
    "aten.grid_sampler": Rule(_grid_sampler),
    "aten.grid_sampler_2d": Rule(_grid_sampler),
    "aten.grid_sampler_3d": Rule(_grid_sampler),
    "aten.affine_grid_generator": Rule(_affine_grid, linear=-1, resize=_affine_size),
    "aten.channel_shuffle": Rule(_channel_shuffle, linear=-1),
    "aten.native_channel_shuffle": Rule(_channel_shuffle, linear=-1),
}
RULES |= {f"aten.{n}": Rule(whole_last(_spaces(n)), linear=-1) for n in LINEAR}
RULES |= {f"aten.{n}.vec": Rule(whole_last(_spaces(n)), linear=-1) for n in LINEAR if "upsample" in n}
RULES |= {f"aten.{n}": Rule(whole_last(_spaces(n))) for n in OTHER}
