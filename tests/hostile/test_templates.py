"""Clients choose the values that a probe is made of: none of them asks for anything else, or says what is true."""

import json
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from oncegate.decision import Verdict
from oncegate.probing.plan import CannotAsk, Plan, Question, for_rule, question
from oncegate.probing.table import parse_table
from oncegate.probing.verdicts import ProbeAnswer, answered, conclude
from oncegate.settings.addresses import Origin

API = Origin("http", "api.test", 80)
JSON = [(b"Content-Type", b"application/json")]
HOSTILE = [
    "{}", "{key}", "{{key}}", "{note}", "{answer:/secret}", "%7Bkey%7D", "{0}", "{__class__}", "%s", "${key}", "\\1",
    "a?b=c&d#e", "a&reference=other", "http://evil.test/", "//evil.test", "\\\\evil.test", "@evil.test", ":80/",
    "a;b,c=d", "ä\u202e\u2028", "😀", '"', "\\", "'", "a\"}, {\"b\": \"c", "+ %20 %00", "a=b&c", "\ufeff", "[::1]",
]  # fmt: skip


def plan_of(url: str, **changes: object) -> Plan:
    table = {"url": url, "keep": ["key"], "reference": {"/id": "{key}"}, "succeeded": [{"status": "200"}], **changes}
    return for_rule(parse_table(table), API, "", None)


def asked(plan: Plan, value: str) -> Question:
    made = question(plan, {"key": value})
    assert isinstance(made, Question)
    return made


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_stays_in_its_place(value):
    """In a path, a query, a form and JSON it is read as what it is, once; host and structure are the rule's."""
    made = (
        asked(plan_of("/a/{key}/b?c={key}&d=e"), value)
        if "/" not in value
        else asked(plan_of("/a/b?c={key}&d=e"), value)
    )
    assert made.url.isascii()
    assert not set(' "<>\\^`{|}#') & set(made.url)
    parts = urlsplit(made.url)
    assert (parts.scheme, parts.netloc, parts.fragment) == ("http", "api.test", "")
    assert parse_qsl(parts.query, strict_parsing=True) == [("c", value), ("d", "e")]
    assert unquote(parts.path) in (f"/a/{value}/b", "/a/b")
    body = '{{"a": "{key}", "b": ["x{key}y"]}}'
    made = asked(plan_of("/a", method="QUERY", safe=True, body=body), value)
    assert json.loads(made.body) == {"a": value, "b": [f"x{value}y"]}
    form = {"content_type": "application/x-www-form-urlencoded", "body": "a={key}&b=c"}
    made = asked(plan_of("/a", method="QUERY", safe=True, **form), value)
    assert parse_qsl(made.body.decode(), strict_parsing=True) == [("a", value), ("b", "c")]
    assert not any("\r" in text or "\n" in text for header in made.headers for text in header)


@pytest.mark.parametrize(
    "value", ["", "a\r\nX: y", "a\nb", "\x00", "a\x7f", "a\x85b", "\t", "\ud800", "x" * 1025, "ä" * 513]
)
def test_a_value_that_is_never_written(value):
    """Control characters, halves of characters, nothing, and too much: nothing is asked, and no text repeats it."""
    made = question(plan_of("/a?b={key}"), {"key": value})
    assert isinstance(made, CannotAsk)
    assert made.why.startswith("{key} ")
    assert len(made.why) < 60


@pytest.mark.parametrize(
    ("url", "value"),
    [
        ("/a/{key}", "."),
        ("/a/{key}", ".."),
        ("/a/{key}/b", "../../admin"),
        ("/a/{key}", "x/../y"),
        ("/a/{key}", "..\\admin"),
        ("/a/{key}", "%2e%2e/admin"),
        ("/a/{key}", "%2e%2e%2fadmin"),
        ("/a/{key}", "%252e%252e%252fadmin"),
        ("/a/.{key}", "."),
        ("/a/{key}{key}", "."),
    ],
)
def test_a_value_that_would_climb(url, value):
    """Servers undo escapes, some twice: a dot segment would name another resource, for credentials of the rule."""
    assert isinstance(question(plan_of(url), {"key": value}), CannotAsk)


def test_a_slash_makes_no_segment():
    """An id may have one. It stays in the segment of its placeholder."""
    assert asked(plan_of("/a/{key}/b"), "x/y?z").url == "http://api.test/a/x%2Fy%3Fz/b"


@pytest.mark.parametrize("value", ["a..b", "...", ".a", "a.", "v1.2", "..a"])
def test_dots_alone_are_no_harm(value):
    """Only whole segments are."""
    assert asked(plan_of("/a/{key}"), value).url == f"http://api.test/a/{value}"


@pytest.mark.parametrize("value", ["a' OR status:'paid", 'a" OR "b', "a\\"])
@pytest.mark.parametrize(
    ("url", "more"),
    [
        ("/search?query=reference:'{key}'", {}),
        ("/search?query=reference:%22{key}%22", {}),
        ("/search?query=reference:%27{key}%27", {}),
        ("/search", {"method": "QUERY", "safe": True, "body": '{{"query": "reference:\\"{key}\\""}}'}),
        ("/search", {"method": "QUERY", "safe": True, "body": '{{"query": "reference:\'{key}\'"}}'}),
    ],
)
def test_a_value_between_quotes_of_a_query(url, more, value):
    """It could end the quotes of a language that the rule speaks and oncegate does not."""
    made = question(plan_of(url, **more), {"key": value})
    assert made == CannotAsk("{key} has a quote, and stands between quotes")
    assert isinstance(question(plan_of(url, **more), {"key": "order-7"}), Question)


@pytest.mark.parametrize("value", HOSTILE)
def test_what_an_answer_says_is_no_template(value):
    """A duplicate gets values of client and API as texts in JSON, whatever is in them."""
    plan = plan_of("/a?b={key}", answers={"succeeded": {"body": '{{"a": "{key}", "b": "{answer:/note}"}}'}})
    given = ProbeAnswer(200, JSON, json.dumps({"id": value, "note": value, "secret": "s"}).encode())
    assert conclude(plan, {"key": value}, given).verdict is Verdict.SUCCEEDED
    made = answered(plan, Verdict.SUCCEEDED, {"key": value}, given)
    assert json.loads(made.body) == {"a": value, "b": value}


@pytest.mark.parametrize(
    "body",
    [b"{" * 70_000, b"[" * 65_000, b'{"a":' * 10_000, b'"' + b"x" * 65_000, b"1" * 65_536, b"{}" * 30_000, b"\x00",
     b'{"id": "k", "id": "k"}', b'{"id": {"id": "k"}}', b'[{"id": "k"}]', b'{"id": "k"} x', b"\xef\xbb\xbf{}", b"nul"],
)  # fmt: skip
def test_answers_that_are_made_to_hurt(body):
    """Deep, long, doubled or broken: inconclusive, and never a crash."""
    assert conclude(plan_of("/a?b={key}"), {"key": "k"}, ProbeAnswer(200, JSON, body)).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("kind", [b"text/html", b"application/json, text/html", b"", b"application/json\x00", b"\xff"])
def test_a_type_that_is_no_json(kind):
    """Who says another type says that a reader may read something else."""
    given = ProbeAnswer(200, [(b"Content-Type", kind)], b'{"id": "k"}')
    assert conclude(plan_of("/a?b={key}"), {"key": "k"}, given).verdict is Verdict.INCONCLUSIVE


def test_a_type_cannot_split_the_replay():
    """The type of an answer goes on as a field of the replay: one that could not stand there is replaced."""
    given = ProbeAnswer(200, [(b"Content-Type", b"application/json; a=\r\nX: y")], b'{"id": "k"}')
    made = answered(plan_of("/a?b={key}"), Verdict.SUCCEEDED, {"key": "k"}, given)
    assert made.headers == ("Content-Type: application/json",)
