"""What a response means for its key, as far as it has arrived: by its head, by its body, by its messages.

And when a request that got none is sent again.
"""

import random
from collections.abc import Callable

from oncegate.adaptation.json_rpc import ResponseReader
from oncegate.buffers.memory import MemoryBudget
from oncegate.decision import Disposition, Ending, api_recognizes, of_resend
from oncegate.messages.response_head import ResponseHead
from oncegate.rules.statuses import Statuses
from oncegate.store.kept import first_claim_ms, is_resent
from oncegate.store.record import Claim
from oncegate.upstream.connection import Connection
from oncegate.upstream.errors import UpstreamLost

# A response whose body decides what becomes of its key (docs/reference/rules.md) is held back for so long: its client
# waits.
TELLING_S = 5.0
# Within so many seconds of its head, the end of any other may come with it.
SMALL_S = 0.05


class ResponseReading:
    """Reads one response whose status alone does not tell.

    `disposition`: what it means as far as it is read. `body_tells`: its body decides, too. `passing`: reads messages of
    JSON-RPC while they pass, None where there are none; what they mean is certain at their end alone. What it keeps of
    them counts in `memory` until `close`.
    """

    def __init__(self, statuses: Statuses, head: ResponseHead, request_id: bytes, memory: MemoryBudget) -> None:
        self._statuses, self._head = statuses, head
        self._memory, self._counted = memory, 0
        self.passing = ResponseReader(head.fields, request_id) if statuses.by_message else None
        reads_body = not head.bodiless and statuses.reads_body(head.status, head.fields)
        self.body_tells = statuses.by_message or reads_body
        # Until its messages say otherwise, a response is stored as it comes.
        self.disposition = Disposition.STORE if statuses.by_message else statuses.read(head.status, head.fields)

    def add(self, data: bytes) -> None:
        """Take the next bytes of a body that passes."""
        if self.passing is not None:
            self.passing.add(data)
            self._count(self.passing.kept_bytes)

    def close(self) -> None:
        """Give the memory back."""
        self._count(0)

    def _count(self, size: int) -> None:
        self._memory.used += size - self._counted
        self._counted = size

    def end(self, body: bytes = b"") -> Disposition:
        """Return what a response means whose body has ended; `body`: what of it was not read while it passed."""
        status, fields = self._head.status, self._head.fields
        if self.passing is None:
            return self._statuses.read(status, fields, body)
        self.passing.add(body)
        return self._statuses.read_message(status, fields, self.passing.final())


def window_s(reading: ResponseReading | None, silence_s: float) -> float:
    """Return for how long the end of a response is waited for before its head goes on."""
    return min(TELLING_S, silence_s) if reading is not None and reading.body_tells else SMALL_S


# How often a lost request is sent again to an upstream that is idempotent, and the longest pauses before that.
RESENDS, FIRST_PAUSE_S, MAX_PAUSE_S = 3, 0.2, 2.0
# By draft-ietf-httpapi-idempotency-key-header, the status for a key whose first request is still running.
BUSY = 409


class Resends:
    """The tries of a request whose upstream executes a key only once.

    `is_retry`: its key was unknown when it was claimed. `left`: those after this one, where an earlier one may have
    reached the upstream, also under another claim; None while none may have. `kept_ms`: for how long the upstream
    recognizes a key. `now_ms(key)`: the store's clock.
    """

    def __init__(self, claim: Claim, kept_ms: int, now_ms: Callable[[bytes], int]) -> None:
        self._claim, self._first_ms, self._kept_ms, self._now_ms = claim, first_claim_ms(claim), kept_ms, now_ms
        self.is_retry = is_resent(claim.kept)
        self.left = RESENDS if self.is_retry else None
        self._max_pause_s = FIRST_PAUSE_S

    @property
    def age_s(self) -> float:
        """The seconds since the first claim of the key."""
        return (self._now_ms(self._claim.key) - self._first_ms) / 1000

    def may_send(self) -> bool:
        """Return whether the request may be sent: not where an earlier one may be known to the upstream no more."""
        age_ms = self._now_ms(self._claim.key) - self._first_ms
        return self.left is None or api_recognizes(age_ms, self._kept_ms, self._claim.lease_ms)

    def pause_s(self) -> float | None:
        """Begin another try of a lost request: return how long to wait before it, None where there is none left.

        The pauses grow, with full jitter.
        """
        if self.left == 0:
            return None
        self.left = (RESENDS if self.left is None else self.left) - 1
        pause_s = random.uniform(0, self._max_pause_s)
        self._max_pause_s = min(self._max_pause_s * 2, MAX_PAUSE_S)
        return pause_s if self.may_send() else None

    def check_busy(self, head: ResponseHead) -> None:
        """Raise UpstreamLost if the upstream may be busy with an earlier try, and can be asked once more."""
        if self.left and head.status == BUSY:
            raise UpstreamLost("the upstream is still busy with the first request")

    def read(self, disposition: Disposition, status: int) -> Disposition:
        """Return what a response with this status means for the key."""
        return disposition if self.left is None else of_resend(disposition, busy=status == BUSY)


def unsent(resends: Resends | None) -> Ending:
    """Return how a try ends that sends nothing. That says nothing of those before."""
    return Ending.NOT_SENT if resends is None or resends.left is None else Ending.NO_RESPONSE


def check_idle_timeout(connection: Connection, head: ResponseHead, statuses: Statuses) -> None:
    """Raise UpstreamLost if a 408 may be about the idle connection (RFC 9110, section 15.5.9), not this request.

    It may have been on its way before the request. Whether the request was read after it, nobody can tell.
    """
    is_released = statuses.read(408, head.fields) is Disposition.RELEASE
    if connection.is_reused and not connection.response.keep_alive and not is_released:
        raise UpstreamLost("the upstream ended an idle connection with a 408")
