"""Where a commit has to be before it counts, and whether a server can give that. Pure."""

import re
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from oncegate.store.postgres.connections.facts import Facts


class Level(Enum):
    """How far the commits of a session go before the server replies."""

    # As the setting of the durability says: a claim, a takeover, a withdrawal.
    CLAIM = "claim"
    # To the server's disk: a settle.
    DISK = "disk"
    # Nowhere: reads, renewals, housekeeping.
    OFF = "off"


class Standbys(NamedTuple):
    """What `synchronous_standby_names` asks for: `number` of standbys, of any among `names` if `is_quorum`."""

    number: int
    names: tuple[str, ...]
    is_quorum: bool = False


_LIST = re.compile(r"(?:(?P<kind>FIRST|ANY)?\s*(?P<number>\d+)\s*\((?P<several>.*)\)|(?P<plain>.*))", re.I | re.S)
_NAME = re.compile(r'"((?:[^"]|"")*)"|([^\s,]+)')


@lru_cache(maxsize=8)
def parse_standby_names(text: str) -> Standbys | None:
    """Return what a value of `synchronous_standby_names` asks for, or None for no standby."""
    match = _LIST.fullmatch(text.strip())
    if match is None:
        return None
    names = tuple(
        quoted.replace('""', '"') or plain for quoted, plain in _NAME.findall(match["several"] or match["plain"])
    )
    is_quorum = (match["kind"] or "").upper() == "ANY"
    return Standbys(int(match["number"] or 1), names, is_quorum) if names else None


class Durability:
    """The durability of a store, by the value of its setting. `promotion`: see `ONCEGATE_PROMOTION`."""

    def __init__(self, durability: str, promotion: str) -> None:
        self.is_replicated, self._promotes_any = durability == "replicated", promotion != "most-advanced"
        self.is_memory = durability == "memory"

    def commit(self, level: Level) -> str:
        """Return the `synchronous_commit` of a session."""
        if level is Level.OFF or self.is_memory:
            return "off"
        return "on" if level is Level.CLAIM and self.is_replicated else "local"

    def unable(self, facts: Facts) -> str | None:
        """Return why claims cannot be durable at a server, or None."""
        if self.is_memory:
            return None
        for name, is_on in (("fsync", facts.fsync), ("full_page_writes", facts.full_page_writes)):
            if not is_on:
                return f"has {name}=off, and may lose what it confirmed"
        return self._unable_to_replicate(facts) if self.is_replicated else None

    def _unable_to_replicate(self, facts: Facts) -> str | None:
        if not facts.sees_standbys:
            return f"does not show its standbys to its user: GRANT pg_read_all_stats TO {facts.user_name}"
        names = parse_standby_names(facts.standby_names)
        if names is None:
            return "has no synchronous_standby_names, which the durability replicated needs"
        if self.may_lag(names, facts.cluster_name, facts.standbys.count("potential")):
            return (
                f"waits for {names.number} of more standbys, so one without the last claims can be promoted: "
                "let synchronous_standby_names have fewer, or set ONCEGATE_PROMOTION=most-advanced"
            )
        if (in_sync := sum(state in ("sync", "quorum") for state in facts.standbys)) < names.number:
            return f"has {in_sync} synchronous standbys, and synchronous_standby_names asks for {names.number}"
        return None

    def may_lag(self, names: Standbys, own_name: str, potential: int) -> bool:
        """Return whether a standby without the last claims could be promoted.

        `own_name`: of the primary, which may be among the names. `potential`: how many standbys wait for their turn.
        """
        others = sum(name != own_name for name in names.names)
        return self._promotes_any and (others > names.number if names.is_quorum else potential > 0)

    def is_confirmed(self, look: "Look") -> bool | None:
        """Return whether a commit has reached the standbys that it needs; None: not yet."""
        names = parse_standby_names(look.standby_names)
        if names is None or self.may_lag(names, look.own_name, look.potential) or len(look.flushed) < names.number:
            return False
        return True if sum((one or 0) >= look.upto for one in look.flushed) >= names.number else None


class Look(NamedTuple):
    """What a server says right after a commit. Places in its log are numbers of bytes.

    `upto`: where its log was on its own disk by then. `flushed`: where it is on the disk of each synchronous standby.
    """

    standby_names: str
    own_name: str
    upto: int
    potential: int
    flushed: Sequence[int | None]


# $1: `upto` of an earlier look, or NULL. The commit is on this server's disk, so it lies before `upto`.
LOOK = """
SELECT current_setting('synchronous_standby_names'), current_setting('cluster_name'),
       coalesce($1, pg_current_wal_flush_lsn()), count(*) FILTER (WHERE sync_state = 'potential'),
       coalesce(array_agg(flush_lsn) FILTER (WHERE sync_state IN ('sync', 'quorum')), '{}')
FROM pg_stat_get_wal_senders()
"""
