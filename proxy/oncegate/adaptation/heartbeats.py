"""Signs of life for a client whose response is not there yet, and for whoever stands between and cuts silent requests.

102 (Processing) comes before the response's head, and only to clients that are known to take it: some libraries take
any interim response for the final one, and give the next request on the connection the answer of this one. Comments
come between the events of a stream (HTML standard, section 9.2.6), whose readers skip them.
"""

import re
from dataclasses import dataclass

from oncegate.messages.fields import Fields, tokens
from oncegate.messages.request_head import RequestHead
from oncegate.messages.response_head import ResponseHead

# Fields over the content, which a comment would falsify.
DIGESTS = frozenset((b"content-digest", b"repr-digest", b"digest", b"content-md5"))


@dataclass(frozen=True, slots=True)
class Heartbeats:
    """The heartbeats of a policy: one after each `period_s` of silence. `agents`: User-Agents that take a 102."""

    period_s: float
    agents: tuple[re.Pattern[bytes], ...] = ()

    @property
    def acted_on(self) -> frozenset[bytes]:
        """The lower-case names of the request's fields that decide who gets a 102."""
        return frozenset((b"prefer", b"user-agent") if self.agents else (b"prefer",))

    def takes_interim(self, head: RequestHead) -> bool:
        """Return whether the client of a request asks for a 102 (`Prefer: processing`), or is of a named kind."""
        if any(one.partition(b";")[0].strip() == b"processing" for one in tokens(head.fields.get(b"prefer", ()))):
            return True
        lines = head.fields.get(b"user-agent", ())
        return len(lines) == 1 and any(agent.fullmatch(lines[0].strip()) for agent in self.agents)


def takes_comments(head: ResponseHead) -> bool:
    """Return whether comments may stand between the events of a response.

    Not where its length is stated, where its bytes are coded or digested, and not against `no-transform` (RFC 9110,
    section 7.7).
    """
    if not head.is_event_stream or head.bodiless or head.length is not None:
        return False
    return are_plain_events(head.status, head.fields)


def are_plain_events(status: int, fields: Fields) -> bool:
    """Return whether a response is a stream of events, in bytes that may be changed between two of them."""
    kinds = fields.get(b"content-type", ())
    # A digest may follow as a trailer.
    named = (*fields, *tokens(fields.get(b"trailer", ())))
    is_plain = set(tokens(fields.get(b"content-encoding", ()))) <= {b"identity"} and DIGESTS.isdisjoint(named)
    if not (status == 200 and is_plain and kinds and kinds[-1].lower().startswith(b"text/event-stream")):
        return False
    return b"no-transform" not in tokens(fields.get(b"cache-control", ()))
