"""The tries of a claim, and the withdrawal of claims that nobody holds.

A claim is repeated with the same token. No claim may keep its key after its caller was told otherwise, though its
statement goes on when the caller stops waiting, and may still take the key:

- every try carries a deadline in the server's own time, after which the function takes no key;
- a claim that may have been executed, and that nobody holds, is released in the background. That is over once the
  key was freed, or not found, after the server had ended the claim's statements.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from oncegate.decision import State, effective_state, is_past, may_take_over
from oncegate.store.kept import resending
from oncegate.store.postgres import rows
from oncegate.store.postgres.batches import Batches, Call, Sent
from oncegate.store.postgres.connections.durability import Level
from oncegate.store.postgres.rows import BUSY, Takeable
from oncegate.store.postgres.servers import Servers
from oncegate.store.postgres.verb import Row, Verb
from oncegate.store.record import Claim, Corrupt, Record
from oncegate.store.results import (
    ClaimResult,
    ClaimsSuspended,
    Forbidden,
    NotAttempted,
    NotClaimed,
    StoreFull,
    Unconfirmed,
    UnderReplicated,
)
from oncegate.store.store import Background

# The pauses between the tries of one call, which double from the first to the longest.
MIN_PAUSE_S, MAX_PAUSE_S = 0.01, 0.5
# The share of the timeout for reading what is known of a key that could not be claimed.
READ_SHARE = 0.5
# The share of the timeout that a claim which too few standbys have keeps for its release.
RELEASE_SHARE = 0.25
BELOW = UnderReplicated("too few standbys have the claim")


class ClaimBatches:
    """The batches that claims need: claims and takeovers, `releases` that are confirmed as claims are, and reads."""

    def __init__(self, batches: Callable[[Verb, Level], Batches]) -> None:
        self._claims, self._takes = batches(rows.CLAIM, Level.CLAIM), batches(rows.TAKE, Level.CLAIM)
        self.releases, self._peeks = batches(rows.SETTLE, Level.CLAIM), batches(rows.PEEK, Level.OFF)

    def claim(self, row: Row, deadline: float) -> Call:
        return self._claims.call(row, deadline)

    def take(self, row: Row, deadline: float) -> Call:
        return self._takes.call(row, deadline)

    def release(self, row: Row, deadline: float) -> Call:
        return self.releases.call(row, deadline)

    def peek(self, row: Row, deadline: float) -> Call:
        return self._peeks.call(row, deadline)


@dataclass(slots=True, eq=False)
class _Attempt:
    """One claim on its way: what is asked for until `deadline` (the loop's time), and what is known of its tries.

    `reclaims`: the key is this claim's already, so that it is not freed after a failure.
    """

    claim: Claim
    tenant: bytes
    window_ms: int
    reclaims: bool
    deadline: float
    statements: list[Sent] = field(default_factory=list)
    maybe_executed: bool = False
    is_below: bool = False
    # The token of the record that the next try may take, or None. A freed record's is empty.
    expected: bytes | None = None
    # It takes over the record that it has seen, or none.
    resends: bool = False


class Claims:
    """Claims keys. `timeout_s`: how long a claim may take. `patience_s`: how long one try of a withdrawal may take."""

    def __init__(
        self,
        servers: Servers,
        batches: ClaimBatches,
        background: Background,
        *,
        token: Callable[[], bytes],
        timeout_s: float,
        patience_s: float,
    ) -> None:
        self._servers, self._batches, self._background = servers, batches, background
        self._token, self._timeout_s, self._patience_s = token, timeout_s, patience_s
        self._loop = asyncio.get_running_loop()
        # The loop's time after which no call is repeated, of a claim or of any other verb.
        self.retries_end = float("inf")
        # Tokens of claims that are being withdrawn: they may be in the store though nobody holds them.
        self._withdrawn_tokens: set[bytes] = set()
        # Tries of held claims that may still be executed, by the claim's token.
        self._copies: dict[bytes, list[Sent]] = {}

    def stop_retrying(self) -> None:
        """Repeat no call from now on."""
        self.retries_end = self._loop.time()

    async def run(self, claim: Claim, tenant: bytes, window_ms: int = 0, reclaims: bool = False) -> ClaimResult:
        """Try with the claim's token until the store replies, or the time is over.

        `window_ms`: see ClaimRequest. `reclaims`: the key is this claim's already, so it is not freed after a failure.
        """
        attempt = _Attempt(claim, tenant, window_ms, reclaims, self._loop.time() + self._timeout_s)
        pause_s = MIN_PAUSE_S
        try:
            while True:
                result = await self._try(attempt)
                is_free = isinstance(result, Takeable) and result.token != claim.token
                if attempt.resends and (is_free or result is rows.LATE):
                    return rows.LATE
                if isinstance(result, Takeable):
                    attempt.expected = result.token
                    continue
                if isinstance(result, Record) and await self._may_take_over(result, attempt):
                    attempt.expected, claim.kept_before = result.token, result.kept
                    continue
                if isinstance(result, Record) and _resends(result, attempt):
                    continue
                if result is BUSY and not reclaims and not attempt.maybe_executed:
                    result = rows.busy_record(claim, self._servers.now_ms())
                if not isinstance(result, Unconfirmed):
                    if not all(sent.is_over for sent in attempt.statements):
                        self._leave_copies(attempt, reclaims or isinstance(result, Claim))
                    return result
                attempt.expected = attempt.expected if attempt.resends else None
                attempt.is_below |= isinstance(result, UnderReplicated)
                attempt.maybe_executed |= result.maybe_executed
                ends = min(attempt.deadline - attempt.is_below * self._timeout_s * RELEASE_SHARE, self.retries_end)
                if self._loop.time() + pause_s >= ends or isinstance(result, NotAttempted | StoreFull | Forbidden):
                    return await self._fail(attempt, result)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, MAX_PAUSE_S)
        except (Exception, asyncio.CancelledError):
            # The caller is gone, and the last try may still take the key.
            self._leave(attempt)
            raise

    async def _try(self, attempt: _Attempt) -> ClaimResult | Takeable:
        """Make one try, to take a record that is open or freed, or else to claim the key."""
        servers, claim, deadline = self._servers, attempt.claim, attempt.deadline
        if (refusal := servers.refusal()) is not None:
            return refusal
        not_after_ms = servers.now_ms() + int((deadline - self._loop.time()) * 1000)
        if attempt.expected is not None:
            row = rows.claim_row(claim, not_after_ms, attempt.expected, attempt.window_ms)
            call = self._batches.take(row, deadline)
        else:
            call = self._batches.claim(rows.claim_row(claim, not_after_ms), deadline)
        try:
            reply = await call.reply
        finally:
            # Also where the caller is gone.
            if call.sent is not None:
                attempt.statements.append(call.sent)
        if isinstance(reply, Unconfirmed):
            return reply
        found, is_below = reply
        servers.note_time(found["now"])
        servers.breaker.succeeded()
        result = rows.claim_result(claim, attempt.tenant, found)
        return BELOW if is_below and isinstance(result, Claim) else result

    async def peek(self, key: bytes, tenant: bytes, lease_ms: int, share: float = 1.0) -> NotClaimed | None:
        """Return the record of a key, or None for no record. It is a claim whose deadline has passed.

        `share`: of the timeout, for the reply.
        """
        nobody, digest = self._token(), bytes(16)
        unowned = Claim(key, nobody, b"", b"", digest, digest * 2, 0, lease_ms, 0, 0)
        row, deadline = rows.claim_row(unowned, 0), self._loop.time() + self._timeout_s * share
        reply = await self._batches.peek(row, deadline).reply
        if isinstance(reply, Unconfirmed):
            return reply
        found, _ = reply
        self._servers.note_time(found["now"])
        if found["tag"] == rows.RESTARTS:
            # Takes nothing, as it is late, but lets the lease begin anew.
            deadline = self._loop.time() + self._timeout_s * share
            await self._batches.take(rows.claim_row(unowned, 0, found["owner"]), deadline).reply
        return rows.peeked(unowned, tenant, found)

    # Open records ...

    async def _may_take_over(self, record: Record, attempt: _Attempt) -> bool:
        """Return whether another try may take the key with the record's token as the expected one."""
        claim, window_ms = attempt.claim, attempt.window_ms
        if record.token == attempt.expected:
            return False
        if record.token in self._withdrawn_tokens:
            # It is a claim of this proxy that nobody holds, and for which nothing was sent. Free it now.
            return await self._free(replace(claim, token=record.token), is_over=False)
        past_window = is_past(window_ms, record.now_ms - record.created_ms)
        state = effective_state(record.state, record.lease_left_ms)
        return may_take_over(state, record.fingerprint == claim.fingerprint, record.mode, past_window)

    # Failures ...

    async def _fail(self, attempt: _Attempt, reason: Unconfirmed) -> ClaimResult:
        """End a claim that was not confirmed, so that nothing of it stays in the store."""
        if isinstance(reason, StoreFull | Forbidden):
            self._servers.note_refusal(reason)
        elif not isinstance(reason, NotAttempted):
            self._servers.breaker.failed(attempt.deadline - self._timeout_s)
        reason = replace(reason, maybe_executed=attempt.maybe_executed)
        if attempt.reclaims:
            # The key stays this claim's, and is settled later.
            return reason
        if attempt.is_below and not attempt.maybe_executed:
            reason = replace(reason, maybe_executed=not await self._free(attempt.claim, is_over=True))
        if reason.maybe_executed:
            self._leave(attempt)
        return await self._known(attempt, reason) or reason

    async def _known(self, attempt: _Attempt, reason: Unconfirmed) -> NotClaimed | None:
        """Return what the store has for a key that cannot be claimed now. Only first-time keys are refused.

        None: there is no record, or none that belongs to this request, or the store does not answer reads either.
        """
        claim, window_ms = attempt.claim, attempt.window_ms
        # A store that does not answer must not cost a second wait.
        is_readable = isinstance(reason, ClaimsSuspended) or self._servers.readable
        if isinstance(reason, UnderReplicated) or not is_readable:
            return None
        found = await self.peek(claim.key, attempt.tenant, claim.lease_ms, READ_SHARE)
        if not isinstance(found, Record):
            return found if isinstance(found, Corrupt) else None
        # A claim of this proxy that nobody holds, or a response to the request of a former window.
        is_other = is_past(window_ms, found.now_ms - found.created_ms) and found.state in (
            State.COMPLETE,
            State.EXPIRED,
        )
        is_own = found.token in self._withdrawn_tokens or found.token == claim.token
        return None if is_other or is_own else found

    # Withdrawals ...

    def _leave_copies(self, attempt: _Attempt, caller_holds: bool) -> None:
        """Handle tries of a claim that may still be executed. `caller_holds`: the caller has the claim itself."""
        if caller_holds:
            # For as long as they can take the key, which a release makes free for them as well.
            token = attempt.claim.token
            self._copies[token] = attempt.statements
            self._loop.call_later(self._timeout_s, self._copies.pop, token, None)
        else:
            self._leave(attempt)

    def withdraw_copies(self, claim: Claim) -> None:
        """Withdraw the tries of a claim that may still be executed after its release."""
        if (statements := self._copies.pop(claim.token, None)) is not None:
            # Behind the release, which would miss its record else.
            self._withdraw_later(claim, statements, self._timeout_s)

    def _leave(self, attempt: _Attempt) -> None:
        """Free the key of a claim that nobody holds, if it may have been executed or may be executed later."""
        if attempt.statements and not attempt.reclaims:
            self._withdraw_later(attempt.claim, attempt.statements)

    def _withdraw_later(self, claim: Claim, statements: list[Sent], pause_s: float = 0.0) -> None:
        self._withdrawn_tokens.add(claim.token)
        self._background(self._withdraw(claim, statements, pause_s))

    async def _withdraw(self, claim: Claim, statements: list[Sent], pause_s: float) -> None:
        gives_up_at = self._loop.time() + claim.unknown_retention_ms / 1000
        await asyncio.sleep(pause_s)
        pause_s = MIN_PAUSE_S
        while self._loop.time() < min(gives_up_at, self.retries_end):
            # Before the release: as long as a statement is not over, it may yet take the key, also one that was freed.
            is_over = all([await self._is_over(sent) for sent in statements])
            if await self._free(claim, is_over) and is_over:
                break
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)
        self._withdrawn_tokens.discard(claim.token)

    async def _free(self, claim: Claim, is_over: bool) -> bool:
        """Free the key of a claim that nobody holds, and return whether nothing of the claim can be left.

        `is_over`: no statement of the claim is under way. Until then, the record of a former owner says nothing either:
        it may be about to be taken over.
        """
        row = rows.release_row(claim, rows.WITHDRAWN)
        reply = await self._batches.release(row, self._loop.time() + self._patience_s).reply
        if isinstance(reply, Unconfirmed):
            return False
        found, is_below = reply
        is_freed = found["tag"] == rows.RELEASED_TAG and found["found"]
        return not is_below and found["tag"] != rows.BUSY_TAG and (is_freed or is_over)

    async def _is_over(self, sent: Sent) -> bool:
        """Return whether the server has ended a statement."""
        if not sent.is_over and sent.lost is not None:
            sent.is_over = await self._servers.is_gone(sent.lost.backend)
        return sent.is_over


def _resends(record: Record, attempt: _Attempt) -> bool:
    """Make the next try take the record, for its request to be sent once more. A failure frees no key then."""
    expected = record.token + rows.ALSO_HOLD
    if attempt.reclaims or expected == attempt.expected or (resent := resending(attempt.claim, record)) is None:
        return False
    attempt.claim, attempt.expected, attempt.reclaims, attempt.resends = resent, expected, True, True
    resent.kept_before = record.kept
    return True
