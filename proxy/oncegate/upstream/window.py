"""A short wait for the whole of a small response."""

import asyncio

from oncegate.upstream.connection import Connection


async def completes_within(connection: Connection, window_s: float, max_bytes: int) -> bool:
    """Wait for `window_s` at most; return whether the response is complete, with no more than `max_bytes`."""
    is_over = False

    def close() -> None:
        nonlocal is_over
        is_over = True
        connection.wake()

    # A timer of its own: the pool's sweep of deadlines is too coarse, and would fail the exchange.
    closing = asyncio.get_running_loop().call_later(window_s, close)
    response = connection.response
    try:
        while not (response.is_complete or is_over or response.buffered_bytes > max_bytes):
            # No deadline: the window ends the wait.
            await connection.next_arrival(float("inf"))
    finally:
        closing.cancel()
    return connection.is_complete_in(max_bytes)
