"""aiohttp as a plain reverse proxy, streaming both ways: what the framework alone costs.

usage: python -m loadtest.peers.passing PORT UPSTREAM_URL
"""

import asyncio
import sys

import aiohttp
import uvloop
from aiohttp import web

from loadtest.peers.obvious import end_to_end


async def main(port: int, upstream: str) -> None:
    """Serve until killed."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

        async def pass_on(request: web.Request) -> web.StreamResponse:
            body = request.content if request.can_read_body else None
            headers = end_to_end(request.headers)
            async with session.request(
                request.method, upstream + request.raw_path, headers=headers, data=body, allow_redirects=False
            ) as answer:
                response = web.StreamResponse(status=answer.status, headers=end_to_end(answer.headers))
                response.content_length = answer.content_length
                await response.prepare(request)
                async for part in answer.content.iter_any():
                    await response.write(part)
                await response.write_eof()
                return response

        application = web.Application()
        application.router.add_route("*", "/{rest:.*}", pass_on)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
