"""Clients that offer another protocol with their requests keep their connection, and get their answers."""

import asyncio
from pathlib import Path

from tests.real.parts import INSTALLED

pytestmark = INSTALLED


async def test_javas_default_client_keeps_its_connection(standing, behind):
    """It offers h2c with its requests. They are answered in HTTP/1.1, on one connection."""
    connections, offered = 0, b""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_client: bool) -> None:
        nonlocal offered
        while data := await reader.read(65536):
            offered += data if is_client else b""
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        theirs, ours = await asyncio.open_connection("127.0.0.1", standing.port)
        await asyncio.gather(pass_on(reader, ours, is_client=True), pass_on(theirs, writer, is_client=False))

    tap = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{tap.sockets[0].getsockname()[1]}"
    program = Path(__file__).with_name("upgrades") / "Offers.java"
    java = await asyncio.create_subprocess_exec("java", str(program), url, stdout=asyncio.subprocess.PIPE)
    told, _ = await asyncio.wait_for(java.communicate(), 60)
    tap.close()
    assert told.decode().splitlines() == ["200 HTTP_1_1 ok"] * 4
    assert b"Upgrade: h2c" in offered
    assert connections == 1
    assert [one.header("upgrade") + one.header("http2-settings") for one in behind.received] == [[]] * 4
