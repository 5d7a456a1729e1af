"""The access log: which lines are written, and that each is the JSON it stands for."""

import asyncio
import json
from typing import Any

import pytest

from oncegate.observe import logs
from oncegate.observe.logs import ERROR_OUTCOMES, FIELDS, PLAIN, AccessLog
from oncegate.observe.outcome import Outcome, RequestReport


def lines(capsys: Any, *reports: RequestReport, selection: str = "all", level: str = "info") -> list[dict[str, Any]]:
    """Return what is written of these requests."""

    async def write() -> None:
        logs.set_level(level)
        log = AccessLog(None, selection, "json", asyncio.get_running_loop())
        for report in reports:
            log(report, 0.0123, client_gone=False)
        assert capsys.readouterr().err == ""  # they leave in one write, at the end of this turn
        await asyncio.sleep(0)

    asyncio.run(write())
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_has_its_fields_in_their_order(capsys):
    """Without a key, a reason or a rule the line says nothing of them."""
    [line] = lines(capsys, RequestReport(Outcome.PASSTHROUGH, 204, "GET", upstream_s=0.01))
    assert tuple(line) == (*FIELDS, "event", "level", "timestamp")
    assert line | {"timestamp": ""} == {
        "outcome": "passthrough", "method": "GET", "status": 204, "key_id": "", "duration_ms": 12.3,
        "upstream_ms": 10.0, "client_gone": False, "event": "request", "level": "info", "timestamp": "",
    }  # fmt: skip


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\x00", "ü", "\udcff", '", "outcome": "x'])
def test_a_line_is_json_whatever_is_in_it(capsys, text):
    """A method, a reason and a rule's name are quoted; none of them can add a field."""
    [line] = lines(capsys, RequestReport(Outcome.FAILED, 500, text, b"k" * 32, reason=text, rule=text))
    assert (line["method"], line["reason"], line["rule"], line["outcome"]) == (text, text, text, "failed")


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
