"""The API of the table of clients: it answers each SDK in its own form, and counts what it executes."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from tests.parts import LAST_CHUNK, RawUpstream, Received, chunk

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<h1>Page</h1>"
Meanwhile = Callable[[int, Received], Awaitable[None]]


class Api(RawUpstream):
    """Each request is one execution, whose answer names its number. `meanwhile` is awaited with it, before the answer.

    `prompt`: what the requests that count have in their body.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt = b""
        self.executions = 0
        self.meanwhile: Meanwhile = _at_once
        self.script = self._answer  # type: ignore[assignment]

    def begin(self, prompt: str, meanwhile: Meanwhile | None = None) -> None:
        """Count from 0 the executions of this prompt."""
        self.prompt, self.executions, self.meanwhile = prompt.encode(), 0, meanwhile or _at_once

    async def _answer(self, _: object, __: object, writer: asyncio.StreamWriter, got: Received) -> None:
        if got.line.startswith(b"GET "):
            writer.write(PAGE)
            return
        assert self.prompt in got.body, got.body
        self.executions += 1
        number = self.executions
        await self.meanwhile(number, got)
        path = got.line.split()[1].decode()
        form = next((form for begin, form in FORMS.items() if path.startswith(begin)), None)
        assert form, path
        streams = b'"stream":true' in got.body.replace(b" ", b"") or "streamGenerateContent" in path
        answer = form(answer_of(number), streams)
        if not streams:
            body = json.dumps(answer).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            return
        writer.write(SSE)
        for event in answer:
            writer.write(chunk(event))
            await writer.drain()
            await asyncio.sleep(0.1)
        writer.write(LAST_CHUNK)


async def _at_once(_: int, __: Received) -> None:
    pass


def answer_of(number: int) -> str:
    """Return the answer of an execution, the first of which is 1."""
    return f"execution {number}"


def _events(messages: list[Any], end: bytes = b"", named: bool = False) -> list[bytes]:
    """Return server-sent events, in the form in which one API has them."""
    lines = [(b"event: %s\n" % one["type"].encode() if named else b"", json.dumps(one).encode()) for one in messages]
    return [b"%sdata: %s\n\n" % line for line in lines] + [end] * bool(end)


def _chat(text: str, streams: bool) -> Any:
    """Return a chat completion, as of OpenAI, Groq and Mistral."""
    common = {
        "id": "c-1",
        "created": 1,
        "model": "m",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
    if not streams:
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return common | {"object": "chat.completion", "choices": [choice]}
    deltas = [{"role": "assistant", "content": piece} for piece in text.partition(" ")]
    choices = [{"index": 0, "delta": one, "finish_reason": None} for one in deltas]
    choices.append({"index": 0, "delta": {"content": ""}, "finish_reason": "stop"})
    return _events(
        [common | {"object": "chat.completion.chunk", "choices": [one]} for one in choices], b"data: [DONE]\n\n"
    )


def _message(text: str, streams: bool) -> Any:
    """Return a message, as of Anthropic."""
    message = {
        "id": "m-1", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }  # fmt: skip
    if not streams:
        return message | {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn"}
    deltas = [{"type": "text_delta", "text": piece} for piece in text.partition(" ")]
    return _events(
        [
            {"type": "message_start", "message": message | {"content": [], "stop_reason": None}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *({"type": "content_block_delta", "index": 0, "delta": one} for one in deltas),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
            {"type": "message_stop"},
        ],
        named=True,
    )


def _content(text: str, streams: bool) -> Any:
    """Return generated content, as of Gemini."""

    def candidate(piece: str) -> dict[str, Any]:
        return {
            "candidates": [
                {"content": {"role": "model", "parts": [{"text": piece}]}, "finishReason": "STOP", "index": 0}
            ]
        }

    return _events([candidate(piece) for piece in text.partition(" ")]) if streams else candidate(text)


def _cohere(text: str, streams: bool) -> Any:
    if not streams:
        content = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return {"id": "c-1", "finish_reason": "COMPLETE", "message": content}
    deltas = [
        {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": piece}}}}
        for piece in text.partition(" ")
    ]
    start = {"type": "message-start", "id": "c-1", "delta": {"message": {"role": "assistant"}}}
    return _events(
        [start, *deltas, {"type": "message-end", "id": "c-1", "delta": {"finish_reason": "COMPLETE"}}], named=True
    )


def _customer(text: str, _: bool) -> Any:
    return {"id": "cus_1", "object": "customer", "description": text}


def _svix_message(text: str, _: bool) -> Any:
    return {"id": "msg_1", "eventType": "asked", "payload": {"answer": text}, "timestamp": "2026-01-01T00:00:00Z"}


# The answers to paths that begin so.
FORMS: dict[str, Callable[[str, bool], Any]] = {
    "/v1/chat/completions": _chat,
    "/openai/v1/chat/completions": _chat,
    "/v1/messages": _message,
    "/v1/models/": _content,
    "/v2/chat": _cohere,
    "/v1/customers": _customer,
    "/api/v1/app/": _svix_message,
    "/charges": lambda text, _: {"answer": text},
}
