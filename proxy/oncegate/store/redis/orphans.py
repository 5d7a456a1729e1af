"""The keys that were in flight when their owner died, marked unknown at once instead of after their lease.

Only for owners that surely live no more: an owner that goes on could complete a key that another request executes.
"""

from collections.abc import Collection

from oncegate.store.record import ViewState
from oncegate.store.record_name import parse_record_id
from oncegate.store.record_view import StoreError, claim_of
from oncegate.store.redis.node import Node
from oncegate.store.redis.store import RedisStore
from oncegate.store.redis.views.reading import ask, checked
from oncegate.store.store import StoreConfig

TIMEOUT_S = 5.0
# Records that the server looks through in one call: about 2 ms.
PAGE = 1000
REASON = "its proxy was killed"

# Returns the next cursor, and the keys of one page that are not complete and whose token has one of these prefixes.
# The server compares them, because a store may hold half a million records. A complete record has no field `token`, and
# a packed one that is not complete begins with the byte 4.
OWNED_PAGE = b"""
local owners, owned, size = {}, {}, #(ARGV[3] or '')
for at = 3, #ARGV do
  owners[ARGV[at]] = true
end
local page = redis.call('SCAN', ARGV[1], 'MATCH', 'once:{*', 'COUNT', ARGV[2], 'TYPE', 'hash')
local packed = redis.call('SCAN', ARGV[1], 'MATCH', 'once:{*', 'COUNT', ARGV[2], 'TYPE', 'string')[2]
for _, key in ipairs(packed) do
  local begin = redis.call('GETRANGE', key, 0, size)
  if begin:byte() == 4 and owners[begin:sub(2)] then
    owned[#owned + 1] = key
  end
end
for _, key in ipairs(page[2]) do
  local token = redis.call('HGET', key, 'token')
  if token and owners[token:sub(1, size)] then
    owned[#owned + 1] = key
  end
end
return {page[1], owned}
"""


async def mark_orphans(url: str, owners: Collection[bytes]) -> int:
    """Mark the keys in flight of dead owners unknown, and return their number. Raises StoreError.

    `url`: of a store of one server. `owners`: the token prefixes of the owners.
    """
    store = RedisStore(
        StoreConfig(
            url=url,
            timeout_ms=int(TIMEOUT_S * 1000),
            patience_s=TIMEOUT_S,
            background=lambda work: work.close(),
        )
    )
    store.start()
    try:
        if not await store.wait_up(TIMEOUT_S):
            raise StoreError(store.not_ready_reason() or "the store is not reachable")
        return sum([await _mark_at(store, node, owners) for node in store.nodes])
    finally:
        await store.close()


async def _mark_at(store: RedisStore, node: Node, owners: Collection[bytes]) -> int:
    # A scan may return a key twice.
    marked: set[bytes] = set()
    cursor = b"0"
    while True:
        cursor, names = checked(await ask(node, "EVAL", OWNED_PAGE, 0, cursor, PAGE, *owners))
        for name in names:
            key = parse_record_id(name.decode("ascii", "replace"))
            if key is not None and key not in marked and await _mark(store, key):
                marked.add(key)
        if cursor == b"0":
            return len(marked)


async def _mark(store: RedisStore, key: bytes) -> bool:
    """Mark a key unknown if it is in flight, and return whether it was. Its token makes a late call harmless."""
    record = await store.records.read(key)
    if record is None or record.state is not ViewState.IN_FLIGHT or record.left_ms <= 0:
        return False
    await store.mark_unknown(claim_of(record, record.left_ms), REASON, TIMEOUT_S)
    return True
