"""How the proxies on one store know each other: the Redis keys that they use for it beside the records.

They also agree here on the layout in which records are written. Every version since this one reads both layouts, and
notes in `once:members` the highest that it lets others write. An older version reads hashes alone, and notes its rules
in `once:rules`. Records are packed only once that key is a string, which nobody replaces while an older version is
live: a proxy of an older version that comes later fails there before its first claim, and is not ready.
"""

import asyncio
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


class WrittenLayout:
    """In which layout this proxy writes records now, as the proxies at every server of its store agree.

    Packed only while every server said so within LIVE_S: a proxy that was suspended may have missed a change.
    """

    __slots__ = ("_clock", "_forced", "_servers", "packed_until")

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._forced = False
        # By hash tag: when the server was asked, and whether it said `packed`.
        self._servers: dict[bytes, tuple[float, bool]] = {}
        # The loop's time from which hashes are written, unless a server says `packed` again.
        self.packed_until = float("-inf")

    @property
    def packed(self) -> bool:
        return self._clock() < self.packed_until

    @property
    def is_packed_somewhere(self) -> bool:
        return any(packed for _, packed in self._servers.values())

    def force(self, packed: bool) -> None:
        """Write one layout whatever the proxies agree on."""
        self._forced, self.packed_until = True, float("inf" if packed else "-inf")

    def note(self, hash_tag: bytes, asked_at: float, packed: bool) -> None:
        """Note what one server said. A server that is asked no more does not count."""
        self._servers[hash_tag] = (asked_at, packed)
        if self._forced:
            return
        live_s = membership.LIVE_S
        self._servers = {tag: said for tag, said in self._servers.items() if asked_at - said[0] < live_s}
        oldest, _ = min(self._servers.values())
        is_packed = all(one for _, one in self._servers.values())
        self.packed_until = oldest + live_s if is_packed else float("-inf")


class OtherProxies(Agreement):
    """Asks what the other proxies on a server say of themselves, and notes their replies."""

    def __init__(self, scripts: dict[str, Script], member: Membership, layout: WrittenLayout) -> None:
        super().__init__(member)
        # Copies without a verb, so that metrics do not count these calls among the request path's.
        self._identity_script, self._members_script = (
            Script("", scripts[verb].body) for verb in ("identity", "members")
        )
        self._layout = layout
        self._lets_pack = member.record_layout != "hash"
        # Of this server: whether older versions are kept out, or are to be.
        self._kept_out = self._may_keep_out = False
        # What the next question says: whether this proxy founded the store, or an older version is on it.
        self._is_new: int | str = ""
        self._asked_at = 0.0

    def identity_question(self, hash_tag: bytes) -> Question:
        """Ask whether others name keys by the same settings."""
        member = self._member
        args = (self.identity, member.identity_text, self.write_mode(), member.retention_ms)
        return call(self._identity_script, IDENTITIES + hash_tag, *args)

    def member_questions(self, hash_tag: bytes) -> list[Question]:
        """Ask what other live proxies say, and those of older versions. Keep older versions out, if it is time."""
        self._asked_at = self._clock()
        rules, before, live_ms = self.asked_rules()
        retention_ms = self._member.retention_ms
        args = (rules, before, PACKED if self._lets_pack else HASHES, live_ms, retention_ms, self._is_new)
        self._is_new = ""
        older = OLDER + hash_tag
        questions = [call(self._members_script, MEMBERS + hash_tag, *args), command("HGETALL", older)]
        if self._kept_out or self._may_keep_out:
            # With GET it fails on a hash, so that it replaces no note of an older version that came just now.
            only = () if self._may_keep_out else ("XX",)
            questions.append(command("SET", older, KEPT_OUT, *only, "GET", "PX", retention_ms))
        return questions

    def note_members(self, hash_tag: bytes, said: object, older: object) -> None:
        """Note the replies to the first two of `member_questions`."""
        if not isinstance(said, list):
            return
        verdict, lowest, age_ms, is_new = said
        notes = older if isinstance(older, list) else []
        older_differ = any(rules.decode() != self._asked_rules for rules in notes[::2])
        self.note_rules([b"differ"] if older_differ else [verdict])
        self._kept_out = isinstance(older, ErrorReply) and str(older).startswith("WRONGTYPE")
        if notes:
            self._is_new = 0
        settled = older == [] and lowest >= PACKED and age_ms >= membership.LIVE_S * 1000
        chosen = is_new == b"1" or self._member.record_layout == "packed" or self._layout.is_packed_somewhere
        self._may_keep_out = settled and chosen
        self._layout.note(hash_tag, self._asked_at, self._kept_out and lowest >= PACKED)

    def note_founded(self) -> None:
        """Note that this proxy found the store new: no older version has used it."""
        self._is_new = 1
