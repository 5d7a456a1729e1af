"""Who may do what on the admin listener, and the routes that ask for it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from aiohttp import web


class Role(IntEnum):
    """What a route needs and what a visitor has. A role includes those below it."""

    OPEN = 0
    # To read everything but the bodies of responses.
    VIEW = 1
    # To change keys, and to read bodies.
    OPERATE = 2


class Way(Enum):
    """How a visitor showed who it is."""

    NONE = ""
    LOOPBACK = "loopback"
    SESSION = "session"
    BEARER = "bearer"
    CERTIFICATE = "certificate"
    PROXY = "proxy"


@dataclass(frozen=True, slots=True)
class Visitor:
    """Whoever sent a request to the admin listener.

    `name`: for the audit. `form_token`: what a form of this visitor must send back, in a field of that name.
    """

    name: str
    role: Role
    way: Way
    form_token: str = ""

    @property
    def may_operate(self) -> bool:
        return self.role >= Role.OPERATE

    @property
    def has_session(self) -> bool:
        return self.way is Way.SESSION

    @property
    def may_log_in(self) -> bool:
        return self.way is Way.LOOPBACK


NOBODY = Visitor("nobody", Role.OPEN, Way.NONE)

Handler = Callable[[web.Request, Visitor], Awaitable[web.StreamResponse]]


class Route(NamedTuple):
    """One route of the admin listener. A GET changes nothing; a POST carries its visitor's form token."""

    method: str
    path: str
    role: Role
    handler: Handler


class Refused(Exception):
    """Why a request gets nowhere: the status and a sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason
