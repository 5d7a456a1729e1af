"""The pages tell the truth and can be read: links lead somewhere, what they name exists, and sentences are short.

`tests/e2e/test_pages.py` runs their commands, `tests/test_generated.py` holds their generated parts.
"""

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

from docs import generate
from docs.generate import BLOCK, GROUPS
from oncegate.keys.sources import SOURCE_KINDS as SOURCES
from oncegate.messages.fields import HOP_BY_HOP
from oncegate.messages.problems import PROBLEM_KINDS, REFUSALS, problem
from oncegate.messages.request_head import ACTED_ON, FORWARDING
from oncegate.messages.response_head import NOT_REPLAYED
from oncegate.observe.labels import Unguarded
from oncegate.observe.logs import DETAILS, FIELDS
from oncegate.observe.outcome import Outcome
from oncegate.observe.troubles import EVENTS, UNKNOWN
from oncegate.rules.fields import RULE, UPSTREAM
from oncegate.rules.loading import load_rules
from oncegate.rules.presets import PRESETS
from oncegate.settings.loading import table
from oncegate.settings.settings import SECRETS, Settings
from oncegate.store.record_view import FIELDS as RECORD_FIELDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "config").rglob("*.md")])
README = ROOT / "README.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# Links ...

_FENCE = re.compile(r"^( *)(```+)[^\n]*\n.*?^\1\2 *$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!\\)\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "`x`", _FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page as forges make them: from its headings, and those that are written."""
    text = _FENCE.sub("", page.read_text())
    found: set[str] = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 1
        while slug in found:
            slug, number = f"{slug.removesuffix(f'-{number - 1}')}-{number}", number + 1
        found.add(slug)
    return found


def links(page: Path) -> list[str]:
    """Return the targets of a page's links to other pages and files."""
    return [link for link in _LINK.findall(without_code(page.read_text())) if not re.match(r"[a-z]+:", link)]


@each_page
def test_links_lead_somewhere(page):
    """The file exists, inside the project, and so does the anchor."""
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_every_page_is_linked_from_the_index():
    """docs/README.md names each page below docs/, decisions by way of their own index."""
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "README.md")}
    decisions = DOCS / "decisions"
    if (decisions / "README.md").exists():
        linked |= {(decisions / link.partition("#")[0]).resolve() for link in links(decisions / "README.md")}
    pages = {page for page in DOCS.rglob("*.md") if page != DOCS / "README.md"}
    assert sorted(name_of(page) for page in pages - linked) == []


def test_llms_txt_lists_the_pages():
    """It has the entries of the index, word for word."""
    entries = [re.findall(r"^- \[.*$", (DOCS / name).read_text(), re.MULTILINE) for name in ("README.md", "llms.txt")]
    assert entries[0] == entries[1]


def test_the_readme_links_what_a_newcomer_needs():
    """From the first page to the tutorial, the index and every use case."""
    wanted = {f"docs/{name}.md" for name in ("README", "start", "install", "compare", "reference/answers")}
    wanted |= {f"docs/how-to/{case}.md" for case in ("payments", "webhooks", "consumers", "llm", "forms")}
    assert wanted - {link.partition("#")[0] for link in links(README)} == set()


def test_the_readme_is_short():
    """120 lines and 8 kB: a page that people read."""
    text = README.read_text()
    print(f"README.md: {text.count(chr(10))} lines, {len(text.encode())} bytes")
    assert text.count("\n") <= 120
    assert len(text.encode()) <= 8192


# Commands ...

RUN, RUN_REAL = "make test", "make test-real"


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return a page's shell blocks, each with what its mark says: a target of make, `shown`, or nothing."""
    found = []
    for match in re.finditer(
        r"^( *)```(?:sh|bash|shell|console)\b[^\n]*\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        before = page.read_text()[: match.start()].rstrip("\n").rpartition("\n")[2].strip()
        mark = re.fullmatch(r"<!-- (?:run: (make test|make test-real)|(shown): \S.*) -->", before)
        found.append((mark[1] or mark[2] if mark else "", match[2]))
    return found


@each_page
def test_every_shell_block_says_whether_it_runs(page):
    """The line before it does: run by a target, or shown for a reason."""
    assert [block for mark, block in blocks(page) if not mark] == []


# What comes from the code ...


def test_every_setting_has_its_group():
    """No setting is in two, or in none."""
    grouped = [name for names in GROUPS.values() for name in names.split()]
    assert len(grouped) == len(set(grouped))
    assert set(Settings.model_fields) - set(grouped) == set()


def test_every_problem_has_its_anchor():
    """A slug leads to its section of the answers; a section without a slug is left over."""
    text = text_of("docs/reference/answers.md")
    section = text.partition("\n## Problems\n")[2].partition("\n## ")[0]
    headings = re.findall(r"^### (\S+)$", section, re.MULTILINE)
    assert headings == list(PROBLEM_KINDS)
    bodies = re.split(r"^### \S+$", section, flags=re.MULTILINE)[1:]
    statuses = [int(body.strip()[:3]) for body in bodies]
    assert statuses == [kind.status for kind in PROBLEM_KINDS.values()]
    assert [kind.retryable for kind in PROBLEM_KINDS.values()] == ["not retryable" not in body for body in bodies]


def test_the_problem_that_is_shown_is_one():
    """Member by member as the proxy writes it."""
    example = text_of("docs/reference/answers.md").partition("```json\n")[2].partition("```")[0]
    shown = json.loads(example)
    assert shown == json.loads(
        problem("in-flight", shown["detail"], 1, instance=shown["instance"], key=shown["key"]).body()
    )


def test_every_problem_is_in_the_table_of_answers():
    """With the status that it has."""
    table = text_of("docs/reference/answers.md").partition("## What arrives")[2].partition("\n## ")[0]
    assert [slug for slug in PROBLEM_KINDS if f"(#{slug})" not in table] == []


def test_every_refusal_is_explained():
    """Each status without a slug has its row."""
    table = text_of("docs/reference/answers.md").partition("## Refusals without a slug")[2]
    rows = re.findall(r"^\| (\d{3}) \| .*? \| (yes|no) \|$", table, re.MULTILINE)
    assert [(int(status), word == "yes") for status, word in rows] == [(s, k.retryable) for s, k in REFUSALS.items()]


def test_every_field_and_source_of_a_rule_is_explained():
    """Each has its place in a table, or in the sentence on upstreams."""
    names = {*RULE, *UPSTREAM, *(f"{word}:" for word in SOURCES)}
    assert [name for name in names if f"`{name}" not in text_of("docs/reference/rules.md")] == []


def test_the_rules_that_are_shown_can_be_used(tmp_path):
    """The example is a rules file without a mistake."""
    example = text_of("docs/reference/rules.md").partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "rules.toml").write_text(example)
    settings = Settings(upstream="http://api.test", rules_file=str(tmp_path / "rules.toml"))
    assert [rule.name for rule in load_rules(settings).rules] == ["stripe events", "orders"]


def test_every_preset_has_an_anchor():
    """Also those that share a section."""
    assert set(PRESETS) - anchors(DOCS / "reference/presets.md") == set()


def defaults() -> dict[str, str]:
    """Return the default of each variable as the reference shows it."""
    return {row[1]: row[2] for row in re.finditer(r"^\| `(ONCEGATE_\w+)` \| `?(.*?)`? \|", table(), re.MULTILINE)}


def test_the_settings_of_the_readme_have_their_defaults():
    """Ten of them, each as in the reference."""
    rows = re.findall(r"^\| `(ONCEGATE_\w+)` \| `?(.*?)`? \|", README.read_text(), re.MULTILINE)
    assert len(rows) == 10
    assert dict(rows) == {name: defaults()[name] for name, _ in rows}


def test_the_limits_have_their_defaults():
    """Where a limit is a setting, the number beside it is its default."""
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "h": 3600, "s": 1, "": 1}
    rows = re.findall(
        r"`(ONCEGATE_\w+)`(?:, | \()([\d,.]*\d) ?(KiB|MiB|GiB|s|h|)\b", text_of("docs/reference/limits.md")
    )
    assert len(rows) > 15
    shown = {name: float(number.replace(",", "")) * units[unit] for name, number, unit in rows}
    milliseconds = {name: value * 1000 if name.endswith("_MS") else value for name, value in shown.items()}
    assert milliseconds == {name: float(defaults()[name]) for name in shown}


def test_files_that_the_design_names_exist():
    """Rooms and modules, below the package or the project."""
    named = set(re.findall(r"`([\w./]+(?:/|\.py|\.lua))`", text_of("DESIGN.md")))
    assert len(named) > 30
    assert sorted(one for one in named if not any((at / one).exists() for at in (ROOT, ROOT / "proxy/oncegate"))) == []
    rooms = {f"{one.parent.name}/" for one in (ROOT / "proxy/oncegate").glob("*/__init__.py")}
    assert rooms - named == set()


def test_the_decisions_are_counted():
    """The list of the pages says how many entries each has, and lists every page."""
    folder = ROOT / "docs/decisions"
    listed = re.findall(r"^\| \[.*?\]\((\S+?)\).*\| (\d+) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    pages = [page for page in folder.glob("*.md") if page.name != "README.md"]
    counted = {page.name: str(len(re.findall("^## ", page.read_text(), re.MULTILINE))) for page in pages}
    assert dict(listed) == counted


def test_every_header_is_explained():
    """All that the proxy acts on, strips or leaves out of a replay."""
    text = text_of("docs/reference/headers.md").lower()
    names = {name.decode() for name in (*HOP_BY_HOP, *FORWARDING, *NOT_REPLAYED, *ACTED_ON)}
    assert sorted(name for name in names if f"`{name}" not in text) == []


def label_values() -> set[tuple[str, str]]:
    """Return each label of the metrics with each of its values."""
    families = generate.empty_metrics().collect()
    labels = [label for family in families for sample in family.samples for label in sample.labels.items()]
    return {label for label in labels if label[0] not in ("le", "version", *generate.OPEN_LABELS)}


def test_every_value_of_a_label_is_explained():
    """Outcomes, settlements and the kinds of losses and tokens; those of a verb are the store's scripts."""
    text = text_of("docs/reference/metrics.md").partition("## All metrics")
    text = text[0] + text[2].partition("<!-- end -->")[2] + text_of("docs/reference/logs.md")
    assert (
        sorted(f"{label}={value}" for label, value in label_values() if label != "verb" and f"`{value}`" not in text)
        == []
    )


def test_every_field_of_the_log_and_the_record_is_explained():
    """Each has its row."""
    logs, record = text_of("docs/reference/logs.md"), text_of("docs/reference/record.md")
    assert [name for name in (*FIELDS, *DETAILS) if f"| `{name}` |" not in logs] == []
    assert [name for name in RECORD_FIELDS if f"`{name}`" not in record] == []


def logged() -> set[str]:
    """Return the events that the code writes: the first argument of calls to a logger."""
    found = set()
    for path in (ROOT / "proxy/oncegate").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.search(r"\blog\b|_log\b|logger\b", ast.unparse(node.func)):
                found |= {one.value for one in node.args[:1] if isinstance(one, ast.Constant) and one.value}
    return found


def test_every_event_is_explained():
    """Each that is logged has its row, and each row is an event of the code."""
    text = text_of("docs/reference/logs.md").partition("## Events")[2].partition("\n## ")[0]
    rows = set(re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE))
    assert logged() - rows - {"request"} == set()
    sources = "\n".join(path.read_text() for path in (ROOT / "proxy/oncegate").rglob("*.py"))
    composed = {"claim lost", "claim fenced"}
    assert [row for row in rows - composed if f'"{row}"' not in sources] == []


def test_the_words_of_answers_logs_and_metrics_are_the_same():
    """A problem's slug is an outcome, a reason that is a problem has its code, and each warning is of an outcome."""
    outcomes = {outcome.label for outcome in Outcome}
    codes = {slug.replace("-", "_") for slug in PROBLEM_KINDS}
    assert codes <= outcomes
    metrics, logs = text_of("docs/reference/metrics.md"), text_of("docs/reference/logs.md")
    assert [label for label in outcomes if f"`{label}`" not in metrics] == []
    assert EVENTS.keys() <= outcomes
    assert [event for event in {*EVENTS.values(), UNKNOWN} - {""} if f"| `{event}` | warning |" not in logs] == []
    assert {one.label for one in Unguarded} - codes <= {"no_duplicate"}


# Names, words and sentences ...


OLD = (
    "oncegate_eof_framed_total",
    "oncegate_unscoped_total",
    "oncegate_settle_repeated_total",
    "client_left",
    "settled_total{how",
    "losses_total{how",
    "suppressed_total{how",
    "RULES.md",
    "127.0.0.1:9090",
    "0.0.0.0:9090",
    "proxy/handler.py",
    "make readme",
)


def by_hand(page: Path) -> str:
    """Return what somebody wrote of a page: not what is generated."""
    return BLOCK.sub("", page.read_text())


def old(page: Path) -> set[str]:
    """Return the names that a page may mention though they are gone: those that lead from old to new, and records."""
    leads = page.name in ("CHANGELOG.md", "upgrades.md") or "decisions" in page.parts
    return set(OLD) if leads else set()


@each_page
def test_metrics_and_settings_that_are_named_exist(page):
    """A name that was changed in the code is found here."""
    metrics = {family.name for family in generate.empty_metrics().collect()}
    suffixes = ("_total", "_bucket", "_sum", "_count", "_info")
    text = by_hand(page)
    named = set(re.findall(r"\boncegate_[a-z_]+[a-z]\b(?![.(/])", text))
    bare = {name: next((name.removesuffix(one) for one in suffixes if name.endswith(one)), name) for name in named}
    assert [name for name in named - old(page) if name not in metrics and bare[name] not in metrics] == []
    settings = {f"ONCEGATE_{name.upper()}" for name in Settings.model_fields}
    settings |= {f"ONCEGATE_{name.upper()}_FILE" for name in SECRETS}
    settings |= {"ONCEGATE_PORT"}  # that Kubernetes sets for a service named oncegate
    assert set(re.findall(r"\bONCEGATE_[A-Z_]+[A-Z]\b", text)) - settings == set()


BANNED = ("what stands", "is told", "that it happened is noticed", "closed when in doubt")


@each_page
def test_no_private_words_and_no_old_names(page):
    """Phrases that nobody says, and names that are gone."""
    text = by_hand(page)
    assert [phrase for phrase in BANNED if re.search(rf"\b{phrase}\b", text, re.IGNORECASE)] == []
    assert [name for name in OLD if name in text and name not in old(page)] == []


def sentences(text: str) -> list[int]:
    """Return how many words each sentence of running text has; tables, headings and code are none."""
    text = re.sub(r"<!--.*?-->", "", without_code(BLOCK.sub("", text)), flags=re.DOTALL)
    kept = [line for line in text.split("\n") if not line.lstrip().startswith(("|", "#", ">"))]
    paragraphs = re.split(r"\n\s*\n|\n\s*(?=[-*] |\d+\. )", "\n".join(kept))
    found = []
    for paragraph in paragraphs:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
        plain = re.sub(r"^\s*(?:[-*]|\d+\.) ", "", plain).replace("*", "")
        for sentence in re.split(r"(?<=[.!?:])[\"')]*\s+", plain.strip()):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if words:
                found.append(len(words))
    return found


@each_page
def test_sentences_are_short(page):
    """The median is under 18 words."""
    counts = sentences(by_hand(page))
    median = statistics.median(counts or [0])
    print(f"{name_of(page)}: {len(counts)} sentences, median {median:g} words, longest {max(counts, default=0)}")
    assert median < 18
