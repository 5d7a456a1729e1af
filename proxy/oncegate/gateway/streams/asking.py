"""Questions about keys: what became of the request with this key? An answer executes nothing and claims nothing.

A question carries the key and the credential as the request did, and the request's method, target and host in fields of
their own. It goes through the same checks and the same rule, so that it can name no key but those that its credential
could use. A key that somebody else used is absent for it, as one that nobody used: the store is asked once for either.
"""

import asyncio
import hmac
import re
from base64 import b64decode
from binascii import Error
from dataclasses import dataclass, replace
from typing import NamedTuple

from oncegate.adaptation.cors import Cors
from oncegate.adaptation.preflight import MAX_AGE_S, Preflight, read_preflight
from oncegate.decision import State
from oncegate.downstream.request import Request
from oncegate.gateway.answers import (
    REFUSED,
    Refuse,
    Taken,
    decide_duplicate,
    duplicate_refusal,
    key_field,
    key_refusal,
    refuse,
    scope_refusal,
)
from oncegate.gateway.routes import Route, Routes
from oncegate.gateway.streams.key_state import after_s, key_state, progress_of, send_state, state_of
from oncegate.gateway.streams.own import SAFE, AnswerOwn
from oncegate.keys.digests import Digests, Scope, key_id
from oncegate.keys.documents import Missing
from oncegate.keys.syntax import BadKey
from oncegate.messages.admission import Admission, Refused
from oncegate.messages.fields import only_value
from oncegate.messages.framing import STATED
from oncegate.messages.problems import problem, refusal
from oncegate.messages.request_head import RequestHead
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.rules.identity import key_in_head, scope_of, shows_credential
from oncegate.store.kept import unpack_kept
from oncegate.store.record import Record
from oncegate.streams.links import ClaimName

# What a question says of the request that it is about.
METHOD, TARGET, HOST, BODY_DIGEST = b"oncegate-method", b"oncegate-target", b"oncegate-host", b"oncegate-body-digest"
# On one connection.
QUESTIONS_PER_S, BURST = 5.0, 20.0
_ALLOW = b"Allow: OPTIONS, GET, HEAD\r\n"
# A member of a digest field (RFC 9530, section 2).
_SHA_256 = re.compile(rb"(?:^|[ \t,])sha-256=:([A-Za-z0-9+/=]+):")


@dataclass(slots=True)
class Allowance:
    """How many questions a connection may ask at once. `at_s`: as of then (the loop's time)."""

    at_s: float
    left: float = BURST

    def take(self, now_s: float) -> bool:
        """Take one question, and return whether there was one left."""
        self.left = min(BURST, self.left + (now_s - self.at_s) * QUESTIONS_PER_S)
        self.at_s = now_s
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Question(NamedTuple):
    """What is asked: the digest of a key in its scope. `body_digest`: of the request's body, empty for none."""

    route: Route
    key: bytes
    scope: Scope
    body_digest: bytes


class Asking:
    """Answers questions about keys, by one set of rules. `cors`: of the rules whose requests may be asked about."""

    def __init__(self, admission: Admission, routes: Routes, digests: Digests, cors: tuple[Cors, ...]) -> None:
        self._admission, self._routes, self._digests, self._cors = admission, routes, digests, cors

    async def answer(self, request: Request, own: AnswerOwn) -> RequestReport:
        """Answer one question."""
        if own.head.method == "OPTIONS":
            return self._answer_options(request, own.head)
        question = _refusal(request, own) or self._read(request, own.head)
        if isinstance(question, Refuse):
            return refuse(request, question)
        policy, deps = question.route.policy, question.route.deps
        found = await deps.store.peek(question.key, question.scope, policy.lease_ms)
        if isinstance(found, Record):
            return await _tell(request, question, found)
        return refuse(request, _without_record(question, found))

    def _answer_options(self, request: Request, head: RequestHead) -> RequestReport:
        """Say how to ask, and that pages may ask of the origins whose requests may be asked about."""
        asked, block, outcome = read_preflight(head), _ALLOW, Outcome.PASSTHROUGH
        if asked is not None and (cors := tuple(one for one in self._cors if asked.origin in one.origins)):
            block, outcome = block + Preflight(asked, cors).granted(MAX_AGE_S), Outcome.PREFLIGHT
        request.response.send(204, b"No Content", block + SAFE + request.id_line, b"", STATED)
        return RequestReport(outcome, 204, head.method)

    def _read(self, request: Request, head: RequestHead) -> Question | Refuse:
        """Return what is asked, as the request itself would be read."""
        original = self._original(head)
        if isinstance(original, Refused):
            return Refuse(refusal(original.status, f"of the request that is asked about: {original.detail}"))
        route = self._routes.choose(original)
        if route is None:
            return _refused("the body of such a request decides which rule it falls under")
        policy = route.policy
        request.adaptation = policy.adaptation
        if not policy.asks:
            return _refused("the rule of such a request answers no questions")
        if original.method not in policy.methods:
            return _refused(f"no key guards a {original.method} there")
        key = key_in_head(policy, original)
        if key is None:
            return _refused("the key of such a request is not in its head alone")
        if isinstance(key, Missing | BadKey):
            return key_refusal(key, policy.rule)
        scope = scope_of(policy, self._digests, original)
        if not isinstance(scope, Scope):
            return scope_refusal(scope, policy.rule)
        # Whoever guesses a key could ask for it.
        if not shows_credential(policy, original):
            return _refused("it shows no credential, so that anybody could ask it")
        shown = read_digest(head)
        return Question(route, self._digests.key(scope, key), scope, self._digests.shown_body(shown) if shown else b"")

    def _original(self, head: RequestHead) -> RequestHead | Refused:
        """Return the head of the request that a question is about, without fields that only the request had."""
        fields = head.fields
        given = {name: only_value(fields, name) for name in (METHOD, TARGET, HOST)}
        for name, value in given.items():
            if name in fields and not value:
                return Refused(400, f"{name.title().decode()} stands there twice, or is empty")
        if not given[TARGET]:
            return Refused(400, "Oncegate-Target is missing: the target of the request, such as /v1/charges")
        host = given[HOST] or head.host
        pairs = [pair for pair in head.pairs if pair[0].lower() != b"host"]
        method = (given[METHOD] or b"POST").decode("latin-1").upper()
        return self._admission.admit(method, given[TARGET], (1, 1), [(b"Host", host), *pairs])


async def _tell(request: Request, question: Question, record: Record) -> RequestReport:
    """Answer a question about a key that has a record."""
    route, deps, policy = question.route, question.route.deps, question.route.policy
    document, fields = key_state(question.key, record), SAFE + key_field(key_id(question.key).encode())
    state = state_of(record)
    if state is State.IN_FLIGHT:
        document |= await progress_of(deps, question.key, record)
        fields += b"Retry-After: %d\r\n" % after_s(deps, record)
    if policy.resumable and route.links is not None and _may_read(question, record):
        claim = ClaimName(question.key, record.token, question.scope.tenant, record.created_ms)
        fields += route.links.resume_field(claim, request.requester.outer)
    send_state(request, 200, document, fields)
    return RequestReport(
        Outcome.ASKED, 200, request.message.method, question.key, rule=policy.rule, upstream=route.upstream
    )


def _may_read(question: Question, record: Record) -> bool:
    """Return whether whoever asks gets the address of the response: who has sent the request could have it as well.

    Several people may share a credential, and keys are written into logs. Bodies are not.
    """
    policy, digest = question.route.policy, unpack_kept(record.kept).body_digest
    if policy.resume_by_key:
        return True
    return bool(digest) and hmac.compare_digest(digest, question.body_digest)


def _without_record(question: Question, found: Taken) -> Refuse:
    """Return the answer to a question about a key of which the store has, or tells, nothing."""
    route = question.route
    if found is None:
        detail = "no request with this key is known here, for this credential: if it is sent now, it executes"
        answer = Refuse(problem("key-absent", detail, state="absent", on_repeat="execution"), REFUSED + SAFE)
    else:
        decision = decide_duplicate(found, b"")
        answer = duplicate_refusal(decision, found, route.policy, route.deps.usual.seconds)
    return replace(answer, rule=route.policy.rule)


def _refusal(request: Request, own: AnswerOwn) -> Refuse | None:
    """Return why a question is not even read, None where it is."""
    if own.head.method not in ("GET", "HEAD"):
        return Refuse(refusal(405, "ask with GET"), REFUSED + SAFE + _ALLOW)
    # A query stands in the logs of every proxy on the way.
    if own.place.rest or own.place.query:
        return _unclear("a question has its key in a header, and nothing of it in its target")
    connection, now_s = request.connection, asyncio.get_running_loop().time()
    if not isinstance(connection.questions, Allowance):
        connection.questions = Allowance(now_s)
    if not connection.questions.take(now_s):
        return Refuse(problem("overloaded", "too many questions on one connection", 1).with_status(429), REFUSED + SAFE)
    return None


def _unclear(detail: str) -> Refuse:
    return Refuse(refusal(400, detail), REFUSED + SAFE)


def _refused(detail: str) -> Refuse:
    return Refuse(problem("ask-refused", detail), REFUSED + SAFE)


def read_digest(head: RequestHead) -> bytes:
    """Return the SHA-256 of a body that a question shows (32 bytes), empty where it shows none that can be read."""
    member = _SHA_256.search(only_value(head.fields, BODY_DIGEST))
    try:
        digest = b64decode(member[1], validate=True) if member else b""
    except Error:
        return b""
    return digest if len(digest) == 32 else b""
