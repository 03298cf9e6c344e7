"""Folders and files of checkpoints: which there are, whether their files are as they were written, which go."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autopart.errors import PartitionError

MANIFEST, STATE, PLAN = "manifest.json", "state.pt", "plan.json"
NAME = re.compile(r"step-(\d+)(\.replaced)?")
"""A checkpoint's folder; `.replaced` is one of the same step that a new one is about to take the place of."""
KNOWN = {"bytes", "sha256"}
"""What a manifest has of a file."""
REPLACED, TEMPORARY = ".replaced", ".tmp"


def folder_of(parent: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return parent / f"step-{step:08d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is, or was, a checkpoint itself."""
    return step_of(folder) >= 0 or any((folder / name).exists() for name in (MANIFEST, STATE))


def step_of(folder: Path) -> int:
    """The step of a checkpoint by its folder's name; -1 for another name."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def checkpoints(parent: Path) -> list[Path]:
    """The checkpoints in a folder, the latest step first."""
    found = [path for path in parent.iterdir() if step_of(path) >= 0] if parent.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(REPLACED)), reverse=True)


def temporary(final: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return final.with_name(f".{final.name}{TEMPORARY}")


def make_empty(folder: Path) -> None:
    """Make a temporary folder. What was left by saves that were cut short is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".step-*{TEMPORARY}"):
        shutil.rmtree(left)
    folder.mkdir()


def digest(file: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file."""
    with open(file, "rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def write_synced(file: Path, content: bytes) -> None:
    """Write a file to the disk itself."""
    with open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def complete(folder: Path, final: Path, digests: Mapping[str, Any]) -> None:
    """Write the manifest and give the checkpoint its name. At every moment one good checkpoint has a name that
    `checkpoints` finds, if one had before."""
    for name in digests:
        if not (folder / name).exists():
            raise PartitionError(
                f"rank 0 does not see {folder / name}",
                "another rank wrote it into a folder of the same name",
                "a folder on a file system that all hosts share",
            )
    write_synced(folder / MANIFEST, (json.dumps(digests, indent=1, sort_keys=True) + "\n").encode())
    _sync(folder)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        _remove(replaced)
        final.rename(replaced)
    folder.rename(final)
    _sync(final.parent)
    _remove(replaced)


def prune(latest: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints of the steps up to that of `latest`."""
    older = [path for path in checkpoints(latest.parent) if step_of(path) <= step_of(latest)]
    for path in older[keep:]:
        _remove(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """File -> its bytes and SHA-256. Raises OSError or ValueError where there is none."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or any(not isinstance(v, dict) or v.keys() != KNOWN for v in manifest.values()):
        raise ValueError("no table of bytes and checksums")
    return manifest


def damages(folder: Path, digests: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What is wrong with files of a checkpoint."""
    return [text for name in names if (text := _damage(folder / name, digests[name]))]


def _damage(file: Path, known: Mapping[str, Any]) -> str:
    try:
        found = digest(file)
    except OSError as error:
        return f"{file}: {error.strerror}"
    if found["bytes"] != known["bytes"]:
        return f"{file} has {found['bytes']} bytes, and {known['bytes']} were written"
    return "" if found == known else f"{file} has another checksum than was written"


def _remove(folder: Path) -> None:
    """Remove a folder under a name that no checkpoint has, so that no part of it is taken for one."""
    if folder.exists():
        gone = temporary(folder)
        folder.rename(gone)
        shutil.rmtree(gone)


def _sync(folder: Path) -> None:
    """Bring a folder's names to the disk itself."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
