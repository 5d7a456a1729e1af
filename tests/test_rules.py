"""The rules file: every field, every mistake, and which rule matches a request."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from oncegate.decision import Disposition
from oncegate.keys.sources import Header, KeySources, Member, parse_source
from oncegate.messages.fields import by_name
from oncegate.messages.request_head import RequestHead
from oncegate.rules.body_conditions import NO_BODY, read_document, unread_document
from oncegate.rules.fields import OF_UPSTREAMS, RULE, SHARED, UPSTREAM
from oncegate.rules.loading import load_rules
from oncegate.rules.model import Rule, Rules
from oncegate.rules.patterns import text_matcher
from oncegate.rules.presets import PRESETS
from oncegate.rules.resolution import FOREVER_MS, longest_ms
from oncegate.rules.statuses import AMBIGUOUS_STATUSES, RELEASE_STATUSES
from oncegate.settings.addresses import Origin
from oncegate.settings.credentials import expanded
from oncegate.settings.errors import SettingsError
from oncegate.settings.names import GUARDABLE
from oncegate.settings.settings import Settings

URL = "http://api.test"
KNOWN_HEADERS = tuple(name.lower().encode() for name in expanded(["known"]))


@pytest.fixture
def rules(tmp_path: Path, monkeypatch):
    """Load rules from a text: `rules('...', retention_s=5)`."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ONCEGATE_{name.upper()}", raising=False)

    def read(text: str | bytes, **settings: object) -> Rules:
        file = Path("rules.toml")
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_rules(Settings(**{"upstream": URL, "rules_file": str(file), **settings}))

    return read


@pytest.fixture
def errors(rules):
    """Return what is wrong with a text."""

    def read(text: str | bytes, **settings: object) -> list[str]:
        with pytest.raises(SettingsError) as raised:
            rules(text, **settings)
        return list(raised.value.errors)

    return read


def one(fields: str) -> str:
    return f'[[rule]]\nname = "r"\n{fields}'


def head(target: bytes = b"/", method: str = "POST", host: bytes = b"api.test", **fields: bytes) -> RequestHead:
    pairs = [(name.replace("_", "-").encode(), value) for name, value in fields.items()]
    return RequestHead(method, target, False, host, pairs, by_name(pairs))


# field: as written; what to look at, and its value then and by default; as written wrongly, and what is expected of it
CASES = {
    "name": ('name = "a b"', lambda rule: rule.name, "a b", "r", 'name = ""', "1 to 64 visible"),
    "host": ('host = "*.Test"', lambda rule: rule.match.host, "*.test", None, 'host = "a/b"', "must be a host"),
    "path": ('path = "/a/**"', lambda rule: rule.match.path, "/a/**", None, 'path = "a"', "begins with /"),
    "methods": (
        'methods = ["put", "GET"]',
        lambda rule: rule.match.methods,
        {"PUT", "GET"},
        None,
        'methods = ["CONNECT"]',
        "not a method that oncegate serves",
    ),
    "headers": (
        'headers = { "User-Agent" = "a*" }',
        lambda rule: rule.match.headers,
        {b"user-agent": "a*"},
        {},
        'headers = { "User Agent" = "a" }',
        "must name header fields",
    ),
    "when": (
        'when = { "body:/method" = "tools/call", "body:/params/name" = ["pay*", "refund"] }',
        lambda rule: rule.match.when and rule.match.when.globs,
        {"/method": ("tools/call",), "/params/name": ("pay*", "refund")},
        None,
        'when = { "header:X-A" = "1" }',
        "is no place in a body",
    ),
    "pass_interim": (
        "pass_interim = true",
        lambda rule: rule.policy.pass_interim,
        True,
        False,
        "pass_interim = 1",
        "must be true or false",
    ),
    "heartbeat_s": (
        "heartbeat_s = 25",
        lambda rule: rule.policy.heartbeats and rule.policy.heartbeats.period_s,
        25,
        None,
        "heartbeat_s = 0",
        "must be a number of seconds from 0.1 to 3600",
    ),
    "heartbeat_agents": (
        'heartbeat_s = 25\nheartbeat_agents = ["curl/*"]',
        lambda rule: rule.policy.heartbeats and [one.pattern for one in rule.policy.heartbeats.agents],
        [text_matcher("curl/*").pattern],
        None,
        'heartbeat_agents = ["*"]',
        "names no User-Agent; write one such as curl/*",
    ),
    "on_client_gone": (
        'on_client_gone = "cancel"',
        lambda rule: rule.policy.cancel_grace_s,
        30,
        None,
        'on_client_gone = "abort"',
        "must be 'finish' or 'cancel'",
    ),
    "cancel_grace_s": (
        'on_client_gone = "cancel"\ncancel_grace_s = 0',
        lambda rule: rule.policy.cancel_grace_s,
        0,
        None,
        "cancel_grace_s = nan",
        "must be a number of seconds from 0 to 86400",
    ),
    "preset": (
        'preset = "sns"',
        lambda rule: rule.policy.preset,
        "sns",
        "",
        'preset = "snes"',
        "is not a preset; the presets are",
    ),
    "upstream": (
        'upstream = "https://b.test/v1/"',
        lambda rule: rule.upstream.origin,
        Origin("https", "b.test", 443, "/v1"),
        Origin("http", "api.test", 80),
        'upstream = "ftp://b"',
        "must be http:// or https://",
    ),
    "set_host": ('set_host = "B.test:1"', lambda rule: rule.set_host, "b.test:1", None, 'set_host = "a b"', "a host"),
    "pass_host": (
        "pass_host = true",
        lambda rule: rule.policy.pass_host,
        True,
        False,
        "pass_host = 1",
        "true or false",
    ),
    "guard": (
        'guard = "required"',
        lambda rule: rule.policy.key_required,
        True,
        False,
        'guard = "maybe"',
        "must be 'off' or 'optional' or 'required'",
    ),
    "key": (
        'key = ["header:A", "path:1"]',
        lambda rule: rule.policy.sources,
        KeySources(((parse_source("header:A"), parse_source("path:1")),)),
        None,
        'key = "body:id"',
        "must be a JSON pointer",
    ),
    "protocol": (
        'protocol = "json-rpc"\nfingerprint = ["body:/method"]',
        lambda rule: (rule.policy.json_rpc, rule.policy.statuses.by_message),
        (True, True),
        (False, False),
        'protocol = "soap"',
        "must be 'http' or 'json-rpc'",
    ),
    "namespace": ('namespace = "n"', lambda rule: rule.policy.namespace, b"n", b"default", 'namespace = ""', "1 to 64"),
    "scope": (
        'scope = ["header:X-Org", "path:2"]',
        lambda rule: rule.policy.scope_headers,
        (b"x-org", b"path:2"),
        KNOWN_HEADERS,
        'scope = ["body:/org"]',
        "cannot identify a tenant",
    ),
    "stable_schemes": (
        'stable_schemes = ["DPoP", "bare"]',
        lambda rule: rule.policy.stable_schemes,
        (b"dpop", b"bare"),
        (),
        'stable_schemes = ["a b"]',
        "must name schemes of Authorization",
    ),
    "fingerprint": (
        'fingerprint = ["method", "body"]',
        lambda rule: rule.policy.fingerprint,
        {"method", "body"},
        None,
        'fingerprint = ["path"]',
        "is not a part of a fingerprint",
    ),
    "retention_s": (
        "retention_s = 90",
        lambda rule: rule.policy.retention_ms,
        90_000,
        86_400_000,
        "retention_s = 0",
        "greater than 0",
    ),
    "tombstone_s": (
        "tombstone_s = 90",
        lambda rule: rule.policy.tombstone_ms,
        90_000,
        0,
        "tombstone_s = -1",
        "at least 0",
    ),
    "on_duplicate": (
        'on_duplicate = "wait"',
        lambda rule: rule.policy.wait_for_duplicates,
        True,
        False,
        'on_duplicate = "ignore"',
        "must be 'reject', 'wait' or 'join'",
    ),
    "wait_max_s": ("wait_max_s = 1.5", lambda rule: rule.policy.wait_max_s, 1.5, 30, "wait_max_s = inf", "finite"),
    "on_unknown": (
        'on_unknown = "retry"',
        lambda rule: rule.policy.mode,
        b"retry",
        b"hold",
        'on_unknown = "guess"',
        "must be 'hold' or 'retry'",
    ),
    "on_store_down": (
        'on_store_down = "refuse"',
        lambda rule: rule.settings.on_store_down,
        "refuse",
        "refuse",
        'on_store_down = "panic"',
        "must be",
    ),
    "release_statuses": (
        'release_statuses = ["418"]',
        lambda rule: rule.policy.statuses.entries(Disposition.RELEASE),
        ["418"],
        list(RELEASE_STATUSES),
        'release_statuses = ["42"]',
        "is not a status",
    ),
    "ambiguous_statuses": (
        'ambiguous_statuses = ["5xx"]',
        lambda rule: rule.policy.statuses.entries(Disposition.AMBIGUOUS),
        ["5xx"],
        list(AMBIGUOUS_STATUSES),
        'ambiguous_statuses = "502"',
        "must be a list of statuses",
    ),
    "in_flight_status": (
        "in_flight_status = 503",
        lambda rule: rule.policy.in_flight_status,
        503,
        409,
        "in_flight_status = 200",
        "must be 409 or 429 or 503",
    ),
    "upstream_idempotent": (
        "upstream_idempotent = true",
        lambda rule: rule.policy.upstream_idempotent,
        True,
        False,
        "upstream_idempotent = 1",
        "must be True or False",
    ),
    "upstream_key_retention_s": (
        "upstream_key_retention_s = 21600\nupstream_idempotent = true",
        lambda rule: rule.policy.upstream_key_retention_ms,
        21_600_000,
        86_400_000,
        "upstream_key_retention_s = 0.5",
        "must be a number of seconds from 1 to",
    ),
    "retry_mark": (
        'retry_mark = "header:Svix-Retry-Count"\nkey = "derived:60"',
        lambda rule: rule.policy.sources and rule.policy.sources.retry_count_header,
        b"svix-retry-count",
        None,
        'retry_mark = "Svix-Retry-Count"',
        "must be header: and a name",
    ),
    "resumable": (
        "resumable = true",
        lambda rule: rule.policy.resumable,
        True,
        False,
        "resumable = 1",
        "True or False",
    ),
    "cancellable": (
        "cancellable = true",
        lambda rule: rule.policy.cancellable,
        True,
        False,
        'cancellable = "yes"',
        "must be True or False",
    ),
    "ask_keys": ("ask_keys = true", lambda rule: rule.policy.asks, True, False, 'ask_keys = "yes"', "true or false"),
    "resume_by_key": (
        "resume_by_key = true\nask_keys = true\nresumable = true",
        lambda rule: rule.policy.resume_by_key,
        True,
        False,
        "resume_by_key = 1",
        "must be True or False",
    ),
    "respond_async": (
        "respond_async = true",
        lambda rule: rule.policy.respond_async,
        True,
        False,
        "respond_async = 1",
        "must be True or False",
    ),
    "pages": ("pages = true", lambda rule: rule.policy.pages, True, None, 'pages = "yes"', "must be True or False"),
    "token_prices": (
        'token_prices = { output = 10, input = 2.5 }\npreset = "openai"',
        lambda rule: rule.policy.token_prices,
        (("input", 2.5), ("output", 10.0)),
        (),
        "token_prices = { inputs = 1 }",
        "has 'inputs', which is no kind of tokens; these are: input, cached, cache_write, output",
    ),
    "reconcile": (
        'reconcile = { url = "/{key}", keep = ["key"], reference = {}, succeeded = [{ status = "200" }] }',
        lambda rule: rule.policy.reconcile and (rule.policy.reconcile.names, rule.policy.keeps_more),
        ({"key"}, True),
        None,
        "reconcile = {}",
        "has no url",
    ),
    "note": (
        'note = "/order_id"',
        lambda rule: rule.policy.note and rule.policy.note.text,
        "body:/order_id",
        None,
        'note = "header:Authorization"',
        "'header:Authorization' must be a header field that can carry a key, such as Idempotency-Key",
    ),
    "forward_key": (
        'forward_key = "X-Id"',
        lambda rule: rule.policy.forward_key,
        b"X-Id",
        None,
        'forward_key = "Host"',
        "can carry a key",
    ),
    "on_bad_key": (
        'on_bad_key = "pass"',
        lambda rule: rule.policy.pass_bad_keys,
        True,
        False,
        "on_bad_key = true",
        "must be 'refuse' or 'pass'",
    ),
    "cors_origins": (
        'cors_origins = ["https://shop.example:443"]',
        lambda rule: rule.policy.adaptation.cors and rule.policy.adaptation.cors.origins.texts,
        ("https://shop.example",),
        None,
        'cors_origins = ["https://shop.example/"]',
        "an origin has a scheme, a host and maybe a port",
    ),
    "cors_credentials": (
        "cors_credentials = true",
        lambda rule: rule.settings.cors_credentials,
        True,
        False,
        'cors_credentials = "yes"',
        "true or false",
    ),
    "cors_by": (
        'cors_by = "api"',
        lambda rule: rule.settings.cors_by,
        "api",
        "auto",
        'cors_by = "me"',
        "must be 'auto', 'api' or 'oncegate'",
    ),
    "rewrite_location": (
        "rewrite_location = false",
        lambda rule: rule.policy.adaptation.addresses is not None,
        False,
        True,
        "rewrite_location = 1",
        "true or false",
    ),
    "rewrite_cookie_path": (
        "rewrite_cookie_path = true",
        lambda rule: rule.policy.adaptation.cookies is not None,
        True,
        False,
        "rewrite_cookie_path = 1",
        "true or false",
    ),
    "cookie_domain": (
        'cookie_domain = "drop"',
        lambda rule: rule.policy.adaptation.cookies and rule.policy.adaptation.cookies.domain,
        "drop",
        None,
        'cookie_domain = "a b"',
        "must be a domain such as shop.example, or drop",
    ),
    "replay_cookies": (
        "replay_cookies = true",
        lambda rule: rule.policy.adaptation.replays_cookies,
        True,
        False,
        "replay_cookies = 1",
        "must be True or False",
    ),
    "resume": (
        "resume = true",
        lambda rule: (rule.policy.resume, rule.policy.asks_identity),
        (True, True),
        (False, False),
        'resume = "yes"',
        "must be True or False",
    ),
    "sse_ids": (
        "resume = true\nsse_ids = true",
        lambda rule: rule.policy.sse_ids,
        True,
        False,
        "sse_ids = 1",
        "must be True or False",
    ),
    "upstream_timeout_s": (
        "upstream_timeout_s = 60",
        lambda rule: rule.settings.upstream_timeout_s,
        60,
        300,
        'upstream_timeout_s = "60"',
        "must be a number",
    ),
    "max_request_bytes": (
        "max_request_bytes = 10",
        lambda rule: rule.policy.max_request_bytes,
        10,
        33_554_432,
        "max_request_bytes = 1.5",
        "must be a whole number",
    ),
    "max_stored_bytes": (
        "max_stored_bytes = 10",
        lambda rule: rule.policy.max_stored_bytes,
        10,
        16_777_216,
        "max_stored_bytes = true",
        "whole number",
    ),
}


def test_every_field_has_its_row():
    assert CASES.keys() == RULE.keys()


@pytest.mark.parametrize("field", CASES)
def test_a_field(rules, field):
    """A field sets its part of the policy. Without it, the value of the settings holds."""
    written, look, value, default, _, _ = CASES[field]
    text = one(written) if field != "name" else f"[[rule]]\n{written}"
    assert look(rules(text, secret="some secret bytes").rules[0]) == value
    assert look(rules(one('path = "/"' if field != "path" else "")).rules[0]) == default


@pytest.mark.parametrize(
    ("settings", "refused_s", "unknown_s", "longest_s"),
    [
        ({}, 0, 7_776_000, 7_776_000),
        ({"tombstone_s": 9}, 9, 7_776_000, 7_776_000),
        ({"tombstone_s": 10_000_000}, 10_000_000, 10_086_400, 10_086_400),
        ({"tombstone_s": 9, "on_unknown": "retry"}, 9, 86_400, 86_409),
        ({"tombstone_s": 9, "unknown_retention_s": 0}, 9, FOREVER_MS / 1000, FOREVER_MS / 1000),
    ],
)
def test_an_unknown_key_is_not_free_before_a_complete_one(rules, settings, refused_s, unknown_s, longest_s):
    """It is kept at least as long as a complete record and its tombstone, but where a retry executes anyway."""
    (rule,) = rules(one(""), **settings).rules
    assert (rule.policy.tombstone_ms, rule.policy.unknown_retention_ms) == (refused_s * 1000, unknown_s * 1000)
    assert longest_ms(rule.settings) == longest_s * 1000


@pytest.mark.parametrize("field", CASES)
def test_a_bad_field(errors, field):
    """A bad field is refused with file, line, rule, field and reason."""
    *_, wrong, expected = CASES[field]
    if field == "name":
        (error,) = errors(f"[[rule]]\n{wrong}")
        assert error.startswith('rules.toml:2: rule "": name: ')
    else:
        (error,) = errors(one(wrong))
        assert error.startswith(f'rules.toml:3: rule "r": {field}: ')
    assert expected in error


@pytest.mark.parametrize("name", [name for name in RULE if name not in ("headers", "name")])
@pytest.mark.parametrize("value", ["{ a = 1 }", "1979-05-27", "[[1]]", "-7"])
def test_a_field_of_another_kind(errors, name, value):
    """A TOML value of the wrong type is a complaint, never a crash."""
    assert errors(one(f"{name} = {value}"))[0].startswith(f'rules.toml:3: rule "r": {name}: ')


UPSTREAM_CASES = {
    "name": ('name = "b"', "b", None, 'name = ""', "visible"),
    "url": ('url = "http://b.test"', Origin("http", "b.test", 80), None, 'url = "b.test"', "must be http://"),
    "ca_file": ('ca_file = "a.pem"', Path("a.pem"), None, 'ca_file = "none.pem"', "cannot be read"),
    "cert_file": ('cert_file = "a.pem"\nkey_file = "a.pem"', Path("a.pem"), None, "cert_file = 1", "text in quotes"),
    "key_file": (
        'cert_file = "a.pem"\nkey_file = "a.pem"',
        Path("a.pem"),
        None,
        'key_file = "no.pem"',
        "cannot be read",
    ),
    "connect_timeout_s": ("connect_timeout_s = 1", 1, 5, "connect_timeout_s = 0", "greater than 0"),
    "connect_retries": ("connect_retries = 0", 0, 3, "connect_retries = 21", "at most 20"),
    "max_connections": ("max_connections = 2", 2, 1200, "max_connections = 0", "at least 1"),
    "reuse_idle_s": ("reuse_idle_s = 0", 0, 1, "reuse_idle_s = -1", "at least 0"),
    "was": ('was = ["a", "c"]', "a", "b", 'was = "a"', "must be a list of names"),
    "direct": ("direct = true", True, False, "direct = 1", "must be True or False"),
    "via": ('via = ["Edge"]', ("edge",), (), 'via = ["1.1 edge"]', "must be a name as Via has it"),
    "rest_s": ("rest_s = 0", 0, 0.2, "rest_s = -1", "at least 0"),
    "spare_connections": ("spare_connections = 8", 8, None, "spare_connections = -1", "at least 0"),
}


@pytest.mark.parametrize("field", UPSTREAM_CASES)
def test_a_field_of_an_upstream(rules, errors, tmp_path, field):
    """An [[upstream]] has its own address and limits. The settings are its defaults, except for TLS files."""
    assert UPSTREAM_CASES.keys() == UPSTREAM.keys()
    (tmp_path / "a.pem").write_text("x")
    (tmp_path / "env.pem").write_text("x")
    env = {"upstream": "https://api.test", "upstream_ca_file": "env.pem"}
    written, value, default, wrong, expected = UPSTREAM_CASES[field]
    base = {"name": 'name = "b"', "url": 'url = "https://b.test"'}
    rule = '\n[[rule]]\nname = "r"\nupstream = "b"'

    def text(*lines: str) -> str:
        return "[[upstream]]\n" + "\n".join([line for name, line in base.items() if name != field] + list(lines)) + rule

    attribute = {"url": "origin", "was": "known_as"}.get(field, field)
    assert getattr(rules(text(written), **env).rules[0].upstream, attribute) == value
    if field not in base:
        assert getattr(rules(text(), **env).rules[0].upstream, attribute) == default
        assert OF_UPSTREAMS.get(field, field) in Settings.model_fields or field in (
            *("was", "direct", "via"),
            *("ca_file", "cert_file", "key_file"),
        )
    found = errors(text(wrong), **env)
    assert any(f" {field}: " in error and expected in error for error in found), found


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset(rules, name):
    """A rule can have a preset alone. The preset's fields are in effect, and the rule's own override them."""
    (rule,) = rules(one(f'preset = "{name}"')).rules
    fields = PRESETS[name].fields
    assert rule.policy.preset == name
    assert rule.settings.retention_s == fields["retention_s"]
    assert rule.policy.mode == fields.get("on_unknown", "hold").encode()
    assert rule.policy.wait_for_duplicates is (fields.get("on_duplicate") in ("wait", "join"))
    assert rule.policy.joins_duplicates is (fields.get("on_duplicate") == "join")
    (other,) = rules(one(f'preset = "{name}"\nretention_s = 100000\nnamespace = "n"\nkey = "header:K"')).rules
    assert (other.policy.retention_ms, other.policy.namespace, other.policy.key_header) == (100_000_000, b"n", b"k")
    assert other.policy.statuses.entries(Disposition.RELEASE) == rule.policy.statuses.entries(Disposition.RELEASE)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_no_more_than_a_rule_could(name):
    """A preset has the fields of a rule. Only SDKs that count each try are reserved for presets."""
    preset = PRESETS[name]
    assert preset.fields.keys() <= RULE.keys() - {"name", "path", "host", "methods", "headers", "preset", "upstream"}
    for field, value in preset.fields.items():
        RULE[field](value)
    assert preset.about
    assert preset.caution
    assert (preset.retry_count_header is not None) is (name in ("openai", "anthropic"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_duplicate_waits_under_every_preset(rules, name):
    """Presets are for SDKs, agents, forms and webhooks, which take a 409 for a failure: under each, duplicates wait."""
    policy = rules(one(f'preset = "{name}"')).rules[0].policy
    assert policy.wait_for_duplicates
    assert policy.wait_max_s > 0


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].fields.get("scope") == []])
def test_what_holds_for_every_webhook(rules, name):
    """For a webhook, the id alone is the key, any status but 2xx releases it, and duplicates wait, then get 503."""
    policy = rules(one(f'preset = "{name}"')).rules[0].policy
    assert (policy.scope_headers, policy.fingerprint, policy.mode) == ((), frozenset(), b"retry")
    assert {policy.statuses.read(status, {}) for status in range(300, 600)} == {Disposition.RELEASE}
    assert {policy.statuses.read(status, {}) for status in range(200, 300)} == {Disposition.STORE}
    assert (policy.in_flight_status, policy.wait_for_duplicates, policy.pass_bad_keys) == (503, True, True)
    assert policy.namespace == name.encode()
    assert all("receiver" in [source.text for source in one] for one in policy.sources.alternatives)


def test_every_problem_at_once(errors):
    """All mistakes of a file are reported together, in the order of its lines."""
    text = """
[[upstream]]
name = "shop"
url = "http://a.test"

[[upstream]]
name = "shop"
url = "http://b.test"
retries = 1

[[rule]]
name = "a"
path = "/v1/**"
key = ["body:id", "derived:0"]

[[rule]]
name = "a"
path = "/v1/x"
retension_s = 1
upstream = "nobody"

[[rule]]
path = "/v2"
lists = [
  "retention_s = 1",
]
retention_s = 5
wait_max_s = 10
"""
    assert errors(text) == [
        'rules.toml:7: upstream "shop": name: is the name of another upstream as well',
        'rules.toml:9: upstream "shop": retries: is unknown; did you mean connect_retries?',
        "rules.toml:14: rule \"a\": key: 'body:id' must be a JSON pointer that begins with /, such as /data/id",
        'rules.toml:16: rule "a": can never match: rule "a" (line 11) comes first and matches all of its requests',
        'rules.toml:17: rule "a": name: is the name of another rule as well',
        'rules.toml:19: rule "a": retension_s: is unknown; did you mean retention_s?',
        "rules.toml:22: rule 3: has no name",
        "rules.toml:24: rule 3: lists: is unknown; did you mean in_flight_status?",
    ]


CONTRADICTIONS = {
    "a retention shorter than the wait": (
        "retention_s = 20\nwait_max_s = 21",
        "retention_s: must not be shorter than wait_max_s",
    ),
    "a wait longer than the retention": (
        "wait_max_s = 90000",
        "wait_max_s: retention_s must not be shorter than wait_max_s",
    ),
    "a retention shorter than the lease": (
        "retention_s = 9\nwait_max_s = 1",
        "retention_s: must not be shorter than ONCEGATE_LEASE_MS",
    ),
    "a retention shorter than a preset's wait": (
        'preset = "double-click"\nretention_s = 29',
        "must not be shorter than wait_max_s",
    ),
    "more stored than buffered": (
        "max_stored_bytes = 268435457",
        "must not be larger than ONCEGATE_MAX_BUFFERED_BYTES",
    ),
    "a request larger than the spool": (
        "max_request_bytes = 1073741825",
        "must not be larger than ONCEGATE_MAX_SPOOL_BYTES",
    ),
    "a window longer than the retention": (
        'key = "derived:60"\nretention_s = 59',
        "window longer than retention_s",
    ),
    "a window of zero": ('key = "derived:0"', "not over 0"),
    "required and pass": ('guard = "required"\non_bad_key = "pass"', "a request without a key cannot pass"),
    "the id of a JSON-RPC request as key": ('preset = "json-rpc"\nkey = "body:/id"', "key: names the id of a JSON-RPC"),
    "the id as a part of a key": ('preset = "mcp"\nkey = ["header:A", "a=body:/id"]', "which is new in each try"),
    "a whole JSON-RPC body": ('protocol = "json-rpc"', "fingerprint: has the id of a JSON-RPC request"),
    "all values of a JSON-RPC body": (
        'preset = "mcp"\nfingerprint = ["body-json"]',
        "has the id of a JSON-RPC request",
    ),
    "a grace that is too short for a call": (
        'preset = "mcp"\non_client_gone = "cancel"\ncancel_grace_s = 59',
        "at least 60",
    ),
    "a derived key of nothing": (
        'preset = "mcp"\nkey = "derived:9"\nfingerprint = ["target"]',
        "names nothing of the body",
    ),
    "any page with credentials": (
        'cors_origins = ["*"]\ncors_credentials = true',
        "must not be set beside * in cors_or",
    ),
    "an address without a guard": ('resumable = true\nguard = "off"', "only a response with a key is stored"),
    "an address without a secret": ("resumable = true", "needs ONCEGATE_SECRET"),
    "a stop without a secret": ("cancellable = true", "needs ONCEGATE_SECRET"),
    "a 202 without a secret": ("respond_async = true", "needs ONCEGATE_SECRET"),
    "a stop without a guard": ('cancellable = true\nguard = "off"', "only a response with a key is stored"),
    "cookies for all": ("replay_cookies = true\nscope = []", "credentials and cookies alone"),
    "cookies for an account": ('replay_cookies = true\nscope = ["header:X-Account"]', "credentials and cookies alone"),
    "cookies for a shop": (
        'replay_cookies = true\nscope = ["known", "header:X-Shop"]',
        "credentials and cookies alone",
    ),
    "cookies for a path": ('replay_cookies = true\nscope = ["known", "path:1"]', "credentials and cookies alone"),
    "cookies for a receiver": ('replay_cookies = true\npreset = "sns"', "credentials and cookies alone"),
    "a mark without a window": ('retry_mark = "header:X-Retry"\nkey = "header:A"', "needs derived: in key"),
    "a mark without a key": ('retry_mark = "header:X-Retry"', "needs derived: in key"),
    "a mark that is the key": (
        'retry_mark = "header:A"\nkey = [["header:a"], ["derived:9"]]',
        "is a header that the key is read from",
    ),
    "a host passed and set": ('pass_host = true\nset_host = "a.test"', "contradicts pass_host"),
    "a guard of what cannot be": ('methods = ["GET"]\nguard = "required"', "none that can be guarded"),
    "a key of what cannot be": ('methods = ["GET"]\nkey = "header:A"', "none that can be guarded"),
    "a key in the request's id": ('key = ["header:x-request-id", "header:A"]', "ONCEGATE_REQUEST_ID_HEADER"),
    "a request's id in a fingerprint": ('fingerprint = ["body", "header:X-Request-Id"]', "ONCEGATE_REQUEST_ID_HEADER"),
    "ids that nobody reads": ("sse_ids = true", "sse_ids: needs resume = true or resumable"),
    "a stream without a key": ('guard = "off"\nresume = true', 'resume: contradicts guard = "off"'),
    "a stream of JSON-RPC": ('preset = "mcp"\nresume = true', "resume: contradicts protocol"),
    "the last event in a fingerprint": (
        'resume = true\nfingerprint = ["body", "header:Last-Event-ID"]',
        "fingerprint: takes Last-Event-ID",
    ),
    "the last event as a key": (
        'resume = true\nkey = ["header:last-event-id", "header:A"]',
        "key: takes Last-Event-ID",
    ),
    "the last event in a scope": ('resume = true\nscope = ["header:Last-Event-ID"]', "scope: takes Last-Event-ID"),
    "a joined key forwarded": ('key = ["header:A", "path:1"]\nforward_key = "B"', "one header alone"),
    "a body's key forwarded": ('key = "body:/id"\nforward_key = ""', "one header alone"),
    "idempotent without the key": ('upstream_idempotent = true\nforward_key = ""', "gets the key"),
    "a retention of no keys": ("upstream_key_retention_s = 60", "needs upstream_idempotent beside it"),
    "idempotent with a derived key": ('upstream_idempotent = true\nkey = "derived:1"', "gets the key"),
    "the key as scope": ('key = "header:A"\nscope = ["header:a"]', "one header for the key and"),
    "the usual key as scope": ('scope = ["header:idempotency-key"]', "say whose request it is"),
    "a known credential as key": ('key = "header:X-Goog-Api-Key"', "one header for the key and for the tenant"),
    "agents without a heartbeat": ('heartbeat_agents = ["curl/*"]', "needs heartbeat_s beside it"),
    "no agents": ("heartbeat_s = 5\nheartbeat_agents = []", "is an empty list"),
    "a grace of nothing": ('on_client_gone = "finish"\ncancel_grace_s = 5', 'needs on_client_gone = "cancel"'),
    "a cookie as key": ('key = "cookie:session"', "is not a source"),
    "a field of this hop as key": ('key = ["header:Via", "path:1"]', "can carry a key"),
    "a field of the message as scope": ('scope = ["header:Content-Type"]', "say whose request it is"),
    "a scope twice": ('scope = ["known", "known"]', "has the same member twice"),
    "one status in both lists": ('release_statuses = ["500"]\nambiguous_statuses = ["500"]', "is in both lists"),
    "an upstream that is not there": ('upstream = "shop"', "neither a URL nor the name"),
    "a source twice": ('key = ["header:A", "header:a"]', "has the same member twice"),
    "an identity twice": ('key = ["id=header:A", "id=body:/a"]', "names one identity twice in one list"),
    "a receiver alone": ('key = [["header:A"], ["receiver"]]', "has receiver without a source beside it"),
    "no source": ("key = []", "names no source"),
    "an empty alternative": ('key = [["header:A"], []]', "names no source"),
    "no methods": ("methods = []", "is an empty list; leave it out for all methods"),
    "an address in answers that nobody gives": (
        "resume_by_key = true\nresumable = true",
        "needs ask_keys and resumable",
    ),
    "an address in answers about nothing": ("resume_by_key = true\nask_keys = true", "needs ask_keys and resumable"),
    "questions that nobody may ask": ("ask_keys = true\nscope = []", "needs a scope"),
    "a 202 for a call": ('preset = "mcp"\nrespond_async = true', "contradicts protocol"),
    "a 202 for what is not stored": ('guard = "off"\nrespond_async = true', "only a response with a key is stored"),
    "a header twice": ('headers = { "A" = "1", "a" = "2" }', "has the same header twice"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_does_not_fit_together(errors, case):
    """A rule that contradicts itself or the settings is refused by its name."""
    text, expected = CONTRADICTIONS[case]
    found = errors(one(text), **({} if "secret" in case else {"secret": "some secret bytes"}))
    assert len(found) == 1
    assert ': rule "r": ' in found[0]
    assert expected in found[0]


NEVER = {
    "the same": ('path = "/a"', 'path = "/a"', True),
    "any path": ("", 'path = "/a"', True),
    "a wider path": ('path = "/a/**"', 'path = "/a/*/c"', True),
    "a narrower path": ('path = "/a/b"', 'path = "/a/*"', False),
    "another host": ('host = "a.test"', 'host = "b.test"', False),
    "a wider host": ('host = "*.test"', 'host = "a.test"', True),
    "any host": ('path = "/a"', 'path = "/a"\nhost = "a.test"', True),
    "fewer methods": ('methods = ["POST"]', 'methods = ["POST", "PUT"]', False),
    "more methods": ('methods = ["POST", "PUT"]', 'methods = ["POST"]', True),
    "all methods": ('methods = ["POST"]', "", False),
    "a header": ('headers = { A = "1" }', "", False),
    "a wider header": ('headers = { A = "1*" }', 'headers = { a = "12*", b = "x" }', True),
    "another header": ('headers = { A = "1*" }', 'headers = { b = "x" }', False),
}


@pytest.mark.parametrize("case", NEVER)
def test_a_rule_that_can_never_match(rules, errors, case):
    """A rule that can never match is refused, with the rule that matches all its requests. Rules may overlap."""
    first, second, never = NEVER[case]
    text = f'[[rule]]\nname = "first"\n{first}\n\n[[rule]]\nname = "second"\n{second}\n'
    if never:
        line = text[: text.rindex("[[rule]]")].count("\n") + 1
        assert errors(text) == [
            f'rules.toml:{line}: rule "second": can never match: '
            'rule "first" (line 1) comes first and matches all of its requests'
        ]
    else:
        assert len(rules(text).rules) == 2


def test_a_host_that_is_not_ours(rules, errors):
    """A rule for a host that ONCEGATE_HOSTS does not have can never match, and is refused."""
    (error,) = errors(one('host = "b.test"'), hosts="a.test,c.test:80")
    assert "ONCEGATE_HOSTS does not have this host" in error
    for host in ("a.test", "a.test:80", "*.test", "c.test:80"):
        rules(one(f'host = "{host}"'), hosts="a.test,c.test:80")


FILES = {
    "nothing": (" \n", ["rules.toml: is empty; to serve without rules"]),
    "comments alone": ("# nothing yet\n", []),
    "a byte order mark": (b"\xef\xbb\xbf# nothing yet", []),
    "no TOML": ("[[rule]]\nname = ", ["rules.toml:2: is not TOML: "]),
    "a field twice": ('[[rule]]\nname = "a"\nname = "b"', ["rules.toml:3: is not TOML: "]),
    "no UTF-8": (b'[[rule]]\nname = "\xff"', ["rules.toml: cannot be read as UTF-8 text"]),
    "another table": ("[[rules]]\nname = 1", ["rules.toml:1: rules is unknown; a rules file has"]),
    "a loose field": ('\nupstream_x = "a"', ["rules.toml:2: upstream_x is unknown"]),
    "one rule alone": ('[rule]\nname = "a"', ["rules.toml:1: rule must be written as [[rule]]"]),
    "a rule that is none": ("rule = [1]", ["rules.toml:1: rule must be written as [[rule]]"]),
    "deep": ("a = " + "[" * 5000, ["rules.toml"]),
    "a text that looks like rules": (
        '[[rule]]\nname = "a"\npath = """\n[[rule]]\nname = 1\n"""',
        ['rules.toml:3: rule "a": path: '],
    ),
    "inline": ('rule = [{ name = "a", path = "b" }]', ['rules.toml:1: rule "a": path: ']),
    "in quotes": ('[["rule"]]\n"name" = "a"\n  "path" = "b"', ['rules.toml:3: rule "a": path: ']),
    "a table below": ('[[rule]]\nname = "a"\n[rule.headers]\n"A b" = "c"', ['rules.toml:3: rule "a": headers: ']),
    "an upstream without": (
        "[[upstream]]",
        ["rules.toml:1: upstream 1: has no name", "rules.toml:1: upstream 1: has no url"],
    ),
    "half a certificate": (
        '[[upstream]]\nname = "a"\nurl = "https://a"\nkey_file = "rules.toml"',
        ['rules.toml:4: upstream "a": key_file: needs cert_file beside it'],
    ),
    "a CA without TLS": (
        '[[upstream]]\nname = "a"\nurl = "http://a"\nca_file = "rules.toml"',
        ['rules.toml:4: upstream "a": ca_file: needs https in url'],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file(rules, errors, case):
    """A file that is not a rules file is refused with the place. A file of comments has no rules."""
    text, expected = FILES[case]
    if not expected:
        assert rules(text).rules == ()
        return
    found = errors(text)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


WHEN = """
[[rule]]
name = "payments"
path = "/mcp"
when = { "body:/method" = "tools/call", "body:/params/name" = "pay*" }
[[rule]]
name = "calls"
path = "/mcp"
when = { "body:/method" = ["tools/call", "prompts/get"] }
[[rule]]
name = "all"
path = "/mcp"
"""


def test_a_body_chooses_the_rule(rules):
    """A rule with `when` waits for the body; a body that does not meet it, or cannot be read, falls to the next."""
    loaded, asked = rules(WHEN), head(b"/mcp")
    assert loaded.choose(asked) is None
    assert loaded.choose(head(b"/other")) is loaded.default

    def name(document: object) -> str:
        return loaded.choose(asked, read_document({}, json.dumps(document).encode())).name

    call = {"method": "tools/call", "params": {"name": "pay_bill"}}
    assert name(call) == "payments"
    assert name([{"method": "ping"}, call]) == "payments"  # one of a batch is enough
    assert name([{"method": "tools/call"}, {"params": {"name": "pay"}}]) == "calls"  # not two that share them
    assert name({"method": "tools/call", "params": {"name": 1}}) == "calls"
    assert name({"method": "ping"}) == name([]) == name("tools/call") == name({"method": ["tools/call"]}) == "all"
    assert loaded.choose(asked, NO_BODY).name == "all"
    why = [(rule.name, reason) for rule, reason in loaded.passed_over(asked, read_document({}, b'{"method":"a"}'))]
    assert why == [
        ("payments", "the value at /method is another one"),
        ("calls", "the value at /method is another one"),
    ]


UNREAD = {
    b'{"method":"tools/call","method":"ping"}': "the body has no single value at /method",
    b"{": "the body is not JSON in UTF-8",
    b'{"method":"\\ud800"}': "the value at /method is another one",
    b"[" * 100 + b"]" * 100: "the body is nested deeper than 64",
}


@pytest.mark.parametrize("body", UNREAD)
def test_a_body_that_meets_no_condition(rules, body):
    """A body that can be read in two ways, or not at all, meets no condition, and `check` says why."""
    loaded, asked = rules(WHEN), head(b"/mcp")
    document = read_document({}, body)
    assert loaded.choose(asked, document).name == "all"
    assert {reason for _, reason in loaded.passed_over(asked, document)} == {UNREAD[body]}


def test_a_body_that_need_not_be_read():
    """A body over 1 MiB, or one that is encoded, chooses no rule: the request is not held back for it."""
    assert unread_document({}, 0) is NO_BODY
    assert unread_document({}, 10) is None
    assert unread_document({}, None) is None  # of unknown length
    assert "over 1048576 bytes" in unread_document({}, 1_048_577).detail
    assert "encoded" in unread_document({b"content-encoding": [b"gzip"]}, None).detail
    assert "over" in read_document({}, b"", spooled=True).detail


def test_which_rules_hide_another(rules, errors):
    """A rule without `when` hides a later one with it, and so does a wider condition; a narrower one does not."""
    assert len(rules(WHEN).rules) == 3
    for first, second in (
        ("", 'when = { "body:/a" = "x" }'),
        ('when = { "body:/a" = "x*" }', 'when = { "body:/a" = "xy" }'),
    ):
        text = one(f'path = "/a"\n{first}\n') + one(f'path = "/a"\n{second}').replace('"r"', '"s"')
        assert "can never match" in errors(text)[0]
    # Which body has which key depends on it, so that proxies compare it.
    plain, by_body = (rules(one(f'path = "/a"\nkey = "header:A"\n{when}')) for when in ("", second))
    assert plain.identity_digest != by_body.identity_digest


def test_the_fingerprint_of_json_rpc_names_derived_keys(rules):
    """Proxies compare it where it makes keys, and there alone."""

    def digest(key: str, part: str) -> str:
        fingerprint = f'fingerprint = ["body:/method", "body:/{part}"]'
        return rules(one(f'protocol = "json-rpc"\n{fingerprint}\nkey = "{key}"')).identity_digest

    assert digest("derived:9", "a") != digest("derived:9", "b")
    assert digest("header:A", "a") == digest("header:A", "b")


def test_a_file_that_cannot_be_read(tmp_path):
    """A file that vanished or is too large is refused."""
    settings = Settings(upstream=URL).model_copy(update={"rules_file": tmp_path / "none.toml"})
    with pytest.raises(SettingsError, match=r"none\.toml: cannot be read: No such file"):
        load_rules(settings)
    (tmp_path / "big.toml").write_bytes(b"#" * 5_000_000)
    with pytest.raises(SettingsError, match="is over"):
        load_rules(settings.model_copy(update={"rules_file": tmp_path / "big.toml"}))


def chosen(rules: Rules, *asked: RequestHead) -> list[str]:
    return [(rules.choose(one) or rules.default).name for one in asked]


def test_the_first_that_matches_decides(rules):
    """The first rule that matches host, path, methods and headers decides. Where none does, the settings hold."""
    found = rules(
        """
[[rule]]
name = "stripe"
path = "/hooks/stripe"
headers = { "User-Agent" = "Stripe/*" }
[[rule]]
name = "hooks"
path = "/hooks/*"
methods = ["POST"]
[[rule]]
name = "shop"
host = "shop.test"
[[rule]]
name = "rest"
path = "/**/x"
"""
    )
    assert chosen(
        found,
        head(b"/hooks/stripe", user_agent=b"Stripe/1.0"),
        head(b"/hooks/stripe", user_agent=b"curl"),
        head(b"/hooks/stripe"),
        head(b"/%68ooks//a/../stripe?x", method="POST"),
        head(b"/hooks/stripe", method="GET"),
        head(b"/hooks/stripe", method="GET", host=b"SHOP.test:80"),
        head(b"/a/x?y"),
        head(b"/"),
    ) == ["stripe", "hooks", "hooks", "hooks", "", "shop", "rest", ""]


def test_every_line_of_a_header_has_to_match(rules):
    """A header matches only if each of its lines does."""
    found = rules(one('headers = { A = "1" }'))
    twice = [(b"a", b"1"), (b"A", b"2")]
    assert chosen(found, head(a=b"1"), head()._replace(pairs=twice, fields=by_name(twice))) == ["r", ""]


METHODS = {
    "": {"POST", "PATCH"},
    'methods = ["POST", "GET"]': {"POST"},
    'methods = ["PUT", "DELETE"]': {"PUT", "DELETE"},
    'methods = ["GET"]': set(),
    'guard = "off"': set(),
    'guard = "off"\nmethods = ["POST"]': set(),
}


@pytest.mark.parametrize("text", METHODS)
def test_what_a_rule_guards(rules, text):
    """A rule guards those of its methods that can be guarded. Without `methods`, it guards those of the settings."""
    (rule,) = rules(one(text)).rules
    assert rule.policy.methods == METHODS[text]
    assert rule.policy.methods <= set(GUARDABLE)


def test_the_environment_gives_the_defaults(rules):
    """A rule without fields has the policy of the settings."""
    env = {"key_required": True, "namespace": "n", "methods": "PUT", "key_header": "K", "scope_headers": "S"}
    found = rules(one(""), retention_s=40, on_duplicate="wait", **env)
    assert found.rules[0].policy == replace(found.default.policy, rule="r")
    assert found.rules[0].upstream == found.default.upstream


def test_statuses_of_one_list_leave_the_other_alone(rules):
    """A status in one list of a rule is no longer in the other default list."""
    statuses = rules(one('release_statuses = ["502"]')).rules[0].policy.statuses
    assert statuses.read(502, {}) is Disposition.RELEASE
    assert statuses.read(504, {}) is Disposition.AMBIGUOUS
    statuses = rules(one('ambiguous_statuses = ["429", "5xx"]')).rules[0].policy.statuses
    assert statuses.read(429, {}) is Disposition.AMBIGUOUS
    assert statuses.read(401, {}) is Disposition.RELEASE


def test_default_stands_for_the_list_without_it(rules):
    """`default` is the settings' list, there and in a rule; an entry of the other list still leaves it."""
    env = {"release_statuses": "default,418"}
    text = one('release_statuses = ["default", "419"]\nambiguous_statuses = ["429", "default"]')
    found = rules(text, **env)
    assert found.default.policy.statuses.entries(Disposition.RELEASE) == [*RELEASE_STATUSES, "418"]
    statuses = found.rules[0].policy.statuses
    release = [entry for entry in RELEASE_STATUSES if entry != "429"]
    assert statuses.entries(Disposition.RELEASE) == [*release, "418", "419"]
    assert statuses.entries(Disposition.AMBIGUOUS) == ["429", *AMBIGUOUS_STATUSES]
    only = rules(one(""), release_statuses="502").rules[0].policy.statuses
    assert only.entries(Disposition.RELEASE) == ["502"]
    assert "502" not in only.entries(Disposition.AMBIGUOUS)


def test_a_503_is_released_where_the_api_itself_answers(rules):
    """`direct = true` on its upstream says so, for a preset that adds to the default as well; a rule can object."""
    fields = {b"retry-after": [b"1"]}

    def meaning(rule: str, upstream: str = "direct = true", **more: list[bytes]) -> Disposition:
        text = f'[[upstream]]\nname = "b"\nurl = "http://b.test"\n{upstream}\n{one("upstream = " + repr("b") + rule)}'
        statuses = rules(text).rules[0].policy.statuses
        return statuses.read(503, fields | {name.encode(): value for name, value in more.items()})

    assert meaning("", upstream="") is meaning('\npreset = "payments"', upstream="") is Disposition.AMBIGUOUS
    assert meaning("") is meaning('\npreset = "payments"') is Disposition.RELEASE
    assert meaning("\nambiguous_statuses = ['default', '503+retry-after']") is Disposition.AMBIGUOUS
    assert meaning("\nrelease_statuses = ['429']") is Disposition.AMBIGUOUS
    assert meaning("", via=[b"1.1 B-side"]) is Disposition.AMBIGUOUS
    assert meaning("", upstream="direct = true\nvia = ['B-Side']", via=[b"1.1 b-side"]) is Disposition.RELEASE


def test_an_idempotent_api_may_ask_for_a_retry(rules):
    """`x-should-retry: true` releases where the API is said to execute a key only once."""
    for text, expected in (("", Disposition.STORE), ("upstream_idempotent = true", Disposition.RELEASE)):
        statuses = rules(one(text)).rules[0].policy.statuses
        assert statuses.read(500, {b"x-should-retry": [b"true"]}) is expected


def test_payments_release_a_key_in_use(rules):
    """The API says that it still executes an earlier request: no result for a day."""
    statuses = rules(one('preset = "payments"')).rules[0].policy.statuses
    fields = {b"content-type": [b"application/json"]}
    assert statuses.read(409, fields, b'{"error":{"code":"idempotency_key_in_use"}}') is Disposition.RELEASE
    assert statuses.read(409, fields, b'{"error":{"code":"lock_timeout"}}') is Disposition.STORE


def test_one_header_alone_is_the_plain_key(rules):
    """A rule whose key is one header has a plain key header, and the same keys as without a rule."""
    policy = rules(one('key = "header:X-Id"')).rules[0].policy
    assert (policy.sources, policy.key_header) == (None, b"x-id")
    assert rules(one('key = [["header:X-Id"]]')).rules[0].policy == policy
    assert rules(one('key = ["header:X-Id"]')).rules[0].policy == policy


def test_all_fields_that_rules_act_on(rules):
    """`acted_on` has all header fields that keys, scopes and matches of the rules read."""
    found = rules(
        '[[rule]]\nname = "a"\nkey = [["header:A"], ["derived:1"]]\nheaders = { B = "*" }\nscope = ["header:C"]\n'
        '[[rule]]\nname = "b"\nkey = "header:D"\n[[rule]]\nname = "c"\npreset = "openai"\npath = "/c"'.replace(
            '[[rule]]\nname = "b"', '[[rule]]\nname = "b"\npath = "/b"'
        )
    )
    assert found.acted_on >= {b"a", b"b", b"c", b"d", b"x-stainless-retry-count", b"idempotency-key", b"authorization"}


def test_upstreams_with_equal_limits_are_one(rules):
    """A URL has the limits of the settings. Equal URLs share a pool, and a named upstream has its own."""
    found = rules(
        '[[upstream]]\nname = "b"\nurl = "http://b.test"\n'
        '[[rule]]\nname = "1"\npath = "/1"\nupstream = "http://b.test"\n'
        '[[rule]]\nname = "2"\npath = "/2"\nupstream = "http://B.test:80/"\n'
        '[[rule]]\nname = "3"\npath = "/3"\nupstream = "b"\n'
        '[[rule]]\nname = "4"\npath = "/4"\n'
        f'[[rule]]\nname = "5"\npath = "/5"\nupstream = "{URL}"\n'
    )
    one_, two, three, four, five = (rule.upstream for rule in found.rules)
    assert one_ == two
    assert hash(one_) == hash(two)
    assert len({one_, three, four}) == 3
    assert four == five == found.default.upstream


def test_the_parts_of_a_fingerprint(rules, errors):
    """A fingerprint names parts of the head, headers, and values of the body. The order of the list does not count."""
    wanted = 'fingerprint = ["method", "header:X-Account", "body:/a~1b", "body:/c"]'
    found = rules(one(wanted))
    policy = found.rules[0].policy
    assert policy.fingerprint == {"method", "header:x-account", "body:/a~1b", "body:/c"}
    assert [source.kind for source in policy.fingerprint_sources] == [
        Member(("a/b",)), Member(("c",)), Header(b"x-account"),
    ]  # fmt: skip
    assert b"x-account" in found.acted_on
    assert rules(one('fingerprint = ["body:/c", "body:/a~1b", "header:x-ACCOUNT", "method"]')).rules[0].policy == policy
    (document,) = rules(one('fingerprint = ["body-json"]')).rules[0].policy.fingerprint_sources
    assert document.kind == Member(())
    for wrong, said in {
        '"header:"': "must name header fields",
        '"header"': "is not a part of a fingerprint; the parts are method, host, target, type, body, body-json, ",
        '"header:a b"': "must name header fields",
        '"body:"': "is not a part",
        '"body:a"': "must be a JSON pointer",
        '"query:a"': "is not a part",
        '"body", "body-json"': "has body, which has all of body-json",
        '"body:/a", "body"': "has body, which has all of body:/a",
        '"body-json", "body:/a"': "has body-json, which has all of body:/a",
        '"header:A", "header:a"': "has the same member twice",
    }.items():
        (error,) = errors(one(f"fingerprint = [{wrong}]"))
        assert error.startswith('rules.toml:3: rule "r": fingerprint: ')
        assert said in error


# Where a rule leads its requests; two with the same letter lead them to one place.
PLACES = {
    "the settings'": ("", "a"),
    "the settings' once more": ("retention_s = 90", "a"),
    "the URL of the settings": (f'upstream = "{URL}"', "a"),
    "a URL": ('upstream = "http://b.test"', "b"),
    "the same URL": ('upstream = "http://B.test:80/"', "b"),
    "a path of it": ('upstream = "http://b.test/v1"', "c"),
    "a name": ('upstream = "shop"', "d"),
    "another name of the same URL": ('upstream = "stock"', "e"),
    "a new name": ('upstream = "green"', "d"),
    "a name for what was a URL": ('upstream = "named"', "b"),
    "a name for what was the settings'": ('upstream = "moved"', "a"),
    "another Host": ('upstream = "shop"\nset_host = "a.test"', "f"),
    "a third Host": ('upstream = "shop"\nset_host = "b.test"', "g"),
    "a Host for the settings' upstream": ('set_host = "a.test"', "h"),
}


def test_where_requests_go_is_known_by_upstream_and_host(rules):
    """Two rules lead to one place if upstream and Host are the same. A renamed upstream is known by its oldest name."""
    upstreams = {
        "shop": 'url = "http://d.test"',
        "stock": 'url = "http://d.test"',
        "green": 'url = "http://new.test"\nwas = ["shop", "blue"]',
        "named": 'url = "http://new.test"\nwas = ["http://b.test:80"]',
        "moved": 'url = "http://new.test"\nwas = [""]',
    }
    text = "".join(f'[[upstream]]\nname = "{name}"\n{fields}\n' for name, fields in upstreams.items())
    text += "".join(f'[[rule]]\nname = "{n}"\npath = "/{n}"\n{one}\n' for n, (one, _) in enumerate(PLACES.values()))
    places = {}
    for (case, (_, letter)), rule in zip(PLACES.items(), rules(text).rules, strict=True):
        assert places.setdefault(letter, rule.policy.destination) == rule.policy.destination, case
    assert len(set(places.values())) == len(places)


def test_shared_fields_are_settings():
    assert set(SHARED) <= Settings.model_fields.keys()
    assert isinstance(Rule.__doc__, str)


# What replicas must have in common ...


USUAL = '[[rule]]\nname = "a"\npath = "/a"\n'
SAME_NAMES = {
    "a name": USUAL.replace('"a"', '"other"', 1),
    "where they go and how long": USUAL + 'upstream = "http://u.test"\nretention_s = 99\non_unknown = "retry"',
    "what is required": USUAL + 'guard = "required"\nfingerprint = []\nrelease_statuses = ["5xx"]',
    "what the settings say anyway": USUAL + 'key = "header:Idempotency-Key"\nnamespace = "default"\nscope = ["known"]',
    "what is refused": USUAL + 'stable_schemes = ["DPoP"]',
    "no rule": "# none",
    "spaces and order": '[[rule]]\n\npath = "/a"\nname = "a"\nheaders = {}',
}
OTHER_NAMES = {
    "another header": USUAL + 'key = "header:X-Key"',
    "a source": USUAL + 'key = "body:/id"',
    "another source": USUAL + 'key = "body:/id2"',
    "joined": USUAL + 'key = ["body:/id", "body:/id2"]',
    "alternatives": USUAL + 'key = [["body:/id"], ["body:/id2"]]',
    "marked": USUAL + 'preset = "openai"',
    "a window": USUAL + 'key = "derived:3600"\nnamespace = "openai"',
    "a window for another upstream": USUAL + 'key = "derived:3600"\nnamespace = "openai"\nset_host = "u.test"',
    "an identity": USUAL + 'key = "id=header:X-Key"',
    "a receiver": USUAL + 'key = ["receiver", "header:X-Key"]',
    "another receiver": USUAL + 'key = ["receiver", "header:X-Key"]\nupstream = "http://u.test"',
    "a receiver of any host": USUAL + 'key = ["receiver", "header:X-Key"]\npass_host = true',
    "a namespace": USUAL + 'namespace = "n"',
    "no scope": USUAL + "scope = []",
    "a scope": USUAL + 'scope = ["header:X-Org"]',
    "another kind of scope": USUAL + 'scope = ["query:X-Org"]',
    "a cookie as scope": USUAL + 'scope = ["cookie:X-Org"]',
    "nothing guarded": USUAL + 'guard = "off"',
    "another method": USUAL + 'methods = ["PUT"]',
    "before another": USUAL + '[[rule]]\nname = "b"\nkey = "header:X-Key"',
    "after another": '[[rule]]\nname = "b"\nkey = "header:X-Key"\npath = "/a"\nhost = "h"\n' + USUAL,
    "another path": USUAL.replace("/a", "/b") + 'key = "header:X-Key"',
    "another host": USUAL + 'host = "h.test"\nkey = "header:X-Key"',
    "other headers": USUAL + 'headers = { "A" = "b" }\nkey = "header:X-Key"',
}


def test_what_names_keys_is_told_from_what_does_not(rules):
    """Two sets of rules have the same identity digest exactly if they name keys alike."""
    usual = rules(USUAL).identity_digest
    for case, text in SAME_NAMES.items():
        assert rules(text).identity_digest == usual, case
    others = [rules(text).identity_digest for text in OTHER_NAMES.values()]
    assert len({usual, *others}) == len(others) + 1
    assert rules(USUAL, methods="POST").identity_digest != usual
