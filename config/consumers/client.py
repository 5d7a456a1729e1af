"""Hands messages on over HTTP and acknowledges each once its outcome is known; a redelivery executes nothing.

`hand_on` is what a consumer of any broker calls. The program around it reads a partition's log from a file, which
is what a consumer of Kafka sees, and keeps its offset in another:

    python -m config.consumers.client http://127.0.0.1:8080/kafka/orders orders.log orders.offset
    python -m config.consumers.client --by-id http://127.0.0.1:8080/messages orders.log orders.offset
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from config.clients.sending import Outcome, Patience, send


class Verdict(Enum):
    """What to tell the broker."""

    ACKNOWLEDGE = "acknowledge"  # done
    REQUEUE = "requeue"  # not known to be done: let it come again, with the same id
    SET_ASIDE = "set aside"  # will be refused each time: to the dead letters


def hand_on(url: str, identity: Mapping[str, str], message: bytes, patience: Patience) -> Verdict:
    """Hand one message on. `identity`: the headers that name it, the same at every delivery."""
    result = send(url, message, {"Content-Type": "application/json", **identity}, patience)
    match result.outcome:
        case Outcome.ANSWERED:
            return Verdict.ACKNOWLEDGE
        case Outcome.REFUSED:
            return Verdict.SET_ASIDE
        case Outcome.UNKNOWN | Outcome.OPEN:
            return Verdict.REQUEUE


def by_place(topic: str, partition: int, offset: int) -> dict[str, str]:
    """Return what names a message in Kafka: its place."""
    return {"Kafka-Topic": topic, "Kafka-Partition": str(partition), "Kafka-Offset": str(offset)}


def by_id(source: str, message: bytes) -> dict[str, str]:
    """Return what names a message that has an id of its own, as a CloudEvent. KeyError where it has none."""
    return {"ce-source": source, "ce-id": str(json.loads(message)["id"])}


def commit(path: Path, offset: int) -> None:
    """Write the next offset, so that it is there whole or not at all."""
    new = path.with_suffix(".new")
    with new.open("w") as file:
        file.write(str(offset))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m config.consumers.client")
    parser.add_argument("url")
    parser.add_argument("log", type=Path, help="one message a line")
    parser.add_argument("offset", type=Path, help="the file of the next offset")
    parser.add_argument("--by-id", action="store_true", help="messages are named by their id, not by their place")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="patience of one try")
    asked = parser.parse_args()
    patience = Patience(timeout_s=asked.timeout)
    begin = int(asked.offset.read_text()) if asked.offset.exists() else 0
    for offset, message in enumerate(asked.log.read_bytes().splitlines()):
        if offset < begin:
            continue
        identity = by_id(asked.log.stem, message) if asked.by_id else by_place(asked.log.stem, 0, offset)
        verdict = hand_on(asked.url, identity, message, patience)
        print(offset, verdict.value, flush=True)
        if verdict is Verdict.REQUEUE:
            return 1  # those behind it have to wait, or their order would change
        if verdict is Verdict.SET_ASIDE:
            with asked.log.with_suffix(".dead").open("ab") as dead:
                dead.write(message + b"\n")
        commit(asked.offset, offset + 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
