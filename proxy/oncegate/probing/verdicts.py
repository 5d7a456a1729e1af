"""What an answer says about the request that was asked about, and what a duplicate then gets. Pure.

In doubt an answer is inconclusive. `absent` frees a key, and the two others end it for good: none of them may come
from a gateway, a cache, another's object, or an answer that two readers could understand differently.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

from oncegate.decision import Verdict
from oncegate.keys.documents import Missing, follow_pointer, is_encoded, parse_document, parse_pointer
from oncegate.keys.syntax import BadKey
from oncegate.messages.fields import Fields, Pairs, by_name
from oncegate.probing.given_head import given_head
from oncegate.probing.plan import JSON, Answer, Entry, Plan, Pointer
from oncegate.probing.templates import ANSWER, Unfillable, in_json

# Of an answer. Whoever asks reads one byte more at most.
MAX_ANSWER_BYTES = 65_536
# Of one value in the audit trail, in characters.
MAX_AUDITED = 128
# They say something of the question, of its credentials or of the server at this moment, not of the operation.
SILENT = frozenset((401, 403, 407, 408, 421, 425, 429))


class ProbeAnswer(NamedTuple):
    """What came back. `fields` and `body` as they came; of a longer body the first MAX_ANSWER_BYTES + 1 bytes."""

    status: int
    fields: Pairs
    body: bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """A verdict, and what it rests on. `why`: of an inconclusive one. `status` 0: no answer came.

    `values`: at the pointers of `audit`, as far as they are there. `body_digest`: SHA-256, hexadecimal.
    """

    verdict: Verdict
    status: int
    why: str = ""
    values: tuple[tuple[str, str], ...] = ()
    body_digest: str = ""


class Answered(NamedTuple):
    """The response for duplicates. `headers`: lines `Name: value`."""

    status: int
    headers: tuple[str, ...]
    body: bytes


# A JSON document in a tuple of one; nothing of an answer without a body.
Document = tuple[Any, ...]


def no_answer(why: str) -> Evidence:
    """Return the evidence of a question without an answer."""
    return Evidence(Verdict.INCONCLUSIVE, 0, why)


def says_nothing(status: int) -> bool:
    """Return whether a status says nothing of the operation, whatever a rule says."""
    return status in SILENT or not (200 <= status < 300 or 400 <= status < 500)


def conclude(plan: Plan, values: Mapping[str, str], answer: ProbeAnswer) -> Evidence:
    """Return what an answer says about the request with these values."""
    document = _document(answer)
    digest = sha256(answer.body).hexdigest() if len(answer.body) <= MAX_ANSWER_BYTES else ""
    if isinstance(document, str):
        return Evidence(Verdict.INCONCLUSIVE, answer.status, document, (), digest)
    verdict, why = _verdict(plan, values, answer, document)
    shown = ((pointer[0], _text_at(document, pointer)) for pointer in plan.audit)
    audited = tuple((name, text[:MAX_AUDITED]) for name, text in shown if text is not None)
    return Evidence(verdict, answer.status, why, audited, digest)


def _document(answer: ProbeAnswer) -> Document | str:
    """Return the document of an answer, or why it is inconclusive."""
    fields = by_name(answer.fields)
    if says_nothing(answer.status):
        return f"status {answer.status} says nothing of the operation"
    if len(answer.body) > MAX_ANSWER_BYTES:
        return f"the body is over {MAX_ANSWER_BYTES} bytes"
    if not answer.body:
        return ()
    if is_encoded(fields):
        return "the body is encoded"
    document = parse_document(answer.body) if _is_json(fields) else BadKey("")
    return "the body is no JSON in UTF-8 that can be read" if isinstance(document, BadKey) else document


def _is_json(fields: Fields) -> bool:
    kind = fields.get(b"content-type", [b""])[-1].partition(b";")[0].strip().lower()
    return kind == JSON.encode() or kind.endswith(b"+json")


def _verdict(plan: Plan, values: Mapping[str, str], answer: ProbeAnswer, document: Document) -> tuple[Verdict, str]:
    """Return the verdict, and why it is inconclusive."""
    found = dict.fromkeys(verdict for verdict, entry in plan.entries if _meets(entry, answer.status, document))
    if len(found) != 1:
        names = " and ".join(verdict.value for verdict in found)
        return Verdict.INCONCLUSIVE, f"it is {names} at once" if found else "no entry of the rule names this answer"
    verdict = next(iter(found))
    if verdict is Verdict.INCONCLUSIVE:
        return verdict, "the rule says so"
    if verdict is Verdict.ABSENT:
        is_cached = by_name(answer.fields).get(b"age", [b"0"]) != [b"0"]
        return (Verdict.INCONCLUSIVE, "it comes from a cache") if is_cached else (verdict, "")
    why = _unlike_reference(plan, values, document)
    if not why and isinstance(made := answered(plan, verdict, values, answer), Unfillable):
        why = f"answers.{verdict.value}: {made.why}"
    return (Verdict.INCONCLUSIVE, why) if why else (verdict, "")


def _meets(entry: Entry, status: int, document: Document) -> bool:
    if entry.status not in (str(status), f"{status // 100}xx"):
        return False
    return all(_text_at(document, pointer) in texts for pointer, texts in entry.when) and all(
        _is_empty(document, pointer) for pointer in entry.empty
    )


def _value_at(document: Document, pointer: Pointer) -> Any:
    return follow_pointer(document[0], pointer[1]) if document else Missing("")


def _text_at(document: Document, pointer: Pointer) -> str | None:
    """Return the text at a pointer, a number as it is written, `true` or `false`; None for anything else."""
    match _value_at(document, pointer):
        case bool() as value:
            return "true" if value else "false"
        case bytes() as value:
            return value.decode()
        case str() as value:
            return value
        case _:
            return None


def _is_empty(document: Document, pointer: Pointer) -> bool:
    value = _value_at(document, pointer)
    return value is None or (isinstance(value, list | tuple) and not value)


def _unlike_reference(plan: Plan, values: Mapping[str, str], document: Document) -> str:
    """Return why an answer is not about the request; empty where it is."""
    for pointer, template in plan.reference:
        if _is_one_of_several(document, pointer[1]):
            return f"there is more than one object at {pointer[0]}"
        if _text_at(document, pointer) != template.fill(values):
            return f"{pointer[0]} is not what was asked for"
    return ""


def _is_one_of_several(document: Document, tokens: Sequence[str]) -> bool:
    """Return whether a pointer picks one member of a longer list: the others may say something else."""
    lists = (_value_at(document, ("", tuple(tokens[:count]))) for count in range(len(tokens)))
    return any(isinstance(value, list) and len(value) > 1 for value in lists)


# What a duplicate gets ...


def answered(plan: Plan, verdict: Verdict, values: Mapping[str, str], answer: ProbeAnswer) -> Answered | Unfillable:
    """Return the response for duplicates after a verdict by this answer, which `conclude` has read."""
    given, document = plan.answer(verdict), _document(answer)
    body = _body(given, values, answer, () if isinstance(document, str) else document)
    if isinstance(body, Unfillable):
        return body
    status = given.status or answer.status
    headers = given.headers or _content_type(given, answer, body)
    head = given_head(status, headers, bool(body))
    return Unfillable(head) if isinstance(head, str) else Answered(status, headers, body)


def _body(given: Answer, values: Mapping[str, str], answer: ProbeAnswer, document: Document) -> bytes | Unfillable:
    if given.body is not None:
        names = [name for name in given.body.names if name.startswith(ANSWER)]
        texts = {name: _text_at(document, pointer_of(name)) for name in names}
        filled = given.body.fill({**values, **{name: text or "" for name, text in texts.items()}}, in_json)
        return filled if isinstance(filled, Unfillable) else filled.encode()
    if given.body_pointer is not None:
        value = _value_at(document, given.body_pointer)
        if isinstance(value, Missing | BadKey):
            return Unfillable(f"{given.body_pointer[0]} is not in the answer")
        return written(value).encode()
    # A status without a body takes none of the probe's.
    return b"" if (given.status or answer.status) in (204, 304) else answer.body


def pointer_of(name: str) -> Pointer:
    """Return the pointer in a placeholder of an answer, `answer:/data/0/id`."""
    text = name.removeprefix(ANSWER)
    return text, parse_pointer(text)


def _content_type(given: Answer, answer: ProbeAnswer, body: bytes) -> tuple[str, ...]:
    if not body:
        return ()
    is_own = given.body is None and given.body_pointer is None
    own = by_name(answer.fields).get(b"content-type", [b""])[-1].decode("latin-1").strip()
    return (f"Content-Type: {own if is_own and own.isascii() and own.isprintable() else JSON}",)


def written(value: Any) -> str:
    """Return a value of `parse_document` as JSON in ASCII, with its numbers as they were written."""
    match value:
        case bytes():
            return value.decode()
        case tuple():
            return "{" + _joined(f"{json.dumps(name)}:{written(member)}" for name, member in value) + "}"
        case list():
            return "[" + _joined(map(written, value)) + "]"
        case _:
            return json.dumps(value)


def _joined(texts: Iterable[str]) -> str:
    return ",".join(texts)
