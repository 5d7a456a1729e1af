"""Oncegate's own error responses: RFC 9457 problems, readable by the SDKs of well-known APIs as well.

Code that refuses a request builds a `Problem`, a plain value, with `problem()` or `refusal()`. Only the code
that writes to a client renders it: `head_fields()`, and `body(docs_url)` with the operator's `ONCEGATE_DOCS_URL`.
So nothing between them has to know that URL. `as_problem_json` does it for every client that asked for nothing else.

- `error: {type, code, message}` is where the SDKs of Stripe, OpenAI and Mollie look for the message.
- `Retry-After`, `x-should-retry` and `Stripe-Should-Retry` are the fields that those SDKs obey.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, NamedTuple, Self

from oncegate.decision import RETRY


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """One row of the table of problems.

    `retryable`: whether sending the request again can help. `reuse_key`: whether the retry may carry the same
    key; None where that depends on what the client wants. `about_key`: whether `error.type` is `idempotency_error`,
    rather than `api_error`.
    """

    status: int
    title: str
    _: KW_ONLY
    retryable: bool
    reuse_key: bool | None
    about_key: bool = True


PROBLEM_KINDS = {
    # oncegate cannot use the key or the credential. Nothing was sent.
    "key-missing": ProblemKind(400, "This request needs an idempotency key", retryable=False, reuse_key=None),
    "key-invalid": ProblemKind(400, "The idempotency key cannot be used", retryable=False, reuse_key=False),
    "scope-unstable": ProblemKind(
        400, "The credential may change with every request", retryable=False, reuse_key=False
    ),
    # A record under the same key decided. This request was not sent.
    "key-reused": ProblemKind(
        422, "The idempotency key was used for another request", retryable=False, reuse_key=False
    ),
    "in-flight": ProblemKind(409, "The first request with this key is still running", retryable=True, reuse_key=True),
    "outcome-unknown": ProblemKind(
        409, "The outcome of the original request is not known", retryable=False, reuse_key=None
    ),
    "response-not-kept": ProblemKind(
        409, "The original request completed; its response was not stored", retryable=False, reuse_key=False
    ),
    "key-expired": ProblemKind(
        410, "The original request completed; its response is no longer stored", retryable=False, reuse_key=False
    ),
    # A reader of a response gets nothing more of it. Nothing was sent.
    "stream-gone": ProblemKind(410, "The stream cannot be continued", retryable=False, reuse_key=None),
    # Answers about a key, at an address of oncegate's own.
    "key-absent": ProblemKind(404, "No request with this key is known", retryable=False, reuse_key=True),
    "key-released": ProblemKind(409, "The request was not executed; its key is free", retryable=False, reuse_key=True),
    "ask-refused": ProblemKind(403, "This question about a key is not answered", retryable=False, reuse_key=None),
    # Nothing was sent, so that the same key can be used again.
    "body-too-large": ProblemKind(
        413, "The request's body is too large", retryable=False, reuse_key=True, about_key=False
    ),
    "store-unavailable": ProblemKind(
        503, "The store did not confirm the claim; nothing was sent", retryable=True, reuse_key=True, about_key=False
    ),
    "overloaded": ProblemKind(
        503, "The proxy is at its limit; nothing was sent", retryable=True, reuse_key=True, about_key=False
    ),
    "upstream-unreachable": ProblemKind(
        502, "The upstream could not be reached; nothing was sent", retryable=True, reuse_key=True, about_key=False
    ),
    # The upstream may have executed the request, so that the key is unknown.
    "upstream-lost": ProblemKind(
        502, "The upstream got the request but sent no full response", retryable=False, reuse_key=None, about_key=False
    ),
    "upstream-timeout": ProblemKind(
        504, "The upstream got the request but sent nothing in time", retryable=False, reuse_key=None, about_key=False
    ),
    # Only an operator can say whether the request was executed.
    "record-corrupt": ProblemKind(
        500, "The stored record fails its own checks", retryable=False, reuse_key=None, about_key=False
    ),
    # The request was executed. A retry gets the response if it is stored by then, else `outcome-unknown`.
    "answer-not-stored": ProblemKind(
        502,
        "The upstream responded; the store did not confirm the response in time",
        retryable=True,
        reuse_key=True,
        about_key=False,
    ),
}
# Requests that are refused before oncegate looks for a key, by status. They share one code and have no slug.
REFUSALS = {
    400: ProblemKind(400, "The request cannot be understood", retryable=False, reuse_key=None, about_key=False),
    404: ProblemKind(404, "Nothing is served at this address", retryable=False, reuse_key=None, about_key=False),
    405: ProblemKind(405, "This method is not served", retryable=False, reuse_key=None, about_key=False),
    408: ProblemKind(408, "The request did not arrive in time", retryable=True, reuse_key=True, about_key=False),
    409: ProblemKind(409, "The request is complete", retryable=False, reuse_key=None, about_key=False),
    412: ProblemKind(412, "It is another response by now", retryable=False, reuse_key=None, about_key=False),
    414: ProblemKind(414, "The target is too long", retryable=False, reuse_key=None, about_key=False),
    416: ProblemKind(416, "The response has no such bytes", retryable=False, reuse_key=None, about_key=False),
    417: ProblemKind(417, "This expectation cannot be met", retryable=False, reuse_key=None, about_key=False),
    421: ProblemKind(421, "This host is not served here", retryable=False, reuse_key=None, about_key=False),
    431: ProblemKind(431, "The header section is too large", retryable=False, reuse_key=None, about_key=False),
    500: ProblemKind(500, "The proxy failed", retryable=False, reuse_key=None, about_key=False),
    501: ProblemKind(501, "This is not supported", retryable=False, reuse_key=None, about_key=False),
    503: ProblemKind(
        503, "The proxy is at its limit; nothing was sent", retryable=True, reuse_key=True, about_key=False
    ),
    505: ProblemKind(505, "This version of HTTP is not supported", retryable=False, reuse_key=None, about_key=False),
}
_ONE_SECOND = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """An error response as a value. `slug` names its row of `PROBLEM_KINDS`, or is empty for a refusal.

    `retry_after_s`: the value of Retry-After, None for no such field. `members`: further members of the body.
    """

    kind: ProblemKind
    slug: str
    detail: str
    retry_after_s: int | None = None
    members: Mapping[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The name of this outcome in logs, metrics and `error.code`."""
        return self.slug.replace("-", "_") or "request_refused"

    @property
    def status(self) -> int:
        return self.kind.status

    @property
    def reason(self) -> bytes:
        """The registered reason phrase of the status."""
        return reason_of(self.kind.status)

    def with_status(self, status: int) -> Self:
        """Return this problem with another status than its row has: a rule can set that of `in-flight`."""
        after_s = _retry_after_s(status, self.retry_after_s)
        return replace(self, kind=replace(self.kind, status=status), retry_after_s=after_s)

    def with_members(self, **members: Any) -> Self:
        """Return this problem with further members of the body."""
        return replace(self, members={**self.members, **members})

    def for_mode(self, mode: bytes) -> Self:
        """Return this problem for a key whose mode is the wire value of an UnknownMode.

        Under `retry` the same key may be sent again, whatever the row says.
        """
        if mode != RETRY:
            return self
        return replace(self, kind=replace(self.kind, retryable=True, reuse_key=True))

    def head_fields(self, media_type: bytes = b"application/problem+json") -> bytes:
        """Return the header fields, each line ended, without Content-Length."""
        retry = b"true" if self.kind.retryable else b"false"
        lines = b"Content-Type: %s\r\nCache-Control: no-store\r\n" % media_type
        lines += b"Date: %s\r\nx-should-retry: %s\r\nStripe-Should-Retry: %s\r\n" % (
            formatdate(usegmt=True).encode(),
            retry,
            retry,
        )
        return lines if self.retry_after_s is None else lines + b"Retry-After: %d\r\n" % self.retry_after_s

    def body(self, docs_url: str = "") -> bytes:
        """Return the body: JSON in ASCII. `docs_url`: where docs/ is served, without a slash at its end."""
        kind = self.kind
        members = {
            "type": self._type(docs_url),
            "title": kind.title,
            "status": kind.status,
            "detail": self.detail,
            "retryable": kind.retryable,
            "reuse_key": kind.reuse_key,
            **self.members,
            "error": {
                "type": "idempotency_error" if kind.about_key else "api_error",
                "code": self.code,
                "message": self.detail,
            },
        }
        return json.dumps(members).encode()

    def _type(self, docs_url: str) -> str:
        """Return the URI of the problem's type (RFC 9457, section 3.1.1)."""
        if not self.slug:
            return "about:blank"
        # With the suffix, the link works where a forge or a file server shows docs/ as Markdown files.
        return f"{docs_url}/reference/answers.md#{self.slug}" if docs_url else f"urn:oncegate:{self.slug}"


def reason_of(status: int) -> bytes:
    """Return the registered reason phrase of a status."""
    return HTTPStatus(status).phrase.encode()


class Rendering(NamedTuple):
    """A problem as a client gets it. `fields`: each line ended, without Content-Length. `is_page`: for people."""

    status: int
    fields: bytes
    body: bytes
    is_page: bool = False


# Writes a problem for the client of one request; the text is `ONCEGATE_DOCS_URL`, empty for none.
Render = Callable[[Problem, str], Rendering]


def as_problem_json(problem: Problem, docs_url: str) -> Rendering:
    """Return a problem as RFC 9457 has it."""
    return Rendering(problem.status, problem.head_fields(), problem.body(docs_url))


def problem(slug: str, detail: str, retry_after_s: int | None = None, **members: Any) -> Problem:
    """Return the problem of a row of `PROBLEM_KINDS`; KeyError for an unknown slug.

    `members` are further members of the body. `Problem.with_status` and `Problem.for_mode` apply what a rule
    or a key's mode changes about a row.
    """
    kind = PROBLEM_KINDS[slug]
    return Problem(kind, slug, detail, _retry_after_s(kind.status, retry_after_s), members)


def refusal(status: int, detail: str) -> Problem:
    """Return the problem for a request that is refused before oncegate looks for a key; 400 for other statuses."""
    kind = REFUSALS.get(status, REFUSALS[400])
    return Problem(kind, "", detail, _ONE_SECOND if kind.retryable else None)


def _retry_after_s(status: int, given_s: int | None) -> int | None:
    """Return the Retry-After of a response: a 503 always has one (RFC 9110, section 15.6.4)."""
    return _ONE_SECOND if status == 503 and given_s is None else given_s
