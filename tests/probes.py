"""What tests see of a store and change in it behind the proxies' backs, in one way for every kind of store.

A record is shown as the fields of its hash in Redis (docs/reference/record.md), whatever keeps it.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from redis import Redis

from oncegate.store.record import DROPPED, Claim, Corrupt, Record, self_check, tenant_of, unpack
from oncegate.store.record_name import parse_record_id, store_key
from oncegate.store.redis.arguments import LAYOUT
from oncegate.store.redis.layouts.packed import OPEN, UNTIL, hash_fields, numbered, pack_complete, terms_begin
from oncegate.store.redis.replies import claim_result
from oncegate.store.redis.server import load_scripts
from oncegate.store.redis.wire import listed
from oncegate.store.results import ClaimResult

Fields = dict[str, bytes]
SCAN_KEY = b"once:scan"
SCRIPTS = load_scripts()


def damaged(value: bytes) -> Iterator[bytes]:
    """Return the value with each byte changed, once a little and once entirely, and cut short."""
    for place in range(len(value)):
        for mask in (0x01, 0x80, 0xFF):
            yield value[:place] + bytes([value[place] ^ mask]) + value[place + 1 :]
        yield value[:place]


class Damaged(bytes):
    """A packed record that was damaged, as a whole."""


# Where an open packed record has its fields (packed.py).
PLACES = {
    "token": (1, 17), "fence": (17, 33), "created": (33, 46), "leased": (46, 59), "lease_ms": (59, 69),
    "state": (70, 71), "mode": (71, 72), "self": (72, 104), "fingerprint": (104, 120),
}  # fmt: skip


def fields_of(client: Redis, name: bytes) -> Fields:
    """Return the fields that a record in Redis has as a hash, also where it is packed."""
    # In one write, so at one moment: a proxy may write it in the other layout at the next. At its memory limit
    # Redis 7.0 refuses a transaction.
    both = client.pipeline(transaction=False).get(name).hgetall(name)
    value, found = both.execute(raise_on_error=False)
    if isinstance(found, dict):
        fields = {field.decode(): value for field, value in found.items()}
        return numbered(fields.pop("more", b"")) | fields
    unpacked = hash_fields(parse_record_id(name.decode()) or b"", value)
    return {"corrupt": value} if isinstance(unpacked, Corrupt) else unpacked


def with_fields(key: bytes, value: bytes, changes: Mapping[str, bytes | int | None]) -> bytes:
    """Return a packed record with other values of these fields. Those of a hash that it lacks cannot be given."""
    texts = {name: change if isinstance(change, bytes) else b"%d" % (change or 0) for name, change in changes.items()}
    texts |= {name: b"" for name, change in changes.items() if change is None}
    if (whole := next((change for change in texts.values() if isinstance(change, Damaged)), None)) is not None:
        return whole
    fields = hash_fields(key, value)
    assert not isinstance(fields, Corrupt)
    if value[:1] == OPEN:
        return open_with(value, {**fields, **texts})
    return texts["meta"] if value[:1] == DROPPED else complete_with(key, value, {**fields, **texts}, texts)


def open_with(value: bytes, fields: Fields) -> bytes:
    """Return an open packed record with these fields."""
    lease_ms = int(fields.get("lease_ms", value[59:69]))
    leased = b"%013d" % max(0, int(fields["lease"]) - lease_ms)
    parts = {**fields, "leased": leased, "lease_ms": b"%010d" % lease_ms}
    parts |= {"fence": parts["fence"].rjust(16, b"0"), "created": parts["created"].rjust(13, b"0")}
    parts |= {"state": parts["state"][:1], "mode": parts["mode"][:1], "self": parts["self"].ljust(32, b"x")}
    written = bytearray(value)
    for name, (first, end) in PLACES.items():
        assert len(parts[name]) == end - first
        written[first:end] = parts[name]
    return bytes(written)


def complete_with(key: bytes, value: bytes, fields: Fields, changes: Fields) -> bytes:
    """Return a complete packed record with the response of another `meta`, another body, or another end."""
    (length,) = struct.unpack_from(">I", value, 81)
    if "meta" in changes and changes["meta"][0] not in b"\x01\x02":
        return changes["meta"][:1] + value[1:]
    end = fields["until"].rjust(13, b"0") if value[:1] == UNTIL else b""
    if "meta" not in changes:
        return value[:length] + fields.get("b0", b"") + end
    meta = fields["meta"]
    found = unpack(key, tenant_of(meta), meta, None, 0)
    assert isinstance(found, Record)
    check, times = tenant_of(meta) + bytes(16), (found.created_ms, 0, 0, 0, len(end))
    claim = Claim(key, found.token, meta[17:33], b"", found.fingerprint, check, *times)
    assert found.response is not None
    # The place for the time that it took has 24 days.
    response = replace(found.response, completed_ms=found.created_ms + 1)
    return (pack_complete(claim, response, fields.get("b0", b"")) or b"") + end


def damaged_packed(value: bytes, field: str) -> Iterator[Damaged]:
    """Return a packed record with each byte of a field changed, and cut short there."""
    (length,) = struct.unpack_from(">I", value, 81)
    more = {"meta": (0, length), "b0": (length, len(value)), "lease": (46, 69)}
    first, end = {**PLACES, **more}[field]
    for wrong in damaged(value[first:end]):
        cut = len(wrong) < end - first
        yield Damaged(value[:first] + wrong + (b"" if cut else value[end:]))


class Probe(ABC):
    """A store, empty at first. `key`: the digest of a record."""

    url: str
    # Whether a renewal writes until when the record is kept; else it follows from the end of the lease.
    renewals_write_expiry: bool
    # Whether records lie packed in a string, where they can.
    packed = False

    @abstractmethod
    def now_ms(self) -> int:
        """Return the server's time."""

    @abstractmethod
    def fields(self, key: bytes) -> Fields:
        """Return the fields of a record, none if the key is free."""

    @abstractmethod
    def change(self, key: bytes, /, **values: bytes | int | None) -> None:
        """Give fields of a record these values. None removes a field."""

    @abstractmethod
    def damages(self, field: str, value: bytes) -> Iterable[bytes | int | None]:
        """Return what damage may make of a field of the only record; None removes it."""

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """Lose a record, as a failover may."""

    @abstractmethod
    def left_ms(self, key: bytes) -> int:
        """Return how long a record is kept; negative if there is none."""

    @abstractmethod
    def expire(self, key: bytes, left_ms: int) -> None:
        """Set how long a record is kept."""

    @abstractmethod
    def copy(self, key: bytes, other: bytes) -> None:
        """Copy the record of one key to another."""

    @abstractmethod
    def keys(self) -> list[bytes]:
        """Return the keys that have a record."""

    @abstractmethod
    def marks(self) -> dict[bytes, int]:
        """Return the marks, each with the ms that it lasts."""

    @abstractmethod
    def remove_mark(self, name: bytes) -> None:
        """Lose a mark."""

    @abstractmethod
    def index(self, key: bytes, score: int) -> None:
        """Give a key this score in the index of open keys, as an owner with another lease would have."""

    @abstractmethod
    def entries(self) -> dict[bytes, list[int]]:
        """Return the index of open keys: the scores of each key."""

    @abstractmethod
    def scan_left_ms(self) -> int:
        """Return how long the reserved scan is one replica's."""

    @abstractmethod
    def end_scan(self) -> None:
        """Let the time of the reserved scan be over."""

    @abstractmethod
    def claim(
        self, key: bytes, tenant: bytes, token: bytes, *, fingerprint: bytes, mode: bytes, lease_ms: int,
        retention_ms: int, not_after_ms: int, window_ms: int, seen: bytes,
    ) -> ClaimResult:  # fmt: skip
        """Claim as no proxy does, once, and return what a proxy makes of the reply."""

    @abstractmethod
    def save(self, key: bytes) -> object:
        """Return the record of a key, for `restore`."""

    @abstractmethod
    def restore(self, key: bytes, saved: object) -> None:
        """Give a key that is free the record that it had."""

    @abstractmethod
    def everything(self) -> str:
        """Return all that the store has, as hexadecimal digits: to find bytes that should not be there."""

    def records(self) -> dict[bytes, Fields]:
        """Return all records, by their keys."""
        return {key: self.fields(key) for key in self.keys()}

    def states(self) -> list[bytes]:
        """Return the state of every record, as it is written."""
        return sorted(fields.get("state", b"complete") for fields in self.records().values())


class RedisProbe(Probe):
    """`packed`: which layout the store's proxies write."""

    renewals_write_expiry = True

    def __init__(self, client: Redis, url: str, packed: bool = False) -> None:
        self.client, self.url, self.packed = client, url, packed

    def now_ms(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def fields(self, key: bytes) -> Fields:
        return fields_of(self.client, store_key(key))

    def change(self, key: bytes, /, **values: bytes | int | None) -> None:
        if self.client.type(store_key(key)) == b"string":
            self._change_packed(key, values)
            return
        for field, value in values.items():
            if value is None:
                self.client.hdel(store_key(key), field)
            else:
                self.client.hset(store_key(key), field, value)

    def _change_packed(self, key: bytes, values: dict[str, bytes | int | None]) -> None:
        value = with_fields(key, self.client.get(store_key(key)), values)
        self.client.set(store_key(key), value, keepttl=True)

    def damages(self, field: str, value: bytes) -> Iterable[bytes | int | None]:
        (name,) = self.client.scan_iter("once:{*")
        if self.client.type(name) == b"string":
            yield from damaged_packed(self.client.get(name) or b"", field)
            return
        yield from damaged(value)
        if field in ("lease", "created", "fence"):
            yield from (b"-1", b"nan", b"inf", b"-inf", b"1e300", b"9" * 40)
        if field == "state":
            yield from (b"complete", b"claimed", b"late")
        yield None

    def remove(self, key: bytes) -> None:
        self.client.delete(store_key(key))

    def left_ms(self, key: bytes) -> int:
        return int(self.client.pttl(store_key(key)))

    def expire(self, key: bytes, left_ms: int) -> None:
        self.client.pexpire(store_key(key), left_ms)

    def copy(self, key: bytes, other: bytes) -> None:
        self.client.copy(store_key(key), store_key(other))

    def keys(self) -> list[bytes]:
        names = (parse_record_id(name.decode()) for name in self.client.scan_iter("once:{*"))
        return [key for key in names if key is not None]

    def marks(self) -> dict[bytes, int]:
        return {name: self.client.pttl(name) for name in self.client.scan_iter("once:{*}:*")}

    def remove_mark(self, name: bytes) -> None:
        self.client.delete(name)

    def index(self, key: bytes, score: int) -> None:
        self.client.zadd("once:open", {store_key(key): score})

    def entries(self) -> dict[bytes, list[int]]:
        found = [
            (parse_record_id(name.decode()), int(score))
            for name, score in self.client.zrange("once:open", 0, -1, withscores=True)
        ]
        return {key: [score] for key, score in found if key is not None}

    def scan_left_ms(self) -> int:
        return int(self.client.pttl(SCAN_KEY))

    def end_scan(self) -> None:
        self.client.delete(SCAN_KEY)

    def claim(
        self, key: bytes, tenant: bytes, token: bytes, *, fingerprint: bytes, mode: bytes, lease_ms: int,
        retention_ms: int, not_after_ms: int, window_ms: int, seen: bytes,
    ) -> ClaimResult:  # fmt: skip
        described = self_check(key, tenant, token, mode, fingerprint)
        terms = terms_begin(mode, lease_ms) + described + fingerprint + bytes(2)
        args = (token, terms, retention_ms, not_after_ms, LAYOUT[self.packed], window_ms, seen)
        _tag, *reply = listed(self.client.eval(SCRIPTS["claim"].body, 1, store_key(key), b"tag", *args))
        claim = Claim(key, token, b"", mode, fingerprint, described, 0, lease_ms, retention_ms, retention_ms)
        return claim_result(claim, tenant, reply, lambda _: None)

    def everything(self) -> str:
        return "".join(part.hex() for name in self.client.scan_iter() for part in (name, *self._parts(name)))

    def _parts(self, name: bytes) -> list[bytes]:
        match self.client.type(name):
            case b"string":
                return [self.client.get(name) or b""]
            case b"hash":
                return [part for pair in self.client.hgetall(name).items() for part in pair]
            case _:
                return list(self.client.zrange(name, 0, -1))

    def save(self, key: bytes) -> object:
        return self.client.dump(store_key(key)), self.client.pttl(store_key(key))

    def restore(self, key: bytes, saved: object) -> None:
        assert isinstance(saved, tuple)
        dump, left_ms = saved
        if dump is not None:
            self.client.restore(store_key(key), left_ms, dump)
