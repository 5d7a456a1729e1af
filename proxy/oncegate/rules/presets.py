"""Presets: what one word in a rule sets. Data; the rule's own fields override it.

Each is written as the fields of a rule, so that it says no more than an operator could, but for
`retry_count_header`: that equal requests are told apart by a client's count of its tries is only right where a
mistaken match costs little, so no rule can ask for it by itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Preset:
    """What a word stands for. `about` says when to use it, `caution` what can still go wrong.

    `counts_tokens`: its answers say what they used, as those of OpenAI or Anthropic do.
    """

    about: str
    caution: str
    fields: Mapping[str, Any]
    retry_count_header: str | None = None
    counts_tokens: bool = False


def _webhook(key: Any, *, namespace: str, wait_max_s: float, retention_s: float, about: str) -> Preset:
    """Return the preset of a sender that delivers an event again until it gets a 2xx.

    It has no credential that names a tenant, or a fresh one for each try, and its body may differ from
    try to try. Whatever is no 2xx is a failed delivery, after which the next one has to execute. A 503
    is what every sender takes for "come again"; some give an event up at a 409.
    """
    fields = {
        "key": key,
        "namespace": namespace,
        "scope": [],
        "fingerprint": [],
        "release_statuses": ["3xx", "4xx", "5xx"],
        "ambiguous_statuses": [],
        "on_unknown": "retry",
        "on_duplicate": "wait",
        "wait_max_s": wait_max_s,
        "in_flight_status": 503,
        "on_bad_key": "pass",
        "retention_s": retention_s,
    }
    caution = (
        "An event whose outcome is unknown is handed on again: losing it would be worse than running it twice. "
        "A delivery in which no id is found goes on unguarded. Keep the signature check in the service behind; "
        "who can send unsigned events can also use up their ids."
    )
    return Preset(about, caution, fields)


def _llm(namespace: str) -> Preset:
    """Return the preset of an API of prompts whose SDKs send no key but count their tries."""
    fields = {
        "key": [["header:Idempotency-Key"], ["derived:3600"]],
        "namespace": namespace,
        "on_duplicate": "wait",
        "wait_max_s": 600,
        "on_unknown": "retry",
        "release_statuses": ["401", "403", "408", "409", "425", "429", "5xx"],
        "ambiguous_statuses": [],
        "retention_s": 3600,
        "upstream_timeout_s": 600,
    }
    return Preset(
        "The SDK's own retry gets the answer of its first try, replayed or as soon as it is there, instead of a second "
        "one that is paid again. A request with Idempotency-Key is guarded by that; one that only says which try it is "
        "(x-stainless-retry-count) by what it asks; one with neither passes.",
        "Two equal prompts at once are two intents: the second goes on unguarded, and its retry may get the first "
        "one's answer. A prompt whose outcome is unknown is sent again. A stream that broke off is broken off for the "
        "client, too; one that the API itself ends early, but properly, is kept like any other answer.",
        fields,
        retry_count_header="x-stainless-retry-count",
        counts_tokens=True,
    )


PRESETS: dict[str, Preset] = {
    "payments": Preset(
        "An API in the manner of Stripe's: clients send Idempotency-Key and retry with the same one.",
        "A payment whose outcome is unknown stays so until somebody looks; it is never tried a second time.",
        {
            "guard": "required",
            "key": "header:Idempotency-Key",
            "on_unknown": "hold",
            "on_duplicate": "wait",
            "retention_s": DAY_S,
        },
    ),
    "square": Preset(
        "Square's API: the key is the member idempotency_key of the JSON body.",
        "Requests whose body has no such member (searches) pass unguarded.",
        {"key": "body:/idempotency_key", "on_bad_key": "pass", "on_unknown": "hold", "retention_s": DAY_S},
    ),
    "paypal": Preset(
        "PayPal's API: the key is the header PayPal-Request-Id.",
        "The PayPal SDK does not retry a POST by itself: the caller has to send the same id again.",
        {"key": "header:PayPal-Request-Id", "on_unknown": "hold", "retention_s": 3 * DAY_S},
    ),
    "stripe-webhook": _webhook(
        "body:/id",
        namespace="stripe-webhook",
        wait_max_s=8,
        retention_s=7 * DAY_S,
        about="Stripe's events, which it delivers again for 3 days.",
    ),
    "paypal-webhook": _webhook(
        "body:/id",
        namespace="paypal-webhook",
        wait_max_s=8,
        retention_s=7 * DAY_S,
        about="PayPal's events, which it delivers again up to 25 times in 3 days.",
    ),
    "github-webhook": _webhook(
        "header:X-GitHub-Delivery",
        namespace="github-webhook",
        wait_max_s=8,
        retention_s=7 * DAY_S,
        about="GitHub's deliveries; it waits 10 s and delivers again only when asked to, within 3 days.",
    ),
    "shopify-webhook": _webhook(
        [["header:X-Shopify-Event-Id"], ["header:X-Shopify-Webhook-Id"]],
        namespace="shopify-webhook",
        wait_max_s=3.5,
        retention_s=2 * DAY_S,
        about="Shopify's events; it waits 5 s, delivers again 8 times in 4 hours, then deletes the subscription.",
    ),
    "standard-webhooks": _webhook(
        [["header:webhook-id"], ["header:svix-id"]],
        namespace="standard-webhooks",
        wait_max_s=10,
        retention_s=7 * DAY_S,
        about="Senders that follow Standard Webhooks, Svix among them.",
    ),
    "slack-events": _webhook(
        "body:/event_id",
        namespace="slack-events",
        wait_max_s=2,
        retention_s=DAY_S,
        about="Slack's Events API; it waits 3 s and delivers again up to 3 times within the hour.",
    ),
    "sns": _webhook(
        "body:/MessageId",
        namespace="sns",
        wait_max_s=10,
        retention_s=2 * DAY_S,
        about="Amazon SNS to an HTTP endpoint; it waits 15 s, and gives a message up at most 4xx. "
        'With raw delivery the body is the message alone: set `key = "header:x-amz-sns-message-id"`.',
    ),
    "pubsub-push": _webhook(
        "body:/message/messageId",
        namespace="pubsub-push",
        wait_max_s=8,
        retention_s=8 * DAY_S,
        about="Google Pub/Sub push; it delivers again for up to 7 days. Without its wrapper the body "
        'is the message alone: have metadata written, and set `key = "header:x-goog-pubsub-message-id"`.',
    ),
    "cloudevents": _webhook(
        [["header:ce-source", "header:ce-id"], ["body:/source", "body:/id"]],
        namespace="cloudevents",
        wait_max_s=10,
        retention_s=7 * DAY_S,
        about="CloudEvents, in binary or structured mode: source and id name an event. Batches go on unguarded.",
    ),
    "openai": _llm("openai"),
    "anthropic": _llm("anthropic"),
    "double-click": Preset(
        "Forms and clients without any key: an equal request of the same tenant within 10 s is the same one.",
        "Two equal requests that are both meant are taken for one, if the second comes within the window. "
        "Where nothing tells tenants apart, that holds for two people as well.",
        {"key": "derived:10", "on_duplicate": "wait", "wait_max_s": 30, "retention_s": 300},
    ),
}
COUNTING = frozenset(name for name, preset in PRESETS.items() if preset.counts_tokens)


def pages() -> str:
    """Return the reference of all presets, for RULES.md."""
    return "\n".join(_page(name, preset) for name, preset in PRESETS.items())


def _page(name: str, preset: Preset) -> str:
    lines = [f"{field} = {_toml(value)}" for field, value in preset.fields.items()]
    return "\n".join([f"### `{name}`", "", preset.about, "", "```toml", *lines, "```", "", preset.caution, ""])


def _toml(value: Any) -> str:
    """Return a value as a rule writes it. JSON writes texts, numbers and lists in the same way."""
    return json.dumps(value)
