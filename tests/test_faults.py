"""Fault injection: the form of a fault, the effect of each kind, and no trace of it unless it is requested."""

import asyncio
import inspect
import subprocess
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import pytest

from oncegate.testing import faults
from oncegate.testing.faults import POINTS, Fault, Injected, install, parse_fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill@claimed:1", Fault("kill", "claimed", 1, 0)),
        ("raise@settle:20", Fault("raise", "settle", 20, 0)),
        ("pause@sent:3:1200", Fault("pause", "sent", 3, 1200)),
        ("pause@sent:3", Fault("pause", "sent", 3, 0)),
    ],
)
def test_a_fault_is_read_and_written_alike(text, fault):
    """A fault has a kind, a point, a number of passages, and for a pause its length in milliseconds."""
    assert parse_fault(text) == fault
    assert str(fault) == text


@pytest.mark.parametrize(
    "text",
    ["", "kill", "kill@claimed", "kill@claimed:x", "stop@claimed:1", "pause@sent:1:", "kill@sent:1:5", "kill@no:1"],
)
def test_what_is_no_fault(text):
    """Another form, or a point that does not exist, is refused."""
    with pytest.raises(ValueError, match=r"must be|unknown point"):
        parse_fault(text)


def test_there_are_points_enough():
    """The request path has at least 20 points. Each is a step that exists, and no step is wrapped without a request."""
    assert len(POINTS) >= 20
    for when, place in [(when, place) for when, *places in POINTS.values() for place in places]:
        assert when in ("before", "after")
        module, _, path = place.partition(":")
        step = import_module(module)
        for part in path.split("."):
            step = inspect.getattr_static(step, part) if inspect.isclass(step) else getattr(step, part)
        assert inspect.isfunction(step), place
        assert step.__module__ != "oncegate.testing.faults"


@pytest.fixture
def steps(monkeypatch):
    """Provide steps of three kinds, with a point before and after each."""

    class Path:
        def plain(self) -> str:
            return "done"

        async def awaited(self) -> str:
            await asyncio.sleep(0)
            return "done"

        def future(self):
            return self.awaited()

    module = SimpleNamespace(Path=Path)
    monkeypatch.setitem(sys.modules, "steps", module)
    names = ("plain", "awaited", "future")
    points = {f"{when}_{name}": (when, f"steps:Path.{name}") for name in names for when in ("before", "after")}
    monkeypatch.setattr(faults, "POINTS", points)
    return Path


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["plain", "awaited", "future"])
async def test_a_step_fails_at_its_nth_passage_alone(steps, name, when):
    """A fault strikes once, before or after its step, awaited or not; the log has it."""
    told = []
    install([Fault("raise", f"{when}_{name}", 2, 0)], lambda event, **more: told.append((event, more)))
    path = steps()

    async def go() -> str:
        done = getattr(path, name)()
        return await done if inspect.isawaitable(done) else done

    assert await go() == "done"
    assert told == []
    with pytest.raises(Injected):
        await go()
    assert await go() == "done"
    assert told == [("fault injected", {"fault": f"raise@{when}_{name}:2"})]


def test_a_pause_stops_everything(steps):
    """A pause blocks the process for its length."""
    install([Fault("pause", "before_plain", 1, 150)], lambda *_, **__: None)
    began = time.monotonic()
    assert steps().plain() == "done"
    assert time.monotonic() - began >= 0.15


def test_a_kill_leaves_no_chance():
    """The process ends at once, by SIGKILL."""
    code = (
        "from oncegate.testing.faults import *; import oncegate.keys.digests\n"
        "install([parse_fault('kill@head:1')], lambda event, **more: print(event))\n"
        "import oncegate.gateway.first_step\n"
        "try: oncegate.gateway.first_step.FirstStep.decide(None, None)\n"
        "finally: print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == -9
    assert "alive" not in done.stdout
