"""Each execution tells the API which key it is of: `Oncegate-Execution: ID; fence=N`."""

import re
from contextlib import closing

import pytest

from tests.parts import OK, RawClient, RawUpstream, answering, ask, request

EXECUTION = re.compile(rb"([\w-]{32}); fence=([1-9]\d*)")
DECLINED = OK.replace(b"200 OK", b"429 Too Many Requests")


def executions(upstream: RawUpstream) -> list[tuple[bytes, int]]:
    """Return id and fence of each request that arrived; every one has them, once."""
    values = [received.header("oncegate-execution") for received in upstream.received]
    matches = [EXECUTION.fullmatch(*lines) for lines in values]
    return [(match[1], int(match[2])) for match in matches if match is not None]


@pytest.mark.parametrize("mode", ["hold", "retry"])
@pytest.mark.parametrize("body", [b"small", b"x" * 1_500_000], ids=["small", "spooled"])
async def test_it_has_the_id_that_operators_use(fork, upstream, valkey, mode, body):
    """In each mode, for known heads and large bodies: the name of the key's record, and the fence of its claim."""
    proxy = await fork(upstream, valkey.url, ON_UNKNOWN=mode)
    with closing(await RawClient.open(proxy.port)) as client:
        for number in range(4):
            answer = await client.ask(request(key=f"key-{number}", body=body))
            assert answer is not None
            assert answer.header("oncegate-status") == b"executed"
    found = executions(upstream)
    assert sorted(b"once:{%s}" % one for one, _ in found) == sorted(valkey.records())
    assert len(found) == len(dict(found)) == 4
    sent = [[int(one) for one in received.header("idempotency-fence")] for received in upstream.received]
    assert sent == ([[fence] for _, fence in found] if mode == "retry" else [[]] * 4)


async def test_the_id_stays_and_the_fence_grows(fork, upstream, valkey):
    """A key that executes again, because the API declined it, has its id and a higher fence."""
    proxy = await fork(upstream, valkey.url)
    for response in (DECLINED, DECLINED, OK):
        upstream.script = answering(response)
        await ask(proxy.port, request())
    ids, fences = zip(*executions(upstream), strict=True)
    assert len(set(ids)) == 1
    assert fences[0] < fences[1] < fences[2]


@pytest.mark.parametrize("key", ["key-1", None], ids=["guarded", "passed through"])
async def test_it_is_never_a_clients(fork, upstream, valkey, key):
    """A client's field of that name is dropped, in any case and number, and its look-alike refused."""
    proxy = await fork(upstream, valkey.url)
    claimed = f"{'A' * 32}; fence=9"
    extra = (f"Oncegate-Execution: {claimed}", f"ONCEGATE-execution: {claimed}")
    for method in ("POST", "GET"):
        assert (await ask(proxy.port, request(method, "/", key, b"", *extra))).status == 200
    values = [received.header("oncegate-execution") for received in upstream.received]
    assert [len(lines) for lines in values] == [1 if key else 0, 0]
    assert claimed.encode() not in values[0]
    assert (await ask(proxy.port, request("POST", "/", key, b"", f"Oncegate_Execution: {claimed}"))).status == 400
    assert len(upstream.received) == 2
