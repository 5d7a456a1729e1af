"""A short soak; `make soak` is the long one."""

from loadtest.soak.run import soak


async def test_everything_comes_back_to_where_it_was():
    """T11: after a crowd of every manner, and after slow readers, memory, descriptors, spool files, what is held and
    the store's keys are where they were, and what the readers held was within the budget."""
    report = await soak(3, readers=200, stall_s=0.7)
    assert sum(report.outcomes.values()) > 50
    assert report.failures() == [], "\n".join(report.lines())
