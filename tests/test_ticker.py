"""A ticker calls back what is due, all of a tick together, and nothing that was cancelled."""

import asyncio
from collections.abc import Callable

import pytest

from oncegate.buffers.ticker import Ticker
from tests.parts import until

TICK_S = 0.05


@pytest.fixture
async def ticker() -> Ticker:
    return Ticker(asyncio.get_running_loop(), TICK_S)


def note(called: list[tuple[str, float]], name: str) -> Callable[[], None]:
    """Return a function that notes its call with the time."""
    loop = asyncio.get_running_loop()
    return lambda: called.append((name, loop.time()))


async def test_nothing_is_called_too_early_and_what_is_due_is_called_in_order(ticker):
    """A shorter delay that began later comes first; nothing waits for much more than a tick longer."""
    called: list[tuple[str, float]] = []
    began = asyncio.get_running_loop().time()
    ticker.call_later(6 * TICK_S, note(called, "later"))
    ticker.call_later(0.0, note(called, "at once"))
    ticker.call_later(2 * TICK_S, note(called, "soon"))
    await until(lambda: len(called) == 3)
    assert [name for name, _ in called] == ["at once", "soon", "later"]
    assert all(at - began >= least * TICK_S - 0.002 for (_, at), least in zip(called, (0, 2, 6), strict=True))


async def test_what_is_due_in_one_tick_is_called_in_one_turn(ticker):
    """Although it began at different times."""
    turns, turn = [], 0

    async def count() -> None:
        nonlocal turn
        while len(turns) < 10:
            turn += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count())
    at = asyncio.get_running_loop().time() + 4 * TICK_S
    for _ in range(10):
        ticker.call_later(at - asyncio.get_running_loop().time(), lambda: turns.append(turn))
        await asyncio.sleep(0.001)
    await until(lambda: len(turns) == 10)
    await counting
    assert len(set(turns)) <= 2  # they began on both sides of a tick, at most


async def test_what_fails_takes_nothing_with_it(ticker):
    """Of one tick, one fails and one cancels another: the rest is called all the same."""
    called: list[tuple[str, float]] = []
    failures: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(str(context["exception"])))

    def fail() -> None:
        raise RuntimeError("a bug")

    dropped = note(called, "dropped")
    tick = ticker.call_later(0.0, note(called, "kept"))
    ticker.call_later(0.0, dropped)
    ticker.call_later(0.0, lambda: ticker.cancel(tick, dropped))
    ticker.call_later(0.0, fail)
    await until(lambda: called)
    assert ([name for name, _ in called], failures) == (["kept"], ["a bug"])


async def test_what_is_cancelled_is_not_called(ticker):
    """And the others are. What begins within a call is called, too; then no timer is left."""
    called: list[tuple[str, float]] = []
    dropped, kept = note(called, "dropped"), note(called, "kept")
    tick = ticker.call_later(TICK_S, dropped)
    ticker.call_later(TICK_S, kept)
    ticker.call_later(TICK_S, lambda: ticker.call_later(TICK_S, note(called, "again")) and None)
    ticker.cancel(tick, dropped)
    await until(lambda: len(called) == 2)
    assert [name for name, _ in called] == ["kept", "again"]
    await until(lambda: ticker._timer is None)
    ticker.cancel(tick, dropped)
