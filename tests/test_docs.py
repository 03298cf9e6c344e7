"""The documents name files, sections, commands and options that exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from autopart.cli.main import app
from benchmarks.figures import FIGURES, written
from benchmarks.support.documents import DOCS, written_between

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FOLDERS = (ROOT, ROOT / "autopart")
EMITTED = re.compile(r"\d{3}_\w+\.txt|stage_\d\.py|run\.py|plan\.json|modeling_\w+\.py")
"""Files of the dump of passes, of the emitted folder, and of transformers."""
documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)


def anchors(path: Path) -> set[str]:
    """What a link to a section of a document may end in."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path: Path, program: str) -> list[list[str]]:
    """The words of every command of a program in a document, in code blocks and in backticks."""
    text = path.read_text()
    lines = [
        *re.findall(rf"^    (?:\w+=\S+ )*{program} (.*)", text, re.MULTILINE),
        *re.findall(rf"`{program} ([^`]*)`", text),
    ]
    return [shlex.split(line.split("  ")[0]) for line in lines]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 200


@documents
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        file, _, section = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        assert not section or section in anchors(there), target


@documents
def test_files_exist(path: Path) -> None:
    names = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|toml|json|txt|md)|(?:[\w.-]+/)+)`", path.read_text())
    lost = [n for n in names if not EMITTED.fullmatch(n) and not any((folder / n).exists() for folder in FOLDERS)]
    assert not lost


@documents
def test_commands_of_the_shell_have_their_options(path: Path) -> None:
    group = typer.main.get_command(app)
    for words in commands(path, "autopart"):
        name, *rest = words
        known = {option for p in group.commands[name].params for option in p.opts} if name in group.commands else None
        assert known is not None or name == "--help", words
        assert not {w for w in rest if w.startswith("--")} - (known or set()), words


@documents
def test_benchmarks_have_their_options(path: Path) -> None:
    for flag, *rest in commands(path, "python"):
        if flag == "-m" and rest[0].startswith("benchmarks."):
            path = ROOT / rest[0].replace(".", "/")
            source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
            assert all(f'"{word}"' in source for word in rest if word.startswith("--")), rest


@documents
def test_targets_of_make_exist(path: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[0] for words in commands(path, "make")} <= targets


@documents
def test_python_is_python(path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        ast.parse(code)


def test_a_table_is_written_between_its_markers() -> None:
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    for table in ("first", "second"):
        text = written_between(text, "x", table)
    assert text == "a\n<!-- x -->\nsecond\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"


@pytest.mark.parametrize("marker", FIGURES)
def test_a_document_has_a_place_for_every_table(marker: str) -> None:
    document = (DOCS / FIGURES[marker][0]).read_text()
    assert f"<!-- {marker} -->\na new table\n<!-- /{marker} -->" in written_between(document, marker, "a new table")


def test_tables_are_of_the_last_results() -> None:
    """`make figures` renews them."""
    stale = [path.name for path, text in written().items() if path.read_text() != text]
    assert not stale


def test_the_table_of_files_is_what_the_files_say() -> None:
    """`make figures` renews it."""
    done = subprocess.run([sys.executable, "scripts/rooms.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
