"""The problems: oncegate's own error responses."""

import json
from email.utils import parsedate_to_datetime

import pytest

from oncegate.messages.problems import PROBLEM_KINDS, REFUSALS, Problem, problem, refusal

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
    "key-expired": (410, NO, NO),
    "stream-gone": (410, NO, NULL),
    "key-absent": (404, NO, YES),
    "key-released": (409, NO, YES),
    "ask-refused": (403, NO, NULL),
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
    404: (NO, NULL),
    405: (NO, NULL),
    408: (YES, YES),
    409: (NO, NULL),
    412: (NO, NULL),
    414: (NO, NULL),
    416: (NO, NULL),
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
    """The problems are exactly those of this table."""
    assert list(PROBLEM_KINDS) == list(TABLE)


@pytest.mark.parametrize("slug", TABLE)
def test_a_problem_is_what_its_row_says(slug):
    """A problem has the status and the retry advice of its row."""
    status, retryable, reuse_key = TABLE[slug]
    answer = made(slug)
    members = json.loads(answer.body())
    assert answer.status == members["status"] == status
    assert members["retryable"] is retryable
    assert members["reuse_key"] is reuse_key


@pytest.mark.parametrize("slug", TABLE)
def test_a_problem_has_the_members_of_rfc_9457(slug):
    """A problem has type, title, detail and an integer as status (RFC 9457, section 3.1)."""
    members = json.loads(made(slug).body())
    assert members["type"] == f"urn:oncegate:{slug}"
    assert members["detail"] == "why"
    assert type(members["status"]) is int
    assert members["title"]
    assert set(members) == {"type", "title", "status", "detail", "retryable", "reuse_key", "error"}


@pytest.mark.parametrize("slug", TABLE)
def test_a_type_is_a_link_where_the_docs_are_served(slug):
    """With a docs URL, the type is a link to the slug's anchor. Nothing else changes."""
    linked, plain = json.loads(made(slug).body("https://git.test/docs")), json.loads(made(slug).body())
    assert linked.pop("type") == f"https://git.test/docs/reference/answers.md#{slug}"
    assert plain.pop("type") == f"urn:oncegate:{slug}"
    assert linked == plain


@pytest.mark.parametrize("slug", TABLE)
def test_a_code_is_the_slug_with_underscores(slug):
    """A problem's code, its name in logs and metrics, is the slug with underscores."""
    assert made(slug).code == slug.replace("-", "_")


def test_each_kind_has_a_title_of_its_own():
    """Each problem has its own title (RFC 9457, section 3.1.3)."""
    assert len({json.loads(made(slug).body())["title"] for slug in TABLE}) == len(TABLE)


@pytest.mark.parametrize("slug", TABLE)
def test_a_problem_says_the_same_in_the_member_that_sdks_read(slug):
    """`error: {type, code, message}`, which the SDKs of Stripe, OpenAI and Mollie read, repeats the problem."""
    members = json.loads(made(slug).body())
    assert set(members["error"]) == {"type", "code", "message"}
    assert members["error"]["code"] == slug.replace("-", "_")
    assert members["error"]["message"] == members["detail"]
    assert members["error"]["type"] in ("idempotency_error", "api_error")


def test_what_concerns_the_key_is_an_idempotency_error():
    """Problems of the key are idempotency errors. All others are errors of the API."""
    of_the_key = {slug for slug in TABLE if json.loads(made(slug).body())["error"]["type"] == "idempotency_error"}
    assert of_the_key == set(list(TABLE)[:12])


@pytest.mark.parametrize("slug", TABLE)
def test_the_advice_is_the_same_in_every_dialect(slug):
    """x-should-retry and Stripe-Should-Retry are equal to the member `retryable`."""
    answer = made(slug)
    advice = "true" if json.loads(answer.body())["retryable"] else "false"
    assert fields(answer)["x-should-retry"] == fields(answer)["Stripe-Should-Retry"] == advice


@pytest.mark.parametrize("slug", TABLE)
def test_a_time_to_come_again_stands_where_the_table_says_so(slug):
    """Retry-After is as given for in-flight and at least 1 s for a 503. Other problems do not have it."""
    answer = made(slug)
    assert fields(answer).get("Retry-After") == {"in-flight": "7"}.get(slug, "1" if slug in COME_AGAIN else None)
    assert "Retry-After" not in fields(answer) or TABLE[slug][1]


def test_a_time_to_come_again_can_be_given():
    """A given time is sent as Retry-After, in whole seconds."""
    assert fields(problem("overloaded", "why", 30))["Retry-After"] == "30"
    assert fields(problem("in-flight", "why", 1))["Retry-After"] == "1"


@pytest.mark.parametrize("slug", TABLE)
def test_a_problem_has_these_fields_and_no_others(slug):
    """A problem is application/problem+json, has a Date and must not be cached. It has no framing fields."""
    answer = made(slug)
    found = fields(answer)
    assert found.pop("Content-Type") == "application/problem+json"
    assert found.pop("Cache-Control") == "no-store"
    assert parsedate_to_datetime(found.pop("Date")).tzinfo is not None
    found.pop("Retry-After", None)
    assert set(found) == {"x-should-retry", "Stripe-Should-Retry"}


def test_further_facts_are_further_members():
    """Further members, such as the original's status, are added to the body."""
    members = json.loads(problem("response-not-kept", "why", original_status=201).body())
    assert members["original_status"] == 201
    assert members["status"] == 409


@pytest.mark.parametrize("answer", [problem("key-invalid", NASTY), refusal(400, NASTY)])
def test_a_detail_never_leaves_the_body(answer):
    """Any detail is written as JSON in ASCII, and never appears in the head."""
    members = json.loads(answer.body().decode("ascii"))
    assert members["detail"] == members["error"]["message"] == NASTY
    assert b"Evil" not in answer.head_fields() + answer.reason


def test_an_unknown_slug_is_no_problem():
    """An unknown slug raises KeyError."""
    with pytest.raises(KeyError):
        problem("in_flight", "why")


def test_the_refusals_have_a_row_each():
    """The refusals of requests are exactly these statuses."""
    assert set(REFUSALS) == set(REFUSED)


@pytest.mark.parametrize("status", REFUSED)
def test_a_refusal_is_a_problem_without_a_slug(status):
    """A refusal has the members of a problem, the type about:blank, and Retry-After only if a retry can help."""
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
    """A refusal with a status that has no row is a 400."""
    answer = refusal(402, "why")
    assert answer.status == json.loads(answer.body())["status"] == 400


@pytest.mark.parametrize("status", sorted({row[0] for row in TABLE.values()} | set(REFUSED)))
def test_the_reason_is_the_registered_one(status):
    """The reason phrase is the registered one, in ASCII and never empty."""
    answers = [made(slug) for slug, row in TABLE.items() if row[0] == status] or [refusal(status, "why")]
    for answer in answers:
        assert answer.reason
        assert answer.reason.replace(b" ", b"").replace(b"-", b"").isalpha()
