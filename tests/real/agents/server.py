"""An MCP server with tools that say in a log when they run. Arguments: the descriptor of its socket, and the log.

For both generations of Python's SDK: mcp 2 speaks the protocol of 2026-07-28 and the older ones, mcp 1 the older ones.
"""

import asyncio
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import uvicorn
from pydantic import BaseModel

IS_NEW = version("mcp").startswith("2.")
if IS_NEW:
    from mcp.server.mcpserver import Context, Elicit, MCPServer, Resolve
else:
    from mcp.server.fastmcp import Context
    from mcp.server.fastmcp import FastMCP as MCPServer

server = MCPServer("tools")


def note(text: str) -> None:
    with Path(sys.argv[2]).open("a") as log:
        log.write(f"{text}\n")


class Consent(BaseModel):
    """What the user is asked for."""

    yes: bool


@server.tool()
async def charge(amount: int) -> str:
    """Charge a card."""
    note(f"charge {amount}")
    return f"charged {amount}"


@server.tool()
async def refund(amount: int) -> str:
    """Give the money back."""
    note(f"refund {amount}")
    return f"refunded {amount}"


@server.tool()
async def fail(amount: int) -> str:
    """Fail as a tool does."""
    note(f"fail {amount}")
    raise ValueError("the card is expired")


@server.tool()
async def slow(seconds: float, ctx: Context) -> str:
    """Take its time, and say how far it is."""
    note("slow begins")
    try:
        await ctx.report_progress(1, 2)
        await asyncio.sleep(seconds)
    except BaseException:
        note("slow is cancelled")
        raise
    note("slow ends")
    return "done"


if IS_NEW:

    async def consent(amount: int) -> Elicit[Consent]:
        """Ask the user."""
        return Elicit(f"Pay {amount}?", Consent)

    @server.tool()
    async def pay(amount: int, answer: Annotated[Consent, Resolve(consent)]) -> str:
        """Pay if the user says so: on the wire of 2026-07-28 these are two rounds."""
        note(f"pay {amount}")
        return f"paid {amount}: {answer.yes}"

else:

    @server.tool()
    async def pay(amount: int, ctx: Context) -> str:
        """Pay if the user says so, asked within the call."""
        answer = await ctx.elicit(f"Pay {amount}?", Consent)
        note(f"pay {amount}")
        return f"paid {amount}: {answer.data.yes}"


app = server.streamable_http_app()
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([socket.socket(fileno=int(sys.argv[1]))])
