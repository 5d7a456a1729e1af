"""The points in the life of a keyed request at which something can break, each with a test that bears its number."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.parts import parsed

TESTS = Path(__file__).parent
DESIGN = (TESTS.parent / "DESIGN.md").read_text()

# What breaks, in the order of a request's life: `@pytest.mark.fault(number)` marks a test of it.
FAULTS = {
    # Before the claim
    1: "the client leaves while its request arrives",
    2: "the request's body is over the limit, or says so",
    3: "the key is missing, repeated or malformed",
    4: "the proxy is killed before the claim",
    5: "a limit of requests, waiters or memory is reached",
    # The claim
    6: "the store is down",
    7: "the store hangs",
    8: "the claim is made, its reply is lost",
    9: "the claim is made, its reply is lost, and the store stays away",
    10: "the claim is executed after it was given up",
    11: "the store has forgotten the scripts",
    12: "the store answers with an error",
    13: "the store is at its memory limit",
    14: "the store may evict keys",
    15: "the store is not as durable as was asked for",
    16: "two proxies claim one key at the same instant",
    17: "the key belongs to another request",
    18: "two replicas name keys in different ways",
    # Claimed, not yet sent
    19: "the proxy is killed between claim and connection",
    20: "the upstream cannot be reached",
    21: "the release itself fails",
    22: "the owner stands still between claim and sending",
    23: "the client is gone",
    # Sending
    24: "the connection breaks within the request",
    25: "the upstream closes an idle connection as it is used again",
    26: "a library sends the request again by itself",
    27: "the answer comes before the request was wholly sent",
    28: "the client waits to be told to send its body",
    29: "the proxy is killed while it sends",
    # Sent, waiting
    30: "the upstream does not answer in time",
    31: "the upstream's answer is unusable",
    32: "the proxy is killed while it waits",
    33: "the owner stands still while it waits",
    34: "the client is gone while the upstream works",
    35: "the store is lost while the upstream works",
    36: "the store loses the claim while the upstream works",
    37: "the lease lapses because the process was too busy to renew it",
    # The head has come
    38: "interim answers come first",
    39: "the proxy is killed after the head",
    40: "the answer is over the storage limit",
    41: "the answer is a redirect or asks for a credential",
    # The body is half through
    42: "the upstream breaks off or hangs within the body",
    43: "the proxy is killed within the body",
    44: "the client reads slowly or not at all",
    45: "the client is gone within the body",
    46: "the store is lost within the body",
    47: "the key is taken over within the body",
    48: "the proxy is told to stop within the body",
    # The end
    49: "the answer is stored, the reply is lost",
    50: "the answer cannot be stored",
    51: "the proxy is killed when the answer is stored and not delivered",
    52: "the proxy is killed before the answer's end is sent",
    53: "the store loses a complete record",
    # Replay
    54: "the record vanishes, or the store, within a replay",
    55: "the record is damaged, of another layout, or another key's",
    56: "the client is gone within a replay",
    # Around it
    57: "the proxy's wall clock jumps",
    58: "the store's clock jumps",
    59: "the store forgets everything",
    60: "there are no file descriptors, or no disk, left",
    61: "the proxy gets a signal, or a second one",
    62: "code fails after the claim",
    63: "the last reader leaves, under a rule that cancels",
    64: "a cancel comes before the request is sent",
    65: "a cancel comes before a lost request is sent again",
    66: "the owner is dead when a cancel comes",
    67: "the store stands still within a cancel",
    # Others follow its response
    68: "the owner is killed while others follow its response",
    69: "a record vanishes, or gets another owner, while others follow",
    70: "the store stands still while others follow",
    71: "a response grows too large while others follow",
    72: "messages to followers are lost, and their connections to the store",
    73: "a proxy drains while others follow",
    # A retry is sent on with the same key
    74: "the claim of a resend is made, and its caller is gone",
    75: "a resend reaches nobody, or is declined",
    76: "an owner stands still while a retry is sent on",
    # The API is asked what became of a key
    77: "a worker is killed, or drains, while it asks",
    78: "an owner wakes up before the verdict, or behind it",
    79: "an operator decides while the API is asked",
    80: "the API is away when it is asked, or shows too late, or has forgotten",
    81: "the reply to a verdict is lost, or the verdict is held up",
}


@cache
def marked() -> dict[int, list[str]]:
    """Return the tests that bear a number, by number."""
    found: dict[int, list[str]] = {}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                        for number in decorator.args:
                            found.setdefault(ast.literal_eval(number), []).append(f"{path.name}::{node.name}")
    return found


def without() -> dict[int, str]:
    """Return the numbers that DESIGN.md says have no test yet, with the reason."""
    section = DESIGN.partition("## Fault points without a test")[2].partition("\n## ")[0]
    return {int(number): reason for number, reason in re.findall(r"^\| (\d+) \| (.+) \|$", section, re.M)}


@pytest.mark.parametrize("number", FAULTS)
def test_every_fault_point_has_a_test(number):
    """A test that bears its number, or a line in DESIGN.md with the reason why not; never both."""
    assert (number in marked()) != (number in without()), FAULTS[number]


def test_every_number_is_a_fault_point():
    """No test, and no line, bears a number that is none."""
    assert sorted(FAULTS) == list(range(1, 82))
    assert {*marked(), *without()} == set(FAULTS)
