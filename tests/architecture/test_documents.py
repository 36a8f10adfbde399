"""The examples run, and the documents tell the truth about commands and packages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme_table import FIGURES, figures_page, with_tables
from plait.recipes.catalog import RECIPES

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ARGUMENTS = {"full_flow": ["4"]}  # steps; all of them take minutes
VERBS = {
    "train", "runs", "evaluate", "sample", "chat", "explain", "debug", "doctor", "invert",
    "forward", "overlap", "price", "calibrate", "compare", "search", "merge",
}  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_runs_and_prints_its_result(path, tmp_path):
    assert len(path.read_text().splitlines()) <= 60
    result = subprocess.run(
        [sys.executable, str(path), *ARGUMENTS.get(path.stem, [])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_every_command_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^plait (\w+)", text, re.MULTILINE)) == VERBS
    assert set(re.findall(r"plait train (\w+)", text)) <= set(RECIPES)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets


def test_the_figures_in_the_documents_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert text == with_tables(text)
    assert FIGURES.read_text() == figures_page()


def test_the_readme_has_no_gaps_left():
    assert "_OUTPUT" not in (ROOT / "README.md").read_text()


def test_every_package_stands_in_the_architecture_document():
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = {path.parent.name for path in (ROOT / "src" / "plait").glob("*/__init__.py")}
    assert [name for name in packages if not re.search(rf"\b{name}\b", text)] == []


def test_every_link_between_documents_leads_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("https:"):
                assert (document.parent / target).exists(), f"{document}: {target}"
