"""How the proxies on one store know each other, and the keys that they use for it beside the records."""

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
    replica: str
    # The settings that decide how keys are named, as `name=value name=value`.
    described: str
    # Whether to claim keys beside proxies whose settings name keys in another way.
    accept: bool
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
class Memory:
    """What one place of the store held when this proxy last asked. `since`: the loop's time of the first inspection."""

    since: float
    epoch: bytes = b""
    # The server's replication id.
    run: str = ""
    # This proxy's counter.
    mark: int = 0
    # When the counter was written, on a clock that runs while the machine sleeps.
    marked_s: float = 0.0


def replica_key(token: bytes) -> bytes:
    """Return the Redis key of the proxy that made a token. The token's prefix is enough."""
    return b"once:replica:" + token[:PREFIX_BYTES].hex().encode()


def replica_value(mark: int, retention_ms: int, name: str) -> bytes:
    """Return the value under `replica_key`: counter, retention and name.

    The retention minus the key's remaining time to live is the age of the value.
    """
    return b"%d %d %s" % (mark, retention_ms, name.encode())


def differing_names(ours: str, theirs: str) -> str:
    """Return the names of the settings that differ between two descriptions of the form `name=value name=value`."""
    our_settings, their_settings = (dict(part.split("=", 1) for part in text.split(" ")) for text in (ours, theirs))
    differing = (name for name in our_settings if our_settings[name] != their_settings.get(name))
    return ", ".join(differing) or "unknown"
