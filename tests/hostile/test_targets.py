"""Where requests go: to the configured upstream, never to the admin pages, never elsewhere (T13, T15)."""

import asyncio
import re
from contextlib import closing

from tests.parts import RawClient, answering, ask, request


def admin_paths() -> list[str]:
    """Return the admin paths in every disguise."""
    found = []
    for name in ("metrics", "healthz", "readyz"):
        dotted = [
            f"/{name}",
            f"//{name}",
            f"/./{name}",
            f"/x/../{name}",
            f"/../{name}",
            f"/%2e/{name}",
            f"/x/%2e%2e/{name}",
        ]
        dotted += [
            f"/{name}/",
            f"/{name}//",
            f"/{name}/.",
            f"/{name}/x/..",
            f"/{name};a=b",
            f"/{name}?",
            f"/{name}?a=b",
        ]
        dotted += [
            f"/{name}%20",
            f"/{name}%00",
            f"/{name}%09",
            f"/{name}%0a",
            f"/%20{name}",
            f"/{name}.",
            f"/{name}.json",
        ]
        dotted += [f"/%2f{name}", f"/%5c{name}", f"/\\{name}", f"/x%2f..%2f{name}", f"/..%2f{name}", f"/..;/{name}"]
        dotted += [f"/{name.upper()}", f"/{name.title()}", f"/admin/{name}", f"/-/{name}", f"/_{name}", f"/.{name}"]
        dotted += ["/" + "".join(f"%{ord(letter):02x}" for letter in name)]
        dotted += ["/" + "".join(f"%25{ord(letter):02x}" for letter in name)]
        dotted += [f"/{name[:at]}%{ord(name[at]):02x}{name[at + 1 :]}" for at in range(len(name))]
        dotted += [f"http://api.test/{name}", f"http://api.test//{name}", f"HTTP://api.test/{name}?a"]
        found += dotted
    return found


async def test_no_admin_page_is_on_the_public_port(standing, behind):
    """T13: whatever looks like an admin path is the upstream's own, for every method and in every disguise."""
    paths = admin_paths()
    assert len(paths) > 130
    with closing(await RawClient.open(standing.port)) as client:
        for method in ("GET", "POST", "OPTIONS"):
            for path in paths:
                answer = await client.ask(request(method, path, None, b""))
                assert (answer.status, answer.body) == (200, b"ok"), path
        for host in (f"127.0.0.1:{standing.admin_port}", "localhost", "oncegate"):
            answer = await client.ask(request("GET", "/metrics", None, b"", host=host))
            assert (answer.status, answer.body) == (200, b"ok")
    assert len(behind.received) == 3 * len(paths) + 3


async def test_no_public_path_is_on_the_admin_port(standing, behind, valkey):
    """T13: the admin listener forwards nothing and claims nothing."""
    for method in ("GET", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS"):
        for path in ("/", "/v1/charges", "//metrics", "/metrics/x", "http://api.test/v1/charges"):
            raw = request(method, path, "admin", b"")
            with closing(await RawClient.open(standing.admin_port)) as client:
                client.writer.write(raw)
                assert re.match(rb"HTTP/1.[01] 4[0-9]{2} ", await client.reader.readline()), (method, path)
    assert behind.received == []
    assert valkey.records() == {}


def ways_elsewhere(port: int) -> list[tuple[str, str]]:
    """Return targets and Host fields that name the server on `port` in every way that some proxy followed."""
    place = f"127.0.0.1:{port}"
    addresses = (
        place, f"localhost:{port}", f"127.1:{port}", f"2130706433:{port}", f"0x7f000001:{port}", f"0177.0.0.1:{port}",
        f"0:{port}", f"0.0.0.0:{port}", f"127.0.0.1.:{port}", f"[::ffff:127.0.0.1]:{port}", f"[::]:{port}",
        f"[::ffff:7f00:1]:{port}", f"LOCALHOST:{port}", f"127.0.0.1:0{port}", f"127.0.0.1%00:{port}",
        f"127.0.0.1%2e:{port}",
    )  # fmt: skip
    ways = [(f"http://{address}/", host) for address in addresses for host in (address, "api.test")]
    disguised = (
        f"http://api.test@{place}/", f"http://{place}@api.test/", f"http://user:pw@{place}/", f"http://api.test:80@{place}/",
        f"http://api.test%40{place}/", f"http://api.test#@{place}/", f"http://api.test?@{place}/",
        f"http://api.test\\@{place}/", f"http://{place}\\@api.test/", f"http://{place}#.api.test/",
        f"http://{place}/@api.test", f"http:{place}/", f"http:/{place}/", f"http:///{place}/", f"http:\\\\{place}/",
        f"https://{place}/", f"ftp://{place}/", f"ws://{place}/", f"gopher://{place}/_GET", f"HTTP://{place}/",
        f"hTTp://{place}", f"http://{place}", f"http://{place}?x", f"//{place}/", f"///{place}/", f"/\\{place}/",
        f"\\\\{place}\\", f"/@{place}/", f"@{place}/", f":@{place}/", f":{port}/", f"{place}", f"{place}/x",
        f".{place}/", f"/http://{place}/", f"/?url=http://{place}/", f"/x;http://{place}/", f"/%2f{place}/",
        f"/.{place}/", f"/..//{place}/",
        f"*@{place}", f"/\xe9@{place}/", f"http://\xe9@{place}/", f"http://{place}\xe9/",
    )  # fmt: skip
    return ways + [(form, host) for form in disguised for host in (place, "api.test")]


async def test_only_the_configured_upstream_is_ever_contacted(standing, behind):
    """T15: however a request or an answer names another server, nothing connects to it."""
    connected = []
    other = await asyncio.start_server(lambda _, writer: connected.append(writer), "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    place = f"127.0.0.1:{port}"
    behind.script = answering(f"HTTP/1.1 307 Go\r\nLocation: http://{place}/\r\nContent-Length: 0\r\n\r\n".encode())
    extra = [f"Forwarded: host={place}", f"X-Forwarded-Host: {place}", f"X-Forwarded-Server: {place}"]
    extra += [f"X-Original-URL: http://{place}/", f"X-Rewrite-URL: http://{place}/", f"X-Host: {place}"]
    ways = ways_elsewhere(port)
    assert len({form for form, _ in ways}) >= 60
    rows = [("CONNECT", place, place), ("CONNECT", f"http://{place}/", place), ("TRACE", f"http://{place}/", place)]
    rows += [("OPTIONS", "*", place), *(("GET", form, host) for form, host in ways)]
    rows += [("POST", form, host) for form, host in ways]
    for number, (method, form, host) in enumerate(rows):
        key = f"ssrf{number}" if method == "POST" else None
        answer = await ask(standing.port, request(method, form, key, b"", *extra, host=host))
        assert answer.status in (307, 400, 405), form
    other.close()
    assert connected == []
    assert {received.header("host")[0] for received in behind.received} == {b"127.0.0.1:%d" % behind.port}
    # What was forwarded was sent as a path of the upstream's, or as a URL of the Host that was named.
    assert {received.line.split()[1][:1] for received in behind.received} == {b"/"}
