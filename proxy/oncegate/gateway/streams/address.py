"""The addresses below `ONCEGATE_OWN_PATH/streams/`: who may do what at one of them, and with which method.

Nothing is told about an address that nobody was given: a forged one, one that was cut, and one of another secret get
the same answer.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from oncegate.adaptation.preflight import MAX_AGE_S, Preflight, read_preflight
from oncegate.downstream.request import Request
from oncegate.gateway.answers import REFUSED, Refuse, refuse
from oncegate.gateway.routes import Route, Routes
from oncegate.gateway.streams.own import SAFE, AnswerOwn
from oncegate.messages.framing import STATED
from oncegate.messages.problems import problem, refusal
from oncegate.messages.request_head import RequestHead
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.rules.policy import Policy
from oncegate.streams.capability import Capabilities, Capability


class Asked(NamedTuple):
    """A request for an address that counts. `route`: that of the rule that gave it away."""

    head: RequestHead
    query: bytes
    capability: Capability
    route: Route

    def report(self, outcome: Outcome, status: int, reason: str = "") -> RequestReport:
        """Return the request's report; `status` is what its client got."""
        route, key = self.route, self.capability.key
        return RequestReport(
            outcome, status, self.head.method, key, reason=reason, rule=route.policy.rule, upstream=route.upstream
        )

    def refuse(self, request: Request, answer: Refuse) -> RequestReport:
        """Send an answer of oncegate's own, and return the request's report."""
        report = refuse(request, answer)
        return self.report(report.outcome, report.status, report.reason)


class Purpose(NamedTuple):
    """What may be done at an address: under which policies, with which methods, and how."""

    is_given: Callable[[Policy], bool]
    methods: tuple[str, ...]
    answer: Callable[[Request, Asked], Awaitable[RequestReport]]


class Addresses:
    """Answers the requests for addresses. `purposes`: by that of a capability."""

    def __init__(self, capabilities: Capabilities, routes: Routes, purposes: Mapping[bytes, Purpose]) -> None:
        self._capabilities, self._routes, self._purposes = capabilities, routes, purposes

    async def answer(self, request: Request, step: AnswerOwn) -> RequestReport:
        """Answer one request."""
        capability = self._capabilities.read(step.place.rest)
        route = None if capability is None else self._routes.by_mark(capability.rule)
        if capability is None or route is None:
            return refuse(request, unknown())
        asked = Asked(step.head, step.place.query, capability, route)
        purpose = self._purposes.get(capability.purpose)
        if purpose is None or not purpose.is_given(route.policy):
            return refuse(request, unknown())
        request.adaptation = route.policy.adaptation
        if step.head.method == "OPTIONS":
            return _answer_options(request, asked, purpose.methods)
        if step.head.method not in purpose.methods:
            allowed = ", ".join(("OPTIONS", *purpose.methods)).encode()
            detail = f"this address takes {' and '.join(purpose.methods)}"
            return asked.refuse(request, Refuse(refusal(405, detail), b"%sAllow: %s\r\n%s" % (REFUSED, allowed, SAFE)))
        if capability.expires_s * 1000 <= route.deps.store.now_ms(capability.key):
            return asked.refuse(request, gone("expired", "the address has expired"))
        return await purpose.answer(request, asked)


def unknown() -> Refuse:
    """Return the answer to a request for an address that nobody was given."""
    return Refuse(refusal(404, "nothing is served here"), REFUSED + SAFE)


def gone(reason: str, detail: str) -> Refuse:
    """Return the answer to a reader for whom nothing more will come. `reason` is for programs."""
    return Refuse(problem("stream-gone", detail, reason=reason), REFUSED + SAFE)


def _answer_options(request: Request, asked: Asked, methods: tuple[str, ...]) -> RequestReport:
    """Say what may be done here, and to a page of another origin what it may do."""
    cors, preflight = asked.route.policy.adaptation.cors, read_preflight(asked.head)
    allow = b"Allow: %s\r\n" % ", ".join(("OPTIONS", *methods)).encode()
    if preflight is None or cors is None or preflight.origin not in cors.origins:
        block, outcome = allow + request.requester.own_fields(), Outcome.PASSTHROUGH
    else:
        block, outcome = allow + Preflight(preflight, (cors,)).granted(MAX_AGE_S), Outcome.PREFLIGHT
    request.response.send(204, b"No Content", block + SAFE + request.id_line, b"", STATED)
    return asked.report(outcome, 204)
