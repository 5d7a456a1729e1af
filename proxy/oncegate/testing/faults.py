"""Faults on purpose, for tests of the proxy itself: it dies, fails or stands still at a named point.

A point is a step of the request path, named by its place in the code. Where a fault is wanted, the
step is wrapped at the start; without one nothing here is on the path.
"""

import inspect
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple

# In the order of the path: whether the point lies before or after a step, and that step, in each of its forms.
POINTS = {
    "head": ("before", "oncegate.gateway.handler:Gateway._enter"),
    "body": ("before", "oncegate.downstream.body:Bodies.here", "oncegate.downstream.body:Bodies.again"),
    "named": (
        "after",
        "oncegate.gateway.keyed_request:Identifier.name",
        "oncegate.gateway.keyed_request:Identifier.again",
    ),
    "claim": ("before", "oncegate.gateway.handler:Gateway._claim"),
    "claimed": ("before", "oncegate.store.leases:Leases.hold"),
    "held": ("after", "oncegate.store.leases:Leases.hold"),
    "connect": ("before", "oncegate.upstream.pool:Pool.acquire"),
    "sending": ("before", "oncegate.gateway.exchange:Exchange._send"),
    "sent": ("after", "oncegate.gateway.exchange:Exchange._send"),
    "waiting": ("before", "oncegate.upstream.connection:Connection.arrival"),
    "answered": ("before", "oncegate.gateway.exchange:Exchange._is_small"),
    "passing": ("after", "oncegate.gateway.exchange:Exchange._is_small"),
    "whole": ("before", "oncegate.upstream.connection:Connection.is_small"),
    "begin": ("before", "oncegate.downstream.response:ResponseWriter.begin"),
    "begun": ("after", "oncegate.downstream.response:ResponseWriter.begin"),
    "chunk": ("after", "oncegate.upstream.connection:Connection.chunk"),
    "written": ("after", "oncegate.downstream.response:ResponseWriter.write"),
    "kept": ("after", "oncegate.gateway.recording:Recording.add"),
    "append": ("before", "oncegate.store.store:Store.append"),
    "appended": ("after", "oncegate.store.store:Store.append"),
    "finish": ("before", "oncegate.gateway.recording:Recording.finish"),
    "settle": ("before", "oncegate.gateway.exchange:Exchange._settling"),
    "store": ("before", "oncegate.store.store:Store.store"),
    "stored": ("after", "oncegate.store.store:Store.store"),
    "tell": ("before", "oncegate.gateway.exchange:Exchange._tell"),
    "settled": ("before", "oncegate.gateway.exchange:Exchange._conclude"),
    "end": ("before", "oncegate.gateway.exchange:Exchange._deliver"),
    "ended": ("after", "oncegate.gateway.exchange:Exchange._deliver"),
    "leave": ("before", "oncegate.gateway.exchange:Exchange._leave"),
    "left": ("after", "oncegate.gateway.exchange:Exchange._leave"),
    "renew": ("before", "oncegate.store.store:Store.renew"),
    "wait": ("before", "oncegate.gateway.waiters:Waiters.wait"),
    "woken": ("after", "oncegate.gateway.waiters:Waiters.wait"),
    "replay": ("before", "oncegate.gateway.handler:replay"),
    "read": ("after", "oncegate.store.store:Store.read"),
    "replayed": ("after", "oncegate.gateway.handler:replay"),
}
_FORM = re.compile(r"(kill|raise|pause)@(\w+):(\d+)(?::(\d+))?")


class Fault(NamedTuple):
    """What happens when a point is passed for the `nth` time; a pause of 0 ms lasts until SIGCONT."""

    kind: str
    point: str
    nth: int
    pause_ms: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.point}:{self.nth}" + (f":{self.pause_ms}" if self.pause_ms else "")


class Injected(Exception):
    """The failure of a step that was told to fail."""


def parse_fault(text: str) -> Fault:
    """Return the fault that `kind@point:n` names; a pause may have its length. ValueError where it is none."""
    found = _FORM.fullmatch(text)
    if found is None or (found[4] and found[1] != "pause"):
        raise ValueError("must be kill@point:n, raise@point:n, pause@point:n or pause@point:n:ms")
    if found[2] not in POINTS:
        raise ValueError(f"has an unknown point; there are {', '.join(POINTS)}")
    return Fault(found[1], found[2], int(found[3]), int(found[4] or 0))


def install(faults: Iterable[Fault], tell: Callable[..., None]) -> None:
    """Wrap the steps that are to go wrong, for the life of this process. `tell` logs each strike before it comes."""
    for fault in faults:
        when, *places = POINTS[fault.point]
        trap = _trap(fault, tell)
        for place in places:
            module, _, path = place.partition(":")
            owner: Any = import_module(module)
            *outer, name = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, name, _wrapped(getattr(owner, name), when, trap))


def _trap(fault: Fault, tell: Callable[..., None]) -> Callable[[], None]:
    """Return what counts the passages of a point and strikes at the nth."""
    passed = 0

    def pass_() -> None:
        nonlocal passed
        passed += 1
        if passed == fault.nth:
            tell("a fault strikes", fault=str(fault))
            _strike(fault)

    return pass_


def _strike(fault: Fault) -> None:
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "pause" if fault.pause_ms:
            time.sleep(fault.pause_ms / 1000)  # all of the process stands still, its renewals too
        case "pause":
            os.kill(os.getpid(), signal.SIGSTOP)  # until somebody sends SIGCONT
        case _:
            raise Injected(str(fault))


def _wrapped(step: Callable[..., Any], when: str, pass_: Callable[[], None]) -> Callable[..., Any]:
    async def later(result: Any) -> Any:
        result = await result
        pass_()
        return result

    def wrapped(*args: Any, **more: Any) -> Any:
        if when == "before":
            pass_()
            return step(*args, **more)
        result = step(*args, **more)
        if inspect.isawaitable(result):
            return later(result)
        pass_()
        return result

    return wrapped
