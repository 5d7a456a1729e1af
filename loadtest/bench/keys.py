"""python -m loadtest.bench.keys: the cost of computing a key's digests, by the key's source; alone, without a network.

Each figure is the median of ROUNDS turns, in which every source computes the digests of the same requests. The work
that all of them share, the digests of key and body, is part of each figure.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from oncegate.buffers.memory import MemoryBudget
from oncegate.downstream.body import Body
from oncegate.keys.digests import Digests, Scope
from oncegate.keys.syntax import parse_key
from oncegate.keys.tenants import TenantFields
from oncegate.messages.fields import by_name
from oncegate.messages.request_head import RequestHead
from oncegate.rules.identity import Identity, ScopedRequest, fingerprint_parts, identify, key_in_head
from oncegate.rules.loading import load_rules
from oncegate.rules.policy import Policy
from oncegate.settings.settings import Settings

ROUNDS, REQUESTS = 60, 200
SOURCES = {"header": "header:Idempotency-Key", "body": "body:/id", "derived": "derived:10"}
BODIES = (300, 2000, 20_000)
ID = "evt_1NirD82eZvKYlo2CjQk0YzYW"


def policies() -> dict[str, Policy]:
    """Return the policy of a rule for each source."""
    text = "".join(f'[[rule]]\nname = "{name}"\npath = "/{name}"\nkey = "{key}"\n' for name, key in SOURCES.items())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rules.toml")
        file.write_text(text)
        rules = load_rules(Settings(upstream="http://127.0.0.1:9", rules_file=str(file)))  # type: ignore[arg-type]
    return {rule.name: rule.policy for rule in rules.rules}


def document(size: int) -> bytes:
    """Return an event of about that many bytes: its id first, then objects of short texts."""
    lines = [{"id": f"li_{n}", "amount": 1000 + n, "currency": "eur", "live": False} for n in range(size // 66)]
    return json.dumps({"id": ID, "type": "invoice.paid", "data": {"lines": lines}}).encode()


def identity(policy: Policy, digests: Digests, head: RequestHead, scope: Scope, body: Body) -> object:
    """Compute a request's digests as the request path does, from its head and its body."""
    plain = policy.sources is None and (lines := head.fields.get(policy.key_header)) is not None
    key = parse_key(lines) if plain else key_in_head(policy, head)
    if isinstance(key, bytes):
        return digests.key(scope, key), digests.fingerprint(fingerprint_parts(policy, head), body.blocks())
    return identify(policy, digests, ScopedRequest(head, scope, None, body))


def turn(work: Callable[[], object]) -> float:
    """Return the time of one call, in us."""
    began = time.perf_counter()
    for _ in range(REQUESTS):
        work()
    return (time.perf_counter() - began) / REQUESTS * 1e6


def measure(size: int) -> dict[str, float]:
    """Return the time of each source for a body of that size, in us."""
    digests, pairs = Digests(b""), [(b"Idempotency-Key", ID.encode()), (b"Content-Type", b"application/json")]
    head = RequestHead("POST", b"/v1/events", False, b"api.test", pairs, by_name(pairs))
    data = document(size)
    body = Body(data, len(data), MemoryBudget(1 << 20), MemoryBudget(1 << 20))
    scope = digests.scope(b"default", head.fields, TenantFields((b"authorization",)))
    assert isinstance(scope, Scope)
    works = {
        source: (lambda policy=policy: identity(policy, digests, head, scope, body))
        for source, policy in policies().items()
    }
    assert all(isinstance(work(), tuple | Identity) for work in works.values())
    turns = [{source: turn(work) for source, work in works.items()} for _ in range(ROUNDS)]
    return {source: median(one[source] for one in turns) for source in works}


def main() -> None:
    for size in BODIES:
        found = measure(size)
        told = (f"{source} {us:.1f} us ({us / found['header']:.1f}x)" for source, us in found.items())
        print(f"{len(document(size)):6} bytes:", ", ".join(told))


if __name__ == "__main__":
    main()
