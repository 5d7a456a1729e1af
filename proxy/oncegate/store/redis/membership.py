"""How the proxies on one store know each other: the Redis keys that they use for it beside the records."""

import asyncio
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from oncegate.store.events import StoreEvent
from oncegate.store.membership import Membership
from oncegate.store.record import PREFIX_BYTES
from oncegate.store.redis.talk import Question, call
from oncegate.store.redis.wire import Script

EPOCH, IDENTITIES, RULES = b"once:epoch", b"once:identities", b"once:rules"

# How often a proxy inspects its servers.
HEALTH_S = 1.0
# How long a proxy counts as live after it last reported its rules.
LIVE_S = 5 * HEALTH_S
# How long rules may differ before it is reported, because proxies reload their file one after the other.
DIFFER_S = 2 * LIVE_S
# A proxy whose settings were refused waits so long before it writes them to an empty store, so that the others, if the
# store has forgotten them, write theirs first.
FOUND_AFTER_S = 5 * HEALTH_S

RULES_DIFFER = "other proxies on this store name keys by other rules: a retry that meets one of them executes again"


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


class OtherProxies:
    """What the other proxies on a server say of themselves: the settings and the rules by which they name keys."""

    def __init__(self, scripts: dict[str, Script], member: Membership) -> None:
        # Copies without a verb, so that metrics do not count these calls among the request path's.
        self._identity_script, self._rules_script = (Script("", scripts[verb].body) for verb in ("identity", "rules"))
        self._member = member
        self._identity = blake2b(member.identity_text.encode(), digest_size=16).hexdigest()
        self._clock = asyncio.get_running_loop().time
        # The settings that differ from the others'.
        self.differs = ""
        self._refused_at = float("-inf")
        # The rules that the others may compare with, and those in the last question.
        self._rules = self._asked_rules = ""
        self._rules_differ_since, self._rules_reported = float("inf"), False

    @property
    def rules_differ(self) -> bool:
        """Whether other proxies have named keys by other rules for longer than DIFFER_S."""
        return self._clock() - self._rules_differ_since > DIFFER_S

    def identity_question(self, hash_tag: bytes) -> Question:
        """Ask whether others name keys by the same settings."""
        member = self._member
        waits = self._clock() - self._refused_at < FOUND_AFTER_S
        write_mode = "accept" if member.accept else "ask" if waits else "found"
        args = (self._identity, member.identity_text, write_mode, member.retention_ms)
        return call(self._identity_script, IDENTITIES + hash_tag, *args)

    def note_identity(self, reply: Any) -> None:
        member = self._member
        match reply:
            case [b"same"]:
                self.differs = ""
            case [b"accepted"]:
                self.differs = ""
                text = "this proxy names keys in another way than others on this store"
                member.report(StoreEvent.IDENTITY_ACCEPTED, text)
            case [b"differs", *others]:
                self._refused_at = self._clock()
                if not self.differs:
                    self.differs = differing_names(member.identity_text, others[0].decode())
                    text = f"this proxy names keys in another way than others: {self.differs}"
                    member.report(StoreEvent.IDENTITY, text)
            case _:
                # No proxy has written its settings, or there was no reply.
                pass

    def rules_question(self, hash_tag: bytes) -> Question:
        """Ask whether other live proxies name keys by other rules."""
        self._asked_rules = rules = self._member.rules()
        return call(self._rules_script, RULES + hash_tag, rules, self._rules or rules, int(LIVE_S * 1000))

    def note_rules(self, reply: object) -> None:
        """Note whether rules differ. A declared change is not reported."""
        match reply:
            case [b"differ"] if not self._member.accept:
                self._rules = self._asked_rules
                self._rules_differ_since = min(self._rules_differ_since, self._clock())
            case [b"differ" | b"same"]:
                self._rules, self._rules_differ_since, self._rules_reported = self._asked_rules, float("inf"), False
            case _:
                # There was no reply.
                pass
        if self.rules_differ and not self._rules_reported:
            self._rules_reported = True
            self._member.report(StoreEvent.RULES, RULES_DIFFER)
