"""The model's table is what the scripts do, and it knows every verb, state, word and ending that there is."""

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from redis import Redis

from oncegate.decision import Ending, State, decide, effective_state, may_take_over
from oncegate.messages.response_head import response_digest
from oncegate.store.record import Claim, StoredResponse, cancelled_claim, pack, self_check, unpack
from oncegate.store.record_name import store_key
from oncegate.store.redis.server import load_scripts
from tests.conftest import Valkey
from tests.model import rules
from tests.model.rules import (
    ABSENT,
    BARE,
    COMPLETE,
    IN_FLIGHT,
    NOBODY,
    OPERATOR,
    RELEASED,
    TORN,
    UNKNOWN,
    WHOLE,
    Record,
)
from tests.model.table import TABLE, WAYS, Call
from tests.test_lua import RECORD_VERBS, TEXTS, body, replies, section

KEY, TENANT, FINGERPRINT = b"k" * 16, b"n" * 16, b"f" * 16
NAME = store_key(KEY)
LEASE_MS, RETENTION_MS, NEVER_MS = 60_000, 3_600_000, 1 << 52
TOKENS = {NOBODY: b"", 1: b"1" * 16, 2: b"2" * 16, OPERATOR: b"9" * 16}
WHO = {token: who for who, token in TOKENS.items()}
SCRIPTS = load_scripts()


def pieces(who: int) -> tuple[bytes, bytes]:
    """Return the answer that somebody has: of all the same size, so that only what is in it tells them apart."""
    return b"first piece of %d" % who, b"last piece of %d" % who


def claim_of(who: int, mode: str) -> Claim:
    token = TOKENS[who]
    described = self_check(KEY, TENANT, token, mode.encode(), FINGERPRINT)
    return Claim(KEY, token, b"7", mode.encode(), FINGERPRINT, described, 1_000, LEASE_MS, RETENTION_MS, RETENTION_MS)


def packed(who: int, chunks: int, kept: bool = True) -> tuple[bytes, StoredResponse]:
    """Return `meta` of somebody's answer, in so many chunks."""
    whole = b"".join(pieces(who))
    digest = response_digest(200, b"OK", b"")
    digest.update(whole)
    answer = StoredResponse(200, b"OK", b"", digest.digest(), chunks, len(whole), kept, False, True, 1_000, 1, 0)
    return pack(claim_of(who, "hold"), answer), answer


class Server:
    """A record in a real server: put there by the scripts, changed by them, and read as the model sees it."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._dumps: dict[Record, bytes | None] = {}

    def put(self, record: Record) -> None:
        """Make a record stand in the store; the first time in the way that leads to it."""
        self._client.delete(NAME)
        if record not in self._dumps:
            for call in WAYS[record]:
                self.run(call)
            self._dumps[record] = self._client.dump(NAME)
        elif (dump := self._dumps[record]) is not None:
            self._client.restore(NAME, RETENTION_MS, dump)

    def record(self) -> Record:
        """Return what stands in the store, reduced to what the model has of it."""
        found = {name.decode(): value for name, value in self._client.hgetall(NAME).items()}
        if not found:
            return Record()
        first = found.get("b0", b"")
        if "meta" in found:
            chunks = b"".join(found[name] for name in sorted(found) if name != "meta")
            known = unpack(KEY, TENANT, found["meta"], None, 0)
            answer, who = known.response, WHO[known.token]
            held = BARE if not answer.body_stored and not chunks else WHOLE if chunks == b"".join(pieces(who)) else TORN
            return Record(COMPLETE, who, answer=who, body=held)
        appended = next((who for who in (1, 2) if first == pieces(who)[0]), NOBODY)
        runs = found["state"] == b"in_flight" and int(found["lease"]) > self.now_ms()
        mode = found.get("mode", b"").decode()
        return Record(found["state"].decode(), WHO[found["token"]], mode, runs, appended)

    def now_ms(self) -> int:
        seconds, micros = self._client.time()
        return seconds * 1000 + micros // 1000

    def run(self, call: Call) -> tuple[str, list[Any]]:
        """Run one call for real; return the word of its reply and the rest."""
        verb, _, *args = call
        if verb == "lapse":
            self._client.hset(NAME, "lease", self.now_ms() - 1)
            return "", []
        words = getattr(self, f"_{verb}")(*args)
        _tag, word, *rest = self._client.eval(SCRIPTS[str(verb)].body, 1, NAME, b"tag", *words)
        return word.decode(), rest

    # The arguments of each verb, as the model has them ...

    def _claim(self, me: int, mode: str, seen: int, late: bool) -> list[Any]:
        claim = claim_of(me, mode)
        not_after_ms = 1 if late else NEVER_MS
        who = [claim.token, FINGERPRINT, claim.self_check, mode]
        return [*who, LEASE_MS, RETENTION_MS, not_after_ms, 65536, 0, TOKENS[seen]]

    def _append(self, me: int) -> list[Any]:
        return [TOKENS[me], 0, pieces(me)[0], LEASE_MS]

    def _renew(self, me: int) -> list[Any]:
        return [TOKENS[me], LEASE_MS, RETENTION_MS, "sent"]

    def _settle(self, me: int, mode: str, how: str) -> list[Any]:
        head = [TOKENS[me], rules.HOW[how], RETENTION_MS]
        if how == "release":
            return head
        if rules.HOW[how] == "unknown":
            claim = cancelled_claim(claim_of(me, mode)) if how == "cancelled" else claim_of(me, mode)
            return [
                *head,
                claim.fence,
                claim.mode,
                FINGERPRINT,
                claim.self_check,
                claim.created_ms,
                "no answer came",
                0,
            ]
        first, last = pieces(me)
        chunks = {"store": 1, "stream": 2, "bare": 0}[how]
        meta, answer = packed(me, chunks, kept=how != "bare")
        size = answer.size if answer.body_stored else 0
        return [*head, meta, answer.digest, chunks, size, {"store": first + last, "stream": last, "bare": b""}[how]]

    def _resolve(self, seen: int, how: str) -> list[Any]:
        if how == "release":
            return [TOKENS[seen], how, TOKENS[OPERATOR], b"8"]
        return [TOKENS[seen], how, RETENTION_MS, packed(OPERATOR, 1)[0], b"".join(pieces(OPERATOR))]

    def _read(self, token: int) -> list[Any]:
        return [TOKENS[token], 0, 262144]


@pytest.fixture
def server(valkey: Valkey) -> Iterator[Server]:
    with valkey.client() as client:
        yield Server(client)


def test_what_is_tried():
    """Every state, lapsed ones too, for the owner and for anybody else."""
    assert {record.state for record in WAYS} == {ABSENT, IN_FLIGHT, UNKNOWN, COMPLETE, RELEASED}
    assert {(record.lease, record.token, record.mode) for record in WAYS if record.state == IN_FLIGHT} == {
        (lease, token, mode) for lease in (True, False) for token in (1, 2) for mode in ("hold", "retry")
    }
    assert {str(call[0]) for call in TABLE} == set(RECORD_VERBS)


@pytest.mark.parametrize("verb", RECORD_VERBS)
def test_a_script_does_what_the_model_says(server, verb):
    """Each call on each record: the same word, and the same record afterwards."""
    seen = set()
    for call in (call for call in TABLE if call[0] == verb):
        word, became = TABLE[call]
        server.put(call[1])
        assert server.record() == call[1]
        said, rest = server.run(call)
        if verb == "claim" and said not in ("claimed", "late"):
            assert tells(said, rest) == (rules.told(call[1]), rules.is_open(call[1], "hold", frozenset()))
            said = "told"
        assert (said, server.record()) == (word, became), call
        seen.add(word)
    assert seen == rules.WORDS[verb] - NOT_MET.get(verb, set())


# An owner appends a piece with the same bytes as before, and nobody else's pieces stand in its record.
NOT_MET = {"append": {"torn"}}


def tells(state: str, rest: list[Any]) -> tuple[str, bool]:
    """Return what the proxy makes of a claim's reply about somebody else's record: what is said, whether it is open."""
    if state == "complete":
        _now_ms, meta, _body = rest
        answer = unpack(KEY, TENANT, meta, None, 0).response
        return decide(State.COMPLETE, True, answer.body_stored).value, may_take_over(State.COMPLETE, True, b"", False)
    _now_ms, _token, _fence, mode, _fingerprint, _self, left_ms, _created, _status = rest
    now = effective_state(State(state), left_ms)
    return decide(now, True, False).value, may_take_over(now, True, mode, False)


def test_the_model_has_every_word():
    """All replies that the scripts' contracts name; "told" is a record that claim leaves alone."""
    for verb in RECORD_VERBS:
        words = set(replies(" ".join(section(verb, "Returns")), {}))
        assert {"told" if word in ("complete", "state") and verb == "claim" else word for word in words} == rules.WORDS[
            verb
        ], verb
    assert set(rules.WORDS) == set(RECORD_VERBS)


def test_the_model_has_every_verb():
    """Each script whose KEYS is a record is a verb of the model."""
    about_records = {
        path.name.removesuffix(".lua")
        for path in (files("oncegate.store.redis.lua")).iterdir()
        if path.name.endswith(".lua") and "-- KEYS: record\n" in path.read_text()
    }
    assert about_records == set(rules.WORDS)


def test_the_model_has_every_state():
    """What the scripts write or ask for, and what a proxy reads: released is known to the scripts alone."""
    named = set()
    for verb in RECORD_VERBS:
        code = body(verb)
        named |= set(re.findall(r"'HSET', KEYS\[1\], 'state', '(\w+)'", code))
        named |= set(re.findall(r"(?:state|found\[2\]) [=~]= '(\w+)'", code))
    assert named <= {IN_FLIGHT, UNKNOWN, COMPLETE, RELEASED}
    assert named | {ABSENT} == {record.state for record in WAYS}
    assert {state.value for state in State} == named - {RELEASED}
    assert set(TEXTS) >= set(RECORD_VERBS)


def test_the_model_has_every_ending():
    """How an exchange ended decides how its claim is settled, as in the proxy."""
    words = {"stored": "store", "stored_without_body": "bare", "released": "release"}
    assert {one.label: words.get(one.settlement.label, one.settlement.label) for one in Ending} == rules.ENDINGS
