"""What a key reads out of a request's body: one member of a JSON document, one field of a form. Pure.

The body is hostile until it is read. Everything here takes time linear in MAX_BYTES at most, says why
it found nothing, and never guesses: of two members with one name neither is taken.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn
from urllib.parse import unquote_to_bytes

from oncegate.keys.syntax import BadKey

MAX_BYTES = 1_048_576  # of a body that is parsed; longer ones are spooled, and nobody parses them
MAX_DEPTH = 64  # of nested arrays and objects
MAX_BRACKETS = 50_000  # that open one, counted in texts as well: a MiB of empty arrays would take half a second
MAX_FIELDS = 1000  # of a form or a query
MAX_VALUE_BYTES = 1024

_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NOT_BRACKETS = bytes(code for code in range(256) if code not in _STEPS)
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")  # RFC 6901, section 4
_BAD_ESCAPE = re.compile(r"~(?![01])")


@dataclass(frozen=True, slots=True)
class Missing:
    """Nothing stands where a key is looked for."""

    detail: str


def parse_pointer(text: str) -> tuple[str, ...]:
    """Return the tokens of a JSON pointer (RFC 6901). ValueError where it is none."""
    if not text.startswith("/"):  # the empty pointer is the whole document, which is no key
        raise ValueError("must be a JSON pointer that begins with /, such as /data/id")
    if _BAD_ESCAPE.search(text):
        raise ValueError("has a ~ in its pointer that is neither ~0 nor ~1")
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in text[1:].split("/"))


def json_value(body: bytes, pointer: Sequence[str]) -> bytes | Missing | BadKey:
    """Return what a pointer names in a JSON document, tagged by its type: the text 1 is not the number 1."""
    document = _parse(body)
    if isinstance(document, BadKey):
        return document
    found = _follow(document[0], pointer)
    match found:
        case bytes():
            return _within(b"n" + found)
        case str():
            try:
                return _within(b"s" + found.encode())
            except UnicodeEncodeError:
                return BadKey("the key in the body has half a surrogate pair")
        case bool():
            return b"true" if found else b"false"
        case None:
            return Missing("the body has no key where it is looked for")
        case Missing() | BadKey():
            return found
        case _:
            return BadKey("the key in the body is an object or an array")


def _within(tagged: bytes) -> bytes | Missing | BadKey:
    if len(tagged) == 1:
        return Missing("the key in the body is empty")
    return tagged if len(tagged) <= MAX_VALUE_BYTES else BadKey(f"the key in the body is over {MAX_VALUE_BYTES} bytes")


def _parse(body: bytes) -> tuple[Any] | BadKey:
    """Return the document, boxed: objects are tuples of pairs, so that doubled names can be seen."""
    if len(body) > MAX_BYTES:
        return BadKey(f"the body is over {MAX_BYTES} bytes, too long to look for a key in")
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > MAX_BRACKETS:
        return BadKey("the body has too many arrays and objects to look for a key in")
    if brackets > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        return BadKey(f"the body is nested deeper than {MAX_DEPTH}")
    try:
        return (_DECODER.decode(body.decode()),)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return BadKey("the body is not JSON in UTF-8")


def _depth(body: bytes) -> int:
    """Return how deep a document nests, without parsing it: what is between its texts, and of that the brackets."""
    between = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]
    brackets = b"".join(between).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)


def _refuse(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


# A number stays as it is written, in bytes: 1, 1.0 and 1e0 are three keys, and no digits are ever computed.
_DECODER = json.JSONDecoder(
    object_pairs_hook=tuple, parse_int=str.encode, parse_float=str.encode, parse_constant=_refuse
)


def _follow(value: Any, pointer: Sequence[str]) -> Any:
    for token in pointer:
        if isinstance(value, tuple):
            named = [member for name, member in value if name == token]
            if len(named) > 1:
                return BadKey("the body names the member with the key twice")
            if not named:
                return Missing("the body has no key where it is looked for")
            value = named[0]
        elif isinstance(value, list) and _INDEX.fullmatch(token) and int(token) < len(value):
            value = value[int(token)]
        else:
            return Missing("the body has no key where it is looked for")
    return value


def form_value(text: bytes, name: bytes, where: str) -> bytes | Missing | BadKey:
    """Return the one value of a field in `a=1&b=2` notation, its escapes undone; `where` is for the message."""
    if len(text) > MAX_BYTES or text.count(b"&") >= MAX_FIELDS:
        return BadKey(f"the {where} has too many fields to look for a key in")
    pairs = [field.partition(b"=") for field in text.split(b"&")]
    longest = 3 * len(name)  # with every byte escaped
    values = [value for field, _, value in pairs if len(field) <= longest and _plain(field) == name]
    if len(values) > 1:
        return BadKey(f"the {where} names the field with the key twice")
    if not (values and values[0]):
        return Missing(f"the {where} has no key where it is looked for")
    if len(values[0]) > MAX_VALUE_BYTES:
        return BadKey(f"the key in the {where} is over {MAX_VALUE_BYTES} bytes")
    return _plain(values[0])


def _plain(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" "))
