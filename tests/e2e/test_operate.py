"""`oncegate keys`: operators list, show, resolve and release keys, against owners that live, sleep or race."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from oncegate.commands.cli import main
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Proxy,
    RawClient,
    Received,
    Tap,
    answering,
    ask,
    chunk,
    holding,
    request,
    rest,
    until,
)
from tests.probes import fields_of

CANARY = "c4n4ry-key"
BAD = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"
TOKEN = "Authorization: Bearer t0p-s3cret"


class Desk:
    """`oncegate keys` with the settings of the proxies on a store."""

    def __init__(self, store_url: str, cwd: Path, **settings: object) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
        settings = {"UPSTREAM": "http://127.0.0.1:9", "STORE_URL": store_url, **settings}
        self.env = env | {f"ONCEGATE_{name}": str(value) for name, value in settings.items()}
        self._cwd = cwd

    async def __call__(self, *words: str, stdin: str = "", code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run one command in this process: starting Python takes longer than everything else."""
        return await self.run("keys", *words, stdin=stdin, code=code)

    async def check(self, *words: str) -> subprocess.CompletedProcess[str]:
        return await self.run("check", *words)

    async def run(self, *words: str, stdin: str = "", code: int | None = 0) -> subprocess.CompletedProcess[str]:
        told = await asyncio.to_thread(self._run, words, stdin)
        assert code in (told.returncode, None), told
        return told

    def _run(self, words: tuple[str, ...], stdin: str) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        with (
            patch.dict(os.environ, self.env, clear=True), patch.object(sys, "stdin", given),
            redirect_stdout(out), redirect_stderr(err), chdir(self._cwd),
        ):  # fmt: skip
            code = main(list(words))
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    async def show(self, *words: str, stdin: str = "") -> dict:
        return json.loads((await self("show", "--json", *words, stdin=stdin)).stdout)

    async def listed(self, *words: str) -> list[dict]:
        return [json.loads(line) for line in (await self("list", "--json", *words)).stdout.splitlines()]


def audit(told: subprocess.CompletedProcess[str]) -> dict:
    [line] = [json.loads(line) for line in told.stderr.splitlines() if line.startswith("{")]
    assert line["event"] == "audit"
    assert {"action", "outcome", "key_id", "state_before", "owner_token", "user", "host", "timestamp"} <= line.keys()
    assert CANARY not in told.stderr
    return line


@pytest.fixture
async def gate(fork, upstream, stored) -> Proxy:
    return await fork(upstream, stored.url)


@pytest.fixture
def desk(stored, tmp_path) -> Desk:
    return Desk(stored.url, tmp_path)


async def make_unknown(proxy: Proxy, upstream, key: str = CANARY, *extra: str) -> None:
    upstream.script = answering(BAD)
    raw = request("POST", "/v1/charges", key, b"{}", *extra)
    assert (await ask(proxy.port, raw)).header("oncegate-status") == b"unknown"
    upstream.script = answering(OK)


async def test_an_unknown_key_gets_its_answer(gate, upstream, desk, tmp_path):
    """`list` and `show` explain an unknown key. After `resolve` retries replay the response, and nothing is sent."""
    await make_unknown(gate, upstream)
    for n in range(20):
        assert (await ask(gate.port, request(key=f"other-{n}"))).status == 200
    [listed] = await desk.listed()
    seen = await desk.show(CANARY)
    assert listed | {"age_s": 0, "owner_reported_s_ago": 0} == seen | {"age_s": 0, "owner_reported_s_ago": 0}
    assert (seen["state"], seen["owner_may_live"], seen["mode"]) == ("unknown", False, "hold")
    assert (seen["reason"], seen["response_status"]) == ("status 502 came", 502)
    assert f"pid {gate.process.pid}" in seen["owner"]
    body = tmp_path / "answer.json"
    body.write_bytes(b'{"id": "ch_1"}')
    told = await desk(
        "resolve", CANARY, "--status", "201", "--body-file", str(body),
        "-H", "Content-Type: application/json", "-H", "X-Twice: 1", "-H", "X-Twice: 2",
    )  # fmt: skip
    line = audit(told)
    assert (line["action"], line["outcome"]) == ("resolve", "resolved")
    assert (line["state_before"], line["status"]) == ("unknown", 201)
    assert line["key_id"] == listed["id"]
    for _ in range(2):
        answer = await ask(gate.port, request("POST", "/v1/charges", CANARY, b"{}"))
        assert (answer.status, answer.reason, answer.body) == (201, b"Created", b'{"id": "ch_1"}')
        assert answer.header("oncegate-status") == b"replayed"
        assert answer.header("content-type") == b"application/json"
        assert [value for name, value in answer.headers if name == b"X-Twice"] == [b"1", b"2"]
    other = await ask(gate.port, request("POST", "/v1/charges", CANARY, b"other"))
    assert other.slug == "key-reused"
    assert await desk.listed() == []
    complete = await desk.show(CANARY)
    assert (complete["state"], complete["status"], complete["bytes"]) == ("complete", 201, 14)
    assert complete["owner"].startswith(f"operator {line['user']} on {line['host']}")
    assert len(upstream.received) == 21
    told = await desk("resolve", CANARY, "--status", "200", code=1)
    assert "complete" in told.stderr
    told = await desk("resolve", CANARY, "--status", "200", "--body-file", "none", code=2)
    assert told.stderr == "none: No such file or directory\n"


async def test_an_operators_answer_is_kept_as_long_as_the_apis(fork, upstream, stored, tmp_path):
    """Its rule says how long: a retry that comes as late as a rule allows for must not execute.

    Without the rule, as on a machine that lacks the file, it is kept for no less.
    """
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "slow"\npath = "/v1/charges"\nretention_s = 172800\ntombstone_s = 432000\n')
    gate = await fork(upstream, stored.url, RULES_FILE=rules)
    await make_unknown(gate, upstream)
    [key] = stored.keys()
    desk = Desk(stored.url, tmp_path, RULES_FILE=rules)
    await desk("resolve", CANARY, "--status", "201")
    day_ms = 86_400_000
    assert 6.9 * day_ms < stored.left_ms(key) <= 7 * day_ms
    assert 1.9 * day_ms < int(stored.fields(key)["until"]) - stored.now_ms() <= 2 * day_ms
    stored.remove(key)
    await make_unknown(gate, upstream)
    unknown_ms = stored.left_ms(key)
    assert unknown_ms > 6.9 * day_ms
    await Desk(stored.url, tmp_path)("resolve", CANARY, "--status", "201")
    assert stored.left_ms(key) > unknown_ms - 60_000


async def test_an_unknown_key_is_released(gate, upstream, desk):
    """A released key is listed as released. The next request with it executes, with any content."""
    await make_unknown(gate, upstream)
    line = audit(await desk("release", CANARY))
    assert (line["action"], line["outcome"]) == ("release", "released")
    assert [one["id"] for one in await desk.listed("--state", "released")] == [line["key_id"]]
    assert (await desk.show(CANARY))["owner"].startswith("operator ")
    assert "released" in (await desk("release", CANARY, code=1)).stderr
    answer = await ask(gate.port, request(key=CANARY, body=b"another"))
    assert (answer.status, answer.header("oncegate-status")) == (200, b"executed")
    assert "complete" in (await desk("release", CANARY, code=1)).stderr
    assert gate.metric("claims_lost_total") == 0


async def test_whose_key_it_is(gate, upstream, desk):
    """A credential on standard input, a scope's digest, or an id or its beginning selects the record."""
    await make_unknown(gate, upstream, CANARY, TOKEN)
    [listed] = await desk.listed()
    by_credential = await desk.show(CANARY, "--credential", stdin=TOKEN + "\n")
    assert by_credential["id"] == listed["id"]
    assert (await desk.show(CANARY, "--scope", listed["scope"]))["id"] == listed["id"]
    assert (await desk.show("--id", listed["id"]))["id"] == listed["id"]
    [line] = [line for line in gate.events("request") if line["outcome"] == "unknown"]
    assert (await desk.show("--id", line["key_id"]))["id"] == listed["id"]
    assert "no record" in (await desk("show", CANARY, code=1)).stderr
    # An id that was copied from the list is well-formed as a key.
    assert "--id" in (await desk("show", listed["id"], code=1)).stderr
    assert (
        "no record" in (await desk("show", CANARY, "--credential", stdin="Authorization: Bearer other", code=1)).stderr
    )
    for words, stdin in [
        ((CANARY, "--credential"), "X-Other: 1"),
        ((CANARY, "--credential"), "Authorization: Digest x"),
        ((CANARY, "--scope", "abc"), ""),
        (("two words",), ""),
        ((), ""),
        (("--id", "*"), ""),
    ]:
        await desk("show", *words, stdin=stdin, code=2)


async def test_settings_that_are_not_the_proxies(gate, upstream, stored, tmp_path):
    """With settings that compute other digests, the command says so, instead of `no record`."""
    await make_unknown(gate, upstream)
    told = await Desk(stored.url, tmp_path, SECRET="another proxy's secret")("show", CANARY, code=1)
    assert "other settings" in told.stderr


@pytest.mark.fault(33)
@pytest.mark.parametrize("how", ["resolve", "release"])
async def test_an_owner_that_wakes_up_is_fenced(fork, upstream, stored, tmp_path, how):
    """An owner that wakes up after the decision serves the decision or a problem, never its own response."""
    desk = Desk(stored.url, tmp_path)
    tap = Tap()
    upstream.script = tap.script
    owner, other = [await fork(upstream, stored.url, LEASE_MS=600) for _ in range(2)]
    original = asyncio.ensure_future(ask(owner.port, request(key=CANARY)))
    await until(lambda: upstream.received)
    [seen] = await desk.listed("--state", "in_flight")
    assert (seen["state"], seen["owner_may_live"]) == ("in_flight", True)
    await until(lambda: any(fields.get("stage") == b"sent" for fields in stored.records().values()))
    owner.signal(signal.SIGSTOP)
    while (seen := await desk.show(CANARY))["state"] != "unknown":
        await asyncio.sleep(0.1)
    assert (seen["reason"], seen["owner_may_live"]) == ("its owner stopped renewing its lease", True)
    assert seen["progress"].startswith("the request was being sent, or sent")
    assert f"pid {owner.process.pid}" in seen["owner"]
    if how == "resolve":
        await desk("resolve", CANARY, "--status", "202")
    else:
        told = await desk("release", CANARY, code=1)
        assert "may still live" in told.stderr
        assert "{" not in told.stderr  # nothing was tried
        await desk("release", CANARY, "--yes")
        upstream.script = answering(OK.replace(b"ok", b"no"))
        assert (await ask(other.port, request(key=CANARY))).body == b"no"
    tap.end(OK)
    owner.signal(signal.SIGCONT)
    answer = await original
    assert answer.header("oncegate-status") == b"replayed"
    assert (answer.status, answer.body) == ((202, b"") if how == "resolve" else (200, b"no"))
    assert owner.metric("claims_lost_total") == 1
    again = await ask(other.port, request(key=CANARY))
    assert (again.status, again.body) == (answer.status, answer.body)
    assert len(upstream.received) == (1 if how == "resolve" else 2)


async def test_an_owner_of_a_released_key_that_nobody_took(fork, upstream, stored, tmp_path):
    """After a release the owner's response is neither stored nor delivered: its client gets outcome-unknown."""
    desk = Desk(stored.url, tmp_path)
    go = asyncio.Event()
    upstream.script = holding(go)
    owner = await fork(upstream, stored.url, LEASE_MS=600)
    original = asyncio.ensure_future(ask(owner.port, request(key=CANARY)))
    await until(lambda: upstream.received)
    owner.signal(signal.SIGSTOP)
    await desk("release", CANARY, "--yes")
    go.set()
    owner.signal(signal.SIGCONT)
    answer = await original
    assert (answer.status, answer.slug) == (409, "outcome-unknown")
    assert stored.states() == [b"released"]


async def test_an_owner_that_knows_it_was_fenced_sends_nothing(fork, upstream, stored, tmp_path):
    """It waits for a connection while its key is released, and executed by another: it must not be sent as well."""
    desk, busy = Desk(stored.url, tmp_path), Tap()
    upstream.script = busy.script
    owner = await fork(upstream, stored.url, LEASE_MS=3000, MAX_UPSTREAM_CONNECTIONS=1)
    other = await fork(upstream, stored.url, LEASE_MS=3000)
    first = asyncio.ensure_future(ask(owner.port, request(key="another")))
    await until(lambda: upstream.received)
    original = asyncio.ensure_future(ask(owner.port, request(key=CANARY)))
    await until(lambda: len(stored.records()) == 2)
    await desk("release", CANARY, "--yes")
    upstream.script = answering(OK)
    assert (await ask(other.port, request(key=CANARY))).header("oncegate-status") == b"executed"
    await until(lambda: owner.events("claim fenced"))
    busy.end(OK)
    assert (await first).status == 200
    assert (await original).header("oncegate-status") == b"replayed"
    assert len(upstream.received) == 2


@pytest.mark.fault(47)
async def test_an_answer_under_way_is_broken_off(fork, upstream, stored, tmp_path):
    """If the operator resolves while the owner streams, its client sees no clean end, and retries get the decision."""
    desk = Desk(stored.url, tmp_path)
    tap = Tap()
    upstream.script = tap.script
    owner = await fork(upstream, stored.url, LEASE_MS=60_000)
    original = asyncio.ensure_future(ask(owner.port, request(key=CANARY)))
    tap.send(CHUNKED, chunk(bytes(100_000)))
    await until(lambda: any("b0" in fields for fields in stored.records().values()))
    seen = await desk.show(CANARY)
    assert seen["bytes_stored"] == 100_000
    assert "your response would replace" in (await desk("resolve", CANARY, "--status", "200", code=1)).stderr
    await desk("resolve", CANARY, "--status", "200", "--yes")
    tap.end(chunk(bytes(100_000)), LAST_CHUNK)
    assert not (await original).complete
    answer = await ask(owner.port, request(key=CANARY))
    assert (answer.status, answer.body, answer.header("content-length")) == (200, b"", b"0")


@pytest.mark.fault(47)
@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "is silent"])
async def test_a_stream_ends_when_its_key_is_released(fork, upstream, stored, tmp_path, goes_on):
    """A renewal of the lease finds it, also where the upstream says nothing more: nobody waits for the silence limit.

    The client gets no clean end, and the upstream's connection is closed.
    """
    desk = Desk(stored.url, tmp_path)
    left = asyncio.Event()

    async def script(_, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, __: Received) -> None:
        writer.write(CHUNKED + chunk(b"some"))
        ended = asyncio.ensure_future(reader.read())
        while not ended.done():
            await asyncio.wait([ended], timeout=0.025 if goes_on else None)
            writer.write(chunk(b"more"))
        writer.close()
        left.set()

    upstream.script = script
    owner = await fork(upstream, stored.url, LEASE_MS=600)
    client = await RawClient.open(owner.port)
    client.writer.write(request(key=CANARY))
    await client.reader.readuntil(b"some")
    await desk("release", CANARY, "--yes")
    async with asyncio.timeout(20):
        assert not (await rest(client)).endswith(LAST_CHUNK)
        await left.wait()
    client.close()
    assert len(owner.events("claim fenced")) == 1
    assert stored.states() == [b"released"]


@pytest.mark.fault(49)
async def test_a_decision_that_races_with_a_settle(fork, upstream, stored, tmp_path):
    """When a response and a decision arrive together, the first one is final for all clients."""
    proxy = await fork(upstream, stored.url)
    desk = Desk(stored.url, tmp_path)
    won, pause_s = set(), 0.05
    for n in range(12):
        tap = Tap()
        upstream.script = tap.script
        original = asyncio.ensure_future(ask(proxy.port, request(key=f"key-{n}")))
        await until(lambda: len(upstream.received) == n + 1)  # noqa: B023 - asked before the next round
        act = asyncio.ensure_future(desk("resolve", f"key-{n}", "--status", "202", "--yes", code=None))
        await asyncio.sleep(pause_s)
        tap.end(OK)
        (first, told) = await asyncio.gather(original, act)
        later = await ask(proxy.port, request(key=f"key-{n}"))
        assert later.header("oncegate-status") == b"replayed"
        assert (later.status, later.body) == (first.status, first.body)
        assert later.status == (202 if told.returncode == 0 else 200)
        won.add(later.status)
        # Closer to where they meet, which depends on the machine.
        pause_s *= 0.7 if later.status == 202 else 1.5
    assert won == {200, 202}
    assert len(upstream.received) == 12


async def test_a_lost_record_is_not_resolved(gate, upstream, stored, desk):
    """A missing or damaged record cannot be resolved; a damaged one can be released."""
    await make_unknown(gate, upstream)
    [key] = stored.keys()
    stored.change(key, fingerprint=b"x" * 16)
    assert (await ask(gate.port, request("POST", "/v1/charges", CANARY, b"{}"))).slug == "record-corrupt"
    assert (await desk.show(CANARY))["state"] == "corrupt"
    assert "corrupt" in (await desk("resolve", CANARY, "--status", "200", code=1)).stderr
    await desk("release", CANARY, code=1)
    await desk("release", CANARY, "--yes")
    assert (await ask(gate.port, request("POST", "/v1/charges", CANARY, b"{}"))).status == 200


async def test_listing_many_keys_keeps_nobody_waiting(fork, upstream, valkey, tmp_path):
    """`list` reads page by page: it finds 3 unknown keys among 12,000 records without blocking the store."""
    gate, desk = await fork(upstream, valkey.url), Desk(valkey.url, tmp_path)
    for n in range(3):
        await make_unknown(gate, upstream, f"{CANARY}-{n}")
    with valkey.client() as client:
        [name, *_] = client.keys("once:{*")
        fields = fields_of(client, name)
        pipe = client.pipeline(transaction=False)
        for n in range(12_000):
            pipe.hset(b"once:{%032d}" % n, mapping={"meta": b"\x01" + bytes(200), "b0": b"x"})
            pipe.set(f"other:{n}", "x")
        pipe.hset("once:{short}", mapping=fields)
        pipe.set("once:{" + "x" * 32 + "}", "of another type")
        pipe.execute()
        client.config_set("slowlog-log-slower-than", 20_000)
        client.execute_command("SLOWLOG", "RESET")
        assert len(await desk.listed()) == 3
        slow = client.execute_command("SLOWLOG", "LEN")
        client.config_set("slowlog-log-slower-than", 10_000)
    assert slow <= 2  # others use this machine's cores as well
    assert len(await desk.listed("--limit", "2")) == 2
    text = await desk("list")
    assert len(text.stdout.splitlines()) == 3
    assert "3 keys in state unknown" in text.stderr


async def test_the_embedded_store_has_its_desk(proxies, upstream, tmp_path):
    """Without a store's URL the commands use the embedded store in the data folder, while the proxy runs.

    After that, the error says which folder was looked in, and what to do."""
    proxy = proxies(upstream)
    await make_unknown(proxy, upstream)
    desk = Desk("embedded", tmp_path, DATA_DIR=tmp_path / "data")
    assert (await desk.show(CANARY))["state"] == "unknown"
    assert proxy.stop() == 0
    error = (await desk("show", CANARY, code=1)).stderr
    assert "not reachable" in error
    assert f"the embedded store in {tmp_path / 'data'} runs while `oncegate serve` does" in error


async def test_a_confirmation_on_a_terminal(fork, upstream, stored, tmp_path):
    """On a terminal the command asks; any answer but yes changes nothing."""
    desk = Desk(stored.url, tmp_path)
    go = asyncio.Event()
    upstream.script = holding(go)
    proxy = await fork(upstream, stored.url)
    original = asyncio.ensure_future(ask(proxy.port, request(key=CANARY)))
    await until(lambda: upstream.received)
    for answer, state in [(b"n\n", b"in_flight"), (b"yes\n", b"released")]:
        ours, theirs = os.openpty()
        act = subprocess.Popen(
            [sys.executable, "-m", "oncegate", "keys", "release", CANARY], env=desk.env, cwd=tmp_path,
            stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        os.write(ours, answer)
        out, _ = await asyncio.to_thread(act.communicate, timeout=60)
        assert b"[y/N]" in out
        assert stored.states() == [state]
        for descriptor in (ours, theirs):
            os.close(descriptor)
    go.set()
    await original


async def test_an_operator_begins_a_quarantine(fork, upstream, stored, tmp_path):
    """After a loss that no proxy noticed: those that heed a quarantine refuse first-time keys, and replay others."""
    careless = await fork(upstream, stored.url)
    await until(lambda: careless.admin("/readyz")[0] == 200, 30)
    settings = {"ON_STORE_LOSS": "quarantine", "QUARANTINE_S": 60}
    careful, desk = await fork(upstream, stored.url, **settings), Desk(stored.url, tmp_path, **settings)
    assert (await ask(careful.port, request(key="known"))).status == 200
    told = await Desk(stored.url, tmp_path)("quarantine", "--yes", code=1)
    assert "ONCEGATE_ON_STORE_LOSS=quarantine" in told.stderr
    told = await desk("quarantine", code=1)
    assert "--yes" in told.stderr
    assert (await ask(careful.port, request(key="before"))).status == 200
    told = await desk("quarantine", "--yes")
    assert told.stdout == "first-time keys are refused for 60 s\n"
    await until(lambda: careful.metric("quarantine_seconds") > 0, 30)
    answers = [await ask(proxy.port, request(key=key)) for proxy, key in ((careful, "new"), (careful, "known"))]
    assert [answer.status for answer in answers] == [503, 200]
    assert answers[1].header("oncegate-status") == b"replayed"
    assert careful.metric('store_losses_total{kind="flushed"}') == 0
    assert (await ask(careless.port, request(key="new"))).status == 200
