"""A small retry storm: what retries cost without oncegate, and that they cost nothing with it."""

import os
from pathlib import Path

import pytest
import uvloop

from config.clients.sending import Outcome
from loadtest.retry_storm.plan import Plan, fate, operations
from loadtest.retry_storm.report import plot, table
from loadtest.retry_storm.run import Side, run

pytestmark = pytest.mark.xdist_group("storm")
PLAN = Plan(seed=7, seconds=1.5, rate=70.0, patience_s=0.5)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="not distributed")
def test_a_group_stays_together(request: pytest.FixtureRequest):
    """Groups share what took long to make, and do not run beside themselves. Some releases of pytest ignore them."""
    assert request.node.nodeid.endswith("@storm")


def test_a_seed_is_a_run():
    """Operations, and what becomes of each execution, are the seed's alone; every kind of failure is among them."""
    assert operations(PLAN) == operations(PLAN) != operations(Plan(8, 1.5, 70.0))
    fates = {fate(PLAN, one, nth).how for one in operations(PLAN) for nth in (1, 2)}
    assert fates == {"fine", "slow", "busy", "cut"}
    begins, ends = PLAN.brownout
    bad = [begins <= one.begins_s < ends for one in operations(PLAN) if fate(PLAN, one, 1).how != "fine"]
    assert sum(bad) > len(bad) * 2 / 3


def test_duplicates_fall_to_zero(tmp_path: Path):
    """The same operations and failures on both sides: without oncegate some are done and paid twice, with it none;
    what is not known is said, and done at most once."""
    without, with_it, asking = uvloop.run(run(PLAN, tmp_path))
    assert len(without.duplicates) > 0
    assert with_it.duplicates == asking.duplicates == []
    for kind in ("charges", "prompts"):
        assert without.paid(kind)[0] >= without.paid(kind)[1]
        assert with_it.paid(kind)[0] == with_it.paid(kind)[1] > 0
    for side in (without, with_it, asking):
        assert len(side.ended) == len(side.operations) == len(operations(PLAN))
        assert all(1 <= one.tries <= 4 for one in side.ended)
        answered = {one.operation.number for one in side.ended if one.outcome is Outcome.ANSWERED}
        assert answered <= side.executions.keys()
    cuts = sum(how == "cut" for _, _, how in with_it.calls)
    told, open_ = with_it.count(Outcome.UNKNOWN), with_it.count(Outcome.OPEN)
    assert told <= cuts <= told + open_
    assert without.count(Outcome.UNKNOWN) == 0  # nobody says so
    assert len(with_it.calls) < len(without.calls)
    assert (with_it.learnt, asking.learnt) == (0, asking.count(Outcome.UNKNOWN))
    text = table(without, with_it, asking)
    assert f"| **duplicate executions** | **{len(without.duplicates)}** | **0** | **0** |" in text
    plot(tmp_path / "storm.png", PLAN, without, with_it)
    assert (tmp_path / "storm.png").stat().st_size > 10_000


def test_what_counts_as_a_duplicate():
    """Work that was done again, whoever heard of the first; what was declined is no work."""
    one, two = operations(PLAN)[:2]
    calls = [(3.0, 0, "fine"), (1.0, 0, "busy"), (2.0, 0, "cut"), (4.0, 1, "slow"), (5.0, 0, "slow"), (6.0, 1, "busy")]
    side = Side(0.0, [one, two._replace(kind=one.kind)], [], calls)
    assert side.duplicates == [3.0, 5.0]
    assert side.paid(one.kind) == (3 * one.price + two.price, one.price + two.price)
