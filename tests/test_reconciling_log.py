"""What is seen of reconciling: which reports are counted as what, and which lines there are of them."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from oncegate.observe import logs, reconciling_log
from oncegate.observe.families import MAX_GROUPS, OTHER
from oncegate.observe.metrics import Metrics
from oncegate.observe.reconciling import By, Left, ProbeReport, ReconcilingCounts
from oncegate.observe.reconciling_log import SHOWN, ReconcilingLog
from oncegate.store.record_name import record_id

KEY = b"k" * 24
LOST = ProbeReport(by=By.JANITOR, key=KEY, rule="charges", upstream="api:80", verdict="inconclusive", why="no answer")
FOUND = ProbeReport(
    by=By.DUPLICATE,
    key=KEY,
    rule="charges",
    upstream="api:80",
    verdict="succeeded",
    status=200,
    outcome="resolved",
    values=(("/id", "ch_9"),),
    body_digest="0f" * 32,
    owner_token=b"t" * 16,
    age_s=2.345,
)
HOSTILE = '\x1b[2J\r\n{"event": "audit"}\u202e' + "x" * 1000


class Lines:
    """Notes the lines of a log."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})


def written(*reports: ProbeReport, pause_s: float = 0.0) -> list[dict[str, Any]]:
    """Return the lines of these reports, without those that wait for the end of a period."""
    lines = Lines()

    async def report() -> None:
        log = ReconcilingLog(ReconcilingCounts(), lines, asyncio.get_running_loop())
        for one in reports:
            log(one)
        await asyncio.sleep(pause_s)

    asyncio.run(report())
    return lines.lines


def counted(*reports: ProbeReport) -> dict[str, float]:
    """Return the samples of a scrape that are not 0, of these reports alone."""
    metrics = Metrics("0", {})
    for one in reports:
        metrics.reconciling.count(one)
    samples = [sample for family in metrics.collect() for sample in family.samples if sample.value]
    return {
        f"{one.name.removeprefix('oncegate_')}{sorted(one.labels.values())}": one.value
        for one in samples
        if any(word in one.name for word in ("probes", "reconciled", "left")) and not one.name.endswith("_created")
    }


# What is counted ...


def test_a_key_that_is_settled_is_counted_once_with_its_age():
    """By whoever settled it. The age has buckets of its own, up to days."""
    found = counted(FOUND, replace(FOUND, by=By.JANITOR, age_s=100_000.0))
    assert found["probes_total['charges', 'succeeded']"] == 2
    assert found["reconciled_total['duplicate']"] == found["reconciled_total['janitor']"] == 1
    assert found["reconciled_age_seconds_count[]"] == 2
    assert found["reconciled_age_seconds_bucket['5.0']"] == 1
    assert found["reconciled_age_seconds_bucket['604800.0']"] == 2


@pytest.mark.parametrize("outcome", ["", "absent", "complete", "fenced", "running", "unconfirmed"])
def test_what_the_store_did_not_carry_out_settles_nothing(outcome):
    """The question counts, and the key does not: its owner, or an operator, was faster."""
    assert counted(replace(FOUND, outcome=outcome)) == {"probes_total['charges', 'succeeded']": 1}


def test_a_key_that_is_left_to_a_person():
    """With or without a question."""
    assert counted(replace(LOST, left=Left.TIME_OVER), replace(LOST, verdict="", left=Left.CANNOT_ASK)) == {
        "probes_total['charges', 'inconclusive']": 1,
        "left_to_a_person_total['charges', 'time_over']": 1,
        "left_to_a_person_total['cannot_ask', 'charges']": 1,
    }


def test_rules_are_bounded():
    """However many rules reloads bring."""
    found = counted(*(replace(LOST, rule=f"rule {number}") for number in range(MAX_GROUPS + 5)))
    assert found[f"probes_total['inconclusive', '{OTHER}']"] == 5
    assert len(found) == MAX_GROUPS + 1


def test_counts_of_workers_are_added():
    """A supervisor has the sums, the histogram with its own buckets included."""
    worker, sums = Metrics("0", {}), Metrics("0", {})
    worker.reconciling.count(FOUND)
    for _ in range(2):
        sums.merge(worker.snapshot()["counts"])
    text = sums.text()[0].decode()
    assert 'oncegate_reconciled_total{by="duplicate"} 2.0' in text
    assert 'oncegate_reconciled_age_seconds_bucket{le="5.0"} 2.0' in text
    assert 'oncegate_probes_total{rule="charges",verdict="succeeded"} 2.0' in text


# Which lines there are ...


def test_a_settled_key_has_its_evidence():
    """As an audit line, which no level leaves out."""
    [line] = written(FOUND)
    assert line.pop("host")
    assert line == {
        "event": logs.AUDIT, "action": "reconcile", "outcome": "resolved", "key_id": record_id(KEY), "rule": "charges",
        "by": "duplicate", "upstream": "api:80", "verdict": "succeeded", "status": 200, "age_s": 2.3,
        "values": {"/id": "ch_9"}, "body_digest": "0f" * 32, "owner_token": b"t".hex() * 16,
    }  # fmt: skip


def test_a_decision_that_the_store_refused_has_its_line_too():
    """It names the word of the store: somebody was faster."""
    [line] = written(replace(FOUND, outcome="fenced"))
    assert (line["action"], line["outcome"]) == ("reconcile", "fenced")


def test_inconclusive_probes_have_a_line_a_period(monkeypatch):
    """Of each rule: the first at once, and then the newest with the number of others."""
    monkeypatch.setattr(reconciling_log, "PERIOD_S", 0.05)
    many = [replace(LOST, why=f"no answer {number}") for number in range(100)]
    lines = written(*many, replace(LOST, rule="refunds"), pause_s=0.1)
    assert [(line["rule"], line["reason"], line.get("left_out")) for line in lines] == [
        ("charges", "no answer 0", None),
        ("refunds", "no answer", None),
        ("charges", "no answer 99", 98),
    ]


def test_each_key_that_is_left_to_a_person_has_a_line():
    """However many there are: somebody has to look at each."""
    lines = written(*(replace(LOST, key=bytes([number]) * 24, left=Left.TIME_OVER) for number in range(20)))
    left = [line for line in lines if line["event"] == "key left to a person"]
    assert [line["key_id"] for line in left] == [record_id(bytes([number]) * 24) for number in range(20)]


def test_nothing_of_an_api_can_forge_a_line(capsys):
    """Control characters are escaped in both formats of the log, and values are cut."""
    for layout in ("json", "console"):
        log = logs.configure("info", layout)

        async def write(log: Any = log) -> None:
            report = ReconcilingLog(ReconcilingCounts(), log, asyncio.get_running_loop())
            report(replace(FOUND, values=((HOSTILE, HOSTILE),), why=HOSTILE))
            report(replace(LOST, why=HOSTILE))

        asyncio.run(write())
        text = capsys.readouterr().err
        assert text.count("\n") == 2, text
        assert not {"\x1b", "\r", "\u202e"} & set(text)
        if layout == "json":
            line = json.loads(text.splitlines()[0])
            assert len(next(iter(line["values"].values()))) < 2 * SHOWN
