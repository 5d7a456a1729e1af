"""The scenarios, and one measurement of a contender in one of them."""

import http.client
import os
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from loadtest.bench import contenders, wrk
from loadtest.bench.contenders import Running, Site
from loadtest.bench.machine import busy_s

WARM_S = 1
SETTLE_S = 0.2  # what was asked last is stored, and a held request has been claimed


class Scenario(NamedTuple):
    """One kind of request. `mode`: how requests differ. `refused`: every response is rightly a 4xx."""

    name: str
    contenders: tuple[str, ...]
    mode: str = "same"
    refused: bool = False
    connections: tuple[int, ...] = (1, 32, 256)


KEYED, RESTS, AGAINST = tuple(contenders.KEYED), tuple(contenders.RESTS), tuple(contenders.AGAINST)
TRACED = tuple(contenders.TRACED)
PAIRED = ("nginx+lua", "no-rest", *AGAINST)  # what the goals compare
SCENARIOS = {
    one.name: one
    for one in (
        Scenario("execution", (*KEYED, *RESTS, *TRACED, *AGAINST, "direct"), mode="unique"),
        # Executions whose heads differ in more than the key, each by a kind of heads.lua.
        Scenario("payment", ("oncegate", "obvious", *PAIRED), mode="payment", connections=(32,)),
        Scenario("llm", ("oncegate", "obvious", *PAIRED), mode="llm", connections=(32,)),
        Scenario("fresh", ("oncegate", *PAIRED), mode="fresh", connections=(32,)),
        *(Scenario(kind, PAIRED, mode=kind, connections=(32,)) for kind in ("traces", "apps", "tenants", "mixed")),
        Scenario("replay", (*KEYED, "no-rest", *AGAINST), connections=(32, 256)),
        Scenario("409", KEYED, refused=True, connections=(32,)),
        Scenario("pass-through", ("oncegate", *RESTS, *AGAINST, "nginx", "aiohttp", "direct"), connections=(32, 256)),
    )
}


class Run(NamedTuple):
    """One measurement. `sound`: every response was right; `load1` is the machine's load average."""

    round: int
    scenario: str
    connections: int
    contender: str
    rate: float
    cpu_us: float
    p50_ms: float
    p99_ms: float
    other_busy: float
    load1: float
    sound: bool


def rounds(
    site: Site, names: list[str], scenarios: list[str], connections: list[int], seconds: int, count: int
) -> Iterator[Run]:
    """Measure everything `count` times. Each round starts every contender anew, in another order.

    Without `connections`, each scenario has its own numbers of them.
    """
    for number in range(count):
        asked = {name: [SCENARIOS[one] for one in scenarios if name in SCENARIOS[one].contenders] for name in names}
        present = [name for name in contenders.in_turns(names, number) if asked[name]]
        with contenders.side_by_side(site, present) as pairs:
            for name, (running, _) in pairs.items():
                warm(site, running)
                for scenario in asked[name]:
                    for many in connections or scenario.connections:
                        yield measure(site, running, scenario, name, many, seconds, number)


def warm(site: Site, running: Running) -> None:
    """Execute charges for a second."""
    cores = site.cores.other
    wrk.run(running.port, "/v1/charges", new_key(), mode="unique", seconds=WARM_S, connections=8, cores=cores)


def measure(
    site: Site, running: Running, scenario: Scenario, name: str, connections: int, seconds: int, number: int
) -> Run:
    """Put load on a running contender."""
    key = "" if scenario.name == "pass-through" else new_key()
    path = f"/hold?s={seconds + 1}" if scenario.refused else "/v1/charges"
    with _prepared(running, scenario, path, key):
        cpu_s, other_s = running.process.cpu_s(), busy_s(site.cores.other)
        load = wrk.run(
            running.port,
            path,
            key,
            mode=scenario.mode,
            seconds=seconds,
            connections=connections,
            cores=site.cores.other,
        )
        cpu_s, other_s = running.process.cpu_s() - cpu_s, busy_s(site.cores.other) - other_s
    right = load.refused == (load.requests if scenario.refused else 0)
    return Run(
        number, scenario.name, connections, name,
        rate=load.requests / load.seconds,
        cpu_us=cpu_s / max(1, load.requests) * 1e6,
        p50_ms=load.p50_s * 1e3,
        p99_ms=load.p99_s * 1e3,
        other_busy=other_s / load.seconds,
        load1=os.getloadavg()[0],
        sound=right and not load.broken and load.requests > 0,
    )  # fmt: skip


@contextmanager
def _prepared(running: Running, scenario: Scenario, path: str, key: str) -> Iterator[None]:
    """Bring the key into the state of the scenario: complete, or in flight until the end."""
    if scenario.refused:
        with socket.create_connection(("127.0.0.1", running.port)) as holding:
            holding.sendall(request_bytes(path, key))
            time.sleep(SETTLE_S)
            yield
        return
    if scenario.mode == "many":
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda number: ask(running.port, path, f"{key}-{number}"), range(1, wrk.MANY + 1)))
    elif scenario.name == "replay":
        ask(running.port, path, key)
        time.sleep(SETTLE_S)
    yield


def ask(port: int, path: str, key: str) -> tuple[int, list[tuple[str, str]], bytes]:
    """Send one charge; return status, headers and body of the response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, wrk.CHARGE, _fields(key))
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.getheaders(), body


def ask_many(port: int, count: int) -> None:
    """Execute so many charges one after the other on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(count):
        connection.request("POST", "/v1/charges", wrk.CHARGE, _fields(new_key()))
        connection.getresponse().read()
    connection.close()


def request_bytes(path: str, key: str) -> bytes:
    """Return the exact request that the load sends."""
    lines = [f"POST {path} HTTP/1.1", "Host: bench", *(f"{name}: {value}" for name, value in _fields(key).items())]
    return "\r\n".join([*lines, f"Content-Length: {len(wrk.CHARGE)}", "", ""]).encode() + wrk.CHARGE


def _fields(key: str) -> dict[str, str]:
    fields = {"Content-Type": "application/json", "Authorization": wrk.AUTHORIZATION}
    return fields | ({"Idempotency-Key": key} if key else {})


def new_key() -> str:
    """Return a key that was never used."""
    return f"bench-{uuid.uuid4().hex}"
