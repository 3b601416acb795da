"""README and docs: links lead somewhere, commands are all there, scripts exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from yolov8_nas.commands.main import app

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made of their words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_a_page_names_exist(page: Path) -> None:
    for script in re.findall(r"\b(?:benchmarks|examples|tests)/[\w/]+\.(?:py|yaml|md|sh)\b", page.read_text()):
        assert (ROOT / script).exists(), f"{page.name}: {script}"


def _commands(command: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names of every command that is shown, its groups' before its own."""
    parts = getattr(command, "commands", None)
    if parts is None:
        yield names
    for name, part in (parts or {}).items():
        if not part.hidden:
            yield from _commands(part, (*names, name))


def test_every_command_is_described() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    rows = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    commands = list(_commands(typer.main.get_command(app)))
    assert ("models", "best") in commands
    for group, *rest in commands:
        words = [re.findall(r"[\w-]+", row) for row in rows]
        assert any(group in row and set(rest) <= set(row) for row in words), (group, *rest)


def test_the_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
