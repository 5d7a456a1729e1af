"""`oncegate keys probe`: an operator sees what the API says about an unknown key, and lets it settle the key."""

import json
from pathlib import Path

import pytest

from tests.e2e.test_operate import Desk
from tests.parts import Received, ask, request, until
from tests.stores import connected

SECRET = "pr0be-s3cret"
RULES = """
[[rule]]
name = "charges"
path = "/v1/charges"
note = "/order_id"

[rule.reconcile]
url = "/v1/of/{note}"
credentials_file = "CREDENTIALS"
reference = { "/order_id" = "{note}" }
succeeded = [{ status = "200", when = { "/state" = "paid" } }]
failed = [{ status = "200", when = { "/state" = "declined" } }]
absent = [{ status = "404" }]
absent_after_s = 3600
absent_before_s = 86400
audit = ["/id", "/text"]
# Nobody but the operator asks in these tests.
first_after_s = 600
most_s = 600

[rule.reconcile.answers.succeeded]
status = 201

[rule.reconcile.answers.failed]
status = 402

[[rule]]
name = "refunds"
path = "/v1/refunds"
"""
HOSTILE = '\x1b[2J\r\n{"event": "audit", "user": "mallory"}\u202e'


class Api:
    """Loses what it executes, and answers questions by `says`: a status, and a document."""

    def __init__(self) -> None:
        self.says: tuple[int, object] = 200, {"order_id": "order-1", "state": "paid", "id": "ch_1"}
        self.questions: list[Received] = []

    async def lose(self, _server, _reader, writer, _received: Received) -> None:
        writer.close()

    async def script(self, _server, _reader, writer, received: Received) -> None:
        if received.line.startswith(b"POST"):
            writer.close()
            return
        self.questions.append(received)
        status, document = self.says
        body = json.dumps(document, ensure_ascii=False).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()


@pytest.fixture
def api(upstream) -> Api:
    api = Api()
    upstream.script = api.script
    return api


@pytest.fixture
def store_url(request) -> str:
    """That of the run's Valkey, or of the database where a test says so."""
    return request.getfixturevalue(getattr(request, "param", "valkey")).url


@pytest.fixture
async def gate(fork, upstream, store_url, tmp_path, api):
    (tmp_path / "credentials").write_text(f"Authorization: Bearer {SECRET}\n")
    (tmp_path / "rules.toml").write_text(RULES.replace("CREDENTIALS", str(tmp_path / "credentials")))
    return await fork(upstream, store_url, RULES_FILE="rules.toml")


@pytest.fixture
def desk(gate, upstream, store_url, tmp_path) -> Desk:
    return Desk(store_url, tmp_path, RULES_FILE="rules.toml", UPSTREAM=upstream.url)


def charge(key: str = "k-1", order: str = "order-1", path: str = "/v1/charges") -> bytes:
    return request("POST", path, key, json.dumps({"order_id": order}).encode())


async def lost(gate, *given: str) -> None:
    """Send a charge whose outcome is unknown."""
    assert (await ask(gate.port, charge(*given))).slug == "upstream-lost"


def audited(told) -> dict:
    [line] = [json.loads(line) for line in told.stderr.splitlines() if line.startswith("{")]
    return line


@pytest.mark.parametrize("store_url", ["valkey", "database"], indirect=True)
async def test_an_operator_tries_a_question_and_then_lets_it_settle_the_key(gate, desk, api, store_url):
    """A dry run asks and changes nothing. The probe settles the key by the same answer, and a retry gets it. Neither
    the credentials nor the key in clear are in what is printed, logged or kept."""
    await lost(gate)
    tried = (await desk("probe", "k-1", "--dry-run")).stdout
    for line in (
        "/v1/of/order-1", "Authorization", "verdict              succeeded", "/id                ch_1",
        "key                  would be complete", "a retry gets         201 Created", '"state": "paid"',
    ):  # fmt: skip
        assert line in tried
    assert api.questions[0].header("authorization") == [f"Bearer {SECRET}".encode()]
    assert json.loads((await desk("probe", "k-1", "--dry-run", "--json")).stdout)["verdict"] == "succeeded"
    shown = await desk.show("k-1")
    assert (shown["state"], shown["probes"]) == ("unknown", 0)
    assert (await ask(gate.port, charge())).slug == "outcome-unknown"

    told = await desk("probe", "--note", "order-1")
    assert told.stdout == "succeeded; the key is complete, and its retries get the response\n"
    line = audited(told)
    assert {"action": "reconcile", "outcome": "resolved", "by": "operator", "verdict": "succeeded", "status": 200,
            "rule": "charges", "values": {"/id": "ch_1"}, "key_id": shown["id"]}.items() <= line.items()  # fmt: skip
    assert {"user", "host", "body_digest", "owner_token"} <= line.keys()
    retried = await ask(gate.port, charge())
    assert (retried.status, json.loads(retried.body)["id"]) == (201, "ch_1")
    assert retried.header("oncegate-status") == b"reconciled"
    complete = await desk.show("k-1")
    assert complete["reconciled"] is True
    assert complete["owner"].startswith(f"operator {line['user']} on {line['host']}")
    again = await desk("probe", "k-1", code=1)
    assert "this key is complete" in again.stderr
    assert len(api.questions) == 3
    for text in (tried, told.stdout, told.stderr, json.dumps(complete), gate.log()):
        assert SECRET not in text
    assert "k-1" not in told.stderr + gate.log()
    if store_url.startswith("postgres"):
        *_, entry = [json.loads(line) for line in (await desk.run("audit", "k-1", "--json")).stdout.splitlines()]
        evidence = json.loads(entry["evidence"])
        assert (entry["event"], evidence["verdict"], evidence["values"]) == ("resolved", "succeeded", {"/id": "ch_1"})


async def test_a_person_in_a_hurry_changes_no_rule_about_an_absence(gate, desk, api):
    """Not found counts only from `absent_after_s` on, for whoever asks. Three answers free nothing before that."""
    await lost(gate)
    api.says = 404, {}
    assert "it does not count" in (await desk("probe", "k-1", "--dry-run")).stdout
    for _ in range(3):
        told = await desk("probe", "k-1", code=1)
        assert told.stderr.splitlines()[-1] == "absent; the key stays unknown"
        assert audited(told)["outcome"] == "unchanged"
    shown = await desk.show("k-1")
    assert (shown["state"], shown["probes"], shown["last_verdict"]) == ("unknown", 3, "absent")
    assert "agreed" not in shown
    assert (await ask(gate.port, charge())).slug == "outcome-unknown"


async def test_what_says_nothing_settles_nothing(gate, desk, api, upstream):
    """Another's object, an entry that is missing, an API that is gone: each has its reason, and the exit code says
    that nothing was settled."""
    await lost(gate)
    api.says = 200, {"order_id": "order-2", "state": "paid"}
    assert "inconclusive: /order_id is not what was asked for" in (await desk("probe", "k-1", code=1)).stderr
    api.says = 200, {"order_id": "order-1", "state": "pending"}
    assert "inconclusive: no entry of the rule names this answer" in (await desk("probe", "k-1", code=1)).stderr
    document = json.loads((await desk("probe", "k-1", "--json", code=1)).stdout)
    assert (document["action"], document["outcome"], document["verdict"]) == ("reconcile", "unchanged", "inconclusive")
    await upstream.close()
    tried = (await desk("probe", "k-1", "--dry-run")).stdout
    assert "answer               none" in tried
    assert "key                  would stay unknown" in tried


async def test_keys_that_cannot_be_asked_about(gate, desk, api):
    """Under a rule without the table, a key that was never unknown, one that is not there."""
    await lost(gate, "k-2", "order-2", "/v1/refunds")
    assert 'the rule "refunds", without a [rule.reconcile]' in (await desk("probe", "k-2", code=1)).stderr
    # A value that no template takes is not kept.
    await lost(gate, "k-3", "order\u0007")
    assert "nothing can be asked: {note} has no value" in (await desk("probe", "k-3", "--dry-run", code=1)).stderr
    assert "{note} has no value; the key stays unknown" in (await desk("probe", "k-3", code=1)).stderr
    assert "there is no record" in (await desk("probe", "k-4", code=1)).stderr
    assert api.questions == []


async def test_an_api_cannot_write_on_the_terminal_or_into_the_log(gate, desk, api):
    """What it answers is escaped wherever an operator sees it, and changes no line around it."""
    await lost(gate)
    api.says = 200, {"order_id": "order-1", "state": "paid", "id": HOSTILE, "text": "x" * 5000}
    tried = (await desk("probe", "k-1", "--dry-run")).stdout
    told = await desk("probe", "k-1")
    for text in (tried, told.stdout, told.stderr):
        assert not {"\x1b", "\r", "\u202e"} & set(text)
    assert audited(told)["user"] != "mallory"
    assert len(audited(told)["values"]["/text"]) <= 200


async def test_a_request_is_explained_with_its_question(gate, desk, tmp_path):
    """`check --explain` says what would be asked if the outcome of a request were unknown, and by whose name."""
    body = tmp_path / "body.json"
    body.write_text('{"order_id": "order-1"}')
    told = await desk.check("--explain", "POST", "/v1/charges", "-H", "Idempotency-Key: k-1", "--body-file", str(body))
    assert "/v1/of/order-1" in told.stdout
    assert "Authorization" in told.stdout
    assert SECRET not in told.stdout + told.stderr


@pytest.fixture
async def indexed(valkey):
    """A store whose index of open keys is complete, as after a while."""
    async with connected(valkey.url) as store:
        for server in store.records.servers:
            await server.index.begin()
            await server.index.note_complete()
    return valkey


def asking_at_once(folder: Path, *lines: str) -> None:
    """Write rules whose questions are asked by the proxy."""
    often = "\n".join(("first_after_s = 0.1", "most_s = 0.1", *lines))
    rules = RULES.replace("first_after_s = 600\nmost_s = 600", often).replace('credentials_file = "CREDENTIALS"\n', "")
    (folder / "rules.toml").write_text(rules)


async def test_an_api_that_is_away_is_left_alone(fork, upstream, indexed, tmp_path, api):
    """It gets no more questions for a while, which a gauge says."""
    asking_at_once(tmp_path)
    gate = await fork(upstream, indexed.url, RULES_FILE="rules.toml")
    upstream.script = api.lose
    for number in range(5):
        await lost(gate, f"k-{number}", f"order-{number}")
    breaker = f'oncegate_probe_breakers_open{{upstream="{upstream.url}"}} 1.0'
    await until(lambda: breaker in gate.admin("/metrics")[1], 30)
    assert gate.metric('probes_total{rule="charges",verdict="inconclusive"}') >= 5
    assert gate.events("probe inconclusive")[0]["reason"] == "the connection broke off"


async def test_a_key_that_is_left_to_a_person(fork, upstream, indexed, tmp_path, api):
    """When its time is over, there is one line and one count. A person may still let the API settle it."""
    asking_at_once(tmp_path, "reconcile_for_s = 1")
    gate = await fork(upstream, indexed.url, RULES_FILE="rules.toml")
    api.says = 200, {"order_id": "order-1", "state": "pending"}
    await lost(gate)
    await until(lambda: gate.events("key left to a person"), 30)
    asked = len(api.questions)
    [line] = gate.events("key left to a person")
    why = "no entry of the rule names this answer"
    assert (line["rule"], line["by"], line["reason"]) == ("charges", "janitor", why)
    assert gate.metric('left_to_a_person_total{reason="time_over",rule="charges"}') == 1
    desk = Desk(indexed.url, tmp_path, RULES_FILE="rules.toml", UPSTREAM=upstream.url)
    assert (await desk.show("k-1"))["left_to_a_person"] == "time_over"
    api.says = 200, {"order_id": "order-1", "state": "paid"}
    assert "the key is complete" in (await desk("probe", "k-1")).stdout
    assert len(api.questions) == asked + 1
