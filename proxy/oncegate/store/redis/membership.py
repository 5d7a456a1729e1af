"""How the proxies on one store know each other: the Redis keys that they use for it beside the records.

They also agree here on the layout in which records are written. Every version since this one reads both layouts, and
notes in `once:members` the highest that it lets others write. Older versions read hashes alone. They note their rules
in `once:rules` (0.1 writes only its identity). Records are packed only once that key is a string, which nothing can
make of it while an older version is live: one that comes later fails there before its first claim, and is not ready.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from oncegate.store import membership
from oncegate.store.membership import Agreement, Membership
from oncegate.store.record import PREFIX_BYTES
from oncegate.store.redis.talk import Question, call, command
from oncegate.store.redis.wire import ErrorReply, Script

EPOCH, IDENTITIES, MEMBERS = b"once:epoch", b"once:identities", b"once:members"
# Where older versions note their rules, and what stands there once they are kept out.
OLDER, KEPT_OUT = b"once:rules", b"records are packed: see docs/how-to/upgrades.md"
# The layouts of a record.
HASHES, PACKED = 1, 2
# So long after an older version was last on a store it may come back at any time: only hashes are written.
OLDER_GONE_S = 86_400.0


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


def live_proxies(members: Mapping[bytes, bytes], now_ms: int) -> list[str]:
    """Return the names of the proxies that were live a moment ago, by what `once:members` has."""
    notes = (value.partition(b" ") for field, value in members.items() if field.startswith(b"name:"))
    live_ms = membership.LIVE_S * 1000
    return [name.decode("utf-8", "replace") for at_ms, _, name in notes if now_ms - int(at_ms) <= live_ms]


class WrittenLayout:
    """In which layout this proxy writes records now, as the proxies at every server of its store agree.

    Packed only while every server said so within LIVE_S: a proxy that was suspended may have missed a change.
    """

    __slots__ = ("_agreed", "_clock", "_forced", "_log", "_packed_until", "_servers")

    def __init__(self, log: Callable[..., None] = lambda *_, **__: None) -> None:
        self._clock, self._log = asyncio.get_running_loop().time, log
        self._agreed = self._forced = False
        # By hash tag: when the server was asked, and whether it said `packed`.
        self._servers: dict[bytes, tuple[float, bool]] = {}
        # The loop's time from which hashes are written, unless a server says `packed` again.
        self._packed_until = float("-inf")

    @property
    def packed(self) -> bool:
        return self._clock() < self._packed_until

    @property
    def is_packed_somewhere(self) -> bool:
        return any(packed for _, packed in self._servers.values())

    def force(self, packed: bool) -> None:
        """Write one layout whatever the proxies agree on."""
        self._forced, self._packed_until = True, float("inf" if packed else "-inf")

    def note(self, hash_tag: bytes, asked_at: float, packed: bool) -> None:
        """Note what one server said. A server that is asked no more does not count."""
        self._servers[hash_tag] = (asked_at, packed)
        if self._forced:
            return
        live_s = membership.LIVE_S
        self._servers = {tag: said for tag, said in self._servers.items() if asked_at - said[0] < live_s}
        oldest, _ = min(self._servers.values())
        before, self._agreed = self._agreed, all(one for _, one in self._servers.values())
        self._packed_until = oldest + live_s if self._agreed else float("-inf")
        if before != self._agreed:
            self._log("record layout", layout="packed" if self._agreed else "hash")


class OtherProxies(Agreement):
    """Asks what the other proxies on a server say of themselves, and notes their replies."""

    def __init__(self, scripts: dict[str, Script], member: Membership, layout: WrittenLayout) -> None:
        super().__init__(member)
        # Copies without a verb, so that metrics do not count these calls among the request path's.
        self._identity_script, self._members_script = (
            Script("", scripts[verb].body) for verb in ("identity", "members")
        )
        self._layout = layout
        self._lets_write = HASHES if member.record_layout == "hash" else PACKED
        # Whether the server's user may do what packed records need.
        self.may_pack = True
        # Of this server: whether older versions are kept out, or are to be.
        self._kept_out = self._may_keep_out = False
        # Identities of proxies that are gone, which may be those of older versions.
        self._former: list[bytes] = []
        # What the next question says: `new` if this proxy founded the store, `older` if an older version is on it.
        self._found = ""
        self._asked_at = 0.0

    def questions(self, hash_tag: bytes) -> list[Question]:
        """Ask what others say: their identities, those of this version, the notes of older ones. Then note ours.

        If it is time, older versions are kept out.
        """
        self._asked_at, member = self._clock(), self._member
        rules, before, live_ms = self.asked_rules()
        lets_write = self._lets_write if self.may_pack else HASHES
        itself = member.token_prefix.hex(), member.proxy_name
        args = (self.identity, rules, before, lets_write, live_ms, member.retention_ms, self._found, *itself)
        identity_args = (self.identity, member.identity_text, self.write_mode(), member.retention_ms)
        identities, older = IDENTITIES + hash_tag, OLDER + hash_tag
        return [
            command("HGETALL", identities),
            call(self._members_script, MEMBERS + hash_tag, *args),
            command("HGETALL", older),
            call(self._identity_script, identities, *identity_args),
            *self._keep_out(identities, older),
        ]

    def _keep_out(self, identities: bytes, older: bytes) -> list[Question]:
        """Return what keeps older versions out, or keeps it so, as no question depends on its replies."""
        if not (self._kept_out or self._may_keep_out):
            return []
        # With GET it fails on a hash, so that it replaces no note of an older version that came just now.
        only = () if self._may_keep_out else ("XX",)
        kept_out = command("SET", older, KEPT_OUT, *only, "GET", "PX", self._member.retention_ms)
        # 0.1 notes no rules. It is refused where its identity is not known.
        former = [command("HDEL", identities, *self._former)] if self._may_keep_out and self._former else []
        return [kept_out, *former]

    def note(self, hash_tag: bytes, identities: object, members: object, older: object) -> None:
        """Note the replies to the first three of `questions`."""
        if not isinstance(members, list):
            return
        verdict, lowest, age_ms, quiet_ms, new, now_ms, seen_ms, live = members
        notes = older if isinstance(older, list) else []
        others_differ = any(rules != self._asked_rules.encode() for rules in notes[::2])
        self.note_rules([b"differ"] if others_differ else [verdict])
        self._kept_out = isinstance(older, ErrorReply) and str(older).startswith("WRONGTYPE")
        live_ms = membership.LIVE_S * 1000
        unexplained = _written(identities, but=live.split(b" "))
        self._former = list(unexplained)
        # Half of a life: a proxy of this version writes both together, and both end at about the same time.
        is_older_live = bool(notes) or any(now_ms - at_ms <= live_ms / 2 for at_ms in unexplained.values())
        # Nobody of this version was there when an identity was last written.
        was_older = any(0 < seen_ms < at_ms - live_ms for at_ms in _written(identities).values())
        self._found = "older" if is_older_live or was_older else ""
        chosen = new is not None or quiet_ms >= OLDER_GONE_S * 1000 or self._member.record_layout == "packed"
        is_time = age_ms >= live_ms and (chosen or self._layout.is_packed_somewhere)
        self._may_keep_out = is_time and older == [] and not is_older_live and not self._found and lowest >= PACKED
        self._layout.note(hash_tag, self._asked_at, self._kept_out and lowest >= PACKED)

    def note_founded(self) -> None:
        """Note that this proxy found the store new: no older version has used it."""
        self._found = "new"


def _written(identities: object, but: Iterable[bytes] = ()) -> dict[bytes, int]:
    """Return when each identity was written last, in ms of the store's clock."""
    entries = identities if isinstance(identities, list) else []
    times = {digest: value.split(b" ", 1)[0] for digest, value in zip(entries[::2], entries[1::2], strict=True)}
    return {digest: int(at_ms) for digest, at_ms in times.items() if at_ms.isdigit() and digest not in set(but)}
