"""What a key reads out of a form of the type multipart/form-data (RFC 7578): one field's value. Pure.

Files are as long as they like and hold whatever they like, so what is malformed or can be read in two
ways is refused here, never interpreted. Costs one pass over the body, and one over the head of each part.
"""

import re

from oncegate.keys.documents import MAX_BYTES, MAX_FIELDS, MAX_VALUE_BYTES, Missing
from oncegate.keys.syntax import BadKey

MAX_HEAD_BYTES = 4096  # of a part

_PARAMETER = re.compile(
    rb"[ \t]*;[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]++)=(?:\"((?:[^\"\\\r\n]|\\[^\r\n])*+)\"|(?!')([^\s\";,\\]++))"
)
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=?-](?:[0-9A-Za-z'()+_,./:=? -]{0,68}[0-9A-Za-z'()+_,./:=?-])?")
_NOT_IN_A_HEAD = re.compile(rb"[\0\r\n]")  # once its own line ends are taken out
_PLAIN_ENCODINGS = (b"7bit", b"8bit", b"binary")  # of what RFC 7578 section 4.7 takes for past


def multipart_value(content_type: bytes, body: bytes, name: bytes) -> bytes | Missing | BadKey:
    """Return the one value of a field."""
    boundary = _boundary(content_type)
    if boundary is None:
        return BadKey("the form in the body has no boundary that could be one")
    delimiter = b"\r\n--" + boundary
    if len(body) > MAX_BYTES or (count := body.count(delimiter)) > MAX_FIELDS:
        return BadKey("the form has too many fields to look for a key in")
    if body.count(delimiter[1:]) > count or b"\r" + delimiter[2:] in body:
        return BadKey("the form in the body has its boundary behind half a line end")
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


def _boundary(content_type: bytes) -> bytes | None:
    """Return the boundary, None where none could be one, or where some readers would find another word for it."""
    others = _parameters(content_type.partition(b";")) or {}
    boundary = others.pop(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary) or any(
        b"boundary" in b"%b=%b" % (name, others[name].lower()) for name in others
    ):
        return None
    return boundary


def _only(values: list[bytes | None]) -> bytes | Missing | BadKey:
    """Return the one value; None stands for a file's."""
    if len(values) > 1:
        return BadKey("the form names the field with the key twice")
    if not values or values[0] == b"":
        return Missing("the form has no key where it is looked for")
    if values[0] is None:
        return BadKey("the field with the key is a file")
    if len(values[0]) > MAX_VALUE_BYTES:
        return BadKey(f"the key in the form is over {MAX_VALUE_BYTES} bytes")
    return values[0]


def _is_end(last: bytes) -> bool:
    """Return whether this follows the last boundary; later lines say nothing (RFC 2046, section 5.1.1)."""
    return last.startswith(b"--") and not last[2:].partition(b"\r\n")[0].strip(b" \t")


def _field(part: bytes) -> tuple[bytes, bytes | None] | BadKey:
    """Return the name and the value of one part."""
    padding, line_ended, rest = part.partition(b"\r\n")
    head, head_ended, value = rest.partition(b"\r\n\r\n")
    malformed = BadKey("the form in the body is malformed")
    if padding.strip(b" \t") or not line_ended or not head_ended or len(head) > MAX_HEAD_BYTES:
        return malformed
    if _NOT_IN_A_HEAD.search(head.replace(b"\r\n", b"")):  # some end a line, or the head, at half a line end
        return malformed
    lines = [line.partition(b":") for line in head.split(b"\r\n")]
    fields = {field.lower(): text.strip(b" \t") for field, _, text in lines}
    if len(fields) < len(lines) or not all(colon and field == field.strip() for field, colon, _ in lines):
        return malformed
    disposition = fields.get(b"content-disposition", b"").partition(b";")
    parameters = _parameters(disposition)
    if parameters is None or disposition[0].strip().lower() != b"form-data" or b"\\" in parameters.get(b"name", b"\\"):
        return malformed
    if any(parameter.startswith(b"name*") for parameter in parameters):  # RFC 2231; some prefer it to the plain one
        return malformed
    if fields.get(b"content-transfer-encoding", b"8bit").lower() not in _PLAIN_ENCODINGS:
        return BadKey("a field of the form is encoded, so no key can be read from it")
    is_file = b"filename" in {parameter.partition(b"*")[0] for parameter in parameters}
    if not is_file and fields.get(b"content-type", b"").lower().startswith(b"multipart/"):
        return malformed
    return parameters[b"name"], None if is_file else value


def _parameters(value: tuple[bytes, bytes, bytes]) -> dict[bytes, bytes] | None:
    """Return the parameters of a header's value, split at its first semicolon; None where they are malformed."""
    text, at = value[1] + value[2], 0
    named: dict[bytes, bytes] = {}
    while found := _PARAMETER.match(text, at):
        name, quoted, bare = found.groups(b"")
        if name.lower() in named:
            return None
        named[name.lower()] = quoted or bare
        at = found.end()
    return named if text[at:].strip(b" \t") in (b"", b";") else None
