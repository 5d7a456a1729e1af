"""Cuts a stream of server-sent events into its events, as it comes (HTML, section 9.2). Pure."""

import re

# Of one event. A longer one is passed on in pieces, and nobody looks into it.
MAX_EVENT_BYTES = 1_048_576

# The end of a line. A CR at the very end may be the first half of a CRLF.
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")
_LINE = re.compile(rb"([^\r\n]*)(\r\n|\n|\r|\Z)")
_DATA = re.compile(rb"(data(?::\x20?|\Z))(.*)", re.DOTALL)


class EventCutter:
    """Cuts bytes into events. `has_long`: an event was too long, and may have come in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        # Where the line begins whose end has not come, and how far the buffer was searched for that end.
        self._line_at = self._searched = 0
        self.has_long = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that are whole now, each with the blank line that ends it."""
        buffer, events, begin = self._buffer, [], 0
        buffer += data
        for end in _LINE_END.finditer(buffer, self._searched):
            is_blank, self._line_at = end.start() == self._line_at, end.end()
            if is_blank:
                self.has_long |= end.end() - begin > MAX_EVENT_BYTES
                events.append(bytes(buffer[begin : end.end()]))
                begin = end.end()
        del buffer[:begin]
        self._line_at -= begin
        self._searched = max(self._line_at, len(buffer) - 1)
        if len(buffer) > MAX_EVENT_BYTES:
            self.has_long = True
            events.append(self.rest())
        return events

    @property
    def kept_bytes(self) -> int:
        """How many bytes of an event are kept that has no end yet."""
        return len(self._buffer)

    def rest(self) -> bytes:
        """Return what has no end yet, and forget it."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._line_at = self._searched = 0
        return rest


def event_data(event: bytes) -> bytes:
    """Return the data of an event: its lines joined, empty without any."""
    return b"\n".join(data[2] for line in _lines(event) if (data := _DATA.fullmatch(line)))


def with_data(event: bytes, data: bytes) -> bytes:
    """Return an event with other data, which has as many lines. All other bytes are as they were."""
    values = iter(data.split(b"\n"))
    pieces: list[bytes] = []
    at = 0
    for line in _LINE.finditer(event):
        if (found := _DATA.fullmatch(line[1])) and (value := next(values)) != found[2]:
            pieces += [event[at : line.start()], found[1], value, line[2]]
            at = line.end()
    return b"".join((*pieces, event[at:]))


def _lines(event: bytes) -> list[bytes]:
    return re.split(rb"\r\n|\n|\r", event)
