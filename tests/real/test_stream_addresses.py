"""Readers that others wrote, at the address of a response: browsers across a restart and a reload, Durable Streams."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_stream_addresses import address_in
from tests.parts import Proxy, RawClient, request
from tests.real.browsers import Browser, free_port
from tests.real.chat import WORDS, Chat, chatting
from tests.real.parts import INSTALLED, NODE_MODULES

pytestmark = [INSTALLED, pytest.mark.timeout(240)]
RULES = '[[rule]]\nname = "chat"\npath = "/v1/**"\nresumable = true\n'


@pytest.fixture
def chat() -> Iterator[Chat]:
    with chatting() as chat:
        yield chat


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    """The settings of each proxy."""
    (tmp_path / "rules.toml").write_text(RULES)
    return {"RULES_FILE": "rules.toml", "SECRET": "a secret of many bytes", "LEASE_MS": 2000}


def test_a_page_that_is_reloaded_in_the_middle_shows_the_whole_answer(
    browser: Browser, chat, proxies, valkey, settings
):
    """Also one that is reloaded in the middle; and the model is asked, and paid, once."""
    proxy: Proxy = proxies(chat.url, valkey.url, **settings)
    browser.set_scripts(enabled=True)
    browser.go(f"http://127.0.0.1:{proxy.port}/reloaded")
    chat.say(3)
    browser.await_text("#text", " ".join(WORDS[:3]))
    browser.reload()
    browser.await_text("#text", " ".join(WORDS[:3]))
    chat.say(2)
    browser.await_text("#text", " ".join(WORDS[:5]))
    browser.reload()
    chat.say(3)
    browser.await_text("#state", "whole in load 3")
    assert browser.text("#text") == " ".join(WORDS)
    browser.reload()
    browser.await_text("#state", "whole in load 4")
    assert browser.text("#text") == " ".join(WORDS)
    assert chat.calls == [b"hi"]


async def test_an_event_source_outlives_a_restart_of_its_proxy(browser: Browser, chat, proxies, valkey, settings):
    """It gets each event once, from the replica that runs the request no more than from the one that is killed."""
    owner: Proxy = proxies(chat.url, valkey.url, **settings)
    client = await RawClient.open(owner.port)
    client.writer.write(request())
    chat.say(2)
    address = address_in(await client.reader.readuntil(b"\r\n\r\n"))
    port = free_port()
    reader: Proxy = proxies(chat.url, valkey.url, **settings, LISTEN=f"127.0.0.1:{port}")
    await asyncio.to_thread(_listen, browser, f"http://127.0.0.1:{port}/listening?address={address}", 2)
    reader.kill()
    chat.say(2)
    await asyncio.to_thread(browser.await_text, "#state", "connecting")
    proxies(chat.url, valkey.url, **settings, LISTEN=f"127.0.0.1:{port}")
    await asyncio.to_thread(browser.await_text, "#text", " ".join(WORDS[:4]))
    chat.say(4)
    await asyncio.to_thread(browser.await_text, "#state", "closed")
    assert await asyncio.to_thread(browser.text, "#text") == " ".join(WORDS)
    assert len(chat.calls) == 1
    client.close()


def _listen(browser: Browser, url: str, words: int) -> None:
    browser.set_scripts(enabled=True)
    browser.go(url)
    browser.await_text("#text", " ".join(WORDS[:words]))


@pytest.fixture
def bundle(tmp_path: Path) -> bytes:
    """The program with useChat, in one file for browsers."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    shutil.copy(Path(__file__).parent / "node/usechat.mjs", folder)
    (folder / "node_modules").symlink_to(NODE_MODULES)
    command = ["node", NODE_MODULES / "rolldown/bin/cli.mjs", "usechat.mjs", "--file", "bundle.js", "--format", "esm"]
    options = ["--platform", "browser", "--transform.define", "process.env.NODE_ENV:'production'"]
    subprocess.run([*command, *options], cwd=folder, check=True, capture_output=True)
    return (folder / "bundle.js").read_bytes()


def test_use_chat_of_the_ai_sdk_resumes_at_the_address(browser: Browser, bundle, chat, proxies, valkey, settings):
    """A page with `useChat` and `resume` that is reloaded in the middle; the model is asked once."""
    proxy: Proxy = proxies(chat.url, valkey.url, **settings)
    chat.bundle = bundle
    browser.set_scripts(enabled=True)
    browser.go(f"http://127.0.0.1:{proxy.port}/bundled")
    chat.say(3)
    browser.await_text("#text", " ".join(WORDS[:3]))
    browser.await_text("#state", "streaming with a call")
    browser.reload()
    browser.await_text("#state", "streaming with the address")
    browser.await_text("#text", " ".join(WORDS[:3]))
    chat.say(5)
    browser.await_text("#text", " ".join(WORDS))
    browser.await_text("#state", "ready with the address")
    assert len(chat.calls) == 1
