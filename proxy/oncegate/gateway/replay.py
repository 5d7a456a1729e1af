"""Sends stored responses: a small one in one write, a large one at the client's pace.

A replay ends in one of four outcomes. REPLAYED: all of it was written. RECORD_CORRUPT: the stored bytes are not those
that were stored. STORE_UNAVAILABLE: they could not be read. In both cases nothing was sent yet. TRUNCATED: either of
them, with the head already out, so that the connection was aborted.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from oncegate.adaptation.content_codings import (
    Decoded,
    Undecodable,
    coding_to_decode,
    decoded_whole,
    may_be_coded,
)
from oncegate.adaptation.json_rpc import Caller, Replayed
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.messages.framing import COUNTED, STATED
from oncegate.messages.response_head import response_digest
from oncegate.messages.trailers import announcement
from oncegate.observe.outcome import Outcome
from oncegate.store.record import Record, StoredResponse, intact
from oncegate.store.results import ReadFailure
from oncegate.store.store import Store

# A decoded body that is sent at once may have so many bytes. A larger one is replayed as it was stored.
MAX_DECODED_BYTES = 8_388_608
MARK = b"Idempotent-Replayed: true\r\nOncegate-Status: replayed\r\n"

Adapted = Replayed | Decoded


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

    def adapted(self) -> Adapted | None:
        """Return what adapts the body for the caller, None where it is replayed as it was stored."""
        stored = self.stored
        if self.caller is not None:
            return Replayed(stored.block, stored.request_id, self.caller)
        if not may_be_coded(stored.block):
            return None
        accepted = self.request.checked_head().fields.get(b"accept-encoding")
        coding = coding_to_decode(stored.status, stored.block, accepted)
        return Decoded(stored.block, coding) if coding else None

    def head_block(self, adapted: Adapted | None) -> bytes:
        """Return the header fields of the replay. Age counts from the original response (RFC 9111, section 5.1)."""
        stored, request = self.stored, self.request
        age_ms = max(0, self.record.now_ms - stored.completed_ms)
        stored_block = stored.block if adapted is None else adapted.block
        block = b"%sAge: %d\r\n%s%s" % (stored_block, stored.age_s + age_ms // 1000, MARK, self.fields)
        return request.requester.replayed(block, age_ms) if request.adaptation.adapts_replay(stored_block) else block


def replay_small(response: ResponseWriter, replay: Replay) -> Outcome:
    """Send a stored response whose body is at hand."""
    stored, body, adapted = replay.stored, replay.record.body or b"", replay.adapted()
    if not intact(stored, body):
        return Outcome.RECORD_CORRUPT
    whole = body
    if isinstance(adapted, Decoded):
        decoded = decoded_whole(adapted.coding, body, MAX_DECODED_BYTES)
        # What is not in its coding is replayed as it came.
        whole, adapted = (body, None) if decoded is None else (decoded, adapted)
    elif adapted is not None:
        whole = adapted.feed(body) + adapted.rest()
    block = replay.head_block(adapted)
    if stored.trailers and response.takes_trailers:
        response.trailers, block = stored.trailers, block + announcement(stored.trailers)
    framing = STATED if stored.stated_length and adapted is None else COUNTED
    response.send(stored.status, stored.reason, block, whole, framing)
    # After the response has left.
    if replay.on_body is not None:
        replay.on_body(body)
    return Outcome.REPLAYED


async def replay_large(response: ResponseWriter, store: Store, replay: Replay) -> Outcome:
    """Copy chunk after chunk. The last byte is held back until size and digest agree."""
    stored, adapted = replay.stored, None
    digest = response_digest(stored.status, stored.reason, stored.block)
    first = sent = 0
    while first < stored.chunks and not response.client_gone:
        chunks = await store.read(replay.key, replay.record.token, first)
        if isinstance(chunks, ReadFailure):
            is_corrupt = chunks is ReadFailure.INCOMPLETE
            return _broken(response, Outcome.RECORD_CORRUPT if is_corrupt else Outcome.STORE_UNAVAILABLE)
        if not response.started:
            adapted = _begin(response, replay, chunks[0])
        for chunk in chunks:
            digest.update(chunk)
            sent += len(chunk)
            if sent > stored.size:
                return _broken(response, Outcome.RECORD_CORRUPT)
            if not await _write(response, adapted, chunk):
                return _broken(response, Outcome.RECORD_CORRUPT)
            if replay.on_body is not None:
                replay.on_body(chunk)
        first += len(chunks)
        await response.wait_room()
    if response.client_gone:
        return Outcome.REPLAYED
    digest.update(stored.trailers)
    if sent != stored.size or digest.digest() != stored.digest:
        return _broken(response, Outcome.RECORD_CORRUPT)
    return _end(response, adapted)


def _begin(response: ResponseWriter, replay: Replay, beginning: bytes) -> Adapted | None:
    """Send the head of a large response whose body begins so, and return what adapts the body."""
    stored, adapted = replay.stored, replay.adapted()
    if isinstance(adapted, Decoded) and not adapted.begins_with(beginning):
        adapted = None
    block = replay.head_block(adapted)
    # How long the adapted body will be is not known yet.
    size = stored.size if adapted is None else None
    if stored.trailers and response.takes_trailers:
        # Only a chunked body has a place for them.
        response.trailers, block, size = stored.trailers, block + announcement(stored.trailers), None
    framing = STATED if stored.stated_length and adapted is None else COUNTED
    response.begin(stored.status, stored.reason, block, size, framing)
    return adapted


async def _write(response: ResponseWriter, adapted: Adapted | None, chunk: bytes) -> bool:
    """Write a chunk of the body as the client gets it; return False for one that cannot be decoded."""
    if not isinstance(adapted, Decoded):
        if data := chunk if adapted is None else adapted.feed(chunk):
            response.write(data)
        return True
    try:
        # It may be a thousand times as much.
        for piece in adapted.feed(chunk):
            response.write(piece)
            await response.wait_room()
            # A client that takes all at once leaves no time for others.
            await asyncio.sleep(0)
            if response.client_gone:
                break
    except Undecodable:
        return False
    return True


def _end(response: ResponseWriter, adapted: Adapted | None) -> Outcome:
    if isinstance(adapted, Decoded) and not adapted.is_whole:
        return _broken(response, Outcome.RECORD_CORRUPT)
    if isinstance(adapted, Replayed) and (rest := adapted.rest()):
        response.write(rest)
    response.end()
    return Outcome.REPLAYED


def _broken(response: ResponseWriter, outcome: Outcome) -> Outcome:
    if response.started:
        response.abort()
        return Outcome.TRUNCATED
    return outcome
