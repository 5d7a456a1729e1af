"""cohere: a chat, also streamed."""

import cohere
from calls import headers, run


def call(order):
    client = cohere.ClientV2(base_url=order["url"], api_key="c-1", timeout=order["timeout_s"])
    messages = [{"role": "user", "content": order["prompt"]}]
    asked = {"model": "m", "messages": messages, "request_options": {"additional_headers": headers(order)}}
    if order["stream"]:
        deltas = [one for one in client.chat_stream(**asked) if one.type == "content-delta"]
        return "".join(one.delta.message.content.text for one in deltas)
    return client.chat(**asked).message.content[0].text


run(call, "cohere")
