"""Streams a text with the Python SDKs of OpenAI and Anthropic: prints what each read."""

import json
import sys

import anthropic
import openai

url = sys.argv[1]
chat = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
chunks = chat.chat.completions.create(model="m", messages=[], stream=True)
read = {"openai": "".join(chunk.choices[0].delta.content or "" for chunk in chunks)}
messages = anthropic.Anthropic(base_url=url, api_key="k", max_retries=0).messages
with messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "x"}]) as stream:
    read["anthropic"] = "".join(stream.text_stream)
print(json.dumps(read))
