"""What a report says besides its plan where the model was traced and planned again: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass

from autopart.plan.search_summary import PointPlan


@dataclass(frozen=True)
class PriceRow:
    """The step after a change of the mesh. `seconds` of a step after the change; None: no plan fits."""

    what: str
    seconds: float | None


@dataclass(frozen=True)
class AlternativeRow(PointPlan):
    """The best plan found with other degrees than the plan's; micro_batch and zero are 0 where no such plan fits.

    memory_bytes  peak bytes of a rank of its fullest stage; None where no such plan fits
    """

    memory_bytes: float | None


@dataclass(frozen=True)
class MemoryBlock:
    """Equal blocks of a stage, and the bytes of one of them at the stage's peak.

    label  the block's name, or those of the first and the last; "" for what several blocks share
    times  number of equal blocks
    rows   (name of a tensor or operator, kind of bytes, bytes), the largest first
    """

    label: str
    times: int
    rows: tuple[tuple[str, str, float], ...]

    @property
    def bytes(self) -> float:
        """Bytes of one block, on one rank."""
        return sum(nbytes for _, _, nbytes in self.rows)


@dataclass(frozen=True)
class Extras:
    """What a report says besides its plan.

    memory        of every stage, its blocks in the order of the model
    prices        the step after changes of the mesh; None where nothing was planned again
    slack         usable bytes of a device less the peak of the fullest stage
    alternatives  the best plan of other degrees
    """

    memory: tuple[tuple[MemoryBlock, ...], ...]
    prices: tuple[PriceRow, ...] | None = None
    slack: float = 0.0
    alternatives: tuple[AlternativeRow, ...] = ()

    def to_json(self) -> Mapping[str, object]:
        """The extras as dicts, lists, numbers and text."""
        return {
            "memory": [[vars(block) for block in blocks] for blocks in self.memory],
            "prices": None if self.prices is None else [vars(row) for row in self.prices],
            "slack_bytes": self.slack,
            "alternatives": [vars(row) for row in self.alternatives],
        }


@dataclass(frozen=True)
class BenchRow:
    """A system of a benchmark.

    system     its name
    what       what it did, or why it is not ranked
    seconds    median of the rounds; None where it is not ranked
    quartiles  the first and the third
    predicted  of the plan, for autopart's own
    ratio      median of its seconds over those of autopart's own plan, round by round
    loss_gap   how far its losses are from the unmodified model's, relatively
    """

    system: str
    what: str
    seconds: float | None
    quartiles: tuple[float, float] | None
    predicted: float | None
    ratio: float | None
    loss_gap: float | None


@dataclass(frozen=True)
class Bench:
    """What a benchmark found: systems in the order of their turns.

    rounds  that count
    where   ranks, device and threads in words
    """

    rows: tuple[BenchRow, ...]
    rounds: int
    where: str
