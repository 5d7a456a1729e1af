"""A rules file at work: where requests go, what names their keys, and what becomes of those without one."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.parts import OK, Answer, Proxy, RawClient, RawUpstream, answering, ask, holding, request, until

RULES = """
[[upstream]]
name = "other"
url = "{other}/api"
max_connections = 2
connect_retries = 0

[[rule]]
name = "joined"
path = "/joined/**"
guard = "required"
key = ["header:X-User", "body:/cart/id"]
scope = []

[[rule]]
name = "form"
path = "/form"
key = "form:token"

[[rule]]
name = "upload"
path = "/upload"
key = "form:token"
fingerprint = ["method", "target"]

[[rule]]
name = "query"
path = "/query"
key = "query:id"
on_bad_key = "pass"

[[rule]]
name = "segment"
path = "/orders/*"
methods = ["PUT", "GET"]
key = "path:2"

[[rule]]
name = "click"
path = "/click"
key = "derived:0.6"

[[rule]]
name = "parts"
path = "/parts"
fingerprint = ["target", "header:X-Branch", "body:/amount"]

[[rule]]
name = "events"
path = "/events/**"
preset = "stripe-webhook"
wait_max_s = 0.5

[[rule]]
name = "cloud"
path = "/cloud"
preset = "cloudevents"

[[rule]]
name = "llm"
path = "/llm"
preset = "openai"
wait_max_s = 20

[[rule]]
name = "marked"
path = "/marked"
key = [["header:Idempotency-Key"], ["derived:1.5"]]
retry_mark = "header:X-Retry"
on_duplicate = "wait"

[[rule]]
name = "idempotent"
path = "/idempotent"
upstream_idempotent = true
upstream_timeout_s = 1

[[rule]]
name = "idempotent, and told by a body"
path = "/told"
upstream_idempotent = true
release_statuses = ["default", "422+/state=refused"]

[[rule]]
name = "charges"
path = "/charges"
preset = "payments"

[[rule]]
name = "small"
path = "/small"
max_request_bytes = 10
max_stored_bytes = 10

[[rule]]
name = "tenants"
path = "/tenants/*"
scope = ["path:2"]

[[rule]]
name = "other"
host = "other.test"
upstream = "other"

[[rule]]
name = "canary"
path = "/canary"
headers = {{ "X-Canary" = "1" }}
upstream = "other"

[[rule]]
name = "renamed"
path = "/renamed"
forward_key = "X-Request-Id"
pass_host = true

[[rule]]
name = "dropped"
path = "/dropped"
forward_key = ""
set_host = "internal.test:81"

[[rule]]
name = "gone"
path = "/gone"
upstream = "http://127.0.0.1:1"

[[rule]]
name = "open"
path = "/open/**"
guard = "off"
"""


@pytest.fixture(scope="module")
def ruled(shared_valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One proxy with those rules for all tests of this file; its upstreams are `behind` and `other`."""
    folder = tmp_path_factory.mktemp("ruled")
    with socket.create_server(("127.0.0.1", 0)) as sock, socket.create_server(("127.0.0.1", 0)) as other:
        urls = [f"http://127.0.0.1:{one.getsockname()[1]}" for one in (sock, other)]
        (folder / "rules.toml").write_text(RULES.format(other=urls[1]))
        proxy = Proxy(urls[0], shared_valkey.url, folder, {"RULES_FILE": "rules.toml", "CONNECT_RETRIES": 0})
        proxy.upstream_socket, proxy.other_socket = sock, other
        proxy.start()
        yield proxy
        proxy.close()


async def standing_in(sock: socket.socket) -> AsyncIterator[RawUpstream]:
    server = RawUpstream()
    await server.start(sock.dup())
    yield server
    await server.close()


@pytest.fixture
async def behind(ruled: Proxy, valkey) -> AsyncIterator[RawUpstream]:
    async for server in standing_in(ruled.upstream_socket):
        yield server


@pytest.fixture
async def other(ruled: Proxy) -> AsyncIterator[RawUpstream]:
    async for server in standing_in(ruled.other_socket):
        yield server


def told(answer: Answer) -> tuple[int, str]:
    return answer.status, (answer.header("oncegate-status") or b"").decode()


async def post(proxy: Proxy, path: str, body: bytes = b"", *lines: str, key: str | None = None) -> tuple[int, str]:
    return told(await ask(proxy.port, request("POST", path, key, body, *lines)))


EXECUTED, REPLAYED, UNGUARDED, REFUSED = (200, "executed"), (200, "replayed"), (200, "unguarded"), (400, "refused")
FORM = "Content-Type: application/x-www-form-urlencoded"


def upload(boundary: str, token: str, content: str = "x") -> tuple[str, bytes, str]:
    """Return a form as a browser sends it with a file; it takes another boundary each time."""
    field = f'--{boundary}\r\nContent-Disposition: form-data; name="token"\r\n\r\n{token}\r\n'
    file = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n{content}\r\n--{boundary}--\r\n'
    )
    return "/upload", (field + file).encode(), f"Content-Type: multipart/form-data; boundary={boundary}"


async def test_a_client_that_marks_its_retries_alone(ruled, behind):
    """Unmarked requests are new, each of them; a retry gets the newest response, within the window of the rule."""
    body = b'{"file": 1}'
    for _ in range(3):  # the second time, and the third, under a known head
        assert await post(ruled, "/marked", body) == EXECUTED
    for count in (1, 2):
        assert await post(ruled, "/marked", body, f"X-Retry: {count}") == REPLAYED
    assert await post(ruled, "/marked", b"other", "X-Retry: 1") == EXECUTED
    assert await post(ruled, "/marked", body, "X-Retry: soon") == (200, "")
    await asyncio.sleep(1.6)
    assert await post(ruled, "/marked", body, "X-Retry: 1") == EXECUTED
    assert len(behind.received) == 6


async def test_a_marked_retry_waits_for_its_request(ruled, behind):
    """While the first try runs its retry waits, and an equal new request executes."""
    done = asyncio.Event()
    behind.script = holding(done)
    first = asyncio.create_task(post(ruled, "/marked", b"slow"))
    await until(lambda: len(behind.received) == 1)
    retry = asyncio.create_task(post(ruled, "/marked", b"slow", "X-Retry: 1"))
    await until(lambda: ruled.metric("waiting") == 1)
    second = asyncio.create_task(post(ruled, "/marked", b"slow"))
    await until(lambda: len(behind.received) == 2)
    done.set()
    assert await asyncio.gather(first, retry, second) == [EXECUTED, REPLAYED, UNGUARDED]


# Two requests under one key, and one under another.
SOURCES = {
    "joined": (
        [("/joined/a", b' {"cart" :{ "id":3}}', "X-User: a")] * 2,
        [("/joined/a", b'{"cart":{"id":3}}', "X-User: b"), ("/joined/a", b'{"cart":{"id":"3"}}', "X-User: a")],
    ),
    "form": ([("/form", b"token=a%20b&x=1", FORM)] * 2, [("/form", b"token=a&x=1", FORM)]),
    "form with a file": ([upload("a1", "1"), upload("b2", "1")], [upload("a1", "2")]),
    "query": ([("/query?id=1&x=2", b"")] * 2, [("/query?id=2", b"")]),
}


@pytest.mark.parametrize("case", SOURCES)
async def test_each_source_names_a_key(ruled, behind, case):
    """What repeats under one key is executed once, and its bytes go upstream as they came."""
    same, others = SOURCES[case]
    assert [await post(ruled, *one) for one in same] == [EXECUTED, REPLAYED]
    assert [await post(ruled, *one) for one in others] == [EXECUTED] * len(others)
    assert behind.received[0].body == same[0][1]
    assert behind.received[0].line.split()[1] == same[0][0].encode()
    assert len(behind.received) == 1 + len(others)


async def test_a_segment_names_a_key_of_another_method(ruled, behind):
    """A rule guards the methods it names; what else it matches passes."""
    path = "/orders/42"
    answers = [await ask(ruled.port, request(method, path, None, b"x")) for method in ("PUT", "PUT", "GET", "POST")]
    assert [told(answer) for answer in answers] == [EXECUTED, REPLAYED, (200, ""), (200, "")]
    assert told(await ask(ruled.port, request("PUT", "/orders/43", None, b"x"))) == EXECUTED


@pytest.mark.parametrize(
    ("path", "body", "lines", "expected"),
    [
        ("/joined/a", b"{}", ["X-User: a"], "key-invalid"),
        ("/joined/a", b"{}", [], "key-missing"),
        ("/joined/a", b"{", ["X-User: a"], "key-invalid"),
        ("/joined/a", b'{"cart":{"id":1,"id":1}}', ["X-User: a"], "key-invalid"),
        ("/joined/a", b'{"cart":{"id":1}}', ["X-User: a", "X-User: a"], "key-invalid"),
        ("/joined/a", b'{"cart":{"id":1}}', ["X-User: a", "Content-Encoding: gzip"], "key-invalid"),
        ("/joined/a", b"[" * 100_000, ["X-User: a"], "key-invalid"),
        ("/joined/a", b'{"cart":{"id":"\xff"}}', ["X-User: a"], "key-invalid"),
        ("/form", b"x=1", [FORM], "key-missing"),
        ("/form", b"token=a&token=b", [FORM], "key-invalid"),
        ("/form", b"token=a", [], "key-invalid"),
        ("/query", b"", [], None),
        ("/query?id=1&id=2", b"x", [], None),
        ("/events", b"", [], None),
        ("/events", b'{"id":null}', [], None),
        ("/events", b'{"id":"a"' + b" " * 2_000_000 + b"}", [], None),
        ("/events", b"1" * 3_000_000, [], None),
    ],
)
async def test_a_request_without_a_usable_key(ruled, behind, path, body, lines, expected):
    """By rule it is refused and nothing is sent, or passes on as it is and says that it was not guarded."""
    answer = await ask(ruled.port, request("POST", path, None, body, *lines))
    if expected:
        assert (answer.status, answer.slug, answer.header("oncegate-status")) == (400, expected, b"refused")
        assert behind.received == []
    else:
        assert told(answer) == UNGUARDED
        assert behind.received[0].body == body
        assert behind.received[0].header("content-length") == [b"%d" % len(body)] or not body


async def test_equal_requests_within_the_window_are_one(ruled, behind):
    """A derived key lasts for its window from the claim; then the same request is a new one."""
    assert [await post(ruled, "/click", b"a=1") for _ in range(2)] == [EXECUTED, REPLAYED]
    assert await post(ruled, "/click", b"a=2") == EXECUTED
    assert await post(ruled, "/click", b"a=1", "Authorization: Bearer b") == EXECUTED
    assert await post(ruled, "/click?x", b"a=1") == EXECUTED
    await asyncio.sleep(0.7)
    assert [await post(ruled, "/click", b"a=1") for _ in range(2)] == [EXECUTED, REPLAYED]
    assert len(behind.received) == 5


async def test_a_window_does_not_end_what_is_running(ruled, behind):
    """Past its window a request that still runs is still the one."""
    done = asyncio.Event()
    behind.script = holding(done)
    first = asyncio.ensure_future(post(ruled, "/click", b"slow"))
    await until(lambda: behind.received)
    await asyncio.sleep(0.7)
    assert await post(ruled, "/click", b"slow") == (409, "refused")
    done.set()
    assert await first == EXECUTED
    assert await post(ruled, "/click", b"slow") == EXECUTED
    assert len(behind.received) == 2


async def test_a_click_that_waited_gets_the_answer_of_the_first_one_also_past_the_window(ruled, behind):
    """A slow form: the second click waits for longer than the window, and is still no second order."""
    done = asyncio.Event()
    behind.script = holding(done)
    clicks = [asyncio.ensure_future(post(ruled, "/click", b"slow", "Prefer: wait=10"))]
    await until(lambda: behind.received)
    clicks.append(asyncio.ensure_future(post(ruled, "/click", b"slow", "Prefer: wait=10")))
    await asyncio.sleep(0.7)
    done.set()
    assert await asyncio.gather(*clicks) == [EXECUTED, REPLAYED]
    assert len(behind.received) == 1


@pytest.mark.parametrize("file", ["x", "y" * 1_500_000], ids=["in memory", "spooled"])
async def test_two_clicks_on_a_form_with_a_file_are_one(ruled, behind, file):
    """A browser makes a new boundary for each click. With the same content it is the same request, keyed or not."""
    forms = [upload(boundary, token, file) for boundary, token in (("a1", "1"), ("b2", "1"), ("a1", "2"))]
    answers = [await post(ruled, "/click", *form[1:]) for form in forms]
    assert answers == [EXECUTED, REPLAYED, EXECUTED]
    answers = [await post(ruled, "/keyed", *form[1:], key="k") for form in forms]
    assert answers == [EXECUTED, REPLAYED, (422, "refused")]
    assert [len(one.body) for one in behind.received] == [len(forms[n][1]) for n in (0, 2, 0)]


async def test_a_form_under_a_known_head_is_the_same_form(ruled, behind):
    """A client with one boundary for all forms repeats its head; its forms are known by their parts all the same."""
    same, other = (upload(boundary, "1") for boundary in ("a1", "b2"))
    kept = await RawClient.open(ruled.port)
    for number in range(4):
        answer = await kept.ask(request("POST", "/keyed", f"k{number}", *same[1:]))
        assert answer is not None
        assert told(answer) == EXECUTED
    kept.close()
    assert [await post(ruled, "/keyed", *other[1:], key=f"k{number}") for number in range(4)] == [REPLAYED] * 4


async def test_what_must_be_equal_is_what_the_rule_names(ruled, behind):
    """A retry may have another time in its body. With another amount or account, the key was used before."""
    account = "X-Branch: a"
    assert await post(ruled, "/parts", b'{"amount": 1, "at": 2}', account, key="k") == EXECUTED
    assert await post(ruled, "/parts", b'{"at": 3, "amount": 1}', account, "X: y", key="k") == REPLAYED
    assert await post(ruled, "/parts", b'{"amount": 2, "at": 2}', account, key="k") == (422, "refused")
    assert await post(ruled, "/parts", b'{"amount": 1, "at": 2}', "X-Branch: b", key="k") == (422, "refused")
    assert await post(ruled, "/parts", b'{"amount": 1}', "Connection: X-Branch", key="k") == REFUSED
    assert len(behind.received) == 1


def mark(count: int) -> str:
    return f"x-stainless-retry-count: {count}"


async def test_marked_retries_get_the_first_ones_answer(ruled, behind):
    """A retry waits for its first try, or gets its stored answer; a new equal prompt is executed anew."""
    done = asyncio.Event()
    behind.script = holding(done)
    first = asyncio.ensure_future(post(ruled, "/llm", b"prompt", mark(0)))
    await until(lambda: behind.received)
    retry = asyncio.ensure_future(post(ruled, "/llm", b"prompt", mark(1)))
    await until(lambda: ruled.metric("waiting") == 1)
    twin = asyncio.ensure_future(post(ruled, "/llm", b"prompt", mark(0)))
    await until(lambda: len(behind.received) == 2)
    done.set()
    assert [await first, await retry, await twin] == [EXECUTED, REPLAYED, UNGUARDED]
    assert await post(ruled, "/llm", b"prompt", mark(2)) == REPLAYED
    behind.script = answering(OK.replace(b"ok", b"on"))
    assert await post(ruled, "/llm", b"prompt", mark(0)) == EXECUTED
    assert (await ask(ruled.port, request("POST", "/llm", None, b"prompt", mark(1)))).body == b"on"
    assert await post(ruled, "/llm", b"another", mark(1)) == EXECUTED
    assert await post(ruled, "/llm", b"prompt") == (200, "")
    assert len(behind.received) == 5


async def test_keyed_prompts_and_failed_ones(ruled, behind):
    """A key beats the mark; an error releases, so that the SDK's retry executes; so does a lost try."""
    assert [await post(ruled, "/llm", b"p", mark(n), key="k") for n in (0, 1)] == [EXECUTED, REPLAYED]
    behind.script = answering(OK.replace(b"200 OK", b"500 No"))
    assert await post(ruled, "/llm", b"q", mark(0)) == (500, "released")

    async def break_off(*_: object) -> None:
        raise ConnectionError

    behind.script = break_off
    assert await post(ruled, "/llm", b"q", mark(1)) == (502, "unknown")
    behind.script = answering(OK)
    assert await post(ruled, "/llm", b"q", mark(2)) == EXECUTED
    assert await post(ruled, "/llm", b"q", mark(3)) == REPLAYED


async def test_a_webhook_is_delivered_again_until_it_is_done(ruled, behind):
    """What failed or was lost executes with the next delivery; what is done is acknowledged, whatever its body."""
    for answer in (b"500 No", b"400 No", b"302 No", b"502 No", b"409 No"):
        behind.script = answering(OK.replace(b"200 OK", answer))
        assert await post(ruled, "/events", b'{"id":"e1"}') == (int(answer[:3]), "released")

    async def break_off(*_: object) -> None:
        raise ConnectionError

    behind.script = break_off
    assert await post(ruled, "/events", b'{"id":"e1"}') == (502, "unknown")
    behind.script = answering(OK.replace(b"200 OK", b"202 OK"))
    assert await post(ruled, "/events", b'{"id":"e1"}', "Stripe-Signature: t=1") == (202, "executed")
    assert await post(ruled, "/events", b'{ "id" : "e1", "n": 2 }', "Stripe-Signature: t=2") == (202, "replayed")
    assert await post(ruled, "/events", b'{"id":"e1"}', "Authorization: Bearer x") == (202, "replayed")
    assert len(behind.received) == 7


async def test_each_receiver_of_an_event_gets_it(ruled, behind):
    """A sender's two webhooks under one path each get the event, once."""
    for path in ("/events/a", "/events/b", "/events/a/b"):
        assert [await post(ruled, path, b'{"id":"e1"}') for _ in range(2)] == [EXECUTED, REPLAYED]
    assert await post(ruled, "/events/x/../a", b'{"id":"e1"}') == REPLAYED
    assert len(behind.received) == 3


async def test_an_event_is_one_in_binary_and_structured_mode(ruled, behind):
    """A redelivery of a CloudEvent in the other mode gets the first one's response, also where its id is encoded."""
    binary = ["ce-specversion: 1.0", "ce-source: /s", "ce-id: a%20b", "Content-Type: application/json"]
    structured = b'{"specversion": "1.0", "source": "/s", "id": "a b", "data": {"id": 1}}'
    assert await post(ruled, "/cloud", b'{"id": 1, "source": 2}', *binary) == EXECUTED
    assert await post(ruled, "/cloud", structured, "Content-Type: application/cloudevents+json") == REPLAYED
    assert await post(ruled, "/cloud", structured.replace(b"a b", b"a%20b")) == EXECUTED
    assert len(behind.received) == 2


async def test_a_webhook_in_flight_waits_and_then_comes_again(ruled, behind):
    """A duplicate delivery is held for the rule's time; then it hears what every sender takes for `come again`."""
    done = asyncio.Event()
    behind.script = holding(done)
    first = asyncio.ensure_future(post(ruled, "/events", b'{"id":"e2"}'))
    await until(lambda: behind.received)
    answer = await ask(ruled.port, request("POST", "/events", None, b'{"id":"e2"}'))
    assert (answer.status, answer.reason, answer.slug) == (503, b"Service Unavailable", "in-flight")
    assert answer.problem["status"] == 503
    assert answer.header("retry-after")
    held = asyncio.ensure_future(post(ruled, "/events", b'{"id":"e2"}'))
    await until(lambda: ruled.metric("waiting") == 1)
    done.set()
    assert [await first, await held] == [EXECUTED, REPLAYED]


async def test_what_an_idempotent_upstream_lost_is_sent_again(ruled, behind):
    """With the same key and body, after a pause, until it answers; while it is busy with the first, too."""
    scripts = ["break", "silence", "busy", "answer"]

    async def script(server: RawUpstream, reader: object, writer: asyncio.StreamWriter, got: object) -> None:
        step = scripts.pop(0)
        if step == "break":
            raise ConnectionError
        if step == "silence":
            await asyncio.sleep(5)
        writer.write(OK if step == "answer" else OK.replace(b"200 OK", b"409 Conflict"))

    behind.script = script
    assert await post(ruled, "/idempotent", b"x", key="k1") == EXECUTED
    assert await post(ruled, "/idempotent", b"x", key="k1") == REPLAYED
    assert [(one.body, one.header("idempotency-key")) for one in behind.received] == [(b"x", [b"k1"])] * 4


async def test_sending_again_is_bounded(ruled, behind, valkey):
    """After three more tries the outcome is unknown; an upstream that stays busy has the last word, unknown too."""

    async def break_off(*_: object) -> None:
        raise ConnectionError

    behind.script = break_off
    assert await post(ruled, "/idempotent", b"x", key="k2") == (502, "unknown")
    assert len(behind.received) == 4
    scripts = [break_off, *[answering(OK.replace(b"200 OK", b"409 Conflict"))] * 3]

    async def script(*args: object) -> None:
        await scripts.pop(0)(*args)

    behind.script = script
    assert await post(ruled, "/idempotent", b"x", key="k3") == (409, "unknown")
    assert valkey.states() == [b"unknown", b"unknown"]
    behind.script = answering(OK.replace(b"200 OK", b"409 Conflict"))
    assert await post(ruled, "/idempotent", b"x", key="k4") == (409, "executed")


async def test_a_response_that_broke_off_says_nothing_of_the_next(ruled, behind):
    """What is stored is the response to the last try, by its own status: the first one's condition is not its own."""
    said = b"Content-Type: application/json\r\nContent-Length: 19\r\n\r\n"
    scripts = [b"HTTP/1.1 422 X\r\n" + said + b'{"st', b"HTTP/1.1 200 OK\r\n" + said + b'{"state":"refused"}']

    async def script(_: object, __: object, writer: asyncio.StreamWriter, ___: object) -> None:
        writer.write(scripts.pop(0))
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()

    behind.script = script
    assert await post(ruled, "/told", b"x", key="told") == EXECUTED
    assert await post(ruled, "/told", b"x", key="told") == REPLAYED
    assert len(behind.received) == 2


IN_USE = b'{"error": {"code": "idempotency_key_in_use"}}'


def conflict(body: bytes, *fields: bytes) -> bytes:
    """The head of a 409 in JSON with this body."""
    lines = (b"Content-Type: application/json", b"Content-Length: %d" % len(body), *fields)
    return b"\r\n".join((b"HTTP/1.1 409 Conflict", *lines, b"", b""))


async def test_a_key_that_the_api_still_works_on_is_not_stored(ruled, behind):
    """The code in a 409's body frees the key, in whatever pieces it comes; another code is a result."""

    async def in_pieces(_: object, __: object, writer: asyncio.StreamWriter, ___: object) -> None:
        writer.write(conflict(IN_USE))
        await asyncio.sleep(0.1)  # longer than a small answer is waited for
        writer.write(IN_USE)

    for script in (answering(conflict(IN_USE) + IN_USE), in_pieces):
        behind.script = script
        answer = await ask(ruled.port, request("POST", "/charges", "used", b"x"))
        assert (answer.status, answer.body, answer.header("oncegate-status")) == (409, IN_USE, b"released")
    behind.script = answering(OK)
    assert await post(ruled, "/charges", b"x", key="used") == EXECUTED
    other = IN_USE.replace(b"key_in_use", b"error")
    behind.script = answering(conflict(other) + other)
    assert await post(ruled, "/charges", b"x", key="other") == (409, "executed")
    assert await post(ruled, "/charges", b"x", key="other") == (409, "replayed")


async def test_a_body_that_is_long_decides_nothing(ruled, behind):
    """A 409 of more than 64 KiB is passed on and stored as one without a code."""
    body = IN_USE + b" " * 70_000
    behind.script = answering(conflict(body) + body)
    for says in (b"executed", b"replayed"):
        answer = await ask(ruled.port, request("POST", "/charges", "long", b"x"))
        assert (answer.status, answer.body, answer.header("oncegate-status")) == (409, body, says)


async def test_an_answer_that_has_begun_is_not_sent_again(ruled, behind):
    """What broke off after its beginning reached the client is lost for it: nothing is sent twice into one answer."""

    async def script(_: object, __: object, writer: asyncio.StreamWriter, ___: object) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 70_000)
        await writer.drain()
        await asyncio.sleep(0.2)
        raise ConnectionError

    behind.script = script
    answer = await ask(ruled.port, request("POST", "/idempotent", "k5", b"x"))
    assert not answer.complete
    assert len(behind.received) == 1


async def test_limits_of_a_rule(ruled, behind):
    """The largest request and the largest stored answer are a rule's own."""
    assert await post(ruled, "/small", b"x" * 11, key="k") == (413, "refused")
    chunked = request("POST", "/small", "k", b"b\r\nxxxxxxxxxxx\r\n0\r\n\r\n", "Transfer-Encoding: chunked")
    assert told(await ask(ruled.port, chunked)) == (413, "refused")
    assert behind.received == []
    behind.script = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nxxxxxxxxxxx")
    assert await post(ruled, "/small", b"x" * 10, key="k") == EXECUTED
    assert await post(ruled, "/small", b"x" * 10, key="k") == (409, "refused")


async def test_a_segment_as_scope(ruled, behind):
    """The same key in two segments is two keys, whatever credential comes along."""
    keys = [
        ("/tenants/a", "Authorization: Bearer 1"),
        ("/tenants/b", "Authorization: Bearer 1"),
        ("/tenants/a", "Authorization: Bearer 2"),
    ]
    answers = [await post(ruled, path, b"x", line, key="k") for path, line in keys]
    assert answers == [EXECUTED, EXECUTED, REPLAYED]


async def test_each_upstream_has_its_own(ruled, behind, other):
    """By host a rule leads all methods to another upstream, with its prefix, its Host and its own connections."""
    host = "Host: other.test:99"
    raw = b"%s /x?y HTTP/1.1\r\n" + host.encode() + b"\r\nIdempotency-Key: k\r\n\r\n"
    assert [told(await ask(ruled.port, raw % method)) for method in (b"POST", b"POST", b"GET")] == [
        EXECUTED,
        REPLAYED,
        (200, ""),
    ]
    assert behind.received == []
    assert [one.line for one in other.received] == [b"POST /api/x?y HTTP/1.1", b"GET /api/x?y HTTP/1.1"]
    assert {one.header("host")[0] for one in other.received} == {b"127.0.0.1:%d" % other.port}
    done = asyncio.Event()
    other.script = holding(done)
    asks = [asyncio.ensure_future(ask(ruled.port, raw.replace(b"y", b"%d" % n) % b"GET")) for n in range(4)]
    await until(lambda: len(other.received) == 4)
    assert told(await ask(ruled.port, request("GET", "/y"))) == (200, "")  # the other's queue holds nobody up
    assert len(other.received) == 4
    done.set()
    await asyncio.gather(*asks)


async def test_one_key_is_not_for_two_upstreams(ruled, behind, other):
    """A header or a host leads the same request elsewhere: it never gets the response of the first upstream."""
    for key, path, line in (("k1", "/x", "Host: other.test"), ("k2", "/canary", "X-Canary: 1")):
        assert await post(ruled, path, b"x", key=key) == EXECUTED
        raw = request("POST", path, key, b"x", line) if "Canary" in line else (
            b"POST /x HTTP/1.1\r\nHost: other.test\r\nIdempotency-Key: k1\r\nContent-Length: 1\r\n\r\nx"
        )  # fmt: skip
        assert (await ask(ruled.port, raw)).slug == "key-reused"
        assert await post(ruled, path, b"x", key=key) == REPLAYED
    assert (len(behind.received), other.received) == (2, [])


async def test_how_host_and_key_go_on(ruled, behind):
    """The Host is passed or set, the key renamed or dropped; what a client sends under the new name goes."""
    await post(ruled, "/renamed", b"x", "X-Request-Id: forged", key='"k 1"')
    await post(ruled, "/dropped", b"x", "X-Request-Id: kept", key="k2")
    await post(ruled, "/x", b"x", key="k3")
    renamed, dropped, usual = behind.received
    assert renamed.header("host") == [b"api.test"]
    assert (renamed.header("idempotency-key"), renamed.header("x-request-id")) == ([], [b'"k 1"'])
    assert dropped.header("host") == [b"internal.test:81"]
    assert (dropped.header("idempotency-key"), dropped.header("x-request-id")) == ([], [b"kept"])
    assert usual.header("idempotency-key") == [b"k3"]
    assert usual.header("host") == [b"127.0.0.1:%d" % behind.port]


async def test_an_upstream_that_is_not_there(ruled, behind):
    """It concerns its own rule alone, and frees the key."""
    assert await post(ruled, "/gone", b"x", key="k") == (502, "refused")
    assert await post(ruled, "/gone", b"x", key="k") == (502, "refused")
    assert await post(ruled, "/x", b"x", key="k") == EXECUTED


async def test_the_access_line_names_the_rule(ruled, behind):
    """Of whatever became of the request; without a rule it says nothing of one."""
    await post(ruled, "/joined/log", b'{"cart":{"id":3}}', "X-User: a")
    await post(ruled, "/joined/log", b"{}")
    await post(ruled, "/open/log")
    await post(ruled, "/log", key="k")
    await until(lambda: ruled.events("request")[-1].get("rule") is None)
    rules = [(line["outcome"], line.get("rule")) for line in ruled.events("request")[-4:]]
    assert rules == [("executed", "joined"), ("key_missing", "joined"), ("passthrough", "open"), ("executed", None)]


async def test_a_rule_can_guard_nothing(ruled, behind):
    """Its requests pass, with whatever key they carry."""
    assert [await post(ruled, "/open/a", b"x", key="k") for _ in range(2)] == [(200, ""), (200, "")]
    assert len(behind.received) == 2


async def test_what_rules_act_on_cannot_be_stripped(ruled, behind):
    """A header that some rule reads may not be nominated in Connection, nor imitated."""
    for line in ("Connection: X-User", "Connection: x-stainless-retry-count", "X_User: a"):
        assert (await post(ruled, "/joined/a", b'{"cart":{"id":3}}', line))[0] == 400
    assert behind.received == []


# The file changes ...


async def test_rules_are_read_again(proxies, upstream, valkey, tmp_path: Path):
    """At SIGHUP new requests follow the new file and those under way their old rules; a bad file changes nothing."""
    second = RawUpstream()
    await second.start()
    file = tmp_path / "rules.toml"
    rule = '[[rule]]\nname = "a"\npath = "/a"\nrelease_statuses = ["418"]\n'
    file.write_text(rule)
    proxy = proxies(upstream, valkey.url, RULES_FILE=file)
    done = asyncio.Event()
    upstream.script = holding(done, OK.replace(b"200 OK", b"418 No"))
    first = asyncio.ensure_future(post(proxy, "/a", b"x", key="k1"))
    await until(lambda: upstream.received)

    nominated = request("POST", "/a", "k0", b"x", "X-Shop: a", "Connection: X-Shop")
    upstream.script = answering(OK)
    assert told(await ask(proxy.port, nominated)) == EXECUTED
    kept = await RawClient.open(proxy.port)
    assert [(await kept.ask(nominated.replace(b"k0", key))).status for key in (b"k8", b"k9")] == [200, 200]
    file.write_text(f'[[rule]]\nname = "b"\npath = "/a"\nupstream = "{second.url}"\nscope = ["header:X-Shop"]')
    proxy.signal(signal.SIGHUP)
    await until(lambda: proxy.events("reloaded"))
    assert proxy.events("reloaded")[-1]["rules"] == ["b"]
    assert told(await ask(proxy.port, nominated)) == REFUSED
    assert (await kept.ask(nominated)).status == REFUSED[0], "what passed before the rules changed passes no more"
    kept.close()
    second.script = answering(OK.replace(b"200 OK", b"418 No"))
    assert await post(proxy, "/a", b"x", key="k2") == (418, "executed")
    assert len(second.received) == 1

    file.write_text('[[rule]]\nname = "c"\npath = "a"\n[[rule]]\nname = "c"\nretention_s = 0')
    proxy.signal(signal.SIGHUP)
    bad = "reload refused, nothing changed"
    await until(lambda: proxy.events(bad))
    reasons = proxy.events(bad)[-1]["reasons"]
    assert [reason.split(": ")[1:3] for reason in reasons] == [
        ['rule "c"', "path"],
        ['rule "c"', "name"],
        ['rule "c"', "retention_s"],
    ]
    assert await post(proxy, "/a", b"x", key="k3") == (418, "executed")
    assert len(second.received) == 2

    done.set()
    assert await first == (418, "released")  # as its rule says, which is no more
    for number, text in enumerate(("", "# no rule any more\n"), 2):
        file.write_text(text)
        proxy.signal(signal.SIGHUP)
        await until(lambda number=number: len(proxy.events(bad)) == number)
        assert await post(proxy, "/a", b"x", key=f"empty{number}") == (418, "executed")
    file.write_text('[[rule]]\nname = "d"\npath = "/b"\n')
    proxy.signal(signal.SIGHUP)
    await until(lambda: len(proxy.events("reloaded")) == 2)
    assert await post(proxy, "/a", b"x", key="k4") == EXECUTED
    assert len(upstream.received) == 5
    assert await asyncio.to_thread(proxy.stop, 10) == 0
    await second.close()


async def test_a_renamed_upstream_refuses_no_retry(proxies, upstream, valkey, tmp_path: Path):
    """While blue becomes green, retries of what blue answered are replayed. An upstream that never was blue: 422."""
    second = RawUpstream()
    await second.start()
    file = tmp_path / "rules.toml"

    def text(name: str, url: str, more: str = "") -> str:
        rule = f'[[rule]]\nname = "a"\npath = "/a"\nupstream = "{name}"\n'
        return f'[[upstream]]\nname = "{name}"\nurl = "{url}"\n{more}\n{rule}'

    file.write_text(text("blue", upstream.url))
    proxy = proxies(upstream, valkey.url, RULES_FILE=file)
    assert await post(proxy, "/a", b"x", key="k1") == EXECUTED
    for count, (name, more, expected) in enumerate(
        [("blue", "", REPLAYED), ("green", 'was = ["blue"]', REPLAYED), ("red", "", (422, "refused"))], 1
    ):
        file.write_text(text(name, second.url, more))
        proxy.signal(signal.SIGHUP)
        await until(lambda count=count: len(proxy.events("reloaded")) == count)
        assert await post(proxy, "/a", b"x", key="k1") == expected
        assert await post(proxy, "/a", b"x", key=f"new-{name}") == EXECUTED
    assert (len(upstream.received), len(second.received)) == (1, 3)
    await second.close()


async def test_a_drain_reaches_every_upstream(proxies, upstream, valkey, tmp_path: Path):
    """What is under way on a pool that no rule names any more is settled as well when the process ends."""
    second = RawUpstream()
    await second.start()
    second.script = holding(asyncio.Event())
    file = tmp_path / "rules.toml"
    file.write_text(f'[[rule]]\nname = "b"\npath = "/a"\nupstream = "{second.url}"\nupstream_idempotent = true\n')
    proxy = proxies(upstream, valkey.url, RULES_FILE=file, DRAIN_S=0.3)
    first = asyncio.ensure_future(post(proxy, "/a", b"x", key="k1"))
    await until(lambda: second.received)
    file.write_text('[[rule]]\nname = "c"\npath = "/c"\n')
    proxy.signal(signal.SIGHUP)
    await until(lambda: proxy.events("reloaded"))
    assert await asyncio.to_thread(proxy.stop, 10) == 1
    assert await first == (502, "unknown")
    assert valkey.states() == [b"unknown"]
    assert len(second.received) == 1
    await second.close()
