"""Oncegate's own responses: every refusal that a client gets is a value made here, and is sent here."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import formatdate
from typing import NamedTuple, assert_never

from oncegate.decision import CANCELLED, HOLD, RETRY, Decision, decide, effective_state, retry_after_s
from oncegate.downstream.body import BrokenOff, NoBody, NoRoom, TooLarge
from oncegate.downstream.request import Request
from oncegate.keys.digests import UnstableScope
from oncegate.keys.documents import Missing
from oncegate.keys.syntax import BadKey
from oncegate.messages.admission import Refused
from oncegate.messages.framing import COUNTED
from oncegate.messages.problems import Problem, as_problem_json, problem, refusal
from oncegate.observe.labels import UnguardedKey
from oncegate.observe.outcome import Outcome, RequestReport, outcome_of
from oncegate.rules.policy import Policy
from oncegate.store.record import Corrupt, Record
from oncegate.store.results import ClaimsSuspended, Unconfirmed

# What became of the request's key, for the client.
REFUSED = b"Oncegate-Status: refused\r\n"
UNKNOWN = b"Oncegate-Status: unknown\r\n"
UNGUARDED = b"Oncegate-Status: unguarded\r\n"
# An Item of RFC 9651 with a parameter, so that the word can be read alone.
UNGUARDED_KEY = {one: b"Oncegate-Status: unguarded; reason=%s\r\n" % one.label.encode() for one in UnguardedKey}
MAYBE = "the request may have been executed"
# SDKs show it to people. Advice for programs is in the other members and in the header.
RUNNING = "the first request with this key is still running"

# What the store has for a key that another request claimed; None: the record vanished.
Taken = Record | Corrupt | Unconfirmed | None


@dataclass(frozen=True, slots=True)
class Refuse:
    """A response of oncegate itself. `fields` are further header fields, each line ended.

    `closes`: no other request is taken on the connection. `outcome` is reported instead of the problem's own.
    """

    problem: Problem
    fields: bytes = REFUSED
    closes: bool = False
    rule: str = ""
    outcome: Outcome | None = None


def send(request: Request, answer: Refuse) -> None:
    """Send a response of oncegate itself, as the request's client reads it."""
    fields = answer.fields + request.id_line
    if request.adaptation.cors is not None:
        fields += request.requester.own_fields()
    render = request.render or as_problem_json
    request.response.send_problem(answer.problem, fields, close=answer.closes, render=render)


def refuse(request: Request, answer: Refuse) -> RequestReport:
    """Send a response of oncegate itself, and return the request's report."""
    send(request, answer)
    outcome = answer.outcome or outcome_of(answer.problem)
    status = 0 if outcome is Outcome.CLIENT_GONE else answer.problem.status
    return RequestReport(outcome, status, request.message.method, reason=answer.problem.detail, rule=answer.rule)


class AnswerOptions(NamedTuple):
    """Answer an OPTIONS request that is not to be forwarded any further (RFC 9110, section 7.6.2)."""


def answer_options(request: Request) -> RequestReport:
    """Say that the way to here works. What the API serves is not known here."""
    request.response.send(
        200, b"OK", b"Date: %s\r\n%s" % (formatdate(usegmt=True).encode(), request.id_line), b"", COUNTED
    )
    return RequestReport(Outcome.PASSTHROUGH, 200, request.message.method)


# Before the claim ...


def malformed(refused: Refused) -> Refuse:
    """Return the answer to a request that did not pass the checks of admission."""
    return Refuse(refusal(refused.status, refused.detail), closes=True)


def overloaded() -> Refuse:
    """Return the answer to a request for which there is no room now."""
    return Refuse(problem("overloaded", "too many requests in flight"))


def scope_refusal(reason: UnstableScope | BadKey, rule: str) -> Refuse:
    """Return the answer to a request whose tenant cannot be named."""
    if isinstance(reason, BadKey):
        return Refuse(problem("key-invalid", f"the scope cannot be read: {reason.detail}"), rule=rule)
    detail = "the operator has to name the scheme of Authorization as stable, or a header that is the same in a retry"
    return Refuse(problem("scope-unstable", detail), rule=rule)


def key_refusal(reason: Missing | BadKey, rule: str) -> Refuse:
    """Return the answer to a request that has no key, or none that can be used."""
    slug = "key-missing" if isinstance(reason, Missing) else "key-invalid"
    return Refuse(problem(slug, reason.detail), rule=rule)


def body_refusal(reason: NoBody, *, client_gone: bool = False) -> Refuse:
    """Return the answer to a request without a whole body. Its connection cannot be used any more."""
    match reason:
        case TooLarge():
            return Refuse(problem("body-too-large", "send a smaller body"), closes=True)
        case NoRoom():
            return Refuse(problem("overloaded", "no room for the body"), closes=True)
        case BrokenOff(stalled=True):
            return Refuse(refusal(408, "the body paused for too long"), closes=True)
        case BrokenOff():
            outcome = Outcome.CLIENT_GONE if client_gone else None
            return Refuse(refusal(400, "the body is not well-formed"), closes=True, outcome=outcome)
        case _:
            assert_never(reason)


# Duplicates ...


def decide_duplicate(taken: Taken, fingerprint: bytes) -> Decision | Outcome:
    """Return what a duplicate gets, or the outcome where the record cannot be decided on."""
    match taken:
        case Record():
            is_same = taken.fingerprint == fingerprint
            has_body = taken.response is not None and taken.response.body_stored
            return decide(effective_state(taken.state, taken.lease_left_ms), is_same, has_body)
        case Corrupt():
            return Outcome.RECORD_CORRUPT
        case Unconfirmed():
            return Outcome.STORE_UNAVAILABLE
        case None:
            return Decision.OUTCOME_UNKNOWN
        case _:
            assert_never(taken)


def duplicate_refusal(decision: Decision | Outcome, taken: Taken, policy: Policy, usually_s: float) -> Refuse:
    """Return the answer to a duplicate that gets no stored response. `usually_s`: how long such requests take."""
    match decision:
        case Decision.KEY_REUSED:
            return Refuse(problem("key-reused", "use a new key for a new request"))
        case Decision.IN_FLIGHT if isinstance(taken, Record):
            after_s = retry_after_s(_running_s(taken), usually_s)
            return Refuse(problem("in-flight", RUNNING, after_s).with_status(policy.in_flight_status))
        case Decision.RESPONSE_NOT_KEPT if isinstance(taken, Record) and taken.response is not None:
            detail = "it was executed; its response was too large to store"
            return Refuse(problem("response-not-kept", detail, original_status=taken.response.status))
        case Decision.KEY_EXPIRED if isinstance(taken, Record):
            executed = _iso_time(taken.created_ms)
            detail = f"it was executed at {executed}; its response is no longer stored"
            return Refuse(problem("key-expired", detail, executed_at=executed, **_original(taken.status)))
        case Outcome.RECORD_CORRUPT:
            return record_corrupt()
        case Outcome.STORE_UNAVAILABLE:
            after = taken.retry_after_s if isinstance(taken, ClaimsSuspended) else None
            return store_silent(after)
        case Decision.OUTCOME_UNKNOWN if isinstance(taken, Record) and taken.mode == CANCELLED:
            return cancelled(taken.status)
        case _:
            status = taken.status if isinstance(taken, Record) else 0
            doubt = f"a response with status {status} came, which does not tell the outcome" if status else MAYBE
            detail = f"{doubt}; check the API's own data before you use a new key"
            return Refuse(problem("outcome-unknown", detail, **_original(status)), UNKNOWN)


def is_asked_about(answer: Refuse, after_s: int) -> Refuse:
    """Return the answer about an unknown outcome where the API is asked about it. `after_s`: when there may be more."""
    problem = answer.problem.for_mode(RETRY)
    detail = f"{MAYBE}; oncegate asks the API what became of it, and a retry with this key gets that"
    return replace(answer, problem=replace(problem, detail=detail, retry_after_s=after_s))


def record_corrupt() -> Refuse:
    """Return the answer to who needs a record that cannot be believed."""
    return Refuse(problem("record-corrupt", "ask the operator to inspect this key"))


def no_body_to_join(status: int) -> Refuse:
    """Return the answer to a duplicate whose original has begun a response that cannot be stored.

    `status`: of that response; 0 where it is not known.
    """
    return Refuse(problem("response-not-kept", f"{RUNNING}; its response cannot be stored", **_original(status)))


def store_silent(after_s: int | None = None) -> Refuse:
    """Return the answer to a duplicate while the store says nothing about its key; `after_s`: until it may."""
    return Refuse(problem("store-unavailable", "the store cannot say now what became of this key", after_s))


def original_declined(taken: Taken, policy: Policy) -> Refuse:
    """Return the answer to a duplicate whose original ended while it waited, without a result and with a free key.

    It does not execute in its place: a burst of requests must not follow a 429 (docs/decisions/002). For the same
    reason its client is to come no sooner than after the time that the original took.
    """
    detail = "the first request with this key has ended without a response that is stored"
    after_s = retry_after_s(_running_s(taken), 0.0) if isinstance(taken, Record) else 1
    return Refuse(problem("in-flight", detail, after_s).with_status(policy.in_flight_status))


def _iso_time(ms: int) -> str:
    """Return a time as RFC 3339 has it, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _running_s(record: Record) -> float:
    """Return for how long a record's request had been running when the record was read."""
    return (record.now_ms - record.created_ms) / 1000


def key_field(key_id: bytes) -> bytes:
    """Return the field that tells a client the id of its key, its line ended."""
    return b"Oncegate-Key-Id: %b\r\n" % key_id


def with_key(answer: Refuse, key_id: bytes, key: str | None, fields: bytes) -> Refuse:
    """Return the answer to a request with a key, which names it: by its id, and as the client wrote it; None: it is not
    to be shown. `fields` are further header fields."""
    members = {"instance": f"urn:oncegate:key:{key_id.decode()}"} | ({} if key is None else {"key": key})
    own = answer.fields + fields + key_field(key_id)
    return replace(answer, problem=answer.problem.with_members(**members), fields=own)


# After the claim ...


def not_sent(reason: str, fields: bytes = REFUSED) -> Refuse:
    """Return the answer to a request of which the upstream has read nothing."""
    return Refuse(problem("upstream-unreachable", reason), fields)


def not_confirmed() -> Refuse:
    """Return the answer to a request whose claim was no longer certain when it was about to be sent."""
    return Refuse(problem("store-unavailable", "the claim could not be confirmed before sending"))


def upstream_lost(*, timeout: bool, mode: bytes = HOLD, fields: bytes = UNKNOWN, status: int = 0) -> Refuse:
    """Return the answer to a request that was sent and got no whole response.

    `mode` is its key's. `status`: of a response that came and is not whole or cannot be passed on; 0 for none.
    """
    slug = "upstream-timeout" if timeout else "upstream-lost"
    lack = "its end did not come in time" if timeout else "it is not whole, or not well-formed"
    nothing = "no response came in time" if timeout else "no whole response came"
    subject = f"a response with status {status} came, but {lack}" if status else nothing
    lost = problem(slug, f"{subject}; {MAYBE}", **_original(status))
    return Refuse(lost.for_mode(mode), fields)


def _original(status: int) -> dict[str, int]:
    """Return the member of a problem for the status of a response which does not tell the outcome; 0 for none."""
    return {"original_status": status} if status else {}


def cancelled(status: int = 0) -> Refuse:
    """Return the answer to a request that was cancelled, and to its duplicates.

    `status`: of a response that came and is not whole; 0 for none.
    """
    detail = f"it was stopped, so that it is not sent again; {MAYBE}"
    unknown = problem("outcome-unknown", detail, reason="cancelled", **_original(status))
    return Refuse(unknown, UNKNOWN, outcome=Outcome.CANCELLED)


def response_not_stored() -> Refuse:
    """Return the answer to a request whose response the store did not confirm."""
    detail = "the request was executed, but its response is not stored yet; a later try shows what became of it"
    return Refuse(problem("answer-not-stored", detail), UNKNOWN)


def failed(fields: bytes) -> Refuse:
    """Return the answer to a request on which oncegate itself failed; `fields` say what became of its key."""
    return Refuse(refusal(500, "see the log"), fields, closes=True, outcome=Outcome.FAILED)
