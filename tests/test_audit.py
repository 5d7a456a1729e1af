"""The audit trail: its digests, what a look at it finds, and that every change of a key's state has its entry."""

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oncegate.commands.cli import main
from oncegate.decision import CANCELLED
from oncegate.keys.digests import Digests
from oncegate.store.kept import Kept
from oncegate.store.postgres import rows
from oncegate.store.postgres.audit import EVENTS, Entry, Event, Head, digest_of, verify
from oncegate.store.postgres.migrations.grants import grants
from oncegate.store.postgres.store import hmac_pads
from oncegate.store.record import Claim, pack
from oncegate.store.record_name import record_id
from oncegate.store.record_view import Deciding
from oncegate.store.results import ResolveStatus
from oncegate.store.store import PostgresOptions, Store
from tests.parts import answering, ask, request
from tests.postgres_database import Database
from tests.stores import (
    BODY,
    FOREIGN,
    KEY,
    PATIENCE_S,
    RETENTION_MS,
    act,
    answer,
    claim,
    claimed,
    connected,
    key,
    store_small,
)

SECRET = "sixteen bytes 16"
AUDIT_KEY = Digests(SECRET.encode()).audit_key
DAY_MS = 86_400_000
AT = 20_000 * DAY_MS
COLUMNS = ", ".join(Entry._fields)


# Chains, without a database ...


def entry(no: int, before: bytes, audit_key: bytes = AUDIT_KEY, **fields: Any) -> Entry:
    """Return an entry as the database writes it."""
    at = AT + no * 1000
    event = Event.CLAIMED if no == 1 else Event.TAKEN_OVER if no % 2 else Event.UNKNOWN
    one = Entry(
        KEY, no, at, at - 1000 if no > 1 else 0, event.number, b"t" * 16, 7, b"p" * 10, b"rule", 502, 3, b"d", b""
    )
    one = one._replace(**fields)
    return one._replace(digest=digest_of(one, before, audit_key))


def chain(length: int, **fields: Any) -> list[Entry]:
    entries: list[Entry] = []
    for no in range(1, length + 1):
        entries.append(entry(no, entries[-1].digest if entries else b"", **fields))
    return entries


def head_of(entries: list[Entry]) -> Head:
    last = entries[-1]
    return Head(last.no, last.at, last.digest)


def found(entries: list[Entry], head: Head | None = None, first_day: int = 0, audit_key: bytes = AUDIT_KEY) -> Any:
    """Return what is found, in short: kinds with the numbers of their entries."""
    return [(one.kind, one.no) for one in verify(reversed(entries), head, first_day, audit_key)]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_chain_as_it_was_written(length: int) -> None:
    entries = chain(length)
    assert found(entries, head_of(entries)) == []
    assert found(entries) == []


@pytest.mark.parametrize("field", [name for name in Entry._fields if name not in ("before_at",)])
@pytest.mark.parametrize("no", [1, 3, 5])
def test_a_field_that_was_changed(field: str, no: int) -> None:
    """Each field counts, of each entry. `before_at` is no more than where to look."""
    entries = chain(5)
    value = getattr(entries[no - 1], field)
    changed = value + 100 if isinstance(value, int) else b"x" + value[1:]
    entries[no - 1] = entries[no - 1]._replace(**{field: changed})
    assert any(one.is_error for one in verify(entries, head_of(chain(5)), 0, AUDIT_KEY))


def test_fields_do_not_run_into_one_another() -> None:
    """What moves from the end of one field to the beginning of the next makes another digest."""
    one = entry(1, b"", actor=b"ab", rule=b"c")
    assert digest_of(one, b"", AUDIT_KEY) != digest_of(one._replace(actor=b"a", rule=b"bc"), b"", AUDIT_KEY)


@pytest.mark.parametrize("no", [1, 2, 4])
def test_an_entry_that_was_removed(no: int) -> None:
    entries = chain(5)
    del entries[no - 1]
    assert found(entries, head_of(entries)) == [("removed", no + 1)]


def test_a_tail_that_was_cut() -> None:
    """It is seen against the record, and without the record it is not."""
    entries = chain(5)
    assert found(entries[:3], head_of(entries)) == [("cut", 3)]
    assert found(entries[:3]) == []


def test_a_tail_that_was_cut_together_with_the_record_s_number() -> None:
    entries = chain(5)
    assert found(entries, head_of(entries[:3])) == [("ahead", 3)]
    assert found(entries[:3], Head(3, AT, b"x" * 32)) == [("cut", 3)]


def test_a_chain_that_forks() -> None:
    """Two entries follow the same one, with digests as they should be."""
    entries = chain(3)
    fork = entry(3, entries[1].digest, fence=9)
    assert found([*entries, fork], head_of(entries)) == [("forked", 3)]


def test_an_entry_that_somebody_without_the_secret_adds() -> None:
    entries = chain(2)
    forged = entry(3, entries[1].digest, audit_key=b"another")
    assert found([*entries, forged], head_of(entries)) == [("changed", 3)]


def test_a_chain_that_begins_anew() -> None:
    """The record was gone, so the next claim began with 1. That is no error, and says what was last before it."""
    old, new = chain(3), [entry(1, b"", at=AT + DAY_MS)]
    (one,) = verify([*old, *new], head_of(new), 0, AUDIT_KEY)
    assert (one.kind, one.no, one.at, one.is_error) == ("begins_anew", 1, AT + DAY_MS, False)
    assert "taken_over" in one.text


def test_a_chain_whose_first_days_were_dropped() -> None:
    """The entries before the trail's oldest day are gone with it; on that day itself they were removed."""
    entries = chain(5)[2:]
    assert found(entries, head_of(entries), first_day=20_001) == [("begins_late", 3)]
    assert found(entries, head_of(entries), first_day=20_000) == [("removed", 3)]


def test_every_event_has_a_word() -> None:
    assert sorted(EVENTS) == list(range(1, len(Event) + 1))
    assert len({event.word for event in Event}) == len(Event)


# The same digests in the database ...


@pytest.mark.parametrize("audit_key", [b"", AUDIT_KEY])
def test_the_database_computes_the_same_digest(database: Database, audit_key: bytes) -> None:
    for one in chain(3, audit_key=audit_key):
        before = os.urandom(32)
        query = "SELECT audit_digest_of($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
        fields = (one.key, one.no, one.at, one.event, one.token, one.fence, one.actor, one.rule, one.status, one.size)
        theirs = database.connection.value(query, hmac_pads(audit_key), before, *fields, one.detail)
        assert theirs == digest_of(one, before, audit_key)


# What the store writes ...


def opened(database: Database, **options: Any) -> Any:
    postgres = PostgresOptions(audit_key=AUDIT_KEY, **options)
    return connected(database.url, durability="fsync", postgres=postgres)


def written(database: Database, of: bytes = KEY) -> list[Entry]:
    query = f"SELECT {COLUMNS} FROM audit WHERE key = $1 ORDER BY no"
    return [Entry(*row) for row in database.connection.fetch(query, of)]


def words(database: Database, of: bytes = KEY) -> list[str]:
    return [one.word for one in written(database, of)]


def checked(database: Database) -> None:
    """Assert that the trail is whole."""
    for row in database.connection.fetch("SELECT key, audit_no, audit_at, audit_digest FROM record"):
        entries = written(database, row["key"])
        assert verify(entries, Head(*list(row)[1:]), 0, AUDIT_KEY) == []


def lapse(database: Database) -> None:
    database.connection.execute("UPDATE record SET lease = now_ms() - 1")


async def test_every_event_is_written(database: Database) -> None:
    """Each with who acted, on which claim, and what the next one needs to tell the story."""
    async with opened(database) as store, opened(database, actor=b"operator alice on host") as operator:
        # Stored: with its status and size.
        await store_small(store, await claimed(store))
        assert words(database) == ["claimed", "stored"]
        assert written(database)[1][9:11] == (201, len(BODY))
        # Unknown, with the reason; taken over, with the token before; unknown again because its lease ended; back.
        first = await claimed(store, mode=b"retry", key=key(11))
        await store.mark_unknown(first, "the upstream closed the connection", PATIENCE_S)
        second = await claimed(store, mode=b"retry", key=key(11))
        lapse(database)
        assert (await store.renew(second)).value == "renewed"
        assert words(database, key(11)) == ["claimed", "unknown", "taken_over", "renewed_from_unknown"]
        entries = written(database, key(11))
        assert entries[1].detail == b"the upstream closed the connection"
        assert entries[2].detail == first.token
        assert [one.token for one in entries] == [first.token, first.token, second.token, second.token]
        assert [one.fence for one in entries] == [int(first.fence)] * 2 + [int(second.fence)] * 2
        # Released by its owner, and claimed again: the chain goes on.
        await store.release(await claimed(store, key=key(22)), PATIENCE_S)
        await claimed(store, key=key(22))
        assert words(database, key(22)) == ["claimed", "released", "claimed"]
        # The client stopped the request.
        await store.mark_unknown(replace(await claimed(store, key=key(55)), mode=CANCELLED), "stopped", PATIENCE_S)
        assert words(database, key(55)) == ["claimed", "cancelled"]
        # The body goes, past the retention or because an operator purges it.
        for number, word in ((66, "expired"), (77, "purged")):
            await store_small(store, replace(await claimed(store, key=key(number)), tombstone_ms=RETENTION_MS))
            if word == "expired":
                database.connection.execute("UPDATE record SET expires = now_ms() - 1 WHERE audit_no = 2 AND state = 3")
            record = await store.records.read(key(number))
            assert record is not None
            await store.drop(record, purge=word == "purged")
            assert words(database, key(number)) == ["claimed", "stored", word]
        # An operator's acts bear the operator's name.
        for number, verb in ((33, "freed"), (44, "resolved")):
            owner = await claimed(store, key=key(number))
            token = operator.token()
            if verb == "freed":
                done = await operator.release_by_operator(owner.key, Deciding(owner.token), token, owner.fence)
            else:
                decided = replace(owner, token=token)
                done = await operator.resolve_by_operator(
                    decided, Deciding(owner.token), pack(decided, answer(BODY)), BODY
                )
            assert done in (ResolveStatus.RELEASED, ResolveStatus.RESOLVED)
            assert words(database, key(number)) == ["claimed", verb]
            assert [one.actor for one in written(database, key(number))] == [
                owner.token[:10],
                b"operator alice on host",
            ]
    checked(database)


VERBS = (
    "claim", "append", "renew", "read", "store", "store bare", "release", "mark unknown",
    "free", "resolve", "drop", "purge",
)  # fmt: skip
STATES = ("absent", "in flight", "lapsed", "unknown", "complete", "expired", "released", "freed")
# A lease that ended makes a record unknown, though nobody wrote that.
STATE = "SELECT state, token, state = 1 AND lease < now_ms() AS lapsed, audit_no FROM record"


# Whether the last change of the record and its last entry are of one transaction.
TOGETHER = "SELECT audit.xmin = record.xmin FROM record JOIN audit ON audit.key = record.key AND no = audit_no"


async def brought_to(state: str, store: Store, database: Database) -> Claim:
    """Bring KEY into a state, and return its owner's claim."""
    database.connection.execute("DELETE FROM record; DELETE FROM audit; DELETE FROM chunk")
    owner = await claimed(store, mode=b"retry")
    match state:
        case "absent":
            database.connection.execute("DELETE FROM record; DELETE FROM audit")
        case "lapsed":
            lapse(database)
        case "unknown":
            await store.mark_unknown(owner, "lost", PATIENCE_S)
        case "complete":
            await store_small(store, owner)
        case "expired":
            await store_small(store, replace(owner, tombstone_ms=RETENTION_MS))
            database.connection.execute("UPDATE record SET expires = now_ms() - 1")
        case "released":
            await store.release(owner, PATIENCE_S)
        case "freed":
            await store.release_by_operator(KEY, Deciding(owner.token), FOREIGN, owner.fence)
    return owner


async def do(store: Store, verb: str, owner: Claim, own: bool) -> None:
    """Run a verb as the record's owner, or as somebody else."""
    token = owner.token if own else FOREIGN
    match verb:
        case "drop" | "purge":
            if (record := await store.records.read(KEY)) is not None:
                await store.drop(record if own else record._replace(token=FOREIGN), purge=verb == "purge")
        case "free":
            await store.release_by_operator(KEY, Deciding(token), store.token(), owner.fence)
        case "resolve":
            operators = replace(owner, token=store.token())
            await store.resolve_by_operator(operators, Deciding(token), pack(operators, answer(BODY)), BODY)
        case _:
            await act(store, verb, owner, own)


@pytest.mark.parametrize("state", STATES)
async def test_every_change_of_state_has_its_entry(database: Database, state: str) -> None:
    """And nothing else has one. Whatever verb meets whatever state, by the owner or by another."""
    postgres = PostgresOptions(audit_key=AUDIT_KEY)
    changes = 0
    async with connected(database.url, durability="memory", postgres=postgres) as store:
        for verb in VERBS:
            for own in (True, False):
                owner = await brought_to(state, store, database)
                before = [tuple(row) for row in database.connection.fetch(STATE)] or [(0, b"", False, 0)]
                await do(store, verb, owner, own)
                ((*then, count),) = before
                ((*now, number),) = [tuple(row) for row in database.connection.fetch(STATE)] or [(0, b"", False, 0)]
                # Who marks a key twice says it twice.
                again = state == "unknown" and verb == "mark unknown" and own
                assert number - count == (now != then or again), (verb, own, then, now)
                assert len(written(database)) == number
                if now != then:
                    changes += 1
                    assert database.connection.value(TOGETHER), (verb, own)
                checked(database)
    assert changes


async def test_without_an_audit_trail(database: Database) -> None:
    """Nothing is written, and nothing is missed when it is switched on."""
    async with opened(database, audit=False) as silent, opened(database) as store:
        owner = await claimed(silent)
        assert database.connection.value("SELECT count(*) FROM audit") == 0
        await store.mark_unknown(owner, "lost", PATIENCE_S)
        assert words(database) == ["unknown"]
    checked(database)


async def test_a_withdrawal(database: Database) -> None:
    """A claim that nobody holds is taken back, and the trail has both."""
    async with opened(database) as store:
        owner = await claimed(store)
        row = rows.release_row(owner, rows.WITHDRAWN)
        database.connection.fetch(rows.SETTLE.statement, [row], owner.token[:10], True, hmac_pads(AUDIT_KEY))
    assert words(database) == ["claimed", "withdrawn"]
    checked(database)


# Out of the proxies' reach ...


@pytest.fixture
def proxy_url(database: Database) -> Any:
    """The URL of a role with the rights that `oncegate migrate` gives."""
    name = f"proxy_{os.getpid()}"
    database.connection.execute(f"CREATE ROLE {name} LOGIN")
    for row in database.connection.fetch(grants(name)):
        database.connection.execute(row[0])
    yield database.url.replace("postgres@", f"{name}@")
    database.connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_the_rights_are_enough(database: Database, proxy_url: str) -> None:
    """Every verb works with the rights of a proxy's role, in every state."""
    async with connected(proxy_url, durability="fsync", postgres=PostgresOptions(audit_key=AUDIT_KEY)) as store:
        for state in STATES:
            for verb in VERBS:
                await do(store, verb, await brought_to(state, store, database), own=True)
        assert store.not_ready_reason() is None
        assert [record.key async for record in store.records.scan()]
    checked(database)


# The command ...

Command = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def command(database: Database, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Command:
    """Run `oncegate audit`; return its exit code, its lines and what it said besides."""
    for name, value in (("UPSTREAM", "http://u"), ("STORE_URL", database.url), ("SECRET", SECRET)):
        monkeypatch.setenv(f"ONCEGATE_{name}", value)

    def run(*arguments: str) -> tuple[int, list[str], str]:
        code = main(["audit", *arguments])
        out, said = capsys.readouterr()
        return code, out.splitlines(), said

    return run


async def story(database: Database) -> Claim:
    """Execute two keys; the first one is claimed twice."""
    async with opened(database) as store:
        await store.release(await claimed(store), PATIENCE_S)
        owner = await claimed(store)
        await store_small(store, owner)
        await store_small(store, await claimed(store, key=key(22)))
    return owner


def test_one_key(command: Command, database: Database) -> None:
    """Its entries in their order: what the record leads to, or all that the trail has."""
    asyncio.run(story(database))
    code, lines, _ = command("--id", record_id(KEY))
    assert (code, [line.split()[1] for line in lines]) == (0, ["claimed", "released", "claimed", "stored"])
    assert "status 201" in lines[-1]
    database.connection.execute("DELETE FROM record")
    assert command("show", "--id", record_id(KEY))[1] == lines
    _, json_lines, _ = command("--id", record_id(KEY), "--json")
    assert [json.loads(line)["number"] for line in json_lines] == [1, 2, 3, 4]
    code, lines, said = command("--id", record_id(key(33)))
    assert (code, lines) == (1, [])
    assert "has no entry of the key" in said


def test_the_evidence_of_a_decision(command: Command, database: Database) -> None:
    """It stands with the decision, escaped and within its bound; a byte of it that is changed is found."""
    evidence = b'{"status": 200, "/data/0/id": "ch_1"}\x1b[2J' + b"x" * 2000

    async def decide() -> None:
        async with opened(database) as store:
            for number in (1, 2):
                owner = await claimed(store, key=key(number))
                await store.mark_unknown(owner, "lost", PATIENCE_S)
                seen, token = Deciding(owner.token, evidence=evidence), store.token()
                if number == 1:
                    by = replace(owner, token=token)
                    await store.resolve_by_operator(by, seen, pack(by, answer(BODY)), BODY)
                else:
                    await store.release_by_operator(owner.key, seen, token, owner.fence)

    asyncio.run(decide())
    for number, word in ((1, "resolved"), (2, "freed")):
        code, lines, _ = command("--id", record_id(key(number)))
        assert (code, lines[-1].split()[1]) == (0, word)
        assert 'evidence {"status": 200, "/data/0/id": "ch_1"}\\x1b[2Jxxx' in lines[-1]
        _, lines, _ = command("--id", record_id(key(number)), "--json")
        assert json.loads(lines[-1])["evidence"] == evidence[:1024].decode()
    told = [json.loads(line) for line in command("export")[1]]
    assert [one["event"] for one in told if "evidence" in one] == ["resolved", "freed"]
    assert command("verify")[0] == 0
    database.connection.execute("UPDATE audit SET detail = set_byte(detail, 12, 50) WHERE event = 9")
    code, _, said = command("verify")
    assert (code, said.count("changed: key")) == (3, 1)


def test_a_whole_trail_is_checked(command: Command, database: Database) -> None:
    """As it was written, nothing is found. What is said besides: what nobody can see."""
    asyncio.run(story(database))
    code, lines, said = command("verify")
    assert (code, lines) == (0, [])
    assert said.startswith("6 entries of 2 keys were checked. Nothing is damaged. ")
    assert "\nwhat cannot be detected:\n- " in said


DAMAGES = {
    "changed": "UPDATE audit SET status = 200 WHERE event = 4 AND key = $1",
    "removed": "DELETE FROM audit WHERE no = 2 AND key = $1",
    "cut": "DELETE FROM audit WHERE no = 4 AND key = $1",
    "cut at all": "DELETE FROM audit WHERE key = $1",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(command: Command, database: Database, damage: str) -> None:
    """Exit code 3, and the entry by its key, number and time; also as JSON."""
    asyncio.run(story(database))
    database.connection.fetch(DAMAGES[damage], KEY)
    kind = damage.split()[0]
    code, _, said = command("verify")
    assert code == 3
    assert said.startswith(f"{kind}: key {record_id(KEY)}, entry ")
    code, lines, _ = command("verify", "--json")
    assert (code, {json.loads(line)["finding"] for line in lines}) == (3, {kind})


def test_another_secret(command: Command, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the secret of the proxies every chain looks changed, and the operator is asked for it."""
    asyncio.run(story(database))
    monkeypatch.setenv("ONCEGATE_SECRET", "another one of 16")
    code, _, said = command("verify")
    assert code == 3
    assert "Every entry looks changed: is ONCEGATE_SECRET that of the proxies?" in said


def test_a_record_that_was_gone(command: Command, database: Database) -> None:
    """Its key's next chain begins anew: no error."""
    asyncio.run(story(database))
    database.connection.execute("DELETE FROM record")
    asyncio.run(story(database))
    code, _, said = command("verify")
    assert code == 0
    assert said.count("begins_anew: ") == 2


def test_the_trail_is_exported(command: Command, database: Database) -> None:
    """All entries by their time, or those of a time."""
    asyncio.run(story(database))
    _, lines, _ = command("export")
    told = [json.loads(line) for line in lines]
    assert [one["event"] for one in told].count("stored") == 2
    assert [one["at"] for one in told] == sorted(one["at"] for one in told)
    assert {one["key_id"] for one in told} == {record_id(KEY), record_id(key(22))}
    assert command("export", "--until", told[0]["at"])[1] == []
    assert command("export", "--since", told[0]["at"])[1] == lines
    assert command("export", "--since", "2200-01-01")[1] == []


def test_a_store_without_a_trail(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCEGATE_STORE_URL", "redis://h")
    code, _, said = command("verify")
    assert code == 2
    assert "only a store in PostgreSQL has an audit trail" in said


def test_a_schema_without_tables(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each command on the store names what makes them."""
    monkeypatch.setenv("ONCEGATE_STORE_SCHEMA", "nothing_is_here")
    for arguments in (["verify"], ["export"], ["--id", record_id(KEY)]):
        code, _, said = command(*arguments)
        assert (code, "run `oncegate migrate`" in said) == (1, True), said
    assert main(["keys", "list"]) == 1
    assert "run `oncegate migrate`" in capsys.readouterr().err


def test_the_note_of_a_record(command: Command, database: Database) -> None:
    """It is said beside the entries of its key, which do not have it, and escaped."""

    async def noted() -> None:
        async with opened(database) as store:
            owner = await claim(store, kept=Kept("order-7\x1b"))
            assert isinstance(owner, Claim)
            await store_small(store, owner)

    asyncio.run(noted())
    _, lines, said = command("--id", record_id(KEY))
    assert "note of the record, not audited: order-7\\x1b\n" in said
    assert "order-7" not in "".join(lines)
    assert "order-7" not in "".join(command("export")[1])


# What it may not hold ...


RULES = """
[[rule]]
name = "charges"
path = "/**"
"""


async def test_no_key_no_credential_no_body(database: Database, proxies: Any, upstream: Any, tmp_path: Path) -> None:
    """The trail of real requests names keys by their digests, and has the rule's name; nothing else of a request."""
    words = {name: f"canary-{name}" for name in ("key", "credential", "body", "path", "answer", "field")}
    (tmp_path / "rules.toml").write_text(RULES)
    proxy = proxies(upstream, database.url, SECRET=SECRET, RULES_FILE=tmp_path / "rules.toml")
    fields = f"Authorization: Bearer {words['credential']}", f"X-Field: {words['field']}"
    head = f"HTTP/1.1 201 Created\r\nX-Field: {words['field']}\r\nContent-Length: "
    whole = head.encode() + b"%d\r\n\r\n" % len(words["answer"]) + words["answer"].encode()
    for number, response in enumerate((whole, b"HTTP/1.1 503 canary-reason\r\nContent-Length: 6\r\n\r\ncanary")):
        upstream.script = answering(response)
        target, sent_key = f"/{words['path']}", f"{words['key']}-{number}"
        for _ in range(2):
            await ask(proxy.port, request("POST", target, sent_key, words["body"].encode(), *fields))
    entries = [Entry(*row) for row in database.connection.fetch(f"SELECT {COLUMNS} FROM audit ORDER BY at, no")]
    assert [one.word for one in entries] == ["claimed", "stored", "claimed", "unknown"]
    assert {one.rule for one in entries if one.word == "claimed"} == {b"charges"}
    assert "canary" not in str(entries)
