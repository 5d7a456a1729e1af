"""The upstream, and the connections to it."""

from typing import Annotated

from pydantic import BaseModel, Field

from oncegate.settings.values import MILLION, BaseUrl, Count, ReadableFile, Seconds, SecondsOrZero


class UpstreamSettings(BaseModel):
    """A group of `Settings`."""

    upstream: BaseUrl = Field(
        description="Base URL of your API, `http://` or `https://`. Its path, if any, is put before each target."
    )
    pass_host: bool = Field(
        False, description="Forward the client's `Host` header, instead of the host of `ONCEGATE_UPSTREAM`."
    )
    upstream_ca_file: ReadableFile = Field(
        None, description="CA certificates (PEM) that oncegate trusts for an `https://` upstream."
    )
    upstream_cert_file: ReadableFile = Field(
        None, description="Client certificate (PEM) that oncegate presents to the upstream."
    )
    upstream_key_file: ReadableFile = Field(None, description="Private key (PEM) of `ONCEGATE_UPSTREAM_CERT_FILE`.")
    connect_timeout_s: Seconds = Field(5, description="Longest wait for a connection to the upstream.")
    upstream_timeout_s: Seconds = Field(
        300, description="Longest time without a byte from the upstream while oncegate waits for its response."
    )
    pass_interim: bool = Field(
        False,
        description="Pass the interim responses of the upstream on (102, 103 and others; 100 and 101 are answered as "
        "ever). [Some clients](interim.md) take one for the answer, and mix up all that follows.",
    )
    # Node and uvicorn close an idle connection after 5 s. A request that meets the close has an unknown outcome.
    upstream_reuse_idle_s: SecondsOrZero = Field(
        1,
        description="A request with a key uses an open connection to the upstream only if it has been idle for less "
        "than this time. 0: every request, with or without a key, opens a connection and closes it after the response. "
        "Choose 0 if your API serves each connection with a process of its own.",
    )
    upstream_rest_s: SecondsOrZero = Field(
        0.2,
        description="A connection to the upstream rests for this time before another request uses it. If your API "
        "answers a request twice, the second response comes within the rest and closes the connection. 0: no rest.",
    )
    # A TLS handshake costs 40 executions (docs/decisions/004).
    upstream_spare_connections: Annotated[int | None, Field(ge=0, le=MILLION)] = Field(
        None,
        description="Idle connections that a request leaves open when it opens another. They save CPU time if your API "
        "serves many connections in one process. By default 0 for `http://`, 256 for `https://`.",
    )
    # 512 could not carry 1,000 live streams (docs/decisions/004).
    max_upstream_connections: Count = Field(1200, description="Open connections to the upstream, for each worker.")
    dns_ttl_s: Annotated[float, Field(ge=0.1, le=3600)] = Field(
        1,
        description="How long oncegate uses the addresses that a host name had, of an upstream or of the store. A name "
        "that moves is followed within this time, also by connections that are open.",
    )
    connect_retries: int = Field(
        3, ge=0, le=20, description="Retries after a failed connection attempt, while nothing has been sent."
    )
