"""Who may see and change what on the admin listener."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from oncegate.settings.addresses import Network, parse_host, parse_network
from oncegate.settings.names import parse_header
from oncegate.settings.values import ReadableFile, Seconds, from_text, list_of

_USER = re.compile(r"(view|operate):(\*?[^\s*,]*)")


@dataclass(frozen=True, slots=True)
class UserRole:
    """The role of a name, or of all names that end like it where `name` begins with `*`."""

    role: Literal["view", "operate"]
    name: str

    def __str__(self) -> str:
        return f"{self.role}:{self.name}"

    def includes(self, name: str) -> bool:
        """Return whether a name is meant; case does not count."""
        mine, theirs = self.name.lower(), name.lower()
        return theirs.endswith(mine[1:]) if mine.startswith("*") else theirs == mine


def parse_user(text: str) -> UserRole:
    """Return the role of a name, of `ROLE:NAME`."""
    match = _USER.fullmatch(text)
    if match is None or not match[2]:
        raise ValueError("must be view:NAME or operate:NAME, such as operate:ana@example.com or view:*@example.com")
    return UserRole("view" if match[1] == "view" else "operate", match[2])


class AccessSettings(BaseModel):
    """A group of `Settings`."""

    admin_tokens_file: ReadableFile = Field(
        None,
        description="File with the [tokens](../how-to/who-may.md#tokens) of people and tools: lines of `ROLE NAME "
        "TOKEN`, where the role is `view` or `operate`. Not everybody on the machine may be able to read it. SIGHUP "
        "makes oncegate read it again.",
    )
    admin_session_s: Seconds = Field(28_800, description="How long a login to the admin pages lasts.")
    admin_hosts: Annotated[tuple[str, ...], list_of(parse_host)] = Field(
        (),
        description="Comma list of hosts, as `host` or `host:port`, by which the machine itself may read the admin "
        "pages without a role, beside `localhost` and loopback addresses.",
    )
    admin_local_view: bool = Field(
        True,
        description="The machine itself may read the admin pages without a role. `false` where something on the "
        "machine passes on what others ask, and does not say so, such as a proxy of a service mesh.",
    )
    admin_user_header: Annotated[str | None, from_text(parse_header)] = Field(
        None,
        description="Header in which a proxy that authenticates people, such as oauth2-proxy, names the user: "
        "`X-Forwarded-Email`.",
    )
    admin_user_proxies: Annotated[tuple[Network, ...], list_of(parse_network)] = Field(
        (),
        description="Comma list of networks of these proxies. A request from elsewhere that has "
        "`ONCEGATE_ADMIN_USER_HEADER` is refused.",
    )
    admin_users: Annotated[tuple[UserRole, ...], list_of(parse_user)] = Field(
        (),
        description="Comma list of who has which role, by the name in `ONCEGATE_ADMIN_USER_HEADER` or in a client "
        "certificate: `operate:ana@example.com,view:*@example.com`. The highest role counts.",
    )
    admin_tls_cert_file: ReadableFile = Field(
        None, description="Certificate chain (PEM) of the admin listener. SIGHUP makes oncegate read it again."
    )
    admin_tls_key_file: ReadableFile = Field(None, description="Private key (PEM) of `ONCEGATE_ADMIN_TLS_CERT_FILE`.")
    admin_tls_ca_file: ReadableFile = Field(
        None,
        description="CA certificates (PEM) of people and tools. `ONCEGATE_ADMIN_USERS` gives a role to the common "
        "name, or a subject alternative name, of their certificates. Probes and scrapes need none.",
    )
