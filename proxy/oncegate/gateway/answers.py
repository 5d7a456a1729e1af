"""What a request is told that is neither executed nor replayed: refused at the door, or a duplicate."""

from typing import assert_never

from oncegate.decision import Decision, decide, effective_state, retry_after_s
from oncegate.downstream.body import BrokenOff, NoRoom, TooLarge
from oncegate.downstream.response import ResponseWriter
from oncegate.keys.digests import UnstableScope
from oncegate.keys.syntax import BadKey
from oncegate.messages.admission import Refused
from oncegate.messages.problems import Problem, problem, refusal
from oncegate.observe.outcome import BY_LABEL, Outcome, RequestReport
from oncegate.rules.policy import Policy
from oncegate.store.record import Corrupt, Record
from oncegate.store.results import ClaimsSuspended, Unconfirmed

REFUSED = b"Oncegate-Status: refused\r\n"
UNKNOWN = b"Oncegate-Status: unknown\r\n"


def no_scope(why: UnstableScope | BadKey) -> Problem:
    """Return what a request is told whose tenant cannot be named."""
    if isinstance(why, BadKey):
        return problem("key-invalid", f"what tells tenants apart cannot be used: {why.detail}")
    return problem("scope-unstable", "name a header that stays the same from try to try as the scope")


def judge(found: Record | Corrupt | Unconfirmed | None, fingerprint: bytes) -> Decision | Outcome:
    """Return what is to be done with what was found, or the outcome where that cannot be decided."""
    match found:
        case Record():
            same = found.fingerprint == fingerprint
            kept = found.answer is not None and found.answer.kept
            return decide(effective_state(found.state, found.lease_left_ms), same, kept)
        case Corrupt():
            return Outcome.RECORD_CORRUPT
        case Unconfirmed():
            return Outcome.STORE_UNAVAILABLE
        case None:
            return Decision.OUTCOME_UNKNOWN
        case _:
            assert_never(found)


def explain(decision: Decision | Outcome, found: Record | Corrupt | Unconfirmed | None, policy: Policy) -> Problem:
    """Return what a duplicate is told that gets no answer from the store; its code is the label of the outcome."""
    match decision:
        case Decision.KEY_REUSED:
            return problem("key-reused", "use a new key for a new request")
        case Decision.IN_FLIGHT if isinstance(found, Record):
            after_s = retry_after_s(found.now_ms - found.created_ms, policy.lease_ms)
            detail = "come again with the same key"
            return problem("in-flight", detail, after_s).with_status(policy.in_flight_status)
        case Decision.RESPONSE_NOT_KEPT if isinstance(found, Record) and found.answer is not None:
            detail = "it was executed; its answer was too large to be kept"
            return problem("response-not-kept", detail, original_status=found.answer.status)
        case Outcome.RECORD_CORRUPT:
            return problem("record-corrupt", "the operator has to look at this key")
        case Outcome.STORE_UNAVAILABLE:
            after = found.retry_after_s if isinstance(found, ClaimsSuspended) else None
            return problem("store-unavailable", "come again with the same key", after)
        case _:
            detail = "it was sent, and nobody can say what became of it; look there before you try again"
            return problem("outcome-unknown", detail)


def refuse(client: ResponseWriter, method: str, refused: Refused) -> RequestReport:
    """Answer a request that goes no further, and take no other on its connection."""
    client.answer(refusal(refused.status, refused.detail), REFUSED, close=True)
    return RequestReport(Outcome.REQUEST_REFUSED, refused.status, method)


def reject(client: ResponseWriter, method: str, answer: Problem) -> RequestReport:
    """Answer a request that goes no further."""
    client.answer(answer, REFUSED)
    return RequestReport(BY_LABEL[answer.code], answer.status, method)


def overloaded(client: ResponseWriter, method: str) -> RequestReport:
    """Answer a request for which there is no room now."""
    return reject(client, method, problem("overloaded", "too many requests in flight"))


def no_body(client: ResponseWriter, method: str, why: TooLarge | NoRoom | BrokenOff) -> RequestReport:
    """Answer a request whose body is not to be had. The connection cannot be used any more."""
    match why:
        case TooLarge():
            client.answer(problem("body-too-large", "send less"), REFUSED, close=True)
            return RequestReport(Outcome.BODY_TOO_LARGE, 413, method)
        case NoRoom():
            client.answer(problem("overloaded", "no room for the body"), REFUSED, close=True)
            return RequestReport(Outcome.OVERLOADED, 503, method)
        case BrokenOff(stalled=True):
            client.answer(refusal(408, "the body paused for too long"), REFUSED, close=True)
            return RequestReport(Outcome.REQUEST_REFUSED, 408, method)
        case BrokenOff() if client.gone:
            return RequestReport(Outcome.CLIENT_GONE, 0, method)
        case BrokenOff():
            client.answer(refusal(400, "the body is not well-formed"), REFUSED, close=True)
            return RequestReport(Outcome.REQUEST_REFUSED, 400, method)
        case _:
            assert_never(why)
