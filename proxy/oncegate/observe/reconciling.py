"""What is seen of reconciling: one report of each step about an unknown key, and what is counted of it.

The log reads the same reports: `reconciling_log`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from oncegate.observe.families import LONG_BUCKETS_S, Counters, GroupedCounters, Histograms

INCONCLUSIVE: Final = "inconclusive"
VERDICTS: Final = ("succeeded", "failed", "absent", INCONCLUSIVE)
# The outcomes that ended a key.
SETTLED: Final = frozenset(("resolved", "released", "stored"))


class By(Enum):
    """Who settled a key, or asked about it."""

    # A worker that looks for keys whose probe is due.
    JANITOR = "janitor"
    # A duplicate that waits.
    DUPLICATE = "duplicate"
    # The same request sent again, to an API that executes each key once.
    RESEND = "resend"
    # A person.
    OPERATOR = "operator"

    def __init__(self, label: str) -> None:
        self.label = label


class Left(Enum):
    """Why a key is left to a person."""

    # No verdict came within reconcile_for_s.
    TIME_OVER = "time_over"
    # Its record lacks a value that the question needs.
    CANNOT_ASK = "cannot_ask"

    def __init__(self, label: str) -> None:
        self.label = label


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What became of one step about an unknown key.

    `key` is the digest. `verdict`: a word of VERDICTS; empty where nobody was asked. `status`: of the API's answer, 0
    for none. `why`: in words, without anything that the API or a client wrote. `outcome`: what the store said to the
    verdict, a word of SETTLED if the key has ended by it; empty where it was not told. `values`: of the pointers in
    `audit`. `age_s`: since the key was claimed. `left`: why it is a person's from now on, once for each key.
    """

    by: By
    key: bytes
    rule: str
    upstream: str = ""
    verdict: str = ""
    status: int = 0
    why: str = ""
    outcome: str = ""
    values: tuple[tuple[str, str], ...] = ()
    body_digest: str = ""
    owner_token: bytes = b""
    age_s: float = 0.0
    left: Left | None = None


# Takes each report once.
Report = Callable[[ProbeReport], None]


class ReconcilingCounts:
    """What is counted of reconciling. Its attributes are families, as those of `Metrics`."""

    def __init__(self) -> None:
        self.probes = GroupedCounters(
            "probes",
            "Questions to an API about unknown keys, by rule and by what the answer means.",
            labels=("rule", "verdict"),
            values=VERDICTS,
        )
        self.reconciled = Counters(
            "reconciled",
            "Unknown keys that were settled, by who did.",
            label="by",
            values=[by.label for by in By],
        )
        self.reconciled_age_s = Histograms(
            "reconciled_age_seconds",
            "Time from the claim of an unknown key until it was settled.",
            buckets_s=LONG_BUCKETS_S,
        )
        self.left = GroupedCounters(
            "left_to_a_person",
            "Unknown keys about which oncegate asks no more, by rule and by why.",
            labels=("rule", "reason"),
            values=[left.label for left in Left],
        )

    def follow(self, rule: str) -> None:
        """Have the counters of a rule from now on, before its first probe."""
        self.probes.of(rule)
        self.left.of(rule)

    def settled(self, by: By, age_s: float) -> None:
        """Count an unknown key that was settled so long after its claim."""
        self.reconciled.add(by.label)
        self.reconciled_age_s.by_value[""].observe(age_s)

    def count(self, report: ProbeReport) -> None:
        """Count one report."""
        if report.verdict:
            self.probes.of(report.rule)[report.verdict] += 1
        if report.outcome in SETTLED:
            self.settled(report.by, report.age_s)
        if report.left is not None:
            self.left.of(report.rule)[report.left.label] += 1
