"""Names of header fields that look like the name of a key, for requests whose key nothing reads. Pure."""

from collections.abc import Iterable

# A request header whose name does not say what it is.
_OTHERS = frozenset((b"paypal-request-id",))
# Fields of responses, which some clients send back.
_NOT_KEYS = frozenset((b"idempotent-replayed", b"idempotency-replayed", b"x-idempotent-replayed"))


def has_key_name(names: Iterable[bytes]) -> bool:
    """Return whether one of these lower-case field names is that of an idempotency key, or looks like one."""
    return any((b"idempoten" in name and name not in _NOT_KEYS) or name in _OTHERS for name in names)
