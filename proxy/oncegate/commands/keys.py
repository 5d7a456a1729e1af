"""What an operator does with keys: list, show, resolve, release. A way out of "unknown" that stays honest.

Whatever changes a key is compared with what the operator saw, fences the owner, and leaves a line in the log:
who, what, which key (by its digest, never by itself), how it came out.
"""

import argparse
import asyncio
import json
import os
import pwd
import socket
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from oncegate.commands.find_record import find
from oncegate.commands.given_answer import given
from oncegate.commands.refusal import NOT_DONE, Refusal
from oncegate.keys.digests import record_id
from oncegate.messages.response_head import response_digest
from oncegate.server.embedded import socket_url
from oncegate.settings.settings import Settings
from oncegate.store.record import Claim, pack
from oncegate.store.record_view import RecordView, StoreError, introduce, replica_of, scan
from oncegate.store.results import ResolveStatus
from oncegate.store.store import Store

DONE = 0  # an exit code
TIMEOUT_MS = 5000
# What a record of the store has to say about a change that came too late.
TOO_LATE = {
    ResolveStatus.ABSENT: "there is nothing any more",
    ResolveStatus.COMPLETE: "it is complete by now, with the owner's answer; nothing was changed",
    ResolveStatus.FENCED: "it belongs to somebody else by now; nothing was changed. Look again",
    ResolveStatus.UNCONFIRMED: "the store did not confirm; look again before you repeat it",
}


class Operator(NamedTuple):
    """Who acts, on what."""

    settings: Settings
    store: Store
    user: str
    host: str


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Run one command and return its exit code."""
    try:
        return asyncio.run(_run(settings, options))
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return refusal.code
    except StoreError as error:
        print(f"the store: {error}", file=sys.stderr)
        return NOT_DONE


async def _run(settings: Settings, options: argparse.Namespace) -> int:
    store = _open(settings)
    store.start()
    try:
        if not await store.wait_up(TIMEOUT_MS / 1000):
            raise Refusal(store.problem() or "the store is not reachable")
        operator = Operator(settings, store, _user(), socket.gethostname())
        acts: dict[str, Callable[[Operator, argparse.Namespace], Awaitable[int]]] = {
            "list": _list,
            "show": _show,
            "resolve": _resolve,
            "release": _release,
        }
        return await acts[options.act](operator, options)
    finally:
        await store.close()


def _open(settings: Settings) -> Store:
    url = settings.store_url.get_secret_value()
    return Store(
        socket_url(settings.data_dir) if url == "embedded" else url,
        timeout_ms=TIMEOUT_MS,
        patience_s=TIMEOUT_MS / 1000,
        observe=lambda *_: None,
        repeated=lambda: None,
        background=lambda work: work.close(),
    )


def _user() -> str:
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    behind = os.environ.get("SUDO_USER")
    return f"{behind} as {name}" if behind else name


# Looking ...


async def _list(operator: Operator, options: argparse.Namespace) -> int:
    shown: set[bytes] = set()
    async for seen in scan(operator.store):
        if seen.key in shown or options.state not in (seen.state, "any"):
            continue
        shown.add(seen.key)
        facts = await _facts(operator.store, seen)
        print(json.dumps(facts) if options.json else _line(facts), flush=True)
        if len(shown) == options.limit:
            break
    if not options.json:
        print(f"{len(shown)} keys", file=sys.stderr)
    return DONE


async def _show(operator: Operator, options: argparse.Namespace) -> int:
    facts = await _facts(operator.store, await find(operator.settings, operator.store, options))
    if options.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name.replace('_', ' '):16} {value}")
    return DONE


async def _facts(store: Store, seen: RecordView) -> dict[str, Any]:
    """Return what is known of a record, for people and programs."""
    who, silent_ms = await replica_of(store, seen.token)
    facts: dict[str, Any] = {"id": record_id(seen.key), "state": seen.state, "scope": seen.tenant.hex()}
    if seen.created_ms:
        facts |= {"claimed": _moment(seen.created_ms), "age_s": max(0, seen.now_ms - seen.created_ms) // 1000}
    facts["by"] = who
    if silent_ms is not None:
        facts["heard_of_s_ago"] = silent_ms // 1000
    if seen.answer is not None:
        answer = seen.answer
        facts |= {"status": answer.status, "bytes": answer.size, "kept": answer.kept}
        return facts | {"completed": _moment(answer.completed_ms)}
    told = {"why": seen.why, "got": seen.far, "bytes_kept": seen.bytes_kept, "lease_left_ms": seen.lease_left_ms}
    facts |= {name: value for name, value in told.items() if value}
    return facts | {"mode": seen.mode.decode("ascii", "replace"), "owner_may_live": seen.owner_may_live}


def _moment(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")


def _line(facts: dict[str, Any]) -> str:
    rest = facts.get("why") or facts.get("got") or facts.get("status") or ""
    return f"{facts['id']}  {facts['state']:9}  {facts.get('claimed', '-'):29}  {facts['by']}  {rest}"


# Deciding ...


async def _resolve(operator: Operator, options: argparse.Namespace) -> int:
    head, body = given(options)
    seen = await find(operator.settings, operator.store, options)
    if seen.state in ("complete", "released", "corrupt"):
        raise Refusal(f"this key is {seen.state}; only one that is unknown or in flight can be resolved")
    _confirm(options, seen.lease_left_ms > 0, "Its owner is at it; your answer would replace its own.")
    digest = response_digest(head.status, head.reason, head.block)
    digest.update(body)
    token = operator.store.token()
    retention_ms = int(operator.settings.retention_s * 1000)
    await _introduce(operator, token)
    claim = Claim(
        seen.key, token, seen.fence, seen.mode, seen.fingerprint, seen.described, seen.created_ms, 0, retention_ms
    )
    answer = head._replace(digest=digest.digest(), completed_ms=seen.now_ms)
    status = await operator.store.resolve(seen.key, seen.token, pack(claim, answer), body, retention_ms)
    return _conclude(operator, seen, "resolve", status, {"status": head.status, "bytes": len(body)})


async def _release(operator: Operator, options: argparse.Namespace) -> int:
    seen = await find(operator.settings, operator.store, options)
    if seen.state in ("complete", "released") or not seen.token:
        raise Refusal(f"this key is {seen.state}; only one that is unknown or in flight can be released")
    _confirm(options, seen.owner_may_live, "Its owner may still live: what it sent may be executed, and then again.")
    token = operator.store.token()
    await _introduce(operator, token)
    status = await operator.store.set_free(seen.key, seen.token, token, seen.fence)
    return _conclude(operator, seen, "release", status, {})


async def _introduce(operator: Operator, token: bytes) -> None:
    who, retention_ms = f"operator {operator.user} on {operator.host}", int(operator.settings.retention_s * 1000)
    await introduce(operator.store, token, who, retention_ms)


def _confirm(options: argparse.Namespace, needed: bool, warning: str) -> None:
    """Ask where it is needed; Refusal without a yes."""
    if not needed or options.yes:
        return
    if not sys.stdin.isatty():
        raise Refusal(f"{warning} Say --yes to do it all the same.")
    if input(f"{warning} Do it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Refusal("nothing was changed")


def _conclude(operator: Operator, seen: RecordView, act: str, status: ResolveStatus, more: dict[str, Any]) -> int:
    """Write the audit line and tell the operator."""
    line = {
        "event": "audit",
        "level": "warning",
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "act": act,
        "outcome": status.value,
        "key": record_id(seen.key),
        "was": seen.state,
        "why": seen.why,
        "owner": seen.token.hex(),
        "user": operator.user,
        "host": operator.host,
        **more,
    }
    print(json.dumps(line), file=sys.stderr)
    if status in (ResolveStatus.RESOLVED, ResolveStatus.RELEASED):
        print(status.value)
        return DONE
    print(TOO_LATE[status], file=sys.stderr)
    return NOT_DONE
