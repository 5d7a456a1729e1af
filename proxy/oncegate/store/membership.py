"""What one proxy says of itself to the others on its store."""

from collections.abc import Callable
from dataclasses import dataclass

from oncegate.store.events import StoreEvent


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
