"""Names as settings and rules spell them: methods, header fields, namespaces, and lists of them. Pure."""

import re

# The methods that can be guarded: those that can change something. A GET is safe to repeat (RFC 9110, section 9.2).
GUARDABLE = ("POST", "PATCH", "PUT", "DELETE")
# The kinds of LLM tokens that vendors price apart; each token is of one kind. `input` was read anew, `cached` came from
# the vendor's prompt cache, `cache_write` was written to it, `output` was generated.
TOKEN_KINDS = ("input", "cached", "cache_write", "output")
# Fields that end at this hop or frame the message (RFC 9110, section 7.6.1), that oncegate writes anew, that describe
# the message or what the client wants back, or that follow one try through several servers.
_NO_KEY_OR_SCOPE = frozenset(
    (
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
        *("content-length", "expect", "http2-settings", "proxy-authenticate", "proxy-authorization"),
        *("forwarded", "idempotency-fence", "max-forwards", "via", "x-real-ip"),
        *("content-disposition", "content-encoding", "content-language", "content-location", "content-range"),
        *("age", "cache-control", "content-type", "date", "expires", "last-modified", "pragma", "range", "warning"),
        *("accept", "dnt", "early-data", "origin", "prefer", "priority", "referer", "user-agent"),
        *("baggage", "elastic-apm-traceparent", "sentry-trace", "traceparent", "tracestate", "uber-trace-id"),
        *("b3", "x-amzn-trace-id", "x-cloud-trace-context", "x-ot-span-context", "x-stainless-retry-count"),
    )
)
_NO_KEY_OR_SCOPE_PREFIXES = ("accept-", "if-", "oncegate-", "sec-", "x-b3-", "x-datadog-", "x-forwarded-")
# A key names one operation. These are the same for all of a client's.
_NO_KEY = frozenset(("authorization", "cookie", "host"))
# A scope is the same for all of a client's operations. These name one of them, or one try.
_NO_SCOPE = frozenset(
    ("correlation-id", "idempotency-key", "request-id", "x-correlation-id", "x-idempotency-key", "x-request-id")
)
# What a proxy in front writes about a user, not about the connection. oncegate does not write these.
_FORWARDED_USERS = frozenset(
    ("x-forwarded-access-token", "x-forwarded-email", "x-forwarded-preferred-username", "x-forwarded-user")
)
# Whoever can read the store can try secrets as fast as digests are computed: 128 bits are beyond that.
MIN_SECRET_BYTES = 16
# RFC 9110, section 5.6.2.
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def parse_list(text: str) -> tuple[str, ...]:
    """Return the members of a comma list. ValueError for an empty list, and for a doubled name, which is a mistake."""
    members = tuple(member for member in map(str.strip, text.split(",")) if member)
    if not members:
        raise ValueError("is an empty list")
    if len({member.lower() for member in members}) < len(members):
        raise ValueError("has the same name twice")
    return members


def parse_method(text: str) -> str:
    """Return a method that can be guarded, in upper case."""
    if text.upper() not in GUARDABLE:
        raise ValueError(f"can only name {', '.join(GUARDABLE)}")
    return text.upper()


def parse_header(text: str) -> str:
    """Return the name of a header field."""
    if _TOKEN.fullmatch(text) is None:
        raise ValueError("must name header fields in letters, digits and -")
    return text


def parse_request_id_header(text: str) -> str:
    """Return the name of the header field that carries a request's id; empty for `off`."""
    name = text.lower()
    if name == "off":
        return ""
    if name in _NO_KEY or name == "idempotency-key" or _is_of_the_message(name):
        raise ValueError("must be a header field that can carry a request's id, such as X-Request-Id")
    return parse_header(text)


def parse_key_header(text: str) -> str:
    """Return the name of a header field that can carry a key."""
    if text.lower() in _NO_KEY or _is_of_the_message(text.lower()):
        raise ValueError("must be a header field that can carry a key, such as Idempotency-Key")
    return parse_header(text)


def parse_scope_header(text: str) -> str:
    """Return the name of a header field that can identify a tenant."""
    name = text.lower()
    if name in _NO_SCOPE or (_is_of_the_message(name) and name not in _FORWARDED_USERS):
        raise ValueError("must name header fields that say whose request it is, such as Authorization")
    return parse_header(text)


def _is_of_the_message(name: str) -> bool:
    return name in _NO_KEY_OR_SCOPE or name.startswith(_NO_KEY_OR_SCOPE_PREFIXES)


def parse_received_by(text: str) -> str:
    """Return the name by which a proxy is known in Via, in lower case."""
    # RFC 9110, section 7.6.3: a pseudonym, or a host with or without a port.
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~:\[\]-]{1,255}", text):
        raise ValueError("must be a name as Via has it, such as varnish or gateway.internal:8080")
    return text.lower()


def parse_namespace(text: str) -> str:
    """Return a namespace: a part of each key's scope."""
    if re.fullmatch(r"[!-~]{1,64}", text) is None:
        raise ValueError("must be 1 to 64 visible ASCII characters")
    return text


def parse_secret(text: str) -> str:
    """Return a secret that can be encoded and is not guessed: an environment may have bytes that are not UTF-8."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8 text") from None
    if size < MIN_SECRET_BYTES:
        raise ValueError(
            f"must have at least {MIN_SECRET_BYTES} bytes, such as the output of `openssl rand -hex 32`; a shorter one "
            "can be guessed"
        )
    return text
