"""The templates of the table `[rule.reconcile]`: what is asked, what must be repeated, what duplicates get. Pure."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from oncegate.decision import Verdict
from oncegate.keys.documents import parse_document
from oncegate.probing.given_head import given_head
from oncegate.probing.plan import JSON, Answer, Pointer
from oncegate.probing.table_fields import VERDICTS, Check, checked, members_of, pointer, text_of
from oncegate.probing.templates import ANSWER, Template, in_json, parse_template
from oncegate.settings.addresses import parse_origin

# The characters of a path and a query (RFC 3986, sections 3.3 and 3.4).
_URL_TEXT = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_URL = re.compile(r"(?P<origin>[^/?#]*://[^/?#]*)?(?P<path>/[^?]*)(?:\?(?P<query>.*))?", re.DOTALL)
_SAMPLE = "x"


def parse_url(text: str, known: Collection[str]) -> dict[str, Any]:
    """Return the parts of a plan that a URL gives. Raises ValueError, as all of these."""
    match = _URL.fullmatch(text)
    if match is None or text.startswith(("//", "/\\")):
        raise ValueError("must be a path such as /charges/{key}, or begin with http:// or https:// and a host")
    origin = match["origin"]
    if origin and ("{" in origin or "}" in origin):
        raise ValueError("has a placeholder in its scheme or host: the client would say who is asked")
    path = parse_template(match["path"], known)
    query = parse_template(match["query"], known) if match["query"] is not None else None
    for template in (path, query):
        if template and not all(map(_URL_TEXT.fullmatch, template.literals)):
            raise ValueError("has characters that stand in no path or query; escape them as %20")
    _check_segments(path)
    asked = parse_origin(origin) if origin else None
    return {"origin": asked, "is_upstream": asked is None, "path": path, "query": query}


def _check_segments(path: Template) -> None:
    filled = str(path.fill(dict.fromkeys(path.names, _SAMPLE)))
    segments = re.sub("%2[eE]", ".", filled).split("/")
    if not {".", ".."}.isdisjoint(segments):
        raise ValueError("has a segment . or .. in its path")


def parse_body(text: str, content_type: str, known: Collection[str]) -> Template:
    """Return the template of a body of one of the two types."""
    template = parse_template(text, known)
    if content_type == JSON:
        _check_json(template)
    elif not all(map(_URL_TEXT.fullmatch, template.literals)):
        raise ValueError("has characters that stand in no form; escape them as %20")
    return template


def _check_json(template: Template) -> None:
    """Refuse a template that is no JSON, or that has a placeholder outside of a text in quotes."""
    filled = template.fill(dict.fromkeys(template.names, _SAMPLE), in_json)
    if not isinstance(filled, str) or not isinstance(parse_document(filled.encode()), tuple):
        raise ValueError("is no JSON; a placeholder stands in a text in quotes, and a brace is written twice")


def parse_reference(pairs: Mapping[str, Any], known: Collection[str]) -> tuple[tuple[Pointer, Template], ...]:
    """Return what an answer must repeat."""
    reference = []
    for name, text in pairs.items():
        template = parse_template(text_of(text), known)
        if not template.names:
            raise ValueError(f"{name} names no value of the request; what an answer must say stands in when")
        reference.append((pointer(name), template))
    return tuple(reference)


def parse_answers(tables: Mapping[str, Any], known: Collection[str]) -> tuple[tuple[Verdict, Answer], ...]:
    """Return what duplicates get, by the verdicts that end a key."""
    answers = []
    for name, table in tables.items():
        if name not in ("succeeded", "failed"):
            raise ValueError(f"{name} is unknown; only succeeded and failed end a key")
        if not isinstance(table, dict):
            raise ValueError(f"{name} must be a table")
        answers.append((VERDICTS[name], _answer(name, table, known)))
    return tuple(answers)


def _answer(name: str, table: Mapping[str, Any], known: Collection[str]) -> Answer:
    problems: list[str] = []
    checks: dict[str, Check] = {
        "status": _answer_status,
        "headers": lambda value: tuple(text_of(line) for line in members_of(value, 32)),
        "body": lambda value: parse_body(text_of(value), JSON, [*known, ANSWER]),
        "body_pointer": pointer,
    }
    answer = Answer(**dict(checked(table, checks, problems)))
    if answer.body and answer.body_pointer:
        problems.append("body contradicts body_pointer")
    head = given_head(answer.status or 200, answer.headers, bool(answer.body or answer.body_pointer))
    if isinstance(head, str):
        problems.append(head)
    if problems:
        raise ValueError("; ".join(f"{name}: {problem}" for problem in problems))
    return answer


def _answer_status(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 200 <= value <= 599:
        raise ValueError("must be a status from 200 to 599")
    return value
