"""The store as an attacker meets it on the way, and the least that the proxy needs of it (T18)."""

import asyncio
import ssl

import trustme
from redis import Redis

from tests.parts import OK, answering, ask, chunk, request, serving, until
from tests.resp import relaying
from tests.test_redis_store import ACL

STREAMED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(bytes(300_000)) * 3 + b"0\r\n\r\n"


async def test_a_user_of_few_rights_is_enough(proxies, upstream, own_valkey):
    """T18: with a user who may run the scripts' own commands on the store's own keys, everything works, and no
    command is ever denied but those that only wake others sooner."""
    with own_valkey.client() as store:
        store.execute_command("ACL", "SETUSER", "gate", "reset", ">secret", *ACL)
        store.config_set("requirepass", "another")
    async with relaying(own_valkey.socket) as relay:
        gate = proxies(upstream, f"redis://gate:secret@127.0.0.1:{relay.port}/0", LEASE_MS=300, ON_DUPLICATE="wait")
        await until(lambda: gate.admin("/readyz")[0] == 200)
        rows = [
            (OK, b"executed"),
            (STREAMED, b"executed"),
            (b"HTTP/1.1 429 No\r\nContent-Length: 0\r\n\r\n", b"released"),
        ]
        rows += [(b"HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n", b"unknown"), (b"nonsense\r\n\r\n", b"unknown")]
        for number, (answer, status) in enumerate(rows):
            upstream.script = answering(answer)
            raw = request("POST", "/x", f"acl-{number}", b"1")
            assert (await ask(gate.port, raw)).header("oncegate-status") == status
            again = await ask(gate.port, raw)
            assert again.header("oncegate-status") == {b"executed": b"replayed"}.get(status, status)
        upstream.script = answering(OK, delay_s=1)  # renewed, and waited for
        both = await asyncio.gather(*(ask(gate.port, request("POST", "/x", "waits", b"1")) for _ in range(2)))
        assert sorted(answer.header("oncegate-status") for answer in both) == [b"executed", b"replayed"]
        with Redis(unix_socket_path=own_valkey.socket, password="another") as store:
            denied = {entry["object"] for entry in store.acl_log()}
            assert denied <= {"client|setinfo", "publish", "subscribe"}
            assert all(name.startswith(b"once:") for name in store.scan_iter())


async def test_a_store_that_cannot_prove_itself_learns_nothing(proxies, upstream):
    """T18: a man in the middle with another certificate gets no password and no command, the proxy is not ready,
    and keyed requests are refused before anything is sent."""
    came = b""

    async def talk(_, reader: asyncio.StreamReader, __) -> None:
        nonlocal came
        came += await reader.read()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1", "localhost").configure_cert(context)
    async with serving(talk, tls=context) as imposter:
        gate = proxies(upstream, f"rediss://gate:s3cret@localhost:{imposter.port}/0", STORE_TIMEOUT_MS=500)
        answer = await ask(gate.port, request())
        assert (answer.status, answer.slug) == (503, "store-unavailable")
        await until(lambda: "certificate" in gate.admin("/readyz")[1].lower())
        assert upstream.received == []
        assert came == b""
        assert "s3cret" not in gate.log() + gate.admin("/readyz")[1]
