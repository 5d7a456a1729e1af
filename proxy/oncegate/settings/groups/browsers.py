"""What browsers are told: which pages may read responses, and by which address and path they find what these name."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from oncegate.settings.addresses import parse_cookie_domain, parse_cors_origin
from oncegate.settings.values import from_text, list_of


class BrowserSettings(BaseModel):
    """A group of `Settings`."""

    cors_origins: Annotated[tuple[str, ...], list_of(parse_cors_origin)] = Field(
        (),
        description="Comma list of the origins whose pages may read responses, as `https://shop.example`, "
        "`https://*.shop.example` (one label or more in the place of `*`) or `*`. See "
        "[browsers](../how-to/browsers.md#other-origins).",
    )
    cors_credentials: bool = Field(
        False, description="Those pages may send cookies and other credentials of the browser. Not with `*`."
    )
    cors_by: Literal["auto", "api", "oncegate"] = Field(
        "auto",
        description="Whose CORS code decides about preflights and about the API's responses. `auto`: oncegate asks "
        "your API, and decides itself where the response shows no CORS code. `api`: your API alone. `oncegate`: "
        "preflights do not reach your API.",
    )
    rewrite_location: bool = Field(
        True,
        description="A `Location`, `Content-Location` or `Refresh` that names the upstream's own address becomes a "
        "path, so that clients come back through oncegate.",
    )
    rewrite_cookie_path: bool = Field(
        False,
        description="The `Path` of cookies loses the path of the upstream's URL, and gets the `X-Forwarded-Prefix` of "
        "a trusted proxy.",
    )
    cookie_domain: Annotated[str, from_text(parse_cookie_domain)] = Field(
        "",
        description="The `Domain` of cookies that have one. `drop` leaves it out: the cookie belongs to the host that "
        "the client asked. By default the API's own.",
    )
