"""The first step of a request for one of oncegate's own paths, which no rule and no API gets to see."""

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from oncegate.downstream.request import Request
from oncegate.gateway.answers import REFUSED, Refuse, refuse
from oncegate.messages.admission import Refused
from oncegate.messages.problems import refusal
from oncegate.messages.request_head import RequestHead
from oncegate.messages.target import logged_path
from oncegate.observe.outcome import RequestReport
from oncegate.streams.own_path import OwnPath, Place

# With every answer below the own path: a stored page must not act as one of the API's origin, no other page may embed
# it, and its address must not get into the Referer of another request.
SAFE = (
    b"X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
    b"Content-Security-Policy: sandbox\r\nCross-Origin-Resource-Policy: same-origin\r\n"
)


class AnswerOwn(NamedTuple):
    """Answer a request for one of oncegate's own paths. `answer` does it; `head` passed all checks."""

    answer: "Answer"
    head: RequestHead
    place: Place


# Answers a request for a place, and reports it.
Answer = Callable[[Request, AnswerOwn], Awaitable[RequestReport]]


class OwnPaths:
    """What is answered below the own path: by the first segment there, how."""

    def __init__(self, own_path: OwnPath, answers: Mapping[bytes, Answer]) -> None:
        self._own_path, self._answers = own_path, answers

    def step(self, request: Request, head: RequestHead | Refused) -> AnswerOwn | None:
        """Return the step for a request, None for one that is not for us, or is refused.

        Logs and traces have no more than the beginning of its path, and its head is not remembered: that path is for
        its client alone.
        """
        path = logged_path(request.message.path or "").encode("utf-8", "surrogateescape")
        place = self._own_path.place(path if isinstance(head, Refused) else head.target)
        if place is None:
            return None
        request.shown_path = self._own_path.shown(place)
        if isinstance(head, Refused):
            return None
        request.head = head
        return AnswerOwn(self._answers.get(place.name, not_served), head, place)


async def not_served(request: Request, _: AnswerOwn) -> RequestReport:
    """Answer a request for a path that is reserved and not in use, or that is another spelling of one in use."""
    return refuse(request, Refuse(refusal(404, "nothing is served here"), REFUSED + SAFE))
