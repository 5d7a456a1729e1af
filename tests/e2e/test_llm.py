"""The SDKs of OpenAI and Anthropic as they are installed, and an API of prompts that fails on demand.

`llmock` is that API: it runs in this process, answers in the formats of both vendors and keeps a journal of
what reached it. What stands there with a 200 is what would have been paid.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pytest

from tests.parts import Proxy, Received, until

pytestmark = pytest.mark.xdist_group("llm")

RULES = """
[[rule]]
name = "embeddings"
path = "/v1/embeddings"

[[rule]]
name = "openai"
path = "/v1/**"
preset = "openai"

[[rule]]
name = "anthropic"
path = "/anthropic/**"
preset = "anthropic"
"""
PROMPT: Any = [{"role": "user", "content": "Why is the sky blue, and why is it red in the evening?"}]
KEY = {"extra_headers": {"Idempotency-Key": "job-1"}}


@pytest.fixture(scope="module")
def standing_gate(llmock_server, shared_valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("llm")
    (folder / "rules.toml").write_text(RULES)
    proxy = Proxy(llmock_server.url, shared_valkey.url, folder, {"RULES_FILE": "rules.toml"})
    proxy.start()
    yield proxy
    proxy.close()


@pytest.fixture
def gate(standing_gate: Proxy, valkey, llmock) -> Proxy:
    """One proxy with the presets for all tests of this file, in front of `llmock`."""
    return standing_gate


# Calls as an application makes them ...


class Call(NamedTuple):
    """A method of an SDK, which is imported when it is used (a second); `options` are those that it always has."""

    sdk: str
    base: str
    method: str
    options: dict[str, Any]
    streamed: bool = False

    def client(self, port: int, **options: Any) -> Any:
        options = {"api_key": "sk-1", "max_retries": 0, **options}
        return closing(resolve_name(self.sdk)(base_url=f"http://127.0.0.1:{port}{self.base}", **options))

    def made_with(self, client: Any, **options: Any) -> list[dict[str, Any]]:
        """Make the call and return all that the SDK makes of its answer; of a stream, each event."""
        answer = _reach(client, self.method)(**self.options, **options)
        if not self.streamed:
            return [answer.model_dump()]
        with answer:
            return [event.model_dump() for event in answer]

    def __call__(self, port: int, key: Any = KEY, **options: Any) -> list[dict[str, Any]]:
        with self.client(port, **options) as client:
            return self.made_with(client, **key)

    def raw(self, client: Any, key: Any = KEY, events: int = 1000) -> tuple[bytes, str | None]:
        """Make the call and return the body that came, and what oncegate said of it; leave after so many events."""
        resource, _, method = self.method.rpartition(".")
        create = getattr(_reach(client, resource).with_streaming_response, method)
        body = b""
        with create(**self.options, **key) as answer:
            for data in answer.iter_bytes():
                body += data
                if body.count(b"\n\n") >= events:
                    break
            return body, answer.headers.get("oncegate-status")


def _reach(client: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        client = getattr(client, name)
    return client


CHAT = {"model": "gpt-4o", "messages": PROMPT}
RESPONSE = {"model": "gpt-4o", "input": PROMPT[0]["content"]}
MESSAGE = {"model": "claude-sonnet-4-6", "messages": PROMPT, "max_tokens": 500}
WHOLE = {"stream": True, "stream_options": {"include_usage": True}}
CALLS = {
    "chat": Call("openai.OpenAI", "/v1", "chat.completions.create", CHAT),
    "chat, streamed": Call("openai.OpenAI", "/v1", "chat.completions.create", CHAT | WHOLE, True),
    "response": Call("openai.OpenAI", "/v1", "responses.create", RESPONSE),
    "response, streamed": Call("openai.OpenAI", "/v1", "responses.create", RESPONSE | {"stream": True}, True),
    "message": Call("anthropic.Anthropic", "/anthropic", "messages.create", MESSAGE),
    "message, streamed": Call("anthropic.Anthropic", "/anthropic", "messages.create", MESSAGE | {"stream": True}, True),
}
STREAMED = [name for name, call in CALLS.items() if call.streamed]
TWO = ["chat", "message"]


def usage_in(heard: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the tokens asked and said, by what the SDK understood."""
    asked = said = 0
    for event in heard:
        inner = event.get("message") or event.get("response") or {}
        usage = event.get("usage") or inner.get("usage") or {}
        asked = usage.get("prompt_tokens") or usage.get("input_tokens") or asked
        said = usage.get("completion_tokens") or usage.get("output_tokens") or said
    return asked, said


class Counted(NamedTuple):
    """What the proxy has counted."""

    asked: float
    said: float
    seconds: float
    untold: float
    executed: float
    replayed: float
    joined: float
    released: float
    truncated: float


SAMPLES = (
    'llm_tokens_saved_total kind="input"',
    'llm_tokens_saved_total kind="output"',
    "upstream_seconds_saved_total",
    "llm_replays_without_usage_total",
    *(f'requests_total{{outcome="{word}"}}' for word in ("executed", "replayed", "joined", "released", "truncated")),
)


class Since:
    """What the proxy counted since this was made."""

    def __init__(self, gate: Proxy) -> None:
        self._gate = gate
        self._before = self._now()

    def _now(self) -> list[float]:
        samples = dict(line.rsplit(" ", 1) for line in self._gate.admin("/metrics")[1].splitlines())
        return [self._sum(samples, f"oncegate_{sample}") for sample in SAMPLES]

    @staticmethod
    def _sum(samples: dict[str, str], name: str) -> float:
        """Return a sample; behind a space, there is the one label that those of all rules share."""
        metric, _, label = name.partition(" ")
        found = [value for one, value in samples.items() if one.startswith(metric) and label in one]
        return sum(map(float, found)) if label else float(samples[name])

    async def once(self, **expected: float) -> Counted:
        """Return the counts once these are as expected: a request is counted after its client has its answer."""
        await until(lambda: all(getattr(self.counted, name) == value for name, value in expected.items()))
        return self.counted

    @property
    def counted(self) -> Counted:
        return Counted(*(now - before for now, before in zip(self._now(), self._before, strict=True)))


def paid(llmock: Any) -> list[tuple[int, int | None]]:
    """Return what reached the API: the status of each request, and which try its SDK said it was."""
    return [(one.status, one.sdk_retry_count) for one in llmock.requests]


# A retry with the same key ...


@pytest.mark.parametrize("name", CALLS)
async def test_a_retry_gets_the_same_bytes_at_once(gate, llmock, name):
    """Paid once, also where it was streamed; the replay does not wait between the chunks as the model did."""
    call, since = CALLS[name], Since(gate)
    llmock.pace(50) if call.streamed else llmock.delay(0.4)
    with call.client(gate.port) as client:
        began = time.monotonic()
        first, said = call.raw(client)
        took_s = time.monotonic() - began
        second, said_again = call.raw(client)
        took_again_s = time.monotonic() - began - took_s
    assert (second, said, said_again) == (first, "executed", "replayed")
    assert took_again_s < took_s / 2
    heard = call(gate.port)
    asked, told = usage_in(heard)
    assert asked
    assert told
    counted = await since.once(replayed=2)
    assert (counted.asked, counted.said) == (2 * asked, 2 * told)
    assert 2 * 0.3 < counted.seconds < 2 * took_s
    assert (counted.untold, counted.executed) == (0, 1)
    assert paid(llmock) == [(200, 0)]


async def test_a_stream_without_usage_is_counted_apart(gate, llmock):
    """OpenAI's SDK has to ask for it; what nobody was told is not guessed."""
    since, call = Since(gate), CALLS["chat, streamed"]._replace(options={**CHAT, "stream": True})
    assert call(gate.port) == call(gate.port)
    counted = await since.once(replayed=1)
    assert (counted.asked, counted.said, counted.untold) == (0, 0, 1)


async def test_an_error_spares_no_tokens(gate, llmock):
    """A prompt that was refused for good is refused again, and used nothing."""
    since = Since(gate)
    llmock.context_overflow()
    for _ in range(2):
        with pytest.raises(resolve_name("openai.BadRequestError")):
            CALLS["chat"](gate.port)
    counted = await since.once(replayed=1)
    assert (counted.asked, counted.said, counted.untold) == (0, 0, 0)
    assert paid(llmock) == [(400, 0)]


async def test_only_these_presets_count_tokens(gate, llmock):
    """Whatever the answers of another rule look like."""
    since = Since(gate)
    embed = Call("openai.OpenAI", "/v1", "embeddings.create", {"model": "text-embedding-3-small", "input": "sky"})
    assert embed(gate.port) == embed(gate.port)
    counted = await since.once(replayed=1)
    assert (counted.asked, counted.untold) == (0, 0)
    assert paid(llmock) == [(200, 0)]


# Whose answer it is ...


async def test_users_of_the_client_of_azure_get_their_own_answers(proxies, upstream, valkey, tmp_path):
    """The real client has its credential in `api-key` alone."""

    async def answer(_, __, writer: asyncio.StreamWriter, received: Received) -> None:
        text = b'{"id": "%s", "object": "chat.completion", "choices": []}' % received.header("api-key")[0]
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text) + text
        )

    upstream.script = answer
    (tmp_path / "rules.toml").write_text('[[rule]]\nname = "llm"\npreset = "openai"\n')
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml")
    azure, heard = resolve_name("openai.AsyncAzureOpenAI"), []
    for user in ("alice", "bob", "alice"):
        url = f"http://127.0.0.1:{gate.port}"
        async with azure(api_key=user, azure_endpoint=url, api_version="2024-10-21") as client:
            call = client.chat.completions.create
            said = await call(model="gpt-4o", messages=[], extra_headers={"Idempotency-Key": "job-1"})
            heard.append(said.id)
    assert heard == ["alice", "bob", "alice"]
    assert len(upstream.received) == 2


@pytest.mark.parametrize("chosen", ["organization", "project"])
async def test_accounts_of_one_credential_get_their_own_answers(gate, llmock, chosen):
    """A call for another organization or project is another call, though credential and key are the same."""
    for account in ("one", "two", "one"):
        CALLS["chat"](gate.port, **{chosen: account})
    assert paid(llmock) == [(200, 0), (200, 0)]


# The SDK's own retries, which carry no key ...


@pytest.mark.parametrize("name", ["chat", "chat, streamed", "message", "message, streamed"])
async def test_the_retry_after_a_timeout_is_not_paid_again(gate, llmock, name):
    """The SDK's second try waits for the first one's answer and gets it: a stream as soon as that begins."""
    call, since = CALLS[name], Since(gate)
    llmock.delay(1.0)
    heard = call(gate.port, {}, timeout=0.4, max_retries=4)
    asked, told = usage_in(heard)
    assert told
    assert [status for status, _ in paid(llmock)] == [200]
    counted = await since.once(executed=1)
    saved = counted.replayed + counted.joined
    assert (counted.asked, counted.said) == (saved * asked, saved * told)
    assert saved >= 1


@pytest.mark.parametrize("name", TWO)
async def test_without_oncegate_it_is(llmock, llmock_server, name):
    """The same call, straight to the API."""
    llmock.delay(1.0)
    CALLS[name](llmock_server.port, {}, timeout=0.4, max_retries=4)
    assert len(paid(llmock)) >= 2


@pytest.mark.parametrize("name", TWO)
async def test_an_equal_prompt_is_a_new_one(gate, llmock, name):
    """Who asks twice gets two answers, for which both were paid."""
    first, second = (CALLS[name](gate.port, {})[0]["id"] for _ in range(2))
    assert first != second
    assert paid(llmock) == [(200, 0), (200, 0)]


# Streams that break off ...


@pytest.mark.parametrize("name", STREAMED)
async def test_a_broken_stream_is_never_ended_cleanly(gate, llmock, name):
    """The SDK raises; for Anthropic's a clean end would be the whole answer. The retry is executed and kept."""
    call, since = CALLS[name], Since(gate)
    llmock.pace(10).disconnect(after_chunks=3)
    with pytest.raises(Exception, match=r"Connection error|peer closed connection"):
        call(gate.port)
    heard = call(gate.port)
    assert usage_in(heard)[1]
    assert call(gate.port) == heard
    assert [(one.status, one.completed) for one in llmock.requests] == [(200, False), (200, True)]
    await since.once(truncated=1, executed=1, replayed=1)


async def test_what_a_helper_collects_is_whole_or_an_error(gate, llmock):
    """Anthropic's stream helper returns a message only where all of it came."""
    llmock.pace(10).disconnect(after_chunks=5)
    with (
        CALLS["message"].client(gate.port, max_retries=2) as client,
        pytest.raises(Exception, match="peer closed connection"),
        client.messages.stream(**MESSAGE, **KEY) as stream,
    ):
        stream.get_final_message()
    with CALLS["message"].client(gate.port) as client, client.messages.stream(**MESSAGE, **KEY) as stream:
        assert stream.get_final_message().stop_reason == "end_turn"


@pytest.mark.parametrize("name", ["chat, streamed", "message, streamed"])
async def test_a_client_that_gave_up_gets_all_of_it_later(gate, llmock, name):
    """The stream goes on without it, is paid once, and is joined while it does."""
    call, since = CALLS[name], Since(gate)
    llmock.stall(after_chunks=3, seconds=1.0)
    with pytest.raises(Exception, match=r"timed out"):
        call(gate.port, timeout=0.4)
    heard = call(gate.port)
    asked, told = usage_in(heard)
    counted = await since.once(executed=1, joined=1)
    assert (counted.asked, counted.said) == (asked, told)
    assert counted.seconds >= 1
    assert paid(llmock) == [(200, 0)]


# Failures that say "come again" ...


@pytest.mark.parametrize("key", [KEY, {}], ids=["key", "no key"])
@pytest.mark.parametrize(
    ("name", "status"),
    [("chat", 429), ("chat, streamed", 500), ("response", 503), ("message", 529), ("message, streamed", 429)],
)
async def test_after_a_failure_the_retry_is_executed(gate, llmock, name, status, key):
    """It never gets the failure again; and what succeeded then is kept."""
    call, since = CALLS[name], Since(gate)
    llmock.fail(status, times=2, retry_after=0.05)
    heard = call(gate.port, key, max_retries=2)
    assert usage_in(heard)[1]
    assert paid(llmock) == [(status, 0), (status, 1), (200, 2)]
    if key:
        assert call(gate.port) == heard
        assert len(paid(llmock)) == 3
    await since.once(released=2, executed=1, replayed=len(key))


@pytest.mark.parametrize("name", TWO)
async def test_one_key_for_each_call(gate, llmock, name):
    """A client that was told the header's name sends a key of its own with each call, the same on its retries."""
    call, since = CALLS[name], Since(gate)
    llmock.delay(1.0)
    with call.client(gate.port, timeout=0.4, max_retries=4) as client:
        client._idempotency_header = "Idempotency-Key"
        first, second = (call.made_with(client)[0]["id"] for _ in range(2))
    assert first != second
    assert [status for status, _ in paid(llmock)] == [200, 200]
    assert (await since.once(executed=2)).replayed >= 1
