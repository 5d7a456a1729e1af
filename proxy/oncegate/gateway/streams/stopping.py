"""Stops an execution at its address: with DELETE, on whichever replica it runs."""

import json

from oncegate.downstream.request import Request
from oncegate.gateway.answers import REFUSED, Refuse
from oncegate.gateway.cancelling import STOPPED
from oncegate.gateway.streams.address import Asked, gone
from oncegate.gateway.streams.own import SAFE
from oncegate.messages.framing import COUNTED
from oncegate.messages.problems import problem, reason_of, refusal
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.streams.cancels import CancelResult

# By what a cancel met: the status, and what became of the execution.
SAID = {
    CancelResult.ACCEPTED: (202, {"outcome": "in_flight"}),
    CancelResult.CANCELLED: (200, {"outcome": "unknown", "reason": "cancelled"}),
    CancelResult.UNKNOWN: (200, {"outcome": "unknown"}),
}


async def stop(request: Request, asked: Asked) -> RequestReport:
    """Answer a DELETE: stop the execution, or say what became of it. A record is never freed by it."""
    capability, cancellations = asked.capability, asked.route.deps.cancellations
    found = await cancellations.cancel_claim(capability.key, capability.token, STOPPED)
    if found in SAID:
        status, said = SAID[found]
        fields = b"Content-Type: application/json\r\nCache-Control: private, no-store\r\n" + SAFE + request.id_line
        block = fields + request.requester.own_fields()
        request.response.send(status, reason_of(status), block, json.dumps(said).encode(), COUNTED)
        return asked.report(Outcome.STOPPED, status)
    if found is CancelResult.COMPLETE:
        return asked.refuse(request, Refuse(refusal(409, "the response is complete"), REFUSED + SAFE))
    if found is CancelResult.UNCONFIRMED:
        detail = "the store did not confirm now that the execution is to be stopped"
        return asked.refuse(request, Refuse(problem("store-unavailable", detail), REFUSED + SAFE))
    return asked.refuse(request, gone("gone", "there is no such execution any more"))
