"""How a response to a client marks the end of its body. Pure."""

from typing import Final, NamedTuple


class Framing(NamedTuple):
    """How a response is framed for the client, beyond what its own fields say.

    `adds_length`: a Content-Length is added once the size is known. `closes`: only closing the connection ends the body
    (RFC 9112, section 6.3, rule 8).
    """

    adds_length: bool
    closes: bool


# The fields have a Content-Length already, or there is no body.
STATED: Final = Framing(adds_length=False, closes=False)
COUNTED: Final = Framing(adds_length=True, closes=False)
CLOSING: Final = Framing(adds_length=False, closes=True)
