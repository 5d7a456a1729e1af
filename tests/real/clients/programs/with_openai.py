"""openai: a chat completion, also streamed."""

import openai
from calls import run


def call(order):
    client = openai.OpenAI(base_url=f"{order['url']}/v1", api_key="sk-1", timeout=order["timeout_s"])
    if order["key"]:
        client._idempotency_header = "Idempotency-Key"
    asked = {"model": "m", "messages": [{"role": "user", "content": order["prompt"]}]}
    if order["key"]:
        asked["extra_headers"] = {"Idempotency-Key": order["key"]}
    if order["stream"]:
        return "".join(
            one.choices[0].delta.content or "" for one in client.chat.completions.create(stream=True, **asked)
        )
    return client.chat.completions.create(**asked).choices[0].message.content


run(call, "openai")
