"""README.md and RULES.md tell the truth: their tables are the code's, their examples can be used."""

import re
from pathlib import Path

from oncegate.keys.sources import KINDS as SOURCES
from oncegate.messages.problems import KINDS
from oncegate.rules.fields import RULE, UPSTREAM
from oncegate.rules.loading import load_rules
from oncegate.rules.presets import pages
from oncegate.settings.loading import table
from oncegate.settings.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_settings_table_is_generated():
    """The table stands in the README as the settings tell it; `make readme` writes it."""
    found = re.search(r"<!-- settings: .*? -->\n(.*?)<!-- end of settings -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == table()


def test_every_problem_is_explained():
    """Whoever gets a problem finds its slug in the README."""
    assert [slug for slug in KINDS if f"`{slug}`" not in README] == []


RULES = (ROOT / "RULES.md").read_text()


def test_the_presets_pages_are_generated():
    """The pages stand in RULES.md as the presets tell them; `make readme` writes them."""
    found = re.search(r"<!-- presets: .*? -->\n\n(.*?)<!-- end of presets -->", RULES, re.DOTALL)
    assert found is not None
    assert found[1] == pages()


def test_every_field_and_source_of_a_rule_is_explained():
    """Each has its place in a table, or in the sentence on upstreams."""
    names = {*RULE, *UPSTREAM, *(f"{word}:" for word in SOURCES)}
    assert [name for name in names if f"`{name}" not in RULES] == []


def test_the_rules_that_are_shown_can_be_used(tmp_path):
    """The example is a rules file without a mistake."""
    example = RULES.partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "rules.toml").write_text(example)
    settings = Settings(upstream="http://api.test", rules_file=str(tmp_path / "rules.toml"))
    assert [rule.name for rule in load_rules(settings).rules] == ["stripe events", "orders"]
