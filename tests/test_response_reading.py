"""What is kept of a response while its messages pass."""

import pytest

from oncegate.buffers.memory import MemoryBudget
from oncegate.gateway.response_reading import ResponseReading
from oncegate.messages.response_head import ResponseHead, read_response_head
from oncegate.rules.statuses import Statuses

CALL = Statuses([], [], by_message=True)


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
def test_what_is_kept_counts_in_the_memory_of_the_worker(kind):
    """A document, and an event without its end, count until the reading is closed. What is too long is not kept."""
    head = read_response_head(200, b"OK", [(b"Content-Type", kind), (b"Transfer-Encoding", b"chunked")], False)
    assert isinstance(head, ResponseHead)
    memory = MemoryBudget(1 << 30)
    reading = ResponseReading(CALL, head, b"1", memory)
    for kept in (300_000, 600_000, 900_000):
        reading.add(b":" * 300_000)
        assert memory.used == kept
    reading.add(b":" * 300_000)
    assert memory.used == 0
    other = ResponseReading(CALL, head, b"1", memory)
    other.add(b"data: ")
    assert memory.used == 6
    other.close()
    reading.close()
    assert memory.used == 0
