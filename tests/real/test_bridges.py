"""Programs that hand messages on over HTTP, die before they say so, and do it again."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parts import RawUpstream, Received, answering, ask, request, until
from tests.real.bridge import COMMIT_EVERY
from tests.zygote import Forked

RULES = """
[[rule]]
name = "events"
path = "/events"
preset = "cloudevents"

[[rule]]
name = "records"
path = "/records"
preset = "standard-webhooks"
key = ["header:X-Kafka-Topic", "header:X-Kafka-Partition", "header:X-Kafka-Offset"]
namespace = "kafka-orders"
"""


@pytest.fixture
async def gate(fork, upstream: RawUpstream, valkey, tmp_path: Path) -> Forked:
    (tmp_path / "rules.toml").write_text(RULES)
    return await fork(upstream, valkey.url, RULES_FILE="rules.toml")


class Bridge:
    """The program, with a log of messages and a note of how far it got."""

    def __init__(self, folder: Path, kind: str, url: str, messages: list[dict[str, Any]]) -> None:
        self._log, self._note = folder / "log", folder / "committed"
        self._log.write_text("\n".join(map(json.dumps, messages)))
        self.goes_back()
        self._command = [sys.executable, "-m", "tests.real.bridge", kind, str(self._log), str(self._note), url]
        self.process: subprocess.Popen[bytes] | None = None

    def goes_back(self) -> None:
        """Begin at the oldest message the next time."""
        self._note.write_text("0")

    @property
    def committed(self) -> int:
        return int(self._note.read_text())

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=Path(__file__).parents[2])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def end(self) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, 30)


@pytest.fixture
def bridge(tmp_path: Path, gate: Forked) -> Iterator[Any]:
    """Make bridges to a path of the gate: `bridge("kafka", "/records", messages)`; they end with the test."""
    made: list[Bridge] = []

    def make(kind: str, path: str, messages: list[dict[str, Any]]) -> Bridge:
        made.append(Bridge(tmp_path, kind, f"http://127.0.0.1:{gate.port}{path}", messages))
        return made[-1]

    yield make
    for one in made:
        one.kill()


def event(source: str, event_id: str, number: int) -> dict[str, Any]:
    attributes = {"source": source, "id": event_id, "type": "order.paid", "datacontenttype": "application/json"}
    return {"attributes": {"specversion": "1.0", **attributes}, "data": {"number": number}}


def record(partition: int, offset: int, number: int, topic: str = "orders") -> dict[str, Any]:
    return {"topic": topic, "partition": partition, "offset": offset, "value": {"number": number}}


# Eight messages each, of which no two may be taken for one.
MESSAGES = {
    "binary": (
        "/events",
        [event(source, name, 0) for source in ("/shop/a", "/shop/ä b") for name in ("1", "2", "1-1", "A%20234")],
    ),
    "structured": (
        "/events",
        [event(source, name, 0) for source in ("/shop/a", "/shop/ä b") for name in ("1", "2", "1-1", "A%20234")],
    ),
    "kafka": (
        "/records",
        [
            *(record(0, 41, 0), record(0, 42, 0), record(1, 42, 0), record(1, 123, 0), record(11, 23, 0)),
            *(record(11, 2, 0), record(1, 12, 0), record(1, 12, 0, topic="orders1")),
        ],
    ),
}


@pytest.mark.parametrize("kind", MESSAGES)
async def test_what_is_handed_on_again_is_handled_once(gate, upstream, bridge, kind):
    """The bridge dies with one message under way and others not noted as done; then it goes back to the beginning."""
    path, messages = MESSAGES[kind]
    killed, dies_at = asyncio.Event(), COMMIT_EVERY + 2

    async def script(server: RawUpstream, reader: Any, writer: Any, got: Received) -> None:
        if len(server.received) == dies_at:
            await killed.wait()
        await answering(b"HTTP/1.1 204 No Content\r\n\r\n")(server, reader, writer, got)

    upstream.script = script
    consumer = bridge(kind, path, messages)
    consumer.start()
    await until(lambda: len(upstream.received) == dies_at, 30)
    consumer.kill()
    assert consumer.committed == COMMIT_EVERY
    consumer.start()
    await until(lambda: gate.metric("waiting") == 1)
    killed.set()
    assert await consumer.end() == 0
    assert consumer.committed == len(upstream.received) == len(messages)
    assert gate.metric('requests_total{outcome="replayed"}') == dies_at - COMMIT_EVERY

    consumer.goes_back()
    consumer.start()
    assert await consumer.end() == 0
    assert len(upstream.received) == len(messages)
    assert gate.metric('requests_total{outcome="unguarded"}') == 0
    assert gate.metric('requests_total{outcome="passthrough"}') == 0


async def test_an_event_that_comes_in_the_other_mode_is_the_same(gate, upstream, bridge):
    """The events' own library writes both modes: a bridge that is changed from one to the other repeats nothing."""
    path, messages = MESSAGES["binary"]
    for kind in ("binary", "structured", "binary"):
        consumer = bridge(kind, path, messages)
        consumer.start()
        assert await consumer.end() == 0
    assert len(upstream.received) == len(messages)


async def test_a_batch_of_events_has_no_key(gate, upstream):
    """It goes on, each time, and the answer says that it was not guarded."""
    events = json.dumps([one["attributes"] for one in MESSAGES["structured"][1]]).encode()
    batch = request("POST", "/events", None, events, "Content-Type: application/cloudevents-batch+json")
    assert [(await ask(gate.port, batch)).header("oncegate-status") for _ in range(2)] == [b"unguarded"] * 2
    assert [got.body for got in upstream.received] == [events] * 2


async def test_a_message_that_failed_is_handled_when_it_comes_again(gate, upstream, bridge):
    """A bridge that ends at a failure goes on from there; what was done before stays done."""
    _, messages = MESSAGES["kafka"]

    async def script(server: RawUpstream, reader: Any, writer: Any, got: Received) -> None:
        status = b"500 No" if len(server.received) == 3 else b"200 OK"
        await answering(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % status)(server, reader, writer, got)

    upstream.script = script
    consumer = bridge("kafka", "/records", messages)
    consumer.start()
    assert await consumer.end() == 1
    consumer.start()
    assert await consumer.end() == 0
    offsets = [got.header("x-kafka-offset")[0] for got in upstream.received]
    assert offsets == [b"41", b"42", b"42", b"42", b"123", b"23", b"2", b"12", b"12"]
