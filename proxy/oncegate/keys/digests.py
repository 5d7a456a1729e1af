"""Keys, scopes and fingerprints: what names one operation, whose it is, what it asks for. Pure.

Everything that enters a digest is length-prefixed, so that ("a", "bc") and ("ab", "c") differ.
"""

import re
from base64 import urlsafe_b64decode
from binascii import b2a_base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

KEY_DIGEST_BYTES = 24  # 32 characters in the store's key; a second preimage costs 2^192
DIGEST_BYTES = 16

# A bare key is what every SDK sends; RFC 9651 alone would refuse a UUID that starts with a digit.
_URL_SAFE = bytes.maketrans(b"+/", b"-_")

RECORD_ID = re.compile(r"[A-Za-z0-9_-]{32}")

# Credentials made anew for each attempt: as a scope they would make each retry another tenant's.
_PER_REQUEST = re.compile(rb"\s*(?:AWS4-[^\s]*|Digest|OAuth|Signature|Hawk)(?:\s|$)", re.IGNORECASE)


def _is_stable(credential: bytes) -> bool:
    return credential.startswith((b"Bearer ", b"Basic ")) or not _PER_REQUEST.match(credential)


class Scope(NamedTuple):
    """Whose key it is. `tenant` is a digest of 16 bytes; `common` says that no credential was sent."""

    namespace: bytes
    tenant: bytes
    common: bool = False


@dataclass(frozen=True, slots=True)
class UnstableScope:
    """The credential changes with every request, so it cannot name a tenant."""


class _Written(dict[int, bytes]):
    """Numbers as they are written in a digest. Bounded.

    A fingerprint takes 13k instructions with them, 19k when each is formatted (measured).
    """

    def __init__(self, form: bytes) -> None:
        self._form = form

    def __missing__(self, number: int) -> bytes:
        if len(self) >= 4096:
            self.clear()
        written = self[number] = self._form % number
        return written


_PREFIX, _COUNT = _Written(b"%d:"), _Written(b"%d;")


def _named(name: bytes, values: Sequence[bytes]) -> list[bytes]:
    """Return a field as it enters a digest."""
    if len(values) == 1:
        value = values[0]
        return [_PREFIX[len(name)], name, b"1;", _PREFIX[len(value)], value]
    return [_PREFIX[len(name)], name, _COUNT[len(values)], length_prefixed(values)]


def length_prefixed(parts: Iterable[bytes]) -> bytes:
    """Return the parts as one, each with its length before it."""
    return b"".join([_PREFIX[len(part)] + part for part in parts])


class Digests:
    """Digests keyed with `secret`: without it, keys, tenants and bodies cannot be guessed from a store."""

    def __init__(self, secret: bytes) -> None:
        keyed = blake2b(secret, digest_size=32).digest() if secret else b""
        self.secret_id = blake2b(key=keyed, digest_size=8, person=b"secret").hexdigest() if secret else "none"
        self._tenant = blake2b(key=keyed, digest_size=DIGEST_BYTES, person=b"tenant")
        self._key = blake2b(key=keyed, digest_size=KEY_DIGEST_BYTES, person=b"key")
        self._fingerprint = blake2b(key=keyed, digest_size=DIGEST_BYTES, person=b"fingerprint")

    def scope(
        self, namespace: bytes, headers: Mapping[bytes, Sequence[bytes]], names: Sequence[bytes]
    ) -> Scope | UnstableScope:
        """Return whose key it is, by the scope headers (lower-case `names`) that are present, and by Cookie where none
        of them says anything."""
        parts: list[bytes] = []
        told = False
        for name in names:
            if (values := headers.get(name)) is not None:
                if name == b"authorization" and not all(map(_is_stable, values)):
                    return UnstableScope()
                parts += _named(name, values)
                told = told or any(values)
        if not told and names and b"cookie" in headers:
            parts += _named(b"cookie", headers[b"cookie"])
        digest = self._tenant.copy()
        digest.update(b"".join(parts))
        return Scope(namespace, digest.digest(), bool(names) and not parts)

    def key(self, scope: Scope, key: bytes) -> bytes:
        """Return the digest (24 bytes) that names a key of a scope in the store."""
        return finish_key(self.key_prefix(scope), key)

    def key_prefix(self, scope: Scope) -> blake2b:
        """Return the digest of a key of a scope, without the key."""
        digest = self._key.copy()
        digest.update(length_prefixed(scope[:2]))
        return digest

    def fingerprint(self, parts: Sequence[bytes], body: Iterable[bytes]) -> bytes:
        """Return the digest (16 bytes) of what a request asks for; `body` comes in blocks, as it is sent."""
        return finish_fingerprint(self.fingerprint_prefix(parts), body)

    def fingerprint_prefix(self, parts: Sequence[bytes]) -> blake2b:
        """Return a fingerprint that lacks its body."""
        asked = length_prefixed(parts)
        digest = self._fingerprint.copy()
        digest.update(_PREFIX[len(asked)] + asked)
        return digest


def finish_key(scoped: blake2b, key: bytes) -> bytes:
    """Return the digest (24 bytes) that names a key in the store, of a scope that was digested so."""
    digest = scoped.copy()
    digest.update(_PREFIX[len(key)] + key)
    return digest.digest()


def finish_fingerprint(begun: blake2b, body: Iterable[bytes]) -> bytes:
    """Return the digest that was begun so."""
    digest = begun.copy()
    for block in body:
        digest.update(block)
    return digest.digest()


def identity_settings(digests: Digests, namespace: str, key_header: str, scope_headers: Iterable[str]) -> str:
    """Return by which settings keys are named, for people: replicas where it differs know other keys."""
    scope = ",".join(name.lower() for name in scope_headers)
    return f"namespace={namespace} secret={digests.secret_id} scope={scope} key_header={key_header.lower()}"


@lru_cache(1024)  # asked for with every call: a claim's is there when it is settled
def store_key(digest: bytes) -> bytes:
    """Return the record's name in the store; the braces keep one record in one Cluster slot."""
    return b"once:{" + _base64(digest) + b"}"


def record_id(digest: bytes) -> str:
    """Return how operators call a record: its name in the store without what is around it."""
    return _base64(digest).decode()


def parse_record_id(name: str) -> bytes | None:
    """Return the digest behind a record's id or its name in the store, None where it is neither."""
    text = name.removeprefix("once:{").removesuffix("}")
    return urlsafe_b64decode(text) if RECORD_ID.fullmatch(text) else None


def key_id(digest: bytes) -> str:
    """Return what logs show of a key: enough to find it, too little to guess it."""
    return _base64(digest[:9]).decode()


def _base64(digest: bytes) -> bytes:
    return b2a_base64(digest, newline=False).translate(_URL_SAFE)
