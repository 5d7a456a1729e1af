"""What is done for a request: the resolved choices of the operator. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from oncegate.decision import Disposition
from oncegate.keys.sources import KeySources, Source


class Statuses:
    """Which statuses release a key and which leave it unknown; every other one is stored.

    Entries are a code ("429"), a class ("5xx") or a code on a condition ("503+retry-after"). A
    condition beats a code, a code beats a class. ValueError on a malformed entry or one in both lists.
    """

    def __init__(self, release: Iterable[str], ambiguous: Iterable[str]) -> None:
        self._table: dict[str, Disposition] = {}
        for entries, disposition in ((release, Disposition.RELEASE), (ambiguous, Disposition.AMBIGUOUS)):
            for entry in entries:
                self._add(entry.lower(), disposition)
        # By whether there is a Retry-After, then by status; every answer asks.
        self._by_status = tuple(
            {status: self._look_up(status, retry_after) for status in range(200, 600)} for retry_after in (False, True)
        )

    def _add(self, entry: str, disposition: Disposition) -> None:
        code = entry.removesuffix("+retry-after")
        named = len(code) == 3 and code.isascii() and code.isdigit() and 200 <= int(code) <= 599
        family = code == entry and code in {"2xx", "3xx", "4xx", "5xx"}
        if not (named or family):
            raise ValueError(f"{entry!r} is not a status such as 429, 5xx or 503+retry-after")
        if self._table.setdefault(entry, disposition) is not disposition:
            raise ValueError(f"{entry!r} stands in both lists")

    def disposition(self, status: int, retry_after: bool) -> Disposition:
        """Return what `status` means, 200 to 599; `retry_after`: the answer carries a Retry-After."""
        return self._by_status[retry_after][status]

    def entries(self, disposition: Disposition) -> list[str]:
        """Return the entries of one list, as they are written."""
        return [entry for entry, meaning in self._table.items() if meaning is disposition]

    def _look_up(self, status: int, retry_after: bool) -> Disposition:
        table = self._table
        conditional = table.get(f"{status}+retry-after") if retry_after else None
        return conditional or table.get(str(status)) or table.get(f"{status // 100}xx") or Disposition.STORE


# "Not done, come again" releases; a gateway's 502 and 504 may hide an execution (DESIGN.md, Statuses).
RELEASE_STATUSES = ("401", "425", "429", "503+retry-after")
AMBIGUOUS_STATUSES = ("502", "504")
DEFAULT_STATUSES = Statuses(RELEASE_STATUSES, AMBIGUOUS_STATUSES)


@dataclass(frozen=True, slots=True)
class Policy:
    """How guarded requests are treated; header names are lower-case, times in the unit of their name.

    What only a rule can say: `sources` names the key where it is not `key_header` alone, `scope_sources`
    tell tenants apart beside the headers, `fingerprint` are the parts that enter it (None: all).
    `forward_key` is the name under which the key's header goes on, empty to drop it, None to leave it.
    """

    methods: frozenset[str]
    key_header: bytes
    key_required: bool
    namespace: bytes
    scope_headers: tuple[bytes, ...]
    pass_host: bool
    retention_ms: int
    lease_ms: int
    wait_for_duplicates: bool
    wait_max_s: float
    max_stored_bytes: int
    statuses: Statuses = DEFAULT_STATUSES
    mode: bytes = b"hold"
    rule: str = ""
    preset: str = ""
    sources: KeySources | None = None
    scope_sources: tuple[Source, ...] = ()
    fingerprint: frozenset[str] | None = None
    pass_bad_keys: bool = False
    forward_key: bytes | None = None
    upstream_idempotent: bool = False
    in_flight_status: int = 409
    max_request_bytes: int = 0  # 0: the worker's own limit
    counts_tokens: bool = False  # what its answers say they used counts as saved by a replay
    bypass: bool = False  # what the store cannot claim passes unguarded
