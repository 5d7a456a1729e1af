"""Entries of a list of statuses: each names the responses of an API that it is about. Pure."""

import re
from typing import NamedTuple

# Stands for the list that holds without this one.
DEFAULT = "default"
# A `+` belongs to no name here: a second condition is refused. The pointer is that of RFC 6901, without `=`.
_ENTRY = re.compile(
    r"(?P<status>[2-9][0-9]{2}|[2-5]xx)"
    r"(?:\+(?:(?P<field>[a-z0-9!#$%&'*.^_`|~-]+)|(?P<pointer>(?:/(?:[^~/=]|~[01])*)+)(?==))"
    r"(?:=(?P<value>[!-~](?:[ -~]{0,253}[!-~])?))?)?",
    re.IGNORECASE | re.ASCII,
)


class StatusEntry(NamedTuple):
    """The responses of a status (`503`) or a class (`5xx`), on one condition at most.

    `field`: they have this field, in lower case. `pointer`: they have a JSON body with a member there. `value`: that
    of the field, in lower case, or of the member; None for any.
    """

    text: str
    status: str
    field: str = ""
    pointer: str = ""
    value: str | None = None

    @property
    def is_conditional(self) -> bool:
        return bool(self.field or self.pointer)


def read_status(text: str) -> StatusEntry:
    """Return an entry: `429`, `5xx`, `503+retry-after`, `5xx+name=value`, or `409+/json/pointer=value`."""
    match = _ENTRY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a status such as 429, 5xx, 503+retry-after or 409+/error/code=locked")
    if match["pointer"]:
        status, pointer, value = match["status"].lower(), match["pointer"], match["value"]
        return StatusEntry(f"{status}+{pointer}={value}", status, pointer=pointer, value=value)
    value = match["value"] and match["value"].lower()
    return StatusEntry(text.lower(), match["status"].lower(), (match["field"] or "").lower(), value=value)


def parse_status(text: str) -> str:
    """Return an entry as it is compared with others, or `default`."""
    return DEFAULT if text.lower() == DEFAULT else read_status(text).text
