"""Requests whose client does not wait for the response: `Prefer: respond-async` (RFC 7240, section 4.1).

The exchange is one like any other: claimed, leased, recorded and settled. Once its key is claimed, and its client has
waited for as long as it wanted, the client gets a 202 with a Location, and from then on the response goes to nobody.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from oncegate.decision import Decision, State
from oncegate.downstream.request import Request
from oncegate.gateway.answers import Refuse, decide_duplicate, duplicate_refusal, key_field
from oncegate.gateway.keyed_request import KeyedRequest
from oncegate.gateway.routes import Route
from oncegate.gateway.streams.address import Asked, gone
from oncegate.gateway.streams.key_state import after_s, key_state, send_state
from oncegate.gateway.streams.own import SAFE
from oncegate.gateway.streams.reading import read
from oncegate.keys.digests import key_id
from oncegate.messages.problems import problem
from oncegate.messages.request_head import preferred_wait_s, without_preferences
from oncegate.observe.outcome import Observe, Outcome, RequestReport
from oncegate.store.record import Record
from oncegate.store.results import NotClaimed
from oncegate.store.waiters import Woken
from oncegate.streams import released
from oncegate.streams.capability import LATER
from oncegate.streams.links import ClaimName
from oncegate.streams.released import Released

_ACCEPTED = b"Oncegate-Status: accepted\r\n"
_RELEASED = b"Oncegate-Status: released\r\n"
# What this proxy does about itself: an API that also did it would answer with an address of its own.
_OURS = (b"respond-async", b"wait")

Execute = Callable[[Request, KeyedRequest], Awaitable[RequestReport]]


async def respond_later(
    request: Request,
    keyed: KeyedRequest,
    execute: Execute,
    observe: Observe,
    on_failure: Callable[[BaseException], None],
) -> RequestReport:
    """Execute a request, and answer it with a 202 unless its response has begun by then.

    `observe` takes the report of an exchange that has gone on without its client, `on_failure` what made it fail.
    """
    assert keyed.later is not None
    deps, own = keyed.route.deps, request.twin()
    own.head = without_preferences(request.checked_head(), _OURS)
    ended: asyncio.Future[RequestReport] = asyncio.get_running_loop().create_future()
    began_s = deps.clock()

    async def run() -> None:
        failure: Exception | None = None
        try:
            report = await execute(own, keyed)
        except Exception as error:
            failure, report = error, keyed.report(own, Outcome.FAILED, 500)
        if own.response is not request.response:
            if failure is not None:
                on_failure(failure)
            report.asked, report.trace = own, keyed.trace
            observe(report, deps.clock() - began_s)
        elif failure is not None:
            ended.set_exception(failure)
        else:
            ended.set_result(report)

    deps.background(run())
    # A future that is awaited by itself would be cancelled together with this request.
    await asyncio.wait((keyed.later, ended), return_when=asyncio.FIRST_COMPLETED)
    if (left_s := began_s + keyed.wait_s - deps.clock()) > 0:
        await asyncio.wait((ended,), timeout=left_s)
    if not ended.done() and own.response.started:
        await asyncio.wait((ended,))
    if ended.done():
        return ended.result()
    claim = keyed.later.result()
    request.answer_anew()
    lease_ms, now_ms = claim.lease_ms, claim.created_ms
    return accepted(request, keyed, Record(State.IN_FLIGHT, claim.token, b"", claim.created_ms, now_ms, lease_ms))


def accepted(request: Request, keyed: KeyedRequest, record: Record) -> RequestReport:
    """Answer that a request is executing, and where its response will be. `record`: that of its key."""
    claim, waited = keyed.claim_request, b", wait=%d" % keyed.wait_s if keyed.fields else b""
    name = ClaimName(claim.key, record.token, claim.scope.tenant, record.created_ms)
    _send(request, keyed.route, name, record, b"Preference-Applied: respond-async%b\r\n" % waited)
    return keyed.report(request, Outcome.ACCEPTED, 202)


def _send(request: Request, route: Route, claim: ClaimName, record: Record, fields: bytes) -> None:
    """Send a 202. `fields`: further ones, each line ended."""
    links, deps, outer = route.links, route.deps, request.requester.outer
    assert links is not None
    if route.policy.cancel_grace_s is not None:
        # Whoever has the address comes back. The original's client may not.
        deps.background(deps.cancellations.note_fetched(claim.key, claim.token))
    address, after = links.address(LATER, claim, outer), after_s(deps, record)
    fields += b"%bLocation: %b\r\nRetry-After: %d\r\n" % (_ACCEPTED, address, after)
    fields += links.fields(claim, outer) + key_field(key_id(claim.key).encode())
    send_state(request, 202, key_state(claim.key, record) | {"location": address.decode()}, fields)


# At the Location ...


async def come_for(request: Request, asked: Asked) -> RequestReport:
    """Answer at the Location of a 202: with another one while the request executes, then with its response."""
    found = await _look(asked)
    wait_s = min(preferred_wait_s(asked.head.fields.get(b"prefer", ())) or 0, asked.route.policy.wait_max_s)
    if wait_s and _decide(found) is Decision.IN_FLIGHT:
        if await _wait(request, asked, wait_s) is Woken.CLIENT_LEFT:
            return asked.report(Outcome.CLIENT_GONE, 0)
        found = await _look(asked)
    if isinstance(found, Released | None):
        return asked.refuse(request, gone("gone", "the response is gone") if found is None else _freed(found))
    (_, _, key, token, tenant, _), policy, decision = asked.capability, asked.route.policy, _decide(found)
    if decision is Decision.REPLAY:
        return await read(request, asked)
    if decision is Decision.IN_FLIGHT and isinstance(found, Record):
        _send(request, asked.route, ClaimName(key, token, tenant, found.created_ms), found, SAFE)
        return asked.report(Outcome.ASKED, 202)
    answer = duplicate_refusal(decision, found, policy, asked.route.deps.usual.seconds)
    return asked.refuse(request, replace(answer, fields=answer.fields + SAFE))


async def _look(asked: Asked) -> NotClaimed | Released | None:
    """Return what the store has for the claim of a Location: its record, the note about its release, or nothing."""
    store, capability = asked.route.deps.store, asked.capability
    found = await store.peek(capability.key, capability.scope, asked.route.policy.lease_ms)
    if found is None or (isinstance(found, Record) and found.token != capability.token):
        return await released.read(store.marks, capability.key, capability.token)
    return found


def _decide(found: NotClaimed | Released | None) -> Decision | Outcome:
    """Return what the request itself would get by its record."""
    taken = None if isinstance(found, Released) else found
    return decide_duplicate(taken, taken.fingerprint if isinstance(taken, Record) else b"")


async def _wait(request: Request, asked: Asked, wait_s: float) -> Woken:
    """Wait for the end of a request that executes, as a duplicate of it does."""
    deps, key, response = asked.route.deps, asked.capability.key, request.response
    woken = deps.waiters.refusal(key)
    if woken is None:
        latest_s, leaves = deps.clock() + wait_s, response.client_leaves()
        woken = await deps.waiters.wait(key, asked.capability.scope, latest_s, leaves, response.client_half_closed)
    deps.wait_ended(woken.label)
    if woken is Woken.MAY_CLAIM:
        # Whoever waits here claims nothing: it is the turn of a duplicate.
        deps.waiters.let_one_claim(key)
    return woken


def _freed(note: Released) -> Refuse:
    """Return the answer at the Location of a request that was not executed, so that its record is gone."""
    said = f"the API answered {note.status}, by which it says that it executed nothing"
    members = {"original_status": note.status} if note.status else {}
    detail = f"{said if note.status else 'nothing was sent'}; its key is free, so that it can be sent again"
    after = b"Retry-After: %b\r\n" % note.retry_after if note.retry_after else b""
    return Refuse(problem("key-released", detail, **members), _RELEASED + SAFE + after)
