"""`oncegate keys`: list and show the records in the store, decide unknown outcomes (resolve, release), purge a tenant.

Each decision is a compare-and-set: the store carries it out only if the record is still the one that the operator
saw. It fences the owner, so that an owner that wakes up later neither stores nor delivers its own response. Each
decision writes an audit line to standard error: who decided what, on which record (its id, never the key), and the
outcome.
"""

import argparse
import asyncio
import json
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from oncegate.commands.find_record import find_record, find_tenant
from oncegate.commands.operator_response import operator_response
from oncegate.commands.store_command import TIMEOUT_MS, CommandError, KeysExit, opened_store, operator_name
from oncegate.messages.response_head import response_digest
from oncegate.operating.record_facts import facts_of, line_of
from oncegate.rules.resolution import tombstone_ms
from oncegate.settings.settings import Settings
from oncegate.store.record import ViewState, pack
from oncegate.store.record_name import record_id
from oncegate.store.record_view import RecordView, claim_of
from oncegate.store.results import DropStatus, ResolveStatus
from oncegate.store.store import Store

# States in which there is nothing to decide.
DECIDED = (ViewState.COMPLETE, ViewState.EXPIRED, ViewState.RELEASED)
# Messages for decisions that the store did not carry out.
NOT_CARRIED_OUT = {
    ResolveStatus.ABSENT: "the record is gone by now; nothing was changed",
    ResolveStatus.COMPLETE: "the owner completed it meanwhile, with its own response; nothing was changed",
    ResolveStatus.FENCED: "another request owns the key by now; nothing was changed. Show it before you decide again",
    ResolveStatus.UNCONFIRMED: "the store did not confirm the change; show the key before you repeat the command",
}


@dataclass(frozen=True, slots=True)
class Session:
    """One command: the settings and the store that it works on, and the operator who runs it."""

    settings: Settings
    store: Store
    user: str
    host: str

    @property
    def retention_ms(self) -> int:
        return int(self.settings.retention_s * 1000)


@dataclass(frozen=True, slots=True)
class OperatorDecision:
    """An operator's decision about a record. `action` is resolve or release."""

    action: str
    record: RecordView
    status: ResolveStatus
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Purged:
    """How many responses, or parts of one, are gone; how many are still to come, and how many may still be there."""

    dropped: int = 0
    in_flight: int = 0
    unconfirmed: int = 0


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Run one `oncegate keys` command and return its exit code."""
    try:
        return asyncio.run(_run(settings, options))
    except CommandError as error:
        print(error, file=sys.stderr)
        return error.code


async def _run(settings: Settings, options: argparse.Namespace) -> KeysExit:
    user, host = operator_name(), socket.gethostname()
    async with opened_store(settings, f"operator {user} on {host}") as store:
        session = Session(settings, store, user, host)
        commands: dict[str, Callable[[Session, argparse.Namespace], Awaitable[KeysExit]]] = {
            "list": _list,
            "show": _show,
            "resolve": _resolve,
            "release": _release,
            "purge": _purge,
            "quarantine": _quarantine,
            "unpack": _unpack,
        }
        return await commands[options.keys_command](session, options)


# List and show ...


async def _list(session: Session, options: argparse.Namespace) -> KeysExit:
    # A scan may return a record twice.
    listed: set[bytes] = set()
    async for record in session.store.records.scan():
        if record.key in listed or options.state not in (record.state.value, "any"):
            continue
        listed.add(record.key)
        facts = await facts_of(session.store, record)
        # Flushed line by line: a reader such as `head` then ends the scan early.
        print(json.dumps(facts) if options.json else line_of(facts), flush=True)
        if len(listed) == options.limit:
            break
    if not options.json:
        count = "1 key" if len(listed) == 1 else f"{len(listed)} keys"
        state = "" if options.state == "any" else f" in state {options.state} (--state any lists all)"
        print(f"{count}{state}", file=sys.stderr)
    return KeysExit.DONE


async def _show(session: Session, options: argparse.Namespace) -> KeysExit:
    facts = await facts_of(session.store, await find_record(session.settings, session.store, options))
    if options.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name.replace('_', ' '):20} {value}")
    return KeysExit.DONE


# Resolve and release ...


async def _resolve(session: Session, options: argparse.Namespace) -> KeysExit:
    """Complete an unfinished key with the operator's response, which later requests with the key get as a replay."""
    response, body = operator_response(options)
    record = await find_record(session.settings, session.store, options)
    if record.state in (*DECIDED, ViewState.CORRUPT):
        raise CommandError(f"this key is {record.state.value}; only a key that is unknown or in flight can be resolved")
    # An owner whose lease has lapsed is fenced by the decision; no question is needed.
    is_running = record.lease_left_ms > 0
    _confirm(options, is_running, "Its owner is still working on it; your response would replace the owner's.")
    token = await _introduce(session)
    digest = response_digest(response.status, response.reason, response.block)
    digest.update(body)
    stored = replace(response, digest=digest.digest(), completed_ms=record.now_ms)
    # The owner's claim, with the operator's token.
    claim = replace(claim_of(record, session.retention_ms), token=token, tombstone_ms=tombstone_ms(session.settings))
    meta = pack(claim, stored)
    status = await session.store.resolve_by_operator(claim, record.token, meta, body)
    details = {"status": response.status, "bytes": len(body)}
    return _report(session, OperatorDecision("resolve", record, status, details))


async def _release(session: Session, options: argparse.Namespace) -> KeysExit:
    """Free an unfinished key: the next request with it executes."""
    record = await find_record(session.settings, session.store, options)
    # A record without a token was not written by oncegate: it is not removed either.
    if record.state in DECIDED or not record.token:
        raise CommandError(f"this key is {record.state.value}; only a key that is unknown or in flight can be released")
    # Fencing stops the owner's response, but not a request that it has sent already.
    warning = "Its owner may still live: its request may be executed, and the next one executes again."
    _confirm(options, record.owner_may_live, warning)
    token = await _introduce(session)
    status = await session.store.release_by_operator(record.key, record.token, token, record.fence)
    return _report(session, OperatorDecision("release", record, status))


async def _purge(session: Session, options: argparse.Namespace) -> KeysExit:
    """Drop the responses that are stored for one tenant. Their keys stay refused for as long as they were to be."""
    tenant = await find_tenant(session.settings, session.store, options)
    _confirm(options, True, "Retries of this tenant's requests will get 410 instead of their responses.")
    await _introduce(session)
    purged = await _purge_tenant(session.store, tenant)
    _audit(session, "purge", scope=tenant.hex(), **asdict(purged))
    print(f"{purged.dropped} responses dropped")
    if purged.in_flight:
        print(f"{purged.in_flight} requests are in flight: repeat the command when they are done", file=sys.stderr)
    if purged.unconfirmed:
        print(f"the store did not confirm {purged.unconfirmed} of them: repeat the command", file=sys.stderr)
    return KeysExit.NOT_DONE if purged.in_flight or purged.unconfirmed else KeysExit.DONE


async def _quarantine(session: Session, options: argparse.Namespace) -> KeysExit:
    """Do what the proxies do after a loss: the store was restored while none of them ran, so none has noticed it."""
    settings = session.settings
    if settings.on_store_loss != "quarantine":
        raise CommandError("proxies heed a quarantine only with ONCEGATE_ON_STORE_LOSS=quarantine: set it, and restart")
    refused = f"first-time keys are refused for {settings.quarantine_s:g} s"
    _confirm(options, True, f"On every proxy of this store {refused}.")
    await session.store.records.begin_quarantine(int(settings.quarantine_s * 1000))
    _audit(session, "quarantine", seconds=settings.quarantine_s)
    print(refused)
    return KeysExit.DONE


async def _unpack(session: Session, _options: argparse.Namespace) -> KeysExit:
    """Prepare the way back to an older version, which reads no packed records."""
    unpacked = await session.store.records.unpack()
    _audit(session, "unpack", unpacked=unpacked)
    print(f"{unpacked} records unpacked; older versions can use this store until records are packed again")
    return KeysExit.DONE


async def _purge_tenant(store: Store, tenant: bytes) -> Purged:
    """Drop every response that is stored for a tenant, whole or in part. Raises StoreError.

    `tenant`: its digest. A damaged record names none and stays.
    """
    purged = Purged()
    # A scan may return a record twice.
    seen: set[bytes] = set()
    async for record in store.records.scan():
        if record.tenant != tenant or record.key in seen:
            continue
        seen.add(record.key)
        if record.state is ViewState.IN_FLIGHT:
            purged.in_flight += 1
        elif (is_gone := await _drop_response(store, record)) is not None:
            purged.dropped += is_gone
            purged.unconfirmed += not is_gone
    return purged


async def _drop_response(store: Store, record: RecordView) -> bool | None:
    """Drop what a record has of a response, and return whether it is gone, or None if there was none."""
    if record.response is not None:
        return await store.drop(record, purge=True) is not DropStatus.UNCONFIRMED
    if record.state is not ViewState.UNKNOWN:
        return None
    if record.bytes_stored:
        if record.left_ms <= 0:
            return False
        # An unknown outcome stays as it is, without the part of a response that came.
        claim, patience_s = claim_of(record, record.left_ms), TIMEOUT_MS / 1000
        if not (await store.mark_unknown(claim, record.reason, patience_s, record.status)).status.is_done:
            return False
    # PostgreSQL has that part in a table of its own.
    dropped = await store.drop(record, purge=True)
    if dropped is DropStatus.UNCONFIRMED:
        return False
    return True if record.bytes_stored or dropped is DropStatus.DROPPED else None


async def _introduce(session: Session) -> bytes:
    """Return a new token, after `keys show` can name the operator behind it."""
    token = session.store.token()
    name = f"operator {session.user} on {session.host}"
    await session.store.records.introduce(token, name, session.retention_ms)
    return token


def _confirm(options: argparse.Namespace, is_risky: bool, warning: str) -> None:
    """Ask the operator before a risky decision. Raises CommandError without a yes."""
    if not is_risky or options.yes:
        return
    # A script cannot answer a question.
    if not sys.stdin.isatty():
        raise CommandError(f"{warning} Repeat the command with --yes to do it all the same.")
    if input(f"{warning} Do it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was changed")


def _report(session: Session, decision: OperatorDecision) -> KeysExit:
    """Write the audit line, tell the operator the outcome, and return the exit code."""
    record = decision.record
    _audit(
        session,
        decision.action,
        outcome=decision.status.value,
        key_id=record_id(record.key),
        state_before=record.state.value,
        reason=record.reason,
        owner_token=record.token.hex(),
        **decision.details,
    )
    if decision.status in NOT_CARRIED_OUT:
        print(NOT_CARRIED_OUT[decision.status], file=sys.stderr)
        return KeysExit.NOT_DONE
    print(decision.status.value)
    return KeysExit.DONE


def _audit(session: Session, action: str, **facts: Any) -> None:
    """Write who did what."""
    line = {
        "event": "audit",
        "level": "warning",
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "action": action,
        **facts,
        "user": session.user,
        "host": session.host,
    }
    # Standard error, so that the audit trail is separate from output that scripts read.
    print(json.dumps(line), file=sys.stderr)
