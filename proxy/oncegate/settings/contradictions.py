"""Pairs of settings that contradict each other though each is valid by itself."""

import os
from collections.abc import Callable, Iterable
from operator import gt, lt
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import SecretStr

from oncegate.settings.addresses import Address, Origin
from oncegate.settings.credentials import expanded
from oncegate.settings.groups.store import FILES
from oncegate.settings.postgres_url import files_of, is_postgres
from oncegate.settings.settings import Settings
from oncegate.settings.store_url import password_in


class Contradiction(NamedTuple):
    """Two settings that contradict each other where `holds` is true of their values.

    The message is `first`, `complaint`, `second`: "retention_s must not be shorter than lease_ms".
    """

    first: str
    complaint: str
    second: str
    holds: Callable[[Any, Any], bool]


def _missing(file: Path | None, other: Path | None) -> bool:
    return file is None and other is not None


def _unset_beside(value: object, other: object) -> bool:
    return not value and bool(other)


def _without_tls(file: Path | None, upstream: Origin) -> bool:
    return file is not None and upstream.scheme == "http"


def _unwritable(folder: Path, _max_bytes: int) -> bool:
    # X_OK: a file can be created only in a folder that can be entered.
    return not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK))


def _cannot_replicate(durability: str, store_url: SecretStr) -> bool:
    return durability == "replicated" and store_url.get_secret_value() == "embedded"


def _needs_postgres(default: object) -> Callable[[Any, SecretStr], bool]:
    return lambda value, store_url: value != default and not is_postgres(store_url.get_secret_value())


def _other_password(password: SecretStr, store_url: SecretStr) -> bool:
    return password.get_secret_value() not in ("", password_in(store_url.get_secret_value()))


def _unused(part: str) -> Callable[[Path | None, SecretStr], bool]:
    def is_unused(file: Path | None, store_url: SecretStr) -> bool:
        url = store_url.get_secret_value()
        is_named = files_of(url).get(part) == str(file) if is_postgres(url) else url.startswith("rediss")
        return file is not None and not is_named

    return is_unused


def _shorter_than_lease(retention_s: float, lease_ms: int) -> bool:
    return retention_s * 1000 < lease_ms


def _among(key_header: str, scope_headers: Iterable[str]) -> bool:
    return key_header.lower() in map(str.lower, expanded(scope_headers))


def _is_same(key_header: str, request_id_header: str) -> bool:
    return key_header.lower() == request_id_header.lower()


def _has(scope_headers: Iterable[str], request_id_header: str) -> bool:
    return _among(request_id_header, scope_headers)


def _without_testing(fault: object, testing: bool) -> bool:
    return bool(fault) and not testing


def _without_rate(ratio: float, rate_per_s: float) -> bool:
    return ratio > 0 and not rate_per_s


def _with_any(credentials: bool, origins: Iterable[str]) -> bool:
    return credentials and "*" in origins


CONTRADICTIONS = (
    # A record that expires before its lease frees the key of a request that still runs.
    Contradiction("retention_s", "must not be shorter than", "lease_ms", _shorter_than_lease),
    # The response would expire before the last duplicate that waits for it can read it.
    Contradiction("retention_s", "must not be shorter than", "wait_max_s", lt),
    Contradiction("tls_cert_file", "is missing beside", "tls_key_file", _missing),
    Contradiction("tls_key_file", "is missing beside", "tls_cert_file", _missing),
    Contradiction("upstream_cert_file", "is missing beside", "upstream_key_file", _missing),
    Contradiction("upstream_key_file", "is missing beside", "upstream_cert_file", _missing),
    Contradiction("admin_tls_cert_file", "is missing beside", "admin_tls_key_file", _missing),
    Contradiction("admin_tls_key_file", "is missing beside", "admin_tls_cert_file", _missing),
    Contradiction("admin_tls_cert_file", "is missing beside", "admin_tls_ca_file", _missing),
    # Any client could write the header.
    Contradiction("admin_user_proxies", "is missing beside", "admin_user_header", _unset_beside),
    Contradiction("admin_user_header", "is missing beside", "admin_user_proxies", _unset_beside),
    # Nobody would have a role.
    Contradiction("admin_users", "is missing beside", "admin_user_header", _unset_beside),
    Contradiction("admin_users", "is missing beside", "admin_tls_ca_file", _unset_beside),
    # Over plain HTTP these files have no effect, and an operator would believe that the connection is encrypted.
    Contradiction("upstream_ca_file", "needs https in", "upstream", _without_tls),
    Contradiction("upstream_cert_file", "needs https in", "upstream", _without_tls),
    Contradiction("upstream_key_file", "needs https in", "upstream", _without_tls),
    Contradiction("admin_listen", "must not share its port with", "listen", Address.overlaps),
    # Each request would be its own tenant, and no retry would find its original.
    Contradiction("key_header", "must not be one of", "scope_headers", _among),
    # A retry has another id, and would be another request. Nor does it say whose a request is.
    Contradiction("key_header", "must not be the header of", "request_id_header", _is_same),
    Contradiction("scope_headers", "must not have the header of", "request_id_header", _has),
    # The largest accepted body must fit on the disk space for bodies.
    Contradiction("max_request_bytes", "must not be larger than", "max_spool_bytes", gt),
    Contradiction("max_head_line_bytes", "must not be larger than", "max_head_bytes", gt),
    Contradiction("max_stored_bytes", "must not be larger than", "max_buffered_bytes", gt),
    # A fault kills or pauses the process, so that a stray variable must not have one in production.
    Contradiction("fault", "is accepted only together with", "testing", _without_testing),
    # The embedded store has no replica: it would never confirm a claim.
    Contradiction("durability", "replicated needs a store with replicas in", "store_url", _cannot_replicate),
    Contradiction("store_cert_file", "is missing beside", "store_key_file", _missing),
    Contradiction("store_key_file", "is missing beside", "store_cert_file", _missing),
    *(
        Contradiction(
            name, "needs rediss://, or postgresql:// without a file of its own, in", "store_url", _unused(part)
        )
        for part, name in FILES.items()
    ),
    Contradiction("store_password", "needs a URL without a password in", "store_url", _other_password),
    # They would have no effect, and an operator would rely on them.
    Contradiction("audit", "needs postgresql:// in", "store_url", _needs_postgres(False)),
    Contradiction("promotion", "needs postgresql:// in", "store_url", _needs_postgres("any")),
    Contradiction("store_max_bytes", "needs postgresql:// in", "store_url", _needs_postgres(0)),
    Contradiction("store_schema", "needs postgresql:// in", "store_url", _needs_postgres("oncegate")),
    # Any site could act as the user, with the user's cookies.
    Contradiction("cors_credentials", "must not be set beside * in", "cors_origins", _with_any),
    Contradiction("trace_ratio", "has no effect without", "trace_rate_per_s", _without_rate),
    Contradiction("spool_dir", "must be a writable folder to hold", "max_spool_bytes", _unwritable),
)


def contradictions_in(settings: Settings, names: Iterable[str]) -> list[Contradiction]:
    """Return the contradictions in `settings` that involve one of `names`."""
    involved = set(names)
    return [
        row
        for row in CONTRADICTIONS
        if not involved.isdisjoint((row.first, row.second))
        and row.holds(getattr(settings, row.first), getattr(settings, row.second))
    ]
