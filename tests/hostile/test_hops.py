"""Fields of one hop, and what Connection may not take away or a stranger claim (T3, T14)."""

from contextlib import closing

import pytest

from tests.parts import RawClient, answering, ask, request

# All that the proxy reads, sets or strips by itself.
ACTED_ON = (
    "Idempotency-Key", "Authorization", "X-Api-Key", "Cookie", "Host", "Content-Length", "Content-Type",
    "Content-Encoding", "Transfer-Encoding", "Expect", "Prefer", "Via", "Forwarded", "X-Real-IP", "X-Forwarded-For",
    "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded-Server", "X-Forwarded-Prefix",
    "Idempotency-Fence", "Oncegate-Execution",
)  # fmt: skip
HOP_BY_HOP = ("Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Upgrade", "HTTP2-Settings", "Proxy-Authorization")


def nominations(name: str) -> list[str]:
    """Return Connection fields that name a field, in every spelling that a parser might take for it."""
    spelled = [name, name.lower(), name.upper(), name.swapcase()]
    among = [f"close, {name}", f"{name},close", f"x,\t{name}\t,y", f", ,{name},", f"keep-alive,{name},keep-alive"]
    lines = [f"close\r\nConnection: {name}", f"{name}\r\ncOnnection: x", f"x\r\nConnection: y\r\nConnection:{name}"]
    return [*spelled, *among, *lines]


@pytest.mark.parametrize("name", ACTED_ON)
async def test_connection_cannot_take_away_what_the_proxy_acts_on(standing, behind, name):
    """T3: nominating a field that the proxy reads or sets gets 400 and the end, and nothing is forwarded."""
    values = nominations(name)
    assert len(values) * len(ACTED_ON) >= 200
    for number, value in enumerate(values):
        for key in (f"nominated-{number}", None):
            with closing(await RawClient.open(standing.port)) as client:
                answer = await client.ask(request("POST", "/x", key, b"", f"Connection: {value}"))
                assert answer is not None
                assert (answer.status, answer.header("connection")) == (400, b"close"), value
    assert behind.received == []


@pytest.mark.parametrize("name", HOP_BY_HOP)
async def test_fields_of_one_hop_end_there_in_both_directions(standing, behind, name):
    """T3: hop-by-hop fields and harmless nominated ones reach neither the upstream nor the client nor a replay."""
    for number, value in enumerate(nominations("X-Mine")):
        spelled = (name.lower(), name.upper(), name)[number % 3]
        extra = [f"{spelled}: hop", "x-MINE: mine", "X-End: kept", f"Connection: {value}"]
        if name == "Upgrade":  # with Connection: upgrade it would be another question
            extra = [line.replace("upgrade", "Upgrade") for line in extra]
        fields = "".join(f"{line}\r\n" for line in extra if not line.lower().startswith("upgrade"))
        behind.script = answering(f"HTTP/1.1 200 OK\r\n{fields}Content-Length: 2\r\n\r\nok".encode())
        for key in (f"{name}-{number}", f"{name}-{number}", None):  # executed, replayed, passed through
            answer = await ask(standing.port, request("POST", "/x", key, b"", *extra))
            assert names(answer.headers).isdisjoint({name.lower().encode(), b"x-mine"}), value
            assert answer.header("connection") == (b"close" if "close" in value else None)
            assert answer.header("x-end") == b"kept"
        for received in behind.received:
            assert names(received.headers).isdisjoint({name.lower().encode(), b"x-mine", b"connection"}), value
            assert received.header("x-end") == [b"kept"]
        assert len(behind.received) == 2
        behind.received.clear()


def names(headers: list[tuple[bytes, bytes]]) -> set[bytes]:
    return {name.lower() for name, _ in headers}


# What a stranger claims about its way (T14) ...

CLAIMS = [
    line
    for claimed in ("203.0.113.9", "127.0.0.1", "unknown", '"[2001:db8::1]:80"', "claimed.test, 10.0.0.1")
    for line in (
        f"X-Forwarded-For: {claimed}", f"x-FORWARDED-for:{claimed}", f"X-Forwarded-Host: {claimed}",
        f"X-Forwarded-Proto: {claimed}", f"X-Forwarded-Port: {claimed}", f"X-Forwarded-Server: {claimed}",
        f"X-Forwarded-Prefix: /{claimed}", f"Forwarded: for={claimed};host={claimed}", f"X-Real-IP: {claimed}",
        f"Via: 1.1 {claimed}", f"X-Forwarded-For: {claimed}\r\nX-Forwarded-For: {claimed}",
    )
]  # fmt: skip


async def test_what_a_stranger_claims_about_its_way_is_replaced(standing, behind):
    """T14: forwarding fields of a peer that is not trusted are dropped and set anew, and change nobody's scope."""
    assert len(CLAIMS) >= 50
    for number, claim in enumerate(CLAIMS):
        guarded = request("POST", "/x", f"claim-{number}", b"", claim)
        assert (await ask(standing.port, guarded)).header("oncegate-status") == b"executed"
        honest = request("POST", "/x", f"claim-{number}", b"")
        assert (await ask(standing.port, honest)).header("oncegate-status") == b"replayed"
        assert (await ask(standing.port, request("PUT", "/x", None, b"", claim))).status == 200
    assert len(behind.received) == 2 * len(CLAIMS)
    for received in behind.received:
        assert received.header("x-forwarded-for") == [b"127.0.0.1"]
        assert received.header("x-forwarded-proto") == [b"http"]
        assert received.header("x-forwarded-host") == [b"api.test"]
        assert received.header("via") == [b"1.1 oncegate"]
        gone = {b"forwarded", b"x-real-ip", b"x-forwarded-port", b"x-forwarded-server", b"x-forwarded-prefix"}
        assert names(received.headers).isdisjoint(gone)


async def test_a_claim_to_be_a_trusted_proxy_makes_none(proxies, upstream, valkey):
    """T14: who is trusted is decided by the peer's address, whatever chain its fields name."""
    trusted = ("::1", "127.0.0.2", "10.0.0.0", "203.0.113.0")
    gate = proxies(upstream, valkey.url, TRUSTED_PROXIES="::1,127.0.0.2,10.0.0.0/8,203.0.113.0/24")
    for said in trusted:
        claims = [f"X-Forwarded-For: {said}", f"Forwarded: for={said}", f"X-Real-IP: {said}", f"Via: 1.1 {said}"]
        assert (await ask(gate.port, request("PUT", "/x", None, b"", *claims))).status == 200
        assert upstream.received[-1].header("x-forwarded-for") == [b"127.0.0.1"]
        assert said.encode() not in upstream.received[-1].head
