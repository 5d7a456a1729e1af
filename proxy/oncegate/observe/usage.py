"""What a stored answer of an LLM's API says it used, read while it is replayed. Pure.

Only the beginning and the end of an answer are kept, and nothing of it is parsed but its `usage`: a JSON
answer of either vendor has it near its end, a stream in one of its last events and, with Anthropic, a part
of it in its first. Whether a place named usage is the answer's own, and not what a model wrote into the
arguments of a tool, is told by how deep it lies, and that by what is closed after it. So the costliest
answer that could be made up takes up to three milliseconds, a usual one 0.03 (measured).
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

# What is priced apart, each token in one of them: what was asked and read anew, what of it came from the
# vendor's prompt cache, what of it was written to that, and what the model said.
KINDS = ("input", "cached", "cache_write", "output")

HEAD_BYTES = 8192  # the first event of an Anthropic stream has less than 1 KiB
TAIL_BYTES = 32_768  # what follows `usage` has less than 10 KiB: OpenAI's metadata, 16 texts of 512 characters
MAX_INFLATED_BYTES = 1_048_576  # 2.6 ms (measured)
MOST_TOKENS = 1_000_000_000  # of one answer; a larger number counts as none
PLACES = 3  # named usage that are looked at, from the end
_OBJECT_BYTES = 4096
_PIECE_BYTES = 65_536

_TYPE = re.compile(rb"^content-type:[ \t]*([^\s;]+)", re.IGNORECASE | re.MULTILINE)
_CODING = re.compile(rb"^content-encoding:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_INFLATED = (b"gzip", b"x-gzip", b"deflate")
_NAME = b'"usage"'
_USAGE = re.compile(_NAME + rb"[ \t\r\n]*+:[ \t\r\n]*+(?=\{)")
_BEFORE_A_NAME = b"{, \t\r\n"  # within a text the quote would have a backslash there
# What begins as a text is taken to its end or to the last byte, and never given back: linear in any bytes.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_DECODER = json.JSONDecoder()

Tokens = Mapping[str, int]  # by kind; empty where an answer does not say


def reading(status: int, block: bytes, size: int) -> "Reading | None":
    """Return what reads the usage of an answer with a body of `size` bytes; None for an error, which has none.

    `block` holds its header fields, a line each.
    """
    if not 200 <= status < 300:
        return None
    kind = _TYPE.search(block)
    codings = [coding.strip().lower() for coding in _CODING.findall(block)]
    return Reading(kind is not None and kind[1].lower() == b"text/event-stream", codings, size)


class Reading:
    """Reads along with a replay. It keeps 40 KiB of the body at most; one in a coding unknown here says nothing."""

    def __init__(self, is_stream: bool, codings: list[bytes], size: int) -> None:
        self._is_stream, self._left = is_stream, size
        self._inflater = zlib.decompressobj(32 + zlib.MAX_WBITS) if codings and codings[0] in _INFLATED else None
        self._lost = len(codings) > 1 or (self._inflater is None and codings not in ([], [b"identity"]))
        self._inflated = 0
        self._head = self._tail = b""

    def add(self, data: bytes) -> None:
        """Take the next bytes of the body, as they are sent."""
        self._left -= len(data)
        if self._inflater is not None and not self._lost:
            self._inflate(self._inflater, data)
        elif not self._lost:
            self._keep(data)

    def tokens(self) -> Tokens:
        """Return what the whole answer used, by kind; nothing where it does not say, or was not seen whole."""
        if self._left or self._lost:
            return {}
        if not self._is_stream:
            return _counted(_last(self._tail, b"", (1,)))
        begun = _first(self._head)
        ended = {name: value for name, value in _last(self._tail, b"\n", (1, 2)).items() if value is not None}
        return _counted({**begun, **ended})  # what an event says later holds

    def _inflate(self, inflater: "zlib._Decompress", data: bytes) -> None:
        try:
            while data and not inflater.eof:  # what is behind the body, a checksum, makes it yield the last of it
                piece = inflater.decompress(data, _PIECE_BYTES)
                data = inflater.unconsumed_tail
                self._inflated += len(piece)
                self._keep(piece)
                if self._inflated > MAX_INFLATED_BYTES:
                    self._lost = True
                    return
        except zlib.error:
            self._lost = True

    def _keep(self, data: bytes) -> None:
        if self._is_stream and len(self._head) < HEAD_BYTES:
            self._head += data[: HEAD_BYTES - len(self._head)]
        self._tail = (self._tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]


def _first(text: bytes) -> Mapping[str, Any]:
    """Return the usage in the first event that has one, if it is the message's that the event begins."""
    found = _USAGE.search(text)
    end = text.find(b"\n", found.end()) if found else -1
    return _object(text[found.end() : end]) if found and end > 0 and _depth(text[found.end() : end]) == 2 else {}


def _last(text: bytes, ends_with: bytes, depths: tuple[int, ...]) -> Mapping[str, Any]:
    """Return the last usage at one of these depths; a document is over at `ends_with`, or at the end of the text."""
    for place in islice(_places(text), PLACES):
        end = text.find(ends_with, place) if ends_with else -1
        rest = text[place : end if end > 0 else len(text)]
        if _depth(rest) in depths:
            return _object(rest)
    return {}


def _places(text: bytes) -> Iterator[int]:
    """Yield where the objects named usage begin, from the last to the first."""
    at = len(text)
    while (at := text.rfind(_NAME, 0, at)) > 0:
        if text[at - 1] in _BEFORE_A_NAME and (found := _USAGE.match(text, at)):
            yield found.end()


def _depth(rest: bytes) -> int:
    """Return how many objects and arrays a place in a document lies in, by what follows it."""
    brackets = _TEXT.sub(b"", rest)
    return sum(map(brackets.count, (b"}", b"]"))) - sum(map(brackets.count, (b"{", b"[")))


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        value = _DECODER.raw_decode(text[:_OBJECT_BYTES].decode("latin-1"))[0]
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _counted(usage: Mapping[str, Any]) -> Tokens:
    """Return the tokens by kind. OpenAI counts those of its cache in what was asked, Anthropic beside it."""
    asked = _number(usage, "prompt_tokens", "input_tokens")
    said = _number(usage, "completion_tokens", "output_tokens")
    if asked is None and said is None:
        return {}
    asked = asked or 0
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    if isinstance(details, dict):
        cached = min(_number(details, "cached_tokens") or 0, asked)
        written = min(_number(details, "cache_write_tokens") or 0, asked - cached)
        asked -= cached + written
    else:
        cached = _number(usage, "cache_read_input_tokens") or 0
        written = _number(usage, "cache_creation_input_tokens") or 0
    return dict(zip(KINDS, (asked, cached, written, said or 0), strict=True))


def _number(values: Mapping[str, Any], *names: str) -> int | None:
    """Return the number under the first of these names that has one."""
    for name in names:
        value = values.get(name)
        if type(value) is int and 0 <= value <= MOST_TOKENS:
            return value
    return None
