"""What clients meet: the listeners, and the limits of a client's connection."""

from typing import Annotated

from pydantic import BaseModel, Field

from oncegate.settings.addresses import Address, Network, parse_host, parse_network
from oncegate.settings.names import parse_request_id_header
from oncegate.settings.values import (
    MEBIBYTE,
    PIBIBYTE,
    Bytes,
    Count,
    ListenAddress,
    ReadableFile,
    Seconds,
    from_text,
    list_of,
)


class ClientSettings(BaseModel):
    """A group of `Settings`."""

    listen: ListenAddress = Field(
        Address("127.0.0.1", 8080),
        description="Address of the public listener. `[::]` serves clients of IPv6 and IPv4. The container image sets "
        "`0.0.0.0:8080`.",
    )
    tls_cert_file: ReadableFile = Field(
        None, description="Certificate chain (PEM) of the public listener. SIGHUP makes oncegate read it again."
    )
    tls_key_file: ReadableFile = Field(None, description="Private key (PEM) of the public listener.")
    admin_listen: ListenAddress = Field(
        Address("127.0.0.1", 8081),
        description="Address of the listener for `/metrics`, `/healthz`, `/readyz` and the "
        "[pages for operators](../how-to/who-may.md). Keep it private. The container image sets `0.0.0.0:8081`.",
    )
    hosts: Annotated[tuple[str, ...], list_of(parse_host)] = Field(
        (),
        description="Comma list of the served hosts, as `host` or `host:port`. Requests for other hosts get 421. Set "
        "it where oncegate runs on a machine with a browser.",
    )
    trusted_proxies: Annotated[tuple[Network, ...], list_of(parse_network)] = Field(
        (),
        description="Comma list of networks. oncegate forwards the `Forwarded`, `X-Forwarded-*`, `Via` and `X-Real-IP` "
        "headers of clients in them, and drops those of all other clients.",
    )
    request_id_header: Annotated[str, from_text(parse_request_id_header)] = Field(
        "X-Request-Id",
        description="Header that carries the [id of a request](headers.md#the-id-of-a-request). oncegate passes it on, "
        "or makes one. `off`: oncegate neither reads nor writes such a header.",
    )
    max_request_bytes: Bytes = Field(
        33_554_432, description="Largest body of a request with a key. Larger ones get 413."
    )
    max_head_bytes: int = Field(
        65_536, ge=8192, le=MEBIBYTE, description="Largest head of a request, its line included. Larger ones get 431."
    )
    # RFC 9112, section 3, recommends to take lines of 8,000 bytes.
    max_head_line_bytes: int = Field(
        16_384,
        ge=1024,
        le=MEBIBYTE,
        description="Longest target of a request, and longest field of its head. A longer target gets 414, a longer "
        "field 431.",
    )
    max_head_fields: int = Field(
        128, ge=16, le=4096, description="Most fields in the head of a request. More of them get 431."
    )
    max_in_flight: Count = Field(
        4096, description="Requests with keys that run at the same time, for each worker. Others get 503."
    )
    max_connections: Count = Field(8192, description="Open client connections, for each worker.")
    client_stall_s: Seconds = Field(
        30,
        description="oncegate closes the connection of a client that sends or takes no byte for this time while "
        "oncegate waits for it. A request's head must arrive within 10 s.",
    )
    # As in Kestrel (docs/decisions/003).
    client_min_bytes_per_s: int = Field(
        240,
        ge=0,
        le=PIBIBYTE,
        description="Slowest accepted client, as an average over `ONCEGATE_CLIENT_STALL_S`. oncegate closes the "
        "connection of a slower one while it waits for it. 0: any byte is enough.",
    )
