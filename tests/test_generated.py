"""What `make docs` writes is up to date: the generated parts of the pages, and the copies of the examples."""

import re
from pathlib import Path

import pytest

from docs import generate
from oncegate.commands import init

ROOT = Path(__file__).parent.parent

PAGES = [page for page in generate.pages() if "<!-- generated:" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_up_to_date(page: Path) -> None:
    """Every generated part has a source that exists, an end, and the content that `make docs` writes."""
    text = page.read_text()
    assert len(generate.BLOCK.findall(text)) == text.count("<!-- generated:") == text.count("<!-- end")
    assert generate.filled(text) == text, "run make docs"


@pytest.mark.parametrize("source", generate.SOURCES)
def test_sources_write_whole_lines(source: str) -> None:
    """What a source returns begins and ends at the beginning of a line, and closes no marker."""
    text = generate.content(source)
    assert text.endswith("\n")
    assert "<!--" not in text
    assert text.count("```") % 2 == 0


def test_an_unknown_source_is_an_error() -> None:
    with pytest.raises(KeyError):
        generate.filled("<!-- generated: by make docs from nothing -->\n<!-- end -->\n")


def test_the_settings_and_presets_are_generated_somewhere() -> None:
    """The table of settings and the pages of presets are on a page."""
    everything = "".join(page.read_text() for page in PAGES)
    assert "<!-- generated: by make docs from oncegate.settings.loading -->" in everything
    assert "<!-- generated: by make docs from oncegate.rules.presets -->" in everything


@pytest.mark.parametrize("case", init.CASES)
def test_copies_of_the_examples(case: str) -> None:
    """config/ has the very files that `oncegate init` writes."""
    for name in init.FILES:
        assert (ROOT / "config" / case / name).read_bytes() == init.example(case, name), "run make docs"


def test_every_example_has_a_name() -> None:
    """The package has both files for each case that `oncegate init` takes, and for the general start."""
    folder = ROOT / "proxy/oncegate/examples"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {f"{case}/{name}" for case in (*init.CASES, init.GENERAL) for name in init.FILES}


def test_metrics_are_named_as_they_are_scraped() -> None:
    """The table has the names and types of a scrape."""
    names = re.findall(r"^\| `(\w+)` \| (\w+) \|", generate.metrics(), re.MULTILINE)
    text = generate.empty_metrics().text()[0].decode()
    scraped = re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE)
    known = dict(names)
    assert {name for name, kind in scraped if not name.endswith("_created")} == set(known)
