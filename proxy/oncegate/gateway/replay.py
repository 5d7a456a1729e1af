"""Sends stored responses: a small one in one write, a large one at the client's pace.

A replay ends in one of four outcomes. REPLAYED: all of it was written. RECORD_CORRUPT: the stored bytes are not those
that were stored. STORE_UNAVAILABLE: they could not be read. In both cases nothing was sent yet. TRUNCATED: either of
them, with the head already out, so that the connection was aborted.
"""

from collections.abc import Callable
from dataclasses import dataclass

from oncegate.adaptation.json_rpc import Caller, Replayed
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.messages.framing import COUNTED, STATED
from oncegate.messages.response_head import response_digest
from oncegate.observe.outcome import Outcome
from oncegate.store.record import Record, StoredResponse, intact
from oncegate.store.results import ReadFailure
from oncegate.store.store import Store

MARK = b"Idempotent-Replayed: true\r\nOncegate-Status: replayed\r\n"


@dataclass(slots=True)
class Replay:
    """A complete record to be replayed to `request`, which may be another client's than the original, and to
    `caller` if its messages are adapted.

    `fields` are further header fields; `on_body` is given all body bytes.
    """

    key: bytes
    record: Record
    stored: StoredResponse
    fields: bytes
    request: Request
    caller: Caller | None
    on_body: Callable[[bytes], None] | None = None

    def adapted(self) -> Replayed | None:
        """Return what adapts the messages for the caller, None where they are replayed as they were stored."""
        stored = self.stored
        return None if self.caller is None else Replayed(stored.block, stored.request_id, self.caller)

    def head_block(self, adapted: Replayed | None) -> bytes:
        """Return the header fields of the replay. Age counts from the original response (RFC 9111, section 5.1)."""
        stored, request = self.stored, self.request
        age_ms = max(0, self.record.now_ms - stored.completed_ms)
        stored_block = stored.block if adapted is None else adapted.block
        block = b"%sAge: %d\r\n%s%s" % (stored_block, stored.age_s + age_ms // 1000, MARK, self.fields)
        return request.requester.replayed(block, age_ms) if request.adaptation.adapts_replay(stored_block) else block


def replay_small(response: ResponseWriter, replay: Replay) -> Outcome:
    """Send a stored response whose body is at hand."""
    stored, body, adapted = replay.stored, replay.record.body or b"", replay.adapted()
    block = replay.head_block(adapted)
    if not intact(stored, body):
        return Outcome.RECORD_CORRUPT
    framing = STATED if stored.stated_length and adapted is None else COUNTED
    if adapted is not None:
        body = adapted.feed(body) + adapted.rest()
    response.send(stored.status, stored.reason, block, body, framing)
    # After the response has left.
    if replay.on_body is not None:
        replay.on_body(body)
    return Outcome.REPLAYED


async def replay_large(response: ResponseWriter, store: Store, replay: Replay) -> Outcome:
    """Copy chunk after chunk. The last byte is held back until size and digest agree."""
    stored, adapted = replay.stored, replay.adapted()
    digest = response_digest(stored.status, stored.reason, stored.block)
    first = sent = 0
    while first < stored.chunks and not response.client_gone:
        chunks = await store.read(replay.key, replay.record.token, first)
        if isinstance(chunks, ReadFailure):
            is_corrupt = chunks is ReadFailure.INCOMPLETE
            return _broken(response, Outcome.RECORD_CORRUPT if is_corrupt else Outcome.STORE_UNAVAILABLE)
        if not response.started:
            framing = STATED if stored.stated_length and adapted is None else COUNTED
            # How long the adapted body will be is not known yet.
            size = stored.size if adapted is None else None
            response.begin(stored.status, stored.reason, replay.head_block(adapted), size, framing)
        for chunk in chunks:
            digest.update(chunk)
            sent += len(chunk)
            if sent > stored.size:
                return _broken(response, Outcome.RECORD_CORRUPT)
            if data := chunk if adapted is None else adapted.feed(chunk):
                response.write(data)
            if replay.on_body is not None:
                replay.on_body(chunk)
        first += len(chunks)
        await response.wait_room()
    if response.client_gone:
        return Outcome.REPLAYED
    if sent != stored.size or digest.digest() != stored.digest:
        return _broken(response, Outcome.RECORD_CORRUPT)
    if adapted is not None and (rest := adapted.rest()):
        response.write(rest)
    response.end()
    return Outcome.REPLAYED


def _broken(response: ResponseWriter, outcome: Outcome) -> Outcome:
    if response.started:
        response.abort()
        return Outcome.TRUNCATED
    return outcome
