"""An A2A client that sends messages and prints what each of them came to, as JSON. Argument: what it does, as JSON.

`url`; `version` of the protocol; `stream`; `messages`, each with an `id`, its `text`, and a `timeout`. What comes of a
message: the tasks that its answer names, and the texts of their artifacts.
"""

import asyncio
import json
import sys
from typing import Any

import httpx
from a2a.client.client import Client, ClientConfig
from a2a.client.client_factory import ClientFactory
from a2a.helpers.proto_helpers import get_artifact_text
from a2a.types.a2a_pb2 import AgentCapabilities, AgentCard, AgentInterface, Message, Part, Role, SendMessageRequest
from a2a.utils.errors import A2AError


async def send(client: Client, one: dict[str, Any]) -> dict[str, Any]:
    message = Message(message_id=one["id"], role=Role.ROLE_USER, parts=[Part(text=one["text"])])
    tasks, texts = [], []
    try:
        async with asyncio.timeout(one.get("timeout", 30)):
            async for event in client.send_message(SendMessageRequest(message=message)):
                update = getattr(event, event.WhichOneof("payload"))
                tasks.append(update.id if event.HasField("task") else update.task_id)
                if event.HasField("artifact_update"):
                    texts.append(get_artifact_text(update.artifact))
                elif event.HasField("task"):
                    texts += map(get_artifact_text, update.artifacts)
    except TimeoutError:
        return {"timeout": True, "name": "TimeoutError"}
    except A2AError as error:
        return {"error": str(error), "name": type(error).__name__}
    return {"tasks": sorted(set(tasks)), "texts": texts}


async def main(order: dict[str, Any]) -> None:
    interface = AgentInterface(url=order["url"], protocol_binding="JSONRPC", protocol_version=order["version"])
    capabilities = AgentCapabilities(streaming=True)
    card = AgentCard(name="agent", version="1", capabilities=capabilities, supported_interfaces=[interface])
    async with httpx.AsyncClient(timeout=30) as http:
        client = ClientFactory(ClientConfig(streaming=order["stream"], httpx_client=http)).create(card)
        print(json.dumps([await send(client, one) for one in order["messages"]]))


asyncio.run(main(json.loads(sys.argv[1])))
