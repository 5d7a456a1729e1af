"""The control socket: how a command on the same machine, such as `oncegate drain`, reaches the process that serves.

It lies in a folder of the proxy's own, and takes commands of the proxy's user alone (mode 0600), so that it needs no
secret. A client sends the line `drain`, as often as it likes, and gets a line of JSON each time: the `DrainProgress`
of what the first one began. The connection ends when the process does.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from oncegate.settings.settings import Settings

NAME = "control.sock"


class DrainProgress(TypedDict):
    """How far a drain is: requests with keys that are in flight, and open connections of clients."""

    in_flight: int
    connections: int


Drain = Callable[[], Awaitable[DrainProgress]]


def drain_progress(*gauges: Mapping[str, float]) -> DrainProgress:
    """Return how far the drain is, from the gauges of each worker."""
    sums = {name: int(sum(one.get(name, 0) for one in gauges)) for name in ("in_flight", "client_open_connections")}
    return {"in_flight": sums["in_flight"], "connections": sums["client_open_connections"]}


def socket_path(settings: Settings) -> Path | None:
    """Return where the control socket is; None where no setting names a folder for it."""
    if settings.run_dir is not None:
        return settings.run_dir / NAME
    return settings.data_dir / NAME if settings.store_url.get_secret_value() == "embedded" else None


@contextlib.asynccontextmanager
async def controlled(settings: Settings, drain: Drain, log: Any) -> AsyncIterator[None]:
    """Take commands in this context. Raises OSError if there can be no socket in the folder of `ONCEGATE_RUN_DIR`."""
    path, server = socket_path(settings), None
    try:
        server = path and await _listen(path, drain)
    except OSError as error:
        if settings.run_dir is not None:
            raise OSError(f"ONCEGATE_RUN_DIR: no socket {path}: {error.strerror or error}") from None
        log.warning("no control socket", path=str(path), reason=error.strerror or str(error))
    try:
        yield
    finally:
        if path and server:
            # Before it is closed: from then on the next proxy may listen there.
            path.unlink(missing_ok=True)
            server.close()


async def _listen(path: Path, drain: Drain) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, ValueError):
            async for line in reader:
                reply = await drain() if line.strip() == b"drain" else {"error": "the command is unknown"}
                writer.write(json.dumps(reply).encode() + b"\n")

    return await asyncio.start_unix_server(answer, sock=_bound(path))


def _bound(path: Path) -> socket.socket:
    """Return a socket of this user alone, in place of one that a killed proxy left behind. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise OSError("another proxy listens there; each needs a folder of its own")
    bound = socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        bound.bind(str(path))
        path.chmod(0o600)
    except OSError:
        bound.close()
        raise
    return bound
