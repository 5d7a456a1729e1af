"""The names of records in the store, and the ids that operators use. Pure."""

import re
from base64 import urlsafe_b64decode
from binascii import b2a_base64

from oncegate.keys.digests import URL_SAFE, url_safe_base64

RECORD_ID = re.compile(r"[A-Za-z0-9_-]{32}")


# A request asks four times for the same name. As an `lru_cache` this takes half as much again (Python 3.11, counted).
_MOST_NAMES = 1024
_names: dict[bytes, bytes] = {}


def store_key(digest: bytes) -> bytes:
    """Return the name of a key's record in the store. The braces put all of it in one slot of a Redis Cluster."""
    name = _names.get(digest)
    if name is None:
        if len(_names) >= _MOST_NAMES:
            _names.clear()
        name = _names[digest] = b"once:{%s}" % b2a_base64(digest, newline=False).translate(URL_SAFE)
    return name


def record_id(digest: bytes) -> str:
    """Return the record's id for operators: 32 characters, its name in the store without the frame."""
    return url_safe_base64(digest).decode()


def parse_record_id(text: str) -> bytes | None:
    """Return the digest of a record's id, or of its name in the store; None for any other text."""
    text = text.removeprefix("once:{").removesuffix("}")
    return urlsafe_b64decode(text) if RECORD_ID.fullmatch(text) else None
