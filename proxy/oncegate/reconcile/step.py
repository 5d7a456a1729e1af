"""One step of one unknown key: ask the API, conclude, and settle the key by what it says.

At each await the process may die, the owner may wake up, and an operator or another replica may be faster. So the order
is: a lease in the key's mark, which lapses; then a second look at the record; then the question; and at last a
compare-and-set against the very claim that was looked at, which the store refuses while its owner has a running lease.
What was not written down counts as not asked.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from oncegate.decision import HOLD, Verdict
from oncegate.messages.response_head import response_digest
from oncegate.observe.reconciling import By, Left, ProbeReport, Report
from oncegate.probing.absence import Conclusion, conclusion
from oncegate.probing.plan import CannotAsk, Plan, Question, question
from oncegate.probing.verdicts import Evidence, ProbeAnswer, conclude, no_answer
from oncegate.reconcile import progress
from oncegate.reconcile.answers import GivenResponse, answer_for
from oncegate.reconcile.pace import Pace, asked_pause_s
from oncegate.reconcile.progress import Progress
from oncegate.reconcile.questions import Asking, NoAnswer
from oncegate.rules.model import Rule
from oncegate.store.leases import suspended_clock_s
from oncegate.store.record import pack
from oncegate.store.record_view import UNDECIDED, Deciding, RecordView, claim_of
from oncegate.store.results import ResolveStatus
from oncegate.store.store import Store

# Until a key is looked at again whose mark somebody else has changed, or whose store did not reply.
_AGAIN_S = 0.5
_DONE = (ResolveStatus.RESOLVED, ResolveStatus.RELEASED)


def never_mind(_key: bytes, _freed: bool) -> None:
    """Stand in for a callback that nobody has set."""


@dataclass(frozen=True, slots=True)
class Probing:
    """What a step works with. `report` is given what became of each one that changed something.

    `ended(key, freed)` is called once a step of this process has settled a key.
    """

    store: Store
    asking: Asking
    pace: Pace
    report: Report
    ended: Callable[[bytes, bool], None] = never_mind
    jitter: Callable[[], float] = random.random


class Step(Enum):
    """How a step ended."""

    # The key is settled by it.
    SETTLED = "settled"
    # The answer, or that there was none, does not settle it.
    ASKED = "asked"
    # It is not due, or somebody else asks.
    WAITS = "waits"
    # The upstream is to be left alone for now.
    HELD_BACK = "held_back"
    # It is a person's.
    LEFT = "left"
    # It is no unknown key that this may ask about, or none any more.
    OVER = "over"


class StepResult(NamedTuple):
    """`wait_s`: until another step may do something. `report`: of a step that asked, or left the key to a person."""

    step: Step
    wait_s: float = 0.0
    report: ProbeReport | None = None


def may_ask(record: RecordView) -> bool:
    """Return whether the API may be asked about a record: none that its user stopped, or that has a running lease."""
    return record.open_kind in UNDECIDED and record.mode == HOLD


def went_elsewhere(record: RecordView, rule: Rule) -> bool:
    """Return whether the upstream that would be asked is not the one that got the request, by a reload since then."""
    plan = rule.policy.reconcile
    # A record does not name the upstream of the settings.
    upstream = rule.upstream.label if rule.policy.destination else ""
    return plan is not None and plan.is_upstream and record.kept.upstream != upstream


async def take_step(
    deps: Probing, record: RecordView, rule: Rule, by: By = By.JANITOR, patience_s: float = 0.0
) -> StepResult:
    """Take one step if it is due, or anyhow where a person wants it. Raises StoreError.

    `record`: as it was read just now. `patience_s`: how long it may wait for its place at the upstream.
    """
    plan = rule.policy.reconcile
    if plan is None or not may_ask(record):
        return StepResult(Step.OVER)
    return await _Step(deps, record, rule, plan, by).take(patience_s)


class _Step:
    """One step of one key. `_packed` is the mark as it was read or written last: what the next change is made of."""

    def __init__(self, deps: Probing, record: RecordView, rule: Rule, plan: Plan, by: By) -> None:
        self._deps, self._record, self._rule, self._plan, self._by = deps, record, rule, plan, by
        self._read_s, self._packed, self._name = suspended_clock_s(), b"", progress.mark_name(record.key)

    @property
    def _values(self) -> dict[str, str]:
        """The values of the request that templates name."""
        return dict(self._record.kept.values)

    def _now_ms(self) -> int:
        """Return the time of the record's server: when the record was read, and what has passed since."""
        return self._record.now_ms + int((suspended_clock_s() - self._read_s) * 1000)

    async def take(self, patience_s: float) -> StepResult:
        before = await self._progress()
        if before is None:
            return StepResult(Step.WAITS, _AGAIN_S)
        asked = self._question()
        if self._by is not By.OPERATOR:
            if before.left:
                return StepResult(Step.LEFT)
            if progress.is_over(before, self._plan, self._now_ms()):
                return await self._leave(before, Left.TIME_OVER)
            if isinstance(asked, CannotAsk):
                return await self._leave(before, Left.CANNOT_ASK, asked.why)
            if before.due_ms > self._now_ms():
                return self._waits(before)
        if isinstance(asked, CannotAsk):
            return StepResult(Step.ASKED, report=self._report(why=asked.why))
        if before.leased_ms > self._now_ms():
            return self._waits(before)
        if wait_s := await self._deps.pace.take(self._origin, self._plan.rate_per_s, self._now_ms, patience_s):
            return StepResult(Step.HELD_BACK, wait_s)
        return await self._ask(before, asked)

    def _question(self) -> Question | CannotAsk:
        """Return what is asked about the record, by what it keeps."""
        if went_elsewhere(self._record, self._rule):
            return CannotAsk("it went to another upstream than its rule has now")
        return question(self._plan, self._values)

    def _waits(self, before: Progress) -> StepResult:
        return StepResult(Step.WAITS, before.wait_ms(self._now_ms()) / 1000)

    # The mark ...

    async def _progress(self) -> Progress | None:
        """Return how far the key is, which may begin here; None where somebody else was faster."""
        self._packed = await self._deps.store.marks.get(self._name)
        found = progress.unpack(self._packed, self._record, self._plan)
        if found is not None:
            return found
        begun = progress.begin(self._record, self._plan)
        return begun if await self._swap(begun) else None

    async def _swap(self, after: Progress) -> bool:
        """Change the mark, if it is as this step saw it last."""
        packed, lasts_ms = after.pack(), progress.lasts_ms(self._record)
        if not await self._deps.store.marks.swap(self._name, self._packed, packed, lasts_ms):
            return False
        self._packed = packed
        return True

    async def _leave(self, before: Progress, left: Left, why: str = "") -> StepResult:
        """Leave the key to a person. Whoever's change of the mark it is says so, once."""
        if not await self._swap(progress.left(before, left.label)):
            return StepResult(Step.WAITS, _AGAIN_S)
        report = self._report(why=why or before.why, left=left)
        self._deps.report(report)
        return StepResult(Step.LEFT, report=report)

    # The question ...

    @property
    def _origin(self) -> str:
        return str(self._plan.origin)

    async def _ask(self, before: Progress, asked: Question) -> StepResult:
        if not await self._swap(progress.leased(before, self._plan, self._now_ms())):
            return StepResult(Step.WAITS, _AGAIN_S)
        # Since the first look, the owner may have come back, or somebody else have decided.
        record = await self._deps.store.records.read(self._record.key)
        if record is None or not may_ask(record) or progress.unpack(self._packed, record) is None:
            return StepResult(Step.OVER)
        self._record, self._read_s = record, suspended_clock_s()
        asked_ms = self._now_ms()
        answer = await self._deps.asking.ask(self._plan, self._rule.upstream, asked)
        await self._feel_pulse(answer)
        evidence, response = self._concluded(answer)
        absence = progress.absence(self._plan)
        silent_ms = asked_ms - progress.last_byte_ms(before)
        counts = absence.counts(silent_ms, self._now_ms() - progress.first_claim_ms(record))
        after = progress.answered(before, evidence.verdict, evidence.why, counts, self._now_ms())
        ends = conclusion(evidence.verdict, after.agreed, absence)
        if ends is Conclusion.COMPLETE and response is not None:
            return await self._settled(after, evidence, await self._complete(evidence, response))
        if ends is Conclusion.FREE:
            return await self._settled(after, evidence, await self._free(evidence))
        return await self._note(after, evidence)

    def _concluded(self, answer: ProbeAnswer | NoAnswer) -> tuple[Evidence, GivenResponse | None]:
        """Return what an answer says, and what later requests get where that completes the key."""
        if isinstance(answer, NoAnswer):
            return no_answer(answer.why), None
        values = self._values
        evidence = conclude(self._plan, values, answer)
        if evidence.verdict not in (Verdict.SUCCEEDED, Verdict.FAILED):
            return evidence, None
        response = answer_for(self._plan, values, evidence, answer)
        if isinstance(response, GivenResponse):
            return evidence, response
        return replace(evidence, verdict=Verdict.INCONCLUSIVE, why=response.why), None

    async def _feel_pulse(self, answer: ProbeAnswer | NoAnswer) -> None:
        """Note for the next questions how the upstream is."""
        pace = self._deps.pace
        if isinstance(answer, ProbeAnswer) and answer.status < 500 and answer.status != 429:
            return pace.answered(self._origin)
        pace.failed(self._origin)
        if isinstance(answer, ProbeAnswer) and (pause_s := asked_pause_s(answer.status, answer.fields)):
            await pace.pause(self._origin, pause_s, self._now_ms)
        return None

    async def _note(self, after: Progress, evidence: Evidence, refused: ResolveStatus | None = None) -> StepResult:
        """Write down an answer that does not settle the key. A note that is lost counts nothing."""
        after = progress.later(after, self._plan, self._deps.jitter())
        await self._swap(after)
        report = self._report(evidence, outcome="" if refused is None else refused.value)
        self._deps.report(report)
        return StepResult(Step.ASKED, after.wait_ms(self._now_ms()) / 1000, report)

    # The verdict ...

    def _deciding(self, evidence: Evidence) -> Deciding:
        return Deciding.of(self._record, evidence_text(self._by, evidence))

    async def _complete(self, evidence: Evidence, given: GivenResponse) -> ResolveStatus:
        """Complete the key, with a response for later requests. Its owner is fenced by that, as by an operator."""
        store, record, policy = self._deps.store, self._record, self._rule.policy
        response, body = given
        digest = response_digest(response.status, response.reason, response.block)
        digest.update(body)
        stored = replace(response, digest=digest.digest(), completed_ms=record.now_ms)
        claim = replace(claim_of(record, policy.retention_ms), token=store.token(), tombstone_ms=policy.tombstone_ms)
        return await store.resolve_by_operator(claim, self._deciding(evidence), pack(claim, stored), body)

    async def _free(self, evidence: Evidence) -> ResolveStatus:
        """Free the key: the API has said often enough that it never executed the request."""
        store, record = self._deps.store, self._record
        return await store.release_by_operator(record.key, self._deciding(evidence), store.token(), record.fence)

    async def _settled(self, after: Progress, evidence: Evidence, status: ResolveStatus) -> StepResult:
        if status not in _DONE:
            # The owner lives, somebody else has decided, or nobody knows: the record tells the next step.
            return await self._note(after, evidence, status)
        await self._deps.store.marks.swap(self._name, self._packed, b"", 1)
        self._deps.ended(self._record.key, status is ResolveStatus.RELEASED)
        report = self._report(evidence, outcome=status.value)
        self._deps.report(report)
        return StepResult(Step.SETTLED, report=report)

    def _report(
        self, evidence: Evidence | None = None, *, outcome: str = "", why: str = "", left: Left | None = None
    ) -> ProbeReport:
        record, upstream = self._record, self._rule.upstream
        origin = self._plan.origin
        asked = upstream.label if self._plan.is_upstream or origin is None else origin.authority
        seen = evidence or Evidence(Verdict.INCONCLUSIVE, 0, why)
        return ProbeReport(
            by=self._by,
            key=record.key,
            rule=self._rule.policy.rule,
            upstream=asked,
            verdict="" if evidence is None else seen.verdict.value,
            status=seen.status,
            why=seen.why,
            outcome=outcome,
            values=seen.values,
            body_digest=seen.body_digest,
            owner_token=record.token,
            age_s=(self._now_ms() - record.created_ms) / 1000,
            left=left,
        )


# What the audit trail keeps of the evidence, in bytes.
_EVIDENCE_BYTES = 1024


def evidence_text(by: By, evidence: Evidence) -> bytes:
    """Return the evidence of a verdict for the audit trail: JSON, without the values where they are too long."""
    facts = {"by": by.label, "verdict": evidence.verdict.value, "status": evidence.status}
    facts |= {"body_sha256": evidence.body_digest} if evidence.body_digest else {}
    whole = json.dumps({**facts, "values": dict(evidence.values)} if evidence.values else facts).encode()
    return whole if len(whole) <= _EVIDENCE_BYTES else json.dumps(facts).encode()
