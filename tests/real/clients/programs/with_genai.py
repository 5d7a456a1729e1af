"""google-genai: generated content, also streamed."""

from calls import headers, run
from google import genai


def call(order):
    options = {"base_url": order["url"], "timeout": int(1000 * order["timeout_s"])}
    if order.get("retries"):  # none by default
        options["retry_options"] = {"attempts": 3, "initial_delay": 0.1}
    client = genai.Client(api_key="g-1", http_options=options)
    asked = {"model": "m", "contents": order["prompt"], "config": {"http_options": {"headers": headers(order)}}}
    if order["stream"]:
        return "".join(one.text or "" for one in client.models.generate_content_stream(**asked))
    return client.models.generate_content(**asked).text


run(call, "google-genai")
