"""Bytes that operators of a graph read and write."""

from torch import fx

from autopart.ir.graph import info, is_pick, meta_of
from autopart.kernels.table import kernel_of

VIEWS = """reshape transpose.int permute unsqueeze squeeze.dim expand t slice.Tensor select.int split.Tensor
split_with_sizes unbind.int""".split()
"""Operators that move nothing."""


def traffic(node: fx.Node) -> float:
    """Bytes that an operator reads and writes: every operand and result once, and what a kernel of several passes reads
    and writes between them."""
    name = info(node).name
    if is_pick(node) or name.removeprefix("aten.") in VIEWS:
        return 0.0
    kernel = kernel_of(name)
    if kernel is not None and kernel.streamed is not None:
        return float(kernel.bytes_moved(*fx.map_arg(tuple(node.args), meta_of)).forward)
    return float(sum(info(n).bytes for n in (node, *node.all_input_nodes)))
