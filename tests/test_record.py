"""The bytes of a record, which checks itself: a record that fails its checks is corrupt."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.decision import State
from oncegate.messages.response_head import response_digest
from oncegate.store import record
from oncegate.store.record import (
    Claim,
    Corrupt,
    Record,
    StoredResponse,
    intact,
    pack,
    pack_tombstone,
    running,
    self_check,
    tenant_of,
    unpack,
    unpack_expired,
)

KEY, TENANT, TOKEN, FINGERPRINT = b"k" * 24, b"n" * 16, b"t" * 16, b"f" * 16
NOW_MS = 1_763_960_000_000
CLAIM = Claim(
    key=KEY,
    token=TOKEN,
    fence=b"1763960000000001",
    mode=b"hold",
    fingerprint=FINGERPRINT,
    self_check=self_check(KEY, TENANT, TOKEN, b"hold", FINGERPRINT),
    created_ms=NOW_MS - 5000,
    lease_ms=10_000,
    retention_ms=86_400_000,
    unknown_retention_ms=7_776_000_000,
)
BODY = b'{"id": 1}'


def answer(
    body: bytes = BODY, status: int = 201, reason: bytes = b"Made", block: bytes = b"X: 1\r\n"
) -> StoredResponse:
    digest = response_digest(status, reason, block)
    digest.update(body)
    return StoredResponse(
        status=status,
        reason=reason,
        block=block,
        digest=digest.digest(),
        chunks=1,
        size=len(body),
        body_stored=True,
        close_delimited=False,
        stated_length=True,
        completed_ms=NOW_MS - 1000,
        took_ms=4000,
        age_s=0,
    )


META = pack(CLAIM, answer())


def with_trailers(trailers: bytes = b"X-Sum: 1\r\n") -> StoredResponse:
    stored = answer()
    digest = response_digest(stored.status, stored.reason, stored.block)
    digest.update(BODY + trailers)
    return replace(stored, trailers=trailers, digest=digest.digest())


def read(meta: bytes, key: bytes = KEY, tenant: bytes = TENANT) -> Record | Corrupt:
    return unpack(key, tenant, meta, BODY, NOW_MS)


# A complete record ...


@given(
    st.builds(
        StoredResponse,
        status=st.integers(200, 599),
        reason=st.binary(max_size=300),
        block=st.binary(max_size=3000),
        digest=st.binary(min_size=16, max_size=16),
        chunks=st.integers(0, 2**32 - 1),
        size=st.integers(0, 2**63),
        body_stored=st.booleans(),
        close_delimited=st.booleans(),
        stated_length=st.booleans(),
        request_id=st.binary(max_size=256),
        reconciled=st.booleans(),
        completed_ms=st.integers(0, 10**15),
        took_ms=st.integers(0, 2**32 - 1),
        age_s=st.integers(0, 2**31),
    )
)
def test_an_answer_comes_back_as_it_was_packed(stored):
    """Whatever the response, its record returns it, with its owner and its time."""
    found = unpack(KEY, TENANT, pack(CLAIM, stored), None, NOW_MS)
    assert found == Record(State.COMPLETE, TOKEN, FINGERPRINT, CLAIM.created_ms, NOW_MS, 0, stored, None)


def test_the_scripts_find_their_fields_in_fixed_places():
    """The first 65 bytes have the layout that the scripts expect."""
    assert META[0:1] == b"\x01"
    assert META[1:17] == TOKEN
    assert META[17:33] == CLAIM.fence
    assert META[33:49] == b"%016d" % CLAIM.created_ms
    assert META[49:65] == answer().digest
    assert pack(replace(CLAIM, fence=b"7"), answer())[17:33] == b"0000000000000007"


@pytest.mark.parametrize("place", range(len(META)))
def test_no_byte_of_a_complete_record_can_change_unnoticed(place):
    """With any bit flipped, or any byte removed or doubled, the record is corrupt."""
    for bit in range(8):
        flipped = META[:place] + bytes([META[place] ^ 1 << bit]) + META[place + 1 :]
        assert isinstance(read(flipped), Corrupt)
    assert isinstance(read(META[:place] + META[place + 1 :]), Corrupt)
    assert isinstance(read(META[: place + 1] + META[place:]), Corrupt)
    assert isinstance(read(META[:place]), Corrupt)


TOMBSTONE = pack_tombstone(KEY, META)


def test_a_tombstone_says_what_the_expired_record_said():
    """Whatever reads an expired record cannot tell whether its response has been dropped."""
    expired = Record(State.EXPIRED, TOKEN, FINGERPRINT, CLAIM.created_ms, NOW_MS, status=answer().status)
    assert unpack_expired(KEY, TENANT, META, NOW_MS) == unpack_expired(KEY, TENANT, TOMBSTONE, NOW_MS) == expired
    assert TOMBSTONE[1:49] == META[1:49]
    assert len(b"meta" + TOMBSTONE) <= 80
    assert pack_tombstone(KEY, pack(CLAIM, answer(reason=b"x" * 99)))[:-8] == TOMBSTONE[:-8]
    assert tenant_of(TOMBSTONE) == b""
    # An older version refuses it, and so does this one where it is not expired.
    assert read(TOMBSTONE) == Corrupt("unknown layout")


@pytest.mark.parametrize("place", range(len(TOMBSTONE)))
def test_no_byte_of_a_tombstone_can_change_unnoticed(place):
    """A tombstone that was damaged, or copied to another key, is corrupt: its key is not free."""
    for bit in range(8):
        flipped = TOMBSTONE[:place] + bytes([TOMBSTONE[place] ^ 1 << bit]) + TOMBSTONE[place + 1 :]
        assert isinstance(unpack_expired(KEY, TENANT, flipped, NOW_MS), Corrupt)
    assert isinstance(unpack_expired(KEY, TENANT, TOMBSTONE[:place], NOW_MS), Corrupt)
    assert isinstance(unpack_expired(b"K" * 24, TENANT, TOMBSTONE, NOW_MS), Corrupt)


def test_a_complete_record_of_another_key_or_tenant_is_corrupt():
    """A record copied to another key, or read for another tenant, is corrupt."""
    assert isinstance(read(META), Record)
    assert isinstance(read(META, key=b"K" * 24), Corrupt)
    assert isinstance(read(META, tenant=b"N" * 16), Corrupt)


def test_a_layout_of_another_version_is_corrupt(monkeypatch):
    """A record of another version is corrupt, also if it passes its own check."""
    with monkeypatch.context() as newer:
        newer.setattr(record, "VERSION", b"\x04")
        meta = pack(CLAIM, answer())
        assert isinstance(read(meta), Record)
    assert read(meta) == Corrupt("unknown layout")


def test_a_body_that_is_not_the_stored_one_is_not_intact():
    """Size and digest decide, and the digest also covers status, reason and fields."""
    stored = answer()
    assert intact(stored, BODY)
    for place in range(len(BODY)):
        assert not intact(stored, BODY[:place] + bytes([BODY[place] ^ 1]) + BODY[place + 1 :])
        assert not intact(stored, BODY[:place])
    assert not intact(stored, BODY + b"x")
    assert not intact(replace(stored, status=200), BODY)
    assert not intact(replace(stored, reason=b"made"), BODY)
    assert not intact(replace(stored, block=b"X: 2\r\n"), BODY)
    assert intact(answer(b""), b"")


# A running one ...


RUNNING = [
    b"in_flight", TOKEN, CLAIM.fence, b"hold", FINGERPRINT, CLAIM.self_check, 7000, b"%d" % CLAIM.created_ms, None,
    None,
]  # fmt: skip
STATE, TOKEN_AT, FENCE, MODE, FINGERPRINT_AT, SELF, LEASE_LEFT, CREATED, STATUS, MORE = range(10)


@pytest.mark.parametrize(
    ("state", "found"), [(b"in_flight", State.IN_FLIGHT), (b"unknown", State.UNKNOWN)], ids=["in flight", "unknown"]
)
def test_a_running_record_comes_back_as_it_stands(state, found):
    """A record in flight returns its state, owner, fingerprint, time and the rest of its lease."""
    read_back = running(KEY, TENANT, [state, *RUNNING[1:]], NOW_MS)
    assert read_back == Record(found, TOKEN, FINGERPRINT, CLAIM.created_ms, NOW_MS, lease_left_ms=7000, mode=b"hold")


@pytest.mark.parametrize("field", [STATE, TOKEN_AT, MODE, FINGERPRINT_AT, SELF], ids=lambda n: f"field {n}")
def test_no_byte_of_a_running_record_can_change_unnoticed(field):
    """With any byte of a fixed field flipped or removed, or a field gone, the record is corrupt."""
    value = RUNNING[field]
    wrong = [value[:place] + bytes([value[place] ^ 1 << bit]) + value[place + 1 :] for place in range(len(value))
             for bit in range(8)]  # fmt: skip
    wrong += [value[:place] + value[place + 1 :] for place in range(len(value))]
    for one in [*wrong, b"", value + b"x", None]:
        fields = [*RUNNING[:field], one, *RUNNING[field + 1 :]]
        assert isinstance(running(KEY, TENANT, fields, NOW_MS), Corrupt), one


@pytest.mark.parametrize("created", [None, b"", b"soon", b"\xff" * 13, b"1e3", b"1.5"])
def test_a_running_record_without_a_time_is_corrupt(created):
    """The time of a claim must be a number."""
    assert isinstance(running(KEY, TENANT, [*RUNNING[:CREATED], created, None, None], NOW_MS), Corrupt)


@pytest.mark.parametrize(("status", "read"), [(b"200", 200), (b"", 0), (b"20", 0), (b"-20", 0), (b"2e2", 0), (None, 0)])
def test_a_running_record_has_the_status_that_came(status, read):
    """It is no part of the check, so that anything but a status counts as none."""
    record = running(KEY, TENANT, [*RUNNING[:STATUS], status, None], NOW_MS)
    assert isinstance(record, Record)
    assert record.status == read


def test_a_running_record_cannot_say_that_it_is_complete():
    """A record without a response is not complete, whatever its state says."""
    assert isinstance(running(KEY, TENANT, [b"complete", *RUNNING[1:]], NOW_MS), Corrupt)


def test_a_running_record_of_another_key_or_tenant_is_corrupt():
    """A record copied to another key, or read for another tenant, is corrupt."""
    assert isinstance(running(b"K" * 24, TENANT, RUNNING, NOW_MS), Corrupt)
    assert isinstance(running(KEY, b"N" * 16, RUNNING, NOW_MS), Corrupt)


def test_a_lease_that_cannot_be_read_has_passed():
    """A damaged lease has ended: the key is unknown, which executes nothing."""
    fields = [*RUNNING[:LEASE_LEFT], None, *RUNNING[CREATED:]]
    found = running(KEY, TENANT, fields, NOW_MS)
    assert isinstance(found, Record)
    assert found.lease_left_ms == 0


@given(st.tuples(*[st.binary(max_size=40)] * 5), st.tuples(*[st.binary(max_size=40)] * 5))
def test_what_a_running_record_says_of_itself_is_its_own(one, other):
    """Two different records never have the same self check."""
    fixed = (24, 16, 16, 4, 16)  # the sizes of key, tenant, token, mode, fingerprint
    first, second = (
        [part.ljust(size)[:size] for part, size in zip(parts, fixed, strict=True)] for parts in (one, other)
    )
    assert (self_check(*first) == self_check(*second)) == (first == second)


# Trailers ...


def test_trailers_come_back():
    """Trailers are in the record behind the header fields, and the digest covers them."""
    came = read(pack(CLAIM, with_trailers()))
    assert isinstance(came, Record)
    assert came.response == with_trailers()
    assert intact(with_trailers(), BODY)
    assert not intact(replace(with_trailers(), trailers=b"X-Sum: 2\r\n"), BODY)
    assert not intact(replace(with_trailers(), trailers=b""), BODY)


def test_only_a_record_with_trailers_has_another_version():
    """An older oncegate reads every other record as before, and refuses this one as an unknown layout."""
    assert (META[:1], pack(CLAIM, with_trailers())[:1]) == (b"\x01", b"\x02")
    for meta in (META, pack(CLAIM, with_trailers())):
        other = bytes([3 - meta[0]]) + meta[1:-8]
        assert isinstance(read(other + record._check(KEY, other)), Corrupt)
