"""The table `[rule.reconcile]`: every field, every mistake, and what stands in the plan."""

import os
from dataclasses import fields
from pathlib import Path

import pytest

from oncegate.decision import Verdict
from oncegate.probing.plan import FORM, Answer, Entry, Plan, question
from oncegate.probing.table_fields import FIELDS
from oncegate.rules.loading import load_rules
from oncegate.rules.model import Rules
from oncegate.settings.errors import SettingsError
from oncegate.settings.settings import Settings
from tests.parts import ROOT

LEAST = """url = "/charges/{key}"
keep = ["key"]
reference = { "/reference" = "{key}" }
succeeded = [{ status = "200" }]"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch):
    """Load rules from a text, with `credentials` beside it."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ONCEGATE_{name.upper()}", raising=False)
    Path("credentials").write_text("Authorization: Bearer s3cret\n")

    def read(text: str) -> Rules:
        Path("rules.toml").write_text(text)
        return load_rules(Settings(upstream="http://api.test/base", rules_file="rules.toml"))

    return read


@pytest.fixture
def plan(rules):
    def read(table: str, rule: str = "") -> Plan:
        return rules(f'[[rule]]\nname = "charges"\n{rule}\n[rule.reconcile]\n{table}').rules[0].policy.reconcile

    return read


@pytest.fixture
def errors(plan):
    """Return what is wrong with a table, without the place."""

    def read(table: str, rule: str = "") -> str:
        with pytest.raises(SettingsError) as raised:
            plan(table, rule)
        (error,) = raised.value.errors
        # Each names the file, the rule and the table.
        start, found, text = error.partition('rule "charges": reconcile: ')
        assert start.startswith("rules.toml:")
        assert found
        return text

    return read


def changed(lines: str) -> str:
    """Return the least table with these lines, each in place of that of the same field."""
    table = dict.fromkeys(LEAST.split("\n"))
    for line in filter(None, lines.strip().split("\n")):
        table = {own: None for own in table if own.partition(" ")[0] != line.partition(" ")[0]} | {line: None}
    return "\n".join(table)


ABSENT = 'absent = [{ status = "404" }]\nabsent_after_s = 2\nabsent_before_s = 60\n'
# field: as written; the attribute of the plan and its value; as written wrongly, and what is said of that
CASES = {
    "url": ('url = "https://other.test/{key}?a={key}"', lambda plan: str(plan.origin), "https://other.test",
            'url = "charges"', "url must be a path"),
    "method": ('method = "head"\nreference = {}', lambda plan: plan.method, "HEAD", 'method = "TRACE"', "method must"),
    "safe": ('safe = true\nmethod = "POST"', lambda plan: plan.method, "POST", "safe = 1", "must be true or false"),
    "body": ('method = "QUERY"\nsafe = true\nbody = \'{{"a": "{key}"}}\'', lambda plan: plan.body.names, ("key",),
             "body = 1", "body must be a text"),
    "content_type": (f'content_type = "{FORM}"', lambda plan: plan.content_type, FORM, 'content_type = "text/xml"',
                     "in no other are values escaped"),
    "keep": ('keep = ["path:2"]\nurl = "/{path:2}"\nreference = {}', lambda plan: plan.keep[0][0], "path:2",
             'keep = ["query:a"]', "keep must be a header or a JSON pointer"),
    "credentials_file": ('credentials_file = "credentials"', lambda plan: plan.credentials,
                         (("Authorization", "Bearer s3cret"),), 'credentials_file = "none"', "none cannot be read"),
    "reference": ('reference = { "/a" = "x-{key}" }', lambda plan: plan.reference[0][1].literals, ("x-", ""),
                  'reference = { "a" = "{key}" }', "reference must be a JSON pointer"),
    "succeeded": ('succeeded = [{ status = "2xx", when = { "/a" = ["b", true], "/c" = 1 } }]',
                  lambda plan: plan.entries[0],
                  (Verdict.SUCCEEDED, Entry("2xx", ((("/a", ("a",)), ("b", "true")), (("/c", ("c",)), ("1",))))),
                  'succeeded = [{ status = "503" }]', "succeeded status must be a status of 2xx or 4xx"),
    "failed": ('failed = [{ status = "402" }]', lambda plan: plan.entries[1], (Verdict.FAILED, Entry("402")),
               'failed = [{ status = "401" }]', "401 says nothing of the operation"),
    "absent": (ABSENT, lambda plan: plan.entries[1], (Verdict.ABSENT, Entry("404")), "absent = 404",
               "absent must be a list"),
    "inconclusive": ('inconclusive = [{ status = 200, empty = "/a" }]', lambda plan: plan.entries[1],
                     (Verdict.INCONCLUSIVE, Entry("200", (), (("/a", ("a",)),))), "inconclusive = [{}]",
                     "must be a list of tables with a status"),
    "absent_after_s": (ABSENT, lambda plan: plan.absent_after_s, 2, "absent_after_s = 0", "from 0.1 to"),
    "absent_before_s": (ABSENT, lambda plan: plan.absent_before_s, 60, "absent_before_s = true",
                        "a number of seconds"),
    "absent_agree": (ABSENT + "absent_agree = 5", lambda plan: plan.absent_agree, 5, "absent_agree = 0",
                     "from 1 to 100"),
    "reconcile_for_s": ("reconcile_for_s = 60", lambda plan: plan.reconcile_for_s, 60, "reconcile_for_s = nan",
                        "must be"),
    "first_after_s": ("first_after_s = 0.1", lambda plan: plan.first_after_s, 0.1, 'first_after_s = "1"', "must be"),
    "most_s": ("most_s = 10", lambda plan: plan.most_s, 10, "most_s = -1", "must be"),
    "rate_per_s": ("rate_per_s = 0.5", lambda plan: plan.rate_per_s, 0.5, "rate_per_s = 0", "a number from 0.1"),
    "timeout_s": ("timeout_s = 0.2", lambda plan: plan.timeout_s, 0.2, "timeout_s = inf", "must be"),
    "audit": ('audit = ["/a/0"]', lambda plan: plan.audit, (("/a/0", ("a", "0")),), 'audit = ["a"]',
              "audit must be a JSON"),
    "answers": ("answers.succeeded.status = 201", lambda plan: plan.answer(Verdict.SUCCEEDED), Answer(201),
                "answers.absent.status = 200", "only succeeded and failed end a key"),
}  # fmt: skip


@pytest.mark.parametrize("field", CASES)
def test_a_field(plan, field):
    """Each field reaches the plan."""
    assert CASES.keys() == FIELDS.keys()
    written, look, value, *_ = CASES[field]
    table = changed(written)
    if field == "content_type":
        table += '\nmethod = "POST"\nsafe = true\nbody = "a={key}"'
    assert look(plan(table)) == value


@pytest.mark.parametrize("field", CASES)
def test_a_bad_field(errors, field):
    """Each is refused with the rule, the field and the reason."""
    *_, wrong, said = CASES[field]
    assert said in errors(changed(wrong))


def test_what_a_plan_has_by_itself(plan):
    """The defaults, and the upstream of the rule as the one who is asked."""
    made = plan(LEAST)
    assert (made.method, made.body, made.credentials, made.audit) == ("GET", None, (), ())
    assert (made.absent_agree, made.reconcile_for_s, made.first_after_s, made.most_s) == (3, 86_400, 2, 300)
    assert (made.rate_per_s, made.timeout_s, made.is_upstream) == (10, 5, True)
    assert question(made, {"key": "a"}).url == "http://api.test/base/charges/a"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "has no url"),
        ('url = "/charges/{id}"', "names {id}, which is not there; there is {key}, {note}"),
        ('url = "/charges/{}"', "names {}, which is not there"),
        ('url = "/charges/{key"', "has a { without its other half"),
        ('url = "/charges/key}"', "has a } without its other half"),
        ('url = "/charges"\nkeep = []\nreference = {}', "would ask the same about every key"),
        ('url = "https://{key}.test/"', "a placeholder in its scheme or host"),
        ('url = "{key}://api.test/"', "a placeholder in its scheme or host"),
        ('url = "//other.test/{key}"', "must be a path"),
        ('url = "https://a:b@other.test/{key}"', "without user"),
        ('url = "ftp://other.test/{key}"', "must be http:// or https://"),
        ('url = "/a/../{key}"', "a segment . or .."),
        ('url = "/a/%2e%2E/{key}"', "a segment . or .."),
        ('url = "/a b/{key}"', "characters that stand in no path"),
        ('url = "/a/{key}#b"', "characters that stand in no path"),
        ('url = "/a/%{key}"', "characters that stand in no path"),
        ('url = "/a/{answer:/b}{key}"', "names {answer:/b}, which is not there"),
        ('keep = ["key", "key"]', "the same member twice"),
        ('keep = ["key", "/order"]', "keep has /order, which no template names"),
        ('keep = ["header:Authorization"]', "must be a header field that can carry a key"),
        ('keep = ["key", "/a{b}"]', "without braces"),
        ('keep = "key"', "must be a list of at most 8 members"),
        ('method = "POST"', "safe = true says that this one does not"),
        ('method = "HEAD"', "method HEAD has answers without a body"),
        ('method = "QUERY"\nsafe = true\nbody = "{{\\"a\\": {key}}}"', "a placeholder stands in a text in quotes"),
        ('method = "HEAD"\nreference = {}\nbody = "{{}}"', "body contradicts method HEAD"),
        ('method = "QUERY"\nsafe = true\nbody = "no JSON {key}"', "is no JSON"),
        ("absent_after_s = 5", "absent_after_s needs absent beside it"),
        ('absent = [{ status = "404" }]', "absent needs absent_after_s and absent_before_s beside it"),
        ('absent = [{ status = "404" }]\nabsent_after_s = 9', "absent needs absent_before_s beside it"),
        (ABSENT + "absent_after_s = 60", "absent_after_s must be less than absent_before_s"),
        (ABSENT + 'absent = [{ status = "200" }]', "absent with status 200 needs when or empty"),
        (ABSENT + 'absent = [{ status = "4xx" }]', "absent with status 4xx needs when or empty"),
        (ABSENT + 'absent = [{ status = "400" }]', "absent with status 400 needs when or empty"),
        ("first_after_s = 9\nmost_s = 1", "first_after_s must not be over most_s"),
        ("succeeded = []", "has no succeeded"),
        ('succeeded = [{ status = "200", when = {} }]', "must be a table of pointers and texts"),
        ('succeeded = [{ status = "200", when = { "a" = "b" } }]', "must be a JSON pointer"),
        ('succeeded = [{ status = "200", when = { "/a" = [] } }]', "neither a text"),
        ('succeeded = [{ status = "200", empty = "a" }]', "must be a JSON pointer"),
        ('succeeded = [{ status = "200", unless = "a" }]', "unless is unknown"),
        ('succeeded = [{ status = "409" }]', "needs a status in answers.succeeded"),
        ('failed = [{ status = "200" }]', "needs a status in answers.failed"),
        ("absents = []", "absents is unknown; did you mean absent?"),
        ('reference = { "/a" = "b" }', "names no value of the request"),
        ('answers = { succeeded = { status = 204, body = "{{}}" } }', "a response with status 204 has no body"),
        ('answers = { succeeded = { headers = ["Content-Length: 1"] } }', "oncegate sets the framing itself"),
        ('answers = { succeeded = { headers = ["A: b\\r\\nC: d"] } }', "a control character"),
        ('answers = { succeeded = { body = "{{}}", body_pointer = "/a" } }', "body contradicts body_pointer"),
        ('answers = { succeeded = { body = "{answer:/a}" } }', "is no JSON"),
        ('answers = { succeeded = { body = "\\"{answer:a}\\"" } }', "names {answer:a}, which is not there"),
        ('answers = { succeeded = { status = 101 } }', "from 200 to 599"),
        ("answers = { succeeded = 1 }", "must be a table"),
    ],
)  # fmt: skip
def test_what_does_not_fit(errors, line, said):
    """Each mistake is refused at start, with its rule and its reason."""
    assert said in errors(changed(line) if line else 'succeeded = [{ status = "200" }]\nreference = {}')


@pytest.mark.parametrize(
    ("rule", "table", "said"),
    [
        ('on_unknown = "retry"', "", 'contradicts on_unknown = "retry"'),
        ('guard = "off"', "", 'contradicts guard = "off"'),
        ('protocol = "json-rpc"\nfingerprint = ["body:/method"]', "", "contradicts protocol"),
        ("", 'url = "/{note}"\nkeep = []\nreference = {}', "names {note}, and the rule has no note"),
        ('key = "body:/id"', "", "names {key}, which is no header alone here"),
        ('key = ["header:A", "header:B"]', "", "names {key}, which is no header alone here"),
    ],
)
def test_what_contradicts_the_rule(errors, rule, table, said):
    """A table that its rule leaves without use, or without a value, is refused."""
    assert said in errors(changed(table), rule)


def test_a_reference_is_asked_for(errors):
    """A table that forgets it would take another's object for its own; one without it says so."""
    table = "\n".join(line for line in LEAST.split("\n") if not line.startswith("reference"))
    assert "has no reference" in errors(table)


def test_all_mistakes_at_once(errors):
    """Whoever writes a table sees all that is wrong with it."""
    said = errors('method = "TRACE"\naudit = ["a"]\nfoo = 1')
    assert "method must" in said
    assert "audit must" in said
    assert "foo is unknown" in said


def test_a_table_that_is_none(rules):
    """A text in its place is refused like any field of another kind."""
    with pytest.raises(SettingsError, match="must be a table"):
        rules('[[rule]]\nname = "a"\nreconcile = "yes"')


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no header field"),
        (b"\n \n", "has no header field"),
        (b"Bearer s3cret", "line 1 is not `Name: value`"),
        (b"Authorization:", "line 1 is not `Name: value`"),
        (b"Authorization: a\rX-B: s3cret", "line 1 is not `Name: value`"),
        (b"Authorization: s3cret\n continued", "line 2 is not `Name: value`"),
        (b"Authorization: s3cr\xc3\xa9t", "line 1 is not `Name: value`"),
        (b"Authorization: s3cret\x00", "line 1 is not `Name: value`"),
        (b"Authorization: a\nauthorization: s3cret", "line 2 has authorization a second time"),
        (b"Content-Length: 5", "line 1 has Content-Length, which oncegate writes itself"),
        (b"transfer-encoding: chunked", "line 1 has transfer-encoding, which"),
        (b"Host: s3cret.test", "line 1 has Host, which"),
        (b"Connection: close", "line 1 has Connection, which"),
        (b"Accept-Encoding: gzip", "line 1 has Accept-Encoding, which"),
        (b"A: \xff\xfe", "cannot be read as UTF-8 text"),
        (b"A: " + bytes(70_000), "is over 65536 bytes"),
    ],
)
def test_credentials_that_are_none(errors, content, said):
    """Each mistake has its line. The file's content is in no message."""
    Path("credentials").write_bytes(content)
    text = errors(LEAST + '\ncredentials_file = "credentials"')
    assert said in text
    assert "s3cr" not in text


def test_credentials(plan):
    """Lines may end as on Windows. No representation has a value."""
    Path("credentials").write_bytes(b"\xef\xbb\xbfAuthorization: Bearer s3cret \r\n\r\nX-Api-Key:k:1\n")
    made = plan(LEAST + '\ncredentials_file = "credentials"')
    assert made.credentials == (("Authorization", "Bearer s3cret"), ("X-Api-Key", "k:1"))
    asked = question(made, {"key": "a"})
    assert asked.headers[-2:] == made.credentials
    assert "s3cret" not in repr(made) + repr(asked)


def test_a_file_that_cannot_be_read(errors):
    """A folder, a pipe and a file that is not there are refused."""
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name in ("folder", "pipe", "missing"):
        assert f"credentials_file {name} " in errors(LEAST + f'\ncredentials_file = "{name}"')


def test_plans_are_compared(plan):
    """A reload sees new credentials: two plans that differ in them alone are not equal."""
    table = LEAST + '\ncredentials_file = "credentials"'
    before = plan(table)
    assert before == plan(table)
    assert hash(before) == hash(plan(table))
    Path("credentials").write_text("Authorization: Bearer another")
    assert before != plan(table)


def test_every_field_of_the_table_is_explained():
    """The reference has each field of the table, of an entry and of an answer."""
    page = (ROOT / "docs/reference/rules.md").read_text()
    section = page.partition("## Reconcile")[2].partition("\n## ")[0]
    names = {*FIELDS, *(one.name for one in fields(Entry)), *(one.name for one in fields(Answer))}
    assert [name for name in sorted(names) if f"`{name}`" not in section] == []
