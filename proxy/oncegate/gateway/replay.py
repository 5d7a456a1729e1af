"""Sends stored responses: a small one in one write, a large one at the client's pace.

A replay ends in one of four outcomes. REPLAYED: all of it was written. RECORD_CORRUPT: the stored bytes are not those
that were stored. STORE_UNAVAILABLE: they could not be read. In both cases nothing was sent yet. TRUNCATED: either of
them, with the head already out, so that the connection was aborted.
"""

import asyncio
from typing import Final

from oncegate.adaptation.content_codings import (
    PIECE_BYTES,
    Decoder,
    Undecodable,
    coding_to_decode,
    decoded_block,
    may_be_coded,
)
from oncegate.adaptation.heartbeats import DIGESTS
from oncegate.adaptation.json_rpc import Caller, Replayed
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.messages.framing import COUNTED, STATED
from oncegate.messages.response_head import response_digest
from oncegate.messages.trailers import announcement, without
from oncegate.observe.outcome import Outcome
from oncegate.observe.usage import UsageReader
from oncegate.store.kept import original_id
from oncegate.store.record import Record, StoredResponse, intact
from oncegate.store.results import ReadFailure
from oncegate.store.store import Store
from oncegate.values import Value

# A body is decoded if it has so many bytes at most, before and after. Any other is replayed as it was stored: a client
# could make a worker inflate a gigabyte for every retry.
MAX_CODED_BYTES, MAX_DECODED_BYTES = 1_048_576, 16_777_216
# Bound once for the request path, as in `decision`.
_REPLAYED: Final = Outcome.REPLAYED
MARK = b"Idempotent-Replayed: true\r\nOncegate-Status: replayed\r\n"
# Of a response that the API did not send for the request: what became of it was asked later.
RECONCILED = b"Idempotent-Replayed: true\r\nOncegate-Status: reconciled\r\n"


class Replay(Value):
    """A complete record to be replayed to `request`, which may be another client's than the original, and to
    `caller` if its messages are adapted.

    `fields` are further header fields; `usage` is given all body bytes.
    """

    key: bytes
    record: Record
    stored: StoredResponse
    fields: bytes
    request: Request
    caller: Caller | None
    usage: UsageReader | None = None

    def adapted(self) -> Replayed | None:
        """Return what adapts the messages for the caller, None where they are replayed as they were stored."""
        stored = self.stored
        return None if self.caller is None else Replayed(stored.block, stored.request_id, self.caller)

    def coding(self) -> bytes:
        """Return the content coding that has to be decoded for this client, empty where none has."""
        stored = self.stored
        if not may_be_coded(stored.block) or not 0 < stored.size <= MAX_CODED_BYTES or self.caller is not None:
            return b""
        accepted = self.request.checked_head().fields.get(b"accept-encoding")
        return coding_to_decode(stored.status, stored.block, accepted)

    def trailers(self, *, is_changed: bool) -> bytes:
        """Return the trailers for this client; behind a body that is changed for it, no digest of the stored one."""
        stored = self.stored.trailers if self.request.response.takes_trailers else b""
        return without(stored, DIGESTS) if stored and is_changed else stored

    def head_block(self, stored_block: bytes) -> bytes:
        """Return the header fields of the replay, made of those that are stored or of what was made of them.

        Age counts from the original response (RFC 9111, section 5.1).
        """
        stored, request = self.stored, self.request
        age_ms = max(0, self.record.now_ms - stored.completed_ms)
        ids = request.connection.request_ids.of_replay(request.id, original_id(self.record.kept), stored_block)
        mark = RECONCILED if stored.reconciled else MARK
        block = b"%bAge: %d\r\n%b%b%b" % (stored_block, stored.age_s + age_ms // 1000, mark, self.fields, ids)
        return request.requester.replayed(block, age_ms) if request.adaptation.adapts_replay(stored_block) else block


def replay_small(response: ResponseWriter, replay: Replay) -> Outcome:
    """Send a stored response whose body is at hand."""
    stored, body = replay.stored, replay.record.body or b""
    adapted = None if replay.caller is None else replay.adapted()
    if not intact(stored, body):
        return Outcome.RECORD_CORRUPT
    block = replay.head_block(stored.block if adapted is None else adapted.block)
    if stored.trailers and (trailers := replay.trailers(is_changed=adapted is not None)):
        response.trailers, block = trailers, block + announcement(trailers)
    framing = STATED if stored.stated_length and adapted is None else COUNTED
    whole = body if adapted is None else adapted.feed(body) + adapted.rest()
    response.send(stored.status, stored.reason, block, whole, framing)
    # After the response has left.
    if replay.usage is not None:
        replay.usage.add(body)
    return _REPLAYED


async def replay_decoded(response: ResponseWriter, store: Store, replay: Replay, coding: bytes) -> Outcome:
    """Send a stored response with its body decoded, or as it is where that cannot be.

    It is decoded twice: how long it is, and whether it is one at all, has to be known before the head leaves. What is
    held in memory is the coded body, whatever it becomes.
    """
    stored = replay.stored
    body = replay.record.body or await _gather(store, replay)
    if not isinstance(body, bytes):
        return body
    replay.record.body = body
    size = await _decoded_size(coding, body) if intact(stored, body) else None
    if size is None:
        return replay_small(response, replay)
    block = replay.head_block(decoded_block(stored.block))
    length: int | None = size
    if trailers := replay.trailers(is_changed=True):
        response.trailers, block, length = trailers, block + announcement(trailers), None
    if size <= PIECE_BYTES:
        response.send(stored.status, stored.reason, block, b"".join(Decoder(coding).feed(body)), COUNTED)
    else:
        response.begin(stored.status, stored.reason, block, length, COUNTED)
        for piece in Decoder(coding).feed(body):
            response.write(piece)
            await response.wait_room()
            # A client that takes all at once leaves no time for others.
            await asyncio.sleep(0)
        response.end()
    if replay.usage is not None:
        replay.usage.add(body)
    return _REPLAYED


async def _decoded_size(coding: bytes, body: bytes) -> int | None:
    """Return how many bytes a whole body decodes to; None where it is not in this coding, or too large."""
    decoder, size = Decoder(coding), 0
    try:
        for piece in decoder.feed(body):
            size += len(piece)
            if size > MAX_DECODED_BYTES:
                return None
            if len(piece) == PIECE_BYTES:
                # Others have their turn.
                await asyncio.sleep(0)
    except Undecodable:
        return None
    return size if decoder.is_at_end else None


async def _gather(store: Store, replay: Replay) -> bytes | Outcome:
    """Return the whole body of a stored response, or the outcome where it cannot be read."""
    pieces: list[bytes] = []
    while len(pieces) < replay.stored.chunks:
        chunks = await store.read(replay.key, replay.record.token, len(pieces))
        if isinstance(chunks, ReadFailure):
            is_corrupt = chunks is ReadFailure.INCOMPLETE
            return Outcome.RECORD_CORRUPT if is_corrupt else Outcome.STORE_UNAVAILABLE
        pieces += chunks
    return b"".join(pieces)


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
            _begin(response, replay, adapted)
        for chunk in chunks:
            digest.update(chunk)
            sent += len(chunk)
            if sent > stored.size:
                return _broken(response, Outcome.RECORD_CORRUPT)
            if data := chunk if adapted is None else adapted.feed(chunk):
                response.write(data)
            if replay.usage is not None:
                replay.usage.add(chunk)
        first += len(chunks)
        await response.wait_room()
    if response.client_gone:
        return _REPLAYED
    digest.update(stored.trailers)
    if sent != stored.size or digest.digest() != stored.digest:
        return _broken(response, Outcome.RECORD_CORRUPT)
    if adapted is not None and (rest := adapted.rest()):
        response.write(rest)
    response.end()
    return _REPLAYED


def _begin(response: ResponseWriter, replay: Replay, adapted: Replayed | None) -> None:
    """Send the head of a response whose body follows in pieces."""
    stored = replay.stored
    block = replay.head_block(stored.block if adapted is None else adapted.block)
    # How long the adapted body will be is not known yet.
    size = stored.size if adapted is None else None
    if trailers := replay.trailers(is_changed=adapted is not None):
        # Only a chunked body has a place for them.
        response.trailers, block, size = trailers, block + announcement(trailers), None
    framing = STATED if stored.stated_length and adapted is None else COUNTED
    response.begin(stored.status, stored.reason, block, size, framing)


def _broken(response: ResponseWriter, outcome: Outcome) -> Outcome:
    if response.started:
        response.abort()
        return Outcome.TRUNCATED
    return outcome
