"""What was said in confidence is found in no log and no metric (T17)."""

import asyncio
import random
from asyncio import StreamReader, StreamWriter
from contextlib import closing, suppress
from dataclasses import replace

from oncegate.store.open_keys.listing import open_keys
from oncegate.store.record import pack
from oncegate.store.record_view import Deciding, claim_of
from tests.parts import (
    OK,
    RawClient,
    RawUpstream,
    Received,
    Script,
    answering,
    ask,
    chunk,
    read_answer,
    request,
    until,
)
from tests.stores import answer, connected

HEADERS = (
    "Authorization", "X-Api-Key", "Cookie", "Cookie2", "Idempotency-Key", "Proxy-Authorization", "Host", "Referer",
    "User-Agent", "From", "Origin", "Via", "Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "TE",
    "Trailer", "Upgrade", "Connection", "Keep-Alive", "Expect", "Content-Type", "Content-Encoding", "Content-Length",
    "Transfer-Encoding", "Content-Disposition", "Accept", "Accept-Encoding", "Range", "If-Match", "Prefer", "Date",
    "Max-Forwards", "Signature", "Signature-Input", "Stripe-Signature", "X-Amz-Security-Token", "X-CSRF-Token",
    "X-Auth-Token", "X-Request-Id", "Traceparent", "Tracestate", "Baggage", "Last-Event-ID", "Oncegate-Status",
    "Idempotent-Replayed", "Idempotency-Fence", "Oncegate-Execution", "Sec-WebSocket-Key", "HTTP2-Settings", "X-Custom",
)  # fmt: skip


class Canaries:
    """Strings that each stand in one place alone; `found_in` says which a text gives away."""

    def __init__(self) -> None:
        self._dice, self.made = random.Random(17), {}

    def __call__(self, place: str) -> str:
        word = f"cnry{self._dice.getrandbits(64):016x}"
        self.made[word] = place
        return word

    def found_in(self, text: str) -> list[str]:
        text = text.lower()
        return [place for word, place in self.made.items() if word in text]


def requests(canary: Canaries) -> list[bytes]:
    """Return requests, sound and broken, with a canary in every place that a client can write in."""
    made = []
    for name in HEADERS:
        value = canary(name)
        for key in (None, canary(f"key beside {name}")) if name != "Idempotency-Key" else (None,):
            made.append(request("POST", "/x", key, b"{}", f"{name}: {value}"))
        made.append(request("POST", "/x", None, b"{}", f"{name}: a", f"{name}: {value}"))
        made.append(request("POST", "/x", None, b"{}", f"{value}: 1", f"{name}\t: {value}"))
        made.append(request("POST", "/x", None, b"{}", f"{name}: a\x01{value}"))
    for place in ("path", "query", "both", "user", "fragment", "raw"):
        word = canary(f"{place} of a target")
        forms = {
            "path": f"/{word}/{word}", "query": f"/x?token={word}&{word}", "both": f"/{word};{word}?{word}",
            "user": f"http://{word}:{word}@api.test/", "fragment": f"/x#{word}", "raw": f"/\xe9{word}\xff",
        }  # fmt: skip
        for method, key in (
            ("GET", None),
            ("POST", canary("key")),
            ("CONNECT", None),
            (canary("method").upper(), None),
        ):
            made.append(request(method, forms[place], key, b"{}"))
    for key in ("a,b", '"open', "k" * 300, "\x7f", "Digest"):
        made.append(request("POST", "/x", canary("bad key") + key, b"{}"))
    made.append(request("POST", "/x", canary("key"), b"{}", f"Authorization: Digest {canary('digest')}"))
    for broken in (b"zz\r\n", b"5\r\nhello", b"0\r\nA: %s\r\n\r\n", b"2;%s\r\nok\r\n0\r\n\r\n", b"5\r\n%s\r\n"):
        body = broken.replace(b"%s", canary("chunk").encode())
        for key in (canary("key"), None):
            made.append(request("POST", "/x", key, b"", "Transfer-Encoding: chunked") + body)
    made += [canary("no HTTP").encode() + b"\r\n\r\n", b"GET /%s\r\n\r\n" % canary("HTTP/0.9").encode()]
    made.append(request("POST", "/x", canary("key"), canary("body").encode() * 1000))
    made.append(request("POST", "/x", canary("key"), canary("spooled body").encode() * 80_000))
    return made


def answers(canary: Canaries) -> list[bytes]:
    """Return answers, sound and broken, with a canary in every place that an upstream can write in."""
    word = canary("answer").encode()
    length = b"Content-Length: 2\r\n\r\nok"
    return [
        OK.replace(b"OK", word),
        b"HTTP/1.1 200 OK\r\nA: %s\r\nSet-Cookie: %s\r\n%s: 1\r\n" % (word, word, word) + length,
        b"HTTP/1.1 500 %s\r\nContent-Length: 20\r\n\r\n%s" % (word, word), b"HTTP/1.1 429 %s\r\n" % word + length,
        b"HTTP/1.1 502 %s\r\n" % word + length, b"HTTP/1.1 200 OK\r\nA: \x01%s\r\n" % word + length,
        b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\nok" % word, b"%s\r\n\r\n" % word,
        b"HTTP/1.1 %s OK\r\n" % word + length,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\nok" % word, b"HTTP/9.9 200 %s\r\n" % word + length,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n" % word,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(word) + b"0\r\n%s: %s\r\n\r\n" % (word, word),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;%s\r\nokX" % word,
        b"HTTP/1.1 101 %s\r\nUpgrade: %s\r\nConnection: upgrade\r\n\r\n%s" % (word, word, word),
        b"HTTP/1.1 103 %s\r\nLink: %s\r\n\r\n" % (word, word) + OK, b"HTTP/1.1 200 OK\r\n%s" % word,
        b"HTTP/1.1 200 OK\r\nAge: %s\r\nContent-Type: %s\r\nRetry-After: %s\r\n" % (word, word, word) + length,
    ]  # fmt: skip


async def test_canaries_are_found_in_no_log_and_no_metric(proxies, upstream, valkey):
    """T17: what stands in any header, target, query, key, body, chunk or answer, sound or broken, is in no log line,
    at the level of debug and with every access logged, in no metric, and in no answer of the proxy's own."""
    canary = Canaries()
    gate = proxies(upstream, valkey.url, LOG_LEVEL="debug", ACCESS_LOG="all", UPSTREAM_TIMEOUT_S=2, CLIENT_STALL_S=1)
    told: list[str] = []

    async def say(raw: bytes) -> None:
        with closing(await RawClient.open(gate.port)) as client:
            client.writer.write(raw)
            with suppress(OSError):
                client.writer.write_eof()
            answer = await read_answer(client.reader)
            if answer is not None and answer.header("content-type") == b"application/problem+json":
                told.append(repr(answer))

    made = requests(canary)
    for start in range(0, len(made), 20):
        await asyncio.gather(*map(say, made[start : start + 20]))
    for number, response in enumerate(answers(canary)):
        upstream.script = answering(response)
        for key in (f"answer-{number}", f"answer-{number}", None):
            await say(request("POST", "/x", key, b"{}"))
    upstream.script = answering(OK)
    with closing(await RawClient.open(gate.port)) as client:  # one that leaves, and one that stalls
        client.writer.write(request("POST", "/x", canary("key"), canary("left").encode())[:-3])
        client.reset()
    stalled = request("POST", "/x", canary("key"), canary("stalled").encode(), "Content-Length: 99")
    assert (await ask(gate.port, stalled)).status == 408
    await until(lambda: gate.metric("in_flight") == 0)
    metrics = gate.admin("/metrics")[1]
    assert gate.stop() == 0
    assert len(canary.made) > 140
    assert len(told) > 150
    # An access line names the method, whatever its name, the path without its query, and the request id.
    assert set(canary.found_in(gate.log())) <= {
        "method",
        "X-Request-Id",
        *(f"{one} of a target" for one in ("path", "both", "raw")),
    }
    assert canary.found_in(metrics) == []
    assert canary.found_in("\n".join(told)) == []
    assert "Traceback" not in gate.log()
    assert len(gate.events("request")) >= len(made)


RULES = """
[[rule]]
name = "charges"
path = "/**"
[rule.reconcile]
url = "/find?a={key}&b={path:2}&c={/order/id}&d={header:X-Order}"
keep = ["key", "path:2", "/order/id", "header:X-Order"]
reference = {}
succeeded = [{ status = "200" }]
"""
STREAMED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"x" * 90_000) * 2 + b"0\r\n\r\n"
# Of each ending what the API says, and whether its key is open then.
KEEPING = {
    "small": (OK, False),
    "streamed": (STREAMED, False),
    "too large": (b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000, False),
    "declined": (OK.replace(b"200 OK", b"429 Slow Down"), False),
    "ambiguous": (OK.replace(b"200 OK", b"504 Timeout"), True),
    "cut off": (OK[:-1], True),
    "no response": (b"", True),
}


# After these the connection is closed.
CLOSED = ("cut off", "no response")


def closing_after(response: bytes) -> Script:
    async def script(upstream: RawUpstream, reader: StreamReader, writer: StreamWriter, got: Received) -> None:
        await answering(response)(upstream, reader, writer, got)
        raise ConnectionError

    return script


async def test_what_a_rule_keeps_to_ask_with_lies_with_open_keys_alone(fork, upstream, stored, tmp_path):
    """However a key ends, also by an operator, no byte of it is left in the store; nor is it in a log or a metric."""
    (tmp_path / "rules.toml").write_text(RULES)
    canary, settings = Canaries(), {"RULES_FILE": tmp_path / "rules.toml", "MAX_STORED_BYTES": 200_000}
    gate = await fork(upstream, stored.url, LOG_LEVEL="debug", **settings)

    def kept(places: list[str]) -> set[str]:
        """Return which of these the store has."""
        digits = stored.everything()
        return {place for word, place in canary.made.items() if place in places and word.encode().hex() in digits}

    for ending, (response, is_open) in KEEPING.items():
        places = [f"{ending}: {part}" for part in ("key", "path", "body", "field")]
        key, path, body, field = (canary(place) for place in places)
        upstream.script = closing_after(response) if ending in CLOSED else answering(response)
        raw = request("POST", f"/charges/{path}", key, b'{"order": {"id": "%b"}}' % body.encode(), f"X-Order: {field}")
        with suppress(OSError, AssertionError):
            await ask(gate.port, raw)
        await until(lambda places=places, is_open=is_open: kept(places) == (set(places) if is_open else set()))
    await until(lambda: stored.states().count(b"unknown") == 3)
    async with connected(stored.url) as store:
        for number, record in enumerate((await open_keys(store.records, 100)).records):
            if number % 2:
                await store.release_by_operator(record.key, Deciding(record.token), store.token(), record.fence)
            else:
                by = replace(claim_of(record, 60_000), token=store.token())
                await store.resolve_by_operator(by, Deciding(record.token), pack(by, answer(b"by hand")), b"by hand")
    assert number == 2
    assert kept(list(canary.made.values())) == set()
    metrics = gate.admin("/metrics")[1]
    assert gate.stop() == 0
    # An access line names the path.
    assert {place.partition(": ")[2] for place in canary.found_in(gate.log())} == {"path"}
    assert canary.found_in(metrics) == []


ASKING = """
[[rule]]
name = "charges"
path = "/charges"
[rule.reconcile]
url = "/of/{key}"
keep = ["key"]
credentials_file = "FILE"
reference = { "/reference" = "{key}" }
succeeded = [{ status = "200", when = { "/state" = "paid" } }]
audit = ["/id"]
first_after_s = 0.1
most_s = 0.1
rate_per_s = 100
"""


def verdicts(canary: Canaries, key: str) -> list[bytes]:
    """Return answers to questions about a key, with canaries where no rule lets them out. The last one settles it."""
    word = canary("answer to a question")
    documents = [f'{{"reference": "{word}"}}', word, f'{{"reference": "{key}", "state": "{word}"}}']
    documents += [f'{{"reference": "{key}", "state": "paid", "id": "ch_1", "more": "{word}"}}']
    heads = f"Content-Type: application/json\r\nX-Id: {word}\r\n"
    return [
        f"HTTP/1.1 302 {word}\r\nLocation: http://127.0.0.1:1/{word}\r\nContent-Length: 0\r\n\r\n".encode(),
        f"HTTP/1.1 401 {word}\r\nWWW-Authenticate: {word}\r\nContent-Length: 0\r\n\r\n".encode(),
        f"HTTP/1.1 200 {word}\r\nContent-Length: {word}\r\n\r\n".encode(),
        *[f"HTTP/1.1 200 OK\r\n{heads}Content-Length: {len(one)}\r\n\r\n{one}".encode() for one in documents],
    ]


async def test_what_an_api_is_asked_with_is_in_no_log_and_no_metric(proxies, upstream, valkey, tmp_path):
    """The credentials of a question are nowhere but at the API; the key in clear is in the record alone, and there
    only until it is complete. Of the answers the log has what the rule names."""
    canary = Canaries()
    key, secret = canary("key"), canary("credentials")
    (tmp_path / "credentials").write_text(f"Authorization: Bearer {secret}\n")
    (tmp_path / "rules.toml").write_text(ASKING.replace("FILE", str(tmp_path / "credentials")))
    async with connected(valkey.url) as store:
        for server in store.records.servers:
            # Without it, open keys are found after 10 s.
            await server.index.begin()
            await server.index.note_complete()
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml", LOG_LEVEL="debug", ACCESS_LOG="all")
    left = verdicts(canary, key)

    async def script(server, reader, writer, received) -> None:
        if received.line.startswith(b"POST"):
            writer.close()
            return
        assert received.header("authorization") == [f"Bearer {secret}".encode()]
        if len(left) == 1:
            kept.append(stored())
        writer.write(left.pop(0))
        await writer.drain()
        writer.close()

    def stored() -> str:
        with valkey.client() as client:
            return "".join(repr((name, client.dump(name))) for name in client.scan_iter())

    kept: list[str] = []
    upstream.script = script
    raw = request("POST", "/charges", key, b"{}")
    assert (await ask(gate.port, raw)).slug == "upstream-lost"
    await until(lambda: gate.events("audit"), 30)
    assert gate.events("audit")[0]["values"] == {"/id": "ch_1"}
    assert (await ask(gate.port, raw)).header("oncegate-status") == b"reconciled"
    metrics = gate.admin("/metrics")[1]
    assert gate.stop() == 0
    assert canary.found_in(gate.log() + metrics) == []
    assert canary.found_in(kept[0]) == ["key"]
    assert "key" not in canary.found_in(stored())
    assert "credentials" not in canary.found_in(stored())
    assert gate.events("probe inconclusive")[0]["rule"] == "charges"
