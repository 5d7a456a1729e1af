"""Fault injection for tests of oncegate itself: at a named point the process dies, fails or pauses.

A point is a step of the request path: a function, by its place in the code. `install` wraps the functions of the
requested faults when a worker starts. Without a fault nothing is wrapped, and the request path is unchanged.
"""

import inspect
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

STORES = ("oncegate.store.redis.store:RedisStore", "oncegate.store.postgres.store:PostgresStore")


def _of_each_store(verb: str) -> tuple[str, ...]:
    return tuple(f"{store}.{verb}" for store in STORES)


# In the order of the request path: the point's name, whether it lies before or after its step, and that step's
# functions. A step has several functions where there are several stores, or a shorter path for a head that is known.
POINTS = {
    "head": ("before", "oncegate.gateway.first_step:FirstStep.decide"),
    "body": ("before", "oncegate.downstream.body:Bodies.take", "oncegate.downstream.body:Bodies.take_buffered"),
    "named": (
        "after",
        "oncegate.gateway.first_step:FirstStep._identify",
        "oncegate.gateway.keyed_request:HeadPlan.keyed_request",
    ),
    "claim": ("before", *_of_each_store("claim")),
    "claimed": ("before", "oncegate.store.leases:Leases.hold"),
    "held": ("after", "oncegate.store.leases:Leases.hold"),
    "connect": ("before", "oncegate.upstream.pool:Pool.acquire"),
    "sending": ("before", "oncegate.gateway.exchange:Exchange._send"),
    "sent": ("after", "oncegate.gateway.exchange:Exchange._send"),
    "waiting": ("before", "oncegate.upstream.connection:Connection.next_arrival"),
    "answered": ("before", "oncegate.gateway.exchange:Exchange._may_be_small"),
    "passing": ("after", "oncegate.gateway.exchange:Exchange._may_be_small"),
    "whole": ("before", "oncegate.upstream.connection:Connection.is_complete_in"),
    "begin": ("before", "oncegate.downstream.response:ResponseWriter.begin"),
    "begun": ("after", "oncegate.downstream.response:ResponseWriter.begin"),
    "chunk": ("before", "oncegate.downstream.response:ResponseWriter.write"),
    "written": ("after", "oncegate.downstream.response:ResponseWriter.write"),
    "kept": ("after", "oncegate.gateway.recording:Recording.add"),
    "append": ("before", *_of_each_store("append")),
    "appended": ("after", *_of_each_store("append")),
    "finish": ("before", "oncegate.gateway.recording:Recording.finish"),
    "settle": ("before", "oncegate.gateway.exchange:settle", "oncegate.gateway.settling:settle"),
    "store": ("before", *_of_each_store("store")),
    "stored": ("after", *_of_each_store("store")),
    "tell": ("before", "oncegate.gateway.exchange:note_settlement"),
    "settled": ("before", "oncegate.gateway.exchange:Exchange._conclude"),
    "end": ("before", "oncegate.gateway.exchange:Exchange._deliver"),
    "ended": ("after", "oncegate.gateway.exchange:Exchange._deliver"),
    "leave": ("before", "oncegate.gateway.exchange:clean_up"),
    "left": ("after", "oncegate.gateway.exchange:clean_up"),
    "renew": ("before", *_of_each_store("renew")),
    "cancel": ("before", "oncegate.gateway.exchange:Exchange.cancel"),
    "cancelled": ("after", "oncegate.gateway.exchange:Exchange.cancel"),
    "wait": ("before", "oncegate.store.waiters:Waiters.wait"),
    "woken": ("after", "oncegate.store.waiters:Waiters.wait"),
    "replay": ("before", "oncegate.gateway.duplicates:replay_small", "oncegate.gateway.duplicates:replay_large"),
    "read": ("after", *_of_each_store("read")),
    "replayed": ("after", "oncegate.gateway.duplicates:replay_small", "oncegate.gateway.duplicates:replay_large"),
}
_FORM = re.compile(r"(?P<kind>kill|raise|pause)@(?P<point>\w+):(?P<nth>\d+)(?::(?P<pause_ms>\d+))?")


class Fault(NamedTuple):
    """A fault of `kind` (kill, raise or pause) when `point` is passed for the `nth` time.

    A pause of 0 ms lasts until SIGCONT.
    """

    kind: str
    point: str
    nth: int
    pause_ms: int

    def __str__(self) -> str:
        """Return the fault as a setting writes it, such as `pause@sent:3:1200`."""
        return f"{self.kind}@{self.point}:{self.nth}" + (f":{self.pause_ms}" if self.pause_ms else "")


class Injected(Exception):
    """The failure that a fault of kind `raise` causes."""


def parse_fault(text: str) -> Fault:
    """Return the fault that `kind@point:n` or `pause@point:n:ms` describes. Raises ValueError for any other text."""
    match = _FORM.fullmatch(text)
    if match is None or (match["pause_ms"] and match["kind"] != "pause"):
        raise ValueError("must be kill@point:n, raise@point:n, pause@point:n or pause@point:n:ms")
    if match["point"] not in POINTS:
        raise ValueError(f"has an unknown point; the points are {', '.join(POINTS)}")
    return Fault(match["kind"], match["point"], int(match["nth"]), int(match["pause_ms"] or 0))


def install(faults: Iterable[Fault], log: Callable[..., None]) -> None:
    """Wrap the steps of these faults, for the life of this process. `log(event, **fields)` precedes each fault."""
    for fault in faults:
        # One counter for all functions of the step: the nth passage counts, whichever of them it takes.
        when, *places = POINTS[fault.point]
        pass_point = _counter(fault, log)
        for place in places:
            # The driver of a store that is not in use may not be installed.
            with suppress(ModuleNotFoundError):
                owner, name = _resolve(place)
                setattr(owner, name, _wrapped(getattr(owner, name), when, pass_point))


def _resolve(place: str) -> tuple[Any, str]:
    """Return the object that holds the function `module:path.name`, and the function's name in it."""
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _counter(fault: Fault, log: Callable[..., None]) -> Callable[[], None]:
    """Return a function that counts the passages of a point and triggers the fault at the nth."""
    passages = 0

    def pass_point() -> None:
        nonlocal passages
        passages += 1
        if passages == fault.nth:
            # Logged first: after some faults this process does not write any more.
            log("fault injected", fault=str(fault))
            _trigger(fault)

    return pass_point


def _trigger(fault: Fault) -> None:
    match fault.kind:
        case "kill":
            # SIGKILL: no handler and no `finally` of this process runs any more.
            os.kill(os.getpid(), signal.SIGKILL)
        case "pause" if fault.pause_ms:
            # Blocks the event loop, and so the renewal of leases as well.
            time.sleep(fault.pause_ms / 1000)
        case "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        case _:
            raise Injected(str(fault))


def _wrapped(step: Callable[..., Any], when: str, pass_point: Callable[[], None]) -> Callable[..., Any]:
    """Return `step` with a call of `pass_point` before it, or after its result is there."""

    async def pass_afterwards(result: Any) -> Any:
        result = await result
        pass_point()
        return result

    def wrapped(*args: Any, **options: Any) -> Any:
        if when == "before":
            pass_point()
            return step(*args, **options)
        result = step(*args, **options)
        # A step may be a coroutine function, or return a future: it is over when that is done.
        if inspect.isawaitable(result):
            return pass_afterwards(result)
        pass_point()
        return result

    return wrapped
