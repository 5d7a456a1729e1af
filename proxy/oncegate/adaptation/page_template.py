"""Templates of pages: HTML with `$fields`, held to what a page's Content-Security-Policy lets a browser show. Pure."""

import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from html.parser import HTMLParser
from string import Template

# Each page is sent whole, to whoever asks.
MAX_PAGE_BYTES = 131_072

# What a template can show. Values of WORDS are oncegate's own, without spaces, so that they fit into attributes.
TEXTS = ("title", "message", "advice", "reference", "key", "time")
WORDS = ("kind", "code", "status")
_FIELDS = ", ".join(f"${name}" for name in (*TEXTS, *WORDS))

# Where a field stands, the check of a template reads a character that no text has a use for.
_TEXT, _WORD = "\ue000", "\ue001"
_SHOWN = dict.fromkeys(TEXTS, _TEXT) | dict.fromkeys(WORDS, _WORD)
# What the policy blocks: elements, attributes that load a file, and a style that does.
_BLOCKED = frozenset(
    ("audio", "base", "embed", "form", "frame", "iframe", "link", "object", "script", "source", "track", "video")
)
_LOADING = ("background", "poster", "src", "srcset")
_LOADING_STYLE = re.compile(r"@import|url\(\s*[\"']?(?!\s*(?:data:|#))", re.IGNORECASE)


class BadTemplate(Exception):
    """A template cannot be used: the line of the first mistake, and what it is."""

    def __init__(self, line: int, reason: str) -> None:
        self.line, self.reason = line, reason
        super().__init__(reason)


class PageTemplate:
    """One template. `policy` is the value of Content-Security-Policy for its pages."""

    def __init__(self, text: str) -> None:
        """Raises BadTemplate."""
        # A browser does the same before it digests a style.
        self._template = Template(text.replace("\r\n", "\n").replace("\r", "\n"))
        _check_fields(self._template)
        self.policy = _Content(self._template.substitute(_SHOWN)).policy

    def fill(self, values: Mapping[str, str]) -> bytes:
        """Return the page with a value for each field of TEXTS and WORDS; every value is escaped."""
        return self._template.substitute({name: escape(value) for name, value in values.items()}).encode()


def _check_fields(template: Template) -> None:
    text = template.template
    if not text.strip():
        raise BadTemplate(1, "is empty")
    for found in template.pattern.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        name = found["named"] or found["braced"]
        if found["invalid"] is not None:
            raise BadTemplate(line, "has a $ that begins no field; write $$ for a dollar sign")
        if name is not None and name not in _SHOWN:
            raise BadTemplate(line, f"${name} is unknown; the fields are {_FIELDS}")
        # A value would name the element, and a key is the client's.
        if name is not None and re.search(r"<[/!?]?$", text[: found.start()]):
            raise BadTemplate(line, f"has ${name} as the name of an element")


class _Content(HTMLParser):
    """What a filled template has. Raises BadTemplate for what a browser would leave out, or never get to show."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self._styles: list[str] = []
        self._in_style = self._has_data = False
        self.feed(page)
        self.close()
        if self._in_style:
            raise self._mistake("has a <style> without its end")

    @property
    def policy(self) -> str:
        """The Content-Security-Policy under which a browser shows all of it, and loads and runs nothing."""
        digests = (b64encode(sha256(style.encode()).digest()).decode() for style in self._styles)
        styles = " ".join(f"'sha256-{digest}'" for digest in digests)
        parts = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
        parts += [f"style-src {styles}"] if styles else []
        # No frame-ancestors: a page in a frame, such as a checkout's, has to say what became of the order, and has
        # nothing that a click could do.
        return "; ".join([*parts, "img-src data:", "font-src data:"] if self._has_data else parts)

    def _mistake(self, reason: str) -> BadTemplate:
        return BadTemplate(self.getpos()[0], reason)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKED:
            raise self._mistake(f"has <{tag}>, which the page's policy blocks: a page is one file that runs nothing")
        for name, value in attrs:
            self._check_attribute(tag, name, value or "")
        if tag == "style":
            self._in_style = True
            self._styles.append("")

    def _check_attribute(self, tag: str, name: str, value: str) -> None:
        if name == "style" or name.startswith("on"):
            raise self._mistake(f"has the attribute {name}, which the page's policy blocks; write a <style>")
        if name in _LOADING or (tag == "image" and name.endswith("href")):
            if not value.strip().lower().startswith("data:"):
                raise self._mistake(
                    f"loads another file with {name}, which the page's policy blocks; write a data: URL"
                )
            self._has_data = True
        if _TEXT in name + value or _WORD in name:
            words = ", ".join(f"${one}" for one in WORDS)
            raise self._mistake(f"has a field in the attribute {name}; an attribute can have {words} alone")

    def handle_endtag(self, tag: str) -> None:
        if tag == "style":
            self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            return
        if _TEXT in data or _WORD in data:
            raise self._mistake("has a field in a <style>")
        if _LOADING_STYLE.search(data):
            raise self._mistake("has a <style> that loads another file, which the page's policy blocks")
        self._has_data = self._has_data or "data:" in data
        self._styles[-1] += data
