"""Texts with placeholders, such as `/charges/{key}`, and how values are written into them. Pure.

A template is read once, at start, and filled in one pass: braces inside a value are no placeholder. Values are a
client's, so that nothing of them may end up outside of its place: each is bounded, has no control characters, and is
escaped for where it goes.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from unicodedata import category
from urllib.parse import quote, unquote

MAX_TEMPLATE_CHARACTERS = 8192
MAX_PLACEHOLDERS = 32
# Of one value, in UTF-8. A longer one is never cut: half an id is another one's.
MAX_VALUE_BYTES = 1024
# The values of an answer, in the template of a response: `{answer:/data/0/id}`.
ANSWER = "answer:"

# Behind one of these a value stands in quotes of some other language, such as that of a search.
_QUOTES = ("'", "%27", "%22", '\\"')
_QUOTING = re.compile(r"['\"\\]")
_PIECE = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")


@dataclass(frozen=True, slots=True)
class Unfillable:
    """A template or a question that cannot be made of these values. `why` repeats no value."""

    why: str


@dataclass(frozen=True, slots=True)
class Template:
    """A text with placeholders. `literals` stand around the `names`: there is one more of them."""

    literals: tuple[str, ...]
    names: tuple[str, ...]

    def fill(self, values: Mapping[str, str], escape: Callable[[str], str] = str) -> str | Unfillable:
        """Return the text with each value, escaped, in its place."""
        pieces: list[str] = []
        for literal, name in zip(self.literals, self.names, strict=False):
            value = values.get(name, "")
            if why := unusable(value) or _ends_quotes(literal, value):
                return Unfillable(f"{{{name}}} {why}")
            pieces += literal, escape(value)
        return "".join((*pieces, self.literals[-1]))


def parse_template(text: str, known: Collection[str]) -> Template:
    """Return the template in a text; `{{` and `}}` are braces. Raises ValueError. `known`: names that it may have."""
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(f"is over {MAX_TEMPLATE_CHARACTERS} characters")
    literals, names, at = [""], [], 0
    for piece in _PIECE.finditer(text):
        literals[-1] += text[at : piece.start()]
        at = piece.end()
        if piece[0] in ("{{", "}}"):
            literals[-1] += piece[0][0]
        elif len(piece[0]) == 1:
            raise ValueError(f"has a {piece[0]} without its other half; a brace itself is written twice")
        else:
            names.append(_known_name(piece[0][1:-1], known))
            literals.append("")
    literals[-1] += text[at:]
    if len(names) > MAX_PLACEHOLDERS:
        raise ValueError(f"has over {MAX_PLACEHOLDERS} placeholders")
    return Template(tuple(literals), tuple(names))


def _known_name(name: str, known: Collection[str]) -> str:
    is_of_answer = ANSWER in known and name.startswith(f"{ANSWER}/")
    if name not in known and not is_of_answer:
        names = ", ".join(f"{{{one}}}" for one in known if one != ANSWER) or "nothing: keep names no value"
        raise ValueError(f"names {{{name}}}, which is not there; there is {names}")
    return name


def unusable(value: str) -> str:
    """Return why a value is written into no template; empty where it is."""
    # In a path an empty one would ask for the list of everything.
    if not value:
        return "has no value"
    if any(category(character) in ("Cc", "Cs") for character in value):
        return "has a control character"
    return f"is over {MAX_VALUE_BYTES} bytes" if len(value.encode()) > MAX_VALUE_BYTES else ""


def _ends_quotes(literal: str, value: str) -> str:
    """Return why a value behind this text would not stay between its quotes; empty where it does."""
    return "has a quote, and stands between quotes" if literal.endswith(_QUOTES) and _QUOTING.search(value) else ""


def in_url(value: str) -> str:
    """Return a value as it stands in a path or a query: all but unreserved characters (RFC 3986) are escaped."""
    return quote(value, safe="")


def in_json(value: str) -> str:
    """Return a value as it stands between the quotes of a JSON text, in ASCII."""
    return json.dumps(value)[1:-1]


def climbs(value: str) -> bool:
    """Return whether a value could lead out of its place in a path: servers undo escapes, some of them twice."""
    spellings = value, unquote(value), unquote(unquote(value))
    return any(not {".", ".."}.isdisjoint(re.split(r"[/\\]", spelling)) for spelling in spellings)
