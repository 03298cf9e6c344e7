"""Which checkpoint is loaded: the latest whose files are as they were written."""

import warnings
from pathlib import Path

from autopart.errors import PartitionError, few
from autopart.runtime.checkpoint import files
from autopart.runtime.checkpoint.together import together
from autopart.runtime.process_group import Group


def choose(folder: Path, group: Group) -> Path:
    """The checkpoint that `folder` is, or the latest good one in it. All ranks call it; they read about as many bytes
    each.

    A damaged one is passed over with a warning that names its files. Raises PartitionError, on every rank, where there
    is none, and where `folder` is a checkpoint itself and is damaged.
    """

    def known() -> list[Path] | None:
        return None if files.is_checkpoint(folder) else files.checkpoints(folder)

    found = group.all_gather_object(together(group, known, f"{folder} cannot be read", only=0))[0]
    if found is None:
        if wrong := _wrong(folder, group):
            raise PartitionError(
                f"the checkpoint {folder} is damaged",
                few(wrong, joint="; "),
                "another one; of the folder that it is in, load takes the last good one",
            )
        return folder
    for path in found:
        wrong = _wrong(path, group)
        if not wrong:
            return path
        if group.rank == 0:
            warnings.warn(f"autopart: the checkpoint {path} is damaged: {few(wrong, joint='; ')}", stacklevel=4)
    damaged = f"all {len(found)} are damaged" if found else "it has no folder such as step-00000120"
    raise PartitionError(f"there is no checkpoint in {folder}", damaged, "a folder that compiled.save was given")


def _wrong(path: Path, group: Group) -> list[str]:
    """What is wrong with a checkpoint's files, each of which one rank reads."""

    def mine() -> list[str]:
        try:
            digests = files.read_manifest(path)
        except (OSError, ValueError) as error:
            return [f"{path / files.MANIFEST}: {error}"]
        return files.damages(path, digests, sorted(digests)[group.rank :: group.size])

    everyone = group.all_gather_object(together(group, mine, f"the checkpoint {path} cannot be read"))
    return list(dict.fromkeys(text for wrong in everyone for text in wrong))
