"""What an operator asks the API about an unknown key, under a rule that reconciles.

A dry run asks, and changes nothing. The other takes the key's next step, as the janitor takes it: with its lease, its
rate and its conditions for an absence. Only the pause before it is left out.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oncegate.decision import Verdict
from oncegate.keys.notes import escaped
from oncegate.observe.reconciling import By, ProbeReport
from oncegate.observe.reconciling_log import audit_facts
from oncegate.operating.decisions import NOT_CARRIED_OUT, Desk
from oncegate.operating.errors import OperatorError
from oncegate.probing.absence import Conclusion, conclusion
from oncegate.probing.described import described_evidence, described_question
from oncegate.probing.plan import CannotAsk, Plan, question
from oncegate.probing.templates import Unfillable
from oncegate.probing.verdicts import ProbeAnswer, conclude, no_answer
from oncegate.reconcile import progress
from oncegate.reconcile.answers import GivenResponse, answer_for
from oncegate.reconcile.pace import Pace
from oncegate.reconcile.progress import Progress
from oncegate.reconcile.questions import Asking, NoAnswer
from oncegate.reconcile.step import Probing, Step, StepResult, may_ask, take_step, went_elsewhere
from oncegate.rules.model import Rule, Rules
from oncegate.store.record_view import RecordView
from oncegate.store.results import ResolveStatus

# How long a person waits for a place at an API that others are asking.
PATIENCE_S = 5.0
# Characters of a body that a dry run shows.
SHOWN = 2000
STAYS = "would stay unknown"
# What a step without a verdict says.
NOT_ASKED = {
    Step.WAITS: "not asked: another process asks now; try again in {:.0f} s",
    Step.HELD_BACK: "not asked: the API is to be left alone for now; try again in {:.0f} s",
    Step.OVER: "not asked: the key is not unknown any more",
}
ENDED = {
    ResolveStatus.RESOLVED: "the key is complete, and its retries get the response",
    ResolveStatus.RELEASED: "the key is free, and the next retry executes",
}


def rule_of(rules: Rules, record: RecordView) -> Rule:
    """Return the rule whose question is asked about a key. Raises OperatorError where none is."""
    name = record.kept.rule
    rule = next((one for one in rules.rules if one.name == name), None)
    if rule is None or rule.policy.reconcile is None:
        of = f'the rule "{escaped(name)}"' if name else "the settings alone"
        raise OperatorError(f"this key came under {of}, without a [rule.reconcile] that says what to ask")
    if not may_ask(record):
        raise OperatorError(f"{_state(record)}; the API is asked only about a key that is unknown under hold")
    if went_elsewhere(record, rule):
        raise OperatorError("nothing can be asked: it went to another upstream than its rule has now")
    return rule


def _state(record: RecordView) -> str:
    if record.open_kind is None:
        return f"this key is {record.state.value}"
    mode = record.mode.decode("ascii", "replace")
    return "its owner is still working on it" if record.lease_left_ms > 0 else f"this key is unknown under {mode}"


# The next step of a key ...


@dataclass(frozen=True, slots=True)
class Probed:
    """What became of a step. `report`: None where nobody was asked."""

    step: Step
    report: ProbeReport | None
    # For the operator.
    text: str

    @property
    def is_settled(self) -> bool:
        """Whether the key has ended by it."""
        return self.step is Step.SETTLED

    @property
    def facts(self) -> dict[str, Any]:
        """What the audit line says of it."""
        return {"outcome": self.step.value} if self.report is None else audit_facts(self.report)


async def probe(desk: Desk, record: RecordView) -> Probed:
    """Ask the API about a key now, and settle it if the answer is clear. Raises OperatorError, StoreError."""
    rule = rule_of(desk.rules, record)
    await desk.introduce()
    async with Asking() as asking:
        pace = Pace(desk.store, asyncio.get_running_loop().time)
        # What a step reports, it returns as well.
        deps = Probing(desk.store, asking, pace, report=lambda _: None)
        result = await take_step(deps, record, rule, By.OPERATOR, PATIENCE_S)
    return Probed(result.step, result.report, _text(result))


def _text(result: StepResult) -> str:
    report = result.report
    if report is None:
        return NOT_ASKED.get(result.step, "not asked").format(result.wait_s)
    said = ": ".join(escaped(one) for one in (report.verdict or "not asked", report.why) if one)
    if not report.outcome:
        return f"{said}; the key stays unknown"
    status = ResolveStatus(report.outcome)
    return f"{said}; {ENDED.get(status) or NOT_CARRIED_OUT[status]}"


# A dry run ...


async def dry_run(desk: Desk, record: RecordView) -> list[tuple[str, str]]:
    """Return what would be asked about a key, what the API says to it now, and what would become of the key.

    These are labels and texts, in which nothing is a control character and no credential has a value. Nothing is
    changed. Raises OperatorError, StoreError.
    """
    rule = rule_of(desk.rules, record)
    plan = rule.policy.reconcile
    assert plan is not None
    asked = question(plan, dict(record.kept.values))
    if isinstance(asked, CannotAsk):
        raise OperatorError(f"nothing can be asked: {asked.why}")
    async with Asking() as asking:
        answer = await asking.ask(plan, rule.upstream, asked)
    known = progress.unpack(await desk.store.marks.get(progress.mark_name(record.key)), record)
    said = _concluded(plan, record, known or progress.begin(record, plan), answer)
    return [(label, escaped(text)) for label, text in (*described_question(plan, dict(record.kept.values)), *said)]


def _concluded(
    plan: Plan, record: RecordView, now: Progress, answer: ProbeAnswer | NoAnswer
) -> Iterator[tuple[str, str]]:
    """Yield what an answer says, what would become of the key, and what a retry would get."""
    if isinstance(answer, NoAnswer):
        yield from described_evidence(no_answer(answer.why))
        yield "key", STAYS
        return
    evidence, absence = conclude(plan, dict(record.kept.values), answer), progress.absence(plan)
    yield from described_evidence(evidence)
    silent_ms = record.now_ms - progress.last_byte_ms(now)
    counts = absence.counts(silent_ms, record.now_ms - progress.first_claim_ms(record))
    after = progress.answered(now, evidence.verdict, evidence.why, counts, record.now_ms)
    match conclusion(evidence.verdict, after.agreed, absence):
        case Conclusion.COMPLETE:
            yield from _complete(answer_for(plan, dict(record.kept.values), evidence, answer))
        case Conclusion.FREE:
            yield "key", "would be free: the next retry executes"
        case _:
            yield "key", STAYS
            if evidence.verdict is Verdict.ABSENT:
                yield (
                    "  agreed",
                    f"{after.agreed} of {absence.agree}" if counts else f"it does not count: {_early(plan)}",
                )


def _early(plan: Plan) -> str:
    return (
        f"it counts from {plan.absent_after_s:g} s after the last byte, to {plan.absent_before_s:g} s after the claim"
    )


def _complete(given: GivenResponse | Unfillable) -> Iterator[tuple[str, str]]:
    if isinstance(given, Unfillable):
        yield "key", f"{STAYS}: {given.why}"
        return
    yield "key", "would be complete"
    yield "a retry gets", f"{given.stored.status} {given.stored.reason.decode('latin-1')}".strip()
    for line in given.stored.block.decode("utf-8", "replace").split("\r\n"):
        if line:
            yield "  head", line
    if given.body:
        yield "  body", given.body[:SHOWN].decode("utf-8", "replace")
    yield "  bytes", str(given.stored.size)
