"""Calls a tool of an MCP server once, whatever the network does and however often this program dies.

python -m config.agents.client jobs.db add charge '{"amount": 2000}'
python -m config.agents.client jobs.db run http://127.0.0.1:8080/mcp

It speaks the protocol of 2026-07-28 without an SDK. With one, only the key is new: see the page of this folder.
"""

import argparse
import json
import sys
import uuid

from config.clients.jobs import Job, Jobs, work
from config.clients.sending import Answer, Patience, Result, send

LONGEST_S = 20 * 3600  # shorter than the retention of the rule, 24 h
PROTOCOL = "2026-07-28"
META = "io.modelcontextprotocol"


def call(url: str, job: Job, patience: Patience) -> Result:
    """Make a job's call under the job's key, and print what the tool says. The id of the request is a new one."""
    tool = json.loads(job.body)
    meta = {
        f"{META}/protocolVersion": PROTOCOL,
        f"{META}/clientCapabilities": {},
        f"{META}/clientInfo": {"name": "oncegate-example", "version": "1"},
        "idempotencyKey": job.key,
    }
    params = {"name": tool["name"], "arguments": tool["arguments"], "_meta": meta}
    message = {"jsonrpc": "2.0", "id": str(uuid.uuid4()), "method": "tools/call", "params": params}
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "MCP-Protocol-Version": PROTOCOL,
        "Mcp-Method": "tools/call",
        "Mcp-Name": tool["name"],
    }
    result = send(url, json.dumps(message).encode(), headers, patience)
    if result.answer is not None:
        print(said(result.answer, message["id"]))
    return result


def said(answer: Answer, own_id: object) -> str:
    """Return what the server, or oncegate, says to a request: the texts of a result, or the message of an error."""
    is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
    lines = [line[5:] for line in answer.body.splitlines() if line.startswith(b"data:")] if is_stream else [answer.body]
    for line in lines:
        message = json.loads(line or b"{}")
        if message.get("id") == own_id and "result" in message:
            return " ".join(part.get("text", "") for part in message["result"].get("content", []))
        if message.get("id") == own_id and "error" in message:
            return str(message["error"]["message"])
    return "no answer to this call"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m config.agents.client")
    parser.add_argument("jobs", help="the file of jobs")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="decide on a call")
    add.add_argument("tool")
    add.add_argument("arguments", type=json.loads, help="as JSON")
    run = commands.add_parser("run", help="make the calls that are open")
    run.add_argument("url")
    run.add_argument("--timeout", type=float, default=60.0, metavar="S", help="patience of one try")
    asked = parser.parse_args()
    jobs = Jobs(asked.jobs)
    if asked.command == "add":
        print(jobs.add(json.dumps({"name": asked.tool, "arguments": asked.arguments}).encode()))
        return 0
    patience = Patience(tries=4, timeout_s=asked.timeout)
    return work(jobs, LONGEST_S, lambda job: call(asked.url, job, patience))


if __name__ == "__main__":
    sys.exit(main())
