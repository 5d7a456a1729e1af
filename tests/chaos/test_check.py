"""The judge finds what is planted, and nothing where nothing is."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest.chaos.check import TO_UNKNOWN, judge
from loadtest.chaos.history import History
from tests.parts import parsed

ROOT = Path(__file__).parents[2]
JUDGE = (ROOT / "loadtest/chaos/check.py", ROOT / "loadtest/chaos/history.py")

KILLED = {"kind": "proxy-kill", "place": "proxy 0", "replica": 0, "begun": 20.0, "ended": 21.0, "detail": ""}


class Story:
    """A run that went well, as its files tell it; a test spoils it. One line of a client is a dict by column."""

    COLUMNS = (
        "begun", "ended", "tenant", "key", "variant", "replica", "how", "status", "word", "replayed", "slug", "digest",
        "execution", "echo",
    )  # fmt: skip

    def __init__(self) -> None:
        self.attempts: list[dict[str, Any]] = []
        self.acts: list[tuple[Any, ...]] = []
        self.upstream: list[tuple[Any, ...]] = []
        self.faults: list[dict[str, Any]] = [dict(KILLED)]
        self.reports: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {
            "lease_s": 1.0, "upstream_timeout_s": 4.0, "begun": 0.0, "calm": 60.0, "failed_faults": [],
            "finished": True,
        }  # fmt: skip
        self._count = 0

    def execute(self, at: float, tenant: str, key: str, variant: int = 0, kind: str = "small", how: str = "whole",
                replica: int = 0, took: float = 0.1) -> str:  # fmt: skip
        self._count += 1
        name = f"u0.{self._count}"
        self.upstream.append(("begin", at, name, tenant, key, variant, replica, kind))
        if how != "running":
            digest = f"d{self._count}" if how in ("whole", "declined") else "-"
            self.upstream.append(("end", at + took, name, how, digest))
        return name

    def ask(self, at: float, tenant: str, key: str, **columns: Any) -> dict[str, Any]:
        attempt = {
            "begun": at, "ended": at + 0.2, "tenant": tenant, "key": key, "variant": 0, "replica": 0, "how": "whole",
            "status": 200, "word": "executed", "replayed": 0, "slug": "", "digest": "", "execution": "", "echo": "",
            **columns,
        }  # fmt: skip
        if attempt["execution"] and not attempt["echo"]:
            attempt["digest"] = attempt["digest"] or "d" + attempt["execution"].partition(".")[2]
            attempt["echo"] = f"{tenant} {key} {attempt['variant']}"
        self.attempts.append(attempt)
        return attempt

    def told(self, at: float, tenant: str, key: str, slug: str, **columns: Any) -> dict[str, Any]:
        """A problem of the proxy's own."""
        word = "unknown" if slug.startswith(("outcome", "upstream-lost")) else "refused"
        return self.ask(at, tenant, key, **{"slug": slug, "status": 409, "word": word, **columns})

    def act(self, at: float, act: str, tenant: str, key: str, status: int, said: str = "") -> None:
        """A client stops an execution, or asks about a key."""
        self.acts.append((at, at + 0.1, act, tenant, key, 1, status, said))

    def once(self, at: float, tenant: str, key: str, variant: int = 0) -> str:
        """An execution and a replay."""
        name = self.execute(at + 0.05, tenant, key, variant)
        self.ask(at, tenant, key, execution=name, variant=variant)
        self.ask(at + 1, tenant, key, execution=name, variant=variant, word="replayed", replayed=1, replica=1)
        return name

    def write(self, folder: Path) -> Path:
        lines = ["\t".join(str(attempt[column]) for column in self.COLUMNS) for attempt in self.attempts]
        (folder / "client-0.tsv").write_text("".join(f"{line}\n" for line in lines))
        (folder / "acts-0.tsv").write_text("".join("\t".join(map(str, words)) + "\n" for words in self.acts))
        upstream = ["\t".join(map(str, words)) for words in self.upstream]
        (folder / "upstream.log").write_text("".join(f"{line}\n" for line in upstream))
        for name, records in (("faults", self.faults), ("reports", self.reports)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        (folder / "run.json").write_text(json.dumps(self.facts))
        return folder


def shown(story: Story, at: float, key: str) -> str:
    """An execution whose answer is cut off, and what the API says of it when it is asked."""
    name = story.execute(at + 0.05, "ant", key, kind="cut-head", how="cut")
    story.told(at, "ant", key, "outcome-unknown")
    story.ask(at + 1, "ant", key, execution=name, word="reconciled", replayed=1, replica=1)
    story.ask(at + 2, "ant", key, execution=name, word="reconciled", replayed=1)
    return name


def well() -> Story:
    """Every ordinary thing that may happen, once."""
    story = Story()
    for number in range(200):
        story.once(number / 10, "ant", f"plain-{number}")
    story.once(1, "bee", "plain-1")  # another tenant, the same key
    retried = story.execute(2.05, "ant", "retried")
    story.ask(2, "ant", "retried", how="left", status=0, word="")
    story.told(2.1, "ant", "retried", "in-flight", replica=1)
    story.ask(3, "ant", "retried", execution=retried, word="replayed", replayed=1)
    declined = story.execute(4.05, "ant", "declined", kind="busy", how="declined")
    story.ask(4, "ant", "declined", status=429, word="released", execution=declined)
    again = story.execute(5.05, "ant", "declined")
    story.ask(5, "ant", "declined", execution=again)
    story.once(6, "ant", "mutated")
    story.told(8, "ant", "mutated", "key-reused", variant=1, status=422)
    story.told(10, "ant", "refused", "store-unavailable", status=503)
    story.once(11, "ant", "refused")
    cut = story.execute(12.05, "ant", "cut", kind="cut-length", how="cut")
    story.ask(12, "ant", "cut", how="cut", execution=cut, digest="")
    story.told(13, "ant", "cut", "outcome-unknown")
    lost = story.execute(19.95, "ant", "killed", how="lost", took=0.1)
    assert lost
    story.ask(19.9, "ant", "killed", how="none", status=0, word="")
    story.told(20.5, "ant", "killed", "in-flight", replica=1)
    story.told(21.6, "ant", "killed", "outcome-unknown", replica=1)
    made_up = story.execute(25.05, "ant", "made-up", kind="made-up", how="cut")
    assert made_up
    story.ask(25, "ant", "made-up", status=503, word="unknown", digest="dg")
    story.told(26, "ant", "made-up", "outcome-unknown")
    story.upstream.append(("idle", 27.0, 0))
    story.ask(27, "ant", "met-a-408", status=502, word="unknown", slug="upstream-lost")
    story.told(28, "ant", "met-a-408", "outcome-unknown")
    early = story.execute(29.05, "ant", "early", kind="early")
    story.ask(29, "ant", "early", status=413, execution=early)
    kept = story.execute(30.05, "ant", "oversize", kind="oversize")
    story.ask(30, "ant", "oversize", execution=kept)
    story.told(31, "ant", "oversize", "response-not-kept")
    # An answer whose only end is the closing, which a killed API brings about, too; the other request ended before.
    story.faults.append(KILLED | {"kind": "upstream-kill", "place": "upstream", "begun": 32.1, "ended": 32.15})
    closed = story.execute(32.05, "ant", "closed", kind="eof", how="running")
    story.told(32.01, "ant", "closed", "key-reused", variant=1, status=422, ended=32.04)
    story.ask(32, "ant", "closed", execution=closed)
    joined = story.execute(33.05, "ant", "joined")
    story.ask(33, "ant", "joined", execution=joined)
    story.ask(33.06, "ant", "joined", execution=joined, word="joined", replica=1)
    story.act(34, "stop", "ant", "joined", 409)
    story.act(34, "ask", "ant", "joined", 200, "complete")
    story.act(32.9, "ask", "ant", "joined", 404)
    left = story.execute(35.05, "bee", "left", how="lost")
    assert left
    story.ask(35, "bee", "left", how="left", status=0, word="")
    story.told(36, "bee", "left", "cancelled")
    story.execute(37.05, "bee", "stopped", how="lost")
    story.told(37.1, "bee", "stopped", "in-flight", replica=1)
    story.act(37.2, "stop", "bee", "stopped", 202)
    story.act(38, "ask", "bee", "stopped", 200, "unknown")
    story.told(37, "bee", "stopped", "cancelled", ended=37.4)
    shown(story, 36, "shown")
    return story


def judged(story: Story, folder: Path) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "loadtest.chaos.check", str(story.write(folder))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1, 2), done.stderr
    return done.returncode, json.loads((folder / "verdict.json").read_text())


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    """A run that went well has no violations, whatever ordinary happened in it."""
    code, verdict = judged(well(), tmp_path)
    assert verdict["violations"] == []
    assert code == 0
    assert verdict["figures"]["keys"] == 216


def execute_twice(story: Story) -> None:
    story.execute(40, "ant", "plain-7")
    story.ask(39.9, "ant", "plain-7", how="none", status=0, word="")


def execute_twice_in_parts(story: Story) -> None:
    """The first request was cut off before its end; it counts all the same."""
    story.execute(40, "ant", "parted", "?", kind="part", how="lost")
    story.ask(39.9, "ant", "parted", how="none", status=0, word="")
    again = story.execute(41, "ant", "parted")
    story.ask(40.9, "ant", "parted", execution=again)


def execute_what_was_unknown(story: Story) -> None:
    again = story.execute(40, "ant", "killed")
    story.ask(39.9, "ant", "killed", execution=again)


def execute_twice_by_the_clients_alone(story: Story) -> None:
    story.ask(0.15, "ant", "plain-0", execution="u0.1")


def execute_after_a_refusal(story: Story) -> None:
    story.told(40, "ant", "dishonest", "store-unavailable", status=503)
    story.execute(40.1, "ant", "dishonest")


def execute_for_nobody(story: Story) -> None:
    story.execute(40, "ant", "unasked")


def another_answer(story: Story) -> None:
    story.ask(40, "ant", "plain-7", word="replayed", replayed=1, execution="u0.8", digest="dx",
              echo="ant plain-7 0")  # fmt: skip


def two_truths(story: Story) -> None:
    """Both came from the upstream, and both were told as stored."""
    first = story.execute(40.05, "ant", "torn", kind="busy", how="declined")
    second = story.execute(40.3, "ant", "torn")
    story.ask(40, "ant", "torn", execution=first)
    story.ask(40.1, "ant", "torn", execution=second, word="replayed", replayed=1)


def forgotten(story: Story) -> None:
    story.told(40, "ant", "plain-7", "outcome-unknown")


def in_flight_again(story: Story) -> None:
    story.told(3.5, "ant", "retried", "in-flight")


def not_kept_though_small(story: Story) -> None:
    story.told(40, "ant", "plain-7", "response-not-kept")


def truncated_as_complete(story: Story) -> None:
    cut = story.execute(40.05, "ant", "short", kind="cut-chunks", how="cut")
    story.ask(40, "ant", "short", execution=cut, digest="dx")


def lost_as_complete(story: Story) -> None:
    lost = story.execute(40.05, "ant", "short", kind="streamed", how="lost")
    story.ask(40, "ant", "short", execution=lost, digest="dx")


def running_as_complete(story: Story) -> None:
    running = story.execute(40.05, "ant", "short", kind="streamed", how="running")
    story.ask(40, "ant", "short", execution=running, digest="dx")


def altered(story: Story) -> None:
    whole = story.execute(40.05, "ant", "altered")
    story.ask(40, "ant", "altered", execution=whole, digest="dx")


def invented(story: Story) -> None:
    story.ask(40, "ant", "invented", execution="u9.9", digest="dx")


def garbage(story: Story) -> None:
    story.ask(40, "ant", "noise", how="garbage", status=0, word="")


def of_another_tenant(story: Story) -> None:
    story.ask(40, "cat", "plain-7", execution="u0.8", word="replayed", replayed=1, echo="ant plain-7 0", digest="d8")


def of_another_key(story: Story) -> None:
    story.ask(40, "ant", "plain-500", execution="u0.8", word="replayed", replayed=1, echo="ant plain-7 0", digest="d8")


def shifted_by_one(story: Story) -> None:
    """A surplus answer shifts a connection: each key gets the answer of the key before it."""
    names = [story.execute(40.05 + number, "ant", f"shifted-{number}") for number in range(3)]
    story.ask(40, "ant", "shifted-0", execution=names[0])
    for number in (1, 2):
        name, echo = names[number - 1], f"ant shifted-{number - 1} 0"
        story.ask(40 + number, "ant", f"shifted-{number}", execution=name, digest=f"d{name[3:]}", echo=echo)


def of_an_idle_connection(story: Story) -> None:
    """The 408 that ends an idle connection is told as the answer to a request."""
    story.upstream.append(("idle", 40.0, 0))
    story.ask(40, "ant", "timed-out", status=408, digest="dx")


def of_a_gateway_as_executed(story: Story) -> None:
    """A gateway's own answer is stored as if the API had given it."""
    story.execute(40.05, "ant", "gateway", kind="gateway", how="cut")
    story.ask(40, "ant", "gateway", status=502, digest="dx")


def executed_again_after_a_made_up_answer(story: Story) -> None:
    story.execute(40.05, "ant", "again", kind="made-up", how="cut")
    story.ask(40, "ant", "again", status=503, word="unknown", digest="dx")
    again = story.execute(41.05, "ant", "again")
    story.ask(41, "ant", "again", execution=again)


def an_early_answer_lost(story: Story) -> None:
    story.execute(40.05, "ant", "upload", kind="early")
    story.told(40, "ant", "upload", "upstream-lost", status=502)
    story.told(41, "ant", "upload", "outcome-unknown")


def unknown_for_a_408_elsewhere(story: Story) -> None:
    """The idle connection was another replica's."""
    story.upstream.append(("idle", 40.0, 1))
    story.execute(40.05, "ant", "lightly")
    story.ask(40, "ant", "lightly", how="left", status=0, word="")
    story.told(40.2, "ant", "lightly", "outcome-unknown")


def swallowed_by_another_receiver(story: Story) -> None:
    """One event goes to two receivers, and the second gets the answer of the first."""
    name = story.once(40, "hook-a", "event")
    story.ask(41, "hook-b", "event", word="replayed", replayed=1, execution=name, echo="hook-a event 0",
              digest=f"d{name[3:]}")  # fmt: skip


def two_requests_in_one(story: Story) -> None:
    story.upstream.append(("mixed", 40.0, 0, "b'0:another:'"))


def executed_for_another_body(story: Story) -> None:
    story.execute(40.05, "ant", "mutated", 1)
    story.ask(40, "ant", "mutated", variant=1, how="none", status=0, word="")


def replayed_to_another_body(story: Story) -> None:
    story.ask(40, "ant", "plain-7", variant=1, execution="u0.8", word="replayed", replayed=1, digest="d8",
              echo="ant plain-7 0")  # fmt: skip


def in_flight_to_another_body(story: Story) -> None:
    """The state of another request shows."""
    story.told(2.15, "ant", "retried", "in-flight", variant=1)


def refused_without_another(story: Story) -> None:
    story.told(40, "ant", "alone", "key-reused", status=422)


def refused_for_another_tenant(story: Story) -> None:
    """The other request is that of another tenant."""
    story.told(40, "bee", "mutated", "key-reused", status=422)


def in_flight_too_long(story: Story) -> None:
    story.execute(40.05, "ant", "stuck", how="lost")
    story.ask(40, "ant", "stuck", how="none", status=0, word="")
    story.told(42.5, "ant", "stuck", "in-flight")


def in_flight_for_nobody(story: Story) -> None:
    story.told(40, "ant", "ghost", "in-flight")


def in_flight_for_somebody_unconfirmed(story: Story) -> None:
    """Of two requests that are told so one must have claimed, unless the store failed under its claim."""
    story.told(40, "ant", "ghost", "in-flight", ended=42.0)
    story.told(40.1, "ant", "ghost", "in-flight")


def hung(story: Story) -> None:
    story.ask(40, "ant", "hung", how="timeout", status=0, word="", ended=46)


def unknown_for_no_reason(story: Story) -> None:
    story.execute(40.05, "ant", "lightly", how="whole")
    story.ask(40, "ant", "lightly", how="left", status=0, word="")
    story.told(41, "ant", "lightly", "outcome-unknown")


def unknown_for_a_fault_elsewhere(story: Story) -> None:
    """The replica that was killed never saw it."""
    story.execute(20.05, "ant", "lightly", how="whole", replica=1)
    story.ask(20, "ant", "lightly", how="left", status=0, word="", replica=1)
    story.told(21, "ant", "lightly", "outcome-unknown", replica=1)


def unknown_for_a_harmless_fault(story: Story) -> None:
    story.faults.append({**KILLED, "kind": "client-link-cut", "begun": 40.0, "ended": 40.1})
    story.execute(40.05, "ant", "lightly", how="whole")
    story.ask(40, "ant", "lightly", how="none", status=0, word="")
    story.told(40.4, "ant", "lightly", "outcome-unknown")


def never_answered(story: Story) -> None:
    for number in range(5):
        story.told(50, "ant", f"open-{number}", "store-unavailable", status=503)


def lost_and_not_reported(story: Story) -> None:
    """The store lost data, and nobody said so."""
    story.faults.append({**KILLED, "kind": "store-failover", "begun": 39.0, "ended": 39.5, "loses": "claims"})
    story.reports.append({"at": 12.0})  # of something earlier
    execute_twice(story)


def reported_and_not_lost(story: Story) -> None:
    """A report alone excuses nothing."""
    story.reports.append({"at": 40.1})
    execute_twice(story)


def executed_again_though_only_answers_were_lost(story: Story) -> None:
    story.faults.append({**KILLED, "kind": "store-failover", "begun": 39.0, "ended": 39.5, "loses": "answers"})
    story.reports.append({"at": 40.1})
    execute_twice(story)


def may_forget(story: Story) -> None:
    """A failover without loss of claims: an answer may become unknown, and nobody has to say so."""
    story.faults.append({**KILLED, "kind": "store-failover", "begun": 39.0, "ended": 39.5, "loses": TO_UNKNOWN})


def executed_again_though_answers_may_be_forgotten(story: Story) -> None:
    may_forget(story)
    execute_twice(story)


def another_answer_though_answers_may_be_forgotten(story: Story) -> None:
    may_forget(story)
    another_answer(story)


def claims_reported_though_none_may_be_lost(story: Story) -> None:
    may_forget(story)
    story.reports.append({"at": 40.1})


def executed_after_it_was_stopped(story: Story) -> None:
    """Nothing of it had been sent, and its own client's retry got it executed."""
    story.ask(40, "bee", "unsent", how="left", status=0, word="")
    story.told(40.5, "bee", "unsent", "cancelled")
    again = story.execute(41.05, "bee", "unsent")
    story.ask(41, "bee", "unsent", execution=again)


def replayed_after_it_was_stopped(story: Story) -> None:
    """Somebody was told that it was stopped, and it went on."""
    went_on = story.execute(40.05, "bee", "marked", took=2)
    story.ask(40, "bee", "marked", execution=went_on, ended=42.1)
    story.act(40.5, "stop", "bee", "marked", 202)
    story.told(41, "bee", "marked", "cancelled", replica=1)
    story.ask(43, "bee", "marked", execution=went_on, word="replayed", replayed=1)


def stopped_by_nobody(story: Story) -> None:
    """The cancel of another claim went astray."""
    story.execute(40.05, "bee", "innocent", how="lost")
    story.told(40, "bee", "innocent", "cancelled")
    story.act(42, "stop", "bee", "innocent", 200)


def denied(story: Story) -> None:
    story.act(40, "ask", "ant", "plain-7", 404)


def called_running_though_complete(story: Story) -> None:
    story.act(40, "ask", "ant", "plain-7", 200, "in_flight")


def settled_by_what_was_declined(story: Story) -> None:
    """The verdict says that it was executed."""
    name = story.execute(40.05, "ant", "wrong", kind="busy", how="declined")
    story.ask(40, "ant", "wrong", status=429, word="released", execution=name)
    story.ask(41, "ant", "wrong", execution=name, word="reconciled", replayed=1)


def settled_by_what_never_was(story: Story) -> None:
    story.told(40, "ant", "wrong", "upstream-lost", status=502, word="unknown")
    story.ask(41, "ant", "wrong", execution="u0.9999", word="reconciled", replayed=1)


def settled_by_another_key(story: Story) -> None:
    """The API showed an object of another request, and nobody compared the reference."""
    other = shown(story, 40, "others")
    story.execute(43.05, "ant", "wrong", kind="cut-head", how="cut")
    story.told(43, "ant", "wrong", "outcome-unknown")
    story.ask(44, "ant", "wrong", execution=other, word="reconciled", replayed=1)


def freed_though_it_was_executed(story: Story) -> None:
    """The API said "not found" too soon."""
    story.execute(40.05, "ant", "wrong", kind="cut-head", how="cut")
    story.told(40, "ant", "wrong", "outcome-unknown")
    story.ask(44, "ant", "wrong", execution=story.execute(44.05, "ant", "wrong"))


def settled_twice(story: Story) -> None:
    """Two duplicates get two verdicts."""
    name = shown(story, 40, "wrong")
    story.ask(44, "ant", "wrong", execution=name, word="reconciled", replayed=1, digest="another")


def joined_to_something_else(story: Story) -> None:
    """A reader that joined got bytes of two executions, with a clean end."""
    first = story.execute(40.05, "ant", "spliced")
    story.ask(40, "ant", "spliced", execution=first)
    story.ask(40.06, "ant", "spliced", execution=first, word="joined", digest="dx", replica=1)


def executed_for_one_who_joined(story: Story) -> None:
    """Who joins never executes."""
    name = story.execute(40.05, "ant", "follower")
    story.ask(40, "ant", "follower", execution=name, word="joined")


def reported_for_nothing(story: Story) -> None:
    story.reports.append({"at": 40.1})


PLANTED: list[tuple[str, Callable[[Story], None]]] = [
    ("I1", execute_twice),
    ("I1", execute_twice_in_parts),
    ("I1", execute_what_was_unknown),
    ("I1", execute_twice_by_the_clients_alone),
    ("I9", execute_after_a_refusal),
    ("I4", execute_for_nobody),
    ("I2", another_answer),
    ("I2", two_truths),
    ("I2", forgotten),
    ("I2", in_flight_again),
    ("I2", not_kept_though_small),
    ("I6", truncated_as_complete),
    ("I6", lost_as_complete),
    ("I6", running_as_complete),
    ("I6", altered),
    ("I6", invented),
    ("I6", garbage),
    ("I4", of_another_tenant),
    ("I4", of_another_key),
    ("I4", shifted_by_one),
    ("I6", of_an_idle_connection),
    ("I6", of_a_gateway_as_executed),
    ("I1", executed_again_after_a_made_up_answer),
    ("unknown", an_early_answer_lost),
    ("unknown", unknown_for_a_408_elsewhere),
    ("I4", swallowed_by_another_receiver),
    ("I4", two_requests_in_one),
    ("I7", executed_for_another_body),
    ("I7", replayed_to_another_body),
    ("I7", in_flight_to_another_body),
    ("I7", refused_without_another),
    ("I7", refused_for_another_tenant),
    ("I10", in_flight_too_long),
    ("I10", in_flight_for_nobody),
    ("I10", in_flight_for_somebody_unconfirmed),
    ("I10", hung),
    ("unknown", unknown_for_no_reason),
    ("unknown", unknown_for_a_fault_elsewhere),
    ("unknown", unknown_for_a_harmless_fault),
    ("I10", never_answered),
    ("I1", lost_and_not_reported),
    ("I1", reported_and_not_lost),
    ("I1", executed_again_though_only_answers_were_lost),
    ("I1", executed_again_though_answers_may_be_forgotten),
    ("I2", another_answer_though_answers_may_be_forgotten),
    ("I1'", claims_reported_though_none_may_be_lost),
    ("I1'", reported_for_nothing),
    ("I11", executed_after_it_was_stopped),
    ("I11", replayed_after_it_was_stopped),
    ("I11", stopped_by_nobody),
    ("I12", denied),
    ("I12", called_running_though_complete),
    ("I13", settled_by_what_was_declined),
    ("I13", settled_by_what_never_was),
    ("I4", settled_by_another_key),
    ("I1", freed_though_it_was_executed),
    ("I2", settled_twice),
    ("I2", joined_to_something_else),
    ("I9", executed_for_one_who_joined),
]


@pytest.mark.parametrize(("invariant", "plant"), PLANTED, ids=lambda one: getattr(one, "__name__", one))
def test_a_planted_violation_is_found(invariant: str, plant: Callable[[Story], None], tmp_path: Path) -> None:
    """One spoiled story of two hundred good ones is found, by the name of what it breaks."""
    story = well()
    plant(story)
    violations = judge(History(story.write(tmp_path)))["violations"]
    assert invariant in {one["invariant"] for one in violations}
    assert len(violations) <= 4  # and not a wrong one for everything else


def test_its_exit_code_says_so(tmp_path: Path) -> None:
    story = well()
    execute_twice(story)
    code, verdict = judged(story, tmp_path)
    assert (code, [one["invariant"] for one in verdict["violations"]]) == (1, ["I1"])


def test_a_loss_that_was_reported_is_excused(tmp_path: Path) -> None:
    """A store that lost what it acknowledged may lead to a second execution, if the proxies say so."""
    story = well()
    story.faults.append({**KILLED, "kind": "store-failover", "begun": 39.0, "ended": 39.5, "loses": "claims"})
    story.reports.append({"at": 40.1})
    execute_twice(story)
    code, verdict = judged(story, tmp_path)
    assert (code, verdict["violations"], verdict["excused"]) == (0, [], 1)


def test_a_claim_that_a_fault_of_the_store_leaves_unconfirmed_shows(tmp_path: Path) -> None:
    """Others are told that it is in flight while it waits for the store."""
    story = well()
    story.faults.append(
        {**KILLED, "kind": "store-failover", "place": "store", "replica": None, "begun": 39.9, "ended": 41.0}
    )
    in_flight_for_somebody_unconfirmed(story)
    assert [one["until"] for one in judge(History(story.write(tmp_path)))["violations"]] == [42.0]


def test_an_answer_that_became_unknown_is_excused(tmp_path: Path) -> None:
    """Where a failover may do that by contract, and at no other time."""
    story = well()
    may_forget(story)
    forgotten(story)
    verdict = judge(History(story.write(tmp_path)))
    assert (verdict["violations"], verdict["excused"]) == ([], 1)
    story.faults[-1].update(begun=50.0, ended=50.5)
    assert len(judge(History(story.write(tmp_path)))["violations"]) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda story: story.facts.update(failed_faults=["store-kill: it would not die"]),
        lambda story: story.facts.update(finished=False),
        lambda story: story.faults.clear(),
    ],
)
def test_a_run_that_proves_nothing_is_void(spoil: Callable[[Story], None], tmp_path: Path) -> None:
    """Where faults failed or clients did not finish, no violations are no proof."""
    story = well()
    spoil(story)
    if not story.faults:
        story.attempts = [one for one in story.attempts if one["key"] not in ("killed", "closed")]
        story.upstream = [words for words in story.upstream if words[2] != "u0.208" and "closed" not in words]
    code, verdict = judged(story, tmp_path)
    assert verdict["violations"] == []
    assert code == 2


def test_the_judge_shares_nothing_with_the_judged() -> None:
    """It imports the standard library and itself."""
    for path in JUDGE:
        for node in ast.walk(parsed(path)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [one.name for one in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name == "loadtest.chaos.history" or name.partition(".")[0] in sys.stdlib_module_names, name
