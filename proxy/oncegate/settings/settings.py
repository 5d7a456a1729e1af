"""The settings: one field for each variable, with its type, its default and its description.

The descriptions are the reference page. `loading.load_settings` reads the environment and reports all problems at once,
without repeating a secret; no other module reads the environment.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from oncegate.settings.addresses import Address, Network, parse_host, parse_network
from oncegate.settings.credentials import KNOWN, parse_scheme, parse_scope
from oncegate.settings.names import parse_key_header, parse_method, parse_namespace, parse_secret
from oncegate.settings.statuses import DEFAULT, parse_status
from oncegate.settings.store_url import parse_store_url
from oncegate.settings.values import (
    DAY_MS,
    MAX_WORKERS,
    MILLION,
    PIBIBYTE,
    RESERVED,
    BaseUrl,
    Bytes,
    Count,
    ListenAddress,
    OptionalUrl,
    ReadableFile,
    Seconds,
    SecondsOrForever,
    SecondsOrZero,
    from_text,
    list_of,
    parse_workers,
    temporary_folder,
)
from oncegate.testing.faults import Fault, parse_fault

PREFIX = "ONCEGATE_"
ENV_FILE = ".env"
# Settings that <NAME>_FILE can hold as well.
SECRETS = ("secret", "store_url")


class Settings(BaseSettings):
    """The operator's choices."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        # Compose files pass "${NAME:-}" for an unset variable.
        env_ignore_empty=True,
        # Lists are comma lists, not JSON.
        enable_decoding=False,
        # A .env serves other programs, too. `load_settings` reports unknown names under our own prefix.
        extra="ignore",
        frozen=True,
        # Without this, an error message would repeat an invalid secret.
        hide_input_in_errors=True,
        # An infinite time would fail only when a timer uses it.
        allow_inf_nan=False,
    )

    upstream: BaseUrl = Field(
        description="Base URL of your API, `http://` or `https://`. Its path, if any, is put before each target."
    )
    listen: ListenAddress = Field(
        Address("127.0.0.1", 8080),
        description="Address of the public listener. The container image sets `0.0.0.0:8080`.",
    )
    tls_cert_file: ReadableFile = Field(None, description="Certificate chain (PEM) of the public listener.")
    tls_key_file: ReadableFile = Field(None, description="Private key (PEM) of the public listener.")
    admin_listen: ListenAddress = Field(
        Address("127.0.0.1", 8081),
        description="Address of the listener for `/metrics`, `/healthz` and `/readyz`. Keep it private. The container "
        "image sets `0.0.0.0:8081`.",
    )
    hosts: Annotated[tuple[str, ...], list_of(parse_host)] = Field(
        (), description="Comma list of the served hosts, as `host` or `host:port`. Requests for other hosts get 421."
    )
    trusted_proxies: Annotated[tuple[Network, ...], list_of(parse_network)] = Field(
        (),
        description="Comma list of networks. oncegate forwards the `Forwarded`, `X-Forwarded-*`, `Via` and `X-Real-IP` "
        "headers of clients in them, and drops those of all other clients.",
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
    store_url: Annotated[SecretStr, from_text(parse_store_url)] = Field(
        SecretStr("embedded"),
        description="`embedded`, `redis://host:port/db`, `redis+unix:///path/to.sock?db=0`, "
        "`redis+sentinel://h1:p,h2:p/service` or `redis+cluster://h1:p,h2:p`. Write `rediss` instead of `redis` for "
        "TLS. `ONCEGATE_STORE_URL_FILE` names a file that contains the URL.",
    )
    data_dir: Path = Field(Path(".oncegate"), description="Folder in which the embedded store keeps its data.")
    embedded_max_bytes: int = Field(
        268_435_456, ge=2_097_152, le=PIBIBYTE, description="Memory limit of the embedded store."
    )
    namespace: Annotated[str, from_text(parse_namespace)] = Field(
        "default",
        description="Part of each key's scope. Deployments with separate keys on one store need different namespaces, "
        "and `ONCEGATE_IDENTITY_CHANGE=accept`.",
    )
    secret: Annotated[SecretStr, from_text(parse_secret)] = Field(
        SecretStr(""),
        description="Secret of the digests of keys, tenants and bodies, of at least 16 bytes. All proxies need the "
        "same one. After a change oncegate does not find any earlier key. Without one, whoever reads the store can "
        "test guesses of keys. `ONCEGATE_SECRET_FILE` names a file that contains the secret.",
    )
    # Two replicas that name keys differently would each execute the same request.
    identity_change: Literal["refuse", "accept"] = Field(
        "refuse",
        description="What a proxy does if its namespace, secret, scope headers, key header or version of naming differ "
        "from those of other proxies on its store. `refuse`: it is not ready and refuses requests with keys. `accept`: "
        "it serves.",
    )
    # PUT and DELETE are idempotent by definition (RFC 9110, section 9.2.2), POST and PATCH are not.
    methods: Annotated[tuple[str, ...], list_of(parse_method)] = Field(
        ("POST", "PATCH"), description="Comma list of the guarded methods, from POST, PATCH, PUT and DELETE."
    )
    key_header: Annotated[str, from_text(parse_key_header)] = Field(
        "Idempotency-Key", description="Header that carries the key."
    )
    key_required: bool = Field(False, description="Answer 400 to a request with a guarded method and no key.")
    scope_headers: Annotated[tuple[str, ...], list_of(parse_scope)] = Field(
        (KNOWN,),
        description="Comma list of the headers that identify the tenant. Two tenants can use the same key. `known`: "
        "[those that oncegate knows](headers.md#credentials-and-accounts).",
    )
    stable_schemes: Annotated[tuple[str, ...], list_of(parse_scheme)] = Field(
        (),
        description="Comma list of further [schemes of `Authorization`](headers.md#schemes-of-authorization) whose "
        "credential is the same in a retry. Others than `Basic`, `Bearer`, `Token` and `ApiKey` get 400 otherwise.",
    )
    retention_s: Seconds = Field(
        86_400,
        description="How long oncegate replays a response, counted from its completion. Choose more than the longest "
        "time for which your clients retry.",
    )
    unknown_retention_s: SecondsOrForever = Field(
        90 * 86_400,
        description="How long oncegate refuses a key whose outcome is unknown, with `ONCEGATE_ON_UNKNOWN=hold`. After "
        "that time a retry executes. 0: for ever. A shorter time than the rule's retention counts as that retention. "
        "Derived keys always keep `ONCEGATE_RETENTION_S`.",
    )
    lease_ms: int = Field(
        10_000,
        ge=200,
        le=DAY_MS,
        description="Lease of a claim. oncegate renews it after a third of that time. If a proxy dies, its unfinished "
        "requests become unknown after one lease.",
    )
    on_duplicate: Literal["reject", "wait"] = Field(
        "reject",
        description="What a duplicate gets while the original is running. `reject`: 409. `wait`: the response of the "
        "original, or 409 after `ONCEGATE_WAIT_MAX_S`.",
    )
    wait_max_s: Seconds = Field(
        30, description="Longest wait of a duplicate, with `ONCEGATE_ON_DUPLICATE=wait` or `Prefer: wait`."
    )
    max_waiters: int = Field(
        1024, ge=0, le=MILLION, description="Duplicates that wait at the same time, for each worker. Others get 409."
    )
    on_unknown: Literal["hold", "retry"] = Field(
        "hold",
        description="What happens to a retry if the outcome of the original is unknown. `hold`: oncegate does not "
        "execute it for `ONCEGATE_UNKNOWN_RETENTION_S` (at most once). `retry`: oncegate executes it (at least once).",
    )
    release_statuses: Annotated[tuple[str, ...], list_of(parse_status)] = Field(
        (DEFAULT,),
        description="Comma list of the [statuses](rules.md#statuses) by which your API says that it executed nothing: "
        "they free the key. `default`: 307, 308, 401, 421, 425 and 429. Add `503+retry-after` if no gateway answers "
        "for your API.",
    )
    on_store_down: Literal["refuse", "bypass"] = Field(
        "refuse",
        description="What happens to requests with keys while the store accepts no claims. `refuse`: they get 503. "
        "`bypass`: oncegate forwards them without protection, so that a retry may be executed again.",
    )
    store_timeout_ms: int = Field(
        1000, ge=1, le=DAY_MS, description="Longest wait for the store to confirm a claim, retries included."
    )
    settle_timeout_s: Seconds = Field(
        30, description="How long oncegate retries to store a response before it gives up."
    )
    durability: Literal["memory", "replicated", "fsync"] = Field(
        "memory",
        description="Where a claim must be before the request is sent. `memory`: on the Redis server. `replicated`: "
        "also on a replica. `fsync`: on their disks.",
    )
    on_store_loss: Literal["continue", "quarantine"] = Field(
        "continue",
        description="What happens after the store lost data, or may have. `continue`: oncegate continues to serve. "
        "`quarantine`: it refuses keys without a record for `ONCEGATE_QUARANTINE_S`.",
    )
    quarantine_s: Seconds = Field(
        60, description="Length of a quarantine, and how long `/readyz` reports a loss with `continue`."
    )
    connect_timeout_s: Seconds = Field(5, description="Longest wait for a connection to the upstream.")
    upstream_timeout_s: Seconds = Field(
        300, description="Longest time without a byte from the upstream while oncegate waits for its response."
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
    connect_retries: int = Field(
        3, ge=0, le=20, description="Retries after a failed connection attempt, while nothing has been sent."
    )
    max_request_bytes: Bytes = Field(
        33_554_432, description="Largest body of a request with a key. Larger ones get 413."
    )
    max_buffered_bytes: Bytes = Field(
        268_435_456, description="Memory for buffered bodies of requests and responses together, for each worker."
    )
    spool_dir: Path = Field(
        default_factory=temporary_folder, description="Folder for request bodies that are too large for memory."
    )
    max_spool_bytes: Bytes = Field(1_073_741_824, description="Disk space in `ONCEGATE_SPOOL_DIR`, for each worker.")
    max_stored_bytes: Bytes = Field(
        16_777_216,
        description="Largest response body that is stored. oncegate forwards a larger one, and answers its retries "
        "with 409 `response-not-kept`.",
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
    workers: Annotated[int, from_text(parse_workers)] = Field(
        1, ge=1, le=MAX_WORKERS, description="Processes that share the port. `auto`: one for each usable core."
    )
    drain_delay_s: SecondsOrZero = Field(
        0, description="After SIGTERM, oncegate continues to serve for this time, while `/readyz` reports not ready."
    )
    # Kubernetes kills a pod 30 s after SIGTERM by default.
    drain_s: SecondsOrZero = Field(
        25, description="After `ONCEGATE_DRAIN_DELAY_S`, running requests have this time to finish."
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], from_text(str.lower)] = Field(
        "info", description="Lowest level that is logged: `debug`, `info`, `warning` or `error`."
    )
    log_format: Literal["json", "console"] = Field(
        "json", description="`json`: one object a line. `console`: text for people."
    )
    access_log: Literal["off", "notable", "all"] = Field(
        "notable",
        description="Which requests are logged. `off`: none. `notable`: all but executions and forwarded "
        "requests without a key. `all`: every one.",
    )
    docs_url: OptionalUrl = Field(
        None,
        description="URL at which oncegate's folder `docs/` is served as Markdown files, such as "
        "`https://git.example.com/oncegate/blob/main/docs`. With it, the `type` of a problem is the link "
        "`DOCS_URL/reference/answers.md#SLUG`. Without it, `type` is `urn:oncegate:SLUG`.",
    )
    rules_file: ReadableFile = Field(
        None, description="File with rules for single routes (TOML). SIGHUP makes oncegate read it again."
    )
    head_cache: bool = Field(
        True,
        description="Remember the heads of requests and responses that came before. It saves two fifths of "
        "an execution's instructions where heads repeat. `false` is for tests, and to rule the cache out when you look "
        "for a fault.",
    )
    testing: bool = Field(False, description="Allow `ONCEGATE_FAULT`. For oncegate's own tests only.")
    fault: Annotated[tuple[Fault, ...], list_of(parse_fault)] = Field(
        (),
        description="Comma list of faults that tests inject: `kill@point:n`, `raise@point:n`, `pause@point:n` (until "
        "SIGCONT) or `pause@point:n:ms`. The nth request that passes the point meets the fault "
        "(`oncegate/testing/faults.py` lists the points).",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_reserved(cls, value: object, info: ValidationInfo) -> object:
        # Defaults are values already; the environment gives text.
        if not isinstance(value, str):
            return value
        name, text = str(info.field_name), value.partition("://")[0].strip().lower()
        row = name if text != str(cls.model_fields[name].default) else ""
        if advice := RESERVED.get(f"{name}={text}") or RESERVED.get(row):
            raise ValueError(f"is not available in this version; {advice}")
        return value
