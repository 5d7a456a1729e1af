"""The answers that the proxy gives itself: RFC 9457 problems, in the dialects that SDKs read as well.

`error: {type, code, message}` is the member from which the Stripe, OpenAI and Mollie SDKs take their
messages; Retry-After, x-should-retry and Stripe-Should-Retry are what they obey.
"""

import json
from dataclasses import dataclass, replace
from email.utils import formatdate
from http import HTTPStatus
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table of problems. `reuse_key`: whether the retry may carry the same key."""

    status: int
    title: str
    retryable: bool
    reuse_key: bool | None
    idempotency: bool = True  # whose fault it is, in the words of `error.type`


KINDS = {
    "key-missing": Kind(400, "This request needs an idempotency key", False, None),
    "key-invalid": Kind(400, "The idempotency key cannot be used", False, False),
    "scope-unstable": Kind(400, "The credential changes with every request", False, False),
    "key-reused": Kind(422, "The idempotency key was used for another request", False, False),
    "in-flight": Kind(409, "The original request is still running", True, True),
    "outcome-unknown": Kind(409, "The outcome of the original request is not known", False, None),
    "response-not-kept": Kind(409, "The original request completed, its answer was not stored", False, False),
    "body-too-large": Kind(413, "The request's body is too large", False, True, idempotency=False),
    "store-unavailable": Kind(503, "The store did not confirm the claim; nothing was sent", True, True, False),
    "overloaded": Kind(503, "Too much at once; nothing was sent", True, True, False),
    "upstream-unreachable": Kind(502, "The upstream could not be reached; nothing was sent", True, True, False),
    "upstream-lost": Kind(502, "The upstream took the request and gave no whole answer", False, None, False),
    "upstream-timeout": Kind(504, "The upstream took the request and gave no answer in time", False, None, False),
    "record-corrupt": Kind(500, "The stored record fails its own checks", False, None, False),
    "answer-not-stored": Kind(502, "The upstream answered, the store did not confirm it in time", True, True, False),
}
# Refusals of requests that never get as far as a key; they have no slug of their own.
REFUSALS = {
    400: Kind(400, "The request cannot be understood", False, None, False),
    405: Kind(405, "This method is not served", False, None, False),
    408: Kind(408, "The request did not arrive in time", True, True, False),
    417: Kind(417, "This expectation cannot be met", False, None, False),
    421: Kind(421, "This host is not served here", False, None, False),
    431: Kind(431, "The head is too large", False, None, False),
    500: Kind(500, "The proxy failed", False, None, False),
    501: Kind(501, "This is not served", False, None, False),
    503: Kind(503, "Too much at once; nothing was sent", True, True, False),
    505: Kind(505, "This version of HTTP is not spoken", False, None, False),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer ready to be written. `block` holds its fields, each line ended, without its length.

    `code` is the slug with underscores, `request_refused` for a refusal.
    """

    code: str
    status: int
    reason: bytes
    block: bytes
    body: bytes


def problem(
    slug: str,
    detail: str,
    retry_after_s: int | None = None,
    may_retry: bool = False,
    status: int | None = None,
    **extra: Any,
) -> Problem:
    """Return the answer for a row of the table; `extra` are further members, `status` is another than the row's.

    `may_retry`: the key's mode is retry, so that the same key may be sent again whatever the row says.
    """
    kind = replace(KINDS[slug], retryable=True, reuse_key=True) if may_retry else KINDS[slug]
    if status is not None and status != kind.status:
        kind = replace(kind, status=status)
    if kind.status == 503 and retry_after_s is None:
        retry_after_s = 1
    return _problem(kind, slug.replace("-", "_"), f"urn:oncegate:{slug}", detail, retry_after_s, extra)


def refusal(status: int, detail: str) -> Problem:
    """Return the answer for a request that is not let in."""
    kind = REFUSALS.get(status, REFUSALS[400])
    return _problem(kind, "request_refused", "about:blank", detail, 1 if kind.retryable else None, {})


def _problem(kind: Kind, code: str, urn: str, detail: str, retry_after_s: int | None, extra: dict[str, Any]) -> Problem:
    error_type = "idempotency_error" if kind.idempotency else "api_error"
    members = {
        "type": urn,
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "retryable": kind.retryable,
        "reuse_key": kind.reuse_key,
        **extra,
        "error": {"type": error_type, "code": code, "message": detail},
    }
    retry = b"true" if kind.retryable else b"false"
    block = b"Content-Type: application/problem+json\r\nCache-Control: no-store\r\n"
    block += b"Date: %s\r\nx-should-retry: %s\r\nStripe-Should-Retry: %s\r\n" % (
        formatdate(usegmt=True).encode(),
        retry,
        retry,
    )
    if retry_after_s is not None:
        block += b"Retry-After: %d\r\n" % retry_after_s
    return Problem(code, kind.status, HTTPStatus(kind.status).phrase.encode(), block, json.dumps(members).encode())
