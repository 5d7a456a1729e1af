"""dramatiq: a message whose actor posts under its id, and is run again after an error or if its process dies."""

import os
import subprocess
import sys
import threading

import dramatiq
from calls import run
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import CurrentMessage
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from task import post

BROKER = f"unix://{os.environ['BROKER']}?db=1"

# The messages of a dead worker are taken up after 2 s; the default is a minute.
broker = RedisBroker(url=BROKER, heartbeat_timeout=2000, maintenance_chance=1_000_000)
broker.add_middleware(Results(backend=RedisBackend(url=BROKER)))
broker.add_middleware(CurrentMessage())
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True, max_retries=2, min_backoff=500, max_backoff=1000)
def post_actor(order):
    return post(order, CurrentMessage.get_current_message().message_id)


def call(order):
    return post_actor.send(order).get_result(block=True, timeout=60_000)


class Worker(threading.Thread):
    """Starts the worker again when it ends, as a service manager does."""

    ended = False

    def run(self):
        command = [sys.executable, "-m", "dramatiq", "with_dramatiq", "--processes", "1", "--threads", "1"]
        while not self.ended:
            self.process = subprocess.Popen(command, stdout=sys.stderr, cwd=os.path.dirname(__file__))
            self.process.wait()


if __name__ == "__main__":
    worker = Worker(daemon=True)
    worker.start()
    try:
        run(call, "dramatiq")
    finally:
        worker.ended = True
        worker.process.terminate()
        worker.join()
