"""The policy for a request: the choices of settings, preset and rule, resolved to one record. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from oncegate.decision import HOLD, Disposition
from oncegate.keys.sources import KeySources, Source


class Statuses:
    """Which statuses of a response release a key, and which leave it unknown. Responses of all others are stored.

    An entry is a code ("429"), a class ("5xx"), or a code that counts only beside a Retry-After field
    ("503+retry-after"). Of several that match, the last of these forms decides, then the code, then the class.
    Raises ValueError for a malformed entry and for one in both lists.
    """

    def __init__(self, release: Iterable[str], ambiguous: Iterable[str]) -> None:
        self._table: dict[str, Disposition] = {}
        for entries, disposition in ((release, Disposition.RELEASE), (ambiguous, Disposition.AMBIGUOUS)):
            for entry in entries:
                self._add(entry.lower(), disposition)
        # By whether there is a Retry-After, then by status (200 to 599). The request path looks it up itself.
        # A 1xx is interim and decides nothing (RFC 9110, section 15.2).
        self.by_retry_after = tuple(
            {status: self._look_up(status, retry_after) for status in range(200, 600)} for retry_after in (False, True)
        )

    def _add(self, entry: str, disposition: Disposition) -> None:
        code = entry.removesuffix("+retry-after")
        is_code = len(code) == 3 and code.isascii() and code.isdigit() and 200 <= int(code) <= 599
        is_class = code == entry and code in {"2xx", "3xx", "4xx", "5xx"}
        if not (is_code or is_class):
            raise ValueError(f"{entry!r} is not a status such as 429, 5xx or 503+retry-after")
        if self._table.setdefault(entry, disposition) is not disposition:
            raise ValueError(f"{entry!r} is in both lists")

    def disposition(self, status: int, retry_after: bool) -> Disposition:
        """Return what a status (200 to 599) means for the key; `retry_after`: the response has a Retry-After."""
        return self.by_retry_after[retry_after][status]

    def entries(self, disposition: Disposition) -> list[str]:
        """Return the entries of one list, as they are written."""
        return [entry for entry, meaning in self._table.items() if meaning is disposition]

    def _look_up(self, status: int, retry_after: bool) -> Disposition:
        table = self._table
        conditional = table.get(f"{status}+retry-after") if retry_after else None
        return conditional or table.get(str(status)) or table.get(f"{status // 100}xx") or Disposition.STORE


# A status that says "not executed, retry" releases the key. Behind a gateway's 502 or 504 the request may have been
# executed.
RELEASE_STATUSES = ("401", "425", "429", "503+retry-after")
AMBIGUOUS_STATUSES = ("502", "504")
DEFAULT_STATUSES = Statuses(RELEASE_STATUSES, AMBIGUOUS_STATUSES)


@dataclass(frozen=True, slots=True)
class Policy:
    """What happens to the requests of a rule, or of the settings alone. Header names are lower-case.

    `methods`: those that are guarded. `mode`: the wire value of an UnknownMode. `unknown_retention_ms`: how long a key
    that is in flight or unknown is kept. `destination`: where requests go, as far as it is known without one: the
    upstream's name and a Host that is set. Empty for the upstream of the settings. `max_request_bytes`: 0 for the
    worker's own limit. `bypass`: a request that the store cannot claim is forwarded without protection. `rule`,
    `preset`: their names, empty without one.

    Only a rule can set the following. `sources`: the key, where it is not `key_header` alone. `scope_sources`:
    sources beside the headers that identify the tenant. `fingerprint`: the parts that enter it, None for all.
    `forward_key`: the name under which the upstream gets the key's header, empty for none, None for the same name.
    `pass_bad_keys`: a request without a usable key is forwarded without protection. `upstream_idempotent`: the
    upstream recognizes keys itself, so that a lost request can be sent again. `in_flight_status`: for a duplicate
    while the original is running. `counts_tokens`: metrics count the tokens in its responses as saved by replays.
    """

    methods: frozenset[str]
    key_header: bytes
    key_required: bool
    namespace: bytes
    scope_headers: tuple[bytes, ...]
    pass_host: bool
    retention_ms: int
    unknown_retention_ms: int
    lease_ms: int
    wait_for_duplicates: bool
    wait_max_s: float
    max_stored_bytes: int
    statuses: Statuses = DEFAULT_STATUSES
    mode: bytes = HOLD
    rule: str = ""
    preset: str = ""
    sources: KeySources | None = None
    scope_sources: tuple[Source, ...] = ()
    fingerprint: frozenset[str] | None = None
    pass_bad_keys: bool = False
    forward_key: bytes | None = None
    upstream_idempotent: bool = False
    in_flight_status: int = 409
    max_request_bytes: int = 0
    counts_tokens: bool = False
    bypass: bool = False
    destination: bytes = b""
