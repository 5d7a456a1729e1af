"""`oncegate check`: the table of rules, and the explanation of one request that is not sent."""

from pathlib import Path

import pytest

from oncegate.commands.cli import main
from oncegate.settings.settings import Settings
from tests.admin_parts import tokens_file

RULES = """
[[upstream]]
name = "shop"
url = "https://shop.test:444/api"

[[rule]]
name = "orders"
path = "/v1/orders/**"
host = "api.test"
methods = ["POST", "GET"]
upstream = "shop"
guard = "required"
key = ["header:X-User", "body:/cart/id"]
scope = ["header:X-Org"]
fingerprint = ["body"]
on_duplicate = "wait"
wait_max_s = 7
upstream_idempotent = true

[[rule]]
name = "events"
path = "/events"
preset = "stripe-webhook"

[[rule]]
name = "llm"
path = "/llm"
preset = "openai"

[[rule]]
name = "click"
path = "/click"
key = "derived:10"
release_statuses = []

[[rule]]
name = "renamed"
path = "/renamed"
forward_key = "X-Id"
upstream_idempotent = true
set_host = "b.test"
"""
SECRET = "hunter2-the-canary"


@pytest.fixture
def check(tmp_path: Path, monkeypatch, capsys):
    """Run `oncegate check` with these arguments; return its exit code, its output and its error output."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ONCEGATE_{name.upper()}", raising=False)
    monkeypatch.setenv("ONCEGATE_UPSTREAM", "http://up.test")
    monkeypatch.setenv("ONCEGATE_RULES_FILE", "rules.toml")
    monkeypatch.setenv("ONCEGATE_LISTEN", "0.0.0.0:8080")
    Path("rules.toml").write_text(RULES)
    Path("other.json").write_text("{}")
    Path("digest.txt").write_text("Authorization: Digest a\n")
    Path("body.json").write_text('{"cart": {"id": 7}, "id": "evt_1"}')

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["check", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def explained(check, *arguments: str) -> dict[str, str]:
    code, out, err = check("--explain", *arguments)
    assert (code, err) == (0, "")
    return {word.strip(): text.strip() for word, _, text in (line.partition(":") for line in out.splitlines())}


def test_the_table_of_rules(check):
    """The table has all rules in their order, then the settings for requests without a rule."""
    code, out, _ = check()
    assert code == 0
    settings, table = out.split("\n\n")
    assert "ONCEGATE_RULES_FILE = rules.toml" in settings
    lines = table.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "rule", "orders", "events (stripe-webhook)", "llm (openai)", "click", "renamed", "(none matches)",
    ]  # fmt: skip
    assert [" ".join(line.split()) for line in lines[1:4]] == [
        "orders GET,POST api.test/v1/orders/** shop = https://shop.test:444/api required POST "
        "header:x-user + body:/cart/id default / x-org 86400 wait 7 s hold",
        "events (stripe-webhook) * /events http://up.test optional PATCH,POST receiver + body:/id stripe-webhook / all "
        "604800 wait 8 s retry",
        "llm (openai) * /llm http://up.test optional PATCH,POST header:idempotency-key else derived:3600 "
        "openai / known 3600 join 600 s retry",
    ]


PAIR = '[[rule]]\nname = "a"\npath = "/a"\n{0}\n[[rule]]\nname = "b"\npath = "/b"\n{0}\n{1}\n'
SHARED = (
    """warning: rules "a" and "b" share the namespace "default", and neither their keys nor their fingerprints have"""
)
SEVERAL = 'warning: rule "a" matches several paths, and neither its key nor its fingerprint has the path'
# Rules that may swallow the event of a second receiver, and such that do not.
RECEIVERS = {
    "one header": (PAIR.format("fingerprint = []", ""), SHARED),
    "a member": (PAIR.format('fingerprint = ["body"]\nkey = "body:/id"', ""), SHARED),
    "a preset with a key of its own": (
        PAIR.format('preset = "sns"\nkey = "body:/id"', ""),
        SHARED.replace("default", "sns"),
    ),
    "alternatives": (PAIR.format('fingerprint = []\nkey = [["body:/id"], ["header:A"]]', ""), SHARED),
    "several paths": ('[[rule]]\nname = "a"\npath = "/a/*"\nfingerprint = []', SEVERAL),
    "any path": ('[[rule]]\nname = "a"\npreset = "sns"\nkey = "body:/id"', SEVERAL),
    "other namespaces": (PAIR.format("fingerprint = []", 'namespace = "n"'), None),
    "other sources": (PAIR.format("fingerprint = []", 'key = "body:/id"'), None),
    "receivers": (PAIR.format('fingerprint = []\nkey = ["receiver", "body:/id"]', ""), None),
    "presets": (PAIR.format('preset = "sns"', ""), None),
    "one with a target": (PAIR.format("", "fingerprint = []"), None),
    "the usual fingerprint": (PAIR.format("", ""), None),
    "one not guarded": (PAIR.format("fingerprint = []", 'guard = "off"'), None),
    "several paths told by a segment": (
        '[[rule]]\nname = "a"\npath = "/a/*"\nfingerprint = []\nkey = ["path:2", "header:A"]',
        None,
    ),
}


@pytest.mark.parametrize("case", RECEIVERS)
def test_a_warning_of_two_receivers(check, case):
    """`check` warns of rules that would take one event for two receivers as the same."""
    text, said = RECEIVERS[case]
    Path("rules.toml").write_text(text)
    code, out, err = check()
    assert code == 0
    assert "ONCEGATE_RULES_FILE" in out
    assert err.startswith(said) and err.count("\n") == 1 if said else err == ""


@pytest.mark.parametrize(
    ("listen", "settings", "warns"),
    [
        *[(listen, {}, True) for listen in ("127.0.0.1:8080", "127.8.8.8:1", "[::1]:8080", "localhost:8080")],
        *[(listen, {}, False) for listen in ("0.0.0.0:8080", "[::]:8080", "192.0.2.1:8080", "gateway:8080")],
        ("127.0.0.1:8080", {"HOSTS": "localhost"}, False),
        ("127.0.0.1:8080", {"PASS_HOST": "true"}, False),
    ],
)
def test_a_warning_of_any_host_on_loopback(check, monkeypatch, listen, settings, warns):
    """A local API that checks its Host sees none of a page's: `check` says so where the hosts are not limited."""
    monkeypatch.delenv("ONCEGATE_RULES_FILE")
    for name, value in {"LISTEN": listen, **settings}.items():
        monkeypatch.setenv(f"ONCEGATE_{name}", value)
    code, _, err = check()
    assert (code, err.startswith("warning: ONCEGATE_HOSTS is empty"), err != "") == (0, warns, warns)


@pytest.mark.parametrize(("listen", "warns"), [("127.0.0.1:8081", False), ("0.0.0.0:8081", True)])
def test_a_warning_of_tokens_without_tls(check, monkeypatch, tmp_path, listen, warns):
    """`check` says where others can read tokens on their way."""
    monkeypatch.delenv("ONCEGATE_RULES_FILE")
    settings = {"HOSTS": "localhost", "ADMIN_LISTEN": listen, "ADMIN_TOKENS_FILE": tokens_file(tmp_path)}
    for name, value in settings.items():
        monkeypatch.setenv(f"ONCEGATE_{name}", str(value))
    code, _, err = check()
    assert (code, err.startswith("warning: ONCEGATE_ADMIN_TLS_CERT_FILE is not set"), err != "") == (0, warns, warns)


@pytest.mark.parametrize(
    ("absent", "warns"), [('status = "404"', True), ('status = "404", when = {"/code" = "missing"}', False)]
)
def test_a_warning_of_an_answer_that_any_url_gives(check, absent, warns):
    """A mistyped URL answers 404 about every key: `check` says so before the rule frees one."""
    Path("rules.toml").write_text(
        f"""[[rule]]\nname = "a"\npath = "/a"\n[rule.reconcile]\nurl = "/a/{{key}}"\nkeep = ["key"]\nreference = {{}}
succeeded = [{{status = "200"}}]\nabsent = [{{{absent}}}]\nabsent_after_s = 1\nabsent_before_s = 9\n"""
    )
    code, _, err = check()
    assert (code, err.startswith('warning: rule "a": a 404 alone says absent'), err != "") == (0, warns, warns)


def test_without_rules_there_is_no_table(check, monkeypatch):
    monkeypatch.delenv("ONCEGATE_RULES_FILE")
    code, out, _ = check()
    assert code == 0
    assert "none matches" not in out


def test_a_tombstone_is_explained(check, monkeypatch):
    """What a retry gets after the retention follows what it gets before."""
    monkeypatch.setenv("ONCEGATE_TOMBSTONE_S", "60")
    words = explained(check, "POST", "/v1/charges", "-H", "Idempotency-Key: a")
    assert words["complete"] == "replayed for 86400 s, then 410 key-expired for 60 s"


def test_a_request_is_explained(check):
    """The explanation has the rule, the key, the scope, and the response in each state of the key."""
    words = explained(
        check,
        "POST",
        "https://api.test/v1/orders/9?x=1",
        "-H",
        "X-User: a",
        "-H",
        "X-Org: o",
        "--body-file",
        "body.json",
    )
    assert words["rule"] == "orders (rules.toml:6)"
    assert words["upstream"] == "https://shop.test:444/api/v1/orders/9?x=1, Host: shop.test:444"
    assert words["key"] == "header:x-user + body:/cart/id"
    assert words["scope"].startswith("namespace default, tenant ")
    assert words["digest"].split()[3].startswith("once:{")
    assert words["fingerprint"].endswith("of destination, body")
    assert words["result"] == "executed if the key is free"
    assert words["in flight"] == "waits up to 7 s, then 409 in-flight"
    assert words["complete"] == "replayed for 86400 s"
    # Its fingerprint leaves out the target.
    assert words["unknown"] == "409 outcome-unknown"
    assert words["other content"] == "422 key-reused, if the fingerprint differs"
    assert words["released on"] == "307, 308, 401, 421, 425, 429"
    assert words["unknown on"].startswith("408, 502, 503, 504, 520")
    assert words["upstream lost"] == "sent again with the same key, a few times"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["GET", "/v1/orders/1", "-H", "Host: api.test"],
            {"rule": "orders (rules.toml:6)", "result": "forwarded unguarded: the rule does not guard GET"},
        ),
        (
            ["POST", "/v1/orders/1"],
            {"rule": "none matches; the settings apply", "result": "forwarded unguarded: no idemp"},
        ),
        (["POST", "http://api.test/v1/orders/1"], {"result": "400 key-invalid: the body is not JSON"}),
        (
            ["POST", "http://api.test/v1/orders/1", "--body-file", "other.json"],
            {"result": "400 key-missing: a header with a part of the key was not sent"},
        ),
        (
            ["POST", "/events", "--body-file", "body.json"],
            {
                "unknown": "executed again",
                "scope": "namespace stripe-webhook, tenant all",
                "in flight": "waits up to 8 s, then 503 in-flight",
                "fingerprint": "",
                "released on": "3xx, 4xx, 5xx",
                "unknown on": "no status",
            },
        ),
        (["POST", "/events"], {"result": "forwarded unguarded: the body is not JSON"}),
        (
            ["PUT", "/", "-H", "Idempotency-Key: a"],
            {"unguarded key": "a header looks like a key, and nothing reads it"},
        ),
        (["POST", "/", "-H", "X-Idempotency-Key: a"], {"unguarded key": "a header looks like a key"}),
        (
            ["POST", "/llm", "-H", "x-stainless-retry-count: 0"],
            {
                "in flight": "forwarded unguarded, as a request of its own",
                "complete": "executed, and takes the key over",
            },
        ),
        (
            ["POST", "/llm", "-H", "x-stainless-retry-count: 1"],
            {
                "in flight": "joins the response while it comes; until it begins waits up to 600 s",
                "complete": "replayed for 3600 s",
            },
        ),
        (["POST", "/llm"], {"result": "forwarded unguarded: neither a key nor a retry count was sent"}),
        (
            ["POST", "/click"],
            {
                "complete": "replayed for 10 s from its claim, then executed",
                "in flight": "409 in-flight",
                "scope": "namespace default, tenant without credential",
            },
        ),
        (["POST", "/click", "-H", "Prefer: wait=3"], {"in flight": "waits up to 3 s, then 409"}),
        (
            ["POST", "/renamed", "-H", "Idempotency-Key: k"],
            {
                "key sent as": "X-Id",
                "upstream": "http://up.test/renamed, Host: b.test",
                "unknown": "sent on with the same key for 86400 s from its claim, then 409 outcome-unknown",
            },
        ),
        (["post", "/x", "-H", "Idempotency-Key: k"], {"result": "executed if the key is free"}),
        (["POST", "/x", "-H", 'Idempotency-Key: "k'], {"result": "400 key-invalid: the key is neither"}),
        (
            ["POST", "/x", "-H", "Idempotency-Key: k", "--headers-file", "digest.txt"],
            {"result": "400 scope-unstable: the scheme of Authorization"},
        ),
        (["POST", "/a b"], {"result": "400: the target is neither"}),
        (["TRACE", "/"], {"result": "405: TRACE is not served"}),
        (["POST", "http://api.test"], {"upstream": "http://up.test/, Host: up.test"}),
        (["POST", "http://api.test?x=1"], {"upstream": "http://up.test/?x=1, Host: up.test"}),
    ],
)
def test_other_requests_are_explained(check, arguments, said):
    words = explained(check, *arguments)
    for word, text in said.items():
        assert words[word].startswith(text)


PREFLIGHT = ("OPTIONS", "/x", "-H", "Access-Control-Request-Method: POST", "-H")


@pytest.mark.parametrize(
    ("cors_by", "arguments", "said"),
    [
        ("auto", ["POST", "/x"], {"page": "no Origin"}),
        ("auto", ["POST", "/x", "-H", "Origin: https://a.test"], {"page": "https://a.test may read oncegate's own"}),
        ("api", ["GET", "/x", "-H", "Origin: https://a.test"], {"page": "https://a.test may read"}),
        ("auto", ["POST", "/x", "-H", "Origin: null"], {"page": "null may not read"}),
        ("auto", [*PREFLIGHT, "Origin: https://a.test"], {"result": "preflight passed on, and granted by oncegate if"}),
        ("api", [*PREFLIGHT, "Origin: https://a.test"], {"result": "preflight passed on: the API decides"}),
        ("oncegate", [*PREFLIGHT, "Origin: https://a.test"], {"result": "preflight granted by oncegate"}),
        ("auto", [*PREFLIGHT, "Origin: https://b.test"], {"result": "preflight passed on: a rule that"}),
    ],
)
def test_a_page_is_explained(check, monkeypatch, cors_by, arguments, said):
    """What a page of another origin may read, and who answers its preflight."""
    monkeypatch.setenv("ONCEGATE_CORS_ORIGINS", "https://a.test")
    monkeypatch.setenv("ONCEGATE_CORS_BY", cors_by)
    words = explained(check, *arguments)
    for word, text in said.items():
        assert words[word].startswith(text)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("Sec-Fetch-Mode: navigate", {"own answers": "a page that people read", "browser's key": "a number that the"}),
        ("Upgrade-Insecure-Requests: 1", {"browser's key": "a number that the browser made itself"}),
        ("Sec-Fetch-Mode: cors", {}),
    ],
)
def test_a_form_in_a_browser_is_explained(check, field, said):
    """Who reads a page, and whose key it is."""
    words = explained(check, "POST", "/x", "-H", 'Idempotency-Key: "182"', "-H", field)
    told = {word: text for word, text in words.items() if word in ("own answers", "browser's key")}
    assert told.keys() == said.keys()
    assert all(told[word].startswith(text) for word, text in said.items())


def test_replayed_cookies_are_explained(check):
    """How long a duplicate gets the cookies of its original."""
    rule = '[[rule]]\nname = "a"\nreplay_cookies = true\n'
    Path("rules.toml").write_text(rule)
    words = explained(check, "POST", "/", "-H", "Idempotency-Key: k")
    assert words["complete"] == "replayed for 86400 s, with its cookies for 60 s at most"
    Path("rules.toml").write_text(rule + 'key = "derived:10"\n')
    words = explained(check, "POST", "/")
    assert words["complete"] == "replayed for 10 s from its claim, with its cookies for 60 s at most, then executed"


def test_what_is_explained_is_what_is_done(check):
    """The digests come from the request path's code: equal keys have one digest, other keys another."""
    digests = [
        explained(check, "POST", "/x", "-H", f"Idempotency-Key: {key}")["digest"] for key in ("k", '"k"', "other")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_whose_key_it_is_is_explained(check):
    """The explanation names what identifies the tenant, and says where nothing does."""
    asked, who = ["POST", "/x", "-H", "Idempotency-Key: k", "--headers-file", "who.txt"], Path("who.txt")
    who.write_text("Cookie: visits=1\r\n\r\n")
    assert explained(check, *asked)["scope"].endswith(" of cookie")
    who.write_text("Cookie: visits=1\nStripe-Account: acct_1\nAuthorization: Bearer a")
    assert explained(check, *asked)["scope"].endswith(" of authorization, stripe-account")
    nobody = explained(check, "POST", "/x", "-H", "Idempotency-Key: k")["scope"]
    assert nobody.startswith("namespace default, tenant without credential: all requests that have none of")
    Path("rules.toml").write_text('[[rule]]\nname = "a"\nscope = ["known", "cookie:session", "path:1"]')
    who.write_text("Cookie: visits=1; session=2\napi-key: 1\n")
    assert explained(check, *asked)["scope"].endswith(" of api-key, cookie:session, path:1")
    assert "default / known, cookie:session, path:1" in check()[1]


def test_a_body_over_the_limit(check, monkeypatch):
    monkeypatch.setenv("ONCEGATE_MAX_REQUEST_BYTES", "10")
    words = explained(check, "POST", "/x", "-H", "Idempotency-Key: k", "--body-file", "body.json")
    assert words["result"] == "413 body-too-large"


def test_no_secret_is_shown(check, monkeypatch):
    """The explanation shows neither the request's key, nor its credential, nor the digests' secret."""
    monkeypatch.setenv("ONCEGATE_SECRET", SECRET)
    for scheme, result in (("Bearer ", "executed if the key is free"), ("", "scope-unstable")):
        Path("who.txt").write_text(f"Authorization: {scheme}{SECRET}")
        arguments = ["-H", f"Idempotency-Key: {SECRET}", "--headers-file", "who.txt"]
        _, out, err = check("--explain", "POST", "/x", *arguments)
        assert SECRET not in out + err
        assert result in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["POST", "x"], "'x' is no URL"),
        (["POST", ""], "'' is no URL"),
        (["POST", "/x", "-H", "nonsense"], "'nonsense' is no header"),
        (["POST", "/x", "--body-file", "none"], "none: No such file"),
        (["POST", "/x", "--headers-file", "none"], "none: No such file"),
        (["POST", "/x", "--headers-file", "-", "--body-file", "-"], "not both"),
        (["POST", "/x", "-H", f"authorization: Bearer {SECRET}"], "--headers-file -"),
        (["POST", "/x", "-H", f"Cookie: session={SECRET}"], "-H would show Cookie"),
        (["POST", "/x", "-H", f"X-API-Key:{SECRET}"], "-H would show X-API-Key"),
    ],
)
def test_what_cannot_be_explained(check, arguments, said):
    code, out, err = check("--explain", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert SECRET not in err


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_bad_file_is_refused(check, capsys, command):
    """Start and check refuse a rules file alike, and print all its mistakes."""
    Path("rules.toml").write_text('[[rule]]\nname = "a"\npath = "x"\nretention_s = 0')
    assert main([command]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["rules.toml:3", "rules.toml:4"]


# What an operator is most likely to get wrong, and what names the culprit.
BAD = {
    "an unknown preset": ('preset = "strype-webhook"', 'rule "a": preset: '),
    "an unknown field": ("retension_s = 90", 'rule "a": retension_s: is unknown; did you mean retention_s?'),
    "a rule that can never match": (
        'path = "/v1/**"\n[[rule]]\nname = "b"\npath = "/v1/orders"',
        'rule "b": can never match: rule "a" (line 1) comes first and matches all of its requests',
    ),
    "a pointer that is no pointer": ('key = "body:id"', "rule \"a\": key: 'body:id' must be a JSON pointer"),
    "a pointer with a bad escape": ('key = "body:/a~2"', "rule \"a\": key: 'body:/a~2' has a ~ in its pointer"),
    "a retention shorter than the wait": (
        "retention_s = 20\nwait_max_s = 21",
        'rule "a": retention_s: must not be shorter than wait_max_s',
    ),
    "a window of zero": ('key = "derived:0"', "rule \"a\": key: 'derived:0' "),
    "two upstreams with one name": (
        '[[upstream]]\nname = "u"\nurl = "http://a"\n[[upstream]]\nname = "u"\nurl = "http://b"',
        'upstream "u": name: is the name of another upstream as well',
    ),
}


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_names_its_rule(check, capsys, case, command):
    """Each mistake stops the start and the check, and names file, line, rule or upstream, and reason."""
    fields, said = BAD[case]
    Path("rules.toml").write_text(f'[[rule]]\nname = "a"\n{fields}')
    assert main([command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    place, _, complaint = line.partition(": ")
    assert place.removeprefix("rules.toml:").isdecimal()
    assert complaint.startswith(said)


CALLS = """
[[rule]]
name = "refunds"
path = "/mcp"
preset = "mcp"
when = { "body:/method" = "tools/call", "body:/params/name" = "refund" }

[[rule]]
name = "tools"
path = "/mcp"
preset = "mcp"

[[rule]]
name = "strict"
path = "/strict"
preset = "json-rpc"
on_bad_key = "refuse"
"""
# path, body -> what is said under which label
CALLED: dict[str, tuple[str, str, dict[str, str]]] = {
    "a call": (
        "/mcp",
        '{"id": "seven", "method": "tools/call", "params": {"_meta": {"idempotencyKey": "k"}}}',
        {
            "passed over": "refunds (rules.toml:2): the body has no single value at /params/name",
            "rule": "tools (rules.toml:8)",
            "JSON-RPC id": '"seven": a replay has that of its own request',
            "result": "executed if the key is free",
            "by message": "a result is stored; -32700, -32600 and -32601 free the key; all else is unknown",
        },
    ),
    "a pointer that is missing": (
        "/mcp",
        '{"id": 1, "method": "tools/call", "params": {"name": "refund"}}',
        {"result": "forwarded unguarded: the body does not have the member that holds the key"},
    ),
    "another method": (
        "/mcp",
        '{"id": 1, "method": "ping"}',
        {"passed over": "tools (rules.toml:8): the value at /method is another one", "rule": "none matches; the"},
    ),
    "an answer to the server": ("/mcp", '{"id": 1, "result": {}}', {"rule": "none matches; the settings apply"}),
    "a batch with a call": (
        "/mcp",
        '[{"id": 1, "method": "tools/call"}]',
        {"rule": "tools", "result": "forwarded unguarded: the body is a JSON-RPC batch"},
    ),
    "no JSON": ("/mcp", "{", {"passed over": "tools (rules.toml:8): the body is not JSON in UTF-8"}),
    "an id of another kind": (
        "/strict",
        '{"id": [], "method": "a"}',
        {"result": "400 key-invalid: the id of the JSON-RPC"},
    ),
    "a batch": ("/strict", "[]", {"result": "400 key-invalid: the body is a JSON-RPC batch"}),
    "a notification": (
        "/strict",
        '{"method": "a"}',
        {"result": "forwarded unguarded: the body is a JSON-RPC notification"},
    ),
}


@pytest.mark.parametrize("case", CALLED)
def test_a_json_rpc_request(check, tmp_path, case):
    """What becomes of a JSON-RPC body is said with its reason: rules passed over, its id, why it is no call."""
    path, body, expected = CALLED[case]
    (tmp_path / "rules.toml").write_text(CALLS)
    (tmp_path / "call.json").write_text(body)
    key = ("-H", "Idempotency-Key: k") if path == "/strict" else ()
    found = explained(check, "POST", path, *key, "--body-file", "call.json")
    for label, text in expected.items():
        assert found[label].startswith(text), (label, found)


def test_a_note_is_said_to_be_stored(check):
    """In the table, and for one request with what it would be. What a client wrote is escaped."""
    rules = Path("rules.toml")
    rules.write_text(rules.read_text() + '[[rule]]\nname = "noted"\npath = "/noted"\nnote = "/order"\n')
    assert check()[1].endswith('rule "noted" stores a note with each key, for operators: body:/order\n')
    Path("body.json").write_text('{"order": "4711\\u001b[2J"}')
    found = explained(check, "POST", "/noted", "-H", "Idempotency-Key: a", "--body-file", "body.json")
    assert found["note"] == "4711\\x1b[2J, of body:/order: stored with the record"
    found = explained(check, "POST", "/noted", "-H", "Idempotency-Key: a")
    assert found["note"] == "none, of body:/order: stored with the record"


def test_the_rest_of_a_stream_is_explained(check):
    """A request that would never be executed is not called one that is; elsewhere the same header says nothing."""
    rules = Path("rules.toml")
    rules.write_text(rules.read_text() + '[[rule]]\nname = "stream"\npath = "/stream"\nresume = true\nsse_ids = true\n')
    asked = "-H", "Idempotency-Key: a", "-H", "Last-Event-ID: 7\u001b"
    found = explained(check, "POST", "/stream", *asked)
    assert found["result"] == "the stream behind the event 7\\x1b, if it is there"
    assert found["no record"] == "410 stream-gone: a request with Last-Event-ID is never executed"
    assert explained(check, "POST", "/stream", *asked[:2])["events"] == "get ids, unless the response is coded"
    assert explained(check, "POST", "/other", *asked[:3], "Last-Event-ID: 7")["result"] == "executed if the key is free"


def test_what_oncegate_answers_itself_is_explained(check, monkeypatch):
    """A path that is reserved is not called one that reaches the API, and only a rule with addresses reserves it."""
    asked = "-H", "Idempotency-Key: a"
    assert "upstream" in explained(check, "GET", "/.oncegate/keys")
    monkeypatch.setenv("ONCEGATE_SECRET", "0123456789abcdef")
    rules = Path("rules.toml")
    fields = "resumable = true\ncancellable = true\nask_keys = true\n"
    rules.write_text(rules.read_text() + f'[[rule]]\nname = "stream"\npath = "/stream"\n{fields}')
    found = explained(check, "GET", "/.oncegate/keys")
    assert found == {"result": "answered by oncegate itself: no request below ONCEGATE_OWN_PATH reaches an API"}
    found = explained(check, "POST", "/stream", *asked)
    assert (found["links"], found["questions"]) == ("resume, cancel", "answered for the same key and credential")
    assert "links" not in explained(check, "POST", "/other", *asked)


ASKING = """
[[rule]]
name = "charges"
path = "/charges/*"
note = "/order"
[rule.reconcile]
url = "/find?id={key}&order={note}&charge={path:2}"
keep = ["key", "path:2"]
method = "QUERY"
safe = true
body = '{{"a": "{key}"}}'
credentials_file = "credentials"
reference = { "/id" = "{key}" }
succeeded = [{ status = "200" }]
"""


def test_what_would_be_asked(check):
    """The question about this very request, with no value of a credential; what is missing; what is kept."""
    Path("rules.toml").write_text(ASKING)
    Path("credentials").write_text(f"Authorization: Bearer {SECRET}\nX-Api-Key: {SECRET}\n")
    Path("body.json").write_text('{"order": "7 \\u202e"}')
    request = ["POST", "http://h/charges/c1", "-H", "Idempotency-Key: k&1", "--body-file", "body.json"]
    found = explained(check, *request)
    assert found["asked"] == "QUERY http://up.test/find?id=k%261&order=7%20%E2%80%AE&charge=c1"
    assert found["body"] == '{"a": "k&1"}'
    assert found["as"] == "Authorization, X-Api-Key of the credentials file"
    assert "absent" not in found
    assert explained(check, *request[:-2])["asked"] == "nothing: {note} has no value; an operator decides"
    code, out, err = check()
    assert (code, err) == (0, "")
    asks, stores = [
        line for line in out.splitlines() if line.startswith('rule "charges" ') and "note" not in line[:30]
    ][-2:]
    assert asks == (
        'rule "charges" asks about unknown keys: QUERY http://up.test/find?id={key}&order={note}&charge={path:2}'
    )
    assert stores.endswith(": key, path:2, note")
    assert SECRET not in str((found, out))
    Path("credentials").write_text(f"Authorization Bearer {SECRET}\n")
    code, out, err = check()
    assert code != 0
    assert 'rule "charges": reconcile: credentials_file credentials line 1 is not' in err
    assert SECRET not in out + err
