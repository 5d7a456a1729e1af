"""The access log: which lines are written, and that each is the JSON it stands for."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest
from structlog import DropEvent

from oncegate.messages.problems import Problem, problem
from oncegate.observe import logs
from oncegate.observe.labels import SettlementLabel, Unguarded, UnguardedKey
from oncegate.observe.logs import DETAILS, ERROR_OUTCOMES, FIELDS, PLAIN, AccessLog
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.observe.troubles import EVENTS, PERIOD_S, TroubleLog


@dataclass
class Request:
    """A request as its report sees it."""

    path: str = "/v1/charges"
    client: str = "192.0.2.7"
    scheme: str = "http"
    host: str = "api.test"
    request_id: str = "req-1"
    trace_id: str = ""
    problem: Problem | None = None


class Warnings:
    """Notes the lines that are written through the logger."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})


def lines(capsys: Any, *reports: RequestReport, selection: str = "all", level: str = "info") -> list[dict[str, Any]]:
    """Return what is written of these requests."""

    async def write() -> None:
        logs.set_level(level)
        log = AccessLog(Warnings(), selection, "json", lambda rule: rule != "private")
        for report in reports:
            log.add(report, 0.0123, client_gone=False)
        assert capsys.readouterr().err == ""  # they leave in one write, at the end of this turn
        await asyncio.sleep(0)

    asyncio.run(write())
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_has_its_fields_in_their_order(capsys):
    """Without a key, a reason or a rule the line says nothing of them."""
    [line] = lines(capsys, RequestReport(Outcome.PASSTHROUGH, 204, "GET", upstream_s=0.01))
    assert tuple(line) == (*FIELDS, "event", "level", "timestamp")
    assert line | {"timestamp": ""} == {
        "outcome": "passthrough", "method": "GET", "status": 204, "key_id": "", "request_id": "", "client": "",
        "duration_ms": 12.3, "upstream_ms": 10.0, "client_gone": False, "event": "request", "level": "info",
        "timestamp": "",
    }  # fmt: skip


def test_a_line_says_which_request_it_was_and_why(capsys):
    """Rule, upstream, path, client, ids, what was sent and why."""
    asked = Request(trace_id="a" * 32, problem=problem("in-flight", "it is still running"))
    report = RequestReport(Outcome.IN_FLIGHT, 409, "POST", b"k" * 24, rule="pay", upstream="api:80", asked=asked)
    [line] = lines(capsys, report)
    assert tuple(line) == (*FIELDS, *DETAILS, "event", "level", "timestamp")
    assert [line[name] for name in (*DETAILS, "key_id", "request_id", "client")] == [
        "/v1/charges", "pay", "api:80", "a" * 32, "in-flight", "it is still running", "a2tr" * 8, "req-1", "192.0.2.7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reason": "why"}, "why"),
        ({"unguarded": Unguarded.STORE}, "store_unavailable"),
        ({"unguarded_key": UnguardedKey.NAME}, "name"),
        ({}, "it is still running"),
    ],
)
def test_why(capsys, changes, reason):
    """What the upstream's failure says, else the word of `Oncegate-Status`, else the detail of the problem."""
    asked = Request(problem=problem("in-flight", "it is still running"))
    [line] = lines(capsys, RequestReport(Outcome.UNGUARDED, 200, "POST", asked=asked, **changes))
    assert line["reason"] == reason


def test_a_path_that_has_the_key_is_left_out(capsys):
    """As far as its rule says so; the rest of the line is there."""
    [line] = lines(capsys, RequestReport(Outcome.REPLAYED, 200, "POST", rule="private", asked=Request()))
    assert ("path" in line, line["request_id"]) == (False, "req-1")


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\x00", "ü", "\udcff", '", "outcome": "x'])
def test_a_line_is_json_whatever_is_in_it(capsys, text):
    """What comes from a client or from a rule is quoted; none of it can add a field."""
    asked = Request(path=text, client=text, request_id=text)
    report = RequestReport(Outcome.IN_FLIGHT, 200, text, b"k" * 24, reason=text, rule=text, upstream=text, asked=asked)
    [line] = lines(capsys, report)
    names = ("method", "reason", "rule", "upstream", "path", "client", "request_id")
    assert [line[name] for name in names] == [text] * len(names)
    assert line["outcome"] == "in_flight"


@pytest.mark.parametrize("outcome", Outcome)
def test_which_lines_are_written(capsys, outcome):
    """`notable` leaves plain outcomes out, `off` leaves all out; at the level error only alarming ones are left."""
    report = RequestReport(outcome, 200, "POST")
    assert [line["level"] for line in lines(capsys, report)] == ["error" if outcome.label in ERROR_OUTCOMES else "info"]
    assert len(lines(capsys, report, selection="notable")) == (outcome.label not in PLAIN)
    assert lines(capsys, report, selection="off") == []
    assert len(lines(capsys, report, level="error")) == (outcome.label in ERROR_OUTCOMES)


def test_lines_of_one_turn_keep_their_order(capsys):
    """They leave together."""
    reports = [RequestReport(Outcome.EXECUTED, 200 + number, "POST") for number in range(5)]
    assert [line["status"] for line in lines(capsys, *reports)] == [200, 201, 202, 203, 204]


# Warnings ...


class Clock:
    """An event loop's clock, as far as a TroubleLog deals with it."""

    def __init__(self) -> None:
        self.due: list[tuple[Any, ...]] = []

    def call_later(self, seconds: float, *call: Any) -> None:
        assert seconds == PERIOD_S
        self.due.append(call)

    def turn(self) -> None:
        due, self.due = self.due, []
        for call, *arguments in due:
            call(*arguments)


def failed(outcome: Outcome = Outcome.UPSTREAM_UNREACHABLE, upstream: str = "api:80", **changes: Any) -> RequestReport:
    return RequestReport(outcome, 502, "POST", upstream=upstream, reason="connection refused", **changes)


def test_a_failure_names_the_upstream_the_reason_and_what_was_sent():
    log, asked = Warnings(), Request(problem=problem("upstream-unreachable", "why"), trace_id="a" * 32)
    TroubleLog(log, Clock())(failed(rule="pay", key=b"k" * 24, asked=asked))
    assert log.lines == [
        {
            "event": "upstream failed", "outcome": "upstream_unreachable", "status": 502, "upstream": "api:80",
            "rule": "pay", "reason": "connection refused", "problem": "upstream-unreachable", "key_id": "a2tr" * 8,
            "request_id": "req-1", "trace_id": "a" * 32,
        }
    ]  # fmt: skip


def test_many_failures_are_few_lines_which_say_how_many_are_left_out():
    """Each upstream has its own; after a quiet second the next one has a line at once again."""
    log, clock = Warnings(), Clock()
    troubles = TroubleLog(log, clock)
    for number in range(100):
        troubles(failed(asked=Request(request_id=str(number))))
        troubles(failed(upstream="other:80"))
    assert [(line["upstream"], line.get("left_out")) for line in log.lines] == [("api:80", None), ("other:80", None)]
    clock.turn()
    assert [(line["upstream"], line["left_out"]) for line in log.lines[2:]] == [("api:80", 98), ("other:80", 98)]
    assert log.lines[2]["request_id"] == "99"
    clock.turn()
    assert len(log.lines) == 4
    assert not clock.due
    troubles(failed())
    troubles(failed())
    troubles.flush()
    assert [line.get("left_out") for line in log.lines[4:]] == [None, 0]


@pytest.mark.parametrize("settlement", [SettlementLabel.UNKNOWN, SettlementLabel.CANCELLED])
def test_each_unknown_key_has_a_line(settlement):
    """However many there are: somebody has to decide each of them."""
    log = Warnings()
    troubles = TroubleLog(log, Clock())
    for number in range(20):
        key = bytes([number]) * 24
        troubles(failed(Outcome.UPSTREAM_LOST, key=key, settlements=(settlement,)))
    assert {line["event"] for line in log.lines} == {"outcome unknown"}
    assert len({line["key_id"] for line in log.lines}) == 20


@pytest.mark.parametrize("outcome", Outcome)
def test_what_is_in_order_is_no_warning(outcome):
    """And a request that goes on unguarded is one only where the store is why."""
    log = Warnings()
    troubles = TroubleLog(log, Clock())
    troubles(RequestReport(outcome, 200, "POST", unguarded=Unguarded.NO_KEY))
    assert [line["event"] for line in log.lines] == list(filter(None, [EVENTS.get(outcome.label)]))
    troubles(RequestReport(Outcome.UNGUARDED, 200, "POST", unguarded=Unguarded.STORE))
    assert "store failed" in [line["event"] for line in log.lines]


def test_an_audit_line_is_written_at_every_level():
    """Who decided what about a key is no matter of the level; any other warning is."""
    threshold = logs.Threshold()
    threshold.least = logs.LEVELS["error"]
    assert threshold(None, "warning", {"event": logs.AUDIT, "user": "ana"})["user"] == "ana"
    with pytest.raises(DropEvent):
        threshold(None, "warning", {"event": "store problem"})
