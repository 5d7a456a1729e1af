"""Settings that are each fine and do not fit together."""

import os
from collections.abc import Callable, Iterable
from operator import gt, lt
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from oncegate.settings.addresses import Address, Origin
from oncegate.settings.settings import Settings


def _missing(file: Path | None, beside: Path | None) -> bool:
    return file is None and beside is not None


def _without_tls(file: Path | None, upstream: Origin) -> bool:
    return file is not None and upstream.scheme == "http"


def _unwritable(folder: Path, _max_bytes: int) -> bool:
    return not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK))


def _cannot_replicate(durability: str, store_url: SecretStr) -> bool:
    return durability == "replicated" and store_url.get_secret_value() == "embedded"


# Settings that are each fine and do not fit together: the first, how it fails, the second, whether it does.
CONTRADICTIONS: tuple[tuple[str, str, str, Callable[[Any, Any], bool]], ...] = (
    ("retention_s", "must not be shorter than", "lease_ms", lambda kept_s, lease_ms: kept_s * 1000 < lease_ms),
    ("retention_s", "must not be shorter than", "wait_max_s", lt),
    ("tls_cert_file", "is missing beside", "tls_key_file", _missing),
    ("tls_key_file", "is missing beside", "tls_cert_file", _missing),
    ("upstream_cert_file", "is missing beside", "upstream_key_file", _missing),
    ("upstream_key_file", "is missing beside", "upstream_cert_file", _missing),
    ("upstream_ca_file", "needs https in", "upstream", _without_tls),
    ("upstream_cert_file", "needs https in", "upstream", _without_tls),
    ("upstream_key_file", "needs https in", "upstream", _without_tls),
    ("admin_listen", "must not share its port with", "listen", Address.overlaps),
    ("key_header", "must not be one of", "scope_headers", lambda key, scope: key.lower() in map(str.lower, scope)),
    ("max_request_bytes", "must not be larger than", "max_spool_bytes", gt),
    ("max_stored_bytes", "must not be larger than", "max_buffered_bytes", gt),
    ("fault", "is accepted only together with", "testing", lambda fault, testing: bool(fault) and not testing),
    ("durability", "replicated needs a store with replicas in", "store_url", _cannot_replicate),
    ("spool_dir", "must be a writable folder to hold", "max_spool_bytes", _unwritable),
)


def contradictory(settings: Settings, names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return the pairs of settings that do not fit together and have one of `names` in them, and how they fail."""
    asked = set(names)
    return [
        (first, text, second)
        for first, text, second, contradict in CONTRADICTIONS
        if not asked.isdisjoint((first, second)) and contradict(getattr(settings, first), getattr(settings, second))
    ]
