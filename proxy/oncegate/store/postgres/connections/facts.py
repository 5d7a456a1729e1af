"""What one server says of itself: whether it takes writes, where its history stands, and what its user may do."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from oncegate.store.postgres.migrations.files import schema_complaint

# What the proxy's user needs on tables; most need all four.
_ALL_RIGHTS = "SELECT,INSERT,UPDATE,DELETE"
_FEWER_RIGHTS = '{"audit": "SELECT,INSERT", "schema_version": "SELECT"}'

_ASK = """
SELECT pg_backend_pid() AS pid, backend.backend_start AS started, pg_postmaster_start_time() AS booted,
       control.system_identifier AS system, pg_is_in_recovery() AS is_standby,
       CASE WHEN pg_is_in_recovery() THEN (SELECT timeline_id FROM pg_control_checkpoint())
            ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint END AS timeline,
       current_setting('transaction_read_only') = 'on' AS is_read_only,
       current_setting('fsync') = 'on' AS fsync, current_setting('full_page_writes') = 'on' AS full_page_writes,
       current_setting('synchronous_standby_names') AS standby_names, current_setting('cluster_name') AS cluster_name,
       pg_has_role(current_user, 'pg_read_all_stats', 'USAGE') AS sees_standbys,
       ARRAY(SELECT sync_state FROM pg_stat_get_wal_senders() WHERE state = 'streaming') AS standbys,
       floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now_ms,
       current_user::text AS user_name,
       ARRAY(SELECT current_setting(one.name) FROM unnest($1::text[]) WITH ORDINALITY AS one(name, at) ORDER BY one.at)
           AS settings
FROM pg_control_system() AS control, pg_stat_get_activity(pg_backend_pid()) AS backend
"""

# `lacking`: of each thing in the schema its kind (r and p table, S sequence, f function), a missing right, its name.
_ASK_RIGHTS = """
WITH room AS (SELECT oid FROM pg_namespace WHERE nspname = $1),
needed AS (
    SELECT relkind::text AS kind, relname::text AS name, one.privilege,
           CASE relkind WHEN 'S' THEN has_sequence_privilege(pg_class.oid, one.privilege)
                        ELSE has_table_privilege(pg_class.oid, one.privilege) END AS has
    FROM pg_class JOIN room ON relnamespace = room.oid CROSS JOIN LATERAL unnest(string_to_array(
        CASE relkind WHEN 'S' THEN 'SELECT,UPDATE' ELSE coalesce($2::json ->> relname::text, $3) END, ',')
    ) AS one(privilege)
    WHERE relkind IN ('r', 'p', 'S') AND NOT relispartition AND relname !~ '^(audit|chunk)_'
    UNION ALL
    SELECT 'f', proname::text, 'EXECUTE', has_function_privilege(pg_proc.oid, 'EXECUTE')
    FROM pg_proc JOIN room ON pronamespace = room.oid
)
SELECT (SELECT has_schema_privilege(oid, 'USAGE') FROM room) AS may_use,
       (SELECT count(*) FROM needed WHERE kind IN ('r', 'p')) AS tables,
       ARRAY(SELECT ARRAY[kind, privilege, name] FROM needed WHERE NOT has ORDER BY kind DESC, name, privilege)
           AS lacking
"""
_ASK_VERSION = "SELECT max(version) FROM schema_version"


_PLAIN = ("is_standby", "is_read_only", "fsync", "full_page_writes", "standby_names", "cluster_name")


class Backend(NamedTuple):
    """One process of a server. No other has the same four values, also after a restart."""

    pid: int
    started: datetime
    booted: datetime
    system: int


class Run(NamedTuple):
    """One run of a server: the database it has, the timeline of its history, and when it started."""

    system: int
    timeline: int
    booted: datetime


@dataclass(frozen=True, slots=True)
class Facts:
    """What one server said over one connection.

    `standbys`: the `sync_state` of each standby that streams; None for one that the user may not see. `settings`: of
    the session, by name. `schema_reason`: why the schema cannot be used; None where it can, or was not asked.
    `schema_version`: 0 where there is none, or it was not asked.
    """

    backend: Backend
    run: Run
    user_name: str
    is_standby: bool
    is_read_only: bool
    fsync: bool
    full_page_writes: bool
    standby_names: str
    cluster_name: str
    sees_standbys: bool
    standbys: tuple[str | None, ...]
    now_ms: int
    settings: dict[str, str]
    schema_reason: str | None
    schema_version: int = 0


async def ask(connection: Any, schema: str = "", names: tuple[str, ...] = ()) -> Facts:
    """Ask a server for its facts, and for the values that the settings `names` have. Raises what the driver raises.

    `schema`: whether it can be used is asked as well; empty for not.
    """
    row = await connection.fetchrow(_ASK, names)
    run = Run(row["system"], row["timeline"], row["booted"])
    schema_reason, version = await _schema(connection, schema, row["user_name"]) if schema else (None, 0)
    return Facts(
        Backend(row["pid"], row["started"], run.booted, run.system),
        run,
        row["user_name"],
        **{name: row[name] for name in _PLAIN},
        sees_standbys=row["sees_standbys"],
        standbys=tuple(row["standbys"]),
        now_ms=row["now_ms"],
        settings=dict(zip(names, row["settings"], strict=True)),
        schema_reason=schema_reason,
        schema_version=version,
    )


async def _schema(connection: Any, schema: str, user: str) -> tuple[str | None, int]:
    """Return why the schema cannot be used, with what would help, or None; and its version."""
    rights = await connection.fetchrow(_ASK_RIGHTS, schema, _FEWER_RIGHTS, _ALL_RIGHTS)
    if rights["may_use"] is False:
        return f"its user may not use the schema: GRANT USAGE ON SCHEMA {schema} TO {user}", 0
    if not rights["tables"]:
        return schema_complaint(0), 0
    lacking = rights["lacking"]
    is_told = all(name != "schema_version" for _, _, name in lacking)
    version = (await connection.fetchval(_ASK_VERSION) or 0) if is_told else 0
    if lacking:
        return f"its user lacks rights: {grant(lacking[0], schema, user)}", version
    return schema_complaint(version), version


def grant(lacking: tuple[str, str, str], schema: str, user: str) -> str:
    """Return the GRANT that gives a right: `lacking` is the kind of a thing, the right and the thing's name."""
    kind, privilege, name = lacking
    if kind == "f":
        return f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {user}"
    return f"GRANT {privilege} ON {'SEQUENCE ' if kind == 'S' else ''}{schema}.{name} TO {user}"
