"""An A2A agent that says in a log when it works. Arguments: the descriptor of its socket, and the log.

It speaks version 1.0 of the protocol, and 0.3, whose methods have other names. What begins with "slow" takes a second.
"""

import asyncio
import socket
import sys
from pathlib import Path

import uvicorn
from a2a.helpers.proto_helpers import new_task_from_user_message, new_text_part
from a2a.server.agent_execution.agent_executor import AgentExecutor
from a2a.server.agent_execution.context import RequestContext
from a2a.server.events.event_queue_v2 import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes.jsonrpc_routes import create_jsonrpc_routes
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.types.a2a_pb2 import AgentCapabilities, AgentCard
from starlette.applications import Starlette


def note(text: str) -> None:
    with Path(sys.argv[2]).open("a") as log:
        log.write(f"{text}\n")


class Agent(AgentExecutor):
    """Does what it is told to, in a task with two artifacts."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        words = context.get_user_input()
        note(words)
        task = new_task_from_user_message(context.message)
        await event_queue.enqueue_event(task)
        updater = TaskUpdater(event_queue, task.id, task.context_id)
        await updater.start_work()
        await updater.add_artifact([new_text_part(f"begun: {words}")])
        await asyncio.sleep(1 if words.startswith("slow") else 0)
        await updater.add_artifact([new_text_part(f"done: {words}")])
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


card = AgentCard(name="agent", version="1", capabilities=AgentCapabilities(streaming=True))
handler = DefaultRequestHandler(agent_executor=Agent(), task_store=InMemoryTaskStore(), agent_card=card)
app = Starlette(routes=create_jsonrpc_routes(handler, "/a2a", enable_v0_3_compat=True))
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([socket.socket(fileno=int(sys.argv[1]))])
