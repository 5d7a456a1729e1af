"""The index of open keys in Redis: sorted sets of the names of all records that are not complete.

One server, also behind Sentinel, has one set, `once:open`. The scripts of the verbs write it together with the record.
Its members are the names of records.

In a cluster a script cannot: the slots of the record and of the set differ. There are 64 sets, `once:open{N}`, each in
the middle of 256 slots and for the records in these, so that it nearly always lies on the same master as they do. Which
set has a record never changes, whatever slots are moved. Its members are the name of a record and the token of a claim:
whoever removes the entry of a claim that ended cannot remove that of the next one.

What the scores mean is in store/open_keys/scores.py; the scripts write them, too.
"""

from itertools import count

from redis.crc import key_slot

from oncegate.store.record_name import parse_record_id

INDEX = b"once:open"
SHARDS = 64
_SLOTS_EACH = 16384 // SHARDS
# "once:{", the id and "}".
NAME_BYTES = 39


def _shard_names() -> list[bytes]:
    """Return for each shard a name whose slot is among those of its records, as near to their middle as is easy."""
    found: dict[int, bytes] = {}
    for number in count():
        name = INDEX + b"{%d}" % number
        shard, place = divmod(key_slot(name), _SLOTS_EACH)
        if abs(place - _SLOTS_EACH // 2) <= _SLOTS_EACH // 4:
            found.setdefault(shard, name)
        if len(found) == SHARDS:
            return [found[shard] for shard in range(SHARDS)]
    raise AssertionError


SHARD_NAMES = _shard_names()


def shard_of(slot: int) -> bytes:
    """Return the name of the set that has the open records of a slot."""
    return SHARD_NAMES[slot // _SLOTS_EACH]


def entry_of(name: bytes, token: bytes, *, is_sharded: bool) -> tuple[bytes, bytes]:
    """Return the set that has the entry of a record, and the entry's member. `is_sharded`: the store is a cluster."""
    return (shard_of(key_slot(name)), name + token) if is_sharded else (INDEX, name)


def read_member(member: bytes) -> tuple[bytes | None, bytes]:
    """Return the key and the token that a member names. The key is None for what is no entry."""
    return parse_record_id(member[:NAME_BYTES].decode("ascii", "replace")), member[NAME_BYTES:]
