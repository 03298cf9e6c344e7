"""The configuration: a TOML file of three tables, and changes of it from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

DEFAULT = Path(__file__).with_name("config.toml")


@dataclass(frozen=True)
class ModelConfig:
    """kind: of `model.MODELS`, or "both"; sizes of the decoder."""

    kind: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    tokens: int


@dataclass(frozen=True)
class DataConfig:
    """text: a file, "" for Python's standard library; samples of a step over all ranks."""

    text: str
    samples: int
    seed: int


@dataclass(frozen=True)
class TrainerConfig:
    """names: of `trainers.names`, separated by commas, or "all"; steps that count, and `warm_up` before them."""

    names: str
    ranks: int
    optimizer: str
    lr: float
    steps: int
    warm_up: int
    micro_batches: int


@dataclass(frozen=True)
class Config:
    """The three tables."""

    model: ModelConfig
    data: DataConfig
    trainer: TrainerConfig


def read(path: Path = DEFAULT, changes: Sequence[str] = ()) -> Config:
    """The configuration of a file, with changes such as "trainer.ranks=4". Raises ValueError for what is not known."""
    tables = tomllib.loads(path.read_text())
    made = {}
    for table in fields(Config):
        kind, given = globals()[table.type], tables.get(table.name, {})
        _check_known(given, [f.name for f in fields(kind)], f"{path}: [{table.name}]")
        made[table.name] = kind(**given)
    config = Config(**made)
    for change in changes:
        key, _, value = change.partition("=")
        config = _changed(config, *key.partition(".")[::2], value)
    return config


def _changed(config: Config, table: str, name: str, value: str) -> Config:
    _check_known([table], [f.name for f in fields(Config)], "--set")
    part: Any = getattr(config, table)
    _check_known([name], [f.name for f in fields(part)], f"--set {table}")
    return replace(config, **{table: replace(part, **{name: type(getattr(part, name))(value)})})


def _check_known(given: Any, known: Sequence[str], where: str) -> None:
    if strange := [name for name in given if name not in known]:
        raise ValueError(f"{where} has no {strange[0]!r}; known are {', '.join(known)}")
