"""The obvious stack: aiohttp's application and client, redis-py, one claim and one store for each execution.

No lease, no fencing, no streaming, no metrics: it reads the whole answer and stores it as JSON.
usage: python -m loadtest.peers.obvious PORT UPSTREAM_URL REDIS_URL
"""

import asyncio
import json
import sys
import uuid
from collections.abc import Mapping
from typing import cast

import aiohttp
import uvloop
from aiohttp import web
from redis.asyncio import Redis

CLAIM_MS, KEEP_MS = 60_000, 86_400_000
NOT_PASSED_ON = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}
STORE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end"


def end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the fields that are passed on."""
    return [(name, value) for name, value in headers.items() if name.lower() not in NOT_PASSED_ON]


class Obvious:
    """The whole proxy."""

    def __init__(self, upstream: str, session: aiohttp.ClientSession, redis: Redis) -> None:
        self._upstream, self._session, self._redis = upstream, session, redis
        self._store = redis.register_script(STORE)

    async def __call__(self, request: web.Request) -> web.Response:
        """Answer one request: from Redis where its key is known there, else from the upstream."""
        key = request.headers.get("Idempotency-Key")
        if request.method != "POST" or key is None:
            status, headers, body = await self._forward(request)
            return web.Response(status=status, headers=headers, body=body)
        name, token = f"obvious:{key}", uuid.uuid4().hex
        found = cast(bytes | None, await self._redis.set(name, token, nx=True, get=True, px=CLAIM_MS))
        if found is not None:
            return _stored(found)
        status, headers, body = await self._forward(request)
        answer = {"status": status, "headers": headers, "body": body.decode("latin1")}
        await self._store(keys=[name], args=[token, json.dumps(answer), KEEP_MS])
        return web.Response(status=status, headers=headers, body=body)

    async def _forward(self, request: web.Request) -> tuple[int, list[tuple[str, str]], bytes]:
        body = await request.read()
        url, headers = self._upstream + request.raw_path, end_to_end(request.headers)
        async with self._session.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        ) as answer:
            return answer.status, end_to_end(answer.headers), await answer.read()


def _stored(found: bytes) -> web.Response:
    if not found.startswith(b"{"):
        return web.json_response({"title": "in flight"}, status=409)
    answer = json.loads(found)
    headers = [*map(tuple, answer["headers"]), ("Idempotent-Replayed", "true")]
    return web.Response(status=answer["status"], headers=headers, body=answer["body"].encode("latin1"))


async def main(port: int, upstream: str, redis_url: str) -> None:
    """Serve until killed."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        application = web.Application()
        application.router.add_route("*", "/{rest:.*}", Obvious(upstream, session, Redis.from_url(redis_url)))
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
