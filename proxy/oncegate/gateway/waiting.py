"""A duplicate that waits for its original: whether there is room for it, what it keeps meanwhile, how its wait ends."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Final

from oncegate.decision import Decision
from oncegate.downstream.body import Bodies
from oncegate.downstream.request import Request
from oncegate.gateway.answers import Taken, decide_duplicate
from oncegate.gateway.keyed_request import KeyedRequest
from oncegate.store.record import Record
from oncegate.store.waiters import Woken

# Bound once for the request path, as in `decision`.
_IN_FLIGHT: Final = Decision.IN_FLIGHT
# After these the duplicate asks for the key once more.
CLAIMS_AGAIN = (Woken.RECORD_CHANGED, Woken.MAY_CLAIM)


def may_wait(keyed: KeyedRequest, taken: Taken) -> bool:
    """Return whether a duplicate waits for the original whose record it found: only while that is running."""
    # Most records have their response by then.
    if not keyed.wait_s or (isinstance(taken, Record) and taken.response is not None):
        return False
    return decide_duplicate(taken, keyed.claim_request.fingerprint) is _IN_FLIGHT


async def wait_for_original(request: Request, keyed: KeyedRequest, bodies: Bodies, deadline_s: float) -> Woken:
    """Wait until the original has ended, the client has left or `deadline_s` (the loop's time) has passed.

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
    with reads:
        woken = await waiters.wait(
            claim_request.key, claim_request.scope, deadline_s, response.client_leaves(), response.client_half_closed
        )
    if keyed.trace is not None:
        keyed.trace.spent("wait")
    deps.wait_ended(woken.label)
    return woken


def after_wait(taken: Taken, waited_s: float) -> Taken:
    """Return what a duplicate found as of now: its original has been running for so much longer."""
    return replace(taken, now_ms=taken.now_ms + int(waited_s * 1000)) if isinstance(taken, Record) else taken
