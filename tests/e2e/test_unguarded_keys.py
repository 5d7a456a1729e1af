"""Keys that guard nothing: the answer says so, and they are counted."""

import pytest

from tests.parts import OK, answering, ask, request

METHOD, NAME = b"unguarded; reason=method", b"unguarded; reason=name"
OTHER_NAME = "X-Idempotency-Key: k"
# Method, key header's line or none, and what the answer says.
CASES = [
    ("PUT", "Idempotency-Key: k", METHOD),
    ("DELETE", "Idempotency-Key: k", METHOD),
    ("PUT", OTHER_NAME, METHOD),
    ("POST", OTHER_NAME, NAME),
    ("PATCH", "PayPal-Request-Id: k", NAME),
    # Nothing is lost where nothing changes.
    ("GET", "Idempotency-Key: k", None),
    ("POST", "X-Request-Id: k", None),
    ("PUT", "X-Request-Id: k", None),
]


@pytest.mark.parametrize(("method", "line", "said"), CASES)
async def test_a_key_that_nothing_reads(standing, behind, method, line, said):
    """Each passes and executes again; twice, because a head that is known says it as well."""
    reason = (said or b"reason=method").rpartition(b"=")[2].decode()
    sample = f'unguarded_keys_total{{reason="{reason}"}}'
    before = standing.metric(sample)
    for _ in range(2):
        answer = await ask(standing.port, request(method, "/things/1", None, b"{}", line))
        assert (answer.status, answer.header("oncegate-status")) == (200, said)
    assert len(behind.received) == 2
    assert standing.metric(sample) == before + (2 if said else 0)


async def test_a_key_beside_it_guards(standing, behind):
    """A header that looks like a key says nothing where the key itself was read."""
    one = request("POST", "/things", "k-1", b"{}", OTHER_NAME)
    said = [(await ask(standing.port, one)).header("oncegate-status") for _ in range(2)]
    assert said == [b"executed", b"replayed"]


async def test_where_a_rule_says_off(proxies, upstream, valkey, tmp_path):
    """The API has keys of its own there, and clients hear nothing of ours; another oncegate behind knows better."""
    (tmp_path / "rules.toml").write_text('[[rule]]\nname = "own"\npath = "/own/**"\nguard = "off"\n')
    proxy = proxies(upstream, valkey.url, RULES_FILE="rules.toml")
    guarding = OK.replace(b"Content-Type", b"Oncegate-Status: executed\r\nContent-Type")
    for answered, said in (
        (OK, {"/own/1": None, "/other": NAME}),
        (guarding, dict.fromkeys(("/own/1", "/other"), b"executed")),
    ):
        upstream.script = answering(answered)
        for path in said:
            answer = await ask(proxy.port, request("POST", path, None, b"{}", OTHER_NAME))
            assert answer.header("oncegate-status") == said[path]
