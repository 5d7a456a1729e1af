"""The packed layout: what goes in comes out, damage is seen, and what a later version adds is skipped."""

from dataclasses import replace

import pytest

from oncegate.decision import CANCELLED, HOLD, RETRY, State
from oncegate.messages.response_head import response_digest
from oncegate.store.record import Claim, Corrupt, Record, StoredResponse, intact, self_check, unpack
from oncegate.store.record_view import FIELDS, ViewState, read_fields
from oncegate.store.redis.layouts.packed import (
    LARGEST_BODY,
    UNTIL,
    hash_fields,
    pack_complete,
    pack_unknown,
    terms_begin,
    unpack_packed,
)
from tests.probes import damaged

KEY, TENANT, TOKEN, SAME = b"k" * 24, b"n" * 16, b"t" * 16, b"f" * 16
NOW_MS, CREATED_MS = 1_764_551_444_123, 1_764_551_440_000
BODY = b'{"id": 1}'


def claim(mode: bytes = HOLD, tombstone_ms: int = 0) -> Claim:
    check = self_check(KEY, TENANT, TOKEN, mode, SAME)
    times = CREATED_MS, 60_000, 3_600_000, 36_000_000, tombstone_ms
    return Claim(KEY, TOKEN, b"1764551440000123", mode, SAME, check, *times)


def response(body: bytes = BODY, **other: object) -> StoredResponse:
    made = StoredResponse(
        201, b"Created", b"Content-Type: text/plain\r\n", b"", 1 if body else 0, len(body), True, False, True,
        CREATED_MS + 900, 800, 0,
    )  # fmt: skip
    made = replace(made, **other)
    digest = response_digest(made.status, made.reason, made.block)
    digest.update(body + made.trailers)
    return replace(made, digest=digest.digest())


def in_flight(fields: bytes = b"", mode: bytes = HOLD, leased_ms: int = NOW_MS - 1000) -> bytes:
    """Return a claim as `claim.lua` writes it."""
    begin = b"\x04" + TOKEN + b"1764551440000123" + b"%013d%013d" % (CREATED_MS, leased_ms) + terms_begin(mode, 60_000)
    return begin + claim(mode).self_check + SAME + len(fields).to_bytes(2, "big") + fields


LATER = b"\xfe\x00\x03abc"  # a numbered field of a later version
RESPONSES = {
    "usual": response(),
    "no body": response(b""),
    "large": response(b"x" * LARGEST_BODY),
    "aged": response(age_s=77),
    "of a call": response(request_id=b'"7"'),
    "with trailers": response(trailers=b"Digest: x\r\nSum: y\r\n", close_delimited=True, stated_length=False),
    "all": response(age_s=1, request_id=b"1", trailers=b"A: b\r\n"),
    "before it began": response(completed_ms=CREATED_MS - 3),
}


def body_of(made: StoredResponse) -> bytes:
    return BODY if made.size == len(BODY) else b"x" * made.size


@pytest.mark.parametrize("made", RESPONSES.values(), ids=RESPONSES)
def test_a_response_comes_out_as_it_went_in(made):
    """With its body, and with what only some responses have."""
    value = pack_complete(claim(), made, body_of(made))
    found = unpack_packed(KEY, TENANT, value, NOW_MS)
    assert found == Record(State.COMPLETE, TOKEN, SAME, CREATED_MS, NOW_MS, 0, made, body_of(made))


@pytest.mark.parametrize("made", RESPONSES.values(), ids=RESPONSES)
def test_the_same_record_as_a_hash(made):
    """The fields that an older version has in a hash tell the same."""
    fields = hash_fields(KEY, pack_complete(claim(), made, body_of(made)))
    assert fields.get("b0", b"") == body_of(made)
    found = unpack(KEY, TENANT, fields["meta"], fields.get("b0", b""), NOW_MS)
    assert found == unpack_packed(KEY, TENANT, pack_complete(claim(), made, body_of(made)), NOW_MS)


@pytest.mark.parametrize(
    ("made", "body"),
    [
        (response(b"x" * (LARGEST_BODY + 1)), b"x" * (LARGEST_BODY + 1)),
        (response(trailers=b"A: " + b"b" * 60_000 + b"\r\n"), BODY),
        (response(completed_ms=CREATED_MS + (1 << 31)), BODY),
        (response(completed_ms=CREATED_MS - (1 << 31) - 1), BODY),
    ],
    ids=["body", "trailers", "weeks", "weeks before"],
)
def test_what_does_not_fit_stays_a_hash(made, body):
    """What would take another reply's time, or has no place in the fixed part."""
    assert pack_complete(claim(), made, body) is None


def test_a_packed_record_is_smaller_than_its_hash():
    """By the digits, lengths and counts that it does without."""
    fields = hash_fields(KEY, value := pack_complete(claim(), response(), BODY))
    assert len(value) <= sum(map(len, fields.values())) - 30


def test_a_tombstone_ends_the_response_with_its_retention():
    """From `until` on the record says what its tombstone does."""
    value = pack_complete(claim(tombstone_ms=1), response(), BODY) + b"%013d" % (NOW_MS + 1)
    assert value[:1] == UNTIL
    assert unpack_packed(KEY, TENANT, value, NOW_MS).response == response()
    expired = unpack_packed(KEY, TENANT, value, NOW_MS + 1)
    assert expired == Record(State.EXPIRED, TOKEN, SAME, CREATED_MS, NOW_MS + 1, status=201)
    assert hash_fields(KEY, value)["until"] == b"%d" % (NOW_MS + 1)


@pytest.mark.parametrize("mode", [HOLD, RETRY, CANCELLED])
@pytest.mark.parametrize("status", [0, 502])
def test_an_unknown_outcome_comes_out_as_it_went_in(mode, status):
    """With the mode of its claim, its reason, and the status of a response that came."""
    value = pack_unknown(claim(mode), "no answer cäme", status)
    found = unpack_packed(KEY, TENANT, value, NOW_MS)
    assert (found.state, found.mode, found.status) == (State.UNKNOWN, mode, status)
    fields = hash_fields(KEY, value)
    view = read_fields(KEY, [fields.get(name) for name in FIELDS], NOW_MS)
    assert (view.state, view.reason, view.status, view.progress) == (ViewState.UNKNOWN, "no answer cäme", status, "")


def test_a_claim_in_flight_as_a_proxy_and_an_operator_see_it():
    """The lease ends its length after it began."""
    found = unpack_packed(KEY, TENANT, in_flight(), NOW_MS)
    assert (found.state, found.token, found.lease_left_ms) == (State.IN_FLIGHT, TOKEN, 59_000)
    assert (found.created_ms, found.mode) == (CREATED_MS, HOLD)
    fields = hash_fields(KEY, in_flight())
    assert fields == {
        "state": b"in_flight", "token": TOKEN, "fence": b"1764551440000123", "mode": b"hold", "fingerprint": SAME,
        "self": claim().self_check, "lease": b"%d" % (NOW_MS + 59_000), "created": b"%d" % CREATED_MS,
        "lease_ms": b"60000",
    }  # fmt: skip


def test_numbered_fields_of_a_later_version_are_skipped():
    """In a claim, and in a complete record."""
    for fields in (LATER, LATER + b"\x02\x00\x03502", b"\x02\x00\x03502" + LATER):
        found = unpack_packed(KEY, TENANT, in_flight(fields), NOW_MS)
        assert (found.state, found.status) == (State.IN_FLIGHT, 502 if b"502" in fields else 0)


@pytest.mark.parametrize("fields", [b"\xfe", b"\xfe\x00", b"\xfe\x00\x04abc", LATER + b"\x01"])
def test_fields_that_are_cut_short_are_corrupt(fields):
    """Their lengths have to agree with the length of all."""
    assert isinstance(unpack_packed(KEY, TENANT, in_flight(fields), NOW_MS), Corrupt)
    assert isinstance(hash_fields(KEY, in_flight(fields)), Corrupt)


@pytest.mark.parametrize("tombstone_ms", [0, 1])
def test_damage_to_a_complete_record_is_seen(tombstone_ms):
    """What is decided by is under the check, and what is replayed under the digest of the response."""
    value = pack_complete(claim(tombstone_ms=tombstone_ms), response(), BODY)
    value += b"%013d" % (NOW_MS + 1) if tombstone_ms else b""
    whole = unpack_packed(KEY, TENANT, value, NOW_MS)
    for wrong in damaged(value):
        found = unpack_packed(KEY, TENANT, wrong, NOW_MS)
        if isinstance(found, Corrupt) or found.response is None:
            # Without a response: the digits of the retention's end are damaged, so that it may be over.
            continue
        is_replayed = intact(found.response, found.body)
        assert not is_replayed or (found.response, found.body) == (whole.response, whole.body), wrong
        assert (found.token, found.fingerprint, found.created_ms) == (whole.token, whole.fingerprint, whole.created_ms)


@pytest.mark.parametrize(
    "value", [in_flight(mode=RETRY), pack_unknown(claim(RETRY), "lost", 0)], ids=["in flight", "unknown"]
)
def test_damage_to_an_open_record_is_seen_or_changes_a_time_alone(value):
    """Token, mode, fingerprint and tenant are under the self check; a state that nobody knows is corrupt."""
    whole = unpack_packed(KEY, TENANT, value, NOW_MS)
    for wrong in damaged(value):
        found = unpack_packed(KEY, TENANT, wrong, NOW_MS)
        if isinstance(found, Corrupt):
            continue
        same = (found.token, found.mode, found.fingerprint) == (whole.token, whole.mode, whole.fingerprint)
        assert same
        assert found.state in (State.IN_FLIGHT, State.UNKNOWN)


def test_a_record_of_another_key_or_tenant_is_corrupt():
    """Whatever it is."""
    for value in (pack_complete(claim(), response(), BODY), pack_unknown(claim(), "", 0), in_flight()):
        assert isinstance(unpack_packed(KEY, TENANT, value, NOW_MS), Record)
        assert isinstance(unpack_packed(b"o" * 24, TENANT, value, NOW_MS), Corrupt)
        assert isinstance(unpack_packed(KEY, b"o" * 16, value, NOW_MS), Corrupt)


@pytest.mark.parametrize("value", [b"", b"x", b"\x04", b"\x05", b"\x06", b"\x07" + bytes(200), b"\x03"])
def test_what_is_no_record_is_corrupt(value):
    """Nobody executes a key that has it."""
    assert isinstance(unpack_packed(KEY, TENANT, value, NOW_MS), Corrupt)
