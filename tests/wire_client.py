"""A small client that needs nothing but the standard library: one keyed request on a connection of its own."""

import asyncio


async def read(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Return the status, the fields and the body of one response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *lines = head.split("\r\n")[:-2]
    fields = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
    return int(line.split()[1]), fields, await reader.readexactly(int(fields["content-length"]))


def keyed(path: str, key: str) -> bytes:
    """Return a request with a key."""
    head = f"POST {path} HTTP/1.1\r\nHost: api.test\r\nIdempotency-Key: {key}\r\nContent-Length: 2\r\n\r\n"
    return head.encode() + b"{}"


async def call(port: int, path: str, key: str) -> tuple[int, bytes]:
    """Send one request and return the status and the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(keyed(path, key))
        status, _, body = await read(reader)
        return status, body
    finally:
        writer.close()
