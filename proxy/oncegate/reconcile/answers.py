"""Responses that no API sent for their key: those of an operator, and those of a rule after a probe."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from oncegate.probing.given_head import given_head
from oncegate.probing.plan import Plan
from oncegate.probing.templates import Unfillable
from oncegate.probing.verdicts import Evidence, ProbeAnswer, answered
from oncegate.store.record import StoredResponse

# One chunk in the store: the decision is one command.
MAX_BODY_BYTES = 262144


class GivenResponse(NamedTuple):
    """`stored` has no digest and no time of completion yet; `body` is its whole body."""

    stored: StoredResponse
    body: bytes


def given_response(status: int, headers: Iterable[str], body: bytes) -> GivenResponse | str:
    """Return the response that somebody describes, or why there is none. `headers`: lines `Name: value`."""
    if len(body) > MAX_BODY_BYTES:
        return f"the body has at most {MAX_BODY_BYTES} bytes"
    head = given_head(status, headers, bool(body))
    if isinstance(head, str):
        return head
    stored = StoredResponse(
        status=status,
        reason=head.reason,
        block=head.replayed_block,
        digest=b"",
        chunks=1 if body else 0,
        size=len(body),
        body_stored=True,
        close_delimited=False,
        stated_length=head.bodiless,
        completed_ms=0,
        took_ms=0,
        age_s=0,
    )
    return GivenResponse(stored, body)


def answer_for(
    plan: Plan, values: Mapping[str, str], evidence: Evidence, answer: ProbeAnswer
) -> GivenResponse | Unfillable:
    """Return what duplicates get after a verdict of `conclude` that ends a key."""
    made = answered(plan, evidence.verdict, values, answer)
    if isinstance(made, Unfillable):
        return made
    given = given_response(*made)
    if isinstance(given, str):
        return Unfillable(given)
    return given._replace(stored=replace(given.stored, reconciled=True))
