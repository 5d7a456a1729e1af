"""Conditions on a request's body by which a rule may match: values of its JSON document. Pure.

A body is read for this only where a rule that matches the head has such a condition. What cannot be read meets none, so
that the request falls to the next rule.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from oncegate.keys.documents import MAX_BYTES, Missing, follow_pointer, is_encoded, parse_document, parse_pointer
from oncegate.keys.syntax import BadKey
from oncegate.messages.fields import Fields
from oncegate.rules.patterns import text_includes, text_matcher

# A JSON document in a tuple of one, or why a body is none that can be read.
Document = tuple[Any] | BadKey

NO_BODY = BadKey("the request has no body")
_TOO_LONG = BadKey(f"the body is over {MAX_BYTES} bytes, too long to choose a rule by it")
_ENCODED = BadKey("the body is encoded, so no rule can be chosen by it")


def unread_document(fields: Fields, stated_bytes: int | None) -> BadKey | None:
    """Return why a body need not be read to choose a rule, None where it has to be. `stated_bytes`: its length."""
    if stated_bytes == 0:
        return NO_BODY
    if is_encoded(fields):
        return _ENCODED
    return _TOO_LONG if stated_bytes is not None and stated_bytes > MAX_BYTES else None


def read_document(fields: Fields, body: bytes, spooled: bool = False) -> Document:
    """Return the document of a body that is here. `spooled`: it is too long to be read."""
    if spooled:
        return _TOO_LONG
    return unread_document(fields, len(body)) or parse_document(body)


class BodyConditions:
    """The values that members of a body must have, as `when` of a rule names them.

    `globs`: a JSON pointer, and patterns of which one must match the text, the number as it is written, `true` or
    `false` that is there. One member of an array meets them for the array, so that no batch evades the rule for its
    parts.
    """

    def __init__(self, globs: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        self.globs = dict(globs)
        self._members = [
            (text, parse_pointer(text), [text_matcher(one) for one in some]) for text, some in self.globs.items()
        ]

    def unmet(self, document: Document) -> str:
        """Return why a document does not meet the conditions, empty where it does."""
        if isinstance(document, BadKey):
            return document.detail
        reason = self._unmet_by(document[0])
        batch = document[0] if reason and isinstance(document[0], list) else ()
        return "" if any(not self._unmet_by(one) for one in batch) else reason

    def _unmet_by(self, value: Any) -> str:
        for text, pointer, patterns in self._members:
            found = _text_at(value, pointer)
            if found is None:
                return f"the body has no single value at {text}"
            if not any(pattern.fullmatch(found) for pattern in patterns):
                return f"the value at {text} is another one"
        return ""

    def includes(self, other: "BodyConditions") -> bool:
        """Return whether each body that meets the `other` conditions surely meets these."""
        return all(
            text in other.globs and all(any(text_includes(one, inner) for one in outer) for inner in other.globs[text])
            for text, outer in self.globs.items()
        )


def _text_at(value: Any, pointer: Sequence[str]) -> bytes | None:
    """Return the text of the value at a pointer; None for none, for two, and for an object or an array."""
    match follow_pointer(value, pointer):
        case bytes() as number:
            return number
        case str() as text:
            return text.encode("utf-8", "surrogatepass")
        case bool() as truth:
            return b"true" if truth else b"false"
        case Missing() | BadKey() | _:
            return None
