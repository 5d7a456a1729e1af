"""celery: a task that posts under its id, and is run again after an error or if its process dies."""

import os
import subprocess
import sys

import requests
from calls import run
from celery import Celery
from task import post

BROKER = f"redis+socket://{os.environ['BROKER']}?virtual_host=1"

app = Celery(broker=BROKER, backend=BROKER)
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)


@app.task(bind=True, name="post", autoretry_for=(requests.RequestException,), max_retries=2, default_retry_delay=0.5)
def post_task(self, order):
    return post(order, self.request.id)


def call(order):
    return post_task.delay(order).get(timeout=60)


if __name__ == "__main__":
    command = [sys.executable, "-m", "celery", "-A", "with_celery", "worker", "--pool=prefork", "--concurrency=1"]
    worker = subprocess.Popen([*command, "--loglevel=WARNING"], stdout=sys.stderr, cwd=os.path.dirname(__file__))
    try:
        run(call, "celery")
    finally:
        worker.terminate()
        worker.wait()
