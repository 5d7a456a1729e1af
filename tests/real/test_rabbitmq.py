"""A real RabbitMQ, and consumers of it that are killed before they acknowledge."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from tests.parts import OK, RawUpstream, Received, answering, until
from tests.real.parts import INSTALLED
from tests.real.rabbitmq import RabbitMQ
from tests.zygote import Forked

pytestmark = INSTALLED
RULES = """
[[rule]]
name = "orders"
path = "/orders"
preset = "standard-webhooks"
key = "header:Message-Id"
namespace = "orders-queue"
"""


@pytest.fixture(scope="module")
def broker() -> Iterator[RabbitMQ]:
    node = RabbitMQ()
    try:
        node.wait_up()
        yield node
    finally:
        node.close()


@pytest.fixture
async def gate(fork, upstream: RawUpstream, valkey, tmp_path: Path) -> Forked:
    (tmp_path / "rules.toml").write_text(RULES)
    return await fork(upstream, valkey.url, RULES_FILE="rules.toml")


@pytest.fixture
def consume(broker: RabbitMQ, gate: Forked, tmp_path: Path) -> Iterator[object]:
    """Start a consumer: `consume(never="2")`; all end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(never: str = "") -> subprocess.Popen[bytes]:
        url = f"http://127.0.0.1:{gate.port}/orders"
        command = [
            sys.executable,
            "-m",
            "tests.real.consumer",
            str(broker.port),
            "orders",
            url,
            tmp_path / "log",
            never,
        ]
        started.append(subprocess.Popen(command, cwd=Path(__file__).parents[2]))
        return started[-1]

    yield start
    for one in started:
        kill(one)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def publish(broker: RabbitMQ, *message_ids: str) -> None:
    with broker.connect() as connection:
        channel = connection.channel()
        channel.queue_declare("orders", durable=True)
        channel.queue_purge("orders")
        for name in message_ids:
            channel.basic_publish("", "orders", b'{"amount":1}', pika.BasicProperties(message_id=name))


def left(broker: RabbitMQ) -> int:
    with broker.connect() as connection:
        return connection.channel().queue_declare("orders", passive=True).method.message_count  # type: ignore[no-any-return]


async def test_a_consumer_that_dies_before_it_acknowledges(gate, broker, upstream, consume, tmp_path):
    """Once with the answer in hand, once while the receiver is at it: the redelivery is acknowledged, handled once."""
    killed = asyncio.Event()

    async def script(server: RawUpstream, reader: object, writer: object, got: Received) -> None:
        if got.header("message-id") == [b"3"]:
            await killed.wait()
        await answering(OK)(server, reader, writer, got)

    upstream.script = script
    await asyncio.to_thread(publish, broker, "1", "2", "3", "4")
    log = tmp_path / "log"
    log.touch()

    first = consume(never="2")
    await until(lambda: "answered 2" in log.read_text(), 30)
    kill(first)
    second = consume()
    await until(lambda: len(upstream.received) == 3, 30)
    kill(second)
    consume()
    await until(lambda: gate.metric("waiting") == 1, 30)
    killed.set()
    await until(lambda: "answered 4" in log.read_text(), 30)
    await until(lambda: left(broker) == 0)

    steps = [line.split() for line in log.read_text().splitlines()]
    assert [tuple(step[1:]) for step in steps if step[0] == "answered"] == [
        ("1", "1", "False", "200", "executed"),
        ("2", "2", "False", "200", "executed"),
        ("2", "1", "True", "200", "replayed"),
        ("3", "1", "True", "200", "replayed"),
        ("4", "2", "False", "200", "executed"),
    ]
    assert ["got", "3", "2", "False"] in steps
    assert [got.header("message-id") for got in upstream.received] == [[b"1"], [b"2"], [b"3"], [b"4"]]


async def test_a_message_that_could_not_be_handled(gate, broker, upstream, consume, tmp_path):
    """A failure goes back to the queue and frees the id: the redelivery is handled."""

    async def script(server: RawUpstream, reader: object, writer: object, got: Received) -> None:
        status = b"500 No" if len(server.received) == 1 else b"200 OK"
        await answering(OK.replace(b"200 OK", status))(server, reader, writer, got)

    upstream.script = script
    await asyncio.to_thread(publish, broker, "5")
    consume()
    await until(lambda: len(upstream.received) == 2, 30)
    await until(lambda: "executed" in (tmp_path / "log").read_text())
    await until(lambda: left(broker) == 0)
    steps = [line.split() for line in (tmp_path / "log").read_text().splitlines() if line.startswith("answered")]
    assert [step[3:] for step in steps] == [["False", "500", "released"], ["True", "200", "executed"]]
