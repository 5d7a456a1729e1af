"""svix: a message, under the key that the SDK makes or under the caller's."""

from calls import run
from svix.api import MessageCreateOptions, MessageIn, Svix, SvixOptions


def call(order):
    client = Svix("sk_1", SvixOptions(server_url=order["url"], timeout=order["timeout_s"]))
    message = MessageIn(event_type="asked", payload={"prompt": order["prompt"]})
    return client.message.create("app_1", message, MessageCreateOptions(idempotency_key=order["key"])).payload["answer"]


run(call, "svix")
