"""The pages of an operator: what they show, what they change, and what they give away to whom."""

import asyncio
import html
import json
import re
from base64 import b64encode
from dataclasses import replace
from importlib.resources import files

import pytest

from oncegate.admin.pages.deciding import DecisionPages
from oncegate.admin.pages.now import replicas
from oncegate.admin.pages.signing import LASTS_S, Answer, Draft, Signer
from oncegate.admin.roles import Role
from oncegate.admin.watching import live, store_view
from oncegate.admin.watching.overview import Overview
from oncegate.messages.response_head import response_digest
from oncegate.observe.metrics import Metrics
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.observe.reconciling import Left
from oncegate.operating.decisions import RELEASE, Operator
from oncegate.operating.errors import OperatorError
from oncegate.operating.request_identity import AskedRequest, Identified, identify_request
from oncegate.operating.worklist import Seen
from oncegate.probing.plan import Plan
from oncegate.probing.templates import Template
from oncegate.reconcile.progress import begin, left, mark_name
from oncegate.rules.loading import load_rules
from oncegate.store import record_view
from oncegate.store.kept import Kept
from oncegate.store.record import ClaimRequest, ViewState, cancelled_claim
from oncegate.store.record_name import record_id
from oncegate.store.record_view import RecordView
from oncegate.store.store import Store
from oncegate.streams.cancels import CANCEL, unpack_note
from tests.admin_parts import admin_parts
from tests.operator_pages import Log, Site, site, unknown_key
from tests.parts import until
from tests.stores import (
    PATIENCE_S,
    RETENTION_MS,
    SAME,
    SCOPE,
    UNKNOWN_RETENTION_MS,
    Claim,
    answer,
    claim,
    claimed,
    connected,
    key,
    store_small,
)

DASH = "\N{EN DASH}"
DOWN = "redis://127.0.0.1:1/0"
HOSTILE = "<script>alert(1)</script>\"'&\u202e\r\n"
PAGES = "oncegate.admin.pages"
RULES = """
[[rule]]
name = "hooks"
path = "/hooks/**"
key = [["body:/id", "body:/at"]]
scope = []

[[rule]]
name = "events"
path = "/events"
key = "body:/event"
scope = []
"""

RECONCILING = """
[[rule]]
name = "charges"
path = "/charges"
note = "/order_id"

[rule.reconcile]
url = "/of/{note}"
reference = { "/order_id" = "{note}" }
succeeded = [{ status = "200", when = { "/state" = "paid" } }]
failed = [{ status = "409" }]
absent = [{ status = "404" }]
absent_after_s = 60
absent_before_s = 3600
audit = ["/id"]

[[rule]]
name = "refunds"
path = "/refunds"
"""
PLAN = Plan(origin=None, path=Template(("/of",), ()), query=None)


@pytest.fixture
async def keys(valkey):
    """A store without records, whose index has every open key."""
    async with connected(valkey.url) as store:
        await made_whole(store)
        yield store


async def made_whole(store: Store) -> None:
    for server in store.records.servers:
        await server.index.begin()
        await server.index.note_complete()


@pytest.fixture
async def desk(valkey, keys):
    """The pages of an operator on that store."""
    async with site(valkey.url) as served:
        yield served


def orders(served: Site) -> list[str]:
    return re.findall(r'class="order">([^<]*)<', served.html)


async def state_of(store: Store, number: int) -> ViewState | None:
    record = await store.records.read(key(number))
    return record and record.state


# What is unknown ...


async def test_the_oldest_key_comes_first(keys, desk):
    """The worklist says which order, how far it got, why, and what the API said. Other keys are not in it."""
    for number in range(3):
        await unknown_key(keys, number, Kept(f"order-{number}", rule="charges"), "status 502 came", 502)
        await asyncio.sleep(0.002)
    await claimed(keys, key=key(8))
    await store_small(keys, await claimed(keys, key=key(9)))
    await desk.get("/unknown")
    assert orders(desk) == ["order-0", "order-1", "order-2"]
    assert "status 502 came 502 charges" in desk.text()
    assert record_id(key(0))[:8] in desk.html
    await desk.get("/")
    assert "The oldest key waits for 0 s. Decide 3 keys" in desk.text()


async def test_a_filter_and_pages(keys, desk, monkeypatch):
    """A filter looks at the order, the reason, the id, the rule and the status. A long list has pages."""
    monkeypatch.setattr("oncegate.admin.pages.unknown.SHOWN", 2)
    for number in range(5):
        kept = Kept(f"Order-{number}", rule="charges" if number % 2 else "events")
        await unknown_key(keys, number, kept, ("lost", "status 502 came")[number == 4], 502 * (number == 4))
        await asyncio.sleep(0.002)
    for query, found in {
        "text=order-3": ["Order-3"],
        f"text={record_id(key(2))[:8]}": ["Order-2"],
        "text=502+CAME": ["Order-4"],
        "rule=charges": ["Order-1", "Order-3"],
        "status=502": ["Order-4"],
        "status=none&rule=charges": ["Order-1", "Order-3"],
        "text=nothing": [],
    }.items():
        await desk.get(f"/unknown?{query}")
        assert orders(desk) == found, query
    seen = []
    await desk.get("/unknown")
    while True:
        seen += orders(desk)
        if not (link := re.search(r'href="([^"]*)" rel="next"', desk.html)):
            break
        await desk.get(html.unescape(link[1]))
    assert seen == [f"Order-{number}" for number in range(5)]
    await desk.get("/unknown?after=nonsense")
    assert "not in the list" in desk.text()


# Decisions ...


async def test_a_key_gets_its_true_answer(keys, desk):
    """The answer is written, reviewed and stored, byte for byte. The log names who did it, without the key."""
    await unknown_key(keys, 1, Kept("order-1"))
    await desk.get("/unknown")
    await desk.post("/review", ("key", desk.values("key")[0]), ("action", "resolve"))
    assert 'name="status" value="200"' in desk.html
    written = [("status", "201"), ("headers", "Content-Type: text/plain\r\nX-A: b"), ("body", "one\r\ntwo")]
    await desk.post("/review", ("signed", desk.values("signed")[0]), *written)
    assert "HTTP/1.1 201 Created Content-Type: text/plain X-A: b one two" in desk.text()
    assert await state_of(keys, 1) is ViewState.UNKNOWN
    await desk.post("/decide", ("signed", desk.values("signed")[0]))
    assert "1 key resolved" in desk.text()
    record = await keys.records.read(key(1))
    assert record is not None
    assert record.response is not None
    assert (record.state, record.response.status) == (ViewState.COMPLETE, 201)
    assert record.response.block == b"Content-Type: text/plain\r\nX-A: b\r\n"
    assert await keys.read(record.key, record.token, 0) == [b"one\ntwo"]
    [line] = desk.log.lines
    assert {"action": "resolve", "outcome": "resolved", "user": "ana", "status": 201}.items() <= line.items()
    assert line["key_id"] == record_id(key(1))
    owner, _ = await keys.records.proxy_of(record.token)
    assert owner.startswith("operator ana on ")


async def test_many_are_released_and_one_has_changed(keys, desk):
    """A decision about many says how many, and which had changed since they were shown. Those stay as they are."""
    for number in range(4):
        await unknown_key(keys, number, Kept(f"order-{number}"))
    await desk.get("/unknown")
    chosen = desk.values("key")
    await desk.post("/review", *(("key", one) for one in chosen[:3]), ("action", "release"))
    assert "Release 3 keys" in desk.text()
    shown = [number for number in range(4) if f"order-{number} " in desk.text()]
    changed, *others = shown
    record = await keys.records.read(key(changed))
    assert record is not None
    await keys.release_by_operator(record.key, record_view.Deciding(record.token), keys.token(), record.fence)
    await claimed(keys, key=key(changed))
    await desk.post("/decide", ("signed", desk.values("signed")[0]))
    assert "2 keys released" in desk.text()
    assert "1 changed meanwhile" in desk.text()
    assert "another request owns the key by now" in desk.text()
    states = {number: await state_of(keys, number) for number in range(4)}
    assert states == {
        **dict.fromkeys(range(4), ViewState.UNKNOWN),
        **dict.fromkeys(others, ViewState.RELEASED),
        changed: ViewState.IN_FLIGHT,
    }
    assert sorted(line["outcome"] for line in desk.log.lines) == ["changed", "released", "released"]
    # The same form again finds nothing as it was.
    await desk.post("/decide", ("signed", desk.values("signed")[0] if desk.values("signed") else "x"))
    assert "too old" in desk.text()


async def test_a_request_in_flight_is_cancelled(keys, desk, valkey):
    """Its owner is asked to end it, in the name of who did, and the page waits until it has. A viewer has no button."""
    owner = await claimed(keys, key=key(1))
    page = f"/key/{record_id(owner.key)}"
    async with site(valkey.url, Role.VIEW) as viewed:
        assert "in flight" in await viewed.get(page)
        assert "Cancel it" not in viewed.html
        await viewed.post("/decide", ("signed", "x"))
        assert viewed.status == 404
    assert "Cancel it" in await desk.get(page)
    await desk.post("/review", ("key", desk.values("key")[0]), ("action", "cancel"))
    assert "Cancel a key" in desk.text()
    assert "No retry executes again" in desk.text()
    deciding = asyncio.ensure_future(desk.post("/decide", ("signed", desk.values("signed")[0])))
    notes: list[bytes] = []
    while not notes:
        notes = await keys.collect(keys.token_prefix)
    note = unpack_note(notes[0])
    assert note is not None
    assert note[:3] == (CANCEL, owner.key, owner.token)
    assert note.reason.startswith("operator ana on ")
    await keys.mark_unknown(cancelled_claim(owner), f"cancelled: {note.reason}", PATIENCE_S)
    await deciding
    assert "1 key cancelled" in desk.text()
    assert "no retry with this key executes" in desk.text()
    [line] = desk.log.lines
    assert {
        "action": "cancel",
        "outcome": "cancelled",
        "user": "ana",
        "state_before": "in_flight",
    }.items() <= line.items()
    # What has ended has no button.
    assert "Cancel it" not in await desk.get(page)


async def test_an_owner_that_came_back_is_not_decided_about(keys, desk):
    """A key that was shown as unknown because its owner was silent, and is in flight again, has changed."""
    request = ClaimRequest(key(1), SCOPE, SAME, b"hold", 20, RETENTION_MS, UNKNOWN_RETENTION_MS)
    owner = await keys.claim(request)
    await asyncio.sleep(0.03)
    await desk.get("/unknown")
    [seen] = desk.values("key")
    assert "unknown, owner silent" in desk.text()
    await keys.renew(replace(owner, lease_ms=60_000))
    await desk.post("/review", ("key", seen), ("action", "release"))
    assert "1 changed meanwhile" in desk.text()
    assert "it is in_flight by now" in desk.text()
    assert await state_of(keys, 1) is ViewState.IN_FLIGHT


async def test_a_decision_that_the_end_cuts_off(keys, valkey):
    """If the process ends amid a decision about many, each key that was decided has its line in the log."""
    log = Log()
    parts = admin_parts({"store_url": valkey.url}, log=log)
    deciding = DecisionPages(parts, Overview(parts))
    seen = [Seen.of(await unknown_key(keys, number, Kept())) for number in range(8 * 150)]
    # Wherever it is cut off: while it reads a key, and while the store carries out what was decided.
    for number in range(8):
        draft = Draft(RELEASE, tuple(seen[150 * number : 150 * (number + 1)]))
        written = len(log.lines)
        task = asyncio.create_task(deciding.carry_out(draft, None, Operator("ana", "here")))
        await until(lambda count=written: len(log.lines) > count + 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    records = [record async for record in keys.records.scan()]
    released = {record_id(record.key) for record in records if record.state is ViewState.RELEASED}
    assert 8 * 3 < len(released) < len(seen)
    assert released <= {line["key_id"] for line in log.lines}
    assert {line["outcome"] for line in log.lines} == {"released", "unconfirmed"}


async def test_all_that_match_are_counted_first(keys, desk, monkeypatch):
    """A decision over a filter reaches the keys that match, and says if there are more than one decision takes."""
    monkeypatch.setattr("oncegate.admin.pages.deciding.MOST", 3)
    for number in range(5):
        await unknown_key(keys, number, Kept(rule="charges" if number else "events"))
    await desk.post("/review", ("rule", "charges"), ("action", "release-all"))
    assert "Release 3 keys" in desk.text()
    assert "More keys match" in desk.text()
    await desk.post("/decide", ("signed", desk.values("signed")[0]))
    states = [await state_of(keys, number) for number in range(5)]
    assert states.count(ViewState.RELEASED) == 3
    assert states[0] is ViewState.UNKNOWN


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"status": "99"}, "three digits"),
        ({"status": "2000"}, "three digits"),
        ({"status": "204", "body": "x"}, "has no body"),
        ({"status": "200", "headers": "no colon"}, "no field"),
        ({"status": "200", "headers": "Content-Length: 1"}, "framing"),
        ({"status": "200", "body": "é", "base64": "yes"}, "base64"),
        ({"status": "200", "body": "x" * 262_145}, "at most"),
    ],
)
async def test_an_answer_that_makes_no_sense(keys, desk, written, said):
    """It is refused with a reason, the form keeps what was written, and nothing is changed."""
    await unknown_key(keys, 1, Kept())
    await desk.get("/unknown")
    await desk.post("/review", ("key", desk.values("key")[0]), ("action", "resolve"))
    await desk.post("/review", ("signed", desk.values("signed")[0]), *written.items())
    assert said in desk.text()
    assert f'name="status" value="{written["status"]}"' in desk.html
    assert await state_of(keys, 1) is ViewState.UNKNOWN


async def test_a_body_in_base64(keys, desk):
    """Bytes that are no text can be given, too."""
    await unknown_key(keys, 1, Kept())
    await desk.get("/unknown")
    await desk.post("/review", ("key", desk.values("key")[0]), ("action", "resolve"))
    body = b64encode(b"\x00\xff\r\n").decode()
    await desk.post("/review", ("signed", desk.values("signed")[0]), ("status", "200"), ("body", body), ("base64", "y"))
    assert "bytes that are no text" in desk.text()
    await desk.post("/decide", ("signed", desk.values("signed")[0]))
    record = await keys.records.read(key(1))
    assert record is not None
    assert await keys.read(record.key, record.token, 0) == [b"\x00\xff\r\n"]


@pytest.mark.parametrize(
    "fields",
    [
        [("action", "release")],
        [("action", "drop"), ("key", "x")],
        [("action", "release"), ("key", "x")],
        [("action", "release"), ("key", f"{'A' * 32}.zz.unknown")],
        [("signed", "x")],
        [],
    ],
)
async def test_a_form_that_no_page_has(desk, fields):
    """It is refused, also where it is signed by nobody."""
    for path in ("/review", "/decide"):
        await desk.post(path, *fields)
        assert desk.status == 400
    assert desk.log.lines == []


def test_a_review_is_for_whom_it_was_shown():
    """A draft is that of one visitor and of one process, for a quarter of an hour, and not to be changed."""
    signer, draft = Signer(), Draft("resolve", (Seen(b"k" * 24, b"t" * 16, "unknown"),), Answer("200", "A: b", "c"))
    signed = signer.sign(draft, "ana")
    assert signer.read(signed, "ana") == draft
    # Its last character has bits that count for nothing, the one before it has none.
    changed = f"{signed[:-2]}{'B' if signed[-2] == 'A' else 'A'}{signed[-1]}"
    for other, text, whose in ((signer, signed, "bob"), (Signer(), signed, "ana"), (signer, changed, "ana")):
        with pytest.raises(OperatorError, match="too old"):
            other.read(text, whose)


def test_a_review_is_read_by_each_replica_of_one_secret():
    """Behind one address the decision may meet another replica than the review. Other secrets read nothing."""
    signed = Signer("s" * 32).sign(draft := Draft("release", ()), "ana")
    assert Signer("s" * 32).read(signed, "ana") == draft
    for other in (Signer("t" * 32), Signer()):
        with pytest.raises(OperatorError, match="too old"):
            other.read(signed, "ana")


def test_a_review_ends(monkeypatch):
    """A form that was left open for long is worth nothing."""
    monkeypatch.setattr("oncegate.admin.pages.signing.LASTS_S", -1)
    signer = Signer()
    signed = signer.sign(Draft("release", ()), "ana")
    with pytest.raises(OperatorError, match="too old"):
        signer.read(signed, "ana")
    assert LASTS_S == 900


# One key ...


async def test_whatever_somebody_has_leads_to_the_key(valkey, keys, desk):
    """A key, an id, its beginning, an order, or a whole request lead to one page. None of it is shown again."""
    settings = admin_parts({"store_url": valkey.url}).settings
    head = ["Idempotency-Key: s3cret-key", "Authorization: Bearer s3cret-token"]
    pasted = "POST /v1/charges?s3cret=1 HTTP/1.1\r\n" + "\r\n".join(head) + "\r\n\r\n{}"
    for words in ([], head[1:]):
        asked = AskedRequest("POST", "/v1/charges", [head[0], *words], b"{}")
        found = identify_request(settings, load_rules(settings), asked)
        assert isinstance(found, Identified)
        owner = await claimed_at(keys, found.identity.key, Kept(f"order-{len(words)}"))
        place = f"/key/{record_id(owner)}"
        texts = [
            record_id(owner),
            record_id(owner)[:9],
            f"order-{len(words)}",
            *([pasted] if words else ["s3cret-key"]),
        ]
        for text in texts:
            await desk.post("/key", ("pasted", text))
            assert (desk.status, desk.url) == (200, place), text
            assert "s3cret" not in desk.html
    # A part of an order leads to the list: it may be another order, of which nothing is open.
    await desk.post("/key", ("pasted", "order"))
    assert desk.url == "/unknown?text=order"
    await desk.post("/key", ("pasted", "rder-1"))
    assert desk.url == "/unknown?text=rder-1"
    await desk.post("/key", ("pasted", "s3cret-key"), ("credential", "Authorization: Bearer s3cret-token"))
    assert desk.url == place
    for text in ("s3cret-nothing", "POST /\nBearer s3cret", "GET s3cret\n\n", "POST /a\nIdempotency-Key: s3cret-9", ""):
        await desk.post("/key", ("pasted", text))
        assert desk.status == 404, text
        assert 'role="alert"' in desk.html
        assert "s3cret" not in desk.html
    assert "s3cret" not in repr(desk.log.lines)


async def test_a_finished_key_is_not_said_to_be_missing(keys, desk):
    """An order finds open keys alone. Whoever looks for a finished one is told so, and what does find it."""
    owner = await claim(keys, key(1), kept=Kept("order-1"))
    assert isinstance(owner, Claim)
    await store_small(keys, owner)
    for text in ("order-1", record_id(owner.key)[:9]):
        await desk.post("/key", ("pasted", text))
        assert desk.status == 404
        assert "There is no record" not in desk.text()
        assert "find only keys that are open" in desk.text()
    await desk.post("/key", ("pasted", record_id(owner.key)))
    assert desk.status == 200


async def test_a_key_that_a_rule_makes(valkey, keys, tmp_path):
    """The value that a rule reads leads to its key, without a word about the rule, and under the rule that is named."""
    (tmp_path / "rules.toml").write_text(RULES)
    async with site(valkey.url, rules_file=tmp_path / "rules.toml") as desk:
        settings = admin_parts({"store_url": valkey.url, "rules_file": tmp_path / "rules.toml"}).settings
        asked = AskedRequest("POST", "/hooks/a", ["Content-Type: application/json"], b'{"id": "s3cret-9", "at": "7"}')
        found = identify_request(settings, load_rules(settings), asked)
        assert isinstance(found, Identified)
        await claimed_at(keys, found.identity.key, Kept())
        for fields in (
            [("pasted", "s3cret-9\r\n7"), ("rule", "hooks")],
            [("pasted", "POST /hooks/a\n\n" + '{"id": "s3cret-9", "at": "7"}')],
        ):
            await desk.post("/key", *fields)
            assert desk.url == f"/key/{record_id(found.identity.key)}", desk.text()
        asked = AskedRequest("POST", "/events", ["Content-Type: application/json"], b'{"event": "s3cret-evt"}')
        found = identify_request(settings, load_rules(settings), asked)
        assert isinstance(found, Identified)
        await claimed_at(keys, found.identity.key, Kept())
        await desk.post("/key", ("pasted", "s3cret-evt"))
        assert desk.url == f"/key/{record_id(found.identity.key)}"
        for fields in ([("pasted", "s3cret-9\r\n8"), ("rule", "hooks")], [("pasted", "s3cret-9"), ("rule", "none")]):
            await desk.post("/key", *fields)
            assert (desk.status, "s3cret" in desk.html) == (404, False)


async def claimed_at(store: Store, digest: bytes, kept: Kept) -> bytes:
    owner = await claim(store, digest, kept=kept)
    assert isinstance(owner, Claim)
    await store.mark_unknown(owner, "lost", PATIENCE_S)
    return digest


async def test_a_stored_response_and_who_sees_what(valkey, keys, desk):
    """The head is for both roles, but for values that are secrets. The body is for the role that may change keys."""
    owner = await claimed(keys, key=key(1))
    block = b"X: 1\r\nSet-Cookie: session=s3cret\r\n"
    body = b'{"card": "<b>s3cret-body</b>"}'
    digest = response_digest(201, b"Made", block)
    digest.update(body)
    await keys.store(owner, replace(answer(body), block=block, digest=digest.digest()), body, PATIENCE_S)
    path = f"/key/{record_id(key(1))}"
    await desk.get(path)
    assert "HTTP/1.1 201 Made X: 1 Set-Cookie: session=s3cret" in desk.text()
    assert html.escape(body.decode()) in desk.html.replace("&#34;", "&quot;")
    assert "Give it its answer" not in desk.html
    assert (await desk.get(f"{path}/body")).encode() == body
    assert [line["action"] for line in desk.log.lines] == ["read_body"]
    async with site(valkey.url, Role.VIEW) as visitor:
        await visitor.get(path)
        assert "HTTP/1.1 201 Made X: 1 Set-Cookie: (for the role operate)" in visitor.text()
        assert "s3cret" not in visitor.html
        await visitor.get(f"{path}/body")
        assert visitor.status == 404


async def test_a_key_that_is_not_there(desk):
    """The page says so, whatever stands in its place."""
    for name in (record_id(key(1)), "x", "%3Cscript%3E"):
        await desk.get(f"/key/{name}")
        assert desk.status == 404
        assert "There is no record of this key" in desk.html
        assert "<script>" not in desk.html


async def test_the_audit_trail_is_beside_the_record(database):
    """With a store in PostgreSQL, the page has the key's entries, and those of the operator name them."""
    async with connected(database.url) as store, site(database.url) as desk:
        await unknown_key(store, 1, Kept("order-1"))
        await desk.get("/unknown")
        await desk.post("/review", ("key", desk.values("key")[0]), ("action", "release"))
        await desk.post("/decide", ("signed", desk.values("signed")[0]))
        await desk.get(f"/key/{record_id(key(1))}")
        assert re.search(r"claimed .* unknown .* freed operator ana on ", desk.text())


async def test_a_decision_in_every_store(stored):
    """The worklist, a decision and the page of the key are the same in each kind of store and layout of a record."""
    async with connected(stored.url) as store, site(stored.url) as desk:
        await unknown_key(store, 1, Kept("order-1", rule="charges"), "status 502 came", 502)
        await desk.get("/unknown")
        assert (orders(desk), "status 502 came 502 charges" in desk.text()) == (["order-1"], True)
        await desk.post("/review", ("key", desk.values("key")[0]), ("action", "resolve"))
        await desk.post("/review", ("signed", desk.values("signed")[0]), ("status", "201"), ("body", "whole body"))
        await desk.post("/decide", ("signed", desk.values("signed")[0]))
        assert "1 key resolved" in desk.text()
        await desk.get(f"/key/{record_id(key(1))}")
        assert re.search("complete order-1 .* HTTP/1.1 201 Created .* whole body", desk.text())


# What was saved ...


async def test_money_that_was_saved(valkey, tmp_path):
    """Where a rule has prices, the page says what the tokens of its replays would have cost."""
    prices = "token_prices = { input = 2.5, output = 10 }"
    (tmp_path / "rules.toml").write_text(f"[[rule]]\nname = 'chat'\npath = '/v1/**'\npreset = 'openai'\n{prices}\n")
    metrics = Metrics("0", {})
    for rule in ("chat", "other"):
        tokens = {"input": 2_000_000, "cached": 0, "cache_write": 0, "output": 100_000}
        metrics.observe(RequestReport(Outcome.REPLAYED, 200, "POST", key=b"k", rule=rule, tokens=tokens), 0.1)
    async with site(valkey.url, metrics=metrics, rules_file=tmp_path / "rules.toml") as desk:
        await desk.get("/")
        assert re.search("LLM tokens 4.200.000 4.000.000 input, 200.000 output money 6.00 ", desk.text())


# Rules ...


async def test_a_request_is_explained(desk):
    """The form says what the rules do with a request, without what may be a secret in it."""
    head = "Idempotency-Key: s3cret-key\r\nAuthorization: Bearer s3cret-token"
    await desk.post(
        "/rules", ("method", "post"), ("url", "/v1/charges?t=s3cret"), ("headers", head), ("body", "s3cret")
    )
    assert "executed if the key is free" in desk.text()
    assert "POST /v1/charges?…" in desk.text()
    assert "s3cret" not in desk.html
    for fields in ([("url", "s3cret")], [("url", "/"), ("headers", "Bearer s3cret")], [("url", "")]):
        await desk.post("/rules", ("method", "POST"), *fields)
        assert desk.status == 400
        assert 'role="alert"' in desk.html
        assert "s3cret" not in desk.html


async def test_rules_with_a_mistake(valkey, tmp_path):
    """A file that has a mistake by now is named, and the page is there all the same."""
    (tmp_path / "rules.toml").write_text("[[rule]]\nname = 'a'\npath = '/a'\n")
    async with site(valkey.url, rules_file=tmp_path / "rules.toml") as desk:
        await desk.get("/rules")
        assert "POST,PUT" not in desk.html
        assert '<th scope="row">a</th>' in desk.html
        (tmp_path / "rules.toml").write_text("[[rule]]\n")
        await desk.get("/rules")
        assert (desk.status, 'role="alert"' in desk.html) == (200, True)
        await desk.get("/unknown")
        assert desk.status == 200


# Keys about which the API is asked ...


class Asked:
    """An API that is asked about orders, and answers by `says`: the document of each, None for none."""

    def __init__(self) -> None:
        self.says: dict[str, dict[str, str]] = {}
        self.questions = 0

    async def script(self, _server, _reader, writer, received) -> None:
        self.questions += 1
        found = self.says.get(received.line.split(b" ")[1].decode().rpartition("/")[2])
        body = json.dumps(found or {}).encode()
        head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (200 if found else 404, len(body)) + body)
        await writer.drain()


@pytest.fixture
def asked(upstream) -> Asked:
    asked = Asked()
    upstream.script = asked.script
    return asked


@pytest.fixture
def reconciling(upstream, tmp_path):
    """The settings of pages whose rule asks the API."""
    (tmp_path / "rules.toml").write_text(RECONCILING)
    return {"upstream": upstream.url, "rules_file": tmp_path / "rules.toml"}


async def order(store: Store, number: int, note: str = "") -> RecordView:
    note = note or f"order-{number}"
    return await unknown_key(store, number, Kept(note, rule="charges", values=(("note", note),)))


def probes_of(served: Site) -> list[str]:
    """Return the column of the worklist that says what is known of each key, and what comes next."""
    return [re.sub(r" \d+ \w+$", " …", text) for text in re.findall(r'class="probe">([^<]*)<', served.html)]


async def test_the_worklist_says_what_the_api_said_and_when_it_is_asked_next(keys, valkey, reconciling):
    """In one question for all keys that it shows. A key of another rule has nothing there."""
    for number in range(30):
        record = await order(keys, number)
        if number < 2:
            now = replace(begin(record, PLAN), asked=4, verdict="inconclusive", why="no answer", due_ms=0)
            now = left(now, Left.TIME_OVER.label) if number else now
            assert await keys.marks.swap(mark_name(record.key), b"", now.pack(), 60_000)
        await asyncio.sleep(0.002)
    await unknown_key(keys, 40, Kept("order-40", rule="refunds"))
    async with site(valkey.url, **reconciling) as desk:
        await desk.get("/unknown")
        with valkey.client() as client:
            client.config_resetstat()
            await desk.get("/unknown")
            stats = client.info("commandstats")
        said = ["inconclusive, due", "inconclusive, left to you", *["not asked yet, next in …"] * 28, DASH]
        assert probes_of(desk) == said
        # Beside what each of its 31 records costs, one command for each mark, which leave together.
        assert stats["cmdstat_get"]["calls"] == 31 + 30
        await desk.get(f"/key/{record_id(key(1))}")
        assert "the API was asked 4 times, and said last: inconclusive (no answer) left to a person: time_over" in (
            desk.text()
        )
        await desk.get(f"/key/{record_id(key(40))}")
        assert "Ask the API now" not in desk.html
    async with site(valkey.url) as desk:
        await desk.get("/unknown")
        assert probes_of(desk) == []


async def test_an_operator_asks_the_api_in_a_browser(store, reconciling, asked):
    """The button takes the key's next step. An answer that is clear settles the key, any other one changes nothing.
    Each has its line with the operator's name, and is counted."""
    asked.says["order-1"] = {"order_id": "order-1", "state": "paid", "id": "ch_9"}
    async with connected(store.url) as keys, site(store.url, **reconciling) as desk:
        for number in (1, 2):
            await order(keys, number)
        page = f"/key/{record_id(key(1))}"
        await desk.get(page)
        assert f'action="{page}/probe"' in desk.html
        await desk.post(f"{page}/probe")
        assert "The API says: succeeded; the key is complete" in desk.text()
        assert "ch_9" in desk.text()
        [line] = desk.log.lines
        assert {"event": "audit", "action": "reconcile", "outcome": "resolved", "user": "ana", "by": "operator",
                "values": {"/id": "ch_9"}}.items() <= line.items()  # fmt: skip
        assert await state_of(keys, 1) is ViewState.COMPLETE
        await desk.get(page)
        # A store without a trail has the log alone.
        assert ('"verdict": "succeeded"' in html.unescape(desk.html)) is store.url.startswith("postgres")
        await desk.post(f"{page}/probe")
        assert "this key is complete" in desk.text()
        await desk.post(f"/key/{record_id(key(2))}/probe")
        assert "The API says: absent; the key stays unknown" in desk.text()
        assert [line["outcome"] for line in desk.log.lines] == ["resolved", "unchanged"]
        assert await state_of(keys, 2) is ViewState.UNKNOWN
        counts = desk.parts.reconciling
        assert counts.reconciled.by_value["operator"] == 1
        assert counts.probes.of("charges") == {"succeeded": 1, "failed": 0, "absent": 1, "inconclusive": 0}
        # A person's own decision is one, too.
        await desk.get("/unknown")
        await desk.post("/review", ("key", desk.values("key")[0]), ("action", "release"))
        await desk.post("/decide", ("signed", desk.values("signed")[0]))
        assert counts.reconciled.by_value["operator"] == 2
        await desk.post("/key/no-id/probe")
        assert desk.status == 404
        # Not found there would say nothing of a request that went elsewhere.
        await unknown_key(keys, 3, Kept("", rule="charges", upstream="elsewhere", values=(("note", "order-1"),)))
        await desk.post(f"/key/{record_id(key(3))}/probe")
        assert "it went to another upstream than its rule has now" in desk.text()
    assert asked.questions == 2


async def test_who_only_reads_asks_nothing(keys, valkey, reconciling, asked):
    """The button and its route are for the role operate."""
    await order(keys, 1)
    async with site(valkey.url, Role.VIEW, **reconciling) as desk:
        await desk.get(f"/key/{record_id(key(1))}")
        assert "next probe" in desk.text()
        assert "Ask the API now" not in desk.html
        await desk.post(f"/key/{record_id(key(1))}/probe")
        assert desk.status in (404, 405)
    assert asked.questions == 0


async def test_what_an_api_says_is_no_part_of_the_page(keys, valkey, reconciling, asked):
    """Its values, and the note that they have to repeat, are shown as they are."""
    await order(keys, 1, "<i>")
    asked.says["%3Ci%3E"] = {"order_id": "<i>", "state": "paid", "id": HOSTILE}
    mark = json.dumps([(await order(keys, 2)).token.hex(), 0, 1, 10**30, 0, 1, 0, HOSTILE, HOSTILE, HOSTILE]).encode()
    await keys.marks.swap(mark_name(key(2)), b"", mark, 60_000)
    async with site(valkey.url, **reconciling) as desk:
        pages = [await desk.get("/unknown"), await desk.get(f"/key/{record_id(key(2))}")]
        pages += [await desk.post(f"/key/{record_id(key(1))}/probe"), await desk.get(f"/key/{record_id(key(1))}")]
        assert desk.status == 200
        for text in pages:
            assert len(re.findall("<script", text)) == 1, text
            assert "<i>" not in text
            assert not {"\u202e", "\r"} & set(text)
        assert "\\r" in desk.log.lines[0]["values"]["/id"]


# What comes from elsewhere ...


async def test_what_comes_from_elsewhere_is_escaped(keys, desk):
    """Notes, rules, reasons, keys, paths, heads and bodies are shown as they are, and are never part of the page."""
    await unknown_key(keys, 1, Kept(HOSTILE, rule=HOSTILE, request_id=b"<i>"), HOSTILE)
    owner = await claimed(keys, key=key(2))
    body, block = HOSTILE.encode(), b"X: <script>alert(2)</script>\r\n"
    digest = response_digest(201, b"<script>", block)
    digest.update(body)
    hostile = replace(answer(body), reason=b"<script>", block=block, digest=digest.digest())
    await keys.store(owner, hostile, body, PATIENCE_S)
    await desk.get("/unknown")
    seen = ("key", desk.values("key")[0])
    pages = [desk.html, await desk.get("/")]
    pages += [await desk.get(f"/key/{record_id(key(number))}") for number in (1, 2)]
    pages += [await desk.get("/unknown?text=%3Cscript%3E&rule=%3Cscript%3E&status=%22%3E")]
    pages += [await desk.post("/review", seen, ("action", "resolve"))]
    signed = ("signed", desk.values("signed")[0])
    pages += [await desk.post("/review", signed, ("status", '"><script>'), ("headers", HOSTILE), ("body", HOSTILE))]
    pages += [await desk.post("/review", signed, ("status", "200"), ("headers", "X: <script>"), ("body", HOSTILE))]
    pages += [await desk.post("/decide", ("signed", desk.values("signed")[0]))]
    pages += [await desk.post("/rules", ("method", "<script>"), ("url", "/<script>"), ("headers", "<script>: a"))]
    pages += [await desk.post("/key", ("pasted", HOSTILE))]
    for text in pages:
        assert len(re.findall("<script", text)) == 1, text
        assert "<i>" not in text
        assert not re.search(r"<script(?! src=\"/static/)|<style| style=|\son\w+=", text), text


def test_templates_run_nothing_and_weigh_little():
    """No template has a script, a style or a value that is not escaped; all that a page loads is 60 kB at most."""
    folder = files(PAGES)
    templates = {one.name: one.read_text() for one in (folder / "templates").iterdir()}
    for name, text in templates.items():
        assert not re.search(r"<script(?! src=)|<style| style=|\son\w+=|\|\s*safe|autoescape", text), name
    loaded = sum(len(one.read_bytes()) for one in (folder / "static").iterdir())
    assert loaded + max(map(len, templates.values())) < 60_000


# Watching ...


async def test_many_watchers_ask_the_store_once(keys, desk, monkeypatch):
    """However many look, the store is asked once a second at most; once nobody looks, its connection is closed."""
    monkeypatch.setattr(store_view, "IDLE_S", 0.05)
    await asyncio.gather(*(desk.get("/") for _ in range(20)))
    overview = desk.pages.overview
    assert overview.store_questions == 1
    await unknown_key(keys, 1, Kept())
    await until(lambda: not overview.store.is_open)
    overview.forget()
    await desk.get("/")
    assert overview.store_questions == 2
    assert "Decide 1 key" in desk.text()


async def test_a_page_costs_the_same_however_many_keys_are_in_flight(keys, valkey):
    """The first pages ask the index: so many commands, and so many records, whether few or many keys are open."""
    for number in range(60):
        await unknown_key(keys, number, Kept(f"order-{number}", rule="charges"))
    costs = []
    with valkey.client() as client:
        for most in (200, 2000):
            await asyncio.gather(*(claim(keys, key(number)) for number in range(most // 10, most)))
            async with site(valkey.url) as desk:
                client.config_resetstat()
                for path in ("/", "/unknown"):
                    await desk.get(path)
                    assert desk.status == 200
                assert len(orders(desk)) == 50
                stats = client.info("commandstats")
            costs.append({name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items()})
    few, many = costs
    assert few == many
    assert "scan" not in many
    assert many["hmget"] == 50, "the records that are shown"
    assert sum(many.values()) <= 250, many


async def test_a_stream_says_what_changes(keys, valkey, monkeypatch):
    """A stream sends the parts of a page that changed. It ends by itself, and at once when the listener ends."""
    monkeypatch.setattr("oncegate.admin.watching.overview.LOOK_S", 0.02)
    monkeypatch.setattr(live, "LOOK_S", 0.02)
    async with site(valkey.url) as desk:
        async with desk.stream("/events?part=now") as events:
            first = await anext(events)
            assert "Nothing waits for you" in first["part-now"]
            await unknown_key(keys, 1, Kept())
            async with asyncio.timeout(5):
                while "part-badge" not in (changed := await anext(events)):
                    pass
            assert ">1<" in changed["part-badge"]
        monkeypatch.setattr(live, "STREAM_S", 0.1)
        async with asyncio.timeout(5), desk.stream("/events") as events:
            assert all("part-now" not in one for one in [one async for one in events])
        monkeypatch.setattr(live, "STREAM_S", 30.0)
        watching = asyncio.create_task(desk.get("/events"))
        await until(lambda: desk.pages.streams.count == 1)
        await desk.pages.end_streams()
        async with asyncio.timeout(5):
            await watching
    monkeypatch.setattr(live, "MOST_STREAMS", 0)
    async with site(valkey.url) as desk:
        await desk.get("/events")
        assert desk.status == 503


async def test_an_index_that_is_not_whole(valkey):
    """While keys may be missing in the index, the pages say so, and go on."""
    async with connected(valkey.url) as store, site(valkey.url) as desk:
        for path in ("/", "/unknown"):
            await desk.get(path)
            assert "Older keys may be missing here" in desk.text()
        await made_whole(store)
        desk.pages.overview.forget()
        await desk.get("/")
        assert "Older keys" not in desk.text()
        assert "Nothing waits for you" in desk.text()


async def test_a_store_that_is_down(monkeypatch):
    """Each page says that the store does not answer, and shows what it has."""
    monkeypatch.setattr(store_view, "CONNECT_S", 0.05)
    async with site(DOWN) as desk:
        await desk.get("/")
        # No store has said that nothing is unknown.
        assert "unknown, to decide not known" in desk.text()
        assert "gave no numbers yet" in desk.text()
        for path in ("/", "/unknown", f"/key/{record_id(key(1))}", "/rules"):
            await desk.get(path)
            assert "not reachable" in desk.text() or path == "/rules", path
        await desk.post("/key", ("pasted", "a"))
        assert "not reachable" in desk.text()
        await desk.post("/review", ("action", "release-all"))
        assert "not reachable" in desk.text()


async def test_a_store_that_does_not_answer(own_valkey, monkeypatch):
    """A page does not wait for a store that hangs; what it showed before is still there."""
    monkeypatch.setattr(store_view, "ANSWER_S", 0.2)
    async with connected(own_valkey.url) as store, site(own_valkey.url) as desk:
        await unknown_key(store, 1, Kept())
        await desk.get("/")
        own_valkey.pause()
        desk.pages.overview.forget()
        async with asyncio.timeout(5):
            await desk.get("/")
        own_valkey.resume()
    assert "did not answer within" in desk.text()
    assert ">1<" in desk.html
    assert "1 key to decide" in desk.text()


def test_replicas_are_named_by_their_host():
    """A host has a replica for each process; of very many not each is named."""
    assert replicas(["b pid 2", "a pid 9", "b pid 1"]) == "2: a (1 worker), b (2 workers)"
    many = replicas([f"h{number:02} pid 1" for number in range(40)])
    assert (many.startswith("40: h00 (1 worker), "), many.endswith(", h11 (1 worker), and 28 more")) == (True, True)
