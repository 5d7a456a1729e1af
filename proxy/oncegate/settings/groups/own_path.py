"""Where oncegate itself answers on the public listener, about streams and keys."""

from typing import Annotated

from pydantic import BaseModel, Field

from oncegate.settings.addresses import parse_own_path
from oncegate.settings.values import OptionalUrl, from_text


class OwnPathSettings(BaseModel):
    """A group of `Settings`."""

    own_path: Annotated[str, from_text(parse_own_path)] = Field(
        "/.oncegate",
        description="Path below which oncegate itself answers on the public listener, where a rule has "
        "[addresses](../how-to/streams.md#the-address-of-a-response). Your API gets no request for it then. Without "
        "such a rule, it is a path like any other.",
    )
    ask_keys: bool = Field(
        False,
        description="Answer [questions about keys](asking.md): what became of a request, without sending it again. "
        "Whoever asks shows the credential of the request.",
    )
    public_base: OptionalUrl = Field(
        None,
        description="URL by which clients reach the public listener, such as `https://api.example.com/v1`, if a proxy "
        "in front changes host or path. oncegate puts it before the addresses that it makes. Without it they are "
        "paths, behind the `X-Forwarded-Prefix` of a trusted proxy.",
    )
