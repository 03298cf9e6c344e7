"""Whole tensors of the model, one at a time on rank 0, from what the ranks hold.

Every rank says once what it holds. Then, name by name, ranks send their pieces to rank 0, which puts them together. A
rank holds one piece more than its own; rank 0 holds one tensor.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopart.runtime.agreement import bytes_of, from_first
from autopart.runtime.parameters import Origin
from autopart.runtime.process_group import Group
from autopart.runtime.rank_state import RankState
from autopart.runtime.whole import Place, assemble
from autopart.sharding.notation import Placement


@dataclass(frozen=True)
class Piece:
    """What one rank sends of a tensor.

    rank    of the sender, among all
    placed  the tensor's placement along every axis
    at      the sender's rank along (dp, tp)
    shape   of the piece, of `dtype`
    shard   the shape of which the pieces of the dp ranks are flat slices; None: the piece is no slice
    """

    rank: int
    placed: Mapping[str, Placement]
    at: Place
    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: tuple[int, ...] | None


def whole_tensors(
    compiled: RankState, names: Iterable[str], masters: bool = False
) -> Iterator[tuple[str, Tensor | None]]:
    """Each name with its whole tensor on the CPU of rank 0; with None on other ranks. All ranks must take all.

    names    first names of tied parameters, and buffers
    masters  whether trained weights are the optimizer's copies in the master dtype, where there are such

    A tensor that no stage computes with has the value that was loaded, or the model's own.
    """
    held = _held(compiled, masters)
    pieces = _pieces(held, compiled)
    own = {**dict(compiled.model.named_buffers(remove_duplicate=False)), **dict(compiled.model.named_parameters())}
    host = compiled.groups.host
    for name in names:
        if host.rank == 0:
            if pieces.get(name):
                received = [
                    (piece, _receive(piece, held[name][0] if piece.rank == 0 else None, host)) for piece in pieces[name]
                ]
                yield name, _together(received)
            else:
                yield name, compiled.unused_tensors.get(name, own[name]).detach().cpu()
        else:
            for piece in pieces.get(name, ()):
                if piece.rank == host.rank and held[name][0].numel():
                    host.send(bytes_of(_sent(held[name][0], piece)), 0).wait()
            yield name, None


def _held(compiled: RankState, masters: bool) -> dict[str, tuple[Tensor, Piece]]:
    """This rank's tensors with the pieces that it would send: over the ranks of a stage each part comes once."""
    shared, groups = compiled.executor.shared, compiled.groups
    place = {"dp": groups.dp.rank, "tp": groups.tp.rank}
    found: dict[str, tuple[Tensor, Piece]] = {}

    def hold(origin: Origin, value: Tensor, dtype: torch.dtype, local: Sequence[int]) -> None:
        if all(p.kind == "S" or groups.holders(origin.sliced, axis).rank == 0 for axis, p in origin.placed.items()):
            piece = Piece(
                groups.rank, origin.placed, (place["dp"], place["tp"]), tuple(value.shape), dtype,
                tuple(local) if origin.sliced else None,
            )  # fmt: skip
            found[origin.name] = value.detach(), piece

    for _, weight in compiled.stage.named_parameters():
        share: Any = shared.best_of(weight) if shared.copies else weight
        used, local = weight.dtype, weight.shape
        if weight.origin.sliced:  # type: ignore[attr-defined]
            used, local = weight.slicing.dtype, weight.slicing.shape  # type: ignore[attr-defined]
        hold(share.origin, share, share.dtype if masters else used, local)
    for path, buffer in compiled.stage.named_buffers():
        hold(compiled.origins[path], buffer, buffer.dtype, buffer.shape)
    return found


def _pieces(held: Mapping[str, tuple[Tensor, Piece]], compiled: RankState) -> dict[str, list[Piece]]:
    """Every tensor's pieces, of the first stage that has it; the same on every rank."""
    groups = compiled.groups
    chosen: dict[str, list[Piece]] = {}
    for given in groups.host.gather({name: piece for name, (_, piece) in held.items()}):
        for name, piece in given.items():
            pieces = chosen.setdefault(name, [])
            stage = groups.dp.size * groups.tp.size
            if not pieces or pieces[0].rank // stage == piece.rank // stage:
                pieces.append(piece)
    agreed: dict[str, list[Piece]] = from_first(chosen, groups.host)
    return agreed


def _sent(value: Tensor, piece: Piece) -> Tensor:
    return value.to("cpu", piece.dtype).contiguous()


def _receive(piece: Piece, own: Tensor | None, host: Group) -> Tensor:
    """A piece, from the rank that has it, or a copy of rank 0's own."""
    if own is not None:
        return _sent(own, piece).clone()
    value = torch.empty(piece.shape, dtype=piece.dtype)
    if value.numel():
        host.receive(bytes_of(value), piece.rank).wait()
    return value


def _together(received: Sequence[tuple[Piece, Tensor]]) -> Tensor:
    """The whole tensor of its pieces."""
    first = received[0][0]
    if first.shard is not None:
        by_tp: dict[int, list[Tensor]] = {}
        for piece, value in received:
            by_tp.setdefault(piece.at[1], []).append(value)
        elements = torch.Size(first.shard).numel()
        shards = {(0, t): torch.cat(slices)[:elements].view(first.shard) for t, slices in by_tp.items()}
    else:
        shards = {piece.at: value for piece, value in received}
    return assemble({"": (first.placed, at, value)} for at, value in shards.items())[""]
