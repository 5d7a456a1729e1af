"""An API that charges an account exactly once: it records the execution in the transaction of the work.

    DATABASE_URL=postgresql://shop@127.0.0.1/shop python -m config.payments-postgres.api 9000

oncegate names each execution: `Oncegate-Execution: ID; fence=N`. The ID alone is unique, because a key whose claim was
lost comes again with the same ID and a higher fence.
"""

import asyncio
import hashlib
import json
import os
import re
import sys
from typing import NamedTuple

import asyncpg
from aiohttp import web

EXECUTION = re.compile(r"([\w-]{32}); fence=([0-9]+)")
TABLES = """
CREATE TABLE IF NOT EXISTS account (
    id      text PRIMARY KEY,
    balance bigint NOT NULL
);
CREATE TABLE IF NOT EXISTS execution (
    id      text PRIMARY KEY,                   -- alone, without the fence
    fence   bigint NOT NULL,                    -- of the claim under which the work was done
    request bytea NOT NULL,                     -- SHA-256 of the body
    status  smallint,                           -- the answer to whoever comes after
    answer  text,
    at      timestamptz NOT NULL DEFAULT now()  -- for the deletion of old rows
)
"""
BEGIN = "INSERT INTO execution (id, fence, request) VALUES ($1, $2, $3) ON CONFLICT (id) DO NOTHING RETURNING true"
DONE = "SELECT request, status, answer FROM execution WHERE id = $1"
FINISH = "UPDATE execution SET status = $2, answer = $3 WHERE id = $1"
CHARGE = "UPDATE account SET balance = balance - $2 WHERE id = $1 AND balance >= $2 RETURNING balance"


POOL = web.AppKey("pool", asyncpg.Pool)


class Answer(NamedTuple):
    """What the client gets; `text` is JSON."""

    status: int
    text: str


class Execution(NamedTuple):
    """What oncegate says about a request."""

    id: str
    fence: int


class Order(NamedTuple):
    """What a client wants."""

    account: str
    amount: int


async def execute_once(connection: asyncpg.Connection, execution: Execution, body: bytes) -> Answer:
    """Do the work of a request and record it, both or neither; if it is recorded already, return the answer of then."""
    request = hashlib.sha256(body).digest()
    # In READ COMMITTED each statement sees what others have committed before it.
    async with connection.transaction(isolation="read_committed"):
        # If another execution of this key runs, this waits for its commit or rollback.
        if await connection.fetchval(BEGIN, *execution, request):
            answer = await charge(connection, body)
            await connection.execute(FINISH, execution.id, *answer)
            return answer
        done = await connection.fetchrow(DONE, execution.id)
        assert done is not None
        if done["request"] != request:
            return Answer(422, '{"error": "this key was used for another request"}')
        return Answer(done["status"], done["answer"])


async def charge(connection: asyncpg.Connection, body: bytes) -> Answer:
    """The work. It changes nothing but this database, and commits nothing by itself."""
    try:
        order = Order(**json.loads(body))
        is_sound = isinstance(order.account, str) and isinstance(order.amount, int) and 0 < order.amount < 2**63
    except (ValueError, TypeError):
        is_sound = False
    if not is_sound:
        return Answer(400, '{"error": "an order has an account and an amount"}')
    balance = await connection.fetchval(CHARGE, *order)
    if balance is None:
        return Answer(402, '{"error": "the account does not have this amount"}')
    return Answer(201, json.dumps({**order._asdict(), "balance": balance}))


async def handle(request: web.Request) -> web.Response:
    """Answer one request."""
    named = EXECUTION.fullmatch(request.headers.get("Oncegate-Execution", ""))
    if named is None:
        return web.json_response({"error": "a charge comes through oncegate, with a key"}, status=400)
    body = await request.read()
    try:
        async with request.app[POOL].acquire() as connection:
            status, text = await execute_once(connection, Execution(named[1], int(named[2])), body)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        # Rolled back, or committed and not confirmed: the next execution finds out which.
        return web.Response(status=503, headers={"x-should-retry": "true"})
    return web.Response(status=status, text=text, content_type="application/json")


async def serve(database: str, port: int) -> None:
    """Serve until cancelled."""
    async with asyncpg.create_pool(database, min_size=1) as pool:
        await pool.execute(TABLES)
        app = web.Application()
        app[POOL] = pool
        app.router.add_post("/v1/charges", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        print(f"listening on {runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(os.environ["DATABASE_URL"], int(sys.argv[1])))
