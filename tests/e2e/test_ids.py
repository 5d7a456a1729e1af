"""One id everywhere: the key's in `Oncegate-Key-Id`, the request's in `X-Request-Id`, for the client and the API."""

import asyncio
import re
from collections.abc import Iterator

import pytest

from tests.conftest import Valkey
from tests.parts import OK, Answer, Proxy, RawClient, RawUpstream, answering, ask, holding, request, standing_upstream
from tests.zygote import Zygote, standing_proxy

KEY_ID = re.compile(rb"[\w-]{32}")
MADE = re.compile(rb"[0-9a-f]{16}-[0-9a-f]+")
DECLINED = OK.replace(b"200 OK", b"429 Too Many Requests")
GATEWAY = OK.replace(b"200 OK", b"504 Gateway Timeout")
OWN_ID = OK.replace(b"Content-Type", b"x-request-ID: of the API\r\nContent-Type")


def ids_of(received: list) -> list[bytes]:
    """Return the id of the request in each that came; every one has it once."""
    return [one for each in received for one in each.header("x-request-id")]


def named(name: str) -> str:
    return f"X-Request-Id: {name}"


# The key's ...


async def test_each_answer_to_a_key_has_its_id(standing, behind, valkey):
    """Executed, replayed, released, unknown and refused: always the whole id, once, which the API has got as well."""
    port, answers = standing.port, []
    for key, script in (("a", OK), ("a", OK), ("b", DECLINED), ("c", GATEWAY), ("c", OK)):
        behind.script = answering(script)
        answers.append(await ask(port, request(key=key)))
    answers.append(await ask(port, request(key="a", body=b"another")))
    assert [answer.header("oncegate-status") for answer in answers] == [
        b"executed", b"replayed", b"released", b"unknown", b"unknown", b"refused",
    ]  # fmt: skip
    a, replayed, b, c, unknown, reused = [answer.header("oncegate-key-id") for answer in answers]
    assert (replayed, reused, unknown, len({a, b, c})) == (a, a, c, 3)
    assert [one.header("oncegate-key-id") for one in behind.received] == [[a], [b], [c]]
    assert {b"once:{%b}" % one for one in (a, c)} <= set(valkey.records())
    for answer, key_id in ((answers[4], c), (answers[5], a)):
        assert answer.problem["instance"] == f"urn:oncegate:key:{key_id.decode()}"


async def test_a_running_request_names_its_key_to_the_duplicate(standing, behind):
    """409 `in-flight` has the id that the API got; the answer itself is not another one for it."""
    ended = asyncio.Event()
    behind.script = holding(ended)
    first = asyncio.ensure_future(ask(standing.port, request()))
    while not behind.received:
        await asyncio.sleep(0.01)
    second = await ask(standing.port, request())
    ended.set()
    assert (second.slug, second.header("oncegate-key-id")) == ("in-flight", (await first).header("oncegate-key-id"))


async def test_a_request_without_a_key_has_no_id_of_one(standing, behind):
    """Neither on its answer nor for the API, nor where no key could be read."""
    answers = [await ask(standing.port, request(key=key)) for key in (None, '"')]
    assert [answer.header("oncegate-key-id") for answer in answers] == [None, None]
    assert [one.header("oncegate-key-id") for one in behind.received] == [[]]


@pytest.mark.parametrize("key", ["key-1", None], ids=["guarded", "passed through"])
async def test_the_key_s_id_is_never_a_client_s(standing, behind, key):
    """A client's own field is dropped in any case and number, under known heads, too, and its look-alike is refused."""
    claimed = "A" * 32
    extra = (f"Oncegate-Key-Id: {claimed}", f"ONCEGATE-KEY-ID: {claimed}", f"oncegate-key-id:{claimed}")
    for number in range(3):
        for method in ("POST", "GET"):
            assert (await ask(standing.port, request(method, "/", key and f"k{number}", b"", *extra))).status == 200
    got = [one.header("oncegate-key-id") for one in behind.received]
    assert [len(lines) for lines in got] == [1 if key else 0, 0] * 3
    assert [claimed.encode()] not in got
    for name in ("Oncegate_Key_Id", "ONCEGATE-KEY_ID"):
        assert (await ask(standing.port, request("POST", "/", key, b"", f"{name}: {claimed}"))).status == 400
    hidden = request("POST", "/", key, b"", "Connection: Oncegate-Key-Id", extra[0])
    assert (await ask(standing.port, hidden)).status == 400


async def test_the_key_s_id_of_the_api_is_not_stored(standing, behind):
    """Each answer has it anew: neither the API's own counts nor does a record hold a second one."""
    behind.script = answering(OK.replace(b"Content-Type", b"Oncegate-Key-Id: fake\r\nContent-Type"))
    ids = [(await ask(standing.port, request())).header("oncegate-key-id") for _ in range(2)]
    assert ids[0] == ids[1]
    assert KEY_ID.fullmatch(ids[0])


# The request's ...


async def test_a_request_s_id_is_passed_on(standing, behind):
    """To the API and back, guarded or not, whether the head came before or not, and whatever its name's spelling."""
    client = await RawClient.open(standing.port)
    sent = []
    for number in range(6):
        for key in (f"k{number}", None):
            sent.append(f"id-{number}-{key}".encode())
            answer = await client.ask(request("POST", "/", key, b"{}", f"x-request-ID: {sent[-1].decode()}"))
            assert answer is not None
            assert answer.header("x-request-id") == sent[-1]
    assert ids_of(behind.received) == sent
    client.close()


async def test_a_request_without_an_id_gets_one(standing, behind):
    """Another one each, the same for the API and the client."""
    client = await RawClient.open(standing.port)
    answers = [await client.ask(request("POST", "/", key, b"{}")) for key in ("a", "b", None, None, "c")]
    made = [answer.header("x-request-id") for answer in answers if answer is not None]
    assert all(MADE.fullmatch(one) for one in made)
    assert len(set(made)) == 5
    assert ids_of(behind.received) == made
    client.close()


@pytest.mark.parametrize(
    "value", ["", "a b", "a" * 129, "\xe9", "a\tb", "a,\x80", 'a"; drop', "\x7f"], ids=lambda value: ascii(value[:8])
)
async def test_a_malformed_id_is_replaced(standing, behind, value):
    """Whether its head came before or not."""
    for _ in range(3):
        for key in ("a", None):
            answer = await ask(standing.port, request("POST", "/", key, b"{}", named(value)))
            assert answer.status in (200, 400)
            assert MADE.fullmatch(answer.header("oncegate-request-id") or answer.header("x-request-id"))
    assert all(MADE.fullmatch(one) for one in ids_of(behind.received))
    assert len(ids_of(behind.received)) == len(behind.received)


async def test_two_ids_are_replaced_by_one(standing, behind):
    answer = await ask(standing.port, request("POST", "/", "a", b"{}", named("one"), named("two")))
    assert MADE.fullmatch(answer.header("x-request-id"))
    assert ids_of(behind.received) == [answer.header("x-request-id")]


async def test_an_id_of_the_api_wins(standing, behind):
    """Executed, replayed and passed through; the replay still says which request it answers."""
    behind.script = answering(OWN_ID)
    for key in ("a", None, "b"):
        assert (await ask(standing.port, request(key=key))).header("x-request-id") == b"of the API"
    replay = await ask(standing.port, request("POST", "/v1/charges", "a", b'{"amount": 1}', named("mine")))
    assert (replay.header("x-request-id"), replay.header("oncegate-request-id")) == (b"of the API", b"mine")


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
async def test_a_replay_names_both_requests(standing, behind, large):
    """The original in `X-Request-Id`, as its own response had it, and itself in `Oncegate-Request-Id`."""
    if large:
        behind.script = answering(OK.replace(b": 2\r\n", b": 400000\r\n")[:-2] + b"x" * 400_000)
    answers = [
        await ask(standing.port, request("POST", "/", "a", b"{}", named(name))) for name in ("one", "two", "six")
    ]
    assert [answer.header("x-request-id") for answer in answers] == [b"one"] * 3
    assert [answer.header("oncegate-request-id") for answer in answers] == [None, b"two", b"six"]
    assert ids_of(behind.received) == [b"one"]


async def test_a_problem_has_the_id_of_its_own_request(standing, behind):
    """Refused under its key, before one was read, and where the head could not be read."""
    await ask(standing.port, request())
    for raw, status, name in (
        (request("POST", "/", "key-1", b"other", named("mine")), 422, b"mine"),
        (request("POST", "/", '"', b"", named("mine")), 400, b"mine"),
        (request("POST", "/", "key-1", b"", named("mine"), "X_Api-Key: b"), 400, b"mine"),
        (request("TRACE", "/", None, b"", named("mine")), 405, b"mine"),
        (request("OPTIONS", "/", None, b"", named("mine"), "Max-Forwards: 0"), 200, b"mine"),
        (b"POST / HTTP/1.1\r\nno head\r\n\r\n", 400, None),
        (b"POST / HTTP/9.9\r\nHost: a\r\n\r\n", 505, None),
    ):
        answer = await ask(standing.port, raw)
        got = answer.header("x-request-id")
        assert (answer.status, got if name else MADE.fullmatch(got) is not None) == (status, name or True)
    assert len(behind.received) == 1


async def test_a_websocket_has_an_id(standing, behind):
    behind.script = answering(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
    extra = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: a", "Sec-WebSocket-Version: 13")
    client = await RawClient.open(standing.port)
    client.writer.write(request("GET", "/", None, b"", *extra, named("mine")))
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert head.count(b"X-Request-Id: mine\r\n") == 1
    assert ids_of(behind.received) == [b"mine"]
    client.close()


# Other settings ...


@pytest.fixture(scope="module")
def off(zygote: Zygote, shared_valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    settings = {"REQUEST_ID_HEADER": "off", "HOSTS": "api.test"}
    with standing_proxy(zygote, shared_valkey.url, tmp_path_factory.mktemp("off"), settings) as proxy:
        yield proxy


async def test_it_can_be_switched_off(off, valkey):
    """A client's id is then a header like any other, and nobody gets one."""
    async with standing_upstream(off) as upstream:
        answers = await replayed(off, upstream)
        assert [answer.header("x-request-id") for answer in answers] == [None] * 4
        assert [answer.header("oncegate-request-id") for answer in answers] == [None] * 4
        assert ids_of(upstream.received) == [b"one two"]
        assert (await ask(off.port, request(host="other.test"))).header("x-request-id") is None


async def replayed(proxy: Proxy, upstream: RawUpstream) -> list[Answer]:
    """Return the answers to an execution, a replay, a refusal and what is no request."""
    keyed = request("POST", "/", "a", b"{}", "X-Request-Id: one two")
    return [await ask(proxy.port, raw) for raw in (keyed, keyed, request(key="a"), b"no request\r\n\r\n")]


@pytest.fixture(scope="module")
def other(zygote: Zygote, shared_valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    settings = {"REQUEST_ID_HEADER": "Correlation-Id", "HOSTS": "api.test", "CORS_ORIGINS": "https://a.test"}
    with standing_proxy(zygote, shared_valkey.url, tmp_path_factory.mktemp("other"), settings) as proxy:
        yield proxy


async def test_it_can_have_another_name(other, valkey):
    """A page of another origin may read it, and a host that is not served is told by it, too."""
    async with standing_upstream(other) as upstream:
        keyed = request("POST", "/", "a", b"{}", "correlation-id: mine", "Origin: https://a.test")
        for answer in [await ask(other.port, keyed) for _ in range(2)]:
            assert answer.header("correlation-id") == b"mine"
            exposed = answer.header("access-control-expose-headers")
            assert {b"Correlation-Id", b"Oncegate-Request-Id", b"Oncegate-Key-Id"} <= set(exposed.split(b", "))
        assert [one.header("correlation-id") for one in upstream.received] == [[b"mine"]]
        refused = await ask(other.port, request("POST", "/", "a", b"{}", "Correlation-Id: x", host="no.test"))
        assert (refused.status, refused.header("correlation-id")) == (421, b"x")
