"""The checks that every request passes before any other code acts on it. Pure.

They refuse what a proxy and an upstream could read in two ways: ambiguous framing, targets and hosts, and fields
by which a client could make this proxy drop or confuse one that it acts on.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from oncegate.messages import transfer_coding
from oncegate.messages.fields import HOP_BY_HOP, Fields, Pairs, by_name, nominated, remember, tokens
from oncegate.messages.request_head import ACTED_ON, RequestHead
from oncegate.messages.target import normalized_host

# The path and query of origin-form (RFC 9112, section 3.2.1), with the bytes above 0x7F that real clients send.
_TARGET = re.compile(rb'/[!"$-~\x80-\xff]*')
# absolute-form (RFC 9112, section 3.2.2).
_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(/[^#]*|\?[^#]*|)", re.IGNORECASE)
# uri-host [":" port] (RFC 9110, section 7.2).
_HOST = re.compile(rb"(?:(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
# The fields that `_refuse_fields` checks, beside names with an underscore.
_CHECKED = frozenset((b"transfer-encoding", b"expect", b"connection"))
_NOT_SERVED = frozenset(("CONNECT", "TRACE"))


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that is refused with `status` and a `detail` for people; its connection is closed afterwards."""

    status: int
    detail: str


class Admission:
    """Turns a parsed request into a `RequestHead`, or refuses it.

    `hosts`: the lower-case hosts that are served, with or without a port; empty for any. `key_header`,
    `scope_headers`: lower-case names of the fields that this deployment acts on.
    """

    def __init__(self, hosts: Collection[bytes], key_header: bytes, scope_headers: Iterable[bytes]) -> None:
        self._hosts = frozenset(map(normalized_host, hosts))
        self._acted_on = ACTED_ON.union((key_header,), scope_headers)
        # An upstream that maps "_" to "-" (CGI, WSGI) would take X_Api_Key for X-Api-Key.
        self._imitated = self._acted_on | HOP_BY_HOP
        # Field names and hosts that pass whatever else the request says: a look-up instead of the checks. Bounded.
        self._harmless_names: set[bytes] = set()
        self._well_formed_hosts: set[bytes] = set()

    def admit(self, method: str, target: bytes, version: tuple[int, int], pairs: Pairs) -> RequestHead | Refused:
        """Return the head of a request that passes all checks. `version`: of HTTP, such as (1, 1)."""
        fields = by_name(pairs)
        is_usual = version == (1, 1) and target != b"*" and method not in _NOT_SERVED
        if not is_usual and (refused := self._refuse_line(method, target, version)):
            return refused
        if not self._harmless_names.issuperset(fields):
            if refused := self._refuse_fields(version, fields):
                return refused
            harmless = (name for name in fields if name not in _CHECKED and b"_" not in name)
            remember(self._harmless_names, harmless)
        return self._locate(method, target, version, pairs, fields)

    def _refuse_line(self, method: str, target: bytes, version: tuple[int, int]) -> Refused | None:
        if version not in ((1, 1), (1, 0)):
            return Refused(505, "this proxy speaks HTTP/1.0 and HTTP/1.1 only")
        if method in _NOT_SERVED:
            return Refused(405, f"{method} is not served by this proxy")
        if target == b"*":
            return Refused(400, "the target * is not served by this proxy")
        return None

    def _refuse_fields(self, version: tuple[int, int], fields: Fields) -> Refused | None:
        # RFC 9112, section 6.1: a length beside a transfer coding is a sign of request smuggling.
        coding = fields.get(b"transfer-encoding")
        if coding and (version == (1, 0) or tokens(coding) != [b"chunked"] or b"content-length" in fields):
            if version == (1, 1) and b"content-length" not in fields and transfer_coding.are_unknown(coding):
                return Refused(501, transfer_coding.UNKNOWN)
            return Refused(400, "the only transfer coding understood is chunked, in HTTP/1.1, without a length")
        if b"expect" in fields and tokens(fields[b"expect"]) != [b"100-continue"]:
            return Refused(417, "the only expectation understood is 100-continue")
        # Else a client could make this proxy drop its own X-Api-Key, say, after the scope was read from it.
        if b"connection" in fields and not self._acted_on.isdisjoint(nominated(fields)):
            return Refused(400, "Connection names a field that this proxy acts on")
        if b"_" in b"".join(fields) and any(map(self._imitates, fields)):
            return Refused(400, "a field name with _ imitates a field that this proxy acts on")
        return None

    def _imitates(self, name: bytes) -> bool:
        return b"_" in name and name not in self._acted_on and name.replace(b"_", b"-") in self._imitated

    def _locate(
        self, method: str, target: bytes, version: tuple[int, int], pairs: Pairs, fields: Fields
    ) -> RequestHead | Refused:
        """Check Host and target (RFC 9112, section 3.2), and return the head with its target in origin form."""
        http10 = version == (1, 0)
        hosts = fields.get(b"host", [])
        if len(hosts) > 1 or (not hosts and not http10):
            return Refused(400, "a request needs exactly one Host field")
        host = hosts[0] if hosts else b""
        if hosts and host not in self._well_formed_hosts:
            if not _HOST.fullmatch(host):
                return Refused(400, "the Host field is not a host with an optional port")
            remember(self._well_formed_hosts, hosts)
        # The authority of an absolute target counts in the place of Host (RFC 9112, section 3.2.2).
        if not target.startswith(b"/") and (absolute := _ABSOLUTE.fullmatch(target)):
            host = absolute[1]
            if not _HOST.fullmatch(host):
                return Refused(400, "the target's authority is not a host with an optional port")
            if hosts != [host]:
                fields = {**fields, b"host": [host]}
            target = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
        if not _TARGET.fullmatch(target):
            return Refused(400, "the target is neither a path nor a URL of this host")
        if self._hosts and self._hosts.isdisjoint((name := normalized_host(host), _without_port(name))):
            return Refused(421, "this host is not served here")
        return RequestHead(method, target, http10, host, pairs, fields)


def _without_port(host: bytes) -> bytes:
    return host[: host.index(b"]") + 1] if host.startswith(b"[") else host.partition(b":")[0]
