"""What the clients and the upstream of a run make of bytes: a verdict is worth no more than that."""

import pytest

from loadtest.chaos.plan import ANSWERS, RECEIVERS, TENANTS, Operation, answer_kind, identification, operation, request
from loadtest.chaos.upstream import Request
from loadtest.chaos.wire import Answer

HEAD = b"HTTP/1.1 200 Fine\r\nX-Execution: u0.1\r\nX-Echo: ant k 0\r\nOncegate-Status: executed\r\n"
PROBLEM = b'{"type": "urn:oncegate:in-flight"}'
WHOLE = {
    "length": HEAD + b"Content-Length: 5\r\n\r\nhello",
    "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 5\r\n\r\nhello",
    "closing": HEAD + b"\r\nhello",
}


def read(raw: bytes, step: int) -> Answer:
    answer = Answer()
    for at in range(0, len(raw), step):
        answer.feed(raw[at : at + step])
    return answer


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("framing", WHOLE)
def test_an_answer_is_read_by_its_framing(framing: str, step: int) -> None:
    """However it is cut into pieces, its body and its digest are the same; the end is seen where it is, not before."""
    answer = read(WHOLE[framing], step)
    assert answer.whole == (framing != "closing")
    answer.end()
    assert answer.whole
    got = answer.got("whole")
    assert (bytes(answer.body), got.status, got.word, got.execution, got.echo) == (
        b"hello", 200, "executed", "u0.1", "ant k 0",
    )  # fmt: skip
    assert got.digest == read(WHOLE["length"], 1000).got("whole").digest


@pytest.mark.parametrize("framing", ["length", "chunks", "interim"])
def test_a_cut_answer_is_not_whole(framing: str) -> None:
    """Wherever it ends before its end, cleanly or not."""
    for size in range(len(WHOLE[framing])):
        answer = read(WHOLE[framing][:size], 1000)
        answer.end()
        assert not answer.whole


@pytest.mark.parametrize("change", [(b"Fine", b"fine"), (b"u0.1", b"u0.2"), (b"hello", b"hellO")])
def test_every_byte_of_the_truth_counts(change: tuple[bytes, bytes]) -> None:
    """Reason, fields and body are compared; what the proxy adds by contract is not."""
    raw = WHOLE["length"]
    digest = read(raw, 1000).got("whole").digest
    assert read(raw.replace(*change), 1000).got("whole").digest != digest
    ids = b"X-Request-Id: 1\r\nOncegate-Request-Id: 2\r\nOncegate-Key-Id: k"
    replayed = raw.replace(b"executed", b"replayed\r\nIdempotent-Replayed: true\r\nAge: 3\r\n" + ids)
    assert read(replayed, 1000).got("whole").digest == digest


def test_a_problem_is_known_by_its_type() -> None:
    raw = b"HTTP/1.1 409 Conflict\r\nContent-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n" % len(
        PROBLEM
    )
    assert read(raw + PROBLEM, 1000).got("whole").slug == "in-flight"


@pytest.mark.parametrize("who", [*TENANTS, *RECEIVERS])
def test_the_upstream_knows_who_asked(who: str) -> None:
    """By each way in which a tenant is told apart, and by none of another's."""
    raw = request(Operation(who, "1-2-3"), 0)
    assert Request(raw).consistent()
    for other in (*TENANTS, *RECEIVERS):
        mine, theirs = identification(who, b"1-2-3"), identification(other, b"1-2-3")
        says_the_same = set(mine.split(b"\r\n")) <= set(theirs.split(b"\r\n"))
        assert Request(raw.replace(mine, theirs)).consistent() == says_the_same


@pytest.mark.parametrize("variant", [0, 1, 2, 3])
def test_the_upstream_knows_what_it_was_asked(variant: int) -> None:
    """Whole, it tells tenant, key and variant; the requests of two operations are not mixed up."""
    raw = request(Operation("ant", "1-2-3"), variant)
    asked = Request(raw)
    assert (asked.tenant, asked.key, asked.variant, asked.size) == ("ant", "1-2-3", str(variant), len(raw))
    assert asked.consistent()
    assert not Request(raw.replace(b"Bearer ant", b"Bearer bee")).consistent()
    assert not Request(raw.replace(b":1-2-3:", b":1-2-4:")).consistent()


def test_of_a_part_it_knows_what_is_there() -> None:
    """A key that may not be whole is no key."""
    raw = request(Operation("ant", "1-2-3"), 0)
    named = raw.index(b" HTTP/1.1")
    for size in range(1, len(raw)):
        part = Request(raw[:size])
        assert part.key == ("1-2-3" if size > named else "?")
        assert part.variant == "?"
        assert part.likely_variant == "0"


def test_the_seed_decides() -> None:
    """The same seed asks and answers the same, in every process; another one does not."""
    assert operation(1, 0, 5) == operation(1, 0, 5)
    assert [operation(1, 0, n) for n in range(20)] != [operation(2, 0, n) for n in range(20)]
    kinds = {answer_kind(1, "ant", str(n), 1) for n in range(20_000)}
    assert kinds == {*ANSWERS, "small"}
