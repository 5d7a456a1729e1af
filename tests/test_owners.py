"""The owners of claims in an embedded store: a lock for each, which says whether it lives."""

import pytest

from oncegate.server import owners as module
from oncegate.server.owners import Owners
from oncegate.store.record_view import StoreError

FIRST, SECOND = b"f" * 10, b"s" * 10


@pytest.fixture
def asked(monkeypatch):
    """The owners that were taken for dead, one list for each time."""
    asked: list[list[bytes]] = []

    async def mark_orphans(_: str, dead) -> int:
        asked.append(sorted(dead))
        return len(dead)

    monkeypatch.setattr(module, "mark_orphans", mark_orphans)
    return asked


@pytest.fixture
def new(tmp_path):
    """Make the owners as another process would see them: a lock belongs to whoever opened it."""
    events: list[str] = []

    def new() -> Owners:
        return Owners(f"unix://{tmp_path}/store.sock", lambda event, **_: events.append(event))

    new.events = events
    return new


def die(owners: Owners) -> None:
    """Release the lock as the end of a process does."""
    module.os.close(owners._own[0])


async def test_an_owner_is_dead_once_its_lock_is_free(new, asked):
    """The keys of a dead owner are marked once; an owner that lives, and one that ended in order, are left alone."""
    first, second, third = new(), new(), new()
    first.register(FIRST)
    second.register(SECOND)
    third.register(b"t" * 10)
    third.unregister()
    await new().mark_orphans()
    assert asked == []
    die(first)
    await new().mark_orphans()
    assert asked == [[FIRST]]
    await new().mark_orphans()
    assert asked == [[FIRST]]
    die(second)
    await new().mark_orphans()
    assert asked == [[FIRST], [SECOND]]
    assert new.events == ["keys of a killed proxy are unknown"] * 2


async def test_a_store_that_fails_is_asked_again(new, monkeypatch, asked):
    """Owners whose keys could not be marked are found dead again at the next start."""
    owner = new()
    owner.register(FIRST)
    die(owner)
    with monkeypatch.context() as patched:

        async def fail(*_: object) -> int:
            raise StoreError("no reply")

        patched.setattr(module, "mark_orphans", fail)
        await new().mark_orphans()
    assert new.events == ["keys of a killed proxy keep their lease"]
    await new().mark_orphans()
    assert asked == [[FIRST]]


async def test_a_file_that_is_no_owner_changes_nothing(new, asked, tmp_path):
    """Other files in the folder are left alone."""
    (tmp_path / "owners").mkdir()
    (tmp_path / "owners" / "README").touch()
    await new().mark_orphans()
    assert asked == []
    assert (tmp_path / "owners" / "README").exists()


def test_an_owner_that_cannot_register_serves(new, tmp_path):
    """Where the folder cannot be written, the keys of this owner keep their lease, and the log says so."""
    (tmp_path / "owners").touch()
    owner = new()
    owner.register(FIRST)
    owner.unregister()
    assert new.events == ["owner not registered"]
