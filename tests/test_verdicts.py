"""What is asked about a key, what an answer says of it, and what its duplicates get."""

import json
from hashlib import sha256

import pytest

from oncegate.decision import Verdict
from oncegate.keys.documents import parse_document
from oncegate.keys.notes import NotedBody, parse_note
from oncegate.probing.described import described_evidence, described_question, described_rule
from oncegate.probing.kept_values import read_values
from oncegate.probing.plan import CannotAsk, Plan, for_rule, question
from oncegate.probing.table import parse_table
from oncegate.probing.templates import Unfillable
from oncegate.probing.verdicts import MAX_ANSWER_BYTES, ProbeAnswer, answered, conclude, no_answer, written
from oncegate.settings.addresses import Origin

API = Origin("https", "api.test", 443, "/base")
JSON = [(b"Content-Type", b"application/json; charset=utf-8")]
S, F, A, I = Verdict.SUCCEEDED, Verdict.FAILED, Verdict.ABSENT, Verdict.INCONCLUSIVE  # noqa: E741

SEARCH = {
    "url": "/charges/search?reference={key}",
    "keep": ["key"],
    "reference": {"/data/0/reference": "{key}"},
    "succeeded": [{"status": "200", "when": {"/data/0/status": ["paid", "settled"]}}],
    "failed": [{"status": "200", "when": {"/data/0/status": "declined"}}],
    "absent": [{"status": "404", "when": {"/code": "resource_missing"}}, {"status": "200", "empty": "/data"}],
    "absent_after_s": 1,
    "absent_before_s": 60,
    "audit": ["/data/0/id", "/data/0/amount"],
    "answers": {"failed": {"status": 402, "body": '{{"declined": "{answer:/data/0/id}", "order": "{key}"}}'}},
}


def plan_of(**changes: object) -> Plan:
    table = {name: value for name, value in {**SEARCH, **changes}.items() if value is not None}
    return for_rule(parse_table(table), API, "", parse_note("/order"))


def answer(status: int, document: object = None, *fields: tuple[bytes, bytes]) -> ProbeAnswer:
    return ProbeAnswer(status, [*JSON, *fields], b"" if document is None else json.dumps(document).encode())


def found(status: str, reference: str = "k1") -> ProbeAnswer:
    return answer(200, {"data": [{"reference": reference, "status": status, "id": "ch_1", "amount": 12}]})


@pytest.mark.parametrize(
    ("given", "verdict", "why"),
    [
        (found("paid"), S, ""),
        (found("settled"), S, ""),
        (found("declined"), F, ""),
        (found("pending"), I, "no entry of the rule names this answer"),
        (found("paid", "k2"), I, "/data/0/reference is not what was asked for"),
        (found("declined", "k2"), I, "/data/0/reference is not what was asked for"),
        (answer(200, {"data": [{"status": "paid"}]}), I, "/data/0/reference is not what was asked for"),
        (answer(200, {"data": [{"reference": "k1", "status": "paid"}] * 2}), I, "more than one object"),
        (answer(200, {"data": []}), A, ""),
        (answer(200, {"data": None}), A, ""),
        (answer(200, {"data": {}}), A, ""),
        (answer(200, {}), I, "no entry"),
        (answer(200, {"data": ""}), I, "no entry"),
        (answer(404, {"code": "resource_missing"}), A, ""),
        (answer(404, {"code": "no_route"}), I, "no entry"),
        (answer(404), I, "no entry"),
        (answer(404, {"code": "resource_missing"}, (b"Age", b"7")), I, "it comes from a cache"),
        (answer(404, {"code": "resource_missing"}, (b"Age", b"0")), A, ""),
        (ProbeAnswer(404, [], b'{"code": "resource_missing"}'), I, "no JSON"),
        (ProbeAnswer(404, [(b"content-type", b"text/html")], b"<h1>Not found</h1>"), I, "no JSON"),
        (ProbeAnswer(404, [(b"content-type", b"application/problem+json")], b'{"code":"resource_missing"}'), A, ""),
        (ProbeAnswer(200, JSON, b'{"data": ['), I, "no JSON"),
        (ProbeAnswer(200, JSON, b"\xff"), I, "no JSON"),
        (ProbeAnswer(200, JSON, b'{"data": NaN}'), I, "no JSON"),
        (ProbeAnswer(200, JSON, b"[" * 30_000), I, "no JSON"),
        (ProbeAnswer(200, JSON, b'{"data":[{"reference":"k1","status":"paid","status":"declined"}]}'), I, "no entry"),
        (ProbeAnswer(200, [*JSON, (b"Content-Encoding", b"gzip")], b"\x1f\x8b"), I, "the body is encoded"),
        (ProbeAnswer(200, JSON, b" " * (MAX_ANSWER_BYTES + 1)), I, "the body is over 65536 bytes"),
        *[(answer(status, {"code": "resource_missing"}), I, f"status {status} says nothing of the operation")
          for status in (100, 301, 302, 303, 307, 308, 401, 403, 407, 408, 421, 425, 429, 500, 502, 503, 504, 599)],
    ],
)  # fmt: skip
def test_a_verdict(given, verdict, why):
    """Only an answer that can mean one thing alone, about this very key, is more than inconclusive."""
    evidence = conclude(plan_of(), {"key": "k1"}, given)
    assert evidence.verdict is verdict
    assert why in evidence.why
    assert bool(evidence.why) == (verdict is I)
    assert evidence.status == given.status


def test_two_meanings_at_once():
    """An answer that the rule takes for two things says none of them."""
    plan = plan_of(failed=[{"status": "2xx", "when": {"/data/0/status": "paid"}}])
    evidence = conclude(plan, {"key": "k1"}, found("paid"))
    assert (evidence.verdict, evidence.why) == (I, "it is succeeded and failed at once")
    plan = plan_of(inconclusive=[{"status": "200", "when": {"/data/0/amount": 12}}])
    assert conclude(plan, {"key": "k1"}, found("paid")).verdict is I
    plan = plan_of(inconclusive=[{"status": "200", "when": {"/data/0/status": "pending"}}])
    assert conclude(plan, {"key": "k1"}, found("pending")).why == "the rule says so"


def test_the_evidence():
    """It has what the rule allows, and the digest of the whole body; a value is cut at 128 characters."""
    given = answer(200, {"data": [{"reference": "k1", "status": "paid", "id": "x" * 500, "amount": [1]}]})
    evidence = conclude(plan_of(), {"key": "k1"}, given)
    assert evidence.values == (("/data/0/id", "x" * 128),)
    assert evidence.body_digest == sha256(given.body).hexdigest()
    assert conclude(plan_of(), {"key": "k1"}, found("paid")).values == (
        ("/data/0/id", "ch_1"),
        ("/data/0/amount", "12"),
    )
    assert no_answer("timed out").verdict is I
    assert dict(described_evidence(evidence))["verdict"] == "succeeded"
    assert dict(described_evidence(no_answer("timed out"))) == {"answer": "none", "verdict": "inconclusive: timed out"}


@pytest.mark.parametrize(
    ("given", "verdict", "answers", "expected"),
    [
        (found("paid"), S, {}, (200, ("Content-Type: application/json; charset=utf-8",), found("paid").body)),
        (found("declined"), F, SEARCH["answers"],
         (402, ("Content-Type: application/json",), b'{"declined": "ch_1", "order": "k1"}')),
        (found("paid"), S, {"succeeded": {"status": 201, "body_pointer": "/data/0/amount", "headers": ["X-A: b"]}},
         (201, ("X-A: b",), b"12")),
        (found("paid"), S, {"succeeded": {"body_pointer": "/data/0"}},
         (200, ("Content-Type: application/json",),
          b'{"reference":"k1","status":"paid","id":"ch_1","amount":12}')),
        (found("paid"), S, {"succeeded": {"status": 204}}, (204, (), b"")),
    ],
)  # fmt: skip
def test_what_a_duplicate_gets(given, verdict, answers, expected):
    """The probe's body, a part of it, or a template; with the status and the fields of the rule."""
    answers = {"failed": {"status": 402}, **answers}
    assert answered(plan_of(answers=answers), verdict, {"key": "k1"}, given) == expected


@pytest.mark.parametrize(
    "answers",
    [{"body_pointer": "/data/0/receipt"}, {"body": '"{answer:/data/0/receipt}"'}, {"body": '"{answer:/data}"'}],
)
def test_an_answer_that_cannot_be_made(answers):
    """A verdict whose response lacks a part is inconclusive: no duplicate gets half of it."""
    plan = plan_of(answers={"succeeded": answers, "failed": {"status": 402}})
    assert isinstance(answered(plan, S, {"key": "k1"}, found("paid")), Unfillable)
    evidence = conclude(plan, {"key": "k1"}, found("paid"))
    assert evidence.verdict is I
    assert evidence.why.startswith("answers.succeeded: ")


def test_a_status_that_has_no_body():
    """A template has no place in a response without a body: the answer is inconclusive, and the key stays."""
    plan = plan_of(reference={}, succeeded=[{"status": "204"}], failed=None, answers={"succeeded": {"body": '"{key}"'}})
    assert conclude(plan, {"key": "k1"}, answer(204)).why == "answers.succeeded: a response with status 204 has no body"
    plan = plan_of(reference={}, succeeded=[{"status": "204"}], failed=None, answers=None)
    assert answered(plan, S, {"key": "k1"}, answer(204, {})) == (204, (), b"")


def test_json_is_written_as_it_was():
    """Numbers and doubled names stay; text is in ASCII, also half a surrogate pair."""
    text = b'{"a": 1.00, "a": [true, null, {"\xc3\xa4": "\\ud800\\n"}, 1e5], "b": {}, "c": [], "d": "\\u0000"}'
    document = parse_document(text)
    assert isinstance(document, tuple)
    expected = '{"a":1.00,"a":[true,null,{"\\u00e4":"\\ud800\\n"},1e5],"b":{},"c":[],"d":"\\u0000"}'
    assert written(document[0]) == expected


def test_no_reference_and_no_body():
    """A rule that says so takes an answer without a body by its status alone."""
    plan = plan_of(method="HEAD", url="/charges/{key}", reference={}, succeeded=[{"status": "200"}], failed=None,
                   absent=[{"status": "404"}], audit=None, answers=None)  # fmt: skip
    asked = question(plan, {"key": "k1"})
    assert (asked.method, asked.url, asked.body) == ("HEAD", "https://api.test/base/charges/k1", None)
    assert conclude(plan, {"key": "k1"}, ProbeAnswer(200, [], b"")).verdict is S
    assert conclude(plan, {"key": "k1"}, ProbeAnswer(404, [], b"")).verdict is A
    assert answered(plan, S, {"key": "k1"}, ProbeAnswer(200, [], b"")) == (200, (), b"")


def test_a_question():
    """It has the fields of its own and the credentials; those may say what is accepted, too."""
    plan = plan_of(method="QUERY", safe=True, body='{{"reference": "{key}"}}')
    asked = question(plan, {"key": 'a"b'})
    assert asked.body == b'{"reference": "a\\"b"}'
    assert asked.url == "https://api.test/base/charges/search?reference=a%22b"
    own = {"Accept": "application/json", "Accept-Encoding": "identity", "Cache-Control": "no-cache"}
    assert dict(asked.headers) == {**own, "Content-Type": "application/json"}
    form = plan_of(method="QUERY", safe=True, content_type="application/x-www-form-urlencoded", body="reference={key}")
    assert question(form, {"key": "a&b=c"}).body == b"reference=a%26b%3Dc"
    hosted = for_rule(plan_of(), API, "shop.test", None)
    assert dict(question(hosted, {"key": "a"}).headers)["Host"] == "shop.test"
    other = for_rule(plan_of(url="https://search.test:444/{key}"), API, "shop.test", None)
    assert question(other, {"key": "a"}).url == "https://search.test:444/a"
    assert "Host" not in dict(question(other, {"key": "a"}).headers)


# What is kept of a request ...


class Sent:
    def __init__(self, data: bytes, *, spooled: bool = False) -> None:
        self.data, self.spooled = data, spooled


def kept(keep: list[str], body: NotedBody, target: bytes = b"/", **fields: bytes) -> dict[str, str]:
    text = "/x?" + "&".join(f"{{{name}}}" for name in keep)
    plan = plan_of(keep=keep, url=text, reference={}, answers={"failed": {"status": 402}})
    headers = {name.replace("_", "-").encode(): value for name, value in fields.items()}
    return dict(read_values(plan, (b"key", b"x-key"), lambda name: headers.get(name, b""), lambda: target, body))


@pytest.mark.parametrize(
    ("keep", "given", "value"),
    [
        ("key", {"key": b'"a b";v=1'}, "a b"),
        ("key", {"x_key": b"abc"}, "abc"),
        ("key", {"key": b"a", "x_key": b"b"}, "a"),
        ("key", {"key": b"\xff"}, None),
        ("key", {}, None),
        ("path:2", {"target": b"/a/b%2Fc%20d/e"}, "b/c d"),
        ("path:2", {"target": b"/a"}, None),
        ("path:2", {"target": b"/x/../a/%FF"}, None),
        ("header:X-Order", {"x_order": " ä ".encode()}, "ä"),
        ("/order/0", {"body": b'{"order": [" 7 "]}'}, " 7 "),
        ("/order", {"body": b'{"order": 750}'}, "750"),
        ("/order", {"body": b'{"order": -7}'}, "-7"),
        *[("/order", {"body": b'{"order": %s}' % number}, None) for number in (b"7.50", b"1e3", b"-0", b"9" * 16)],
        ("/order", {"body": b'{"order": true}'}, "true"),
        ("/order", {"body": b'{"order": null}'}, None),
        ("/order", {"body": b'{"order": {}}'}, None),
        ("/order", {"body": b'{"order": 1, "order": 2}'}, None),
        ("/order", {"body": b'{"order": "a\\nb"}'}, None),
        ("/order", {"body": b'{"order": "\\ud800"}'}, None),
        ("/order", {"body": b'{"order": "' + b"x" * 1025 + b'"}'}, None),
        ("/order", {"body": b'{"order": 1}', "content_encoding": b"gzip"}, None),
        ("/order", {"body": b"{"}, None),
        ("/order", {"body": b'{"order": 1}', "spooled": True}, None),
    ],
)
def test_what_is_kept(keep, given, value):
    """A value is kept whole and as it was written, or not at all."""
    body = Sent(given.pop("body", b""), spooled=given.pop("spooled", False))
    assert kept([keep], body, given.pop("target", b"/"), **given) == ({} if value is None else {keep: value})


def test_a_note_is_kept_as_it_came():
    """The note for people is cut, stripped and made readable; a question with that would be about another order."""
    plan = plan_of(url="/x?{key}{note}")
    assert [name for name, _ in plan.keep] == ["key", "note"]
    for order, value in (("4711", "4711"), (" ä ", " ä "), ("x" * 500, "x" * 500), ("a\nb", None), (4711, "4711")):
        body = Sent(json.dumps({"order": order}).encode())
        found = dict(read_values(plan, (b"key",), lambda name: b"", lambda: b"/", body))
        assert found == ({} if value is None else {"note": value})


def test_what_people_are_shown():
    """The rule's template, the question of one key, and why there is none."""
    plan = plan_of()
    assert list(described_rule(plan)) == [
        "asks about unknown keys: GET https://api.test/base/charges/search?reference={key}",
        "stores values with each key until it is complete, to ask with: key",
    ]
    shown = dict(described_question(plan, {"key": "k 1"}))
    assert shown["asked"] == "GET https://api.test/base/charges/search?reference=k%201"
    assert shown["  absent"].startswith("frees the key if 3 answers in a row agree, from 1 s after the last byte")
    assert "  beware" not in shown
    careless = plan_of(absent=[{"status": "404"}])
    assert dict(described_question(careless, {"key": "k 1"}))["  beware"].startswith("a 404 alone says absent")
    assert dict(described_question(plan, {})) == {"asked": "nothing: {key} has no value; an operator decides"}
    assert isinstance(question(plan, {}), CannotAsk)
