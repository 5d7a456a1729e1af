"""What every page has: the count of keys to decide, and where it is."""

import socket
from typing import Any

from aiohttp import web

from oncegate.admin.roles import Visitor
from oncegate.admin.templates import page, part
from oncegate.admin.watching.overview import Overview

HOST = socket.gethostname()


def show(overview: Overview, visitor: Visitor, here: str, template: str = "", **values: Any) -> web.Response:
    """Return a page. `here`: its tab, and its template unless another is named. `status`: of the response."""
    return page(visitor, template or f"{here}.html", here=here, host=HOST, look=overview.last, **values)


def badge(overview: Overview) -> str:
    """Return the count of keys to decide, as HTML."""
    return part("badge.html", look=overview.last)


def field(form: Any, name: str) -> str:
    """Return the text in a field of a form; empty for none, and for a file."""
    value = form.get(name, "")
    return value if isinstance(value, str) else ""
