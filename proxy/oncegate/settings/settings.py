"""The settings: the only module that reads the environment.

One field a variable; its description is the README's. Values are parsed here, so that nobody else
has to. `load` reports every problem at once and repeats no secret.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from oncegate.settings.addresses import (
    Address,
    Network,
    Origin,
    parse_address,
    parse_header,
    parse_host,
    parse_key_header,
    parse_list,
    parse_method,
    parse_namespace,
    parse_network,
    parse_origin,
    parse_secret,
    parse_store_url,
)
from oncegate.settings.cores import usable
from oncegate.testing.faults import Fault, parse_fault

PREFIX = "ONCEGATE_"
ENV_FILE = ".env"
SECRETS = ("secret", "store_url")  # those that <NAME>_FILE may hold

TEN_YEARS_S = 315_360_000  # above it a unit was mistaken, and Redis's expiry comes near its limit
DAY_MS = 86_400_000
PIBIBYTE = 1 << 50
MILLION = 1_000_000
MOST_WORKERS = 1024

# What the design names and this version cannot do yet: `name=value`, or the name where only the
# default works, and what to do now. Who builds one deletes its row.
LATER = {
    "store_url=postgresql": "use redis:// or rediss://",
    "on_duplicate=join": "use reject or wait",
}


class SettingsError(Exception):
    """The settings cannot be used; `errors` says why, each line opening with the variable's name."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(self.errors))


def _from_text(parse: Callable[[str], object]) -> BeforeValidator:
    """Return a validator for what the environment says; defaults are values already."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _list_of(parse: Callable[[str], object]) -> BeforeValidator:
    return _from_text(lambda text: tuple(parse(member) for member in parse_list(text)))


def _readable(text: str) -> Path:
    try:
        Path(text).open("rb").close()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    return Path(text)


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # a read-only container without one; reported under the setting's name
        return Path("/tmp")


def _workers(text: str) -> object:
    if text.strip().lower() == "auto":
        return min(usable(), MOST_WORKERS)
    if not text.strip().isdecimal():
        raise ValueError("must be a whole number, or auto")
    return text


ListenAddress = Annotated[Address, _from_text(parse_address)]
ReadableFile = Annotated[Path | None, _from_text(_readable)]
Seconds = Annotated[float, Field(gt=0, le=TEN_YEARS_S)]
SecondsOrZero = Annotated[float, Field(ge=0, le=TEN_YEARS_S)]
Bytes = Annotated[int, Field(ge=1, le=PIBIBYTE)]
Count = Annotated[int, Field(ge=1, le=MILLION)]


class Settings(BaseSettings):
    """What the operator chose."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=ENV_FILE,
        env_file_encoding="utf-8",
        env_ignore_empty=True,  # compose files pass "${NAME:-}" for what is not set
        enable_decoding=False,  # lists are comma lists, not JSON
        extra="ignore",  # a .env serves other programs too; unknown names of ours are reported by load
        frozen=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    upstream: Annotated[Origin, _from_text(parse_origin)] = Field(
        description="Base URL of the API behind the proxy, http or https; may carry a path prefix."
    )
    listen: ListenAddress = Field(
        Address("127.0.0.1", 8080), description="Public listener; the container image sets `0.0.0.0:8080`."
    )
    tls_cert_file: ReadableFile = Field(None, description="Certificate chain (PEM) of the public listener.")
    tls_key_file: ReadableFile = Field(None, description="Private key (PEM) of the public listener.")
    admin_listen: ListenAddress = Field(
        Address("127.0.0.1", 8081),
        description="Listener of `/metrics`, `/healthz`, `/readyz`; the container image sets `0.0.0.0:8081`.",
    )
    hosts: Annotated[tuple[str, ...], _list_of(parse_host)] = Field(
        (), description="Comma list of `host` or `host:port` that are ours; a request for another gets 421."
    )
    trusted_proxies: Annotated[tuple[Network, ...], _list_of(parse_network)] = Field(
        (), description="Comma list of networks whose forwarding headers are kept."
    )
    pass_host: bool = Field(False, description="Pass the client's Host on instead of the upstream's.")
    upstream_ca_file: ReadableFile = Field(None, description="CA certificates (PEM) for an https upstream.")
    upstream_cert_file: ReadableFile = Field(None, description="Client certificate (PEM) for the upstream.")
    upstream_key_file: ReadableFile = Field(None, description="Private key (PEM) of that certificate.")
    store_url: Annotated[SecretStr, _from_text(parse_store_url)] = Field(
        SecretStr("embedded"),
        description="`embedded`, `redis://host:port/db`, `redis+unix:///path/to.sock?db=0`, "
        "`redis+sentinel://h1:p,h2:p/service` or `redis+cluster://h1:p,h2:p`; `rediss` in the place of `redis` is TLS; "
        "`ONCEGATE_STORE_URL_FILE` names a file that holds it.",
    )
    data_dir: Path = Field(Path(".oncegate"), description="Folder of the embedded store.")
    embedded_max_bytes: int = Field(
        268_435_456, ge=2_097_152, le=PIBIBYTE, description="Memory limit of the embedded store."
    )
    namespace: Annotated[str, _from_text(parse_namespace)] = Field(
        "default",
        description="Part of every key's scope; deployments that share a store differ in it, which they have to "
        "declare with `ONCEGATE_IDENTITY_CHANGE=accept`.",
    )
    secret: Annotated[SecretStr, _from_text(parse_secret)] = Field(
        SecretStr(""),
        description="Keys the digests; the same on every replica; changing it forgets every key; "
        "`ONCEGATE_SECRET_FILE` names a file that holds it.",
    )
    identity_change: Literal["refuse", "accept"] = Field(
        "refuse",
        description="A replica whose namespace, secret, scope headers or key header differ from those of others on its "
        "store is not ready and refuses keyed requests (`refuse`), or works beside them (`accept`).",
    )
    methods: Annotated[tuple[str, ...], _list_of(parse_method)] = Field(
        ("POST", "PATCH"), description="Comma list of the guarded methods, of POST, PATCH, PUT and DELETE."
    )
    key_header: Annotated[str, _from_text(parse_key_header)] = Field(
        "Idempotency-Key", description="Header that carries the key."
    )
    key_required: bool = Field(False, description="Answer 400 to a guarded request without a key.")
    scope_headers: Annotated[tuple[str, ...], _list_of(parse_header)] = Field(
        ("Authorization", "X-Api-Key"), description="Comma list of the headers that tell tenants apart."
    )
    retention_s: Seconds = Field(
        86_400,
        description="How long an answer is replayed, from its completion; must exceed the longest retry cycle.",
    )
    lease_ms: int = Field(
        10_000, ge=200, le=DAY_MS, description="Life of a claim without a renewal, which comes at a third of it."
    )
    on_duplicate: Literal["reject", "wait"] = Field(
        "reject", description="A duplicate while the original runs gets 409 (`reject`) or is held (`wait`)."
    )
    wait_max_s: Seconds = Field(30, description="Longest hold of a duplicate by `wait` or `Prefer: wait`.")
    max_waiters: int = Field(1024, ge=0, le=MILLION, description="Duplicates held at once, for each worker.")
    on_unknown: Literal["hold", "retry"] = Field(
        "hold",
        description="A key whose outcome is unknown is never executed again (`hold`: at most once), or by its next "
        "retry (`retry`: at least once).",
    )
    on_store_down: Literal["refuse", "bypass"] = Field(
        "refuse",
        description="While the store takes no claims, keyed requests get 503 (`refuse`), or pass unguarded (`bypass`): "
        "a retry may then execute again.",
    )
    store_timeout_ms: int = Field(
        1000, ge=1, le=DAY_MS, description="Longest wait for the store to confirm a claim, repeats included."
    )
    settle_timeout_s: Seconds = Field(
        30, description="How long the store is asked again to take an answer before the proxy gives up."
    )
    durability: Literal["memory", "replicated", "fsync"] = Field(
        "memory",
        description="What a claim must have reached before it counts: the `memory` of the store's server, "
        "also that of a replica (`replicated`), or their disks (`fsync`).",
    )
    on_store_loss: Literal["continue", "quarantine"] = Field(
        "continue",
        description="After the store lost data, or may have, requests go on (`continue`), or unseen keys are refused "
        "for `ONCEGATE_QUARANTINE_S` (`quarantine`).",
    )
    quarantine_s: Seconds = Field(
        60, description="Length of a quarantine; for so long `/readyz` also tells of a loss where requests go on."
    )
    connect_timeout_s: Seconds = Field(5, description="Longest wait for a connection to the upstream.")
    upstream_timeout_s: Seconds = Field(300, description="Longest silence of the upstream.")
    upstream_reuse_idle_s: SecondsOrZero = Field(
        1, description="Keyed requests reuse an upstream connection only if idle for less; 0: never."
    )
    max_upstream_connections: Count = Field(1200, description="Connections to the upstream, for each worker.")
    connect_retries: int = Field(
        3, ge=0, le=20, description="Further tries to connect, only for failures proven not sent."
    )
    max_request_bytes: Bytes = Field(33_554_432, description="Largest body of a guarded request.")
    max_buffered_bytes: Bytes = Field(
        268_435_456, description="Memory for all buffered bodies and answers together, for each worker."
    )
    spool_dir: Path = Field(
        default_factory=_temporary_folder, description="Folder for bodies that are not held in memory."
    )
    max_spool_bytes: Bytes = Field(1_073_741_824, description="Disk for spooled bodies, for each worker.")
    max_stored_bytes: Bytes = Field(16_777_216, description="Largest answer that is stored with its body.")
    max_in_flight: Count = Field(4096, description="Claimed requests running at once, for each worker.")
    max_connections: Count = Field(8192, description="Client connections open at once, for each worker.")
    client_stall_s: Seconds = Field(
        30, description="A client that takes or sends nothing for so long is cut off; a head has 10 s at most."
    )
    client_min_bytes_per_s: int = Field(
        240,
        ge=0,
        le=PIBIBYTE,
        description="Average over such a time below which a client that is waited for is cut off; 0: any byte counts.",
    )
    workers: Annotated[int, _from_text(_workers)] = Field(
        1, ge=1, le=MOST_WORKERS, description="Processes that share the port; `auto`: one for each usable core."
    )
    drain_delay_s: SecondsOrZero = Field(0, description="After SIGTERM: time to go on serving, not ready.")
    drain_s: SecondsOrZero = Field(25, description="After that delay: the grace for what is in flight.")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _from_text(str.lower)] = Field(
        "info", description="Least level that is logged: `debug`, `info`, `warning` or `error`."
    )
    log_format: Literal["json", "console"] = Field("json", description="`json`, or `console` for people.")
    access_log: Literal["off", "notable", "all"] = Field(
        "notable", description="`off`, `notable` (all but plain executions and pass-through) or `all`."
    )
    docs_url: Annotated[Origin | None, _from_text(parse_origin)] = Field(
        None,
        description="URL at which the folder `docs/` of oncegate is served as Markdown files, such as "
        "`https://git.example.com/oncegate/blob/main/docs`. With it, the `type` of a problem is a link, "
        "`<docs_url>/reference/answers.md#<slug>`; without it, `urn:oncegate:<slug>`.",
    )
    rules_file: ReadableFile = Field(None, description="Policy for single routes (TOML); read again at SIGHUP.")
    testing: bool = Field(False, description="Accept what breaks the proxy on purpose; for its own tests alone.")
    fault: Annotated[tuple[Fault, ...], _list_of(parse_fault)] = Field(
        (),
        description="Comma list of `kill@point:n`, `raise@point:n`, `pause@point:n` (until SIGCONT) and "
        "`pause@point:n:ms`: go wrong when the request path passes that point for the nth time "
        "(`oncegate/testing/faults.py`).",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_later(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value  # a default
        name, word = str(info.field_name), value.partition("://")[0].strip().lower()
        row = name if word != str(cls.model_fields[name].default) else ""
        if advice := LATER.get(f"{name}={word}") or LATER.get(row):
            raise ValueError(f"this value comes later, it is not available in this version; {advice}")
        return value
