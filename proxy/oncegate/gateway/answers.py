"""What a request is told that is neither executed nor replayed: refused at the door, or a duplicate."""

from typing import assert_never

from oncegate.decision import Decision, decide, retry_after_s, state_now
from oncegate.downstream.body import BrokenOff, NoRoom, TooLarge
from oncegate.downstream.response import ResponseWriter
from oncegate.keys.digests import UnstableScope
from oncegate.keys.syntax import BadKey
from oncegate.messages.admission import Refused
from oncegate.messages.problems import Problem, problem, refusal
from oncegate.observe.outcome import Outcome
from oncegate.rules.policy import Policy
from oncegate.store.record import Corrupt, Record
from oncegate.store.redis.health_monitor import ClaimsSuspended
from oncegate.store.redis.link import Unconfirmed

REFUSED = b"Oncegate-Status: refused\r\n"
UNKNOWN = b"Oncegate-Status: unknown\r\n"


def no_scope(why: UnstableScope | BadKey) -> Problem:
    """Return what a request is told whose tenant cannot be named."""
    if isinstance(why, BadKey):
        return problem("key-invalid", f"what tells tenants apart cannot be used: {why.detail}")
    return problem("scope-unstable", "name a header that stays the same from try to try as the scope")


def judge(found: Record | Corrupt | Unconfirmed | None, fingerprint: bytes) -> Decision | str:
    """Return what is to be done with what was found, or the word for what cannot be decided on."""
    match found:
        case Record():
            same = found.fingerprint == fingerprint
            kept = found.answer is not None and found.answer.kept
            return decide(state_now(found.state, found.lease_left_ms), same, kept)
        case Corrupt():
            return "corrupt"
        case Unconfirmed():
            return "store_unavailable"
        case None:
            return Decision.UNKNOWN
        case _:
            assert_never(found)


def explain(
    decision: Decision | str, found: Record | Corrupt | Unconfirmed | None, policy: Policy
) -> tuple[str, Problem]:
    """Return the outcome's word for a duplicate that gets no answer from the store, and what it is told."""
    match decision:
        case Decision.MISMATCH:
            return "mismatch", problem("key-reused", "use a new key for a new request")
        case Decision.IN_FLIGHT if isinstance(found, Record):
            after_s = retry_after_s(found.now_ms - found.created_ms, policy.lease_ms)
            detail = "come again with the same key"
            return "in_flight", problem("in-flight", detail, after_s, status=policy.in_flight_status)
        case Decision.NOT_KEPT if isinstance(found, Record) and found.answer is not None:
            detail = "it was executed; its answer was too large to be kept"
            return "not_kept", problem("response-not-kept", detail, original_status=found.answer.status)
        case "corrupt":
            return "corrupt", problem("record-corrupt", "the operator has to look at this key")
        case "store_unavailable":
            after = found.retry_after_s if isinstance(found, ClaimsSuspended) else None
            return "store_unavailable", problem("store-unavailable", "come again with the same key", after)
        case _:
            detail = "it was sent, and nobody can say what became of it; look there before you try again"
            return "unknown", problem("outcome-unknown", detail)


def refuse(client: ResponseWriter, method: str, refused: Refused) -> Outcome:
    """Answer a request that goes no further, and take no other on its connection."""
    client.answer(refusal(refused.status, refused.detail), REFUSED, close=True)
    return Outcome("invalid", refused.status, method)


def reject(client: ResponseWriter, method: str, word: str, answer: Problem) -> Outcome:
    """Answer a request that goes no further."""
    client.answer(answer, REFUSED)
    return Outcome(word, answer.status, method)


def overloaded(client: ResponseWriter, method: str) -> Outcome:
    """Answer a request for which there is no room now."""
    return reject(client, method, "overloaded", problem("overloaded", "too many requests in flight"))


def no_body(client: ResponseWriter, method: str, why: TooLarge | NoRoom | BrokenOff) -> Outcome:
    """Answer a request whose body is not to be had. The connection cannot be used any more."""
    match why:
        case TooLarge():
            client.answer(problem("body-too-large", "send less"), REFUSED, close=True)
            return Outcome("too_large", 413, method)
        case NoRoom():
            client.answer(problem("overloaded", "no room for the body"), REFUSED, close=True)
            return Outcome("overloaded", 503, method)
        case BrokenOff(stalled=True):
            client.answer(refusal(408, "the body paused for too long"), REFUSED, close=True)
            return Outcome("invalid", 408, method)
        case BrokenOff() if client.gone:
            return Outcome("client_gone", 0, method)
        case BrokenOff():
            client.answer(refusal(400, "the body is not well-formed"), REFUSED, close=True)
            return Outcome("invalid", 400, method)
        case _:
            assert_never(why)
