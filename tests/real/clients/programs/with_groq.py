"""groq: a chat completion, also streamed."""

import groq
from calls import headers, run


def call(order):
    client = groq.Groq(base_url=order["url"], api_key="gsk-1", timeout=order["timeout_s"])
    messages = [{"role": "user", "content": order["prompt"]}]
    asked = {"model": "m", "messages": messages, "extra_headers": headers(order)}
    if order["stream"]:
        return "".join(
            one.choices[0].delta.content or "" for one in client.chat.completions.create(stream=True, **asked)
        )
    return client.chat.completions.create(**asked).choices[0].message.content


run(call, "groq")
