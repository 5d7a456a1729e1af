"""What a response means for its key, as far as it has arrived: by its head, by its body, by its messages."""

from oncegate.adaptation.json_rpc import ResponseReader
from oncegate.decision import Disposition
from oncegate.messages.response_head import ResponseHead
from oncegate.rules.statuses import Statuses

# A response whose body decides what becomes of its key (docs/reference/rules.md) is held back for so long: its client
# waits.
TELLING_S = 5.0


class ResponseReading:
    """Reads one response whose status alone does not tell.

    `disposition`: what it means as far as it is read. `body_tells`: its body decides, too. `passing`: reads messages of
    JSON-RPC while they pass, None where there are none; what they mean is certain at their end alone.
    """

    def __init__(self, statuses: Statuses, head: ResponseHead, request_id: bytes) -> None:
        self._statuses, self._head = statuses, head
        self.passing = ResponseReader(head.fields, request_id) if statuses.by_message else None
        reads_body = not head.bodiless and statuses.reads_body(head.status, head.fields)
        self.body_tells = statuses.by_message or reads_body
        # Until its messages say otherwise, a response is stored as it comes.
        self.disposition = Disposition.STORE if statuses.by_message else statuses.read(head.status, head.fields)

    def end(self, body: bytes = b"") -> Disposition:
        """Return what a response means whose body has ended; `body`: what of it was not read while it passed."""
        status, fields = self._head.status, self._head.fields
        if self.passing is None:
            return self._statuses.read(status, fields, body)
        self.passing.add(body)
        return self._statuses.read_message(status, fields, self.passing.final())
