"""The mailbox of each process that makes claims: a hash whose fields are notes, so that a repeated note is one.

Notes are no truth: whoever acts on one looks at its own claim, or at the record. A mailbox lasts for a minute after its
last note, so that nothing is left of a process that died.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from oncegate.store.record import PREFIX_BYTES
from oncegate.store.redis import arguments
from oncegate.store.redis.topologies.topology import StoreServers
from oncegate.store.redis.wire import Script, ScriptCall, resp
from oncegate.store.store import MOST_NOTES, Background

# Repeats a call with its arguments until a time of the loop.
Repeat = Callable[[ScriptCall, bytes, float], Coroutine[Any, Any, tuple[Any, bool]]]

LASTS_MS = 60_000


def mailbox_of(token: bytes) -> bytes:
    """Return the name of the mailbox of the process that made a token. The token's prefix is enough."""
    return b"once:mail:{%s}" % token[:PREFIX_BYTES].hex().encode()


class Mailbox:
    """Posts notes, and takes those of a process.

    A reply may take `timeout_s`. `repeat` runs a script until it is confirmed. `background` finishes what nobody waits
    for.
    """

    def __init__(
        self, servers: StoreServers, script: Script, repeat: Repeat, background: Background, timeout_s: float
    ) -> None:
        self._servers, self._script, self._repeat = servers, script, repeat
        self._background, self._timeout_s = background, timeout_s
        self._clock = asyncio.get_running_loop().time

    async def post(self, token: bytes, note: bytes) -> bool:
        """Put a note into the mailbox of the process that made a token; return whether that was confirmed."""
        ends = self._clock() + self._timeout_s
        call = ScriptCall(self._script, mailbox_of(token), arguments.POST_COUNT, ends)
        reply, _ = await self._repeat(call, resp(note, LASTS_MS), ends)
        return isinstance(reply, list)

    async def collect(self, prefix: bytes) -> list[bytes]:
        """Take up to MOST_NOTES, none where the store does not answer.

        Notes are removed once they were read, not before: what a lost reply had is read again. A note may come twice.
        """
        name = mailbox_of(prefix)
        found = await self._ask(name, "HGETALL", name)
        notes: list[bytes] = found[::2][:MOST_NOTES] if isinstance(found, list) else []
        if notes:
            self._background(self._ask(name, "HDEL", name, *notes))
        return notes

    async def _ask(self, name: bytes, *words: bytes | str) -> Any:
        return await self._servers.command(name, *words, deadline=self._clock() + self._timeout_s)
