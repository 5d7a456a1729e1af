"""What tests see of a store and change in it behind the proxies' backs, in one way for every kind of store.

A record is shown as the fields of its hash in Redis (docs/reference/record.md), whatever keeps it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from redis import Redis

from oncegate.store.record import Claim, self_check
from oncegate.store.record_name import parse_record_id, store_key
from oncegate.store.redis.records import SCAN_KEY
from oncegate.store.redis.replies import claim_result
from oncegate.store.redis.server import load_scripts
from oncegate.store.results import ClaimResult

Fields = dict[str, bytes]
SCRIPTS = load_scripts()


def damaged(value: bytes) -> Iterator[bytes]:
    """Return the value with each byte changed, once a little and once entirely, and cut short."""
    for place in range(len(value)):
        for mask in (0x01, 0x80, 0xFF):
            yield value[:place] + bytes([value[place] ^ mask]) + value[place + 1 :]
        yield value[:place]


class Probe(ABC):
    """A store, empty at first. `key`: the digest of a record."""

    url: str
    # Whether a renewal writes until when the record is kept; else it follows from the end of the lease.
    renewals_write_expiry: bool

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
        """Return what damage may make of a field of an unfinished record; None removes it."""

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

    def records(self) -> dict[bytes, Fields]:
        """Return all records, by their keys."""
        return {key: self.fields(key) for key in self.keys()}

    def states(self) -> list[bytes]:
        """Return the state of every record, as it is written."""
        return sorted(fields.get("state", b"complete") for fields in self.records().values())


class RedisProbe(Probe):
    renewals_write_expiry = True

    def __init__(self, client: Redis, url: str) -> None:
        self.client, self.url = client, url

    def now_ms(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def fields(self, key: bytes) -> Fields:
        return {field.decode(): value for field, value in self.client.hgetall(store_key(key)).items()}

    def change(self, key: bytes, /, **values: bytes | int | None) -> None:
        for field, value in values.items():
            if value is None:
                self.client.hdel(store_key(key), field)
            else:
                self.client.hset(store_key(key), field, value)

    def damages(self, field: str, value: bytes) -> Iterable[bytes | int | None]:
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

    def scan_left_ms(self) -> int:
        return int(self.client.pttl(SCAN_KEY))

    def end_scan(self) -> None:
        self.client.delete(SCAN_KEY)

    def claim(
        self, key: bytes, tenant: bytes, token: bytes, *, fingerprint: bytes, mode: bytes, lease_ms: int,
        retention_ms: int, not_after_ms: int, window_ms: int, seen: bytes,
    ) -> ClaimResult:  # fmt: skip
        described = self_check(key, tenant, token, mode, fingerprint)
        args = (token, fingerprint, described, mode, lease_ms, retention_ms, not_after_ms, 65536, window_ms, seen)
        _tag, *reply = self.client.eval(SCRIPTS["claim"].body, 1, store_key(key), b"tag", *args)
        claim = Claim(key, token, b"", mode, fingerprint, described, 0, lease_ms, retention_ms, retention_ms)
        return claim_result(claim, tenant, reply, lambda _: None)

    def save(self, key: bytes) -> object:
        return self.client.dump(store_key(key)), self.client.pttl(store_key(key))

    def restore(self, key: bytes, saved: object) -> None:
        assert isinstance(saved, tuple)
        dump, left_ms = saved
        if dump is not None:
            self.client.restore(store_key(key), left_ms, dump)
