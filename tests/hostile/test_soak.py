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
async def test_a_postgresql_reaches_a_plateau():
    """Keys go in and out for a minute or two; the table stays as large as its live keys made it."""
    report = await asyncio.to_thread(postgres.run, 100_000)
    assert report.growth <= postgres.MOST_GROWTH, "\n".join(report.lines())
