"""A consumer of RabbitMQ that hands each message on over HTTP and acknowledges it once it was accepted.

    python -m tests.real.consumer PORT QUEUE URL LOG NEVER

What it does goes to LOG, a line each: the step, the message's id, its delivery tag, whether the broker
says that it was delivered before, and what came of it. The message with the id NEVER is handed on and not acknowledged.
"""

import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pika


def hand_on(url: str, message_id: str, body: bytes) -> tuple[int, str]:
    """Return the status of the answer, and what the proxy says of it."""
    try:
        asked = urllib.request.Request(url, body, {"Message-Id": message_id, "Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, answer.headers["Oncegate-Status"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Oncegate-Status"]


def main(port: int, queue: str, url: str, log: Path, never: str) -> None:
    """Consume for ever."""

    def consume(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        message = f"{properties.message_id} {method.delivery_tag} {method.redelivered}"
        note(f"got {message}")
        status, what = hand_on(url, properties.message_id, body)
        note(f"answered {message} {status} {what}")
        if properties.message_id == never:
            time.sleep(60)
        if 200 <= status < 300:
            channel.basic_ack(method.delivery_tag)
        else:
            channel.basic_nack(method.delivery_tag, requeue=True)

    def note(line: str) -> None:
        with log.open("a") as opened:
            opened.write(line + "\n")

    channel = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port)).channel()
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(queue, consume)
    channel.start_consuming()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5])
