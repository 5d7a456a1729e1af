"""anthropic: a message, also streamed."""

import anthropic
from calls import headers, run


def call(order):
    client = anthropic.Anthropic(base_url=order["url"], api_key="sk-1", timeout=order["timeout_s"])
    messages = [{"role": "user", "content": order["prompt"]}]
    asked = {"model": "m", "max_tokens": 64, "messages": messages, "extra_headers": headers(order)}
    if order["stream"]:
        with client.messages.stream(**asked) as stream:
            return "".join(stream.text_stream)
    return client.messages.create(**asked).content[0].text


run(call, "anthropic")
