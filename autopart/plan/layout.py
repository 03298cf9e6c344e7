"""Text within a width: no number is cut, nor parted from its unit."""

import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import zip_longest

WIDEST, NARROWEST = 120, 60
"""Columns of a printed plan: at most, and where the terminal has fewer still."""

_UNIT = re.compile(r"(\d) (s|ms|us|B|KiB|MiB|GiB)\b")
_BREAK = re.compile(r"(?<=[._,])(?=[^\W\d])")


def text_width() -> int:
    """Columns of the terminal, from NARROWEST to WIDEST; WIDEST where there is no terminal."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters.

    A line ends at a space. Within a word that is longer than a line, it ends behind a dot, a comma or an underscore
    that a letter follows.
    """
    lines, line = list[str](), ""
    for word in _UNIT.sub("\\1\u00a0\\2", text).split(" "):
        for index, part in enumerate(_BREAK.split(word) if len(word) > width else [word]):
            longer = f"{line}{' ' * (index == 0)}{part}" if line else part
            if line and len(longer) > width:
                lines.append(line)
                longer = part
            line = longer
    return [each.rstrip().replace("\u00a0", " ") for each in (*lines, line)]


def paragraph(text: str, width: int, indent: int = 0, hanging: int = 2) -> Iterator[str]:
    """The lines of a text, the first indented by `indent`, the others by `hanging` more."""
    first, *others = wrapped(text, width - indent - hanging)
    yield " " * indent + first
    yield from (" " * (indent + hanging) + line for line in others)


def row(cells: Sequence[str], widths: Sequence[int], indent: int) -> Iterator[str]:
    """The lines of a table's row. Cells are wrapped within their widths; a negative width aligns right."""
    columns = [wrapped(cell, abs(width)) for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*columns, fillvalue=""):
        aligned = (
            part.ljust(width) if width > 0 else part.rjust(-width) for part, width in zip(parts, widths, strict=True)
        )
        yield (" " * indent + " ".join(aligned)).rstrip()
