"""The requests and the upstream's responses, from a seed alone: the same in every process of the run."""

import random
from hashlib import blake2b
from typing import NamedTuple

TENANTS = ("ant", "bee", "cat", "dog")
LARGE_BYTES = 150_000  # over what comes along with a claim's reply
STORED_BYTES = 200_000  # ONCEGATE_MAX_STORED_BYTES of a run
OVERSIZE_BYTES = 260_000

# How the upstream answers: the share of each in thousandths. The rest is a small answer at once.
ANSWERS = {
    "slow": 40,  # up to a second
    "streamed": 50,  # chunked, in pieces that come one by one
    "large": 4,
    "oversize": 2,  # is passed on and not kept
    "eof": 5,  # ends by closing
    "empty": 10,  # 204
    "failed": 10,  # 500, a stored answer as any other
    "busy": 8,  # 429: declined
    "later": 4,  # 503 with Retry-After: declined
    "gateway": 3,  # 502: ambiguous
    "cut-length": 3,  # the answer is shorter than it said
    "cut-chunks": 3,  # the last chunk never comes
    "cut-head": 2,
    "garbage": 1,
    "silent": 1,  # longer than the proxy waits
}
DECLINED = frozenset(("busy", "later"))


def _number(*words: object) -> int:
    return int.from_bytes(blake2b(repr(words).encode(), digest_size=8).digest(), "big")


def answer_kind(seed: int, tenant: str, key: str, nth: int) -> str:
    """Return how the upstream responds to the `nth` request for a key."""
    at = _number(seed, tenant, key, nth) % 1000
    for kind, share in ANSWERS.items():
        if at < share:
            return kind
        at -= share
    return "small"


def filler(execution: str, size: int) -> bytes:
    """Return a body that belongs to one execution alone."""
    stamp = f"{execution}:{_number(execution):x};".encode()
    return (stamp * (size // len(stamp) + 1))[:size]


class Operation(NamedTuple):
    """One thing to do once: its tenant, its key, its number of racing clients, and its mutant.

    `mutant`: 0, or how a different request under this key differs (see `request`). `late`: the mutant comes after the
    others have finished.
    """

    tenant: str
    key: str
    racers: int = 1
    mutant: int = 0
    late: bool = False
    size: int = 32
    chunked: bool = False


def operation(seed: int, client: int, number: int) -> list[Operation]:
    """Return a client's `number`th operation: mostly one, sometimes the same key for several tenants."""
    rng = random.Random(_number(seed, client, number))
    key = f"{seed}-{client}-{number}"
    racers = rng.choices((1, 2, 3, 6), (82, 12, 4, 2))[0]
    mutant = rng.choice((1, 2, 3)) if rng.random() < 0.04 else 0
    size = rng.choices((24, 300, 20_000, 300_000), (700, 270, 28, 2))[0]
    tenants = rng.sample(TENANTS, 3) if rng.random() < 0.05 else [rng.choice(TENANTS)]
    late, chunked = rng.random() < 0.6, rng.random() < 0.02
    return [Operation(tenant, key, racers, mutant, late, size, chunked) for tenant in tenants]


def shared_operation(seed: int, slot: int) -> Operation:
    """Return the operation that all clients perform in this slot of time."""
    return Operation(TENANTS[slot % len(TENANTS)], f"{seed}-all-{slot}", 2)


def request(op: Operation, variant: int, extra: bytes = b"") -> bytes:
    """Return a request's bytes. Variant 0 is the original; 1 has another body, 2 another method, 3 another type."""
    key = op.key.encode()
    body = b"%d:%b:" % (variant if variant == 1 else 0, key)
    body += b"." * (op.size - len(body))
    if op.chunked:
        half = len(body) // 2
        framing = b"Transfer-Encoding: chunked\r\n"
        body = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (half, body[:half], len(body) - half, body[half:])
    else:
        framing = b"Content-Length: %d\r\n" % len(body)
    return b"%b /%b/%b HTTP/1.1\r\nHost: api.test\r\nAuthorization: Bearer %b\r\n%b%b%bContent-Type: %b\r\n\r\n%b" % (
        b"PATCH" if variant == 2 else b"POST",
        op.tenant.encode(),
        key,
        op.tenant.encode(),
        b'Idempotency-Key: "%b"\r\n' % key if variant % 2 else b"Idempotency-Key: %b\r\n" % key,
        extra,
        framing,
        b"text/plain" if variant == 3 else b"application/json",
        body,
    )
