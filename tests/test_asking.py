"""Answers about keys: the document and its schema, what a question shows, and how many there may be."""

import json
from base64 import b64encode
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.decision import CANCELLED, HOLD, RETRY, Settlement, State
from oncegate.gateway.routes import ExchangeDeps
from oncegate.gateway.settling import Progress, settle
from oncegate.gateway.streams.asking import BURST, QUESTIONS_PER_S, Allowance, read_digest
from oncegate.gateway.streams.key_state import key_state
from oncegate.messages.fields import by_name
from oncegate.messages.request_head import RequestHead
from oncegate.store.leases import LeasedClaim
from oncegate.store.record import Claim, Record, StoredResponse
from oncegate.store.results import SettleResult, SettleStatus
from oncegate.streams.released import Released, note, read
from tests.parts import ROOT
from tests.stores import KEY, answer

PAGE = (ROOT / "docs/reference/asking.md").read_text()
SCHEMA = json.loads(PAGE.partition("<!-- schema:")[2].partition("```json\n")[2].partition("```")[0])


def check_document(body: bytes | str) -> dict[str, Any]:
    """Return a document about a key that keeps to the schema, and has no member that the page does not describe."""
    document: dict[str, Any] = json.loads(body)
    jsonschema.validate(document, SCHEMA, format_checker=jsonschema.FormatChecker())
    assert document.keys() <= SCHEMA["properties"].keys()
    return document


def test_the_page_shows_a_document_of_its_schema():
    check_document(PAGE.partition("```json\n")[2].partition("```")[0])


def test_the_page_describes_every_member():
    """Each has its row in the table."""
    assert [name for name in SCHEMA["properties"] if f"| `{name}` |" not in PAGE] == []


def record(state: State, mode: bytes = HOLD, left_ms: int = 0, status: int = 0, kept: bool | None = None) -> Record:
    response: StoredResponse | None = None if kept is None else answer(b"body", kept=kept)
    return Record(
        state, b"t" * 16, b"f" * 16, 1_700_000_000_000, 1_700_000_001_000, left_ms, response, None, mode, status
    )


RECORDS = [
    # What the store has; the state, and what the same request gets now.
    (record(State.IN_FLIGHT, left_ms=10), "in_flight", "in-flight"),
    (record(State.IN_FLIGHT), "unknown", "outcome-unknown"),
    (record(State.IN_FLIGHT, RETRY), "unknown", "execution"),
    (record(State.UNKNOWN), "unknown", "outcome-unknown"),
    (record(State.UNKNOWN, RETRY, status=502), "unknown", "execution"),
    (record(State.UNKNOWN, CANCELLED), "unknown", "outcome-unknown"),
    (record(State.COMPLETE, kept=True), "complete", "replay"),
    (record(State.COMPLETE, kept=False), "complete", "response-not-kept"),
    (record(State.EXPIRED, status=201), "expired", "key-expired"),
]


@pytest.mark.parametrize(("found", "state", "on_repeat"), RECORDS)
def test_a_document_says_what_the_request_would_get(found, state, on_repeat):
    """An owner that stopped renewing its lease is told as what it is: nobody knows."""
    document = check_document(json.dumps(key_state(KEY, found)))
    assert (document["state"], document["on_repeat"], document["since"]) == (state, on_repeat, "2023-11-14T22:13:20Z")
    assert document.get("status") == (found.response.status if found.response else found.status or None)
    assert document.get("reason") == ("cancelled" if found.mode == CANCELLED else None)
    assert ("completed" in document) is (found.response is not None)


def digest_in(value: bytes) -> bytes:
    pairs = [(b"Oncegate-Body-Digest", value)]
    return read_digest(RequestHead("GET", b"/", False, b"a", pairs, by_name(pairs)))


def test_a_digest_is_read_as_rfc_9530_has_it():
    digest = sha256(b"body").digest()
    shown = b"sha-256=:%b:" % b64encode(digest)
    assert digest_in(shown) == digest_in(b"sha-512=:AAAA:, " + shown) == digest_in(shown + b", md5=:AA==:") == digest
    for wrong in (b"", b"sha-256=AAAA", b"sha-256=:AAAA:", b"sha-256=:!!!!:", b"x" + shown, shown[:-3] + b":"):
        assert digest_in(wrong) == b"", wrong


@given(st.binary(max_size=80))
def test_no_value_breaks_the_reading_of_a_digest(value):
    assert len(digest_in(value)) in (0, 32)
    assert len(digest_in(b"sha-256=:" + value + b":")) in (0, 32)


def test_a_connection_may_ask_some_questions_at_once_and_then_some_a_second():
    allowance = Allowance(100.0)
    assert [allowance.take(100.0) for _ in range(int(BURST) + 2)] == [True] * int(BURST) + [False] * 2
    assert [allowance.take(101.0) for _ in range(int(QUESTIONS_PER_S) + 1)] == [True] * int(QUESTIONS_PER_S) + [False]
    assert sum(allowance.take(10_000.0) for _ in range(100)) == BURST


class Marks:
    """Marks in memory, as a store keeps them."""

    def __init__(self) -> None:
        self.kept: dict[bytes, tuple[bytes, int]] = {}

    async def put(self, name: bytes, value: bytes, lasts_ms: int) -> None:
        self.kept[name] = value, lasts_ms

    async def exists(self, name: bytes) -> bool | None:
        return name in self.kept

    async def get(self, name: bytes) -> bytes:
        return self.kept.get(name, (b"", 0))[0]


@pytest.mark.parametrize(
    ("status", "came", "told"),
    [
        (429, b"7", b"7"),
        (429, b"Wed, 21 Oct 2026 07:28:00 GMT", b"Wed, 21 Oct 2026 07:28:00 GMT"),
        (0, b"", b""),
        (425, b"soon\x00", b""),
        (401, b"9" * 30, b""),
    ],
)
async def test_a_released_claim_leaves_a_note_under_its_token(status, came, told):
    """No other token finds it, and what is no Retry-After is left out."""
    marks = Marks()
    token = bytes(range(16))
    claim = Claim(KEY, token, b"1", HOLD, b"f" * 16, b"s" * 32, 0, 1000, 60_000, 60_000)
    await note(marks, claim, Released.by(status, came))
    assert await read(marks, claim.key, token) == Released(status, told)
    assert await read(marks, claim.key, bytes(16)) is None
    assert [lasts_ms for _, lasts_ms in marks.kept.values()] == [claim.retention_ms]
    marks.kept = dict.fromkeys(marks.kept, (b"damaged", 1))
    assert await read(marks, claim.key, token) is None


async def test_the_note_stands_before_the_record_goes():
    """Who comes to the address in between finds one of the two. A process that dies there leaves a record in flight."""
    seen: list[str] = []
    marks = Marks()

    async def release(owner: Claim, patience_s: float) -> SettleResult:
        seen.append("noted" if marks.kept else "bare")
        return SettleResult(SettleStatus.RELEASED)

    claim = Claim(KEY, bytes(16), b"1", HOLD, b"f" * 16, b"s" * 32, 0, 1000, 60_000, 60_000)
    store = SimpleNamespace(marks=marks, release=release)
    for notes, found in ((False, "bare"), (True, "noted")):
        deps = cast(ExchangeDeps, SimpleNamespace(store=store, notes_releases=notes))
        progress = Progress(deps, cast(LeasedClaim, SimpleNamespace(claim=claim, freeing=False)))
        result = await settle(progress, Settlement.RELEASE, b"", 1.0)
        assert (result.status, seen.pop()) == (SettleStatus.RELEASED, found)
    assert await read(marks, claim.key, claim.token) == Released(0)
