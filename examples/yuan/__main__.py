"""`python -m examples.yuan`: starts the ranks, or is one."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from autopart.compile.bench import report
from autopart.runtime.launch import launch
from examples.yuan import __doc__ as about
from examples.yuan.config import DEFAULT, Config, read
from examples.yuan.data import batch
from examples.yuan.model import MODELS, make
from examples.yuan.trainers import chosen, names, start, train


def main() -> None:
    """Read the configuration; train all that it names."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.yuan", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT, help="a file as examples/yuan/config.toml")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.NAME=VALUE", help="instead of the file's")
    parser.add_argument("--trainers", action="store_true", help="list the trainers and end")
    parser.add_argument("--json", type=Path, help="write the records of both models here")
    options = parser.parse_args()
    try:
        config = read(options.config, options.set)
        kinds = list(MODELS) if config.model.kind == "both" else [config.model.kind]
        if strange := [kind for kind in kinds if kind not in MODELS]:
            raise ValueError(f"there is no model {strange[0]!r}; known are both, {', '.join(MODELS)}")
        chosen(config.trainer)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if options.trainers:
        print("\n".join(names(config.trainer.ranks)))
    elif "RANK" in os.environ:
        run(config, kinds, options.json)
    else:
        sys.exit(launch([sys.executable, "-m", "examples.yuan", *sys.argv[1:]], config.trainer.ranks))


def run(config: Config, kinds: list[str], file: Path | None) -> None:
    """One rank: train every model under every trainer; rank 0 prints a table for each model."""
    warnings.filterwarnings("ignore")
    device, found = start(), {}
    words, tokens = config.model.vocabulary, config.model.tokens
    for kind in kinds:
        made = train(config.trainer, make(kind, config.model), batch(config.data, words, tokens), device, say)
        found[kind] = made
        if dist.get_rank() == 0:
            console = Console(width=None if sys.stdout.isatty() else 170)
            console.print(report.table(made, f"{kind}, {config.trainer.ranks} ranks on {device.type}"))
    if file and dist.get_rank() == 0:
        file.write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
