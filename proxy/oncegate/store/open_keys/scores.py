"""The scores of open keys in an index: what each is, and since when, as one number. Pure.

The score of a key in flight is the end of its lease, as of the claim or the last renewal; of an unknown one the time of
its claim, less 10^13 or twice that: so the kinds of open keys are ranges of scores, and in each the oldest comes first.
"""

from oncegate.decision import HOLD
from oncegate.store.record_view import OpenKind, RecordView

# Scores of unknown keys that somebody has to decide are less than 0; of those that nobody has to, less than -BAND_MS.
BAND_MS = 10**13


def score_of(kind: OpenKind, since_ms: int) -> int:
    """Return the score of an open key of this kind and age."""
    return since_ms - {OpenKind.UNKNOWN: BAND_MS, OpenKind.WAIVED: 2 * BAND_MS}.get(kind, 0)


def score_of_record(record: RecordView) -> int | None:
    """Return the score that a record should have, None for one that is not open."""
    return None if record.open_kind is None else score_of(record.open_kind, record.since_ms)


def score_of_unknown(mode: bytes, created_ms: int) -> int:
    """Return the score of a key whose outcome is unknown in this mode."""
    return score_of(OpenKind.UNKNOWN if mode == HOLD else OpenKind.WAIVED, created_ms)


def since_of(score: int) -> int:
    """Return the time in a score: the `since_ms` of its record."""
    return score + BAND_MS * -(score // BAND_MS) if score < 0 else score


def range_of(kind: OpenKind, now_ms: int) -> tuple[int, int]:
    """Return the least and the greatest score of a kind."""
    return {
        OpenKind.WAIVED: (-2 * BAND_MS, -BAND_MS - 1),
        OpenKind.UNKNOWN: (-BAND_MS, -1),
        OpenKind.LAPSED: (0, now_ms),
        OpenKind.IN_FLIGHT: (now_ms + 1, BAND_MS),
    }[kind]
