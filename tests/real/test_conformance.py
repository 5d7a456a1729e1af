"""The public conformance suite of MCP against a real server: what it says is the same through the proxy."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.real.parts import INSTALLED, NODE_MODULES

pytestmark = [INSTALLED, pytest.mark.timeout(180)]
PROGRAMS = Path(__file__).parent / "agents"
KEYED = '[[rule]]\nname = "tools"\npath = "/mcp"\npreset = "mcp"\n'
# The suite sends no keys. Under the last rule each of its calls has one.
RULES = {"no rule": None, "mcp": KEYED, "every call": KEYED + 'key = "derived:60"\n'}


class Everything(NamedTuple):
    """A server with all that the suite asks for."""

    url: str
    folder: Path


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Everything]:
    folder = tmp_path_factory.mktemp("everything")
    for one in PROGRAMS.glob("*.mjs"):
        shutil.copy(one, folder)
    (folder / "node_modules").symlink_to(NODE_MODULES)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock, (folder / "log").open("wb") as output:
        command = ["node", folder / "everything.mjs", str(sock.fileno())]
        process = subprocess.Popen(command, pass_fds=[sock.fileno()], stdout=output, stderr=output)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    yield Everything(url, folder)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def direct(everything: Everything, tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str, str]]:
    """The suite's verdict about the server itself."""
    return asyncio.run(verdict(everything, everything.url, tmp_path_factory.mktemp("direct")))


async def verdict(everything: Everything, url: str, results: Path) -> set[tuple[str, str, str]]:
    """Run the suite; return each check with its scenario and what came of it."""
    suite = everything.folder / "node_modules/@modelcontextprotocol/conformance/dist/index.js"
    words = ["server", "--url", f"{url}/mcp", "--suite", "all", "-o", str(results)]
    process = await asyncio.create_subprocess_exec(
        "node", "--import", everything.folder / "older_node.mjs", suite, *words,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(120):
        output, _ = await process.communicate()
    assert b"=== SUMMARY ===" in output, output.decode()
    return {
        (re.sub(r"-\d{4}-.*", "", scenario.name), check["id"], check["status"])
        for scenario in results.iterdir()
        for check in json.loads((scenario / "checks.json").read_text())
        if check["status"] != "INFO"
    }


def test_the_server_passes_without_the_proxy(direct):
    """Nothing can be said about the proxy in front of a server that fails by itself."""
    assert len([check for check in direct if check[2] == "SUCCESS"]) == 44
    assert [check for check in direct if check[2] == "FAILURE"] == []


@pytest.mark.parametrize("rules", RULES)
async def test_the_proxy_changes_no_verdict(rules, direct, everything, tmp_path, fork, valkey):
    """All checks come out as they do at the server itself, with the listener's hosts named as the page says."""
    settings = {"HOSTS": "localhost,127.0.0.1"}
    if text := RULES[rules]:
        (tmp_path / "rules.toml").write_text(text)
        settings["RULES_FILE"] = "rules.toml"
    proxy = await fork(everything, valkey.url, **settings)
    assert await verdict(everything, f"http://127.0.0.1:{proxy.port}", tmp_path / "results") == direct
    calls = {line["outcome"] for line in proxy.events("request") if line.get("rule") == "tools"}
    assert (calls & {"executed", "released", "unknown"} != set()) == (rules == "every call"), calls
