"""Events as their senders deliver them, again and again, to a receiver behind the proxy that checks who signed them."""

import asyncio
import json
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from hmac import new as hmac
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
import stripe

from tests.parts import OK, Answer, RawUpstream, Received, answering, ask, holding, request, until
from tests.real.parts import asked
from tests.zygote import Forked

SECRET = "whsec_" + b64encode(b"of sender and receiver alone").decode()
RULES = "\n".join(
    f'[[rule]]\nname = "{preset}"\npath = "/{preset}/**"\npreset = "{preset}"\n'
    for preset in (
        *("stripe-webhook", "paypal-webhook", "github-webhook", "shopify-webhook", "slack-events", "pubsub-push"),
        *("standard-webhooks", "square", "paypal"),
    )
)

RULES += """
[[rule]]
name = "raw"
path = "/raw/**"
preset = "sns"
key = "header:x-amz-sns-message-id"
"""


@pytest.fixture
async def gate(fork, upstream: RawUpstream, valkey, tmp_path: Path) -> Forked:
    """One proxy with a rule for each preset, at a path of its name."""
    (tmp_path / "rules.toml").write_text(RULES)
    return await fork(upstream, valkey.url, RULES_FILE="rules.toml")


def told(answer: Answer) -> tuple[int, str]:
    return answer.status, (answer.header("oncegate-status") or b"").decode()


# As they are sent: the preset, and for an event and the number of the try its header lines and body ...


def digest(text: bytes) -> bytes:
    return hmac(SECRET.encode(), text, sha256).digest()


def stripe_event(event: str, number: int) -> tuple[list[str], bytes]:
    """Each try is signed anew, with its own time."""
    body = json.dumps({"id": f"evt_{event}", "object": "event", "type": "charge.succeeded"}, indent=2).encode()
    at = int(datetime.now(UTC).timestamp()) + number
    return [f"Stripe-Signature: t={at},v1={digest(b'%d.%s' % (at, body)).hex()}"], body


def paypal_event(event: str, number: int) -> tuple[list[str], bytes]:
    body = b'{"id":"WH-%s-7","event_version":"1.0","resource":{"amount":{"total":"7.47"}}}' % event.encode()
    return [
        f"PAYPAL-TRANSMISSION-ID: {number}-{event}",
        f"PAYPAL-TRANSMISSION-TIME: 2026-11-24T10:00:0{number}Z",
        f"PAYPAL-TRANSMISSION-SIG: {b64encode(digest(b'%d' % number + body)).decode()}",
    ], body


def github_event(event: str, _: int) -> tuple[list[str], bytes]:
    body = b'{"zen":"Keep it logically awesome.","hook_id":109948940}'
    return [
        "User-Agent: GitHub-Hookshot/044aadd",
        f"X-GitHub-Delivery: 72d3162e-cc78-11e3-81ab-{event:0>12}",
        "X-GitHub-Event: ping",
        f"X-Hub-Signature-256: sha256={digest(body).hex()}",
    ], body


def shopify_event(event: str, number: int) -> tuple[list[str], bytes]:
    """The event keeps its id over its tries and over the subscriptions that it goes to."""
    body = b'{"id":820982911946154508,"note":null,"total_price":"403.00"}'
    return [
        "X-Shopify-Topic: orders/create",
        f"X-Shopify-Hmac-Sha256: {b64encode(digest(body)).decode()}",
        "X-Shopify-Shop-Domain: shop.myshopify.com",
        f"X-Shopify-Webhook-Id: b54557e4-bdd9-4b37-8a5f-bf7d70bcd04{number}",
        f"X-Shopify-Event-Id: 98880550-7158-44d4-b7cd-{event:0>12}",
    ], body


def slack_event(event: str, number: int) -> tuple[list[str], bytes]:
    body = b'{"token":"z","team_id":"T1","type":"event_callback","event_id":"Ev%s","event":{}}' % event.encode()
    at = b"%d" % (1_764_000_000 + 60 * number)
    again = [f"X-Slack-Retry-Num: {number}", "X-Slack-Retry-Reason: http_timeout"] if number else []
    signature = digest(b"v0:%s:%s" % (at, body)).hex()
    return [f"X-Slack-Request-Timestamp: {at.decode()}", f"X-Slack-Signature: v0={signature}", *again], body


def pubsub_event(event: str, number: int) -> tuple[list[str], bytes]:
    """Each try has a token of its own, and its number in the body."""
    message = {"data": "aGk=", "messageId": event, "message_id": event, "publishTime": "2026-11-24T10:00:00Z"}
    body = {"message": message, "subscription": "projects/p/subscriptions/s", "deliveryAttempt": number + 1}
    return [f"Authorization: Bearer eyJhbGciOiJSUzI1NiJ9.{number}.sig"], json.dumps(body).encode()


def _standard(prefix: str) -> Callable[[str, int], tuple[list[str], bytes]]:
    def event(event: str, number: int) -> tuple[list[str], bytes]:
        body = b'{ "type": "invoice.paid",\n  "data": {"price": 1.10, "text": "\xc3\xa4"} }'
        at = datetime.now(UTC) + timedelta(seconds=number)
        signature = standardwebhooks.Webhook(SECRET).sign(f"msg_{event}", at, body.decode())
        stated = {"id": f"msg_{event}", "timestamp": int(at.timestamp()), "signature": signature}
        return [f"{prefix}-{name}: {value}" for name, value in stated.items()], body

    return event


def square_payment(event: str, _: int) -> tuple[list[str], bytes]:
    body = b'{"source_id":"cnon:ok","idempotency_key":"%s","amount_money":{"amount":1}}' % event.encode()
    return ["Authorization: Bearer EAAA", "Square-Version: 2026-09-16"], body


def paypal_order(event: str, _: int) -> tuple[list[str], bytes]:
    body = b'{"intent":"CAPTURE","purchase_units":[{"amount":{"currency_code":"USD","value":"100.00"}}]}'
    return ["Authorization: Bearer A21AAF", f"PayPal-Request-Id: {event}"], body


SENT: dict[str, tuple[str, Callable[[str, int], tuple[list[str], bytes]]]] = {
    "Stripe": ("/stripe-webhook/events", stripe_event),
    "PayPal": ("/paypal-webhook/events", paypal_event),
    "GitHub": ("/github-webhook/events", github_event),
    "Shopify": ("/shopify-webhook/events", shopify_event),
    "Slack": ("/slack-events/events", slack_event),
    "Pub/Sub": ("/pubsub-push/events", pubsub_event),
    "Standard Webhooks": ("/standard-webhooks/events", _standard("webhook")),
    "Svix": ("/standard-webhooks/svix", _standard("svix")),
}
CALLS = {
    "Square's API": ("/square/v2/payments", square_payment),
    "PayPal's API": ("/paypal/v2/checkout/orders", paypal_order),
}


def delivery(sender: str, event: str, number: int) -> bytes:
    path, written = (SENT | CALLS)[sender]
    lines, body = written(event, number)
    return request("POST", path, None, body, "Content-Type: application/json", *lines)


async def deliver(gate: Forked, sender: str, event: str, number: int) -> tuple[int, str]:
    return told(await ask(gate.port, delivery(sender, event, number)))


@pytest.mark.parametrize("sender", SENT)
async def test_a_delivery_is_handled_once(gate, upstream, sender):
    """What fails comes again and executes; what is done is acknowledged, however often it comes; bytes stay as sent."""
    outcomes = []
    for status in (b"500 No", b"202 Accepted", b"200 Twice", b"200 Twice"):
        upstream.script = answering(OK.replace(b"200 OK", status))
        outcomes.append(await deliver(gate, sender, "1", len(outcomes)))
    assert outcomes == [(500, "released"), (202, "executed"), (202, "replayed"), (202, "replayed")]
    assert await deliver(gate, sender, "2", 0) == (200, "executed")
    assert len(upstream.received) == 3


@pytest.mark.parametrize("sender", SENT | CALLS)
async def test_what_the_receiver_gets(gate, upstream, sender):
    """Body and headers as they were sent, byte for byte: every signature still fits."""
    raw = delivery(sender, "1", 0)
    assert told(await ask(gate.port, raw)) == (200, "executed")
    (got,) = upstream.received
    sent = {tuple(line.split(b": ", 1)) for line in raw.partition(b"\r\n\r\n")[0].split(b"\r\n")[2:]}
    assert got.body == raw.partition(b"\r\n\r\n")[2]
    assert sent <= set(got.headers)


@pytest.mark.parametrize("sender", CALLS)
async def test_a_call_is_executed_once(gate, upstream, sender):
    """The same bytes again get the same answer, an error too; another key is another call."""
    upstream.script = answering(OK.replace(b"200 OK", b"500 No"))
    assert [await deliver(gate, sender, "1", 0) for _ in range(2)] == [(500, "executed"), (500, "replayed")]
    assert await deliver(gate, sender, "2", 0) == (500, "executed")
    assert len(upstream.received) == 2


async def test_a_search_at_squares_api_has_no_key(gate, upstream):
    """It passes, and the answer says that it was not guarded."""
    search = request("POST", "/square/v2/orders/search", None, b'{"location_ids":["L"]}')
    assert [told(await ask(gate.port, search)) for _ in range(2)] == [(200, "unguarded")] * 2


async def test_shopify_before_it_had_event_ids(gate, upstream):
    """Without one the id of the webhook counts."""
    raw = delivery("Shopify", "1", 0).replace(b"X-Shopify-Event-Id", b"X-Other")
    again = delivery("Shopify", "2", 0).replace(b"X-Shopify-Event-Id", b"X-Other")
    assert [told(await ask(gate.port, one)) for one in (raw, again)] == [(200, "executed"), (200, "replayed")]


async def test_a_message_without_a_wrapper(gate, upstream):
    """Its id is in a header, its body whatever was published: here no JSON, there JSON with an id of its own."""
    raw = [
        request("POST", "/raw/orders", None, body, "x-amz-sns-rawdelivery: true", f"x-amz-sns-message-id: {name}")
        for name, body in (("1", b"paid"), ("1", b"paid"), ("2", b'{"MessageId":"1"}'), ("2", b'{"MessageId":"1"}'))
    ]
    outcomes = [told(await ask(gate.port, one)) for one in raw]
    assert outcomes == [(200, "executed"), (200, "replayed")] * 2


# Senders and receivers that check ...


class Verifying:
    """A receiver's script: handles what is signed, refuses the rest; `then` answers what was handled."""

    def __init__(self, verify: Callable[[Received], Any]) -> None:
        self._verify = verify
        self.handled: list[Any] = []
        self.then = answering(OK)

    async def script(self, upstream: Any, reader: Any, writer: asyncio.StreamWriter, got: Received) -> None:
        try:
            self.handled.append(self._verify(got))
        except (standardwebhooks.WebhookVerificationError, stripe.SignatureVerificationError):
            await answering(OK.replace(b"200 OK", b"400 Bad"))(upstream, reader, writer, got)
        else:
            await self.then(upstream, reader, writer, got)


def standard(got: Received) -> Any:
    return standardwebhooks.Webhook(SECRET).verify(got.body, {n.decode(): v.decode() for n, v in got.headers})


async def test_standard_webhooks_are_verified_behind_the_proxy(gate, upstream):
    """Forged: refused, and its id stays free. Genuine: handled once, whether its handler failed or died before."""
    receiver = Verifying(standard)
    upstream.script = receiver.script
    forged = delivery("Standard Webhooks", "1", 0).replace(b"1.10", b"9.10")
    assert told(await ask(gate.port, forged)) == (400, "released")
    receiver.then = answering(OK.replace(b"200 OK", b"503 Later"))
    assert await deliver(gate, "Standard Webhooks", "1", 1) == (503, "released")

    async def die(*_: object) -> None:
        raise ConnectionError

    receiver.then = die
    assert await deliver(gate, "Standard Webhooks", "1", 2) == (502, "unknown")
    receiver.then = answering(OK.replace(b"200 OK", b"204 No Content").replace(b"Content-Length: 2", b"X: y")[:-2])
    assert await deliver(gate, "Standard Webhooks", "1", 3) == (204, "executed")
    assert await deliver(gate, "Standard Webhooks", "1", 4) == (204, "replayed")
    assert receiver.handled == [{"type": "invoice.paid", "data": {"price": 1.10, "text": "ä"}}] * 3


async def test_a_redelivery_while_the_first_is_handled(gate, upstream):
    """It waits and gets the same acknowledgement; the event is handled once."""
    receiver, done = Verifying(standard), asyncio.Event()
    upstream.script, receiver.then = receiver.script, holding(done)
    first = asyncio.ensure_future(deliver(gate, "Svix", "1", 0))
    receiver._verify = lambda got: got.body
    await until(lambda: receiver.handled)
    second = asyncio.ensure_future(deliver(gate, "Svix", "1", 1))
    await until(lambda: gate.metric("waiting") == 1)
    done.set()
    assert [await first, await second] == [(200, "executed"), (200, "replayed")]
    assert len(receiver.handled) == 1


async def test_stripes_events_are_verified_behind_the_proxy(gate, upstream, api):
    """What a Stripe really sends is verified by Stripe's SDK; sent again with a new signature it is acknowledged."""
    receiver = Verifying(
        lambda got: stripe.Webhook.construct_event(got.body, got.header("stripe-signature")[0].decode(), SECRET)
    )
    upstream.script = receiver.script
    hook = {"url": f"http://127.0.0.1:{gate.port}/stripe-webhook/events", "secret": SECRET}
    await asyncio.to_thread(asked, f"{api}/_config/webhooks/a", hook, Authorization="Bearer sk_test_a")
    await asyncio.to_thread(asked, f"{api}/v1/customers", {"email": "a@example.com"}, Authorization="Bearer sk_test_a")
    # Beside it may come what the same Stripe was asked for before.
    await until(lambda: any(one.data.object.email == "a@example.com" for one in receiver.handled))
    event = next(one for one in receiver.handled if one.data.object.email == "a@example.com")
    assert event.type == "customer.created"
    (got,) = [one for one in upstream.received if event.id.encode() in one.body]
    at = int(datetime.now(UTC).timestamp())
    for body, outcome in (
        (got.body, (200, "replayed")),
        (got.body.replace(event.id.encode(), b"evt_2"), (200, "executed")),
    ):
        signature = stripe.WebhookSignature._compute_signature(f"{at}.{body.decode()}", SECRET)
        line = f"Stripe-Signature: t={at},v1={signature}"
        assert told(await ask(gate.port, request("POST", "/stripe-webhook/events", None, body, line))) == outcome
    assert [one.id for one in receiver.handled if one.id in (event.id, "evt_2")] == [event.id, "evt_2"]
    forged = request("POST", "/stripe-webhook/events", None, b'{"id":"evt_3"}', f"Stripe-Signature: t={at},v1=00")
    assert told(await ask(gate.port, forged)) == (400, "released")
    assert "evt_3" not in [one.id for one in receiver.handled]
