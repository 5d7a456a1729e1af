"""A program that hands messages on over HTTP and notes how far it got only afterwards: at least once.

    python -m tests.real.bridge KIND LOG COMMITTED URL

LOG is a file of one JSON object a line, COMMITTED one with the number of lines that are done with. The
program notes there every COMMIT_EVERY lines, and at the end, that it got so far; whatever it handed on
before it died without noting it, it hands on again. It ends with an error where a message is not accepted.
"""

import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

COMMIT_EVERY = 5

Message = tuple[dict[str, str], bytes]


def kafka(line: dict[str, Any]) -> Message:
    """Return a record with its place in the log; that is what it is known by."""
    names = {f"X-Kafka-{name.title()}": str(line[name]) for name in ("topic", "partition", "offset")}
    return {**names, "Content-Type": "application/json"}, json.dumps(line["value"]).encode()


def binary(line: dict[str, Any]) -> Message:
    """Return an event whose attributes are header fields."""
    message = to_binary_event(CloudEvent(line["attributes"], line["data"]))
    return message.headers, message.body


def structured(line: dict[str, Any]) -> Message:
    """Return an event that is one JSON document."""
    message = to_structured_event(CloudEvent(line["attributes"], line["data"]))
    return message.headers, message.body


KINDS: dict[str, Callable[[dict[str, Any]], Message]] = {"kafka": kafka, "binary": binary, "structured": structured}


def main(kind: str, log: Path, committed: Path, url: str) -> None:
    """Hand on what is not noted as done."""
    lines = log.read_text().splitlines()
    for number in range(int(committed.read_text()), len(lines)):
        headers, body = KINDS[kind](json.loads(lines[number]))
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60):
            pass
        if (number + 1) % COMMIT_EVERY == 0:
            committed.write_text(str(number + 1))
    committed.write_text(str(len(lines)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
