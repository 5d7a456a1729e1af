"""Oncegate's own answers as pages: what a person reads whose browser navigated to it. Pure."""

from html import escape

from oncegate.messages.fields import Fields
from oncegate.messages.problems import Problem, Rendering

_POLICY = b"Content-Security-Policy: default-src 'none'; base-uri 'none'; form-action 'none'\r\n"
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title></head><body><h1>{title}</h1><p>{detail}</p></body></html>
"""


def is_navigation(fields: Fields) -> bool:
    """Return whether a browser's window is to show the answer (Fetch Metadata, section 2.2).

    `Accept` does not tell: Java's HttpURLConnection asks for text/html first.
    """
    return fields.get(b"sec-fetch-mode") == [b"navigate"]


def as_page(problem: Problem, _docs_url: str) -> Rendering:
    """Return a problem as an HTML page."""
    page = _PAGE.format(title=escape(problem.kind.title), detail=escape(problem.detail))
    fields = problem.head_fields(b"text/html; charset=utf-8") + _POLICY + b"X-Content-Type-Options: nosniff\r\n"
    return Rendering(problem.status, fields, page.encode())
