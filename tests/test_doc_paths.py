"""The explanations and decisions name files and folders that exist."""

import re
from pathlib import Path

import pytest

from tests.parts import tracked

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*(ROOT / "docs/explain").glob("*.md"), *(ROOT / "docs/decisions").glob("*.md"), ROOT / "docs/compare.md"]
)
# A path as the pages write it: relative to the import package or to the project.
PATH = re.compile(r"`((?:[a-z_]+/)+[\w.-]*)`")
# Folders that a run writes, so that a clean checkout lacks them; and a media type.
OTHERS = {"build/chaos", "loadtest/results/", "multipart/form-data"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_that_are_named_exist(page):
    """A module that moves is found here."""
    named = set(PATH.findall(page.read_text())) - OTHERS
    assert [
        path for path in sorted(named) if not any((root / path).exists() for root in (ROOT, ROOT / "proxy/oncegate"))
    ] == []


def test_no_file_has_the_marks_of_a_conflict():
    """Two changes of one place were brought together by hand, whatever the kind of file."""
    marks = re.compile(rb"^(?:<{7}|>{7}) ", re.MULTILINE)
    assert [name for name in tracked() if marks.search((ROOT / name).read_bytes())] == []
