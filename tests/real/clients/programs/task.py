"""What the workers do: they post a prompt under the id of their task."""

import os

import requests


def post(order, key):
    headers = {"Idempotency-Key": key, "X-Worker-Pid": str(os.getpid())}
    answer = requests.post(
        f"{order['url']}/charges", json={"prompt": order["prompt"]}, headers=headers, timeout=order["timeout_s"]
    )
    answer.raise_for_status()
    return answer.json()["answer"]
