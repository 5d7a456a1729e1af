"""`oncegate keys` finds what is there, by key, rule, request, id or note; says where else to look; and watches."""

import asyncio
import json
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from oncegate.commands.keys_watch import Watch, watch, watched
from oncegate.operating.find_record import Finder, RecordName
from oncegate.rules.model import Rules
from oncegate.rules.resolution import default_rule
from oncegate.settings.settings import Settings
from oncegate.store.record_name import record_id
from oncegate.store.record_view import Deciding
from tests.e2e.test_operate import BAD, Desk
from tests.parts import OK, Proxy, answering, ask, request
from tests.postgres_probe import PostgresProbe
from tests.stores import KEY, PATIENCE_S, claimed, connected, key

RULES = """
[[rule]]
name = "stripe events"
path = "/webhooks/stripe"
preset = "stripe-webhook"

[[rule]]
name = "orders"
path = "/v1/orders"
key = ["header:X-User", "body:/cart/id"]
note = "/order_id"

[[rule]]
name = "hooks"
path = "/hooks/*"
key = ["receiver", "body:/id"]

[[rule]]
name = "shops"
path = "/shops"
namespace = "shops"
scope = ["header:X-Shop"]
note = "header:X-Order"

[[rule]]
name = "clicks"
path = "/clicks"
key = "derived:60"
"""


@pytest.fixture
def desk(stored, tmp_path: Path) -> Desk:
    (tmp_path / "rules.toml").write_text(RULES)
    return Desk(stored.url, tmp_path, RULES_FILE="rules.toml")


@pytest.fixture
async def gate(fork, upstream, stored, desk, tmp_path: Path) -> Proxy:
    upstream.script = answering(OK)
    return await fork(upstream, stored.url, RULES_FILE=str(tmp_path / "rules.toml"))


async def send(gate: Proxy, path: str, body: bytes, *fields: str, key: str | None = None, status: int = 200) -> bytes:
    """Send one request, and return its key's id if the answer has it."""
    answer = await ask(gate.port, request("POST", path, key, body, *fields))
    assert answer.status == status, answer
    return answer.header("oncegate-key-id") or b""


async def test_a_key_by_the_values_that_its_rule_reads(gate, desk):
    """Any source: a member of a body and the receiver, two parts, a number, another path, another tenant."""
    await send(gate, "/webhooks/stripe", b'{"id": "evt_9"}')
    await send(gate, "/v1/orders", b'{"cart": {"id": 17}, "order_id": "o-1"}', "X-User: ana")
    await send(gate, "/hooks/b", b'{"id": "7"}')
    await send(gate, "/shops", b"{}", "X-Shop: 5", key="k-1")
    seen = await desk.show("--rule", "stripe events", "evt_9")
    assert (seen["state"], seen["rule"]) == ("complete", "stripe events")
    seen = await desk.show("--rule", "orders", "ana", "17")
    assert (seen["rule"], seen["note"]) == ("orders", "o-1")
    assert (await desk.show("--rule", "hooks", "--path", "/hooks/b", "7"))["rule"] == "hooks"
    assert (await desk.show("--rule", "shops", "k-1", "--credential", stdin="X-Shop: 5\n"))["rule"] == "shops"
    scope = (await desk.show("--rule", "shops", "k-1", "--headers-file", "-", stdin="X-Shop: 5\n"))["scope"]
    assert (await desk.show("--rule", "shops", "k-1", "--scope", scope))["rule"] == "shops"
    # Another value, path or tenant is another key.
    for words in (
        ("stripe events", "evt_8"),
        ("orders", "ana", "18"),
        ("hooks", "7", "--path", "/hooks/a"),
        ("shops", "k-1"),
    ):
        assert "there is no record of this key" in (await desk("show", "--rule", *words, code=1)).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rule", "strype", "evt_9"), 'there is no rule "strype"; the rules are: "stripe events", "orders", "hooks"'),
        (("--rule", "orders", "ana"), "give the value of header:x-user and the value of body:/cart/id"),
        (("--rule", "stripe events"), "give the value of body:/id"),
        (("--rule", "hooks", "7"), "give it with --path"),
        (("--rule", "clicks", "a"), "the whole request, with --request"),
        (("--rule", "shops", "two\nlines"), "give the key, as the client sent it"),
        (("a", "b"), "give one key, or --rule"),
        (("--id", "abc"), "give at least its first 8"),
        (("--id", "a" * 32, "--note", "o-1"), "name a record in one way"),
        (("--note", "o-1", "key"), "name a record in one way"),
        (("--request", "POST"), "a request is a method and a path"),
        (("--request", "POST nowhere"), "'nowhere' is no URL"),
        (("--request", "POST /x", "--body-file", "none"), "none: No such file or directory"),
        (("--request", "POST /x", "--body-file", "-", "--headers-file", "-"), "not both"),
        ((), "give a key, or a record's id with --id"),
    ],
)
async def test_what_names_no_record(valkey, tmp_path, words, said):
    """Each is told what to give instead, with the exit code of a usage error."""
    (tmp_path / "rules.toml").write_text(RULES)
    told = await Desk(valkey.url, tmp_path, RULES_FILE="rules.toml")("show", *words, code=2)
    assert said in told.stderr
    assert told.stdout == ""


async def test_a_key_by_its_whole_request(gate, desk):
    """As the request path reads it, also where the key is the whole request; a credential comes from a file."""
    await send(gate, "/webhooks/stripe", b'{"id": "evt_9"}')
    await send(gate, "/clicks", b"one=1")
    await send(gate, "/v2/any", b"{}", "Authorization: Bearer t0ken", key="k-2")
    seen = await desk.show("--request", "POST /webhooks/stripe", "--body-file", "-", stdin='{"id": "evt_9"}')
    assert seen["rule"] == "stripe events"
    assert (await desk.show("--request", "POST /clicks", "--body-file", "-", stdin="one=1"))["rule"] == "clicks"
    fields = "Idempotency-Key: k-2\nAuthorization: Bearer t0ken\n"
    assert (await desk.show("--request", "POST /v2/any", "--headers-file", "-", stdin=fields))["state"] == "complete"
    told = await desk("show", "--request", "POST /webhooks/stripe", "--body-file", "-", stdin="{}", code=1)
    assert told.stderr.startswith('this request has no key (rule "stripe events"): ')


async def test_a_key_of_another_rule_is_named(gate, desk):
    """In place of "there is none". Nothing is shown or decided by a guess."""
    await send(gate, "/webhooks/stripe", b'{"id": "evt_9"}')
    told = await desk("show", "evt_9", code=1)
    assert 'but the rule "stripe events" has one of this value: name it with --rule' in told.stderr
    told = await desk("release", "evt_9", "--yes", code=1)
    assert 'the rule "stripe events" has one' in told.stderr
    told = await desk("show", "evt_8", code=1)
    assert "rules may name it otherwise" in told.stderr
    assert '"stripe events"' in told.stderr


async def unknown(gate: Proxy, upstream, body: bytes, user: str = "ana") -> None:
    upstream.script = answering(BAD)
    await send(gate, "/v1/orders", body, f"X-User: {user}", status=502)
    upstream.script = answering(OK)


async def test_a_key_by_the_beginning_of_its_id_and_by_its_note(gate, desk, upstream, stored):
    """Open keys are looked at first. Whoever looks through all keys says so."""
    await unknown(gate, upstream, b'{"cart": {"id": 1}, "order_id": "order-7"}')
    await send(gate, "/v1/orders", b'{"cart": {"id": 2}, "order_id": "order-8"}', "X-User: ana")
    [listed] = await desk.listed()
    assert listed["note"] == "order-7"
    # Without an index, or where the store has a range of ids.
    told = await desk("show", "--json", "--id", listed["id"][:8])
    assert json.loads(told.stdout)["id"] == listed["id"]
    assert ("not complete yet: looking through all keys" in told.stderr) is not isinstance(stored, PostgresProbe)
    assert "not complete yet" in (await desk("show", "--note", "order-7")).stderr
    async with connected(stored.url) as store:
        for server in store.records.servers:
            await server.index.begin()
            await server.index.note_complete()
    for words in (("--id", listed["id"][:8]), ("--note", "order-7")):
        told = await desk("show", "--json", *words)
        assert (json.loads(told.stdout)["id"], told.stderr) == (listed["id"], "")
    assert [one["id"] for one in await desk.listed()] == [listed["id"]]
    [complete] = await desk.listed("--state", "any", "--note", "order-8")
    assert complete["state"] == "complete"
    assert await desk.listed("--state", "any", "--rule", "shops") == []
    told = await desk("show", "--json", "--note", "order-8")
    assert (json.loads(told.stdout)["id"], told.stderr) == (
        complete["id"],
        "no open key matches: looking through all keys\n",
    )
    told = await desk("show", "--json", "--id", complete["id"][:8])
    assert json.loads(told.stdout)["id"] == complete["id"]
    # There it is a range of an index.
    assert ("looking through all keys" in told.stderr) is not isinstance(stored, PostgresProbe)
    assert "there is no record with this note" in (await desk("show", "--note", "order-9", code=1)).stderr
    await unknown(gate, upstream, b'{"cart": {"id": 3}, "order_id": "order-7"}')
    told = await desk("show", "--note", "order-7", code=1)
    assert told.stderr.startswith("2 records have this note: name one of them with --id: ")
    assert listed["id"] in told.stderr


async def test_a_decision_by_note_or_rule_tells_programs_what_was_done(gate, desk, upstream):
    """`--json` has the facts on standard output; the audit line stays on standard error."""
    await unknown(gate, upstream, b'{"cart": {"id": 1}, "order_id": "order-7"}')
    told = await desk("resolve", "--note", "order-7", "--status", "201", "--json")
    assert json.loads(told.stdout) | {"action": "resolve", "outcome": "resolved"} == json.loads(told.stdout)
    assert json.loads(told.stderr.splitlines()[-1])["event"] == "audit"
    await unknown(gate, upstream, b'{"cart": {"id": 2}, "order_id": "order-8"}')
    told = await desk("release", "--rule", "orders", "ana", "2", "--json")
    assert json.loads(told.stdout)["outcome"] == "released"
    # A released key has no note any more, a resolved one has.
    assert [one.get("note") for one in await desk.listed("--state", "released")] == [None]
    assert (await desk.show("--rule", "orders", "ana", "1"))["note"] == "order-7"
    told = await desk("release", "--rule", "orders", "ana", "2", "--json", code=1)
    assert told.stdout == ""


@pytest.mark.parametrize("is_json", [True, False], ids=["json", "lines"])
async def test_what_a_watch_prints(stored, capsys, is_json):
    """A line when a key appears, when something changes, when it is decided and when it is gone; else nothing."""
    async with connected(stored.url) as store:
        seen = Watch(store, is_json)

        async def line(key: bytes | None = None) -> list[str]:
            await seen.see(await watched(store, key))
            lines = capsys.readouterr().out.splitlines()
            return [" ".join(json.loads(one)[name] for name in ("change", "id")) if is_json else one for one in lines]

        assert await line() == []
        owner = await claimed(store)
        for change in ("appeared", ""):
            found = await line()
            assert len(found) == bool(change)
            assert all(change in one and record_id(KEY) in one for one in found)
        await store.mark_unknown(owner, "no answer came", PATIENCE_S)
        [changed] = await line()
        assert "changed" in changed
        again = await claimed(store, key=key(2))
        await store.release(again, PATIENCE_S)
        # It came and went between two looks.
        assert await line() == []
        await store.release_by_operator(KEY, Deciding(owner.token), b"O" * 16, b"9")
        [decided] = await line()
        assert "changed" in decided
        assert await line() == []
        # One key is watched whatever its state, and before it has a record.
        assert await line(key(3)) == []
        owner = await claimed(store, key=key(3))
        assert len(await line(key(3))) == 1
        await store.release(owner, PATIENCE_S)
        [gone] = await line(key(3))
        assert "gone" in gone


async def test_a_watch_outlives_its_store(own_valkey, capsys):
    """It says that the store does not answer, and goes on when it does."""
    async with connected(own_valkey.url) as store:
        settings = Settings(upstream="http://127.0.0.1:9000")
        options = Namespace(json=True, interval=0.2, lasts_s=None)
        finder = Finder(settings, store, Rules((), default_rule(settings)))
        watching = asyncio.create_task(watch(finder, RecordName(), options))
        said = ""
        own_valkey.kill()
        while "the store: " not in said:
            await asyncio.sleep(0.1)
            said += capsys.readouterr().err
        own_valkey.start()
        assert await store.wait_up(PATIENCE_S)
        await claimed(store)
        while record_id(KEY) not in said:
            await asyncio.sleep(0.1)
            said += capsys.readouterr().out
        watching.cancel()


async def test_watching_ends_when_it_is_interrupted(gate, desk, upstream, tmp_path):
    """With what was printed so far, and the exit code of success."""
    await unknown(gate, upstream, b'{"cart": {"id": 1}}')
    with subprocess.Popen(
        [sys.executable, "-m", "oncegate", "keys", "watch", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=desk.env, cwd=tmp_path,
    ) as process:  # fmt: skip
        line = await asyncio.to_thread(process.stdout.readline)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.to_thread(process.communicate)
    assert json.loads(line)["change"] == "appeared"
    assert (out, err, process.returncode) == ("", "", 0)
