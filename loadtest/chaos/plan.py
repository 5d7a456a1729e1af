"""The requests and the upstream's responses, from a seed alone: the same in every process of the run."""

import random
from hashlib import blake2b
from typing import NamedTuple

# Who asks, and how the proxy can see it: by a credential in one of several headers, or by the account that it chooses.
CREDENTIALS = {
    "ant": b"Authorization: Bearer ant",
    "bee": b"X-Api-Key: bee",
    "cat": b"x-goog-api-key: cat",
    "dog": b"Authorization: Bearer ant\r\nStripe-Account: dog",
}
TENANTS = tuple(CREDENTIALS)
# Receivers of events without a credential. One event goes to each of them under the same id.
RECEIVERS = ("hook-a", "hook-b")
# One rule for each of them, as an operator writes them.
EVENT_RULES = "".join(
    f"""
[[rule]]
name = "{receiver}"
path = "/{receiver}/*"
preset = "standard-webhooks"
on_unknown = "hold"
release_statuses = ["default", "503+retry-after"]
ambiguous_statuses = ["default"]
"""
    for receiver in RECEIVERS
)
# Whose requests may be stopped: by a client that leaves, and at the address of a response. They take longer.
STOPPABLE = "bee"
STOPPABLE_RULE = f"""
[[rule]]
name = "stoppable"
path = "/{STOPPABLE}/*"
on_client_gone = "cancel"
cancel_grace_s = 0.1
cancellable = true
ask_keys = true
"""
# About whose unknown keys the API is asked. Nothing that was sent arrives later than `absent_after_s`.
# A duplicate waits for the verdict for less than the clients' patience.
ASKED = "cat"
ASKED_RULE = f"""
[[rule]]
name = "asked"
path = "/{ASKED}/*"
wait_max_s = 3
[rule.reconcile]
url = "/asked/{ASKED}/{{path:2}}"
keep = ["path:2"]
reference = {{ "/key" = "{{path:2}}" }}
succeeded = [{{ status = "200", when = {{ "/state" = "done" }} }}]
absent = [{{ status = "404" }}]
absent_after_s = 12
absent_before_s = 600
absent_agree = 2
first_after_s = 0.3
most_s = 2
timeout_s = 2
rate_per_s = 50
"""
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
    "twice": 30,  # and the same again, some milliseconds later: nobody asked for that
    "idle-408": 20,  # and a 408 as soon as the connection is idle for a while
    "gateway": 3,  # 502: ambiguous
    "cut-length": 3,  # the answer is shorter than it said
    "cut-chunks": 3,  # the last chunk never comes
    "made-up": 3,  # 503 with Retry-After of a gateway, though the API ran: ambiguous
    "cut-head": 2,
    "garbage": 1,
    "silent": 1,  # longer than the proxy waits
}
DECLINED = frozenset(("busy", "later"))
# Of uploads that do not come in one piece, the share that gets its answer, 413, before its end.
EARLY_SHARE = 0.3
EARLY_BYTES = 10_000


def _number(*words: object) -> int:
    return int.from_bytes(blake2b(repr(words).encode(), digest_size=8).digest(), "big")


def answer_kind(seed: int, tenant: str, key: str, nth: int) -> str:
    """Return how the upstream responds to the `nth` request for a key."""
    at = _number(seed, tenant, key, nth) % 1000
    for kind, share in ANSWERS.items():
        if at < share:
            return kind
        at -= share
    return "slow" if tenant == STOPPABLE and at % 4 == 0 else "small"


def is_answered_early(seed: int, tenant: str, key: str, nth: int) -> bool:
    """Return whether the upstream refuses the `nth` request for a key before it has read it."""
    return _number("early", seed, tenant, key, nth) % 1000 < EARLY_SHARE * 1000


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
    size = rng.choices((24, 300, 20_000, 300_000), (700, 260, 28, 12))[0]
    if rng.random() < 0.04:
        return [Operation(receiver, key, racers, size=size) for receiver in RECEIVERS]
    tenants = rng.sample(TENANTS, 3) if rng.random() < 0.05 else [rng.choice(TENANTS)]
    late, chunked = rng.random() < 0.6, rng.random() < 0.02
    return [Operation(tenant, key, racers, mutant, late, size, chunked) for tenant in tenants]


def shared_operation(seed: int, slot: int) -> Operation:
    """Return the operation that all clients perform in this slot of time."""
    return Operation(TENANTS[slot % len(TENANTS)], f"{seed}-all-{slot}", 2)


def identification(tenant: str, key: bytes, quoted: bool = False) -> bytes:
    """Return the fields that say who asks and under which key."""
    if tenant in RECEIVERS:
        return b"webhook-id: " + key
    return CREDENTIALS[tenant] + (b'\r\nIdempotency-Key: "%b"' if quoted else b"\r\nIdempotency-Key: %b") % key


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
    return b"%b /%b/%b HTTP/1.1\r\nHost: api.test\r\n%b\r\n%b%bContent-Type: %b\r\n\r\n%b" % (
        b"PATCH" if variant == 2 else b"POST",
        op.tenant.encode(),
        key,
        identification(op.tenant, key, quoted=variant % 2 == 1),
        extra,
        framing,
        b"text/plain" if variant == 3 else b"application/json",
        body,
    )


def stop(place: str) -> bytes:
    """Return the bytes of a request that stops an execution at the address that its response names."""
    return b"DELETE %b HTTP/1.1\r\nHost: api.test\r\n\r\n" % place.encode()


def question(op: Operation) -> bytes:
    """Return the bytes of a question about the key of an original."""
    target = b"/%b/%b" % (op.tenant.encode(), op.key.encode())
    return b"GET /.oncegate/keys HTTP/1.1\r\nHost: api.test\r\n%b\r\nOncegate-Target: %b\r\n\r\n" % (
        identification(op.tenant, op.key.encode()),
        target,
    )
