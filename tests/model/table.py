"""Every call of a verb on every record that calls can lead to, for two owners and an operator."""

from collections.abc import Iterator

from tests.model import rules
from tests.model.rules import HOLD, HOW, LAPSED, NOBODY, OPERATOR, RESEND, RETRY, UNKNOWN, Done, Record

Call = tuple[object, ...]  # a verb, the record it meets, its arguments; as `rules` takes them
OWNERS, MODES = (1, 2), (HOLD, RETRY)
SHIPPED: rules.Cut = frozenset()


def calls(record: Record) -> Iterator[Call]:
    """Return every call that can meet a record."""
    for me in OWNERS:
        yield "append", record, me
        yield "renew", record, me
        for mode in MODES:
            yield from (("claim", record, me, mode, seen, late) for seen in (NOBODY, *OWNERS) for late in (False, True))
            yield from (("settle", record, me, mode, how) for how in HOW)
        yield from (("claim", record, me, RESEND, seen, late) for seen in OWNERS for late in (False, True))
        for how in ("answer", "release"):
            yield from (("resolve", record, me, how, as_seen) for as_seen in ("", UNKNOWN, LAPSED))
    for token in (*OWNERS, OPERATOR):
        yield "read", record, token
        yield "follow", record, token
        yield from (("drop", record, token, purge) for purge in (False, True))


def apply(call: Call) -> Done:
    """Return what the rules make of a call."""
    verb, *args = call
    return getattr(rules, str(verb))(*args) if verb in ("read", "follow") else getattr(rules, str(verb))(*args, SHIPPED)


def ways() -> dict[Record, tuple[Call, ...]]:
    """Return every record with the calls that lead to it; ("lapse", record) stands for time that passes."""
    found: dict[Record, tuple[Call, ...]] = {Record(): ()}
    front = [Record()]
    for record in front:
        after = {call: apply(call)[1] for call in calls(record)}
        for call, became in {**after, ("lapse", record): record._replace(lease=False)}.items():
            if became not in found:
                found[became] = (*found[record], call)
                front.append(became)
    return found


WAYS = ways()
TABLE: dict[Call, Done] = {call: apply(call) for record in WAYS for call in calls(record)}
