"""CHANGELOG.md lists every name that changed between 0.1 and 0.2, old and new side by side."""

import re
from pathlib import Path

import pytest
import typer

from omnivideo.cli.main import app
from omnivideo.settings import RENAMED_SETTINGS
from omnivideo.storage.database.migrations.versions import v0003_names

CHANGELOG = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()


def read_rows(section: str) -> list[list[str]]:
    """Return the cells of every table row under the heading `### Changed: SECTION`."""
    (text,) = re.findall(rf"^### Changed: {section}\n(.*?)(?=^##)", CHANGELOG, flags=re.M | re.S)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def list_cli_flags(command: typer.core.TyperGroup | typer.core.TyperCommand) -> set[str]:
    if isinstance(command, typer.core.TyperGroup):
        return set().union(*(list_cli_flags(child) for child in command.commands.values()))
    return {flag for parameter in command.params for flag in parameter.opts}


def test_every_renamed_setting_is_listed():
    assert [[f"`{old}`", f"`{new}`"] for old, new in RENAMED_SETTINGS.items()] == read_rows("settings")[1:]


def test_every_renamed_table_column_and_index_is_listed():
    rows = read_rows("database")
    for old, new in v0003_names.TABLES.items():
        assert [f"`{old}`", f"`{new}`"] in rows
    for table, columns in v0003_names.COLUMNS.items():
        for old, new in columns.items():
            assert [f"`{table}`", f"`{old}`", f"`{new}`"] in rows
    for old, new, _, _ in v0003_names.INDEXES:
        assert [f"`{old}`", f"`{new}`"] in rows


def test_the_new_flags_exist_and_the_old_ones_do_not():
    flags = list_cli_flags(typer.main.get_command(app))
    rows = read_rows("command-line flags")[1:]
    new_flags = {flag for row in rows for flag in re.findall(r"--[\w-]+", row[2])}
    assert len(new_flags) >= 14
    assert new_flags <= flags
    unambiguous = {flag for row in rows for flag in re.findall(r"--[\w-]+", row[1])}
    assert not unambiguous & flags


def test_every_renamed_json_field_is_listed():
    cells = " ".join(" ".join(row) for row in read_rows("JSON of our own routes"))
    documents = [fields for _, _, columns in v0003_names.DOCUMENTS for fields in columns.values() if fields]
    names = {pair for fields in [*documents, *v0003_names.EVENTS.values()] for pair in iterate_renames(fields)}
    for old, new in names - {("reply", "is_reply")}:  # a turn's body in the database, which no route shows
        assert f"`{old}`" in cells or f".{old}`" in cells, old
        assert f"`{new}`" in cells or f".{new}`" in cells, new


def iterate_renames(fields: v0003_names.Fields) -> set[tuple[str, str]]:
    """Return (old, new) of every field in a document's tree, except those that keep their name."""
    pairs = {(old, new) for old, (new, _) in fields.items() if old != new}
    return pairs.union(*(iterate_renames(inner) for _, inner in fields.values()))


@pytest.mark.parametrize("heading", ["Upgrading from 0.1", "Changed: Python SDK"])
def test_the_changelog_has_its_sections(heading):
    assert f"### {heading}\n" in CHANGELOG


def test_files_named_in_the_guides_exist():
    """CONTRIBUTING.md names files for each kind of change; `api/web/` is the only one still to be created."""
    root = Path(__file__).parents[2]
    for page in (root / "CONTRIBUTING.md", root / "docs" / "architecture.md", *(root / "docs/decisions").glob("*.md")):
        for name in re.findall(r"`((?:omnivideo|tests|docs)/[\w./]+\.\w+)`", page.read_text()):
            assert (root / name).exists(), f"{page.name}: {name}"
