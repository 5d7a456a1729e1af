"""What docs/how-to/llm.md says of the SDKs: which of them mark their retries, and how each sends a key."""

import asyncio
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.parts import ROOT
from tests.real.clients.api import Api
from tests.real.clients.clients import CALLERS_KEY, CLIENTS, LLM, MARKED
from tests.real.clients.run import started
from tests.real.parts import CLIENTS as PYTHON
from tests.real.parts import INSTALLED, NODE_MODULES

pytestmark = [INSTALLED, pytest.mark.timeout(300)]
UNKEYED = [one for one in CLIENTS if one.group == LLM and one.sends != CALLERS_KEY]
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"
MARK = b"x-stainless-retry-count"


class Overloaded(Api):
    """An API that answers 503 to the first request."""

    def __init__(self) -> None:
        super().__init__()
        self.script, self._answers = self._unavailable, self.script  # type: ignore[assignment]

    async def _unavailable(self, *arguments: object) -> None:
        if len(self.received) > 1:
            await self._answers(*arguments)  # type: ignore[arg-type]
        else:
            arguments[2].write(UNAVAILABLE)  # type: ignore[attr-defined]


@pytest.mark.parametrize("client", UNKEYED, ids=lambda client: client.label)
async def test_a_retry_is_marked_by_stainless_alone(client, tmp_path):
    """The other SDKs send the same bytes again, so that nothing tells a retry from a new request."""
    api = Overloaded()
    await api.start()
    api.begin("hi")
    async with started(client, "/none", tmp_path) as program:
        await program.said()
        order = {"prompt": "hi", "url": api.url, "key": None, "stream": False, "timeout_s": 30, "retries": True}
        assert "answer" in await program.call(order)
    await api.close()
    first, second = ({name.lower(): value for name, value in got.headers} for got in api.received)
    assert api.received[0].body == api.received[1].body
    changed = {name: (first.get(name), second.get(name)) for name in first | second if first.get(name) != second[name]}
    assert changed == ({MARK: (b"0", b"1")} if client.sends == MARKED else {})
    assert not any(b"idempotency" in name for name in first)


# The code of the page ...

PAGE = (ROOT / "docs/how-to/llm.md").read_text().partition("## A key from each SDK")[2].partition("\n## ")[0]
BLOCKS = {
    name: (kind, code) for name, kind, code in re.findall(r"^\*\*(.*?)\*\*.*?```(\w+)\n(.*?)```", PAGE, re.M | re.S)
}
BEFORE = {
    "python": 'job_key, prompt = "job-1", "hi"\nmessages = [{"role": "user", "content": prompt}]\n',
    "js": 'const jobKey = "job-1", prompt = "hi";\nconst messages = [{ role: "user", content: prompt }];\n',
}
KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "MISTRAL_API_KEY", "CO_API_KEY", "GROQ_API_KEY")


async def run(kind: str, code: str, url: str, folder: Path) -> None:
    """Run a block of the page as a program of its own, with the proxy's address."""
    code = BEFORE[kind] + code.replace("http://127.0.0.1:8080", url)
    program = folder / ("block.py" if kind == "python" else "block.mjs")
    program.write_text(code)
    if kind == "js" and not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(NODE_MODULES)
    command = [str(PYTHON), "-W", "ignore"] if kind == "python" else [str(shutil.which("node"))]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)} | dict.fromkeys(KEYS, "k-1")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, str(program), stdout=pipe, stderr=asyncio.subprocess.STDOUT, env=environment
    )
    output, _ = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode == 0, output.decode()


@pytest.mark.parametrize("name", BLOCKS)
async def test_a_key_of_the_page_is_sent(name, fork, valkey, tmp_path):
    """The block runs twice, as after a crash: what has the job's key executes once, and no call goes without a key."""
    api = Api()
    await api.start()
    api.begin("hi")
    (tmp_path / "rules.toml").write_text('[[rule]]\nname = "llm"\npreset = "gemini"\n')
    proxy = await fork(api.url, valkey.url, RULES_FILE="rules.toml")
    kind, code = BLOCKS[name]
    for _ in range(2):
        await run(kind, code, f"http://127.0.0.1:{proxy.port}", tmp_path)
    await api.close()
    keys = [got.header("idempotency-key") for got in api.received]
    assert all(keys)
    assert keys.count([b"job-1"]) == 1
    assert proxy.metric('requests_total{outcome="replayed"}') >= 1


def test_every_sdk_of_the_table_has_its_block():
    """Each SDK that the table of clients has is on the page with its code, or beside one that is called alike."""
    named = {name.partition(" (")[0] for name in re.findall(r"\*\*(.*?)\*\*", PAGE)}
    assert {one.name for one in UNKEYED} <= named
