"""What the index of open keys costs a Redis: the claim and the settlement of an execution, with and without it."""

import os
import socket
from pathlib import Path
from statistics import median
from typing import Any

import hiredis

from loadtest.bench import contenders
from loadtest.bench.contenders import Running, Site, in_turns
from loadtest.bench.table import Figure
from oncegate.server.embedded import find_server
from oncegate.store.record import Claim, StoredResponse, self_check
from oncegate.store.record_name import store_key
from oncegate.store.redis import arguments
from oncegate.store.redis.server import load_scripts
from oncegate.store.redis.wire import Script, listed, resp

# Calls that leave in one write, as those of concurrent requests do; and keys that stay open meanwhile.
BATCH, OPEN = 8, 1_000
LEASE_MS, DAY_MS = 30_000, 86_400_000
NO_DEADLINE = b"$15\r\n" + b"9" * 15
BODY = b'{"id": 1}' * 12
WITH, WITHOUT = "with", "without"


def open_index(site: Site, quick: bool) -> list[Figure]:
    """The CPU time of a packed execution in Debian's Redis and in the embedded store's Valkey."""
    return [
        _one_server(site, server, program, 2_000 if quick else 20_000, 3 if quick else 9)
        for server, program in (("Redis", None), ("Valkey", find_server()))
    ]


def _one_server(site: Site, server: str, program: Path | None, executions: int, takes: int) -> Figure:
    stores = {name: contenders.open_redis(site.cores, program) for name in (WITH, WITHOUT)}
    found: dict[str, list[float]] = {name: [] for name in stores}
    try:
        clients = {name: Client(store.port, indexes=name == WITH) for name, store in stores.items()}
        for client in clients.values():
            client.execute(OPEN, settles=False)
            client.execute(executions // 10)
        for take in range(takes):
            for name in in_turns([*stores], take):
                found[name].append(_execution_us(stores[name], clients[name], executions))
    finally:
        for store in stores.values():
            store.process.stop()
    both = median(found[WITH]), median(found[WITHOUT])
    note = f"{both[0]:.1f} and {both[1]:.1f} us"
    return Figure(
        f"CPU of {server} for an execution, with the index of without", both[0] / both[1], "x", None, note=note
    )


def _execution_us(store: Running, client: "Client", executions: int) -> float:
    before_s = store.process.cpu_s()
    client.execute(executions)
    return (store.process.cpu_s() - before_s) * 1e6 / executions


class Client:
    """Calls the scripts of claims and settlements over a plain socket."""

    def __init__(self, port: int, *, indexes: bool) -> None:
        self._scripts = load_scripts(indexes=indexes)
        self._socket, self._replies = socket.create_connection(("127.0.0.1", port), 60), hiredis.Reader()
        for script in self._scripts.values():
            self._call([b"*3\r\n" + resp("SCRIPT", "LOAD", script.body)])

    def execute(self, count: int, *, settles: bool = True) -> None:
        """Claim so many new keys and store a small response for each."""
        for _ in range(count // BATCH):
            claims = [_new_claim() for _ in range(BATCH)]
            claim_script, settle_script = self._scripts["claim"], self._scripts["settle"]
            calls = [_framed(claim_script, one, arguments.CLAIM_COUNT, _claim(one)) for one in claims]
            for one, reply in zip(claims, self._call(calls), strict=True):
                if reply[1] != b"claimed":
                    raise RuntimeError(f"not claimed: {reply}")
                one.fence, one.created_ms = reply[3], int(reply[4])
            if settles:
                calls = [_framed(settle_script, one, arguments.PUT_COUNT, _put(one)) for one in claims]
                if wrong := [reply for reply in self._call(calls) if reply[1] != b"stored"]:
                    raise RuntimeError(f"not stored: {wrong[0]}")

    def _call(self, calls: list[bytes]) -> list[list[Any]]:
        """Send some commands in one write, and return their replies."""
        self._socket.sendall(b"".join(calls))
        replies: list[list[Any]] = []
        while len(replies) < len(calls):
            self._replies.feed(self._socket.recv(65536))
            while (reply := self._replies.gets()) is not False:
                replies.append(listed(reply))
        return replies


def _framed(script: Script, claim: Claim, count: int, args: bytes) -> bytes:
    return script.by_sha[count] + resp(store_key(claim.key), "0001") + args


def _new_claim() -> Claim:
    key, token, digest = os.urandom(24), os.urandom(16), os.urandom(16)
    check = self_check(key, digest, token, b"hold", digest)
    return Claim(key, token, b"", b"hold", digest, check, 0, LEASE_MS, DAY_MS, 90 * DAY_MS)


def _claim(claim: Claim) -> bytes:
    return arguments.claim_head(claim) + NO_DEADLINE + arguments.FIRST_TAIL[True]


def _put(claim: Claim) -> bytes:
    block, ended_ms = b"Content-Type: application/json\r\n", claim.created_ms + 5
    response = StoredResponse(201, b"Created", block, os.urandom(16), 1, len(BODY), True, False, True, ended_ms, 5, 0)
    args = arguments.put(claim, response, BODY)
    assert args is not None
    return args
