"""`oncegate migrate`: brings the tables in PostgreSQL to the version of this release, and makes the days' partitions.

It works as the role that owns the tables, which need not be the one that the proxies connect as.
"""

import argparse
import asyncio
import sys
from enum import IntEnum

from oncegate.settings.postgres_url import is_postgres, user_of
from oncegate.settings.settings import Settings
from oncegate.store.postgres.migrations.files import as_script, newest_version, quoted, schema_complaint
from oncegate.store.postgres.migrations.grants import IS_APART, grants
from oncegate.store.postgres.migrations.partitions import DAYS_AHEAD, drop_partitions, missing_partitions
from oncegate.store.postgres.migrations.run import (
    MigrationError,
    Run,
    Target,
    connect,
    schema_version,
    wait_for_schema,
)

# Of the time that a request waits for the store: so much a statement may hold claims up.
LOCK_SHARE = 0.1


class MigrateExit(IntEnum):
    """The exit code of `oncegate migrate`."""

    DONE = 0
    FAILED = 1
    USAGE_ERROR = 2
    # With --check: the schema is older than this release.
    DUE = 3


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Run `oncegate migrate` and return its exit code."""
    store_url = settings.store_url.get_secret_value()
    owner_url = settings.migrate_url.get_secret_value() or store_url
    # A sidecar waits with the rights that it has.
    is_for_sidecar = options.wait and is_postgres(store_url)
    url = options.url or (store_url if is_for_sidecar else owner_url)
    if not is_postgres(url) and not options.sql:
        print("migrate is for a store in PostgreSQL: set ONCEGATE_STORE_URL or ONCEGATE_MIGRATE_URL", file=sys.stderr)
        return MigrateExit.USAGE_ERROR
    role = options.role or user_of(store_url)
    lock_timeout_ms = max(1, int(settings.store_timeout_ms * LOCK_SHARE))
    target = Target(url, settings.store_schema, lock_timeout_ms=lock_timeout_ms, patience_s=options.timeout)
    try:
        return asyncio.run(_run(target, role, settings, options))
    except MigrationError as error:
        print(f"migrate: {error}", file=sys.stderr)
        return MigrateExit.FAILED


async def _run(target: Target, role: str, settings: Settings, options: argparse.Namespace) -> MigrateExit:
    if options.sql:
        print(_script(target, role))
        return MigrateExit.DONE
    if options.wait:
        await wait_for_schema(target)
        return MigrateExit.DONE
    connection = await connect(target)
    try:
        if options.check:
            return _check(await schema_version(connection))
        work = Run(connection, target, report=_say)
        await work.start()
        if not options.maintain:
            await work.migrate()
            await _grant(work, role)
        made = await work.execute_each(missing_partitions())
        _say(f"{made} partitions made; those of the next {DAYS_AHEAD} days are there")
        if options.maintain:
            await _drop(work, int(settings.audit_retention_s * 1000))
    finally:
        connection.terminate()
    return MigrateExit.DONE


def _script(target: Target, role: str) -> str:
    generated = [*([grants(role)] if role else []), missing_partitions()]
    return "\n".join([as_script(target.schema, target.lock_timeout_ms), *(f"{query} \\gexec" for query in generated)])


def _check(version: int) -> MigrateExit:
    """Say whether a migration is due, and whether this release works without it."""
    newest = newest_version()
    print(f"the schema has version {version}, this release has {newest}")
    if complaint := schema_complaint(version):
        _say(complaint)
    if version < newest:
        return MigrateExit.DUE
    return MigrateExit.FAILED if complaint else MigrateExit.DONE


async def _grant(work: Run, role: str) -> None:
    """Give the proxies' role its rights. Raises MigrationError if there is no such role."""
    apart = await work.value(IS_APART, role)
    if role and apart is None:
        text = f"the role {role} does not exist; create it first: CREATE ROLE {quoted(role)} LOGIN PASSWORD '...'"
        raise MigrationError(text)
    if apart:
        await work.execute_each(grants(role))
        _say(f"{role} has the rights of a proxy")
    else:
        _say(
            "warning: proxies that connect as the owner of the tables can change the audit trail. Give them a role of"
            " their own, and set ONCEGATE_MIGRATE_URL to the owner's URL for this command alone"
        )


async def _drop(work: Run, audit_retention_ms: int) -> None:
    dropped, kept = await drop_partitions(work, audit_retention_ms)
    _say(
        f"{len(dropped)} partitions dropped" + "".join(f"; {name} is read, and left for the next run" for name in kept)
    )


def _say(text: str) -> None:
    # Standard error: standard output has what --sql and --check print.
    print(text, file=sys.stderr, flush=True)
