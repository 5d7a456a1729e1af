"""The audit trail: its entries, their digests, and what a look at one key's entries finds. Pure.

Each change of a key's state writes an entry in the same transaction. Its digest is over its fields and the digest of
the key's entry before, so the entries of a key are a chain. The record has the number and the digest of the last one.
If the record is removed, the key's next claim begins a new chain.
"""

import hmac
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from struct import Struct
from typing import Any, NamedTuple

from oncegate.store.record_name import record_id

DAY_MS = 86_400_000
# What an operator's name begins with; the actor of other entries is the first part of their proxy's tokens.
OPERATOR = b"operator "
_NUMBERS = Struct(">qqh")
_SIZES = Struct(">iq")
_LENGTH = Struct(">i")
_FENCE = Struct(">q")


class Event(Enum):
    """What happened to a key: the number in the trail, and the word for it."""

    CLAIMED = 1, "claimed"
    TAKEN_OVER = 2, "taken_over"
    RENEWED = 3, "renewed_from_unknown"
    STORED = 4, "stored"
    RELEASED = 5, "released"
    UNKNOWN = 6, "unknown"
    CANCELLED = 7, "cancelled"
    WITHDRAWN = 8, "withdrawn"
    RESOLVED = 9, "resolved"
    FREED = 10, "freed"
    EXPIRED = 11, "expired"
    PURGED = 12, "purged"

    def __init__(self, number: int, word: str) -> None:
        self.number, self.word = number, word


EVENTS = {event.number: event for event in Event}
# What they are made by, if anything, is their detail.
_DECISIONS = (Event.RESOLVED.number, Event.FREED.number)


class Entry(NamedTuple):
    """One entry. Its fields are the columns of the table. `no` counts a chain's entries from 1. Times in ms.

    `before_at`: the time of the entry before, where it is found; 0 for the first.
    """

    key: bytes
    no: int
    at: int
    before_at: int
    event: int
    token: bytes
    fence: int
    actor: bytes
    rule: bytes
    status: int
    size: int
    detail: bytes
    digest: bytes

    @property
    def word(self) -> str:
        """Return the word for its event."""
        return EVENTS[self.event].word if self.event in EVENTS else f"event {self.event}"

    def follows(self, before: bytes, key: bytes) -> bool:
        """Return whether this entry's digest is right behind an entry with the digest `before`; empty: it is first."""
        return hmac.compare_digest(self.digest, digest_of(self, before, key))


class Head(NamedTuple):
    """The last entry of a key, by its record."""

    no: int
    at: int
    digest: bytes


class Finding(NamedTuple):
    """What is wrong with a chain, or worth a look. `kind`: a key of FINDINGS. `at`: the time of the entry, in ms."""

    kind: str
    key: bytes
    no: int
    at: int
    text: str

    @property
    def is_error(self) -> bool:
        return FINDINGS[self.kind]


# Whether each kind is an error. The others happen without anybody's fault.
FINDINGS = {
    "changed": True,
    "removed": True,
    "forked": True,
    "cut": True,
    "ahead": True,
    "begins_anew": False,
    "begins_late": False,
}
UNDETECTED = (
    "the last entries of a chain, or a whole one, that were removed together with the key's record",
    "entries of days that were dropped past the retention",
    "a trail and records that were all written anew by somebody who owns the tables and has ONCEGATE_SECRET; without "
    "a secret, by anybody who owns the tables",
    "a database that was restored as a whole from an older copy",
)


def digest_of(entry: Entry, before: bytes, key: bytes) -> bytes:
    """Return the digest of an entry behind one with the digest `before`: HMAC-SHA-256.

    The same as `audit_digest_of` in the database. `key` is empty without a secret.
    """
    parts = (
        before,
        entry.key,
        _NUMBERS.pack(entry.no, entry.at, entry.event),
        _LENGTH.pack(len(entry.token)),
        entry.token,
        _FENCE.pack(entry.fence),
        _LENGTH.pack(len(entry.actor)),
        entry.actor,
        _LENGTH.pack(len(entry.rule)),
        entry.rule,
        _SIZES.pack(entry.status, entry.size),
        _LENGTH.pack(len(entry.detail)),
        entry.detail,
    )
    text = b"".join(parts)
    return hmac.digest(key, text, "sha256")


# Of the links of entries: what is before a first one.
_START = -1


def verify(entries: Iterable[Entry], head: Head | None, first_day: int, key: bytes) -> list[Finding]:
    """Return what there is to say of all entries of one key.

    `head`: of its record, None if there is no record. `first_day`: the oldest day that the trail still has. `key`: of
    the digests.
    """
    chain = sorted(entries, key=lambda one: (one.no, one.at))
    links = _links(chain, key)
    behind = Counter(links.values())
    found = []
    seen: set[int] = set()
    for index, entry in enumerate(chain):
        if index not in links:
            found.append(_unlinked(entry, chain, behind, first_day))
        elif links[index] != _START and links[index] in seen:
            found.append(_finding("forked", entry, "another entry follows the same one"))
        seen.add(links.get(index, _START))
    return found + _beginnings(chain, links) + (_compared(chain, behind, head) if head and head.no else [])


def _links(chain: Sequence[Entry], key: bytes) -> dict[int, int]:
    """Return which entry is before each one, by its digest. Those that follow none are left out."""
    by_number: dict[int, list[int]] = {}
    for index, entry in enumerate(chain):
        by_number.setdefault(entry.no, []).append(index)
    links = {}
    for index, entry in enumerate(chain):
        if entry.no == 1 and entry.follows(b"", key):
            links[index] = _START
        for other in by_number.get(entry.no - 1, ()):
            if entry.follows(chain[other].digest, key):
                links[index] = other
    return links


def _unlinked(entry: Entry, chain: Sequence[Entry], behind: Mapping[int, int], first_day: int) -> Finding:
    """Say why an entry may not follow any other."""
    is_followed = [not behind.get(index) for index, other in enumerate(chain) if other.no == entry.no - 1]
    if entry.no == 1 or any(is_followed):
        return _finding("changed", entry, "it is not what was written, or the digest of the entry before is not")
    if entry.before_at // DAY_MS < first_day:
        return _finding("begins_late", entry, "the entries before it were dropped with their days")
    return _finding("removed", entry, "the entry before it is missing")


def _beginnings(chain: Sequence[Entry], links: Mapping[int, int]) -> list[Finding]:
    """Return a finding for each chain of the key but the first one."""
    firsts = sorted((chain[index] for index, before in links.items() if before == _START), key=lambda one: one.at)
    found = []
    for first in firsts[1:]:
        last = max((one for one in chain if one.at <= first.at and one is not first), key=lambda one: one.at)
        found.append(_finding("begins_anew", first, f"the key had no record any more; its last entry was: {last.word}"))
    return found


def _compared(chain: Sequence[Entry], behind: Mapping[int, int], head: Head) -> list[Finding]:
    """Compare the trail with what the record says of its last entry."""
    for index, entry in enumerate(chain):
        if entry.no == head.no and hmac.compare_digest(entry.digest, head.digest):
            text = "the trail goes on behind the last entry of the record"
            return [_finding("ahead", entry, text)] if behind.get(index) else []
    last = max(chain, key=lambda one: one.at)
    return [_finding("cut", last, f"the record names a later entry, number {head.no}, which is missing")]


def verify_without_entries(key: bytes, head: Head, first_day: int) -> list[Finding]:
    """Return what there is to say of a record whose key has no entry at all."""
    if head.at // DAY_MS < first_day:
        return []
    return [Finding("cut", key, head.no, head.at, "the record names this entry as its last, and the key has none")]


def _finding(kind: str, entry: Entry, text: str) -> Finding:
    return Finding(kind, entry.key, entry.no, entry.at, text)


# For people and programs ...


def facts(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON has it. What the event does not have is left out."""
    actor = entry.actor
    said = {
        "key_id": record_id(entry.key),
        "number": entry.no,
        "at": iso_time(entry.at),
        "event": entry.word,
        "token": entry.token.hex(),
        "fence": entry.fence,
        "actor": actor.decode("utf-8", "replace") if actor.startswith(OPERATOR) else actor.hex(),
        "rule": entry.rule.decode("utf-8", "replace"),
        "status": entry.status,
        "size": entry.size,
        "evidence" if entry.event in _DECISIONS else "detail": _detail(entry),
        "digest": entry.digest.hex(),
    }
    return {name: value for name, value in said.items() if value not in ("", 0) or name == "fence"}


def _detail(entry: Entry) -> str:
    # A claim names the token of the claim before; another event, its reason.
    is_token = entry.event in (Event.CLAIMED.number, Event.TAKEN_OVER.number)
    return entry.detail.hex() if is_token else entry.detail.decode("utf-8", "replace")


def iso_time(ms: int) -> str:
    """Return a time as ISO 8601 has it, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
