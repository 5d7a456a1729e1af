"""Reads the body of a stored response, for an operator who may see it."""

from oncegate.operating.errors import OperatorError
from oncegate.store.record import intact
from oncegate.store.record_view import RecordView
from oncegate.store.results import ReadFailure
from oncegate.store.store import Store


async def read_body(store: Store, record: RecordView, most: int) -> bytes:
    """Return the body that a record has, at least its first `most` bytes.

    Raises OperatorError where it is not there any more, or is not the one that was stored; StoreError.
    """
    response, parts, size, number = record.response, list[bytes](), 0, 0
    if response is None or not response.body_stored:
        raise OperatorError("the body is not stored")
    while number < response.chunks and size < most:
        chunks = await store.read(record.key, record.token, number)
        if isinstance(chunks, ReadFailure):
            raise OperatorError(f"the body cannot be read: {chunks.value}")
        parts, number, size = [*parts, *chunks], number + len(chunks), size + sum(map(len, chunks))
    body = b"".join(parts)
    if number >= response.chunks and not intact(response, body):
        raise OperatorError("the body is not the one that was stored")
    return body
