"""An MCP client that makes calls and prints what each of them came to, as JSON. Argument: what it does, as JSON.

`url`; `mode`: "legacy" for the older protocols; `calls`: of tools, each with its `tool`, `arguments`, `key`, a
`timeout` after which the call is cancelled, and `progress` to be told how far it is. `at_once`: all at the same time.
"""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any

IS_NEW = version("mcp").startswith("2.")
if IS_NEW:
    import mcp_types as types
    from mcp.client.client import Client
    from mcp.shared.exceptions import MCPError
else:
    from mcp import ClientSession, types
    from mcp.client.streamable_http import streamablehttp_client
    from mcp.shared.exceptions import McpError as MCPError


async def consent(*_: Any) -> types.ElicitResult:
    return types.ElicitResult(action="accept", content={"yes": True})


async def connected(stack: AsyncExitStack, order: dict[str, Any]) -> Any:
    if IS_NEW:
        return await stack.enter_async_context(
            Client(order["url"], mode=order.get("mode", "auto"), elicitation_callback=consent)
        )
    read, write, _ = await stack.enter_async_context(streamablehttp_client(order["url"]))
    session = await stack.enter_async_context(ClientSession(read, write, elicitation_callback=consent))
    await session.initialize()
    return session


async def call(client: Any, one: dict[str, Any]) -> dict[str, Any]:
    seen: list[float] = []

    async def progress(value: float, *_: Any) -> None:
        seen.append(value)

    more = {"progress_callback": progress} if one.get("progress") else {}
    meta = {"idempotencyKey": one["key"]} if one.get("key") else None
    try:
        async with asyncio.timeout(one.get("timeout", 30)):
            result = await client.call_tool(one["tool"], one["arguments"], meta=meta, **more)
    except TimeoutError:
        return {"timeout": True}
    except MCPError as error:
        data = error.error.data if isinstance(error.error.data, dict) else {}
        return {"code": error.error.code, "message": error.error.message, "problem": data.get("error", {}).get("code")}
    is_error = result.is_error if IS_NEW else result.isError
    return {"text": result.content[0].text, "is_error": is_error, "progress": seen}


async def main(order: dict[str, Any]) -> None:
    answers: list[dict[str, Any]] = []
    try:
        async with AsyncExitStack() as stack:
            client = await connected(stack, order)
            if order.get("at_once"):
                answers += await asyncio.gather(*(call(client, one) for one in order["calls"]))
            for one in () if order.get("at_once") else order["calls"]:
                answers.append(await call(client, one))
                await asyncio.sleep(order.get("pause", 0))
    except BaseException as error:  # what a lost connection makes of the session
        answers.append({"broken": repr(error)[:300]})
    print(json.dumps(answers))


asyncio.run(main(json.loads(sys.argv[1])))
