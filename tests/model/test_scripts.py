"""The model's table is what the scripts do, and it knows every verb, state, word and ending that there is."""

import re
from importlib.resources import files
from typing import Any, Protocol

import pytest

from oncegate.decision import Ending, State, decide, effective_state, may_take_over
from oncegate.messages.response_head import response_digest
from oncegate.store.postgres import rows
from oncegate.store.postgres.rows import ALSO_HOLD
from oncegate.store.record import (
    DROPPED,
    Claim,
    StoredResponse,
    cancelled_claim,
    pack,
    pack_tombstone,
    self_check,
    unpack,
    unpack_expired,
)
from oncegate.store.record import Record as StoredRecord
from oncegate.store.record_name import store_key
from oncegate.store.redis.arguments import LAYOUT
from oncegate.store.redis.layouts.packed import pack_complete, pack_unknown
from oncegate.store.redis.wire import listed
from oncegate.store.results import ClaimResult, Unconfirmed
from oncegate.store.stages import SENT
from tests.model import rules
from tests.model.rules import (
    ABSENT,
    BARE,
    COMPLETE,
    EXPIRED,
    HOLD,
    IN_FLIGHT,
    LAPSED,
    NOBODY,
    OPERATOR,
    RELEASED,
    RESEND,
    TORN,
    UNKNOWN,
    WHOLE,
    Record,
)
from tests.model.table import TABLE, WAYS, Call
from tests.postgres_probe import ACTOR, PostgresProbe
from tests.probes import SCRIPTS, Probe, RedisProbe
from tests.test_lua import RECORD_VERBS, TEXTS, body, replies, section

KEY, TENANT, FINGERPRINT = b"k" * 24, b"n" * 16, b"f" * 16
NAME = store_key(KEY)
LEASE_MS, RETENTION_MS, NEVER_MS = 60_000, 3_600_000, 1 << 52
TOKENS = {NOBODY: b"", 1: b"1" * 16, 2: b"2" * 16, OPERATOR: b"9" * 16}
WHO = {token: who for who, token in TOKENS.items()}


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


def claim_result(probe: Probe, me: int, mode: str, seen: int, late: bool) -> ClaimResult:
    """Claim for somebody, in time or late."""
    times: dict[str, Any] = {"lease_ms": LEASE_MS, "retention_ms": RETENTION_MS, "window_ms": 0}
    who: dict[str, Any] = {"fingerprint": FINGERPRINT, "mode": mode.encode(), "seen": TOKENS[seen]}
    if mode == RESEND:
        who |= {"mode": HOLD.encode(), "seen": TOKENS[seen] + ALSO_HOLD}
    return probe.claim(KEY, TENANT, TOKENS[me], **who, **times, not_after_ms=1 if late else NEVER_MS)


def stored(me: int, how: str) -> tuple[StoredResponse, bytes]:
    """Return the answer that a settle stores, and the last piece that comes with it."""
    first, last = pieces(me)
    chunks = {"store": 1, "stream": 2, "bare": 0}[how]
    return packed(me, chunks, kept=how != "bare")[1], {"store": first + last, "stream": last, "bare": b""}[how]


def seen_lease(probe: Probe, as_seen: str) -> int | None:
    """Return the lease that a decision depends on: that of the record, if it is in flight. 1 is nobody's."""
    found = probe.fields(KEY)
    lapsed = int(found["lease"]) if found.get("state") == b"in_flight" else 1
    return {"": None, UNKNOWN: 0, LAPSED: lapsed}[as_seen]


class Verbs(Protocol):
    """The verbs of a store, called once each, without a proxy around them."""

    def __call__(self, call: Call) -> str:
        """Run a call of any verb but claim, and return the word for what came of it."""


class Scripts:
    """The Lua scripts on a server. Their replies begin with the model's words."""

    def __init__(self, probe: RedisProbe) -> None:
        self._probe, self._client, self._packed = probe, probe.client, probe.packed
        self._layout = LAYOUT[probe.packed]

    def __call__(self, call: Call) -> str:
        verb, _, *args = call
        words = getattr(self, f"_{verb}")(*args)
        _tag, word, *_rest = listed(self._client.eval(SCRIPTS[str(verb)].body, 1, NAME, b"tag", *words))
        return "found" if verb == "follow" and word != b"gone" else str(word.decode())

    def _append(self, me: int) -> list[Any]:
        return [TOKENS[me], 0, pieces(me)[0], RETENTION_MS, self._layout]

    def _renew(self, me: int) -> list[Any]:
        return [TOKENS[me], LEASE_MS, RETENTION_MS, "sent", self._layout]

    def _settle(self, me: int, mode: str, how: str) -> list[Any]:
        head = [TOKENS[me], rules.HOW[how], RETENTION_MS]
        if how == "release":
            return [*head, self._layout]
        claim = cancelled_claim(claim_of(me, mode)) if how == "cancelled" else claim_of(me, mode)
        if rules.HOW[how] == "unknown":
            if self._packed:
                return [head[0], "put", RETENTION_MS, pack_unknown(claim, "no answer came", 0), 0]
            described = [claim.fence, claim.mode, FINGERPRINT, claim.self_check, claim.created_ms]
            return [*head, *described, "no answer came", 0, b""]
        answer, last = stored(me, how)
        if self._packed and how == "store":
            return [head[0], "put", RETENTION_MS, pack_complete(claim_of(me, "hold"), answer, last), 0]
        size = answer.size if answer.body_stored else 0
        return [*head, pack(claim_of(me, "hold"), answer), answer.digest, answer.chunks, size, last, 0, b""]

    def _resolve(self, seen: int, how: str, as_seen: str) -> list[Any]:
        lease = seen_lease(self._probe, as_seen)
        decision = [TOKENS[seen], how, b"" if lease is None else lease]
        if how == "release":
            return [*decision, TOKENS[OPERATOR], b"8"]
        return [*decision, RETENTION_MS, packed(OPERATOR, 1)[0], b"".join(pieces(OPERATOR)), 0, b""]

    def _drop(self, seen: int, purge: bool) -> list[Any]:
        return [TOKENS[seen], pack_tombstone(KEY, packed(seen, 1)[0]), int(purge), self._layout]

    def _read(self, token: int) -> list[Any]:
        return [TOKENS[token], 0, 262144]

    def _follow(self, token: int) -> list[Any]:
        return [TOKENS[token], 0, 262144, 0]


# By a function's tags, as its contract in store/postgres/migrations/ has them.
TAGS = {
    "renew": {1: "renewed", 2: "absent", 3: "unknown", 4: "complete", 5: "fenced"},
    "append": {1: "appended", 8: "appended", 2: "absent", 3: "torn", 4: "complete", 5: "fenced"},
    "settle": {1: "stored", 2: "released", 3: "unknown", 4: "torn", 5: "complete", 6: "fenced"},
    "resolve": {1: "resolved", 2: "absent", 3: "released", 4: "complete", 5: "fenced", 6: "running"},
    "drop": {1: "dropped", 2: "kept", 3: "absent", 4: "fenced"},
    "read": {1: "chunks", 2: "gone", 3: "torn"},
    "follow": {0: "gone", 1: "found", 2: "found", 3: "found", 5: "found"},
}


class Functions:
    """The functions of a database. Their tags stand for the model's words."""

    def __init__(self, probe: PostgresProbe) -> None:
        self._probe = probe

    def __call__(self, call: Call) -> str:
        verb, _, *args = call
        return TAGS[str(verb)][getattr(self, f"_{verb}")(*args)]

    def _append(self, me: int) -> int:
        args = (KEY, TOKENS[me], 0, pieces(me)[0], b"a head")
        return int(self._probe.sql("SELECT append_2($1, $2, $3, $4, $5)", *args)[0][0])

    def _renew(self, me: int) -> int:
        return int(self._probe.call(rows.RENEW, (KEY, TOKENS[me], LEASE_MS, rows.STAGES[SENT]))["tag"])

    def _settle(self, me: int, mode: str, how: str) -> int:
        claim = cancelled_claim(claim_of(me, mode)) if how == "cancelled" else claim_of(me, mode)
        if how == "release":
            row = rows.release_row(claim)
        elif rules.HOW[how] == "unknown":
            row = rows.unknown_row(claim, "no answer came", 0)
        else:
            row = rows.store_row(claim_of(me, "hold"), *stored(me, how))
        return int(self._probe.call(rows.SETTLE, row)["tag"])

    def _resolve(self, seen: int, how: str, as_seen: str) -> int:
        meta, body = (packed(OPERATOR, 1)[0], b"".join(pieces(OPERATOR))) if how == "answer" else (None, None)
        mode = self._probe.fields(KEY).get("mode", b"hold")
        check = self_check(KEY, TENANT, TOKENS[OPERATOR], mode, FINGERPRINT)[16:]
        decision = (KEY, TOKENS[seen], TOKENS[OPERATOR], 8, check, meta, body, None, RETENTION_MS, 0, 200)
        places = ", ".join(f"${number}" for number in range(1, 17))
        args = *decision, seen_lease(self._probe, as_seen), b"", ACTOR, True, b""
        return int(self._probe.sql(f"SELECT resolve_3({places})", *args)[0][0])

    def _drop(self, seen: int, purge: bool) -> int:
        args = (KEY, TOKENS[seen], purge, ACTOR, True, b"")
        return int(self._probe.sql("SELECT drop_1($1, $2, $3, $4, $5, $6)", *args)[0][0])

    def _read(self, token: int) -> int:
        return int(self._probe.sql("SELECT tag FROM read_1($1, $2, $3, $4)", KEY, TOKENS[token], 0, 262144)[0][0])

    def _follow(self, token: int) -> int:
        return int(self._probe.call(rows.FOLLOW, (KEY, TOKENS[token], 0, 262144, 5000))["tag"])


class Server:
    """A record in a real server: put there by the verbs, changed by them, and read as the model sees it."""

    def __init__(self, probe: Probe, verbs: Verbs) -> None:
        self._probe, self.verbs = probe, verbs
        self._saved: dict[Record, object] = {}

    def put(self, record: Record) -> None:
        """Make a record stand in the store; the first time in the way that leads to it."""
        self._probe.remove(KEY)
        if record in self._saved:
            self._probe.restore(KEY, self._saved[record])
            return
        for call in WAYS[record]:
            self.run(call)
        assert self.record() == record
        self._saved[record] = self._probe.save(KEY)

    def record(self) -> Record:
        """Return what stands in the store, reduced to what the model has of it."""
        found = self._probe.fields(KEY)
        if not found:
            return Record()
        first = found.get("b0", b"")
        if "meta" in found:
            chunks = b"".join(found[name] for name in sorted(found) if name != "meta")
            if found["meta"][:1] == DROPPED:
                assert set(found) == {"meta"}
                return Record(EXPIRED, WHO[unpack_expired(KEY, TENANT, found["meta"], 0).token])
            known = unpack(KEY, TENANT, found["meta"], None, 0)
            answer, who = known.response, WHO[known.token]
            held = BARE if not answer.body_stored and not chunks else WHOLE if chunks == b"".join(pieces(who)) else TORN
            return Record(COMPLETE, who, answer=who, body=held)
        if found["state"] == b"expired":
            return Record(EXPIRED, WHO[found["token"]])
        appended = next((who for who in (1, 2) if first == pieces(who)[0]), NOBODY)
        runs = found["state"] == b"in_flight" and int(found["lease"]) > self._probe.now_ms()
        mode = found.get("mode", b"").decode()
        return Record(found["state"].decode(), WHO[found["token"]], mode, runs, appended)

    def run(self, call: Call) -> tuple[str, StoredRecord | None]:
        """Run one call for real; return the word for what came of it, and the record that a claim was told of."""
        verb, _, *args = call
        if verb == "lapse":
            self._probe.change(KEY, lease=self._probe.now_ms() - 1)
            return "", None
        if verb != "claim":
            return self.verbs(call), None
        match claim_result(self._probe, *args):
            case Claim():
                return "claimed", None
            case StoredRecord() as found:
                return "told", found
            case Unconfirmed():
                return "late", None
        raise AssertionError(call)


@pytest.fixture
def server(probe: RedisProbe | PostgresProbe) -> Server:
    return Server(probe, Scripts(probe) if isinstance(probe, RedisProbe) else Functions(probe))


def test_what_is_tried():
    """Every state, lapsed ones too, for the owner and for anybody else."""
    assert {record.state for record in WAYS} == {ABSENT, IN_FLIGHT, UNKNOWN, COMPLETE, EXPIRED, RELEASED}
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
        said, found = server.run(call)
        if found is not None:
            assert tells(found) == (rules.told(call[1]), rules.is_open(call[1], "hold", frozenset()))
        assert (said, server.record()) == (word, became), call
        seen.add(word)
    assert seen == rules.WORDS[verb] - NOT_MET.get(verb, set())


# An owner appends a piece with the same bytes as before, and nobody else's pieces stand in its record.
NOT_MET = {"append": {"torn"}}


def tells(found: StoredRecord) -> tuple[str, bool]:
    """Return what the proxy makes of a claim's reply about somebody else's record: what is said, whether it is open."""
    kept = found.response is not None and found.response.body_stored
    now = effective_state(found.state, found.lease_left_ms)
    return decide(now, True, kept).value, may_take_over(now, True, found.mode, False)


# What the model calls these replies.
STANDS_FOR = {("claim", word): "told" for word in ("complete", "expired", "packed", "state")}
STANDS_FOR |= {("follow", word): "found" for word in ("packed", "hash")} | {("append", "read"): "appended"}


def test_the_model_has_every_word():
    """All replies that the scripts' contracts name."""
    for verb in RECORD_VERBS:
        words = set(replies(" ".join(section(verb, "Returns")), {}))
        assert {STANDS_FOR.get((verb, word), word) for word in words} == rules.WORDS[verb], verb
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
    """What the scripts write or ask for, and what a proxy reads: released is known to the scripts alone. That a record
    is expired is never written: its time says so, and then its `meta`."""
    named = set()
    for verb in RECORD_VERBS:
        code = body(verb)
        named |= set(re.findall(r"'HSET', KEYS\[1\], 'state', '(\w+)'", code))
        named |= set(re.findall(r"(?:state|found\[2\]) [=~]= '(\w\w+)'", code))
        # A packed record has a letter for it.
        letters = set(re.findall(r"(?:state|value:sub\(71, 71\)) == '(\w)'", code))
        named |= {state for state in (IN_FLIGHT, UNKNOWN) for letter in letters if state.startswith(letter)}
    assert named <= {IN_FLIGHT, UNKNOWN, COMPLETE, RELEASED}
    assert named | {ABSENT, EXPIRED} == {record.state for record in WAYS}
    assert {state.value for state in State} == named - {RELEASED} | {EXPIRED}
    assert set(TEXTS) >= set(RECORD_VERBS)


def test_the_model_has_every_ending():
    """How an exchange ended decides how its claim is settled, as in the proxy."""
    words = {"stored": "store", "stored_without_body": "bare", "released": "release"}
    assert {one.label: words.get(one.settlement.label, one.settlement.label) for one in Ending} == rules.ENDINGS
