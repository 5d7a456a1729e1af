"""The identity that the rules give a request, for an operator who has only the request; and what they may paste."""

import pytest

from oncegate.keys.digests import key_id
from oncegate.operating.errors import OperatorError
from oncegate.operating.explain import Explanation
from oncegate.operating.pasted import Pasted, read_pasted
from oncegate.operating.request_identity import AskedRequest, Identified, Keyless, identify_request
from oncegate.rules.loading import load_rules
from oncegate.settings.settings import Settings

RULES = """
[[rule]]
name = "hooks"
path = "/hooks/**"
key = ["body:/id"]
scope = []
"""


@pytest.fixture
def settings(tmp_path) -> Settings:
    (tmp_path / "rules.toml").write_text(RULES)
    return Settings(upstream="http://127.0.0.1:9", rules_file=tmp_path / "rules.toml")


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        (AskedRequest("POST", "/v1/charges", ["Idempotency-Key: a", "Authorization: Bearer b"]), ""),
        (
            AskedRequest("post", "http://api.test/hooks/a", ["Content-Type: application/json"], b'{"id": "evt_1"}'),
            "hooks",
        ),
    ],
)
def test_a_request_is_identified_as_it_is_explained(settings, asked, rule):
    """The key's digest is the one that `check --explain` prints, which calls the request path."""
    rules = load_rules(settings)
    found = identify_request(settings, rules, asked)
    assert isinstance(found, Identified)
    assert found.rule.name == rule
    assert key_id(found.identity.key) in Explanation(settings, rules).explain(asked)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (AskedRequest("POST", "/v1/charges"), "no idempotency key"),
        (AskedRequest("GET", "/v1/charges", ["Idempotency-Key: a"]), "does not guard GET"),
        (AskedRequest("POST", "/v1/charges", ["Idempotency-Key: a", "Idempotency-Key: b"]), "more than"),
        (AskedRequest("POST", "/v1/charges", ["Idempotency-Key: a", "Authorization: Digest b"]), "scheme"),
        (
            AskedRequest("POST", "/hooks/a", ["Content-Type: application/json"], b"{}"),
            "the body does not have the member",
        ),
    ],
)
def test_a_request_without_a_key_says_why(settings, asked, reason):
    """A request that has no key, or that the proxy would refuse, is found to have none."""
    found = identify_request(settings, load_rules(settings), asked)
    assert isinstance(found, Keyless)
    assert reason in found.reason


def test_what_is_pasted():
    """A word may be a key or an id; several lines are a request, with its head and its body."""
    whole = "rqZ8Cdb0fPLDGlIXGs2juZxNZChv9Vme"
    assert read_pasted(f" {whole}\n").is_id
    assert read_pasted(f"once:{{{whole}}}").word == whole
    assert (read_pasted("order-42").is_id, read_pasted("order-42").may_begin_id) == (False, True)
    assert not read_pasted("order 42").may_begin_id
    text = 'POST /v1/charges HTTP/1.1\r\nIdempotency-Key: a\r\nAuthorization: Bearer b\r\n\r\n{"a":\r\n\r\n1}'
    request = AskedRequest("POST", "/v1/charges", ["Idempotency-Key: a", "Authorization: Bearer b"], b'{"a":\n\n1}')
    assert read_pasted(text) == Pasted(request=request)


@pytest.mark.parametrize("text", ["Authorization: Bearer s3cret\nX: y", "POST /a\nBearer s3cret", "POST /a\n: s3cret"])
def test_a_complaint_about_what_is_pasted_repeats_none_of_it(text):
    """What somebody pastes may have a credential in it."""
    with pytest.raises(OperatorError) as refused:
        read_pasted(text)
    assert "s3cret" not in str(refused.value)
