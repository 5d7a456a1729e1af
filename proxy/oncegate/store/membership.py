"""What one proxy says of itself to the others on its store, whether they agree, and what the store lost."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from typing import Any

from oncegate.store.results import ClaimsSuspended, StoreEvent

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
LOSSES = {
    StoreEvent.FLUSHED: "the store lost everything, or is another one: its epoch is gone",
    StoreEvent.ROLLED_BACK: "the store lost acknowledged writes: its counter of this proxy went back",
    StoreEvent.EVICTED: "the store evicted keys",
    StoreEvent.MOVED: "the store restarted or failed over: unless it is durable, its last writes may be lost",
    StoreEvent.FOUNDED: "the store has no epoch: it is new, or it lost everything",
}


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
    # In which layout Redis keeps records: `hash`, `packed` once no older version is live, or `auto`: packed once
    # none was there for a day.
    record_layout: str = "auto"


def differing_names(ours: str, theirs: str) -> str:
    """Return the names of the settings that differ between two descriptions of the form `name=value name=value`."""
    our_settings, their_settings = (dict(part.split("=", 1) for part in text.split(" ")) for text in (ours, theirs))
    differing = (name for name in our_settings if our_settings[name] != their_settings.get(name))
    return ", ".join(differing) or "unknown"


class Agreement:
    """What the other proxies on a store say of themselves: the settings and the rules by which they name keys."""

    def __init__(self, member: Membership) -> None:
        self._member = member
        self.identity = blake2b(member.identity_text.encode(), digest_size=16).hexdigest()
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

    def write_mode(self) -> str:
        """Return how to write the settings: `found` if they or none are stored, `ask` only if they are, or `accept`."""
        waits = self._clock() - self._refused_at < FOUND_AFTER_S
        return "accept" if self._member.accept else "ask" if waits else "found"

    def note_identity(self, reply: Any) -> None:
        """Note `[same]`, `[accepted]`, `[differs, settings of others, ...]`, or `[free]` where nothing is stored."""
        match reply:
            case [b"same"]:
                self.differs = ""
            case [b"accepted"]:
                self.differs = ""
                text = "this proxy names keys in another way than others on this store"
                self._member.report(StoreEvent.IDENTITY_ACCEPTED, text)
            case [b"differs", *others]:
                self._refused_at = self._clock()
                if not self.differs:
                    self.differs = differing_names(self._member.identity_text, others[0].decode())
                    text = f"this proxy names keys in another way than others: {self.differs}"
                    self._member.report(StoreEvent.IDENTITY, text)
            case _:
                # No proxy has written its settings, or there was no reply.
                pass

    def asked_rules(self) -> tuple[str, str, int]:
        """Return the rules to ask about, those that this proxy wrote last, and how many ms a proxy counts as live."""
        self._asked_rules = rules = self._member.rules()
        return rules, self._rules or rules, int(LIVE_S * 1000)

    def note_rules(self, reply: object) -> None:
        """Note `[differ]` or `[same]`. A declared change is not reported."""
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


class Losses:
    """The losses of one server, or of one database."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._quarantine_ends = self._lost_until = float("-inf")
        self._lost = ""

    def report(self, member: Membership, loss: StoreEvent) -> None:
        """Report a loss, and keep it as a notice for a while."""
        self._lost = LOSSES[loss]
        if loss is not StoreEvent.FOUNDED:
            self._lost_until = self._clock() + member.notice_s
        member.report(loss, self._lost)

    def note_quarantine(self, left_ms: int) -> None:
        self._quarantine_ends = self._clock() + left_ms / 1000

    @property
    def quarantine_left_s(self) -> float:
        return max(0.0, self._quarantine_ends - self._clock())

    def notice(self) -> str | None:
        """Return what was lost lately, or None."""
        return self._lost if self._clock() < self._lost_until else None

    def not_ready_reason(self) -> str | None:
        """Return why first-time keys are refused, and for how long, or None."""
        if not (left_s := self.quarantine_left_s):
            return None
        return f"{self._lost or 'the store lost data'}; first-time keys are refused for {ceil(left_s)} s more"

    def suspended(self) -> ClaimsSuspended | None:
        """Return the refusal of a first-time key during the quarantine, or None."""
        left_s = self.quarantine_left_s
        return ClaimsSuspended("the store lost data", retry_after_s=ceil(left_s)) if left_s else None
