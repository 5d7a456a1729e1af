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
    "head": ("before", "proxy.handler:Gateway._enter"),
    "body": ("before", "proxy.body:Bodies.here", "proxy.body:Bodies.again"),
    "named": ("after", "proxy.guarded:Namer.name", "proxy.guarded:Namer.again"),
    "claim": ("before", "proxy.handler:Gateway._claim"),
    "claimed": ("before", "proxy.leases:Leases.hold"),
    "held": ("after", "proxy.leases:Leases.hold"),
    "connect": ("before", "proxy.upstream:Pool.acquire"),
    "sending": ("before", "proxy.exchange:Exchange._send"),
    "sent": ("after", "proxy.exchange:Exchange._send"),
    "waiting": ("before", "proxy.upstream:Connection.arrival"),
    "answered": ("before", "proxy.exchange:Exchange._is_small"),
    "passing": ("after", "proxy.exchange:Exchange._is_small"),
    "whole": ("before", "proxy.upstream:Connection.is_small"),
    "begin": ("before", "proxy.client:Client.begin"),
    "begun": ("after", "proxy.client:Client.begin"),
    "chunk": ("after", "proxy.upstream:Connection.chunk"),
    "written": ("after", "proxy.client:Client.write"),
    "kept": ("after", "proxy.recording:Recording.add"),
    "append": ("before", "proxy.store:Store.append"),
    "appended": ("after", "proxy.store:Store.append"),
    "finish": ("before", "proxy.recording:Recording.finish"),
    "settle": ("before", "proxy.exchange:Exchange._settling"),
    "store": ("before", "proxy.store:Store.store"),
    "stored": ("after", "proxy.store:Store.store"),
    "tell": ("before", "proxy.exchange:Exchange._tell"),
    "settled": ("before", "proxy.exchange:Exchange._conclude"),
    "end": ("before", "proxy.exchange:Exchange._deliver"),
    "ended": ("after", "proxy.exchange:Exchange._deliver"),
    "leave": ("before", "proxy.exchange:Exchange._leave"),
    "left": ("after", "proxy.exchange:Exchange._leave"),
    "renew": ("before", "proxy.store:Store.renew"),
    "wait": ("before", "proxy.waiters:Waiters.wait"),
    "woken": ("after", "proxy.waiters:Waiters.wait"),
    "replay": ("before", "proxy.handler:replay"),
    "read": ("after", "proxy.store:Store.read"),
    "replayed": ("after", "proxy.handler:replay"),
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
