"""A topic of SNS (moto's) that really delivers over HTTP."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest

from tests.parts import OK, RawUpstream, Received, answering
from tests.real.parts import MOTO, program
from tests.zygote import Forked

RULES = """
[[rule]]
name = "sns"
path = "/sns/**"
preset = "sns"
"""


@pytest.fixture(scope="module")
def sns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a service with topics."""
    with program(MOTO, tmp_path_factory.mktemp("moto") / "log") as url:
        credentials = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "eu-west-1"}
        client = boto3.client("sns", endpoint_url=url, **credentials)
        yield client
        client.close()


@pytest.fixture
async def gate(fork, upstream: RawUpstream, valkey, tmp_path: Path) -> Forked:
    (tmp_path / "rules.toml").write_text(RULES)
    return await fork(upstream, valkey.url, RULES_FILE="rules.toml")


def publish(sns: Any, gate: Forked, subscriptions: int, *texts: str, receiver: str = "orders?subscription=") -> None:
    """Publish to a new topic that delivers each message as often as it has subscriptions, all to one receiver.

    A topic has each endpoint once, and a query makes no other receiver.
    """
    topic = sns.create_topic(Name=f"orders-{uuid4()}")["TopicArn"]
    for number in range(subscriptions):
        endpoint = f"http://127.0.0.1:{gate.port}/sns/{receiver}{number}"
        sns.subscribe(TopicArn=topic, Protocol="http", Endpoint=endpoint)
    for text in texts:
        sns.publish(TopicArn=topic, Message=text)


def messages(upstream: RawUpstream) -> list[str]:
    return [json.loads(got.body)["Message"] for got in upstream.received]


async def test_a_message_that_is_delivered_twice_is_handled_once(gate, upstream, sns):
    """It is known by its MessageId; equal texts are two messages."""
    await asyncio.to_thread(publish, sns, gate, 2, "paid", "paid", "sent")
    assert messages(upstream) == ["paid", "paid", "sent"]
    assert gate.metric('requests_total{outcome="replayed"}') == 3


async def test_each_receiver_of_a_message_handles_it(gate, upstream, sns):
    await asyncio.to_thread(publish, sns, gate, 2, "paid", receiver="")
    assert sorted(got.line.split()[1] for got in upstream.received) == [b"/sns/0", b"/sns/1"]


async def test_a_delivery_that_fails_is_made_good_by_the_next(gate, upstream, sns):
    """What the receiver could not handle, it handles when it comes again; after that it is done."""

    async def script(server: RawUpstream, reader: Any, writer: Any, got: Received) -> None:
        status = b"200 OK" if len(server.received) > 1 else b"500 No"
        await answering(OK.replace(b"200 OK", status))(server, reader, writer, got)

    upstream.script = script
    await asyncio.to_thread(publish, sns, gate, 3, "paid")
    assert messages(upstream) == ["paid", "paid"]
    assert gate.metric('requests_total{outcome="released"}') == 1
    assert gate.metric('requests_total{outcome="replayed"}') == 1
