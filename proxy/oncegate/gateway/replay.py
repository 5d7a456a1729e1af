"""Answers from the store: a small one in one write, a large one as fast as the client takes it."""

from collections.abc import Callable, Coroutine

from oncegate.downstream.response import ResponseWriter
from oncegate.messages.response_head import response_digest
from oncegate.observe.outcome import Outcome
from oncegate.store.record import Record, StoredResponse, intact
from oncegate.store.results import ReadFailure
from oncegate.store.store import Store

Along = Callable[[bytes], None]

MARK = b"Idempotent-Replayed: true\r\nOncegate-Status: replayed\r\n"


def _block(record: Record, answer: StoredResponse, extra: bytes) -> bytes:
    age_s = answer.age_s + max(0, record.now_ms - answer.completed_ms) // 1000
    return b"%sAge: %d\r\n%s%s" % (answer.block, age_s, MARK, extra)


def replay(
    client: ResponseWriter, store: Store, key: bytes, record: Record, extra: bytes, along: Along | None = None
) -> Outcome | Coroutine[None, None, Outcome]:
    """Send a stored answer and return the outcome, or what will return it; `extra`: further fields; `along`
    hears of all of the body.

    RECORD_CORRUPT: the record's bytes are not those that were stored, and nothing was sent. STORE_UNAVAILABLE:
    they could not be read, and nothing was sent. TRUNCATED: either of them, with the head already out.
    """
    answer = record.answer
    assert answer is not None
    if answer.size == 0 or record.body is not None:
        outcome = _replay_small(client, record, answer, record.body or b"", extra)
        if along is not None:  # once it has left
            along(record.body or b"")
        return outcome
    return _replay_large(client, store, key, record, answer, extra, along)


def _replay_small(client: ResponseWriter, record: Record, answer: StoredResponse, body: bytes, extra: bytes) -> Outcome:
    if not intact(answer, body):
        return Outcome.RECORD_CORRUPT
    stated = answer.stated_length
    block, bodiless = _block(record, answer, extra), stated and not body
    client.send(answer.status, answer.reason, block, body, stated_length=stated, bodiless=bodiless)
    return Outcome.REPLAYED


async def _replay_large(
    client: ResponseWriter,
    store: Store,
    key: bytes,
    record: Record,
    answer: StoredResponse,
    extra: bytes,
    along: Along | None,
) -> Outcome:
    """Copy chunk after chunk; the last byte is held back until size and digest agree."""
    digest = response_digest(answer.status, answer.reason, answer.block)
    first = sent = 0
    while first < answer.chunks and not client.gone:
        chunks = await store.read(key, record.token, first)
        if isinstance(chunks, ReadFailure):
            incomplete = chunks is ReadFailure.INCOMPLETE
            return _broken(client, Outcome.RECORD_CORRUPT if incomplete else Outcome.STORE_UNAVAILABLE)
        if not client.started:
            block = _block(record, answer, extra)
            client.begin(
                answer.status, answer.reason, block, length=answer.size, stated=answer.stated_length, eof=False
            )
        for chunk in chunks:
            digest.update(chunk)
            sent += len(chunk)
            if sent > answer.size:
                return _broken(client, Outcome.RECORD_CORRUPT)
            client.write(chunk)
            if along is not None:
                along(chunk)
        first += len(chunks)
        while not await client.taken():
            pass
    if client.gone:
        return Outcome.REPLAYED
    if sent != answer.size or digest.digest() != answer.digest:
        return _broken(client, Outcome.RECORD_CORRUPT)
    client.end()
    return Outcome.REPLAYED


def _broken(client: ResponseWriter, unsent: Outcome) -> Outcome:
    if client.started:
        client.abort()
        return Outcome.TRUNCATED
    return unsent
