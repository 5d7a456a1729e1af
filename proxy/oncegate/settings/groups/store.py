"""The store, and what it is trusted with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SecretStr, model_validator

from oncegate.settings.files import read_file
from oncegate.settings.postgres_url import files_of, is_postgres, with_files
from oncegate.settings.store_url import parse_store_url, with_password
from oncegate.settings.values import DAY_MS, PIBIBYTE, Bytes, ReadableFile, Seconds, from_text

# The parts of a URL of PostgreSQL that name a file, and the settings that do.
FILES = {"sslrootcert": "store_ca_file", "sslcert": "store_cert_file", "sslkey": "store_key_file"}


def _store_url(text: str) -> str:
    """Return a store URL, if it is well-formed and the files that it names can be read."""
    url = parse_store_url(text)
    for name, path in files_of(url).items() if is_postgres(url) else ():
        try:
            read_file(path)
        except ValueError as error:
            raise ValueError(f"names a file as {name} that {error}") from None
    return url


class StoreSettings(BaseModel):
    """A group of `Settings`."""

    @model_validator(mode="before")
    @classmethod
    def _whole_url(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        url, password = given.get("store_url"), given.get("store_password")
        if not isinstance(url, str):
            return given
        url = with_password(url, password) if isinstance(password, str) else url
        files = {part: given[name] for part, name in FILES.items() if isinstance(given.get(name), str)}
        whole = {**given, "store_url": with_files(url, files) if is_postgres(url) else url}
        # The owner of the tables has another client certificate, if any.
        if isinstance(owner := given.get("migrate_url"), str) and "sslrootcert" in files and is_postgres(owner):
            whole["migrate_url"] = with_files(owner, {"sslrootcert": files["sslrootcert"]})
        return whole

    store_url: Annotated[SecretStr, from_text(_store_url)] = Field(
        SecretStr("embedded"),
        description="`embedded`, `redis://host:port/db`, `redis+unix:///path/to.sock?db=0`, "
        "`redis+sentinel://h1:p,h2:p/service`, `redis+cluster://h1:p,h2:p` or "
        "`postgresql://user:password@h1:p,h2:p/db`. For TLS, write `rediss` instead of `redis`; for "
        "PostgreSQL, set `ONCEGATE_STORE_CA_FILE`. `ONCEGATE_STORE_URL_FILE` names a file that contains the URL.",
    )
    store_password: SecretStr = Field(
        SecretStr(""),
        description="The password of `ONCEGATE_STORE_URL`, where the URL has none. `ONCEGATE_STORE_PASSWORD_FILE` "
        "names a file that contains the password. SIGHUP makes oncegate [read both again]"
        "(../how-to/upgrades.md#credentials-of-the-store).",
    )
    store_ca_file: ReadableFile = Field(
        None,
        description="CA certificates (PEM) that oncegate trusts for the store, with `rediss` or PostgreSQL. By default "
        "those of the system.",
    )
    store_cert_file: ReadableFile = Field(
        None, description="Client certificate (PEM) that oncegate presents to the store."
    )
    store_key_file: ReadableFile = Field(None, description="Private key (PEM) of `ONCEGATE_STORE_CERT_FILE`.")
    data_dir: Path = Field(Path(".oncegate"), description="Folder in which the embedded store keeps its data.")
    embedded_max_bytes: int = Field(
        268_435_456, ge=2_097_152, le=PIBIBYTE, description="Memory limit of the embedded store."
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
        description="Where a claim must be before the request is sent. `memory`: on the store's server. `replicated`: "
        "also on a replica; in PostgreSQL on the disk of a synchronous standby. `fsync`: on their disks.",
    )
    on_store_loss: Literal["continue", "quarantine"] = Field(
        "continue",
        description="What happens after the store lost data, or may have. `continue`: oncegate continues to serve. "
        "`quarantine`: it refuses keys without a record for `ONCEGATE_QUARANTINE_S`.",
    )
    quarantine_s: Seconds = Field(
        60, description="Length of a quarantine, and how long `/readyz` reports a loss with `continue`."
    )
    record_layout: Literal["auto", "hash", "packed"] = Field(
        "auto",
        description="How a store in Redis keeps records. `hash`: so that older versions of oncegate read them. "
        "`packed`: smaller and cheaper, as soon as no older version is on the store; "
        "[the way back](../how-to/upgrades.md#the-layout-of-records) to one needs one more command. `auto`: packed, "
        "as soon as no older version was on the store for a day.",
    )
    max_stored_bytes: Bytes = Field(
        16_777_216,
        description="Largest response body that is stored. oncegate forwards a larger one, and answers its retries "
        "with 409 `response-not-kept`.",
    )
