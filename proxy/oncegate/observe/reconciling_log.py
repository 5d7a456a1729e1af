"""The lines about reconciling: of each key that evidence settled, or that is left to a person, and some of the probes.

A settled key has an `audit` line like an operator's decision: that is the trail where the store has none. Its values
are the API's, so they are escaped, and cut.
"""

import asyncio
import socket
from typing import Any, Final

from oncegate.keys.digests import key_id
from oncegate.keys.notes import escaped
from oncegate.observe.logs import AUDIT
from oncegate.observe.reconciling import INCONCLUSIVE, ProbeReport, ReconcilingCounts
from oncegate.observe.troubles import BoundedLog

# Of inconclusive probes of one rule, there is one line in so many seconds.
PERIOD_S: Final = 60.0
# Characters of a value in a line.
SHOWN: Final = 200
HOST: Final = socket.gethostname()
# What an audit line calls it.
ACTION: Final = "reconcile"


class ReconcilingLog:
    """Counts reports, and writes the lines about them. `log` is a logger of structlog."""

    def __init__(self, counts: ReconcilingCounts, log: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._counts, self._log, self._bounded = counts, log, BoundedLog(log, loop, PERIOD_S)
        self.flush = self._bounded.flush

    def __call__(self, report: ProbeReport) -> None:
        """Take one report."""
        self._counts.count(report)
        if report.outcome:
            self._log.warning(AUDIT, action=ACTION, **audit_facts(report), host=HOST)
        elif report.verdict == INCONCLUSIVE:
            self._bounded.write("probe inconclusive", report.rule, _fields(report))
        if report.left is not None:
            self._log.warning("key left to a person", **_fields(report))


def audit_facts(report: ProbeReport) -> dict[str, Any]:
    """Return what the audit line of a key says that evidence settled, or would have, or that a person asked about."""
    facts = {
        "outcome": report.outcome or "unchanged",
        **_fields(report),
        "values": {escaped(pointer): escaped(value[:SHOWN]) for pointer, value in report.values},
        "body_digest": report.body_digest,
        "owner_token": report.owner_token.hex(),
    }
    return {name: value for name, value in facts.items() if value not in ("", {})}


def _fields(report: ProbeReport) -> dict[str, Any]:
    """Return what every line says, but for what is empty. What an API may have had a say in is escaped."""
    fields = {
        "key_id": key_id(report.key),
        "rule": report.rule,
        "by": report.by.label,
        "upstream": report.upstream,
        "verdict": report.verdict,
        "status": report.status or "",
        "reason": escaped(report.why[:SHOWN]) or (report.left.label if report.left is not None else ""),
        "age_s": round(report.age_s, 1),
    }
    return {name: value for name, value in fields.items() if value != ""}
