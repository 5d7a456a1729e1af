"""Reads the table `[rule.reconcile]`: a rule's plan for unknown keys, or what is wrong with it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from oncegate.decision import Verdict
from oncegate.keys.sources import KeySources, Source
from oncegate.probing.plan import JSON, KEY, NOTE, Plan
from oncegate.probing.table_fields import FIELDS, VERDICTS, checked
from oncegate.probing.table_templates import parse_answers, parse_body, parse_reference, parse_url

# The methods that change nothing (RFC 9110, section 9.2.1) and that an API answers with what it knows.
SAFE = ("GET", "HEAD")
# The statuses that say by themselves that nothing is there (RFC 9110, sections 15.3.5, 15.5.5 and 15.5.11). A 400 says
# that the question is wrong.
NOT_THERE = ("204", "404", "410")


def parse_table(value: Any) -> Plan:
    """Return the plan in a table, as TOML has it. Raises ValueError with all that is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError("must be a table, [rule.reconcile]")
    problems: list[str] = []
    values = dict(checked(value, FIELDS, problems))
    plan = None if problems else _plan(values, problems)
    if problems or plan is None:
        raise ValueError("; ".join(problems))
    return plan


def _plan(values: dict[str, Any], problems: list[str]) -> Plan | None:
    """Return the plan of valid fields, and report what does not fit together."""
    problems += _missing(values)
    keep: tuple[tuple[str, Source | None], ...] = values.pop("keep", ())
    known = [*(name for name, _ in keep), NOTE]
    made: dict[str, Any] = {}
    parsers: dict[str, Callable[[Any], dict[str, Any]]] = {
        "url": lambda url: parse_url(url, known),
        "body": lambda body: {"body": parse_body(body, values.get("content_type", JSON), known)},
        "reference": lambda pairs: {"reference": parse_reference(pairs, known)},
        "answers": lambda answers: {"answers": parse_answers(answers, known)},
    }
    for name, parse in parsers.items():
        if name in values:
            try:
                made |= parse(values.pop(name))
            except ValueError as error:
                problems.append(f"{name} {error}")
    entries = [(verdict, entry) for name, verdict in VERDICTS.items() for entry in values.pop(name, ())]
    values.pop("safe", None)
    if "credentials_file" in values:
        values["credentials"] = values.pop("credentials_file")
    if problems:
        return None
    plan = Plan(**values, **made, keep=keep, entries=tuple(entries))
    problems += _contradictions(plan)
    return plan


def _missing(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a table lacks."""
    for name in ("url", "succeeded"):
        if not values.get(name):
            yield f"has no {name}"
    if "reference" not in values:
        yield "has no reference: which member of an answer repeats what was asked for, {} for an API that repeats none"
    times = [name for name in ("absent_after_s", "absent_before_s") if name not in values]
    if values.get("absent") and times:
        yield f"absent needs {' and '.join(times)} beside it: not found is not the same as never executed"
    for name in ("absent_after_s", "absent_before_s", "absent_agree"):
        if name in values and not values.get("absent"):
            yield f"{name} needs absent beside it"
    if values.get("method", "GET") not in SAFE and not values.get("safe"):
        yield f"method {values['method']} may change something; safe = true says that this one does not"
    if values.get("method") == "HEAD" and "body" in values:
        yield "body contradicts method HEAD"


def _contradictions(plan: Plan) -> Iterator[str]:
    """Yield what does not fit together in a plan whose parts are right."""
    asked = {name for template in (plan.path, plan.query, plan.body) if template for name in template.names}
    if not asked:
        yield "url names no value of the request, and would ask the same about every key"
    for name, _ in plan.keep:
        if name not in plan.names:
            yield f"keep has {name}, which no template names: it would be stored for nothing"
    if plan.absent_after_s and plan.absent_after_s >= plan.absent_before_s:
        yield "absent_after_s must be less than absent_before_s"
    if plan.first_after_s > plan.most_s:
        yield "first_after_s must not be over most_s"
    if plan.method == "HEAD" and (
        plan.reference or plan.audit or any(one.when or one.empty for _, one in plan.entries)
    ):
        yield "method HEAD has answers without a body: reference must be {}, and audit, when and empty have no use"
    for verdict, entry in plan.entries:
        answer = plan.answer(verdict)
        if verdict is Verdict.ABSENT and entry.status not in NOT_THERE and not (entry.when or entry.empty):
            yield f"absent with status {entry.status} needs when or empty: alone it does not say that nothing is there"
        if verdict is Verdict.FAILED and entry.status.startswith("2") and answer.status is None:
            yield "failed needs a status in answers.failed: the probe's own would tell the client that it succeeded"
        if verdict is Verdict.SUCCEEDED and not entry.status.startswith("2") and answer.status is None:
            yield "succeeded needs a status in answers.succeeded: the probe's own is not one of a success"


def rule_contradictions(values: Mapping[str, Any], mode: str, key: KeySources | None) -> Iterator[tuple[str, str]]:
    """Yield the fields of a rule that its table `reconcile` contradicts, and why. `mode`: its `on_unknown`."""
    plan: Plan | None = values.get("reconcile")
    if plan is None:
        return
    if mode == "retry":
        yield "reconcile", 'contradicts on_unknown = "retry": a retry would execute before anybody has asked'
    if values.get("guard") == "off":
        yield "reconcile", 'contradicts guard = "off": only a request with a key has a record'
    if values.get("protocol") == "json-rpc":
        yield "reconcile", "contradicts protocol: an answer of JSON-RPC has the id of its request, which no API repeats"
    if NOTE in plan.names and "note" not in values:
        yield "reconcile", "names {note}, and the rule has no note"
    if KEY in plan.names and key is not None and not key.leading_headers:
        yield "reconcile", "names {key}, which is no header alone here; keep what it is made of, such as /order_id"
