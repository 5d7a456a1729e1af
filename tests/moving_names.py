"""Run in namespaces of its own (see test_moving_names): a real name server, a real proxy, and names that move.

It prints one JSON object: what requests saw while names moved, and while their server was silent.
"""

import asyncio
import json
import socket
import struct
import sys
import time
from collections import Counter
from pathlib import Path

from tests.conftest import Valkey
from tests.parts import Proxy, Raw, RawClient, request

PORT, STORE_PORT, NAME_SERVER = 8000, 6379, "127.0.0.53"
RULES = """
[[upstream]]
name = "moving"
url = "http://moving.test.:8000"

[[upstream]]
name = "silent"
url = "http://silent.test:8000"

[[rule]]
name = "moving"
path = "/moving/**"
upstream = "moving"

[[rule]]
name = "silent"
path = "/silent/**"
upstream = "silent"
"""


class NameServer(asyncio.DatagramProtocol):
    """Answers with the A records in `names` after `delay_s`; is silent about those in `silent`."""

    delay_s = 0.0

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.silent: set[str] = set()
        self.asked: Counter[str] = Counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.DatagramTransport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        labels, at = [], 12
        while size := data[at]:
            labels.append(data[at + 1 : at + 1 + size].decode())
            at += size + 1
        name, (kind, _) = ".".join(labels).lower(), struct.unpack("!HH", data[at + 1 : at + 5])
        self.asked[name] += 1
        if name in self.silent:
            return
        addresses = self.names.get(name, []) if kind == 1 else []
        code = 0 if name in self.names else 3
        head = data[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, len(addresses), 0, 0)
        records = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 0, 4) + socket.inet_aton(one) for one in addresses)
        reply = head + data[12 : at + 5] + records
        asyncio.get_running_loop().call_later(self.delay_s, self._transport.sendto, reply, addr)


async def talk(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with the address that was reached."""
    here = writer.get_extra_info("sockname")[0].encode()
    while True:
        await raw.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(here), here))


class Traffic:
    """Sends requests with keys one after the other, and notes how each one ended."""

    def __init__(self, port: int, path: str) -> None:
        self._port, self._path, self._count = port, path, 0

    async def ask(self) -> tuple[float, int, str]:
        """Send one request; return how long it took, its status and body."""
        self._count += 1
        asked, began = request("POST", self._path, f"{self._path}-{self._count}", b"{}"), time.monotonic()
        client = await RawClient.open(self._port)
        answer = await client.ask(asked)
        client.close()
        assert answer is not None
        return time.monotonic() - began, answer.status, answer.body.decode()

    async def until_at(self, address: str, limit_s: float) -> float:
        """Return how long it takes until ten answers in a row come from an address."""
        began, row, since = time.monotonic(), 0, 0.0
        while row < 10 and time.monotonic() - began < limit_s:
            _, _, body = await self.ask()
            row = row + 1 if body == address else 0
            since = time.monotonic() - began if row == 1 else since
        return since


async def main(folder: Path) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    _, names = await loop.create_datagram_endpoint(NameServer, local_addr=(NAME_SERVER, 53))
    names.names = {"moving.test": ["127.0.0.2"], "store.test": ["127.0.0.1"], "silent.test": ["127.0.0.2"]}
    servers = [Raw(talk) for _ in range(3)]
    for number, raw in enumerate(servers):
        await raw.start(sock=socket.create_server((f"127.0.0.{number + 2}", PORT)))
    store = Valkey("--port", str(STORE_PORT), "--bind", "127.0.0.1")
    (folder / "rules.toml").write_text(RULES)
    proxy = Proxy(
        "http://127.0.0.2:8000", f"redis://store.test:{STORE_PORT}", folder,
        {"RULES_FILE": folder / "rules.toml", "CONNECT_TIMEOUT_S": 1, "SECRET": "a secret of the test"},
    )  # fmt: skip
    try:
        await asyncio.to_thread(proxy.start)
        moving, silent, plain = (Traffic(proxy.port, path) for path in ("/moving/a", "/silent/a", "/plain/a"))
        found: dict[str, object] = {"first": (await moving.ask())[1:]}
        names.names["moving.test"] = ["127.0.0.3"]
        found["followed_after_s"] = await moving.until_at("127.0.0.3", 5)
        names.names["moving.test"] = ["127.0.0.3", "127.0.0.4"]
        names.delay_s = 0.05
        # Until nothing is kept, neither connections nor addresses.
        await asyncio.sleep(6)
        at_once = await asyncio.gather(*[moving.ask() for _ in range(300)])
        names.delay_s = 0.0
        found["at_once"] = dict(Counter(status for _, status, _ in at_once))
        found["spread"] = sorted(Counter(body for _, _, body in at_once).values())
        # From here on nobody answers for one upstream that was never reached, nor for the store.
        names.silent = {"silent.test", "store.test"}
        refused = [asyncio.create_task(silent.ask()) for _ in range(12)]
        slowest = max([(await traffic.ask())[0] for traffic in (moving, plain) * 10])
        found["slowest_beside_silence_s"] = slowest
        found["refused"] = sorted({(status, took < 2) for took, status, _ in await asyncio.gather(*refused)})
        # And for one that is known, whose addresses are older than the time for which they are kept.
        names.silent |= {"moving.test"}
        await asyncio.sleep(1.5)
        older = [await moving.ask() for _ in range(10)]
        found["older"] = sorted({status for _, status, _ in older})
        found["slowest_with_older_s"] = max(took for took, _, _ in older)
        found["threads"] = len([*Path(f"/proc/{proxy.process.pid}/task").iterdir()])
        began = time.monotonic()
        found["stopped"] = await asyncio.to_thread(proxy.stop)
        found["stopped_after_s"] = time.monotonic() - began
        found["log"] = sorted({line["host"] for line in proxy.events("host name not looked up")})
    finally:
        proxy.close()
        store.close()
        for raw in servers:
            await raw.close()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(Path(sys.argv[1])))))
