"""Short soaks; `make soak` and `make soak STORE=postgres` are the long ones."""

import asyncio

import pytest

from loadtest.soak import postgres
from loadtest.soak.run import soak


async def test_everything_comes_back_to_where_it_was():
    """T11: after a crowd of every manner, and after slow readers, memory, descriptors, spool files, what is held and
    the store's keys are where they were, and what the readers held was within the budget."""
    report = await soak(3, readers=200, stall_s=0.7)
    assert sum(report.outcomes.values()) > 50
    assert report.failures() == [], "\n".join(report.lines())


@pytest.mark.full
@pytest.mark.timeout(900)
async def test_a_postgresql_reaches_a_plateau():
    """Keys go in and out for minutes; the table stays as large as its live keys made it."""
    # With fewer, a key lives for seconds: as long as autovacuum takes where the machine has other work.
    report = await asyncio.to_thread(postgres.run, 300_000)
    assert report.growth <= postgres.MOST_GROWTH, "\n".join(report.lines())
