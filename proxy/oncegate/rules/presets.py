"""Presets: sets of fields for a rule that names one. The rule's own fields override them.

Every preset lets a duplicate wait: SDKs and senders of webhooks take a 409 for a failure, at once or after a few tries.

A preset has the fields of a rule, so that an operator could write the same. The exception is
`retry_count_header`, by which a client's count of its retries tells equal requests apart. Its SDKs send that count
with each try. Other clients mark their retries alone: for them a rule has `retry_mark`, which takes a request without
a mark for a new one (docs/decisions/008).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DAY_S, HOUR_S = 86_400, 3_600


@dataclass(frozen=True, slots=True)
class Preset:
    """One preset. `about` says when to use it, `caution` what can still go wrong.

    `fields`: those of a rule, as TOML has them. `counts_tokens`: the API's responses state the tokens they used, as
    those of OpenAI and Anthropic do. `family`: a key of FAMILIES, empty where no other preset is much like this one.
    """

    about: str
    caution: str
    fields: Mapping[str, Any]
    retry_count_header: str | None = None
    counts_tokens: bool = False
    family: str = ""


# Presets that share most of their fields, by the title of their common page.
FAMILIES = {"webhook": "Webhooks", "llm": "LLM calls"}


def _webhook(key: Any, *, namespace: str, wait_max_s: float, retention_s: float, about: str) -> Preset:
    """Return the preset of a sender that delivers an event again until it gets a 2xx."""
    fields = {
        # The id names the event, and several receivers may get it.
        "key": ["receiver", key] if isinstance(key, str) else [["receiver", *sources] for sources in key],
        "namespace": namespace,
        # Senders have no credential that identifies a tenant, or a new one for each delivery.
        "scope": [],
        # The body of an event can differ from delivery to delivery.
        "fingerprint": [],
        # Without a 2xx the delivery has failed, and the next one has to be executed.
        "release_statuses": ["3xx", "4xx", "5xx"],
        "ambiguous_statuses": [],
        "on_unknown": "retry",
        "on_duplicate": "wait",
        # Less than the sender waits for a response, so that it still gets the 503.
        "wait_max_s": wait_max_s,
        # Every sender delivers again after a 503; some give an event up after a 409.
        "in_flight_status": 503,
        "on_bad_key": "pass",
        # Longer than the sender delivers an event again.
        "retention_s": retention_s,
    }
    caution = (
        "oncegate delivers an event with an unknown outcome again, because losing it would be worse than running it "
        "twice. It forwards a delivery without an id, and does not protect it. Your service must still check the "
        "sender's signature: whoever can send unsigned events can also use up their ids."
    )
    return Preset(about, caution, fields, family="webhook")


def _llm(namespace: str) -> Preset:
    """Return the preset of an LLM's API, whose SDKs send no key but count their retries."""
    fields = {
        # Two equal prompts in a row are often meant: the retry count decides, not the window (docs/decisions/008).
        "key": [["header:Idempotency-Key"], ["derived:3600"]],
        "namespace": namespace,
        # A client that lost its stream comes back while it goes on, and reads on at once.
        "on_duplicate": "join",
        "wait_max_s": 600,
        "on_unknown": "retry",
        # The SDKs retry 408, 409, 429 and 5xx. A stored error would answer each of their retries.
        "release_statuses": ["default", "403", "408", "409", "5xx"],
        "ambiguous_statuses": [],
        "retention_s": 3600,
        "upstream_timeout_s": 600,
    }
    return Preset(
        "A retry by the SDK gets the response of its first attempt, instead of a second one that you pay for. oncegate "
        "identifies a request by its Idempotency-Key, if it has one. Else it takes the whole request as the key, and "
        "the header x-stainless-retry-count to tell a retry from a new request. A request with neither header is "
        "forwarded without protection.",
        "Two equal prompts at the same time are two requests: oncegate forwards the second one without protection, and "
        "its retry may get the response of the first. A prompt with an unknown outcome is sent again. If a stream "
        "breaks off, it also breaks off for the client. A stream that the API ends early but properly is stored like "
        "any other response.",
        fields,
        retry_count_header="x-stainless-retry-count",
        counts_tokens=True,
        family="llm",
    )


def _gemini() -> Preset:
    """Return the preset of Gemini's API, whose SDK neither sends a key nor marks its retries."""
    return Preset(
        "The API of Gemini. Its SDK sends no key and does not mark its retries: only a request with an "
        "Idempotency-Key that your code gives is protected. Others are forwarded without protection.",
        "A prompt with an unknown outcome is sent again. Tokens that replays save are not counted. "
        "[LLM calls](../how-to/llm.md#a-key-from-each-sdk) shows how to give a key.",
        {**_llm("gemini").fields, "key": "header:Idempotency-Key"},
    )


def _json_rpc(about: str, caution: str, **fields: Any) -> Preset:
    """Return the preset of a JSON-RPC API over HTTP."""
    common = {
        "protocol": "json-rpc",
        # A call without a key is the client's own concern, and so is a body that is no call.
        "on_bad_key": "pass",
        "on_duplicate": "wait",
        "wait_max_s": 600,
        "on_unknown": "hold",
        "retention_s": DAY_S,
        "upstream_timeout_s": 600,
    }
    return Preset(about, caution, {**fields, **common})


_CALL_CAUTION = (
    "A call without the key is forwarded without protection, and so is a batch. A call whose outcome is unknown is not "
    "made again: an operator has to resolve its key."
)

_PAYMENTS = {
    "guard": "required",
    "key": "header:Idempotency-Key",
    "on_unknown": "hold",
    "on_duplicate": "wait",
    # The API still executes an earlier request: its answer to this one is no result.
    "release_statuses": ["default", "409+/error/code=idempotency_key_in_use"],
    "retention_s": DAY_S,
}

PRESETS: dict[str, Preset] = {
    "payments": Preset(
        "An API like that of Stripe: clients send an Idempotency-Key, and retry with the same one.",
        "A payment with an unknown outcome is never sent a second time. An operator has to resolve its key.",
        _PAYMENTS,
    ),
    "stripe": Preset(
        "The API of Stripe itself. It executes a key only once, and keeps keys for "
        "[at least 24 hours](https://docs.stripe.com/api/idempotent_requests). So oncegate sends a retry of an unknown "
        "key on, with the same key, and the response settles it.",
        "After 24 hours, an operator has to resolve an unknown key.",
        {**_PAYMENTS, "upstream_idempotent": True, "upstream_key_retention_s": DAY_S},
    ),
    "square": Preset(
        "The API of Square: the key is the member `idempotency_key` of the JSON body.",
        "Requests whose body does not have this member, such as searches, are forwarded without protection.",
        {
            "key": "body:/idempotency_key",
            "on_bad_key": "pass",
            "on_unknown": "hold",
            "on_duplicate": "wait",
            "retention_s": DAY_S,
        },
    ),
    "paypal": Preset(
        "The API of PayPal: the key is the header PayPal-Request-Id.",
        "The PayPal SDK does not retry a POST by itself. Your code has to send it again with the same id. PayPal "
        "recognizes the id of an earlier request, but [not in all of its "
        "APIs](https://developer.paypal.com/api/rest/reference/idempotency). Where it does, set "
        "`upstream_idempotent = true`. `upstream_key_retention_s` is the shortest time that PayPal states: 3 hours for "
        "payment tokens. [Orders](https://docs.paypal.ai/reference/api/rest/orders/authorize-payment-for-order) keep "
        "an id for 6 hours.",
        {
            "key": "header:PayPal-Request-Id",
            "upstream_idempotent": False,
            "upstream_key_retention_s": 3 * HOUR_S,
            "on_unknown": "hold",
            "on_duplicate": "wait",
            "retention_s": 3 * DAY_S,
        },
    ),
    "stripe-webhook": _webhook(
        "body:/id",
        namespace="stripe-webhook",
        wait_max_s=8,
        retention_s=7 * DAY_S,
        about="Events of Stripe, which delivers an event again for up to 3 days.",
    ),
    "paypal-webhook": _webhook(
        "body:/id",
        namespace="paypal-webhook",
        wait_max_s=8,
        retention_s=7 * DAY_S,
        about="Events of PayPal, which delivers an event again up to 25 times in 3 days.",
    ),
    "github-webhook": _webhook(
        "header:X-GitHub-Delivery",
        namespace="github-webhook",
        wait_max_s=8,
        retention_s=7 * DAY_S,
        about="Events of GitHub, which waits 10 s for a response. It delivers again only on request, within 3 days.",
    ),
    "shopify-webhook": _webhook(
        [["header:X-Shopify-Event-Id"], ["header:X-Shopify-Webhook-Id"]],
        namespace="shopify-webhook",
        wait_max_s=3.5,
        retention_s=2 * DAY_S,
        about="Events of Shopify, which waits 5 s for a response. It delivers again 8 times in 4 hours, and then "
        "deletes the subscription.",
    ),
    "standard-webhooks": _webhook(
        [["id=header:webhook-id"], ["id=header:svix-id"]],
        namespace="standard-webhooks",
        wait_max_s=10,
        retention_s=7 * DAY_S,
        about="Senders that follow the Standard Webhooks specification, such as Svix.",
    ),
    "slack-events": _webhook(
        "body:/event_id",
        namespace="slack-events",
        wait_max_s=2,
        retention_s=DAY_S,
        about="The Events API of Slack, which waits 3 s for a response. It delivers again up to 3 times in an hour.",
    ),
    "sns": _webhook(
        "body:/MessageId",
        namespace="sns",
        wait_max_s=10,
        retention_s=2 * DAY_S,
        about="Amazon SNS with an HTTP endpoint. It waits 15 s for a response, and gives a message up after most 4xx. "
        "With raw delivery, the body is the message alone: set "
        '`key = ["receiver", "header:x-amz-sns-message-id"]`.',
    ),
    "pubsub-push": _webhook(
        "body:/message/messageId",
        namespace="pubsub-push",
        wait_max_s=8,
        retention_s=8 * DAY_S,
        about="Google Pub/Sub with a push endpoint. It delivers again for up to 7 days. Without its wrapper, the body "
        "is the message alone: make the subscription write metadata, and set "
        '`key = ["receiver", "header:x-goog-pubsub-message-id"]`.',
    ),
    "cloudevents": _webhook(
        [["source=cloudevent:source", "id=cloudevent:id"], ["source=body:/source", "id=body:/id"]],
        namespace="cloudevents",
        wait_max_s=10,
        retention_s=7 * DAY_S,
        about="CloudEvents: the key is the source and the id of an event, the same in binary and structured mode. "
        "Batches are forwarded without protection.",
    ),
    "openai": _llm("openai"),
    "anthropic": _llm("anthropic"),
    "gemini": _gemini(),
    "mcp": _json_rpc(
        "Tools of the Model Context Protocol. A call is guarded if its `_meta` has the member `idempotencyKey`, or its "
        "HTTP request the header Idempotency-Key. All else passes through: other methods, streams, notifications.",
        _CALL_CAUTION,
        when={"body:/method": "tools/call"},
        key=[["header:Idempotency-Key"], ["body:/params/_meta/idempotencyKey"]],
        namespace="mcp",
        fingerprint=["target", "body:/method", "body:/params/name", "body:/params/arguments"],
        release_statuses=[
            "default",
            # The headers contradict the body (HEADER_MISMATCH of the protocol 2026-07-28).
            "2xx+/error/code=-32020",
            "4xx+/error/code=-32020",
            # The TypeScript SDK's answer to a session that it does not have.
            "404+/error/code=-32001",
            # The tool asks back: the next round carries the answer, and the same key.
            "2xx+/result/resultType=input_required",
        ],
    ),
    "a2a": _json_rpc(
        "Agents that speak A2A over JSON-RPC. The key is the id of the message, which the protocol requires. Other "
        "methods pass through.",
        _CALL_CAUTION,
        when={"body:/method": ["message/send", "message/stream", "SendMessage", "SendStreamingMessage"]},
        key="body:/params/message/messageId",
        namespace="a2a",
        fingerprint=["target", "body:/method", "body:/params/message"],
    ),
    "json-rpc": _json_rpc(
        "Any other API that speaks JSON-RPC 2.0 over HTTP. Requests are guarded if they have the header "
        "Idempotency-Key; set `when` to the methods that change something.",
        "A request without the key is forwarded without protection, and so is a batch.",
        key="header:Idempotency-Key",
        namespace="json-rpc",
        fingerprint=["target", "body:/method", "body:/params"],
    ),
    "double-click": Preset(
        "Forms, and other clients without keys: two equal requests of the same tenant within 10 s are one request.",
        "If a user really wants the same thing twice within 10 s, it is done once. Without a header that identifies "
        "tenants, this also holds for two different users.",
        {"key": "derived:10", "on_duplicate": "wait", "wait_max_s": 30, "retention_s": 300},
    ),
}
# The presets whose replays count saved tokens.
COUNTING = frozenset(name for name, preset in PRESETS.items() if preset.counts_tokens)
