"""A small run of the proof, and runs of a broken system, which must not pass for a whole one."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from loadtest.chaos.plan import ASKED_RULE
from loadtest.chaos.run import Plan, lost_claims, run
from oncegate.store.results import StoreEvent

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("chaos")


def program(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=115)


RUNS = {
    "redis": (25, ()),
    "postgres": (10, ("--store", "postgres", "--failover")),
    "postgres, long": (60, ("--store", "postgres", "--failover", "--durability", "fsync")),
}


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.full] * ("long" in one)) for one in RUNS])
def test_the_promise_holds(name: str, tmp_path: Path) -> None:
    """Everything is broken for a while, and the judge finds nothing."""
    (seconds, more), folder = RUNS[name], tmp_path / "run"
    plan = ("--seed", 11, "--seconds", seconds, "--replicas", 2, "--sample", 300, "--folder", folder)
    done = program("loadtest.chaos", *plan, *more)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    figures = json.loads((folder / "verdict.json").read_text())["figures"]
    assert figures["faults"] >= figures["seconds"] / 2 - 2
    assert figures["executions"] > 20 * seconds
    assert figures["replays"] > 4 * seconds
    assert (folder / "report.png").stat().st_size > 10_000
    assert "timeline" in (folder / "report.txt").read_text()


def test_a_report_of_a_loss_counts(tmp_path: Path) -> None:
    """Of a claim and of the whole store; not that the store restarted, or that a proxy names keys otherwise."""
    lines = [{"event": "claim lost"}, {"event": "claim fenced"}, {"event": "request", "detail": "claim lost"}]
    lines += [{"kind": one.kind, "event": "store problem"} for one in StoreEvent]
    timed = [json.dumps(line | {"timestamp": "2026-01-01T00:00:00+00:00"}) for line in lines]
    (tmp_path / "proxy-0-1.log").write_text("\n".join(timed))
    told = [one["told"].get("kind", one["event"]) for one in lost_claims(tmp_path)]
    assert sorted(told) == ["claim fenced", "claim lost", "evicted", "flushed", "rolled_back"]


WITHOUT_RECEIVER = """
[[rule]]
name = "events"
path = "/*/*"
headers = { "webhook-id" = "*" }
key = "header:webhook-id"
fingerprint = []
"""
WITHOUT_TENANTS = """
[[rule]]
name = "all"
path = "/*/*"
scope = []
"""
# What the API shows is taken for "there is nothing", at once.
MISREAD = (
    ASKED_RULE.replace('"/state" = "done"', '"/state" = "paid"')
    .replace("absent = [{", 'absent = [{ status = "200", when = { "/state" = "done" } }, {')
    .replace("absent_after_s = 12", "absent_after_s = 0.1")
    .replace("absent_agree = 2", "absent_agree = 1")
)
BROKEN: dict[str, tuple[dict[str, Any], set[str]]] = {
    # The store forgets what it acknowledged, and nobody admits that it may.
    "forgetful": ({"store_options": ("--appendonly", "no"), "kinds": ("store-kill",)}, {"I1"}),
    # Each replica has its own store.
    "apart": ({"settings": [{}, {"STORE_URL": "embedded"}], "kinds": ("client-link-slow",)}, {"I1"}),
    # The id alone names an event, whoever receives it.
    "swallowed": ({"rules": WITHOUT_RECEIVER, "kinds": ("client-link-slow",)}, {"I4"}),
    # A verdict is wrong.
    "misread": ({"rules": MISREAD, "kinds": ("client-link-slow",), "seconds": 10.0}, {"I1"}),
    # Nothing tells the tenants apart.
    "mixed": ({"rules": WITHOUT_TENANTS, "kinds": ("client-link-slow",)}, {"I7"}),
}


# Whoever shares a key with another tenant waits for long: a run of nearly a minute.
SLOW = ("mixed", "misread")


@pytest.mark.parametrize("broken", [pytest.param(one, marks=[pytest.mark.full] * (one in SLOW)) for one in BROKEN])
def test_a_broken_system_is_found_out(broken: str, tmp_path: Path) -> None:
    """Where the promise is broken for real, a few seconds are enough to see it."""
    options, invariants = BROKEN[broken]
    folder = tmp_path / "run"
    common = {"DATA_DIR": tmp_path / "data"}
    if rules := options.get("rules"):
        (tmp_path / "rules.toml").write_text(rules)
        common["RULES_FILE"] = tmp_path / "rules.toml"
    settings = [{**common, **one} for one in options.get("settings", [{}])]
    plan = Plan(folder, 5, 3.0, replicas=2, workers=8, sample=50, settings=tuple(settings))
    uvloop.run(
        run(replace(plan, **{name: value for name, value in options.items() if name not in ("settings", "rules")}))
    )
    done = program("loadtest.chaos.check", folder)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {one["invariant"] for one in json.loads((folder / "verdict.json").read_text())["violations"]}
    assert invariants <= found
