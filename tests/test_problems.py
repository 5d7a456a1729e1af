"""The answers that the proxy gives itself, as the table of DESIGN.md states them."""

import json
from email.utils import parsedate_to_datetime

import pytest

from oncegate.messages.problems import KINDS, REFUSALS, Problem, problem, refusal

NO, YES, NULL = False, True, None

TABLE = {
    # slug                    status retryable reuse_key
    "key-missing": (400, NO, NULL),
    "key-invalid": (400, NO, NO),
    "scope-unstable": (400, NO, NO),
    "key-reused": (422, NO, NO),
    "in-flight": (409, YES, YES),
    "outcome-unknown": (409, NO, NULL),
    "response-not-kept": (409, NO, NO),
    "body-too-large": (413, NO, YES),
    "store-unavailable": (503, YES, YES),
    "overloaded": (503, YES, YES),
    "upstream-unreachable": (502, YES, YES),
    "upstream-lost": (502, NO, NULL),
    "upstream-timeout": (504, NO, NULL),
    "record-corrupt": (500, NO, NULL),
    "answer-not-stored": (502, YES, YES),
}
COME_AGAIN = {"in-flight": 7, "store-unavailable": None, "overloaded": None}  # slugs with a Retry-After
REFUSED = {
    400: (NO, NULL),
    405: (NO, NULL),
    408: (YES, YES),
    417: (NO, NULL),
    421: (NO, NULL),
    431: (NO, NULL),
    500: (NO, NULL),
    501: (NO, NULL),
    503: (YES, YES),
    505: (NO, NULL),
}
NASTY = 'a "quoted"\r\nX-Evil: 1\x00 \N{SNOWMAN} \\ text'


def made(slug: str) -> Problem:
    return problem(slug, "why", COME_AGAIN.get(slug))


def fields(answer: Problem) -> dict[str, str]:
    """Return the fields of an answer, each of which stands once."""
    assert answer.head_fields().endswith(b"\r\n")
    pairs = [line.split(": ", 1) for line in answer.head_fields().decode("ascii").split("\r\n")[:-1]]
    assert len({name.lower() for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_the_table_has_a_row_for_each_problem():
    """There is no slug beside the table's, and none is missing."""
    assert list(KINDS) == list(TABLE)


@pytest.mark.parametrize("slug", TABLE)
def test_a_problem_is_what_its_row_says(slug):
    """Status, whether a retry helps, and whether it may carry the same key."""
    status, retryable, reuse_key = TABLE[slug]
    answer = made(slug)
    members = json.loads(answer.body())
    assert answer.status == members["status"] == status
    assert members["retryable"] is retryable
    assert members["reuse_key"] is reuse_key


@pytest.mark.parametrize("slug", TABLE)
def test_a_problem_has_the_members_of_rfc_9457(slug):
    """Its type names the slug, the title the kind, the detail this one; the status is an integer."""
    members = json.loads(made(slug).body())
    assert members["type"] == f"urn:oncegate:{slug}"
    assert members["detail"] == "why"
    assert type(members["status"]) is int
    assert members["title"]
    assert set(members) == {"type", "title", "status", "detail", "retryable", "reuse_key", "error"}


@pytest.mark.parametrize("slug", TABLE)
def test_a_type_is_a_link_where_the_docs_are_served(slug):
    """With a docs URL the type names the page's file and the slug's anchor; nothing else changes."""
    linked, plain = json.loads(made(slug).body("https://git.test/docs")), json.loads(made(slug).body())
    assert linked.pop("type") == f"https://git.test/docs/reference/answers.md#{slug}"
    assert plain.pop("type") == f"urn:oncegate:{slug}"
    assert linked == plain


@pytest.mark.parametrize("slug", TABLE)
def test_a_code_is_the_slug_with_underscores(slug):
    """Logs and metrics name the outcome by it."""
    assert made(slug).code == slug.replace("-", "_")


def test_each_kind_has_a_title_of_its_own():
    """RFC 9457: a title tells the type, not the occurrence."""
    assert len({json.loads(made(slug).body())["title"] for slug in TABLE}) == len(TABLE)


@pytest.mark.parametrize("slug", TABLE)
def test_a_problem_says_the_same_in_the_member_that_sdks_read(slug):
    """error: {type, code, message}, from which Stripe's, OpenAI's and Mollie's clients take their messages."""
    members = json.loads(made(slug).body())
    assert set(members["error"]) == {"type", "code", "message"}
    assert members["error"]["code"] == slug.replace("-", "_")
    assert members["error"]["message"] == members["detail"]
    assert members["error"]["type"] in ("idempotency_error", "api_error")


def test_what_concerns_the_key_is_an_idempotency_error():
    """The rest is an error of the API as a whole."""
    of_the_key = {slug for slug in TABLE if json.loads(made(slug).body())["error"]["type"] == "idempotency_error"}
    assert of_the_key == set(list(TABLE)[:7])


@pytest.mark.parametrize("slug", TABLE)
def test_the_advice_is_the_same_in_every_dialect(slug):
    """x-should-retry and Stripe-Should-Retry say what the member says."""
    answer = made(slug)
    advice = "true" if json.loads(answer.body())["retryable"] else "false"
    assert fields(answer)["x-should-retry"] == fields(answer)["Stripe-Should-Retry"] == advice


@pytest.mark.parametrize("slug", TABLE)
def test_a_time_to_come_again_stands_where_the_table_says_so(slug):
    """In flight as given, 503 at least 1 second; on nothing else, and never where a retry does not help."""
    answer = made(slug)
    assert fields(answer).get("Retry-After") == {"in-flight": "7"}.get(slug, "1" if slug in COME_AGAIN else None)
    assert "Retry-After" not in fields(answer) or TABLE[slug][1]


def test_a_time_to_come_again_can_be_given():
    """It stands as it was given, in whole seconds."""
    assert fields(problem("overloaded", "why", 30))["Retry-After"] == "30"
    assert fields(problem("in-flight", "why", 1))["Retry-After"] == "1"


@pytest.mark.parametrize("slug", TABLE)
def test_a_problem_has_these_fields_and_no_others(slug):
    """It is problem+json, not to be cached, dated; framing and connection are the writer's."""
    answer = made(slug)
    found = fields(answer)
    assert found.pop("Content-Type") == "application/problem+json"
    assert found.pop("Cache-Control") == "no-store"
    assert parsedate_to_datetime(found.pop("Date")).tzinfo is not None
    found.pop("Retry-After", None)
    assert set(found) == {"x-should-retry", "Stripe-Should-Retry"}


def test_further_facts_are_further_members():
    """The original's status stands beside the others, in a body that was not kept."""
    members = json.loads(problem("response-not-kept", "why", original_status=201).body())
    assert members["original_status"] == 201
    assert members["status"] == 409


@pytest.mark.parametrize("answer", [problem("key-invalid", NASTY), refusal(400, NASTY)])
def test_a_detail_never_leaves_the_body(answer):
    """Whatever it says, it is JSON in ASCII, and the head is untouched by it."""
    members = json.loads(answer.body().decode("ascii"))
    assert members["detail"] == members["error"]["message"] == NASTY
    assert b"Evil" not in answer.head_fields() + answer.reason


def test_an_unknown_slug_is_no_problem():
    """A slip of the pen fails where it is made."""
    with pytest.raises(KeyError):
        problem("in_flight", "why")


def test_the_refusals_have_a_row_each():
    """Requests that never get as far as a key are refused with these statuses alone."""
    assert set(REFUSALS) == set(REFUSED)


@pytest.mark.parametrize("status", REFUSED)
def test_a_refusal_is_a_problem_without_a_slug(status):
    """It says the same things, and to come again only where that helps."""
    answer = refusal(status, "why")
    members = json.loads(answer.body("https://git.test/docs"))
    assert answer.code == "request_refused"
    assert answer.status == members["status"] == status
    assert (members["retryable"], members["reuse_key"]) == REFUSED[status]
    assert members["type"] == "about:blank"
    assert members["detail"] == "why"
    assert members["error"] == {"type": "api_error", "code": "request_refused", "message": "why"}
    advice = "true" if members["retryable"] else "false"
    assert fields(answer)["x-should-retry"] == fields(answer)["Stripe-Should-Retry"] == advice
    assert fields(answer).get("Retry-After") == ("1" if members["retryable"] else None)


def test_a_refusal_of_any_other_kind_is_a_bad_request():
    """A status without a row is answered with 400, in line and body alike."""
    answer = refusal(414, "why")
    assert answer.status == json.loads(answer.body())["status"] == 400


@pytest.mark.parametrize("status", sorted({row[0] for row in TABLE.values()} | set(REFUSED)))
def test_the_reason_is_the_registered_one(status):
    """Nothing of the detail, ASCII, never empty."""
    answers = [made(slug) for slug, row in TABLE.items() if row[0] == status] or [refusal(status, "why")]
    for answer in answers:
        assert answer.reason
        assert answer.reason.replace(b" ", b"").replace(b"-", b"").isalpha()
