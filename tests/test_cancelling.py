"""A note to its owner cancels a claim from any process, and a mark in the store says who waits for a response."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import pytest

from oncegate.gateway import cancelling
from oncegate.gateway.cancelling import NO_READER, OPERATOR, STOPPED, TAKEN_BACK, Cancellations
from oncegate.gateway.settling import Progress
from oncegate.keys.digests import Scope
from oncegate.observe.labels import CANCELS
from oncegate.observe.outcome import Outcome
from oncegate.store import readers
from oncegate.store.leases import LeasedClaim, Leases, suspended_clock_s
from oncegate.store.postgres.marks import NoWakes
from oncegate.store.readers import Readers, mark_name
from oncegate.store.record import Claim, ClaimRequest, cancelled_claim
from oncegate.store.results import SettleStatus
from oncegate.store.store import MOST_NOTES, Store
from oncegate.streams.cancels import CANCEL, FETCHED, READ, CancelResult, Note, pack_note, tell_owner, unpack_note
from tests.parts import until
from tests.stores import store_at, store_small

KEY, SCOPE, FINGERPRINT = b"k" * 24, Scope(b"default", b"n" * 16), b"f" * 16
LEASE_MS = 60_000


@pytest.fixture
async def stores(probe):
    """Two processes on one store."""
    both = [store_at(probe.url, timeout_ms=2000, patience_s=2.0, background=asyncio.ensure_future) for _ in range(2)]
    for store in both:
        store.start()
        assert await store.wait_up(5)
    yield both
    for store in both:
        await store.close()


class Worker:
    """What cancels in one process."""

    def __init__(self, store: Store) -> None:
        self.store, self.counts = store, dict.fromkeys(CANCELS, 0.0)
        self.leases = Leases(store, LEASE_MS, lambda event, claim: None, asyncio.get_running_loop().time)
        self.cancellations = Cancellations(store, self.leases, self.counts)
        self.cancel_claim = self.cancellations.cancel_claim

    def hold(self, claim: Claim) -> tuple[LeasedClaim, list[str]]:
        """Hold a claim whose exchange runs; return why it was cancelled, if it was."""
        held, reasons = self.leases.hold(claim, suspended_clock_s(), 60), []

        def cancel(reason: str) -> bool:
            is_first = not reasons
            reasons.extend([reason] * is_first)
            return is_first

        held.cancel = cancel
        return held, reasons


async def claimed(store: Store, mode: bytes = b"retry") -> Claim:
    claim = await store.claim(ClaimRequest(KEY, SCOPE, FINGERPRINT, mode, LEASE_MS, 60_000, 60_000))
    assert isinstance(claim, Claim)
    return claim


# Notes ...


def test_a_note_is_what_was_packed():
    """Also one whose reason is too long, or empty. What a newer version wrote is no note of this one."""
    for note in (
        Note(CANCEL, KEY, b"t" * 16, "operator ä stopped it"),
        Note(FETCHED, KEY, b"t" * 16),
        Note(READ, KEY, b"t" * 16),
    ):
        assert unpack_note(pack_note(note)) == note
    long = pack_note(Note(CANCEL, KEY, b"t" * 16, "ä" * 1000))
    assert len(long) <= 300
    assert unpack_note(long) is not None
    for packed in (b"", long[:40], b"x" + long[1:]):
        assert unpack_note(packed) is None


async def test_a_claim_is_cancelled_from_any_process(stores):
    """Its owner finds a note in its mailbox, perhaps twice, and counts who asked. In its own process there is none."""
    owner, other = map(Worker, stores)
    _, reasons = owner.hold(claim := await claimed(stores[0]))
    assert await other.cancel_claim(KEY, claim.token, "operator eve stopped it") is CancelResult.ACCEPTED
    assert reasons == []
    await owner.cancellations.collect()
    await owner.cancellations.collect()
    assert reasons == ["operator eve stopped it"]
    assert await owner.cancel_claim(KEY, claim.token, STOPPED) is CancelResult.ACCEPTED
    # The second came too late, and does not count.
    assert reasons == ["operator eve stopped it"]
    assert owner.counts == dict.fromkeys(CANCELS, 0.0) | {OPERATOR: 1.0}
    assert set(other.counts.values()) == {0.0}


async def test_the_owner_hears_that_its_response_is_read(stores):
    """By a note about its claim, and not about a later one of the key."""
    owner, other = map(Worker, stores)
    held, reasons = owner.hold(claim := await claimed(stores[0]))
    heard: list[bool] = []
    held.on_read = lambda: heard.append(held.read_elsewhere)
    await other.store.post(claim.token, pack_note(Note(READ, KEY, claim.token[:-1] + b"x")))
    await owner.cancellations.collect()
    assert (heard, held.read_elsewhere) == ([], False)
    await other.store.post(claim.token, pack_note(Note(READ, KEY, claim.token)))
    await owner.cancellations.collect()
    assert (heard[:1], held.read_elsewhere, held.fetched, reasons) == ([True], True, False, [])


async def test_a_cancel_never_ends_a_later_claim(stores):
    """It names the token, in the store and in the mailbox: a note that comes late is about nobody."""
    owner, other = map(Worker, stores)
    first = await claimed(stores[0])
    assert await other.cancel_claim(KEY, first.token, "too late") is CancelResult.ACCEPTED
    await stores[0].release(first, 1.0)
    _, reasons = owner.hold(later := await claimed(stores[0]))
    await owner.cancellations.collect()
    assert reasons == []
    assert await other.cancel_claim(KEY, first.token, "too late") is CancelResult.ABSENT
    assert await owner.cancel_claim(KEY, first.token, "too late") is CancelResult.ABSENT
    assert later.token != first.token


async def test_what_has_ended_cannot_be_cancelled(stores):
    """A complete answer wins; a key that is unknown, or not there, stays as it is."""
    owner, other = stores
    assert await tell_owner(other, KEY, b"t" * 16, "late") is CancelResult.ABSENT
    claim = await claimed(owner, b"hold")
    assert (await owner.mark_unknown(claim, "no answer came", 1.0)).status is SettleStatus.MARKED_UNKNOWN
    assert await tell_owner(other, KEY, claim.token, "late") is CancelResult.UNKNOWN
    await owner.mark_unknown(cancelled_claim(claim), "cancelled: it was stopped", 1.0)
    assert await tell_owner(other, KEY, claim.token, "late") is CancelResult.CANCELLED
    assert (await store_small(owner, claim)).status is SettleStatus.STORED
    assert await tell_owner(other, KEY, claim.token, "late") is CancelResult.COMPLETE
    assert await owner.collect(owner.token_prefix) == []


async def test_a_store_that_is_down_confirms_no_cancel(stores):
    """Nothing is promised then, and nothing fails."""
    owner, other = map(Worker, stores)
    claim = await claimed(stores[0])
    await stores[1].close()
    assert await other.cancel_claim(KEY, claim.token, "late") is CancelResult.UNCONFIRMED
    assert await other.cancellations.note_fetched(KEY, claim.token) is False
    await other.cancellations.collect()
    owner.hold(claim)
    assert await owner.cancellations.note_fetched(KEY, claim.token)


async def test_a_cancel_is_repeated_until_its_request_has_ended(stores, monkeypatch):
    """Its note may have been lost in a failover. One claim is told by one task, however many ask."""
    monkeypatch.setattr(cancelling, "INSIST_S", (0.01,) * 200)
    owner, other = map(Worker, stores)
    held, reasons = owner.hold(claim := await claimed(stores[0]))
    for _ in range(3):
        assert await other.cancel_claim(KEY, claim.token, STOPPED) is CancelResult.ACCEPTED
    assert len(other.cancellations._insisting) == 1
    # The notes are lost.
    await stores[0].collect(stores[0].token_prefix)
    assert reasons == []

    async def is_told_again() -> bool:
        await owner.cancellations.collect()
        return bool(reasons)

    while not await is_told_again():
        await asyncio.sleep(0.01)
    owner.leases.drop(held)
    await stores[0].mark_unknown(cancelled_claim(claim), "cancelled: it was stopped", 1.0)
    await until(lambda: not other.cancellations._insisting)


# When the mailbox is read ...


class Mailbox:
    """A store as far as a worker reads its mailbox. `tells_of_mail`: it says when there is a note."""

    token_prefix, marks = b"me", None

    def __init__(self, *, tells_of_mail: bool) -> None:
        self.tells_of_mail, self.wakes = tells_of_mail, self
        self.reads, self.notes = 0, list[bytes]()

    def watch_mail(self, wake: Callable[[], None]) -> None:
        self.tell = wake

    async def collect(self, prefix: bytes) -> list[bytes]:
        assert prefix == self.token_prefix
        self.reads += 1
        taken, self.notes = self.notes[:MOST_NOTES], self.notes[MOST_NOTES:]
        return taken

    async def read_in(self, seconds: float) -> int:
        """Return how often it is read in the next seconds."""
        before = self.reads
        await asyncio.sleep(seconds)
        return self.reads - before


@asynccontextmanager
async def delivering(mailbox: Mailbox, leases: object) -> AsyncIterator[Cancellations]:
    cancellations = Cancellations(mailbox, leases, {})  # type: ignore[arg-type]
    task = asyncio.ensure_future(cancellations.deliver())
    await asyncio.sleep(0)
    yield cancellations
    task.cancel()


class Running:
    """An exchange that its client may cancel."""

    def __init__(self, cancellations: Cancellations) -> None:
        self.ended = asyncio.Event()
        held = SimpleNamespace(claim=SimpleNamespace(key=KEY, token=b"t" * 16))
        self.task = asyncio.ensure_future(cancellations.run(self, held, None, None, b""))  # type: ignore[arg-type]

    async def run(self) -> Outcome:
        await self.ended.wait()
        return Outcome.EXECUTED

    async def end(self) -> None:
        self.ended.set()
        assert await self.task is Outcome.EXECUTED


async def test_a_mailbox_of_which_nobody_tells_is_read_while_somebody_may_cancel(monkeypatch):
    """While an exchange runs that its client may cancel, or one that is old enough for an operator to know of it."""
    monkeypatch.setattr(cancelling, "PERIOD_S", 0.001)
    mailbox, leases = Mailbox(tells_of_mail=False), SimpleNamespace(oldest_s=0.0)
    async with delivering(mailbox, leases) as cancellations:
        assert not await mailbox.read_in(0.05)
        running = Running(cancellations)
        assert await mailbox.read_in(0.05)
        await running.end()
        await asyncio.sleep(0.01)
        assert not await mailbox.read_in(0.05)
        leases.oldest_s = cancelling.SEEN_S + 0.1
        assert await mailbox.read_in(0.05)


async def test_a_mailbox_of_which_the_store_tells_is_read_when_there_is_a_note(monkeypatch):
    """At once, whatever runs, and until it is empty; else rarely, while an exchange runs that is older than that."""
    monkeypatch.setattr(cancelling, "PERIOD_S", 0.001)
    mailbox, leases = Mailbox(tells_of_mail=True), SimpleNamespace(oldest_s=cancelling.SEEN_S + 0.1)
    async with delivering(mailbox, leases) as cancellations:
        running = Running(cancellations)
        assert not await mailbox.read_in(0.05)
        await running.end()
        mailbox.tell()
        assert await mailbox.read_in(0.01) == 1
        mailbox.notes = [b""] * (2 * MOST_NOTES + 1)
        mailbox.tell()
        assert await mailbox.read_in(0.01) == 3
        assert mailbox.notes == []
    monkeypatch.setattr(cancelling, "RARELY_S", 0.02)
    leases.oldest_s = 0.01
    async with delivering(mailbox, leases):
        assert not await mailbox.read_in(0.05)
        leases.oldest_s = 1.0
        assert await mailbox.read_in(0.05)


async def test_a_cancel_wakes_its_owner(stores):
    """Where the store can tell, it comes at once, however young the request is."""
    owner, other = map(Worker, stores)
    held, reasons = owner.hold(await claimed(stores[0]))
    delivering = asyncio.ensure_future(owner.cancellations.deliver())
    if not isinstance(stores[0].wakes, NoWakes):
        await until(lambda: stores[0].wakes.tells_of_mail)
        await other.cancel_claim(KEY, held.claim.token, STOPPED)
        await until(lambda: reasons == [STOPPED], 1)
    delivering.cancel()


# Until the first byte ...


async def test_a_wait_ends_with_a_cancel():
    """What is waited for is given up at once, or not begun; without a cancel its result comes."""
    progress = Progress(None, None)  # type: ignore[arg-type]
    begun = []

    async def work() -> str:
        begun.append(True)
        await asyncio.sleep(0 if len(begun) == 1 else 60)
        return "done"

    assert await progress.unless_cancelled(work()) == "done"
    waiting = asyncio.ensure_future(progress.unless_cancelled(work()))
    await asyncio.sleep(0)
    assert progress.cancel("stopped")
    assert not progress.cancel("once more")
    assert await asyncio.wait_for(waiting, 5) is None
    assert await progress.unless_cancelled(work()) is None
    assert (len(begun), progress.cancelled) == (2, "stopped")


# Readers ...


async def test_who_waits_is_known_in_every_process(stores, probe):
    """A mark stands as long as somebody waits in some process, and for the grace after that."""
    here, there = (Readers(store.marks) for store in stores)
    has_left = False
    assert not await here.may_wait(KEY)
    with there.waiting(KEY, 3.0, lambda: has_left):
        while not await here.may_wait(KEY):
            await asyncio.sleep(0.01)
    assert 3000 < probe.marks()[mark_name(KEY)] <= 4000
    assert await here.may_wait(KEY)
    probe.remove_mark(mark_name(KEY))
    assert not await here.may_wait(KEY)
    # A client that closed its side is no reader.
    has_left = True
    with there.waiting(KEY, 3.0, lambda: has_left):
        await asyncio.sleep(0.1)
        assert not await here.may_wait(KEY)


async def test_a_store_that_does_not_say_who_waits(stores):
    """Somebody may wait: the owner asks again."""
    await stores[0].close()
    assert await Readers(stores[0].marks).may_wait(KEY)


class Gone:
    """A client that has left."""

    def reader_leaves(self) -> "asyncio.Future[None]":
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future


@asynccontextmanager
async def unread(worker: Worker, held: LeasedClaim):
    """Run an exchange without readers."""

    class Running:
        async def run(self) -> Outcome:
            await asyncio.sleep(60)
            return Outcome.EXECUTED

    running = asyncio.ensure_future(worker.cancellations.run(Running(), held, Gone(), 0.01, b""))
    yield
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_a_claim_whose_address_was_fetched_is_not_ended_for_want_of_readers(stores):
    """Somebody elsewhere has it, and may come whenever they like. Others are ended."""
    owner, other = map(Worker, stores)
    held, reasons = owner.hold(await claimed(stores[0]))
    assert await other.cancellations.note_fetched(KEY, held.claim.token)
    async with unread(owner, held):
        while not held.fetched:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
    assert reasons == []
    held.fetched = False
    async with unread(owner, held):
        while not reasons:
            await asyncio.sleep(0.01)
    assert reasons == [NO_READER]
    assert owner.counts["client_gone"] == 1


# Calls of JSON-RPC ...


async def test_a_call_is_taken_back_from_any_process(stores, monkeypatch):
    """Its name leads to the execution that it names, and to no later one under the same key."""
    monkeypatch.setattr(readers, "SHORT_CALL_S", 0.0)
    monkeypatch.setattr(cancelling, "END_S", 0.05)
    owner, other = map(Worker, stores)
    held, reasons = owner.hold(claim := await claimed(stores[0]))
    ended = asyncio.Event()

    class Running:
        async def run(self) -> Outcome:
            await ended.wait()
            return Outcome.EXECUTED

    running = asyncio.ensure_future(owner.cancellations.run(Running(), held, None, None, b"c" * 24))
    await asyncio.sleep(0.1)
    await other.cancellations.cancel_call(b"d" * 24)
    await owner.cancellations.collect()
    assert reasons == []
    await other.cancellations.cancel_call(b"c" * 24)
    await owner.cancellations.collect()
    assert reasons == [TAKEN_BACK]
    ended.set()
    await running
    owner.leases.drop(held)
    await stores[0].release(claim, 1.0)
    _, reasons = owner.hold(await claimed(stores[0]))
    await other.cancellations.cancel_call(b"c" * 24)
    await owner.cancellations.collect()
    assert reasons == []
