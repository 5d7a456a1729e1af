"""The tries of a claim, and the withdrawal of claims that nobody holds.

A claim is repeated with the same token, so that a repeat finds its own record and takes it over. No claim may take its
key after the caller was told otherwise, though a try whose reply was lost may reach the store at any later time:

- every try carries a deadline in the server's own time, after which the script takes no key;
- a claim that may have been executed, and that nobody holds, is released in the background once its deadline is over.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final

from oncegate.decision import State, effective_state, is_past, may_take_over
from oncegate.store.health.breaker import Breaker
from oncegate.store.kept import resending
from oncegate.store.record import Claim, Corrupt, Record
from oncegate.store.record_name import store_key
from oncegate.store.redis import arguments
from oncegate.store.redis.durable import WAIT_SHARE
from oncegate.store.redis.membership import WrittenLayout
from oncegate.store.redis.replies import LATE, claim_result, is_noscript
from oncegate.store.redis.topologies.topology import StoreServers
from oncegate.store.redis.wire import Script, ScriptCall
from oncegate.store.results import (
    ClaimResult,
    ClaimsSuspended,
    Forbidden,
    NotAttempted,
    NotClaimed,
    SettleResult,
    SettleStatus,
    StoreFull,
    Unconfirmed,
    UnderReplicated,
)
from oncegate.store.store import Background

# The pauses between the tries of one call, which double from the first to the longest.
MIN_PAUSE_S, MAX_PAUSE_S = 0.01, 0.5
# The share of the timeout for reading what is known of a key that could not be claimed.
READ_SHARE = 0.5
# Bound once for the request path, as in `decision`.
_COMPLETE: Final = State.COMPLETE

Release = Callable[[Claim, float], Coroutine[Any, Any, SettleResult]]


class Claims:
    """Claims keys at the servers of a store.

    `timeout_s`: how long a claim may take. `patience_s`: how long one try of a withdrawal may take.
    `release(claim, patience_s)` frees a key. `background(work)` finishes work that nobody waits for. `layout`: of the
    records of claims.
    """

    def __init__(
        self,
        servers: StoreServers,
        script: Script,
        release: Release,
        background: Background,
        *,
        layout: WrittenLayout,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        self._servers, self._script, self._release, self._background = servers, script, release, background
        self._layout, self._timeout_s, self._patience_s = layout, timeout_s, patience_s
        # What a claim that waited for replicas in vain keeps for its release.
        self._release_s = timeout_s * (1 - WAIT_SHARE)
        self._loop = asyncio.get_running_loop()
        # The loop's time after which no call is repeated, of a claim or of any other verb.
        self.retries_end = float("inf")
        # The breakers of servers where a claim has failed since one last succeeded.
        self._failing_breakers: set[Breaker] = set()
        # Tokens of claims that are being withdrawn: they may be in the store though nobody holds them.
        self._withdrawn_tokens: set[bytes] = set()
        # Tokens of held claims of which another copy may still reach the store.
        self._tokens_with_late_copies: set[bytes] = set()

    def stop_retrying(self) -> None:
        """Repeat no call from now on."""
        self.retries_end = self._loop.time()

    async def run(self, claim: Claim, tenant: bytes, window_ms: int = 0, reclaims: bool = False) -> ClaimResult:
        """Try with the claim's token until the store replies, or the time is over.

        `window_ms`: see ClaimRequest. `reclaims`: the key is this claim's already, so it is not freed after a failure.
        """
        loop, servers, left_s = self._loop, self._servers, self._timeout_s
        deadline, pause_s = loop.time() + left_s, MIN_PAUSE_S
        call = ScriptCall(self._script, store_key(claim.key), arguments.CLAIM_COUNT, deadline, False, False, claim)
        head = arguments.claim_head(claim)
        packed = self._layout.packed
        tail = arguments.claim_tail(packed, window_ms, b"") if window_ms else arguments.FIRST_TAIL[packed]
        expected, resends, is_under_replicated, maybe_executed = b"", False, False, False
        try:
            while True:
                reply = await servers.claim(call, head, tail, left_s)
                if not isinstance(reply, list) and is_noscript(reply):
                    reply = await servers.claim(replace(call, by_body=True), head, tail, left_s)
                result = claim_result(claim, tenant, reply, servers.note_time)
                # Any reply relieves the breaker, also that the claim came too late.
                if self._failing_breakers and (result is LATE or not isinstance(result, Unconfirmed)):
                    self._relieve(servers.breaker_of(claim.key))
                if isinstance(result, Record) and result.token != expected:
                    # Most records are complete and stay so. Only the others may be open to this claim.
                    uncertain = result.state is not _COMPLETE or window_ms or self._withdrawn_tokens
                    if uncertain and await self._may_take_over(result, claim, window_ms):
                        claim.kept_before, expected, left_s = result.kept, result.token, deadline - loop.time()
                        tail = arguments.claim_tail(packed, window_ms, expected)
                        continue
                    if uncertain and not reclaims and (resent := resending(claim, result)) is not None:
                        # Not freed after a failure either: an earlier request may have been executed.
                        claim, reclaims, resends, expected = resent, True, True, result.token
                        claim.kept_before = result.kept
                        call, left_s = replace(call, owner=claim), deadline - loop.time()
                        head, tail = arguments.claim_head(claim), arguments.resend_tail(packed, expected)
                        continue
                # Where a record has gone that was to be taken over, nothing is known of the key.
                if not isinstance(result, Unconfirmed) or (resends and result is LATE):
                    if maybe_executed:
                        self._leave_copy(claim, caller_holds=reclaims or isinstance(result, Claim))
                    return result
                # From here on the claim is not confirmed: try again, or end it.
                is_under_replicated |= isinstance(result, UnderReplicated)
                maybe_executed |= result.maybe_executed
                ends = min(deadline - is_under_replicated * self._release_s, self.retries_end)
                if loop.time() + pause_s >= ends or isinstance(result, NotAttempted | StoreFull | Forbidden):
                    self._note_failure(result, claim, deadline)
                    result = replace(result, maybe_executed=maybe_executed)
                    if reclaims:
                        return self._end_reclaim(claim, result)
                    ended = await self._end(claim, result, is_under_replicated)
                    return await self._known(claim, tenant, window_ms, ended) or ended
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, MAX_PAUSE_S)
                left_s = deadline - loop.time()
        except (Exception, asyncio.CancelledError):
            # The caller is gone, and the last try may still reach the store.
            self._leave_copy(claim, caller_holds=reclaims)
            raise

    async def peek(self, key: bytes, tenant: bytes, lease_ms: int, share: float = 1.0) -> NotClaimed | None:
        """Return the record of a key, or None for no record. It is a claim whose deadline has passed.

        `share`: of the timeout, for the reply.
        """
        unowned = arguments.unowned_claim(key, lease_ms)
        deadline = self._loop.time() + self._timeout_s * share
        args = arguments.peek(unowned, self._layout.packed)
        call = ScriptCall(self._script, store_key(key), arguments.CLAIM_COUNT, deadline)
        reply = await self._servers.run(call, args)
        if is_noscript(reply):
            reply = await self._servers.run(replace(call, by_body=True), args)
        result = claim_result(unowned, tenant, reply, self._servers.note_time)
        return None if result is LATE or isinstance(result, Claim) else result

    def copy_may_come(self, claim: Claim) -> bool:
        """Return whether another copy of a held claim may still reach the store.

        It would take the key as soon as the key is free.
        """
        return claim.token in self._tokens_with_late_copies

    def withdraw_copy(self, claim: Claim) -> None:
        """Release a claim once more later, when no copy of it can take the key any more."""
        self._tokens_with_late_copies.discard(claim.token)
        self._withdraw_later(claim)

    # Open records ...

    async def _may_take_over(self, record: Record, claim: Claim, window_ms: int) -> bool:
        """Return whether another try may take the key with the record's token as the expected one."""
        if record.token in self._withdrawn_tokens:
            # It is a claim of this proxy that nobody holds, and for which nothing was sent. Free it now.
            freed = await self._release(replace(claim, token=record.token), self._timeout_s)
            return freed.status is SettleStatus.RELEASED
        past_window = is_past(window_ms, record.now_ms - record.created_ms)
        state = effective_state(record.state, record.lease_left_ms)
        return may_take_over(state, record.fingerprint == claim.fingerprint, record.mode, past_window)

    # Failures ...

    async def _end(self, claim: Claim, reason: Unconfirmed, is_under_replicated: bool) -> Unconfirmed:
        """End a claim that was not confirmed, so that nothing of it stays in the store.

        `is_under_replicated`: the store has the claim, but too few replicas do.
        """
        if is_under_replicated and not reason.maybe_executed:
            freed = await self._release(claim, self._release_s)
            reason = replace(reason, maybe_executed=freed.status is SettleStatus.UNCONFIRMED)
        if reason.maybe_executed:
            self._withdraw_later(claim)
        return reason

    async def _known(self, claim: Claim, tenant: bytes, window_ms: int, reason: Unconfirmed) -> NotClaimed | None:
        """Return what the store has for a key that cannot be claimed now. Only first-time keys are refused.

        None: there is no record, or none that belongs to this request, or the store does not answer reads either.
        """
        node = self._servers.node_of(store_key(claim.key))
        # A claim that was executed has found no record. A store that does not answer must not cost a second wait.
        if isinstance(reason, UnderReplicated) or not (isinstance(reason, ClaimsSuspended) or (node and node.readable)):
            return None
        found = await self.peek(claim.key, tenant, claim.lease_ms, READ_SHARE)
        if not isinstance(found, Record):
            return found if isinstance(found, Corrupt) else None
        # A claim of this proxy that nobody holds, or a response to the request of a former window.
        is_other = is_past(window_ms, found.now_ms - found.created_ms) and found.state in (
            State.COMPLETE,
            State.EXPIRED,
        )
        return None if is_other or found.token in self._withdrawn_tokens else found

    def _end_reclaim(self, claim: Claim, reason: Unconfirmed) -> Unconfirmed:
        """End a reclaim that was not confirmed. The key stays this claim's, and is settled later."""
        if reason.maybe_executed:
            self._note_copy(claim)
        return reason

    def _note_failure(self, reason: Unconfirmed, claim: Claim, deadline: float) -> None:
        """Note that the server is full, forbids claims, or may be down."""
        if isinstance(reason, StoreFull | Forbidden):
            if (node := self._servers.node_of(store_key(claim.key))) is not None:
                node.note_refusal(reason)
        elif not isinstance(reason, NotAttempted):
            breaker = self._servers.breaker_of(claim.key)
            breaker.failed(deadline - self._timeout_s)
            self._failing_breakers.add(breaker)

    def _relieve(self, breaker: Breaker) -> None:
        """Note a reply to a claim, and forget the breakers of servers that are no longer in use."""
        breaker.succeeded()
        self._failing_breakers &= {node.breaker for node in self._servers.nodes} - {breaker}

    # Copies that may still reach the store ...

    def _leave_copy(self, claim: Claim, caller_holds: bool) -> None:
        """Handle a copy of a claim that may still reach the store. `caller_holds`: the caller has the claim itself."""
        if caller_holds:
            self._note_copy(claim)
        else:
            self._withdraw_later(claim)

    def _note_copy(self, claim: Claim) -> None:
        """Remember the copy for as long as it can take the key, for a release that comes meanwhile."""
        self._tokens_with_late_copies.add(claim.token)
        self._loop.call_later(self._timeout_s, self._tokens_with_late_copies.discard, claim.token)

    def _withdraw_later(self, claim: Claim) -> None:
        """Free a key in the background whose claim may have been executed, or may be executed later."""
        self._withdrawn_tokens.add(claim.token)
        self._background(self._withdraw(claim))

    async def _withdraw(self, claim: Claim) -> None:
        ends = self._loop.time() + claim.unknown_retention_ms / 1000
        # After this pause no copy can take the key any more, so one release is enough.
        await asyncio.sleep(self._timeout_s)
        while (await self._release(claim, self._patience_s)).status is SettleStatus.UNCONFIRMED:
            if self._loop.time() >= min(ends, self.retries_end):
                break
        self._withdrawn_tokens.discard(claim.token)
