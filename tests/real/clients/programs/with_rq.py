"""rq: a job that posts under its id, and is run again after an error or if its process dies."""

import os
import subprocess
import sys
import time

from calls import run
from redis import Redis
from rq import Queue, Retry, get_current_job
from task import post

BROKER = f"unix://{os.environ['BROKER']}?db=1"


def post_job(order):
    return post(order, get_current_job().id)


def call(order):
    queue = Queue(connection=Redis.from_url(BROKER))
    job = queue.enqueue("with_rq.post_job", order, retry=Retry(max=2))
    for _ in range(600):
        status = job.get_status(refresh=True)
        if status == "finished":
            return job.return_value()
        if status == "failed":
            raise type(job.latest_result().exc_string.strip().splitlines()[-1].partition(":")[0], (Exception,), {})
        time.sleep(0.1)
    raise TimeoutError


if __name__ == "__main__":
    command = [sys.executable, "-m", "rq.cli", "worker", "--url", BROKER, "--logging_level", "WARNING"]
    worker = subprocess.Popen(command, stdout=sys.stderr, cwd=os.path.dirname(__file__))
    try:
        run(call, "rq")
    finally:
        worker.terminate()
        worker.wait()
