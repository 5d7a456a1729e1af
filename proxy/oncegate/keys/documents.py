"""Reads a key from a request's body: one member of a JSON document, or one field of a form. Pure.

Bodies are hostile input. Each function takes time linear in MAX_BYTES at most. None of them guesses: where a
body has two members or fields of the wanted name, the result is a BadKey, because an upstream might take either.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote_to_bytes

from oncegate.keys.syntax import BadKey
from oncegate.messages.fields import Fields

# The longest body that is parsed. A longer one is spooled to disk, and no key is read from it.
MAX_BYTES = 1_048_576
# Of nested arrays and objects.
MAX_DEPTH = 64
# Opening brackets, those inside strings included: a MiB of empty arrays would take half a second to parse.
MAX_BRACKETS = 50_000
# Of a form or a query.
MAX_FIELDS = 1000
MAX_VALUE_BYTES = 1024

_DEPTH_CHANGES = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NOT_BRACKETS = bytes(code for code in range(256) if code not in _DEPTH_CHANGES)
# An array index (RFC 6901, section 4), of at most 9 digits: a longer one is past the end of any document here.
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
_SPACE = re.compile(r"[ \t\r\n]*")
_BAD_ESCAPE = re.compile(r"~(?![01])")


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no value where a key was expected. `detail` says where, for the client."""

    detail: str


_NO_MEMBER = Missing("the body does not have the member that holds the key")


def parse_pointer(text: str) -> tuple[str, ...]:
    """Return the tokens of a JSON pointer (RFC 6901). Raises ValueError for a malformed one."""
    # RFC 6901 also has the empty pointer, for the whole document, but a document is not a key.
    if not text.startswith("/"):
        raise ValueError("must be a JSON pointer that begins with /, such as /data/id")
    if _BAD_ESCAPE.search(text):
        raise ValueError("has a ~ in its pointer that is neither ~0 nor ~1")
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in text[1:].split("/"))


def is_encoded(fields: Fields) -> bool:
    """Return whether a body is encoded. It is not read then: a small one can decompress to an enormous one."""
    return fields.get(b"content-encoding", [b"identity"]) != [b"identity"]


def json_value(body: bytes, pointer: Sequence[str]) -> bytes | Missing | BadKey:
    """Return the value at a pointer in a JSON document, tagged with its type: the string 1 is not the number 1.

    `n` and the number as written, `s` and the string in UTF-8, `true` or `false`; `null` counts as Missing.
    """
    document = parse_document(body)
    return document if isinstance(document, BadKey) else value_at(document[0], pointer)


def value_at(document: Any, pointer: Sequence[str]) -> bytes | Missing | BadKey:
    """Return the value at a pointer in a document that is parsed, tagged as by `json_value`."""
    value = follow_pointer(document, pointer)
    match value:
        case bytes():
            return _checked_length(b"n" + value)
        case str():
            try:
                return _checked_length(b"s" + value.encode())
            except UnicodeEncodeError:
                return BadKey("the key in the body has half a surrogate pair")
        case bool():
            return b"true" if value else b"false"
        case None:
            return _NO_MEMBER
        case Missing() | BadKey():
            return value
        case _:
            return BadKey("the key in the body is an object or an array")


def _checked_length(tagged: bytes) -> bytes | Missing | BadKey:
    if len(tagged) == 1:
        return Missing("the key in the body is empty")
    if len(tagged) > 1 + MAX_VALUE_BYTES:
        return BadKey(f"the key in the body is over {MAX_VALUE_BYTES} bytes")
    return tagged


def parse_document(body: bytes) -> tuple[Any] | BadKey:
    """Return a JSON document in a tuple of one. Objects are tuples of pairs, which keep doubled names.

    Numbers are bytes, as they are written.
    """
    if refused := _refuse_size(body):
        return refused
    try:
        return (_DECODER.decode(body.decode()),)
    # UnicodeDecodeError and JSONDecodeError are ValueErrors.
    except (ValueError, RecursionError):
        return BadKey("the body is not JSON in UTF-8")


def _refuse_size(body: bytes) -> BadKey | None:
    """Return why a document is too large to be parsed, None where it is not."""
    if len(body) > MAX_BYTES:
        return BadKey(f"the body is over {MAX_BYTES} bytes, too long to read a key from")
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > MAX_BRACKETS:
        return BadKey("the body has too many arrays and objects to read a key from")
    # Checked before parsing: the parser recurses, and a deep document would exhaust its stack.
    if brackets > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        return BadKey(f"the body is nested deeper than {MAX_DEPTH}")
    return None


class PlacedMember(NamedTuple):
    """A member of an object in a text, and where its value lies there. `value` is as `parse_document` has it."""

    name: str
    value: Any
    start: int
    end: int


def placed_members(text: str, at: int = 0) -> list[PlacedMember] | None:
    """Return the members of the object that begins at a place of a text, None where there is no whole object.

    From place 0 the object has to be all of the text.
    """
    if at == 0 and _refuse_size(text.encode("utf-8", "surrogatepass")):
        return None
    try:
        members, end = _members(text, _skip_space(text, at))
    except (ValueError, IndexError, RecursionError):
        return None
    return members if at or not text[end:].strip(" \t\r\n") else None


def _members(text: str, at: int) -> tuple[list[PlacedMember], int]:
    """Return the members of an object and its end. Raises ValueError or IndexError where it is malformed."""
    members: list[PlacedMember] = []
    at = _past(text, at, "{")
    if text[at] == "}":
        return members, at + 1
    while True:
        name, at = _DECODER.raw_decode(text, at)
        if not isinstance(name, str):
            raise ValueError("a name that is no string")
        start = _past(text, _skip_space(text, at), ":")
        value, end = _DECODER.raw_decode(text, start)
        members.append(PlacedMember(name, value, start, end))
        at = _skip_space(text, end)
        if text[at] == "}":
            return members, at + 1
        at = _past(text, at, ",")


def _past(text: str, at: int, mark: str) -> int:
    """Return the place behind a mark and the space that follows it."""
    if text[at] != mark:
        raise ValueError(f"{mark} is missing")
    return _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _depth(body: bytes) -> int:
    """Return how deep a document nests, without parsing it: the brackets outside its strings decide."""
    # Without escapes, each quote begins or ends a string: every second piece lies outside of strings.
    outside = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]
    brackets = b"".join(outside).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_DEPTH_CHANGES.__getitem__, brackets)), default=0)


def _refuse(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


# Numbers stay as they are written, as bytes: 1, 1.0 and 1e0 are three keys. No number is ever computed, so a long
# one costs nothing.
_DECODER = json.JSONDecoder(
    object_pairs_hook=tuple, parse_int=str.encode, parse_float=str.encode, parse_constant=_refuse
)


def follow_pointer(value: Any, pointer: Sequence[str]) -> Any:
    """Return the value at a pointer (RFC 6901, section 4), or Missing or BadKey."""
    for token in pointer:
        if isinstance(value, tuple):
            members = [member for name, member in value if name == token]
            if len(members) > 1:
                return BadKey("the body has the member that holds the key twice")
            if not members:
                return _NO_MEMBER
            value = members[0]
        elif isinstance(value, list) and _INDEX.fullmatch(token) and int(token) < len(value):
            value = value[int(token)]
        else:
            return _NO_MEMBER
    return value


def form_value(text: bytes, name: bytes, place: str) -> bytes | Missing | BadKey:
    """Return the one value of a field in `a=1&b=2` notation, decoded. `place`: `query` or `form`, for messages."""
    if len(text) > MAX_BYTES or text.count(b"&") >= MAX_FIELDS:
        return BadKey(f"the {place} has too many fields to read a key from")
    pairs = [field.partition(b"=") for field in text.split(b"&")]
    # With every byte escaped the name is three times as long; nothing longer has to be decoded.
    longest = 3 * len(name)
    values = [value for field, _, value in pairs if len(field) <= longest and _decoded(field) == name]
    if len(values) > 1:
        return BadKey(f"the {place} has the field that holds the key twice")
    if not (values and values[0]):
        return Missing(f"the {place} does not have the field that holds the key")
    if len(values[0]) > MAX_VALUE_BYTES:
        return BadKey(f"the key in the {place} is over {MAX_VALUE_BYTES} bytes")
    return _decoded(values[0])


def _decoded(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" "))
