"""Keyed digests of keys, scopes and fingerprints, and the names that are made of them. Pure.

Three digests identify one operation. The tenant: whose key it is. The key: the record's name in the store. The
fingerprint: what the request asks for. Every part that enters one is length-prefixed, so that ("a", "bc") and
("ab", "c") differ.
"""

from binascii import b2a_base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import NamedTuple

from oncegate.keys.tenants import TenantFields

# The version of how requests are named, which proxies on one store compare. Raise it with every change by which any
# request gets another tenant, key or fingerprint than before: in this room, in `settings/credentials.py`, in what a
# preset takes for its key. A proxy that names otherwise would execute again what another one has executed, and so it
# is refused until its operator declares the change. `tests/test_naming.py` pins names of this version.
NAMING = 2

# 32 characters in the name of a record; a second preimage costs 2^192.
KEY_DIGEST_BYTES = 24
DIGEST_BYTES = 16

# From plain base64, as `binascii` writes it, to base64url (RFC 4648, section 5).
URL_SAFE = bytes.maketrans(b"+/", b"-_")


class Scope(NamedTuple):
    """Whose key it is. `tenant` is a digest of 16 bytes.

    `without_credential`: no field of the request says whose it is, so that all such requests are one tenant.
    """

    namespace: bytes
    tenant: bytes
    without_credential: bool = False


@dataclass(frozen=True, slots=True)
class UnstableScope:
    """The credential is of a scheme that may make one for each request, so that it cannot identify a tenant."""


class _FormattedNumbers(dict[int, bytes]):
    """Numbers -> their text in a digest. A bounded cache.

    A fingerprint takes 13k instructions with it, and 19k where each number is formatted (measured).
    """

    def __init__(self, form: bytes) -> None:
        self._form = form

    def __missing__(self, number: int) -> bytes:
        if len(self) >= 4096:
            self.clear()
        text = self[number] = self._form % number
        return text


# By length of a part, and by number of values.
_LENGTH, _COUNT = _FormattedNumbers(b"%d:"), _FormattedNumbers(b"%d;")


def length_prefixed(parts: Iterable[bytes]) -> bytes:
    """Return the parts joined, each after its length."""
    return b"".join([_LENGTH[len(part)] + part for part in parts])


def _field_parts(name: bytes, values: Sequence[bytes]) -> list[bytes]:
    """Return a header field for a digest, in pieces to be joined: its name, how many values, and each of them."""
    # Nearly all fields have one value, for which this is `length_prefixed` without its loop.
    if len(values) == 1:
        value = values[0]
        return [_LENGTH[len(name)], name, b"1;", _LENGTH[len(value)], value]
    return [_LENGTH[len(name)], name, _COUNT[len(values)], length_prefixed(values)]


class Digests:
    """Digests keyed with `secret`: without it, nobody who reads the store can guess keys, tenants or bodies.

    `secret_id` identifies the secret without revealing it; `none` without a secret. `audit_key`: the key of the audit
    trail's digests, `capability_key`: of the addresses of responses; empty without a secret.
    """

    def __init__(self, secret: bytes) -> None:
        # blake2b takes at most 64 bytes of key; a secret may be longer.
        digest_key = blake2b(secret, digest_size=32).digest() if secret else b""
        self.secret_id = blake2b(key=digest_key, digest_size=8, person=b"secret").hexdigest() if secret else "none"
        self.audit_key = blake2b(key=digest_key, digest_size=32, person=b"audit").digest() if secret else b""
        self.capability_key = blake2b(key=digest_key, digest_size=32, person=b"capability").digest() if secret else b""
        self._tenant = blake2b(key=digest_key, digest_size=DIGEST_BYTES, person=b"tenant")
        self._key = blake2b(key=digest_key, digest_size=KEY_DIGEST_BYTES, person=b"key")
        self._body = blake2b(key=digest_key, digest_size=DIGEST_BYTES, person=b"body")
        self._fingerprint = blake2b(key=digest_key, digest_size=DIGEST_BYTES, person=b"fingerprint")

    def scope(
        self, namespace: bytes, fields: Mapping[bytes, Sequence[bytes]], tenant: TenantFields
    ) -> Scope | UnstableScope:
        """Return the scope of a request with these header `fields` (by lower-case name)."""
        parts: list[bytes] = []
        is_known = not tenant.names
        for name in tenant.counted(fields):
            values = fields[name]
            if name == b"authorization" and not all(map(tenant.is_stable, values)):
                return UnstableScope()
            parts += _field_parts(name, values)
            is_known = is_known or any(values)
        digest = self._tenant.copy()
        digest.update(b"".join(parts))
        return Scope(namespace, digest.digest(), not is_known)

    def key(self, scope: Scope, key: bytes) -> bytes:
        """Return the digest (24 bytes) of a key in its scope: the record's name in the store."""
        return finish_key(self.key_prefix(scope), key)

    def key_prefix(self, scope: Scope) -> blake2b:
        """Return the digest of a scope's keys that still lacks the key; for `finish_key`."""
        digest = self._key.copy()
        digest.update(length_prefixed(scope[:2]))
        return digest

    def fingerprint(self, parts: Sequence[bytes], body: Iterable[bytes]) -> bytes:
        """Return the fingerprint (16 bytes) of a request: the digest of `parts` of its head and of its `body`.

        How the body is cut into blocks does not matter.
        """
        return finish_fingerprint(self.fingerprint_prefix(parts), body)

    def body(self, blocks: Iterable[bytes]) -> bytes:
        """Return the digest (16 bytes) of a body, as `shown_body` makes it of its SHA-256."""
        digest = sha256()
        for block in blocks:
            digest.update(block)
        return self.shown_body(digest.digest())

    def shown_body(self, digest: bytes) -> bytes:
        """Return the digest of a body of which somebody shows the SHA-256."""
        own = self._body.copy()
        own.update(digest)
        return own.digest()

    def fingerprint_prefix(self, parts: Sequence[bytes]) -> blake2b:
        """Return the fingerprint that still lacks the body; for `finish_fingerprint`."""
        joined = length_prefixed(parts)
        digest = self._fingerprint.copy()
        digest.update(_LENGTH[len(joined)] + joined)
        return digest


def finish_key(prefix: blake2b, key: bytes) -> bytes:
    """Return the digest (24 bytes) of a key under a prefix of `Digests.key_prefix`, which is left as it is."""
    digest = prefix.copy()
    digest.update(_LENGTH[len(key)] + key)
    return digest.digest()


def finish_fingerprint(prefix: blake2b, body: Iterable[bytes]) -> bytes:
    """Return the fingerprint (16 bytes) of a body under a prefix of `Digests.fingerprint_prefix`, left as it is."""
    digest = prefix.copy()
    for block in body:
        digest.update(block)
    return digest.digest()


def identity_settings(digests: Digests, namespace: str, key_header: str, scope_headers: Iterable[str]) -> str:
    """Return the settings that decide how keys are named, as text for people.

    Two proxies with different texts do not find each other's records.
    """
    scope = ",".join(name.lower() for name in scope_headers)
    named = f"naming={NAMING} namespace={namespace} secret={digests.secret_id}"
    return f"{named} scope={scope} key_header={key_header.lower()}"


def key_id(digest: bytes) -> str:
    """Return the id of a key for people: 32 characters, the name of its record in the store without the frame."""
    return url_safe_base64(digest).decode()


def url_safe_base64(data: bytes) -> bytes:
    """Return base64url (RFC 4648, section 5). For whole groups of three bytes, which need no padding."""
    return b2a_base64(data, newline=False).translate(URL_SAFE)
