"""Pages of the admin listener: templates that escape every value, and the files that they load."""

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from aiohttp import web

from oncegate import __version__
from oncegate.admin.formats import FORMATS
from oncegate.admin.roles import Visitor

if TYPE_CHECKING:
    from jinja2 import Environment

PACKAGE = "oncegate.admin.pages"
# The files that pages load, with their types.
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def page(visitor: Visitor, template: str, status: int = 200, **values: Any) -> web.Response:
    """Return a page. A template sees `visitor`, `version` and `values`; a value that is missing is an error."""
    text = _environment().get_template(template).render(values, visitor=visitor, version=__version__)
    return web.Response(text=text, status=status, content_type="text/html")


def part(template: str, **values: Any) -> str:
    """Return a part of a page, as HTML."""
    return _environment().get_template(template).render(values)


async def asset(request: web.Request, _visitor: Visitor) -> web.Response:
    """Return a file of `pages/static/`."""
    content, kind = _assets().get(request.match_info["name"], (b"", ""))
    if not kind:
        raise web.HTTPNotFound
    return web.Response(body=content, content_type=kind, charset="utf-8")


@cache
def _environment() -> "Environment":
    # Imported with the first page: most processes never show one.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FORMATS
    return environment


@cache
def _assets() -> dict[str, tuple[bytes, str]]:
    folder = files(PACKAGE) / "static"
    return {
        file.name: (file.read_bytes(), KINDS[suffix])
        for file in folder.iterdir()
        if (suffix := "." + file.name.rpartition(".")[2]) in KINDS
    }
