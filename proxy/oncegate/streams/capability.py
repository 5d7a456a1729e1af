"""The right to read, or to stop, one stored or running response: what its address consists of. Pure.

Whoever holds the address may do what it says, and nobody can make one without `ONCEGATE_SECRET`. It names one claim of
one key by its token, so that it never leads to another execution.
"""

import hmac
import re
import struct
from base64 import urlsafe_b64decode
from hashlib import blake2b, sha256
from typing import NamedTuple

from oncegate.keys.digests import Scope, url_safe_base64

# What a capability allows: to read the response, to stop the execution, and to ask later for a response of which the
# client got no part.
READ, CANCEL, LATER = b"r", b"c", b"l"
# Purpose, expiry, key, token, tenant, mark of the rule.
_FIXED = struct.Struct(">cI24s16s16s4s")
_MAC_BYTES = 16
# Whole groups of three bytes: each text has one meaning, and each capability one text.
_TEXT = re.compile(rb"[A-Za-z0-9_-]{%d}" % ((_FIXED.size + _MAC_BYTES) * 4 // 3))
_LAST_SECOND = 0xFFFFFFFF


class Capability(NamedTuple):
    """What an address allows: `purpose`, for the claim `token` of `key`, until `expires_s`.

    That is in seconds since 1970, by the store's clock. `tenant`: whose key it is. `rule`: the `rule_mark`
    of the rule under which the claim was made.
    """

    purpose: bytes
    expires_s: int
    key: bytes
    token: bytes
    tenant: bytes
    rule: bytes

    @property
    def scope(self) -> Scope:
        """The scope of its key, as far as a store needs it: the namespace is in the key."""
        return Scope(b"", self.tenant)


def rule_mark(name: str) -> bytes:
    """Return what names a rule in a capability, 4 bytes."""
    return blake2b(name.encode(), digest_size=4).digest()


class Capabilities:
    """Writes and reads capabilities. `key`: of their check, made of the secret."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def write(self, capability: Capability) -> bytes:
        """Return a capability as text, 108 characters of base64url. Equal ones have equal texts."""
        purpose, expires_s, *rest = capability
        packed = _FIXED.pack(purpose, min(expires_s, _LAST_SECOND), *rest)
        return url_safe_base64(packed + self._check(packed))

    def read(self, text: bytes) -> Capability | None:
        """Return the capability that a text is; None for a text that this secret has not made. It may be expired."""
        if not _TEXT.fullmatch(text):
            return None
        packed = urlsafe_b64decode(text)
        packed, check = packed[:-_MAC_BYTES], packed[-_MAC_BYTES:]
        return Capability(*_FIXED.unpack(packed)) if hmac.compare_digest(check, self._check(packed)) else None

    def _check(self, packed: bytes) -> bytes:
        return hmac.digest(self._key, packed, sha256)[:_MAC_BYTES]
