"""How the proxies on one store know each other, and the Redis keys that they use for it beside the records."""

from collections.abc import Callable
from dataclasses import dataclass

from oncegate.store.events import StoreEvent
from oncegate.store.record import PREFIX_BYTES

EPOCH, IDENTITIES, RULES = b"once:epoch", b"once:identities", b"once:rules"


@dataclass(frozen=True, slots=True)
class Membership:
    """What one proxy says of itself to the others, and how it handles a loss. Times in the unit of their name."""

    # The beginning of the proxy's tokens. `Store` fills it in.
    token_prefix: bytes
    # Names the proxy to operators who look at a record.
    proxy_name: str
    # The settings that decide how keys are named, as `name=value name=value`.
    identity_text: str
    # Whether to claim keys beside proxies whose settings name keys in another way.
    accept: bool
    # The longest life of a record: so long does it matter by which settings it was named, and whose it is.
    retention_ms: int
    # How long first-time keys are refused after a loss; 0 for not at all.
    quarantine_ms: int
    # How long a loss is a notice on /readyz.
    notice_s: float
    # Whether the store confirms only what survives a restart.
    durable: bool
    # Called with an event and its description for operators.
    report: Callable[[StoreEvent, str], None]
    # Returns the digest of the rules that decide how keys are named now.
    rules: Callable[[], str] = str


@dataclass(slots=True)
class InspectionHistory:
    """What the store held under one hash tag when this proxy last asked."""

    # The loop's time of the first inspection.
    since: float
    epoch: bytes = b""
    # The server's replication id.
    replication_id: str = ""
    # This proxy's counter.
    counter: int = 0
    # When the counter was written, on a clock that runs while the machine sleeps.
    counter_written_s: float = 0.0


def proxy_record_key(token: bytes) -> bytes:
    """Return the Redis key under which the proxy that made a token writes its name and counter.

    The token's prefix is enough.
    """
    return b"once:replica:" + token[:PREFIX_BYTES].hex().encode()


def proxy_record_value(counter: int, retention_ms: int, proxy_name: str) -> bytes:
    """Return the value under `proxy_record_key`: counter, retention and name.

    The retention minus the key's remaining time to live is the age of the value.
    """
    return b"%d %d %s" % (counter, retention_ms, proxy_name.encode())


def differing_names(ours: str, theirs: str) -> str:
    """Return the names of the settings that differ between two descriptions of the form `name=value name=value`."""
    our_settings, their_settings = (dict(part.split("=", 1) for part in text.split(" ")) for text in (ours, theirs))
    differing = (name for name in our_settings if our_settings[name] != their_settings.get(name))
    return ", ".join(differing) or "unknown"
