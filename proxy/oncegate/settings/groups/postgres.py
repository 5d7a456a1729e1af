"""What only a store in PostgreSQL has."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SecretStr, model_validator

from oncegate.settings.postgres_url import is_postgres, parse_postgres_url, parse_schema
from oncegate.settings.values import BytesOrNone, Seconds, from_text

# Defaults that a store in PostgreSQL has in place of those of the fields.
POSTGRES_DEFAULTS = {"durability": "fsync", "audit": True, "tombstone_s": 30 * 86_400}


class PostgresSettings(BaseModel):
    """A group of `Settings`."""

    store_schema: Annotated[str, from_text(parse_schema)] = Field(
        "oncegate", description="The schema of oncegate's tables in PostgreSQL."
    )
    promotion: Literal["any", "most-advanced"] = Field(
        "any",
        description="PostgreSQL with `replicated`: which standby a failover promotes. With `any`, every standby that "
        "it could promote must be one that claims wait for, or oncegate is not ready.",
    )
    audit: bool = Field(
        False,
        description="PostgreSQL: writes each change of a key's state to the audit trail, in the same transaction.",
    )
    audit_retention_s: Seconds = Field(
        34_560_000,
        description="PostgreSQL: how long the audit trail is kept, 400 days by default. `oncegate migrate --maintain` "
        "drops older days.",
    )
    migrate_url: Annotated[SecretStr, from_text(parse_postgres_url)] = Field(
        SecretStr(""),
        description="PostgreSQL: the URL by which `oncegate migrate` connects, of the role that owns the tables. "
        "Proxies do not use it. Without it, `oncegate migrate` uses `ONCEGATE_STORE_URL`.",
    )
    store_max_bytes: BytesOrNone = Field(
        0,
        description="PostgreSQL: limit of what oncegate stores. Above 90 % of it, responses are stored without their "
        "bodies; above it, keys without a record are refused. 0: no limit. Redis has `maxmemory`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_store(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        # Not as factories of defaults, which pydantic does not call when another field is invalid.
        url = given.get("store_url")
        return {**POSTGRES_DEFAULTS, **given} if isinstance(url, str) and is_postgres(url) else given
