"""A rule's plan for unknown keys, and the question that it makes of a request's values. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from oncegate.decision import Verdict
from oncegate.keys.sources import Source
from oncegate.probing.templates import Template, Unfillable, climbs, in_json, in_url
from oncegate.settings.addresses import Origin

# A JSON pointer: its spelling, and its tokens.
Pointer = tuple[str, tuple[str, ...]]
# Values beside those of sources: the key as the client wrote it in a header, and the note.
KEY, NOTE = "key", "note"
JSON, FORM = "application/json", "application/x-www-form-urlencoded"

# A question cannot be made of these values.
CannotAsk = Unfillable


@dataclass(frozen=True, slots=True)
class Entry:
    """The answers that have one meaning: those of a status (`404`) or a class (`2xx`) that meet each condition.

    `when`: at each pointer stands one of these texts, a number as it is written, `true` or `false`. `empty`: at each
    stands a list or an object without members, or null.
    """

    status: str
    when: tuple[tuple[Pointer, tuple[str, ...]], ...] = ()
    empty: tuple[Pointer, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a duplicate gets after a verdict. None, or no headers: as the probe's answer. At most one body is given."""

    status: int | None = None
    headers: tuple[str, ...] = ()
    body: Template | None = None
    body_pointer: Pointer | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked about a key of a rule, and what the answers mean. Times in seconds.

    `origin`: of who is asked; None until the rule's upstream is known. `is_upstream`: that is the upstream of the rule,
    with its TLS, and `host` in place of its own where the rule sets one. `keep`: the sources of the values that are
    kept with a record, by their names in templates; `key` has no source. `reference`: what the answer must repeat.
    `entries`: in the order of the rule.
    """

    origin: Origin | None
    path: Template
    query: Template | None
    method: str = "GET"
    body: Template | None = None
    content_type: str = JSON
    keep: tuple[tuple[str, Source | None], ...] = ()
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    reference: tuple[tuple[Pointer, Template], ...] = ()
    entries: tuple[tuple[Verdict, Entry], ...] = ()
    answers: tuple[tuple[Verdict, Answer], ...] = ()
    audit: tuple[Pointer, ...] = ()
    absent_after_s: float = 0
    absent_before_s: float = 0
    absent_agree: int = 3
    reconcile_for_s: float = 86_400
    first_after_s: float = 2
    most_s: float = 300
    rate_per_s: float = 10
    timeout_s: float = 5
    is_upstream: bool = True
    host: str = ""

    @property
    def names(self) -> frozenset[str]:
        """The values of a request that its templates name."""
        templates = [self.path, self.query, self.body, *(template for _, template in self.reference)]
        templates += [answer.body for _, answer in self.answers]
        return frozenset(name for template in templates if template for name in template.names)

    def answer(self, verdict: Verdict) -> Answer:
        """Return what a duplicate gets after a verdict."""
        return dict(self.answers).get(verdict, Answer())


def for_rule(plan: Plan, origin: Origin, host: str, note: Source | None) -> Plan:
    """Return the plan of a rule. `origin`: its upstream; `host`: what it sets as `Host`, empty for none; `note`: its.

    A note is kept once more, because the one for people is cut, stripped, and made readable.
    """
    if NOTE in plan.names:
        plan = replace(plan, keep=(*plan.keep, (NOTE, note)))
    return replace(plan, origin=origin, host=host) if plan.is_upstream else plan


@dataclass(frozen=True, slots=True)
class Question:
    """One request to the API. `url` is absolute, and escaped already. `headers` have the credentials."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    body: bytes | None = None


def question(plan: Plan, values: Mapping[str, str]) -> Question | CannotAsk:
    """Return what is asked about the key of a request with these values."""
    assert plan.origin is not None
    path = plan.path.fill(values, in_url)
    query = plan.query.fill(values, in_url) if plan.query else ""
    body = plan.body.fill(values, in_url if plan.content_type == FORM else in_json) if plan.body else ""
    for text in (path, query, body):
        if isinstance(text, Unfillable):
            return text
    # A client must not choose another resource for credentials that are not its own.
    for name in plan.path.names:
        if climbs(values[name]):
            return CannotAsk(f"{{{name}}} has a dot segment, which leads out of its place in the path")
    url = f"{plan.origin}{path}{'?' if plan.query else ''}{query}"
    return Question(plan.method, url, _headers(plan), str(body).encode() if plan.body else None)


def _headers(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Return the fields of a question. The credentials may have an Accept of their own."""
    own = [("Accept", JSON), ("Accept-Encoding", "identity"), ("Cache-Control", "no-cache")]
    own += [("Content-Type", plan.content_type)] if plan.body else []
    own += [("Host", plan.host)] if plan.host else []
    given = {name.lower() for name, _ in plan.credentials}
    return (*[one for one in own if one[0].lower() not in given], *plan.credentials)
