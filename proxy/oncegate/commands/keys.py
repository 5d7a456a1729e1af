"""`oncegate keys`: list and show the records in the store, decide unknown outcomes, cancel requests, purge a tenant.

Each decision writes an audit line to standard error: who decided what, on which record (its id, never the key), and the
outcome.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict
from typing import Any

from oncegate.commands.described_request import read_file
from oncegate.commands.keys_watch import watch
from oncegate.commands.store_command import KeysExit, exit_code, record_name, this_operator
from oncegate.operating import decisions, purging
from oncegate.operating.decisions import RELEASE, RESOLVE, Decision, Desk, audit_line
from oncegate.operating.errors import OperatorError
from oncegate.operating.find_record import Finder, open_records
from oncegate.operating.opened_store import opened_store
from oncegate.operating.record_facts import facts_of, line_of, progress_facts, progress_of
from oncegate.rules.model import Rules
from oncegate.settings.settings import Settings
from oncegate.store.record_view import OpenKind, RecordView

# The kinds of open keys that are in one state.
OPEN = {"unknown": (OpenKind.UNKNOWN, OpenKind.LAPSED, OpenKind.WAIVED), "in_flight": (OpenKind.IN_FLIGHT,)}


def run(settings: Settings, rules: Rules, options: argparse.Namespace) -> int:
    """Run one `oncegate keys` command and return its exit code."""
    try:
        return asyncio.run(_run(settings, rules, options))
    except OperatorError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        # The usual end of this command.
        if options.keys_command != "watch":
            raise
        return KeysExit.DONE


async def _run(settings: Settings, rules: Rules, options: argparse.Namespace) -> KeysExit:
    operator = this_operator()
    async with opened_store(settings, str(operator)) as store:
        desk, finder = Desk(settings, rules, store, operator), Finder(settings, store, rules, say)
        commands: dict[str, Callable[[Desk, Finder, argparse.Namespace], Awaitable[KeysExit]]] = {
            "list": _list,
            "show": _show,
            "resolve": _resolve,
            "release": _release,
            "cancel": _cancel,
            "probe": _probe,
            "watch": _watch,
            "purge": _purge,
            "quarantine": _quarantine,
            "unpack": _unpack,
        }
        return await commands[options.keys_command](desk, finder, options)


# List, show and watch ...


async def _list(desk: Desk, _: Finder, options: argparse.Namespace) -> KeysExit:
    # A scan may return a record twice. Of open keys there is an index, which has the oldest first.
    listed, kinds = set[bytes](), OPEN.get(options.state)
    found = desk.store.records.scan() if kinds is None else open_records(desk.store, kinds)
    async for record in found:
        if record.key in listed or not _is_asked_for(record, options):
            continue
        listed.add(record.key)
        facts = await facts_of(desk.store, record)
        # Flushed line by line: a reader such as `head` then ends the scan early.
        print(json.dumps(facts) if options.json else line_of(facts), flush=True)
        if len(listed) == options.limit:
            break
    if not options.json:
        count = "1 key" if len(listed) == 1 else f"{len(listed)} keys"
        state = "" if options.state == "any" else f" in state {options.state} (--state any lists all)"
        print(f"{count}{state}", file=sys.stderr)
    return KeysExit.DONE


def _is_asked_for(record: RecordView, options: argparse.Namespace) -> bool:
    kept = record.kept
    is_kept = options.note in (None, kept.note) and options.rule in (None, kept.rule)
    return is_kept and options.state in (record.state.value, "any")


async def _show(desk: Desk, finder: Finder, options: argparse.Namespace) -> KeysExit:
    record = await finder.record(record_name(options))
    facts = await facts_of(desk.store, record)
    for progress, plan in (await progress_of(desk.store, desk.rules, [record])).values():
        facts |= progress_facts(progress, plan)
    _print_facts(options, [(name.replace("_", " ") if not options.json else name, one) for name, one in facts.items()])
    return KeysExit.DONE


def _print_facts(options: argparse.Namespace, facts: Iterable[tuple[str, Any]]) -> None:
    if options.json:
        print(json.dumps({label.strip(): text for label, text in facts}))
        return
    for label, text in facts:
        print(f"{label:20} {text}")


async def _watch(_: Desk, finder: Finder, options: argparse.Namespace) -> KeysExit:
    await watch(finder, record_name(options), options)
    return KeysExit.DONE


# Ask the API ...


async def _probe(desk: Desk, finder: Finder, options: argparse.Namespace) -> KeysExit:
    # Its HTTP client would slow the start of the other commands.
    from oncegate.observe.reconciling_log import ACTION
    from oncegate.operating import probing

    record = await finder.record(record_name(options))
    if options.dry_run:
        _print_facts(options, await probing.dry_run(desk, record))
        return KeysExit.DONE
    probed = await probing.probe(desk, record)
    if probed.report is not None:
        _audit(desk, ACTION, **probed.facts)
    if probed.is_settled or options.json:
        _print(options, probed.text, ACTION, **probed.facts)
    else:
        say(probed.text)
    return KeysExit.DONE if probed.is_settled else KeysExit.NOT_DONE


# Resolve, release and cancel ...


async def _resolve(desk: Desk, finder: Finder, options: argparse.Namespace) -> KeysExit:
    given = decisions.operator_response(options.status, options.header, read_file(options.body_file))
    # These fields are the response's.
    options.header = []
    record = await finder.record(record_name(options))
    _ask(options, RESOLVE, record)
    return _report(desk, options, await decisions.resolve(desk, record, given))


async def _release(desk: Desk, finder: Finder, options: argparse.Namespace) -> KeysExit:
    record = await finder.record(record_name(options))
    _ask(options, RELEASE, record)
    return _report(desk, options, await decisions.release(desk, record))


async def _cancel(desk: Desk, finder: Finder, options: argparse.Namespace) -> KeysExit:
    # It says itself why a key cannot be cancelled, and there is no risk to ask about.
    record = await finder.record(record_name(options))
    return _report(desk, options, await decisions.cancel(desk, record))


def _ask(options: argparse.Namespace, action: str, record: RecordView) -> None:
    """Refuse a decision that makes no sense, and ask before a risky one. Raises OperatorError."""
    if reason := decisions.refusal(action, record):
        raise OperatorError(reason)
    _confirm(options, decisions.warning(action, record))


async def _purge(desk: Desk, finder: Finder, options: argparse.Namespace) -> KeysExit:
    tenant = await finder.tenant(record_name(options))
    _confirm(options, purging.WARNING)
    await desk.introduce()
    purged = await purging.purge_tenant(desk.store, tenant)
    _audit(desk, "purge", scope=tenant.hex(), **asdict(purged))
    _print(options, f"{purged.dropped} responses dropped", "purge", scope=tenant.hex(), **asdict(purged))
    if purged.in_flight:
        print(f"{purged.in_flight} requests are in flight: repeat the command when they are done", file=sys.stderr)
    if purged.unconfirmed:
        print(f"the store did not confirm {purged.unconfirmed} of them: repeat the command", file=sys.stderr)
    return KeysExit.NOT_DONE if purged.in_flight or purged.unconfirmed else KeysExit.DONE


async def _quarantine(desk: Desk, _: Finder, options: argparse.Namespace) -> KeysExit:
    """Do what the proxies do after a loss: the store was restored while none of them ran, so none has noticed it."""
    settings = desk.settings
    if settings.on_store_loss != "quarantine":
        raise OperatorError(
            "proxies heed a quarantine only with ONCEGATE_ON_STORE_LOSS=quarantine: set it, and restart"
        )
    refused = f"first-time keys are refused for {settings.quarantine_s:g} s"
    _confirm(options, f"On every proxy of this store {refused}.")
    await desk.store.records.begin_quarantine(int(settings.quarantine_s * 1000))
    _audit(desk, "quarantine", seconds=settings.quarantine_s)
    _print(options, refused, "quarantine", seconds=settings.quarantine_s)
    return KeysExit.DONE


async def _unpack(desk: Desk, _: Finder, options: argparse.Namespace) -> KeysExit:
    """Prepare the way back to an older version, which reads no packed records."""
    unpacked = await desk.store.records.unpack()
    _audit(desk, "unpack", unpacked=unpacked)
    text = f"{unpacked} records unpacked; older versions can use this store until records are packed again"
    _print(options, text, "unpack", unpacked=unpacked)
    return KeysExit.DONE


def _confirm(options: argparse.Namespace, warning: str) -> None:
    """Ask the operator before a risky decision: one with a warning. Raises OperatorError without a yes."""
    if not warning or options.yes:
        return
    # A script cannot answer a question.
    if not sys.stdin.isatty():
        raise OperatorError(f"{warning} Repeat the command with --yes to do it all the same.")
    if input(f"{warning} Do it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise OperatorError("nothing was changed")


def _report(desk: Desk, options: argparse.Namespace, decision: Decision) -> KeysExit:
    """Write the audit line, tell the operator the outcome, and return the exit code."""
    _audit(desk, decision.action, **decision.facts)
    if decision.is_done or options.json:
        _print(options, decision.text, decision.action, **decision.facts)
    else:
        say(decision.text)
    return KeysExit.DONE if decision.is_done else KeysExit.NOT_DONE


def _print(options: argparse.Namespace, text: str, action: str, **facts: Any) -> None:
    """Print what was done, for a person or for a program."""
    print(json.dumps({"action": action, **facts}) if options.json else text)


def say(text: str) -> None:
    """Tell the person at the terminal. Standard output is for what was asked."""
    print(text, file=sys.stderr)


def _audit(desk: Desk, action: str, **facts: Any) -> None:
    # Standard error, so that the audit trail is separate from output that scripts read.
    print(json.dumps(audit_line(desk.operator, action, **facts)), file=sys.stderr)
