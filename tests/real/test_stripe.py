"""Stripe's own SDK, with the keys, retries and timeouts it has by itself, at an API that ignores keys."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stripe

from tests.parts import OK, RawUpstream, answering, holding, until
from tests.real.parts import ACCOUNT, CHARGES, CUSTOMERS, Slow, listed

CARD = {"number": "4242424242424242", "exp_month": "12", "exp_year": "2040", "cvc": "123"}


def client(port: int, seconds: float = 20.0) -> stripe.StripeClient:
    """Return a client as a shop has it, but for its patience, which is 80 s by default."""
    return stripe.StripeClient(
        ACCOUNT,
        base_addresses={"api": f"http://127.0.0.1:{port}"},
        max_network_retries=2,
        http_client=stripe.RequestsClient(timeout=seconds),
    )


def taken_on(shop: stripe.StripeClient) -> tuple[str, str]:
    """Take on a customer; return its id, and that of its card. The key of each step is the SDK's own."""
    customer = shop.v1.customers.create({"email": "a@example.com"})
    method = shop.v1.payment_methods.create({"type": "card", "card": CARD})  # type: ignore[typeddict-item]
    shop.v1.payment_methods.attach(method.id, {"customer": customer.id})
    return customer.id, method.id


def buy(shop: stripe.StripeClient) -> tuple[str, str]:
    """Take on a customer and charge them; return their ids."""
    customer, method = taken_on(shop)
    charge = shop.v1.charges.create({"amount": 500, "currency": "eur", "customer": customer, "source": method})
    return customer, charge.id


async def test_a_retry_after_a_timeout_charges_once(shop_gate, api, slow, upstream):
    """The first try of each step times out while the API works; the SDK's retry waits for its answer and gets it."""
    for target in (CUSTOMERS, CHARGES):
        slow.held[target] = lambda: shop_gate.metric("waiting") == 1
    customer, charge = await asyncio.to_thread(buy, client(shop_gate.port, 1.0))
    assert [one["id"] for one in await listed(api, "customers")] == [customer]
    assert [(one["id"], one["amount"]) for one in await listed(api, "charges")] == [(charge, 500)]
    assert shop_gate.metric('requests_total{outcome="executed"}') == 4
    assert shop_gate.metric('requests_total{outcome="replayed"}') >= 2
    keys = [got.header("idempotency-key")[0] for got in upstream.received]
    assert len(set(keys)) == len(keys) == 4


async def test_without_the_proxy_it_charges_twice(api, slow, upstream):
    """The same client straight at the API: the same key twice makes two customers and two charges."""
    for target in (CUSTOMERS, CHARGES):
        slow.held[target] = lambda target=target: sum(got.line.startswith(target) for got in upstream.received) >= 2
    await asyncio.to_thread(buy, client(upstream.port, 1.0))
    assert len(await listed(api, "customers")) >= 2
    assert len(await listed(api, "charges")) >= 2
    keys = [got.header("idempotency-key")[0] for got in upstream.received if got.line.startswith(CHARGES)]
    assert len(keys) >= 2
    assert len(set(keys)) == 1


async def test_an_answer_lost_on_the_way_to_the_client(shop_gate, api, slow):
    """The connection breaks before the answer: the SDK sends the same key again and gets the stored answer."""
    way = RawUpstream()
    await way.start()
    between = Slow(f"http://127.0.0.1:{shop_gate.port}")
    between.lost.add(CUSTOMERS)
    way.script = between.script
    made = await asyncio.to_thread(client(way.port).v1.customers.create, {"email": "b@example.com"})
    await way.close()
    assert [one["id"] for one in await listed(api, "customers")] == [made.id]
    assert len(way.received) == 2


IN_USE = b'{"error": {"code": "idempotency_key_in_use", "message": "...", "type": "idempotency_error"}}'
IN_USE_HEAD = b"HTTP/1.1 409 Conflict\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(IN_USE)


async def test_a_key_that_the_api_still_works_on(shop_gate, api, slow, upstream):
    """The API answers 409 `idempotency_key_in_use` once: the SDK's retry with the same key is executed."""

    async def busy_once(*arguments: Any) -> None:
        script = slow.script if len(upstream.received) > 1 else answering(IN_USE_HEAD + IN_USE)
        await script(*arguments)

    upstream.script = busy_once
    made = await asyncio.to_thread(client(shop_gate.port).v1.customers.create, {"email": "g@example.com"})
    assert [one["id"] for one in await listed(api, "customers")] == [made.id]
    assert len({got.header("idempotency-key")[0] for got in upstream.received}) == 1
    assert shop_gate.metric('requests_total{outcome="released"}') == 1


async def test_an_outcome_that_nobody_knows_is_not_tried_again(shop_gate, api, slow, upstream):
    """The API executes and its answer is lost: the SDK is told so in its own way, and stops retrying."""
    slow.lost.add(CUSTOMERS)
    with pytest.raises(stripe.APIError, match="may have been executed") as told:
        await asyncio.to_thread(client(shop_gate.port).v1.customers.create, {"email": "c@example.com"})
    assert told.value.http_status == 502
    assert (len(upstream.received), len(await listed(api, "customers"))) == (1, 1)


async def test_another_request_under_a_used_key(shop_gate, api, slow):
    """The SDK's own error says what is wrong; nothing is executed."""
    create = client(shop_gate.port).v1.customers.create
    options = {"idempotency_key": "order-17"}
    made = await asyncio.to_thread(create, {"email": "d@example.com"}, options)
    assert await asyncio.to_thread(create, {"email": "d@example.com"}, options) == made
    with pytest.raises(stripe.StripeError) as told:
        await asyncio.to_thread(create, {"email": "e@example.com"}, options)
    assert told.value.http_status == 422
    assert "key" in str(told.value)
    assert len(await listed(api, "customers")) == 1


RUNNING = "the first request with this key is still running"


async def test_what_the_sdk_says_while_the_first_request_runs(shop_gate, api, slow):
    """The SDK finds `type`, `code` and `message` where it looks for those of Stripe, and the caller's key beside."""
    done: list[bool] = []
    slow.held[CUSTOMERS] = lambda: done
    create = client(shop_gate.port).v1.customers.create
    options: Any = {"idempotency_key": "order-18", "max_network_retries": 0}
    original = asyncio.ensure_future(asyncio.to_thread(create, {"email": "h@example.com"}, options))
    await until(lambda: slow.held == {})
    at_once = options | {"headers": {"Prefer": "wait=0"}}
    with pytest.raises(stripe.APIError) as told:
        await asyncio.to_thread(create, {"email": "h@example.com"}, at_once)
    error: Any = told.value
    assert (error.http_status, str(error), error.user_message) == (409, RUNNING, RUNNING)
    assert (error.error.type, error.error.code, error.error.message) == ("idempotency_error", "in_flight", RUNNING)
    assert error.json_body["key"] == "order-18"
    held = asyncio.ensure_future(asyncio.to_thread(create, {"email": "h@example.com"}, options))
    await until(lambda: shop_gate.metric("waiting") == 1)
    done.append(True)
    assert await held == await original
    assert len(await listed(api, "customers")) == 1


async def test_its_newer_api_has_an_error_class_for_it(fork, upstream, valkey):
    """Under /v2 the same answer is the SDK's own IdempotencyError, with our code."""
    done = asyncio.Event()
    upstream.script = holding(done, OK)
    proxy = await fork(upstream, valkey.url)
    shop = client(proxy.port)
    options: Any = {"idempotency_key": "event-1", "max_network_retries": 0}
    send = partial(shop.raw_request, "post", "/v2/core/event_destinations", name="one", **options)
    original = asyncio.ensure_future(asyncio.to_thread(send))
    await until(lambda: upstream.received)
    with pytest.raises(stripe.IdempotencyError, match=RUNNING) as told:
        await asyncio.to_thread(send)
    assert (told.value.http_status, told.value.code) == (409, "in_flight")
    done.set()
    await asyncio.gather(original, return_exceptions=True)


async def test_a_request_of_another_account(shop_gate, api, slow):
    """The same key of two accounts is two keys: neither gets the other's answer."""
    made = []
    for account in ("sk_test_first", "sk_test_second"):
        shop = client(shop_gate.port)
        options = {"idempotency_key": "k", "api_key": account}
        made.append(await asyncio.to_thread(shop.v1.customers.create, {"email": "f@example.com"}, options))
    assert made[0].id != made[1].id
    assert len(await listed(api, "customers")) == 2


# What became of a charge: the newest one has to be that of the order.
ASKED = """
[[rule]]
name = "charges"
path = "/v1/charges"
preset = "payments"
[rule.reconcile]
url = "/v1/charges?limit=1&customer={header:X-Customer}"
keep = ["key", "header:X-Customer"]
credentials_file = "credentials"
reference = { "/data/0/metadata/order" = "{key}" }
succeeded = [{ status = "200", when = { "/data/0/status" = "succeeded" } }]
answers.succeeded.body_pointer = "/data/0"
first_after_s = 0.1
most_s = 0.5
"""


async def test_a_charge_whose_answer_was_lost_is_found(fork, api, slow, upstream, valkey, tmp_path: Path):
    """oncegate asks with a credential of its own, and the SDK gets the only charge by a retry of its own."""
    (tmp_path / "credentials").write_text(f"Authorization: Bearer {ACCOUNT}\n")
    (tmp_path / "rules.toml").write_text(ASKED)
    gate = await fork(upstream, valkey.url, RULES_FILE="rules.toml")
    shop = client(gate.port)
    customer, method = await asyncio.to_thread(taken_on, shop)
    charge = partial(
        shop.v1.charges.create,
        {"amount": 500, "currency": "eur", "customer": customer, "source": method, "metadata": {"order": "o-17"}},
        {"idempotency_key": "o-17", "headers": {"X-Customer": customer}},
    )
    slow.lost.add(CHARGES)
    made = await asyncio.to_thread(charge)
    charges = await listed(api, "charges")
    assert [(one["id"], one["amount"], one["metadata"]) for one in charges] == [(made.id, 500, {"order": "o-17"})]
    assert sum(got.line.startswith(CHARGES) for got in upstream.received) == 1
    assert gate.metric('requests_total{outcome="reconciled"}') == 1
