"""How the service runs, and what it says about itself."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from oncegate.settings.values import (
    MAX_WORKERS,
    MILLION,
    Bytes,
    OptionalUrl,
    ReadableFile,
    SecondsOrZero,
    from_text,
    list_of,
    parse_workers,
    temporary_folder,
)
from oncegate.testing.faults import Fault, parse_fault


class OperationSettings(BaseModel):
    """A group of `Settings`."""

    rules_file: ReadableFile = Field(
        None, description="File with rules for single routes (TOML). SIGHUP makes oncegate read it again."
    )
    pages_dir: Path | None = Field(
        None,
        description="Folder with templates of the [pages](../how-to/pages.md) that people get instead of problems in "
        "JSON. SIGHUP makes oncegate read it again.",
    )
    max_buffered_bytes: Bytes = Field(
        268_435_456, description="Memory for buffered bodies of requests and responses together, for each worker."
    )
    spool_dir: Path = Field(
        default_factory=temporary_folder, description="Folder for request bodies that are too large for memory."
    )
    max_spool_bytes: Bytes = Field(1_073_741_824, description="Disk space in `ONCEGATE_SPOOL_DIR`, for each worker.")
    run_dir: Path | None = Field(
        None,
        description="Folder for the socket by which [`oncegate drain`](command-line.md#drain) reaches the proxy, one "
        "for each proxy. oncegate makes it where it is missing. By default the folder of the embedded store, if any.",
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
    trace_rate_per_s: float = Field(
        0,
        ge=0,
        le=MILLION,
        description="Most requests with a key that each worker [traces](../how-to/tracing.md) in a second. `0`: "
        "tracing is off.",
    )
    trace_ratio: float = Field(
        0,
        ge=0,
        le=1,
        description="Share of the requests without a `traceparent` that are traced, from `0` to `1`. Of the others, "
        "oncegate traces those whose client does.",
    )
    access_log_path: bool = Field(
        True,
        description="Whether the access log and the spans of traces have the path of a request, without its query. "
        "They never have that of a rule whose key or scope is in the path.",
    )
    docs_url: OptionalUrl = Field(
        None,
        description="URL at which oncegate's folder `docs/` is served as Markdown files, such as "
        "`https://git.example.com/oncegate/blob/main/docs`. With it, the `type` of a problem is the link "
        "`DOCS_URL/reference/answers.md#SLUG`. Without it, `type` is `urn:oncegate:SLUG`.",
    )
    head_cache: bool = Field(
        True,
        description="Remember the heads of requests and responses that came before, and which of their values "
        "differ. It saves two fifths of an execution's instructions where heads repeat. `false` is for tests, and to "
        "rule the cache out when you look for a fault.",
    )
    testing: bool = Field(False, description="Allow `ONCEGATE_FAULT`. For oncegate's own tests only.")
    fault: Annotated[tuple[Fault, ...], list_of(parse_fault)] = Field(
        (),
        description="Comma list of faults that tests inject: `kill@point:n`, `raise@point:n`, `pause@point:n` (until "
        "SIGCONT) or `pause@point:n:ms`. The nth request that passes the point meets the fault "
        "(`oncegate/testing/faults.py` lists the points).",
    )
