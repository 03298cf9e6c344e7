"""Writes what a benchmark found into the documents, each table between two markers of its own."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->` in a document that has both once. A line of
    code in the text that looks like a link is told apart from one."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, rest = path.read_text().split(start)
    _, after = rest.split(end)
    path.write_text(f"{before}{start}\n{text.replace('](', '] (')}\n{end}{after}")
