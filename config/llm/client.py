"""Asks for a streamed text and pays for it once; a stream that was cut short is never taken for a whole one.

    python -m config.llm.client jobs.db ask "Why is the sky blue?"
    python -m config.llm.client jobs.db run http://127.0.0.1:8080

The words go to standard error as they come, the whole text to standard output once it is complete.
"""

import argparse
import json
import os
import sys
from http.client import HTTPResponse, IncompleteRead

from config.clients.jobs import Job, Jobs, work
from config.clients.sending import Patience, Result, send

LONGEST_S = 45 * 60  # shorter than the retention of the rule, 1 h


def events(stream: bytes) -> list[dict[str, object]]:
    """Return the events of a stream that came whole; its last, `[DONE]`, as an event without content."""
    lines = [line[5:].strip() for line in stream.splitlines() if line.startswith(b"data:")]
    return [{"type": "done"} if line == b"[DONE]" else json.loads(line) for line in lines]


def finished(stream: bytes) -> bool:
    """Return whether a stream came to the end that its protocol has: OpenAI's `[DONE]`, Anthropic's `message_stop`."""
    found = events(stream)
    return bool(found) and found[-1].get("type") in ("done", "message_stop")


def words(event: dict[str, object]) -> str:
    """Return the text in one event of OpenAI's chat completions or Anthropic's messages."""
    for choice in event.get("choices") or [event]:  # type: ignore[attr-defined]
        delta = choice.get("delta") or {}
        return str(delta.get("content") or delta.get("text") or "")
    return ""


def read_stream(response: HTTPResponse) -> bytes:
    """Read a stream to its end. IncompleteRead where that is missing, also where the connection ended cleanly."""
    stream = shown = b""
    while piece := response.read1(65536):
        stream += piece
        whole = stream[: stream.rfind(b"\n\n") + 2] if b"\n\n" in stream else b""
        print("".join(map(words, events(whole[len(shown) :]))), end="", file=sys.stderr, flush=True)
        shown = whole
    print(file=sys.stderr)
    if response.length or not finished(stream):
        raise IncompleteRead(stream)
    return stream


def ask(base_url: str, job: Job, patience: Patience) -> Result:
    """Send a job's prompt under the job's key and print the text."""
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}",
        "Idempotency-Key": job.key,
    }
    result = send(f"{base_url}/v1/chat/completions", job.body, headers, patience, read_stream)
    if result.answer and result.answer.status == 200:
        print("".join(map(words, events(result.answer.body))))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m config.llm.client")
    parser.add_argument("jobs", help="the file of jobs")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ask", help="order a text").add_argument("prompt")
    run = commands.add_parser("run", help="fetch what is open")
    run.add_argument("base_url")
    run.add_argument("--timeout", type=float, default=120.0, metavar="S", help="longest silence of one try")
    run.add_argument("--tries", type=int, default=4, metavar="N")
    asked = parser.parse_args()
    jobs = Jobs(asked.jobs)
    if asked.command == "ask":
        messages = [{"role": "user", "content": asked.prompt}]
        print(jobs.add(json.dumps({"model": "gpt-4.1-mini", "stream": True, "messages": messages}).encode()))
        return 0
    patience = Patience(tries=asked.tries, timeout_s=asked.timeout)
    return work(jobs, LONGEST_S, lambda job: ask(asked.base_url, job, patience))


if __name__ == "__main__":
    sys.exit(main())
