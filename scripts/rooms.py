"""Writes what the imports and docstrings of autopart/ say into the documents: the table of files, and a drawing.

    python scripts/rooms.py          renews docs/architecture.md between its markers, and docs/rooms.svg
    python scripts/rooms.py --check  ends with status 1 where they are not as they would be written

A room is a folder or a lone file of autopart/. An arrow goes from a room to each room that it imports and that no other
room it imports leads to (the transitive reduction of the imports).
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "autopart"
DOCUMENT = ROOT / "docs" / "architecture.md"
DRAWING = ROOT / "docs" / "rooms.svg"
START, END = "<!-- files: start -->", "<!-- files: end -->"
WIDTH, HEIGHT, ACROSS, DOWN = 150, 34, 170, 74


def files() -> dict[Path, ast.Module]:
    """Every file of the package, parsed, by its path within the package."""
    return {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def room(path: Path) -> str:
    """The room of a file."""
    return path.parts[0].removesuffix(".py")


def imports(trees: dict[Path, ast.Module]) -> networkx.DiGraph:
    """Room -> room that a file of it imports."""
    graph = networkx.DiGraph()
    for path, tree in trees.items():
        graph.add_node(room(path))
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == "autopart" and len(parts) > 1 and parts[1] != room(path):
                    graph.add_edge(room(path), parts[1])
    return graph


def sentence(tree: ast.Module) -> str:
    """The first sentence of a file's docstring, without its full stop."""
    text = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")


def table(trees: dict[Path, ast.Module]) -> str:
    """A heading for every room, what its `__init__` says, and a row for every file."""
    rooms: dict[str, list[Path]] = defaultdict(list)
    for path in trees:
        rooms[room(path) if len(path.parts) > 1 else ""].append(path)
    return "\n".join(line for name in sorted(rooms) for line in _rows(name, rooms[name], trees))


def _rows(name: str, paths: list[Path], trees: dict[Path, ast.Module]) -> Iterator[str]:
    package = Path(name, "__init__.py")
    yield f"### `autopart/{name}{'/' if name else ''}`\n"
    if package in trees:
        yield f"{sentence(trees[package])}.\n"
    yield "| file | job |\n|---|---|"
    for path in paths:
        if path.name != "__init__.py" or path.parent != Path(name):
            yield f"| `{path.as_posix()}` | {sentence(trees[path]).replace('|', '&#124;')} |"
    yield ""


def drawing(graph: networkx.DiGraph) -> str:
    """The rooms on their floors, the lowest at the bottom, as SVG."""
    reduced = networkx.transitive_reduction(graph)
    floors = list(networkx.topological_generations(reduced.reverse()))
    widest = max(map(len, floors))
    width, height = widest * ACROSS + 20, len(floors) * DOWN + 20
    at = {
        name: (width / 2 + (i - (len(names) - 1) / 2) * ACROSS, height - 10 - (floor + 0.5) * DOWN)
        for floor, names in enumerate(floors)
        for i, name in enumerate(sorted(names))
    }
    arrows = [
        f'<path d="M{x:.0f} {y + HEIGHT / 2:.0f} L{u:.0f} {v - HEIGHT / 2 - 4:.0f}"/>'
        for (x, y), (u, v) in ((at[a], at[b]) for a, b in sorted(reduced.edges))
    ]
    boxes = [
        f'<rect x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}">{"autopart" if name == "__init__" else name}</text>'
        for name, (x, y) in at.items()
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
            "<title>The rooms of autopart/: an arrow goes from a room to those that it imports</title>",
            "<style>rect{fill:#eef3f8;stroke:#34506b}path{stroke:#34506b;fill:none;marker-end:url(#tip)}"
            "text{font:15px monospace;text-anchor:middle;fill:#14212e}</style>",
            '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
            '<path d="M0 0 L9 4 L0 8 z" style="fill:#34506b;stroke:none;marker-end:none"/></marker></defs>',
            '<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>',
            *arrows,
            *boxes,
            "</svg>\n",
        ]
    )


def written() -> dict[Path, str]:
    """Every file this script writes -> its text."""
    trees = files()
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return {
        DOCUMENT: f"{before}{START}\n\n{table(trees)}\n{END}{after}",
        DRAWING: drawing(imports(trees)),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, tell by the exit status")
    check = parser.parse_args().check
    for path, text in written().items():
        if check and (not path.exists() or path.read_text() != text):
            sys.exit(f"{path.relative_to(ROOT)} is not what python scripts/rooms.py writes")
        if not check:
            path.write_text(text)


if __name__ == "__main__":
    main()
