"""A duplicate: how it waits for its original, and what it gets by the record that it finds.

A wait ends in one of several ways (`Woken`); a duplicate that joins a running original is in `streams/join.py`. Where a
rule says how the API is asked about unknown keys, a duplicate of one waits for the verdict, within the same time.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import ceil
from typing import Final

from oncegate.decision import HOLD, MAX_RETRY_AFTER_S, Decision, State
from oncegate.downstream.body import Bodies
from oncegate.downstream.request import Request
from oncegate.gateway.answers import Refuse, Taken, decide_duplicate, duplicate_refusal, is_asked_about, send
from oncegate.gateway.keyed_request import KeyedRequest
from oncegate.gateway.replay import Replay, replay_decoded, replay_large, replay_small
from oncegate.gateway.streams.later import accepted
from oncegate.observe.outcome import Outcome, RequestReport, outcome_of
from oncegate.observe.usage import UsageReader, usage_reader
from oncegate.store.kept import unpack_kept
from oncegate.store.record import Record, StoredResponse
from oncegate.store.results import Unconfirmed
from oncegate.store.waiters import Woken

# Bound once for the request path, as in `decision`.
_IN_FLIGHT: Final = Decision.IN_FLIGHT
_REPLAY: Final = Decision.REPLAY
_REPLAYED: Final = Outcome.REPLAYED
_RECONCILED: Final = Outcome.RECONCILED
_UNKNOWN: Final = Decision.OUTCOME_UNKNOWN
# After these the duplicate asks for the key once more.
CLAIMS_AGAIN = (Woken.RECORD_CHANGED, Woken.HEAD_CAME, Woken.STORE_SILENT, Woken.MAY_CLAIM)


def waits_for_original(keyed: KeyedRequest, taken: Taken) -> bool:
    """Return whether a duplicate waits for the original whose record it found, or joins it: while that is running.

    It also waits for a verdict about one whose outcome is unknown.
    """
    # Most records have their response by then.
    if isinstance(taken, Record) and taken.response is not None:
        return False
    if not keyed.wait_s and keyed.join_fields is None:
        return False
    decision = decide_duplicate(taken, keyed.claim_request.fingerprint)
    return decision is _IN_FLIGHT or (keyed.wait_s > 0 and decision is _UNKNOWN and _may_be_settled(keyed, taken))


def _may_be_settled(keyed: KeyedRequest, taken: Taken) -> bool:
    """Return whether the API is asked about a record whose outcome is unknown: not where its user stopped it."""
    return isinstance(taken, Record) and taken.mode == HOLD and keyed.route.deps.verdicts is not None


async def wait_for_original(
    request: Request, keyed: KeyedRequest, taken: Taken, bodies: Bodies, deadline_s: float, joins: bytes = b""
) -> Woken:
    """Wait until the original has ended, the client has left or `deadline_s` (the loop's time) has passed.

    `joins`: the token of an original whose response this one joins, once that begins; empty: it waits for the end.
    Where the outcome is unknown, it waits for that to change, and meanwhile this worker asks the API when that is due.

    A wait costs little: polls have a limit of their own (`store/waiters`), and the body leaves the memory. It is
    kept in the spool because the request may still have to be executed, if its original was not.
    """
    claim_request, response, deps = keyed.claim_request, request.response, keyed.route.deps
    waiters, grace_s = deps.waiters, keyed.route.policy.cancel_grace_s
    reads: AbstractContextManager[None] = nullcontext()
    if grace_s is not None:
        reads = deps.cancellations.readers.waiting(claim_request.key, grace_s, response.reader_has_left)
    refused = waiters.refusal(claim_request.key)
    if refused is None and not bodies.set_aside(keyed.body):
        refused = Woken.NO_ROOM_FOR_BODY
    if refused is not None:
        deps.wait_ended(refused.label)
        return refused
    if keyed.trace is not None:
        keyed.trace.spent("claim")
    found, verdicts = State.IN_FLIGHT, deps.verdicts
    if verdicts is not None and decide_duplicate(taken, claim_request.fingerprint) is _UNKNOWN:
        found = State.UNKNOWN
        verdicts.want(claim_request.key, deadline_s)
    with reads:
        woken = await waiters.wait(
            claim_request.key,
            claim_request.scope,
            deadline_s,
            response.client_leaves(),
            response.client_half_closed,
            joins,
            found,
        )
    if keyed.trace is not None:
        keyed.trace.spent("wait")
    deps.wait_ended(woken.label)
    return woken


def after_wait(taken: Taken, waited_s: float) -> Taken:
    """Return what a duplicate found as of now: its original has been running for so much longer."""
    return replace(taken, now_ms=taken.now_ms + int(waited_s * 1000)) if isinstance(taken, Record) else taken


# What it gets ...


async def answer_duplicate(request: Request, keyed: KeyedRequest, taken: Taken) -> RequestReport:
    """Answer a request whose key is taken, by what the store has for it."""
    if keyed.trace is not None:
        keyed.trace.met(unpack_kept(taken.kept).trace if isinstance(taken, Record) else b"")
    decision = decide_duplicate(taken, keyed.claim_request.fingerprint)
    if decision is _REPLAY and isinstance(taken, Record) and (stored := taken.response) is not None:
        response, store = request.response, keyed.route.deps.store
        usage = usage_reader(stored.status, stored.block, stored.size) if keyed.route.policy.counts_tokens else None
        fields = keyed.fields + keyed.own_fields(request, taken.token, taken.created_ms)
        replay = Replay(keyed.claim_request.key, taken, stored, fields, request, keyed.caller, usage)
        if coding := replay.coding():
            outcome = await replay_decoded(response, store, replay, coding)
        elif taken.body is not None or stored.size == 0:
            # A small body came with the record.
            outcome = replay_small(response, replay)
        else:
            outcome = await replay_large(response, store, replay)
        if outcome is _REPLAYED:
            return _replay_report(request, keyed, stored, usage)
        if response.started:
            return keyed.report(request, outcome, stored.status)
        # Nothing was sent, because the record is corrupt or unreadable.
        decision = outcome
    if decision is _IN_FLIGHT and keyed.later is not None and isinstance(taken, Record):
        return accepted(request, keyed, taken)
    answer = duplicate_refusal(decision, taken, keyed.route.policy, keyed.route.deps.usual.seconds)
    if decision is _UNKNOWN and _may_be_settled(keyed, taken) and isinstance(taken, Record):
        answer = await _until_asked(keyed, taken, answer)
    if decision is _IN_FLIGHT and isinstance(taken, Record):
        answer = replace(answer, fields=answer.fields + keyed.link_fields(request, taken.token, taken.created_ms))
    return refuse_keyed(request, keyed, answer, taken.reason if isinstance(taken, Unconfirmed) else "")


async def _until_asked(keyed: KeyedRequest, taken: Record, answer: Refuse) -> Refuse:
    """Return the answer to a duplicate that does not wait for a verdict: when to come back, while there may be one."""
    verdicts, key = keyed.route.deps.verdicts, keyed.claim_request.key
    next_s = await verdicts.next_s(key, taken.token, keyed.route.policy.rule) if verdicts is not None else None
    if next_s is None:
        return answer
    return is_asked_about(answer, max(1, min(ceil(next_s), MAX_RETRY_AFTER_S)))


def refuse_keyed(request: Request, keyed: KeyedRequest, answer: Refuse, reason: str = "") -> RequestReport:
    """Send an answer of oncegate's own to a request whose key is known."""
    send(request, keyed.named(request, answer, keyed.fields))
    return keyed.report(request, outcome_of(answer.problem), answer.problem.status, reason)


def _replay_report(
    request: Request, keyed: KeyedRequest, stored: StoredResponse, usage: UsageReader | None
) -> RequestReport:
    """Return the report of a request that got a stored response."""
    route, claim = keyed.route, keyed.claim_request
    tokens = None if usage is None else usage.tokens()
    # Positions, not names: arguments by name cost 4,000 instructions more (Python 3.11, measured).
    outcome = _RECONCILED if stored.reconciled else _REPLAYED
    return RequestReport(
        outcome, stored.status, request.message.method, claim.key, 0.0, stored.took_ms / 1000, stored.size,
        claim.scope.without_credential, "", route.policy.rule, tokens, (), False, None, None, route.upstream,
    )  # fmt: skip
