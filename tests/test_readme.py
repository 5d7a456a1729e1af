"""README.md and RULES.md tell the truth: they explain all that the code has, their examples can be used."""

from pathlib import Path

from oncegate.keys.sources import KINDS as SOURCES
from oncegate.messages.problems import KINDS
from oncegate.rules.fields import RULE, UPSTREAM
from oncegate.rules.loading import load_rules
from oncegate.settings.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_problem_is_explained():
    """Whoever gets a problem finds its slug in the README."""
    assert [slug for slug in KINDS if f"`{slug}`" not in README] == []


RULES = (ROOT / "RULES.md").read_text()


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
