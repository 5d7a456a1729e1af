"""`oncegate audit`: shows one key's entries of the audit trail, checks the whole trail, and exports it.

It changes nothing. `verify` and `export` may read a standby.
"""

import argparse
import asyncio
import json
import sys
from collections import Counter
from datetime import datetime
from enum import IntEnum
from typing import Any

import asyncpg

from oncegate.commands.store_command import exit_code, record_name
from oncegate.keys.notes import escaped
from oncegate.operating.errors import OperatorError
from oncegate.operating.find_record import Finder
from oncegate.operating.opened_store import opened_store
from oncegate.rules.model import Rules
from oncegate.settings.postgres_url import is_postgres
from oncegate.settings.settings import Settings
from oncegate.store.opening import postgres_options
from oncegate.store.postgres.audit import OPERATOR, UNDETECTED, Finding, facts, iso_time, verify
from oncegate.store.postgres.migrations.files import schema_complaint
from oncegate.store.postgres.migrations.run import MigrationError, Target, connect, schema_version
from oncegate.store.postgres.trail import chain_of, check, entries_of, export, head_of
from oncegate.store.record_name import record_id

FOREVER_MS = 1 << 62


class AuditExit(IntEnum):
    """The exit code of `oncegate audit`."""

    DONE = 0
    FAILED = 1
    USAGE_ERROR = 2
    # The trail is not as it was written.
    DAMAGED = 3


def run(settings: Settings, rules: Rules, options: argparse.Namespace) -> int:
    """Run one `oncegate audit` command and return its exit code."""
    url = getattr(options, "url", None) or settings.store_url.get_secret_value()
    if not is_postgres(url):
        print("only a store in PostgreSQL has an audit trail; ONCEGATE_STORE_URL names another", file=sys.stderr)
        return AuditExit.USAGE_ERROR
    try:
        return asyncio.run(_run(settings, rules, url, options))
    except OperatorError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    except (MigrationError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        print(f"the store: {error}", file=sys.stderr)
        return AuditExit.FAILED


async def _run(settings: Settings, rules: Rules, url: str, options: argparse.Namespace) -> AuditExit:
    connection = await connect(Target(url, settings.store_schema, any_server=options.audit_command != "show"))
    try:
        if complaint := schema_complaint(await schema_version(connection)):
            raise OperatorError(complaint)
        match options.audit_command:
            case "show":
                return await _show(connection, settings, rules, options)
            case "verify":
                return await _verify(connection, postgres_options(settings).audit_key, options)
            case _:
                return await _export(connection, options)
    finally:
        connection.terminate()


async def _show(connection: Any, settings: Settings, rules: Rules, options: argparse.Namespace) -> AuditExit:
    """Print one key's entries, the oldest first, and what is wrong with them."""
    async with opened_store(settings, "") as store:
        name = record_name(options)
        key = await Finder(settings, store, rules, lambda text: print(text, file=sys.stderr)).key(name)
        entries = [] if options.all else await chain_of(connection, key)
        # Without a record, nothing leads to its entries.
        entries = entries or await entries_of(connection, key)
        if not entries:
            where = "" if name.is_scoped else ", for the tenant without a credential"
            raise OperatorError(f"the audit trail has no entry of the key {record_id(key)}{where}")
        if (record := await store.records.read(key)) is not None and record.kept.note:
            # The trail has no note, so that none outlives its record.
            print(f"note of the record, not audited: {escaped(record.kept.note)}", file=sys.stderr)
        for entry in entries:
            said = facts(entry)
            if not entry.actor.startswith(OPERATOR):
                said["actor"] = (await store.records.proxy_of(entry.actor))[0]
            print(json.dumps(said) if options.json else _line(said), flush=True)
    head, first_day = await head_of(connection, key)
    return _report(verify(entries, head, first_day, postgres_options(settings).audit_key))


async def _verify(connection: Any, audit_key: bytes, options: argparse.Namespace) -> AuditExit:
    """Check every chain, and print what was found."""
    count: Counter[str] = Counter()
    result = AuditExit.DONE
    async for checked in check(connection, audit_key):
        count.update(keys=1, entries=checked.entries, without=not checked.has_record)
        count.update(changed=sum(one.kind == "changed" for one in checked.findings))
        result = max(result, _report(checked.findings, is_json=options.json))
    print(
        f"{count['entries']} entries of {count['keys']} keys were checked. {_verdict(count, result)}",
        *("what cannot be detected:", *(f"- {text}" for text in UNDETECTED)),
        sep="\n",
        file=sys.stderr,
    )
    if not audit_key:
        print("- without ONCEGATE_SECRET, the digests have no key", file=sys.stderr)
    return result


def _verdict(count: Counter[str], result: AuditExit) -> str:
    """Return the sentence about a whole trail."""
    if count["entries"] and count["changed"] == count["entries"]:
        return "Every entry looks changed: is ONCEGATE_SECRET that of the proxies?"
    said = "Nothing is damaged." if result == AuditExit.DONE else "The trail is damaged."
    return f"{said} Keys without a record, which nothing can be checked against: {count['without']}"


async def _export(connection: Any, options: argparse.Namespace) -> AuditExit:
    """Print the entries of a time, one JSON object a line."""
    async for entry in export(connection, _ms(options.since, 0), _ms(options.until, FOREVER_MS)):
        print(json.dumps(facts(entry)))
    return AuditExit.DONE


def _ms(time: datetime | None, default_ms: int) -> int:
    return int(time.timestamp() * 1000) if time else default_ms


def _line(said: dict[str, Any]) -> str:
    parts = [said["at"], f"{said['event']:20}", said["actor"]]
    parts += [f"{name} {said[name]}" for name in ("rule", "status", "size", "detail") if name in said]
    # An API wrote some of it.
    parts += [f"evidence {escaped(said['evidence'])}"] if "evidence" in said else []
    return "  ".join(parts)


def _report(findings: list[Finding], is_json: bool = False) -> AuditExit:
    """Print findings and return the exit code for them."""
    for one in findings:
        key_id, at = record_id(one.key), iso_time(one.at)
        if is_json:
            print(json.dumps({"finding": one.kind, "key_id": key_id, "number": one.no, "at": at, "text": one.text}))
        else:
            print(f"{one.kind}: key {key_id}, entry {one.no} ({at}): {one.text}", file=sys.stderr)
    return AuditExit.DAMAGED if any(one.is_error for one in findings) else AuditExit.DONE
