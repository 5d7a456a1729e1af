"""The syntax of an idempotency key in a header field. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_KEY_BYTES = 255

# Visible ASCII without `"`, `\` and `,`. Every SDK sends bare keys; RFC 9651 alone would refuse a UUID that starts
# with a digit.
_BARE = re.compile(rb"[!#-+\--\[\]-~]+")
# A String of RFC 9651, section 3.3.3.
_STRING = rb'"((?:[ !#-\[\]-~]|\\["\\])*)"'
# The value of a parameter (RFC 9651, sections 3.3.1 to 3.3.8): a number or date, a string of either kind, a token, a
# byte sequence, a boolean.
_BARE_ITEM = (
    rb"@?-?[0-9]{1,15}(?:\.[0-9]{1,3})?|%?"
    + _STRING.replace(b"((?:", b"(?:(?:")
    + rb"|[A-Za-z*][!#$%&'*+.^_`|~:/0-9A-Za-z-]*"
    rb"|:[A-Za-z0-9+/=]*:|\?[01]"
)
# An Item of RFC 9651 that is a String. A parameter says something about the key and is no part of it (section 3.1.2).
_QUOTED = re.compile(_STRING + rb"(?:; *[a-z*][a-z0-9_.*-]*(?:=(?:" + _BARE_ITEM + rb"))?)*")
_ESCAPED = re.compile(rb'\\(["\\])')


@dataclass(frozen=True, slots=True)
class BadKey:
    """A key that cannot be used. `detail` says why and never contains the key."""

    detail: str


def parse_key(lines: Sequence[bytes]) -> bytes | BadKey:
    """Return the key in the values of its header; `"abc"`, `"abc";v=1` and the bare `abc` are the same key.

    Quoted: a String of RFC 9651, whose parameters do not count. Bare: 0x21 to 0x7E without `"`, `\\` and `,`.
    """
    if len(lines) != 1:
        return BadKey("the key header was sent more than once")
    value = lines[0].strip(b" \t")
    if not value:
        return BadKey("the key is empty")
    if _BARE.fullmatch(value):
        key = value
    elif quoted := _QUOTED.fullmatch(value):
        key = _ESCAPED.sub(rb"\1", quoted[1])
    else:
        return BadKey("the key is neither a quoted string nor a bare word of visible ASCII")
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        return BadKey(f"the key must have 1 to {MAX_KEY_BYTES} bytes")
    return key
