"""The pages that people read: their words, what is escaped, and what a template may have."""

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from oncegate.adaptation.error_pages import TEMPLATES, ErrorPages, wants_page, words_for
from oncegate.adaptation.page_template import TEXTS, WORDS, BadTemplate, PageTemplate
from oncegate.decision import RETRY
from oncegate.messages.problems import PROBLEM_KINDS, REFUSALS, Problem, Rendering, problem, refusal
from oncegate.messages.request_head import RequestHead
from oncegate.rules.loading import load_rules
from oncegate.settings.errors import SettingsError
from oncegate.settings.settings import Settings
from tests.parts import ROOT

NASTY = "<script>alert(1)</script>\"'&amp;"
FORM = RequestHead("POST", b"/orders", False, b"shop.test", [], {b"sec-fetch-mode": [b"navigate"]})
# Elements without an end (HTML, section 13.1.2).
VOID = ("meta", "br", "img", "hr")
PAGE = "<!DOCTYPE html><title>$title</title>"


def page_of(answer: Problem, templates: dict[str, PageTemplate] | None = None, head: RequestHead = FORM) -> Rendering:
    return ErrorPages(templates).renderer(head, reload_is_safe=True)(answer, "")


class Reader(HTMLParser):
    """Reads a page strictly: every element that begins ends, in its order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.elements.setdefault(tag, "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.elements[self.open[-1]] += data


def problems() -> list[Problem]:
    return [*(problem(slug, "why", 1) for slug in PROBLEM_KINDS), *(refusal(status, "why") for status in REFUSALS)]


@pytest.mark.parametrize("answer", problems(), ids=lambda one: one.slug or str(one.status))
def test_every_problem_has_a_page(answer):
    """Whole, readable on a phone, not kept, and it runs and loads nothing."""
    status, fields, body, is_page = page_of(answer)
    assert is_page
    page = Reader(body.decode())
    assert body.startswith(b"<!DOCTYPE html>\n")
    assert ("html", "lang", "en") in page.attributes
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert page.elements["title"] == page.elements["h1"] == words_for(answer, "POST", reload_is_safe=True).title
    assert f"{answer.code} ({answer.status})" in page.elements["p"]
    assert page.elements.keys().isdisjoint({"script", "link", "img", "form"})
    assert status == answer.status
    lines = dict(line.split(": ", 1) for line in fields.decode().splitlines())
    digest = b64encode(sha256(page.elements["style"].encode()).digest()).decode()
    assert lines["Content-Security-Policy"] == (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{digest}'"
    )
    assert lines["Content-Type"] == "text/html; charset=utf-8"
    assert lines["Cache-Control"] == "no-store"
    assert lines["X-Content-Type-Options"] == "nosniff"
    assert lines["x-should-retry"] == ("true" if answer.kind.retryable else "false")


MAYBE = "Your order may have gone through"
WORDS_OF = {
    "outcome-unknown": (MAYBE, "check whether it arrived"),
    "upstream-lost": (MAYBE, "check whether it arrived"),
    "upstream-timeout": (MAYBE, "check whether it arrived"),
    "record-corrupt": (MAYBE, "check whether it arrived"),
    "in-flight": ("The first request is still running", "Reload this page"),
    "answer-not-stored": ("was carried out", "Reload this page"),
    "response-not-kept": ("was carried out before", "Do not send it again"),
    "key-expired": ("was carried out before", "Do not send it again"),
    "stream-gone": ("cannot be continued", "from its beginning"),
    "key-reused": ("sent before with other content", "Open the page with the form anew"),
    "key-missing": ("out of date or incomplete", "Open the page with the form anew"),
    "key-invalid": ("out of date or incomplete", "Open the page with the form anew"),
    "scope-unstable": ("nothing was done", "ask the people"),
    "key-absent": ("nothing was done", "ask the people"),
    "key-released": ("nothing was done", "ask the people"),
    "ask-refused": ("nothing was done", "ask the people"),
    "body-too-large": ("larger than this site accepts", "send less"),
    "store-unavailable": ("nothing was done", "Reload this page"),
    "overloaded": ("nothing was done", "Reload this page"),
    "upstream-unreachable": ("nothing was done", "Reload this page"),
}


@pytest.mark.parametrize("slug", PROBLEM_KINDS)
def test_the_words_say_what_became_of_it_and_what_to_do(slug):
    """What may have gone through is never called nothing, and what was not passed on is never called maybe."""
    words = words_for(problem(slug, "why"), "POST", reload_is_safe=True)
    message, advice = WORDS_OF[slug]
    assert message in words.message
    assert advice in words.advice


@pytest.mark.parametrize("slug", PROBLEM_KINDS)
def test_no_page_calls_a_reload_safe_that_is_not(slug):
    """Past the window of a derived key an equal form is a new one."""
    words = words_for(problem(slug, "why"), "POST", reload_is_safe=False)
    assert "safe" not in words.advice
    if words.kind in ("running", "done"):
        assert "Reload" not in words.advice


def test_what_is_sent_again_says_so():
    """Under `on_unknown = "retry"` a reload is a second try."""
    words = words_for(problem("upstream-lost", "why").for_mode(RETRY), "POST", reload_is_safe=True)
    assert "sent once more" in words.advice


@pytest.mark.parametrize("slug", ["upstream-lost", "upstream-timeout", "upstream-unreachable"])
def test_a_page_that_was_only_looked_at_ordered_nothing(slug):
    """A GET asks for nothing to be done."""
    words = words_for(problem(slug, "why"), "GET", reload_is_safe=True)
    assert "order" not in words.message + words.advice
    assert words.advice == "Reload this page in a moment."


def test_everything_in_a_page_is_escaped():
    """Whatever a key has in it is text."""
    body = page_of(problem("key-reused", NASTY, key=NASTY)).body.decode()
    assert "key &lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;amp;" in body
    assert "<script" not in body
    template = PageTemplate("".join(f"<p>${name}</p>" for name in TEXTS))
    assert "<script" not in page_of(problem("key-reused", NASTY, key=NASTY), {"page": template}).body.decode()


def test_a_page_shows_no_key_that_the_browser_made():
    """It says nothing to a person."""
    head = FORM._replace(fields={**FORM.fields, b"idempotency-key": [b'"18219755392632761061"']})
    assert b"1821975539" not in page_of(problem("in-flight", "", key="18219755392632761061"), head=head).body


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_page_can_be_read_by_day_and_by_night():
    """Text has the contrast of WCAG's level AAA, in light and in dark colours; the mark has that of graphics."""
    style = Reader(page_of(problem("in-flight", "")).body.decode()).elements["style"]
    light, _, dark = style.partition("prefers-color-scheme: dark")
    for part in (light, dark):
        colours = dict(re.findall(r"--(page|card|text|soft): (#[0-9a-f]{6})", part))
        assert contrast(colours["text"], colours["card"]) > 12
        assert contrast(colours["soft"], colours["card"]) > 7
        marks = re.findall(r"--mark: (#[0-9a-f]{6})", part)
        assert len(marks) == 2
        assert all(contrast(mark, colours["page"]) > 3 for mark in marks)


NAVIGATES, FETCHES = [b"navigate"], [b"cors"]
WANTED = {
    # (the rule's choice, Sec-Fetch-Mode)
    (None, None): False,
    (None, "navigate"): True,
    (None, "cors"): False,
    (None, "Navigate"): False,
    (True, None): True,
    (True, "navigate"): True,
    (True, "same-origin"): False,
    (False, None): False,
    (False, "navigate"): False,
}


@pytest.mark.parametrize("case", WANTED, ids=str)
def test_who_gets_a_page(case):
    """A rule speaks for those who do not say; `pages = true` gives no page to a script."""
    choice, mode = case
    fields = {} if mode is None else {b"sec-fetch-mode": [mode.encode()]}
    assert wants_page(choice, {b"accept": [b"text/html"], **fields}) is WANTED[case]


BAD = {
    "": "is empty",
    "<p>\n\n$5": "3: has a $ that begins no field; write $$",
    "<p>\n${title": "2: has a $ that begins no field",
    "<p>$titel": "1: $titel is unknown; the fields are $title, $message, $advice,",
    "<p>$detail": "$detail is unknown",
    "<$key>": "has $key as the name of an element",
    "</$key>": "has $key as the name of an element",
    "<p>\n<script>1</script>": "2: has <script>, which the page's policy blocks",
    '<link rel="stylesheet" href="a.css">': "has <link>",
    "<form><input></form>": "has <form>",
    '<p style="color: red">': "has the attribute style",
    '<p onclick="x()">': "has the attribute onclick",
    '<img src="/logo.png">': "loads another file with src",
    '<svg><image href="/logo.png"/></svg>': "loads another file with href",
    '<a href="/?$key">': "has a field in the attribute href; an attribute can have $kind, $code, $status alone",
    "<p $title>": "has a field in the attribute",
    "<style>p { color: $code }</style>": "has a field in a <style>",
    "<style>@import 'a.css';</style>": "has a <style> that loads another file",
    "<style>p { background: url( '/a.png') }</style>": "has a <style> that loads another file",
    "<style>p {}": "has a <style> without its end",
}


@pytest.mark.parametrize("text", BAD)
def test_a_template_that_a_browser_would_not_show_as_it_is_written(text):
    """Each mistake has its line and its reason."""
    with pytest.raises(BadTemplate) as raised:
        PageTemplate(text)
    assert BAD[text] in f"{raised.value.line}: {raised.value.reason}"


def test_a_template_shows_its_own_style_and_pictures():
    """Every style has its digest, over what a browser reads; pictures can be in the page."""
    logo = '<img alt="" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">'
    template = PageTemplate(
        f'<style>a {{}}\r\n</style>{PAGE}<p class="$kind $code s$status">$$5 ${{key}}</p>{logo}<style>b {{}}</style>'
    )
    digests = [b64encode(sha256(style).digest()).decode() for style in (b"a {}\n", b"b {}")]
    assert template.policy == (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src 'sha256-{digests[0]}' 'sha256-{digests[1]}'; img-src data:; font-src data:"
    )
    body = page_of(problem("in-flight", "", key="k-1"), {"page": template}).body.decode()
    assert '<p class="running in_flight s409">$5 k-1</p>' in body


@pytest.fixture
def load(tmp_path: Path):
    """Load the templates of a folder with these files."""

    def read(**texts: str | bytes) -> ErrorPages:
        for name, text in texts.items():
            (tmp_path / f"{name.replace('_', '-')}.html").write_bytes(
                text if isinstance(text, bytes) else text.encode()
            )
        return load_rules(Settings(upstream="http://127.0.0.1:9000", pages_dir=tmp_path)).pages

    return read


def test_a_problem_has_the_template_of_its_name_else_the_common_one(load):
    """An operator writes one page for all, and others where that is not enough."""
    pages = load(page=f"{PAGE}common", in_flight=f"{PAGE}running")
    for slug in PROBLEM_KINDS:
        body = pages.renderer(FORM, reload_is_safe=True)(problem(slug, ""), "").body
        assert body.endswith(b"running" if slug == "in-flight" else b"common")


def test_what_has_no_template_has_the_page_of_the_package(load):
    """A folder may have a page for one problem alone."""
    pages = load(key_reused=f"{PAGE}mine")
    assert b"Reference: in_flight" in pages.renderer(FORM, reload_is_safe=True)(problem("in-flight", ""), "").body


def test_all_mistakes_of_a_folder_are_reported_together(load, tmp_path):
    """With the file and the line of each."""
    with pytest.raises(SettingsError) as raised:
        load(page="<p>\n$titel", inflight=PAGE, in_flight=b"\xff", key_reused="x" * 200_000, overloaded=PAGE)
    names = ", ".join(f"{one}.html" for one in TEMPLATES)
    assert [text.removeprefix(f"{tmp_path}/") for text in raised.value.errors] == [
        "in-flight.html: cannot be read as UTF-8 text",
        f"inflight.html: no page has this name; the names of templates are {names}",
        "key-reused.html: is over 131072 bytes",
        f"page.html:2: $titel is unknown; the fields are {', '.join(f'${one}' for one in (*TEXTS, *WORDS))}",
    ]


@pytest.mark.parametrize(("folder", "reason"), [(".", "has no template"), ("none", "cannot be read: No such file")])
def test_a_folder_without_templates_is_a_mistake(tmp_path, monkeypatch, folder, reason):
    """A mount may have failed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=reason):
        load_rules(Settings(upstream="http://127.0.0.1:9000", pages_dir=Path(folder)))


def test_the_template_of_the_how_to_page_can_be_used():
    """What an operator copies is a page."""
    text = (ROOT / "docs/how-to/pages.md").read_text().partition("```html\n")[2].partition("```")[0]
    Reader(page_of(problem("outcome-unknown", ""), {"page": PageTemplate(text)}).body.decode())
