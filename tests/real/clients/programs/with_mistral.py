"""mistralai: a chat completion, also streamed."""

from calls import headers, run
from mistralai.client import Mistral
from mistralai.client.utils import BackoffStrategy, RetryConfig


def call(order):
    client = Mistral(server_url=order["url"], api_key="m-1", timeout_ms=int(1000 * order["timeout_s"]))
    messages = [{"role": "user", "content": order["prompt"]}]
    asked = {"model": "m", "messages": messages, "http_headers": headers(order)}
    if order.get("retries"):  # none by default
        asked["retries"] = RetryConfig("backoff", BackoffStrategy(100, 1000, 1.5, 10_000), True)
    if order["stream"]:
        with client.chat.stream(**asked) as events:
            return "".join(one.data.choices[0].delta.content or "" for one in events)
    return client.chat.complete(**asked).choices[0].message.content


run(call, "mistralai")
