"""Tells a key that a browser made by itself from one that an application sent. Pure.

Firefox (`network.http.idempotencyKey.enabled`, measured in ESR 153.8) sends a quoted decimal number of up to 20 digits
with each POST and PATCH that has no key. Its repetitions of a request and a plain reload have the same number; a second
click and a forced reload have a new one. So the number names an attempt, not what the user means to do.
"""

import re

from oncegate.messages.fields import Fields

HEADER = b"idempotency-key"
_NUMBER = re.compile(rb'"[0-9]{1,20}"')


def is_automatic(fields: Fields) -> bool:
    """Return whether the browser made the key: a page can give no header to a form or a link."""
    lines = fields.get(HEADER, ())
    return len(lines) == 1 and _NUMBER.fullmatch(lines[0].strip(b" \t")) is not None and _is_navigation(fields)


def _is_navigation(fields: Fields) -> bool:
    if (mode := fields.get(b"sec-fetch-mode")) is not None:
        return mode == [b"navigate"]
    # Browsers send Sec-Fetch-Mode to https and localhost only, and this one wherever they navigate.
    return fields.get(b"upgrade-insecure-requests") == [b"1"]
