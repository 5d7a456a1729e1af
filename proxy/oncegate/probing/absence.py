"""When "not found" frees an unknown key, and what any verdict does with one. Pure."""

from enum import Enum
from typing import NamedTuple

from oncegate.decision import Verdict


class Absence(NamedTuple):
    """When "not found" frees a key. It says three things: never executed, not indexed yet, or forgotten already.

    It counts from `after_ms` after the last byte that may have been sent, while the claim is younger than `before_ms`,
    and once `agree` answers in a row have said so.
    """

    after_ms: int
    before_ms: int
    agree: int

    def counts(self, silent_ms: int, age_ms: int) -> bool:
        """Return whether an absence counts. `silent_ms`: since the last byte, when the question was asked. `age_ms`:
        since the first claim, when its answer had come."""
        return silent_ms >= self.after_ms and age_ms < self.before_ms


class Conclusion(Enum):
    """What a verdict does with an unknown key."""

    COMPLETE = "complete"
    FREE = "free"
    ASK_AGAIN = "ask_again"


def conclusion(verdict: Verdict, agreed: int, absence: Absence) -> Conclusion:
    """Return what a verdict does. `agreed`: how many answers in a row said absent and count, this one among them."""
    if verdict is Verdict.SUCCEEDED or verdict is Verdict.FAILED:
        return Conclusion.COMPLETE
    is_free = verdict is Verdict.ABSENT and agreed >= max(1, absence.agree)
    return Conclusion.FREE if is_free else Conclusion.ASK_AGAIN
