"""stripe: a customer, under the key that the SDK makes or under the caller's."""

import stripe
from calls import run


def call(order):
    http = stripe.RequestsClient(timeout=order["timeout_s"])
    addresses = {"api": order["url"]}
    client = stripe.StripeClient("sk_1", base_addresses=addresses, max_network_retries=2, http_client=http)
    options = {"idempotency_key": order["key"]} if order["key"] else {}
    return client.v1.customers.create({"description": order["prompt"]}, options).description


run(call, "stripe")
