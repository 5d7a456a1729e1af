"""The README tells the truth: its table is the settings', its client runs."""

import asyncio
import re
import sys
from pathlib import Path

from proxy.problems import KINDS
from proxy.settings import table
from tests.parts import OK, answering

README = (Path(__file__).parent.parent / "README.md").read_text()


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
