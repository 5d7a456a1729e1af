"""The note that a released claim leaves: its record is gone, and who was told to come for the response finds this.

It may be lost, as every mark of a store. Then nobody knows more than that there is no record.
"""

import re
from typing import NamedTuple, Self

from oncegate.store.record import Claim
from oncegate.store.record_name import store_key
from oncegate.store.store import Marks

# Seconds, or a date (RFC 9110, section 10.2.3).
_RETRY_AFTER = re.compile(rb"[0-9]{1,9}|[A-Za-z]{3,9},? [0-9A-Za-z :-]{9,24} GMT")
_NOTE = re.compile(rb"([0-9]{1,3}) (.*)")


class Released(NamedTuple):
    """Why a claim was released. `status`: of the response that said so, 0 where nothing was sent.

    `retry_after`: what it said, empty for nothing.
    """

    status: int
    retry_after: bytes = b""

    @classmethod
    def by(cls, status: int, retry_after: bytes) -> Self:
        """Return the note about a response; `retry_after` as it came."""
        return cls(status, retry_after if _RETRY_AFTER.fullmatch(retry_after) else b"")


async def note(marks: Marks, claim: Claim, released: Released) -> None:
    """Leave a note about a claim that is about to be released, for as long as its response would have been kept."""
    await marks.put(_name(claim.key, claim.token), b"%d %b" % released, claim.retention_ms)


async def read(marks: Marks, key: bytes, token: bytes) -> Released | None:
    """Return the note about a claim, None where there is none."""
    found = _NOTE.fullmatch(await marks.get(_name(key, token)))
    return None if found is None else Released.by(int(found[1]), found[2])


def _name(key: bytes, token: bytes) -> bytes:
    return b"%b:released:%b" % (store_key(key), token.hex().encode())
