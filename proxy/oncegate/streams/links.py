"""The `Link` fields by which an answer names the addresses of its response (RFC 8288). Pure."""

from dataclasses import dataclass
from typing import NamedTuple

from oncegate.adaptation.addresses import with_outer
from oncegate.streams.capability import CANCEL, READ, Capabilities, Capability
from oncegate.streams.own_path import OwnPath


class ClaimName(NamedTuple):
    """One claim of one key. `created_ms` as its record has it."""

    key: bytes
    token: bytes
    tenant: bytes
    created_ms: int


@dataclass(frozen=True, slots=True)
class Links:
    """The addresses that one rule gives away. `base`: the URL by which clients reach the listener, empty for a path.

    `rule`: its mark. An address counts for `retention_ms` from the claim on.
    """

    capabilities: Capabilities
    own_path: OwnPath
    base: bytes
    rule: bytes
    retention_ms: int
    resumable: bool
    cancellable: bool

    def fields(self, claim: ClaimName, outer: bytes) -> bytes:
        """Return the fields for an answer about a claim, each line ended.

        `outer`: the path prefix that trusted proxies in front took off.
        """
        resume = self.resume_field(claim, outer) if self.resumable else b""
        cancel = b'Link: <%s>; rel="cancel"\r\n' % self.address(CANCEL, claim, outer) if self.cancellable else b""
        return resume + cancel

    def resume_field(self, claim: ClaimName, outer: bytes) -> bytes:
        """Return the field that names the address at which a claim's response is read."""
        return b'Link: <%s>; rel="resume"\r\n' % self.address(READ, claim, outer)

    def address(self, purpose: bytes, claim: ClaimName, outer: bytes) -> bytes:
        """Return the address for a purpose: a URL, or a path on the host that the client asked."""
        expires_s = (claim.created_ms + self.retention_ms) // 1000
        capability = Capability(purpose, expires_s, claim.key, claim.token, claim.tenant, self.rule)
        path = self.own_path.address(self.capabilities.write(capability))
        return self.base + path if self.base else with_outer(path, outer)
