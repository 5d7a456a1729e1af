"""A plan in words, for `oncegate check` and for whoever tries a probe. No value of a credential is among them."""

from collections.abc import Iterator, Mapping

from oncegate.decision import Verdict
from oncegate.keys.notes import escaped
from oncegate.probing.plan import CannotAsk, Plan, question
from oncegate.probing.templates import Template
from oncegate.probing.verdicts import Evidence

# A url with a mistake has the same answer for each key.
BY_STATUS = (
    "a {} alone says absent, which a wrong url or a gateway says of every key: first see succeeded, "
    "with `oncegate keys probe --dry-run`, for a key whose request was executed"
)


def described_rule(plan: Plan) -> Iterator[str]:
    """Yield what a rule does with unknown keys, and what it stores for that."""
    query = f"?{spelled(plan.query)}" if plan.query else ""
    yield f"asks about unknown keys: {plan.method} {plan.origin}{spelled(plan.path)}{query}"
    if plan.keep:
        names = ", ".join(name for name, _ in plan.keep)
        yield f"stores values with each key until it is complete, to ask with: {names}"


def described_question(plan: Plan, values: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield what is asked about one key, and when, as labels and texts. What clients wrote is escaped."""
    asked = question(plan, values)
    if isinstance(asked, CannotAsk):
        yield "asked", f"nothing: {asked.why}; an operator decides"
        return
    yield "asked", f"{asked.method} {asked.url}"
    own = ", ".join(name for name, _ in plan.credentials)
    yield "  as", f"{own} of the credentials file" if own else "nobody: the rule has no credentials_file"
    if asked.body is not None:
        yield "  body", escaped(asked.body.decode())
    yield (
        "  when",
        f"after {plan.first_after_s:g} s, then doubling up to {plan.most_s:g} s, for {plan.reconcile_for_s:g} s",
    )
    if any(verdict is Verdict.ABSENT for verdict, _ in plan.entries):
        when = f"from {plan.absent_after_s:g} s after the last byte, up to {plan.absent_before_s:g} s after the claim"
        yield "  absent", f"frees the key if {plan.absent_agree} answers in a row agree, {when}"
    yield from (("  beware", text) for text in plan_warnings(plan))


def plan_warnings(plan: Plan) -> Iterator[str]:
    """Yield what a person should look at before a plan is relied on."""
    for verdict, entry in plan.entries:
        if verdict is Verdict.ABSENT and not (entry.when or entry.empty):
            yield BY_STATUS.format(entry.status)


def described_evidence(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Yield what an answer says."""
    yield "answer", f"status {evidence.status}" if evidence.status else "none"
    if evidence.body_digest:
        yield "  SHA-256", evidence.body_digest
    for name, value in evidence.values:
        yield f"  {escaped(name)}", escaped(value)
    yield "verdict", evidence.verdict.value + (f": {evidence.why}" if evidence.why else "")


def spelled(template: Template) -> str:
    """Return a template as a rule writes it, but for doubled braces."""
    names = (*(f"{{{name}}}" for name in template.names), "")
    return "".join(literal + name for literal, name in zip(template.literals, names, strict=True))
