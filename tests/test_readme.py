"""README.md and RULES.md tell the truth: their tables are the code's, their examples run."""

import asyncio
import re
import sys
from pathlib import Path

from proxy.presets import pages
from proxy.problems import KINDS
from proxy.rules import load
from proxy.rules.fields import RULE, UPSTREAM
from proxy.settings import Settings, table
from proxy.sources import KINDS as SOURCES
from tests.parts import OK, answering

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


async def test_the_client_pays_once(upstream, valkey, proxies, tmp_path):
    """The README's client gives up on a slow answer, retries with its key, and is charged once."""
    upstream.script = answering(OK, delay_s=1.5)
    proxy = proxies(upstream, valkey.url)
    code = re.search(r"```python\n# client.py.*?\n(.*?)```", README, re.DOTALL)
    assert code is not None
    client = tmp_path / "client.py"
    client.write_text(code[1])
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(client), f"http://127.0.0.1:{proxy.port}", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, out) == (0, b"ok\n")
    assert len(upstream.received) == 1


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
    assert [rule.name for rule in load(settings).rules] == ["stripe events", "orders"]
