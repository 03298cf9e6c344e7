"""Tensors in slices over the ranks of a group.

A tensor's slices are equal parts of the flat tensor; zeros fill up the last. One message holds several tensors of one
dtype, of about `bucket_bytes` together, which bounds the extra memory of messages.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from autopart.cost.message_sizes import BUCKET_BYTES, HOST_BUCKET_BYTES
from autopart.runtime.process_group import Group


def bucket_bytes(group: Group) -> int:
    """The most bytes of a message of several tensors over a group."""
    return BUCKET_BYTES if group.over_nccl else HOST_BUCKET_BYTES


def buckets(tensors: Sequence[Tensor], group: Group, times: int = 1) -> Iterator[list[int]]:
    """Indices of the tensors of each message: of one dtype, and of at most `bucket_bytes` together or a single tensor.

    times  bytes of a message for each byte of a tensor
    """
    waiting: dict[torch.dtype, list[int]] = defaultdict(list)
    size: dict[torch.dtype, int] = defaultdict(int)
    for index, tensor in enumerate(tensors):
        nbytes, dtype = tensor.nbytes * times, tensor.dtype
        if waiting[dtype] and size[dtype] + nbytes > bucket_bytes(group):
            yield waiting.pop(dtype)
            size[dtype] = 0
        waiting[dtype].append(index)
        size[dtype] += nbytes
    yield from waiting.values()


def fill_a_message(tensors: Sequence[Tensor], group: Group) -> bool:
    """Whether these tensors are enough for a message."""
    return sum(tensor.nbytes for tensor in tensors) >= bucket_bytes(group)


Started = Callable[[], tuple[Tensor, Sequence[Tensor]]]
"""Waits for a message that was started, and gives it, flat, and the tensors in it, which are views of it."""


def start_sum(tensors: Sequence[Tensor], group: Group) -> Started:
    """Start to all-reduce tensors in one message. The tensors may be freed; a tensor alone is its own message, if it is
    contiguous.
    """
    alone = len(tensors) == 1 and tensors[0].is_contiguous()
    message = tensors[0].view(-1) if alone else torch.cat([tensor.flatten() for tensor in tensors])
    work = group.start_all_reduce(message)
    shapes = [tensor.shape for tensor in tensors]

    def finish() -> tuple[Tensor, Sequence[Tensor]]:
        work.wait()
        parts = message.split([shape.numel() for shape in shapes])
        return message, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    return finish


def sum_together(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The sums over ranks of tensors, which may be views of a message."""
    sums: dict[int, Tensor] = {}
    for bucket in buckets(tensors, group):
        _, parts = start_sum([tensors[i] for i in bucket], group)()
        sums.update(zip(bucket, parts, strict=True))
    return [sums[i] for i in range(len(tensors))]


def slice_length(elements: int, size: int) -> int:
    """Number of elements of each of `size` slices."""
    return -(-elements // size)


def as_slices(x: Tensor, size: int) -> Tensor:
    """The slices of `x`, one a row: a view of `x` where no zeros are needed."""
    length = slice_length(x.numel(), size)
    lacking = length * size - x.numel()
    flat = x.reshape(-1)
    return (F.pad(flat, (0, lacking)) if lacking else flat).view(size, length)


def gather(slices: Sequence[Tensor], wholes: Sequence[Tensor], group: Group) -> Sequence[Tensor]:
    """All-gather tensors of which `slices` are this rank's, in their own dtype, into `wholes`, which are returned."""
    for bucket in buckets(slices, group, group.size):
        parts = [slices[i].detach().to(wholes[i].dtype) for i in bucket]
        lengths, message = [len(part) for part in parts], parts[0] if len(parts) == 1 else torch.cat(parts)
        del parts
        for rank, share in enumerate(group.all_gather(message)):
            for i, part in zip(bucket, share.split(lengths), strict=True):
                mine = wholes[i].view(-1)[rank * len(part) :][: len(part)]
                mine.copy_(part[: len(mine)])
    return wholes


def start_gather(
    slices: Sequence[Tensor], shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype], group: Group
) -> Callable[[], list[Tensor]]:
    """Start to all-gather tensors of which `slices` are this rank's. The function that is returned waits for the
    messages and gives the whole tensors, of these shapes and dtypes. Each has memory of its own, of which it is the
    beginning; a tensor alone is received where it stays.
    """
    sizes = [
        torch.empty(len(part) * group.size, dtype=dtype, device="meta")
        for part, dtype in zip(slices, dtypes, strict=True)
    ]
    started = []
    for bucket in buckets(sizes, group):
        lengths = [len(slices[i]) for i in bucket]
        received = slices[bucket[0]].new_empty(group.size, sum(lengths), dtype=dtypes[bucket[0]])
        for i, mine in zip(bucket, received[group.rank].split(lengths), strict=True):
            mine.copy_(slices[i].detach())
        started.append((bucket, received, group.start_all_gather(received[group.rank], received)))

    def finish() -> list[Tensor]:
        wholes: dict[int, Tensor] = {}
        while started:
            bucket, received, work = started.pop(0)
            work.wait()
            for i, part in zip(bucket, received.split([len(slices[i]) for i in bucket], 1), strict=True):
                wholes[i] = part.contiguous().view(-1)[: shapes[i].numel()].view(shapes[i])
        return [wholes[i] for i in range(len(slices))]

    return finish


def start_scatter(tensors: Sequence[Tensor], group: Group, dtype: torch.dtype | None = None) -> Started:
    """Start to reduce-scatter tensors in one message, of which come this rank's slices of the sums, in a dtype. The
    tensors may be freed; a tensor alone may be its own message, which leaves it unchanged.
    """
    lengths = [slice_length(tensor.numel(), group.size) for tensor in tensors]
    if len(tensors) == 1 and dtype in (None, tensors[0].dtype):
        message = as_slices(tensors[0], group.size)
    else:
        message = tensors[0].new_empty(group.size, sum(lengths), dtype=dtype)
        for tensor, part in zip(tensors, message.split(lengths, 1), strict=True):
            part.copy_(as_slices(tensor, group.size))
    summed = group.start_reduce_scatter(message)

    def finish() -> tuple[Tensor, Sequence[Tensor]]:
        flat = summed()
        return flat, flat.split(lengths)

    return finish


def scatter_sum(tensors: Sequence[Tensor], group: Group, dtype: torch.dtype | None = None) -> list[Tensor]:
    """This rank's slice of the sum over ranks of each tensor, in a dtype."""
    slices: dict[int, Tensor] = {}
    for bucket in buckets(tensors, group):
        _, parts = start_scatter([tensors[i] for i in bucket], group, dtype)()
        slices.update(zip(bucket, parts, strict=True))
    return [slices[i] for i in range(len(tensors))]
