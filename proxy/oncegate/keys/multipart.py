"""Reads a key from a form of the type multipart/form-data (RFC 7578): the value of one field. Pure.

A form holds files with any content, and parsers differ in what they tolerate. So a form that is malformed, or that
two parsers could read differently, has no key. Costs one pass over the body, and one over the head of each part.
"""

import re

from oncegate.keys.documents import MAX_BYTES, MAX_FIELDS, MAX_VALUE_BYTES, Missing
from oncegate.keys.syntax import BadKey

# Of the head of one part.
MAX_PART_HEAD_BYTES = 4096

# `; name="quoted"` or `; name=bare` (RFC 9110, section 5.6.6). Without a bare value that begins with ', and
# possessive, so that matching takes linear time.
_PARAMETER = re.compile(
    rb"[ \t]*;[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]++)=(?:\"((?:[^\"\\\r\n]|\\[^\r\n])*+)\"|(?!')([^\s\";,\\]++))"
)
# RFC 2046, section 5.1.1: 1 to 70 characters, no space at the end.
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=?-](?:[0-9A-Za-z'()+_,./:=? -]{0,68}[0-9A-Za-z'()+_,./:=?-])?")
# In the head of a part, after its CRLFs are taken out: some parsers end a line or the head at a single CR or LF.
_NOT_IN_A_HEAD = re.compile(rb"[\0\r\n]")
# Values of Content-Transfer-Encoding, which RFC 7578, section 4.7, deprecates, that leave a value as it is.
_IDENTITY_ENCODINGS = (b"7bit", b"8bit", b"binary")
_MALFORMED = BadKey("the form in the body is malformed")


def multipart_value(content_type: bytes, body: bytes, name: bytes) -> bytes | Missing | BadKey:
    """Return the one value of a field. `content_type`: the request's, with the boundary."""
    boundary = boundary_of(content_type)
    if boundary is None:
        return BadKey("the form in the body has no valid boundary")
    delimiter = b"\r\n--" + boundary
    if len(body) > MAX_BYTES or (count := body.count(delimiter)) > MAX_FIELDS:
        return BadKey("the form has too many fields to read a key from")
    # Some parsers accept a delimiter after a single CR or LF, and would find other parts.
    if body.count(delimiter[1:]) > count or b"\r" + delimiter[2:] in body:
        return BadKey("the form in the body has its boundary after half a line end")
    _, *parts = (b"\r\n" + body).split(delimiter)
    if not parts or not _is_end(parts.pop()):
        return BadKey("the form in the body has no end")
    values = []
    for part in parts:
        field = _field(part)
        if isinstance(field, BadKey):
            return field
        if field[0] == name:
            values.append(field[1])
    return _only(values)


def boundary_of(content_type: bytes) -> bytes | None:
    """Return the boundary, None where it is invalid, or where some parsers would find another one."""
    others = parameters_of(content_type.partition(b";")) or {}
    boundary = others.pop(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary) or any(
        b"boundary" in b"%b=%b" % (name, others[name].lower()) for name in others
    ):
        return None
    return boundary


def _only(values: list[bytes | None]) -> bytes | Missing | BadKey:
    """Return the only value; None in the list marks a file."""
    if len(values) > 1:
        return BadKey("the form has the field that holds the key twice")
    if not values or values[0] == b"":
        return Missing("the form does not have the field that holds the key")
    if values[0] is None:
        return BadKey("the field that holds the key is a file")
    if len(values[0]) > MAX_VALUE_BYTES:
        return BadKey(f"the key in the form is over {MAX_VALUE_BYTES} bytes")
    return values[0]


def _is_end(last: bytes) -> bool:
    """Return whether this is what follows the last boundary; lines after it are ignored (RFC 2046, section 5.1.1)."""
    return last.startswith(b"--") and not last[2:].partition(b"\r\n")[0].strip(b" \t")


def _field(part: bytes) -> tuple[bytes, bytes | None] | BadKey:
    """Return the name and the value of one part; the value of a file is None."""
    split = _split(part)
    if split is None:
        return _MALFORMED
    fields, value = split
    parameters = _disposition(fields.get(b"content-disposition", b""))
    if parameters is None:
        return _MALFORMED
    if fields.get(b"content-transfer-encoding", b"8bit").lower() not in _IDENTITY_ENCODINGS:
        return BadKey("a field of the form is encoded, so no key can be read from it")
    is_file = b"filename" in {parameter.partition(b"*")[0] for parameter in parameters}
    # A form within the form, which RFC 7578, section 4.3, deprecates for several files of one field.
    if not is_file and fields.get(b"content-type", b"").lower().startswith(b"multipart/"):
        return _MALFORMED
    return parameters[b"name"], None if is_file else value


def _split(part: bytes) -> tuple[dict[bytes, bytes], bytes] | None:
    """Return the header fields of a part, by lower-case name, and its body; None where it is malformed."""
    # Spaces may stand between a boundary and its line end (RFC 2046, section 5.1.1).
    padding, line_end, rest = part.partition(b"\r\n")
    head, head_end, body = rest.partition(b"\r\n\r\n")
    if padding.strip(b" \t") or not line_end or not head_end or len(head) > MAX_PART_HEAD_BYTES:
        return None
    if _NOT_IN_A_HEAD.search(head.replace(b"\r\n", b"")):
        return None
    lines = [line.partition(b":") for line in head.split(b"\r\n")]
    fields = {name.lower(): value.strip(b" \t") for name, _, value in lines}
    # A doubled name, a line without a colon, or spaces around a name: parsers differ about each.
    if len(fields) < len(lines) or not all(colon and name == name.strip() for name, colon, _ in lines):
        return None
    return fields, body


def _disposition(value: bytes) -> dict[bytes, bytes] | None:
    """Return the parameters of a part's Content-Disposition (RFC 7578, section 4.2), a name among them, or None."""
    kind = value.partition(b";")
    parameters = parameters_of(kind)
    # Parsers differ in which backslashes of a quoted name they drop.
    if parameters is None or kind[0].strip().lower() != b"form-data" or b"\\" in parameters.get(b"name", b"\\"):
        return None
    # name* of RFC 2231: some parsers prefer it to the plain name.
    if any(parameter.startswith(b"name*") for parameter in parameters):
        return None
    return parameters


def parameters_of(value: tuple[bytes, bytes, bytes]) -> dict[bytes, bytes] | None:
    """Return the parameters of a header's value that was split at its first semicolon; None where malformed."""
    text, end = value[1] + value[2], 0
    parameters: dict[bytes, bytes] = {}
    while match := _PARAMETER.match(text, end):
        name, quoted, bare = match.groups(b"")
        if name.lower() in parameters:
            return None
        parameters[name.lower()] = quoted or bare
        end = match.end()
    return parameters if text[end:].strip(b" \t") in (b"", b";") else None
