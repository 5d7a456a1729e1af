"""The names of records in the store, and the ids that operators use. Pure."""

import re
from base64 import urlsafe_b64decode
from binascii import b2a_base64
from functools import lru_cache

from oncegate.keys.digests import URL_SAFE, url_safe_base64

RECORD_ID = re.compile(r"[A-Za-z0-9_-]{32}")


# Cached: a claim and its settlement ask for the same name.
@lru_cache(1024)
def store_key(digest: bytes) -> bytes:
    """Return the name of a key's record in the store. The braces put all of it in one slot of a Redis Cluster."""
    return b"once:{%s}" % b2a_base64(digest, newline=False).translate(URL_SAFE)


def record_id(digest: bytes) -> str:
    """Return the record's id for operators: 32 characters, its name in the store without the frame."""
    return url_safe_base64(digest).decode()


def parse_record_id(text: str) -> bytes | None:
    """Return the digest of a record's id, or of its name in the store; None for any other text."""
    text = text.removeprefix("once:{").removesuffix("}")
    return urlsafe_b64decode(text) if RECORD_ID.fullmatch(text) else None
