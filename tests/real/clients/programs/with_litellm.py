"""litellm: a completion of a model of OpenAI's, also streamed."""

import litellm
from calls import headers, run


def call(order):
    messages = [{"role": "user", "content": order["prompt"]}]
    asked = {"model": "openai/m", "messages": messages, "extra_headers": headers(order)}
    asked |= {"api_base": f"{order['url']}/v1", "api_key": "sk-1", "timeout": order["timeout_s"]}
    if order["stream"]:
        return "".join(one.choices[0].delta.content or "" for one in litellm.completion(stream=True, **asked))
    return litellm.completion(**asked).choices[0].message.content


run(call, "litellm")
