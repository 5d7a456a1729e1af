"""The syntax of an idempotency key in a header field. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_KEY_BYTES = 255

# Visible ASCII without `"`, `\` and `,`. Every SDK sends bare keys; RFC 9651 alone would refuse a UUID that starts
# with a digit.
_BARE = re.compile(rb"[!#-+\--\[\]-~]+")
# A String of RFC 9651, section 3.3.3.
_QUOTED = re.compile(rb'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_ESCAPED = re.compile(rb'\\(["\\])')


@dataclass(frozen=True, slots=True)
class BadKey:
    """A key that cannot be used. `detail` says why and never contains the key."""

    detail: str


def parse_key(lines: Sequence[bytes]) -> bytes | BadKey:
    """Return the key in the values of its header; the quoted `"abc"` and the bare `abc` are the same key.

    Quoted: a String of RFC 9651 without parameters. Bare: 0x21 to 0x7E without `"`, `\\` and `,`.
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
