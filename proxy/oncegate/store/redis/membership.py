"""How the proxies on one store know each other: the Redis keys that they use for it beside the records."""

from dataclasses import dataclass

from oncegate.store.membership import Agreement, Membership
from oncegate.store.record import PREFIX_BYTES
from oncegate.store.redis.talk import Question, call
from oncegate.store.redis.wire import Script

EPOCH, IDENTITIES, RULES = b"once:epoch", b"once:identities", b"once:rules"


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


class OtherProxies(Agreement):
    """Asks what the other proxies on a server say of themselves, and notes their replies."""

    def __init__(self, scripts: dict[str, Script], member: Membership) -> None:
        super().__init__(member)
        # Copies without a verb, so that metrics do not count these calls among the request path's.
        self._identity_script, self._rules_script = (Script("", scripts[verb].body) for verb in ("identity", "rules"))

    def identity_question(self, hash_tag: bytes) -> Question:
        """Ask whether others name keys by the same settings."""
        member = self._member
        args = (self.identity, member.identity_text, self.write_mode(), member.retention_ms)
        return call(self._identity_script, IDENTITIES + hash_tag, *args)

    def rules_question(self, hash_tag: bytes) -> Question:
        """Ask whether other live proxies name keys by other rules."""
        return call(self._rules_script, RULES + hash_tag, *self.asked_rules())
