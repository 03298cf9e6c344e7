"""Puts what a benchmark found into the documents, each table between two markers of its own."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def written_between(document: str, marker: str, text: str) -> str:
    """The document with `text` between `<!-- marker -->` and `<!-- /marker -->`, each of which it has once. A line of
    code in the text that looks like a link is told apart from one."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, rest = document.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{text.replace('](', '] (')}\n{end}{after}"
