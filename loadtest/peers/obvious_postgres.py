"""The obvious stack on PostgreSQL: aiohttp's application and client, and the recipe of most articles over a pool.

One INSERT … ON CONFLICT DO NOTHING claims a key, one UPDATE stores its response. No lease, no fencing, no audit, no
streaming, no waiting: whoever comes meanwhile gets 409, and a key whose process died stays in flight.
usage: python -m loadtest.peers.obvious_postgres PORT UPSTREAM_URL POSTGRES_URL
"""

import asyncio
import json
import sys

import aiohttp
import asyncpg
import uvloop
from aiohttp import web

from loadtest.peers.obvious import end_to_end

CONNECTIONS = 10  # the default of asyncpg's pools
TABLE = """
CREATE TABLE IF NOT EXISTS idempotency_key (
    key text PRIMARY KEY,
    locked_at timestamptz NOT NULL DEFAULT now(),
    status int,
    headers text,
    body bytea
)
"""
CLAIM = "INSERT INTO idempotency_key (key) VALUES ($1) ON CONFLICT (key) DO NOTHING RETURNING key"
FIND = "SELECT status, headers, body FROM idempotency_key WHERE key = $1"
STORE = "UPDATE idempotency_key SET status = $2, headers = $3, body = $4 WHERE key = $1"


class Obvious:
    """The whole proxy."""

    def __init__(self, upstream: str, session: aiohttp.ClientSession, pool: asyncpg.Pool) -> None:
        self._upstream, self._session, self._pool = upstream, session, pool

    async def __call__(self, request: web.Request) -> web.Response:
        """Answer one request with a key: from the table where it is there, else from the upstream."""
        key = request.headers["Idempotency-Key"]
        if await self._pool.fetchval(CLAIM, key) is None:
            found = await self._pool.fetchrow(FIND, key)
            if found["status"] is None:
                return web.json_response({"title": "in flight"}, status=409)
            headers = [*map(tuple, json.loads(found["headers"])), ("Idempotent-Replayed", "true")]
            return web.Response(status=found["status"], headers=headers, body=found["body"])
        body = await request.read()
        url, sent = self._upstream + request.raw_path, end_to_end(request.headers)
        async with self._session.request(request.method, url, headers=sent, data=body, allow_redirects=False) as answer:
            status, headers, body = answer.status, end_to_end(answer.headers), await answer.read()
        await self._pool.execute(STORE, key, status, json.dumps(headers), body)
        return web.Response(status=status, headers=headers, body=body)


async def main(port: int, upstream: str, postgres_url: str) -> None:
    """Serve until killed."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    pool = asyncpg.create_pool(postgres_url, min_size=CONNECTIONS, max_size=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session, pool:
        await pool.execute(TABLE)
        application = web.Application()
        application.router.add_route("*", "/{rest:.*}", Obvious(upstream, session, pool))
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
