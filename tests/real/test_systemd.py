"""The units in config/systemd/: what systemd says of them, and that a proxy needs nothing that they forbid."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parts import ROOT, Proxy, RawUpstream, ask, request
from tests.real.parts import INSTALLED

pytestmark = INSTALLED

FOLDER = ROOT / "config/systemd"
UNIT = (FOLDER / "oncegate.service").read_text()


def said(*command: str | Path) -> str:
    """Return what a command prints. It must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def allowed(group: str) -> set[str]:
    """Return the system calls of one of systemd's groups."""
    lines = [line.strip() for line in said("systemd-analyze", "syscall-filter", group).splitlines()[1:]]
    names = [line for line in lines if line and not line.startswith("#")]
    return {name for line in names for name in (allowed(line) if line.startswith("@") else {line})}


def filtered() -> set[str]:
    """Return the system calls that the unit lets through."""
    passed: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.+)$", UNIT, re.MULTILINE):
        calls = set().union(*map(allowed, line.removeprefix("~").split()))
        passed = passed - calls if line.startswith("~") else passed | calls
    return passed


def test_exposure() -> None:
    """systemd's own score of what a service could do, from 0 to 10: at most 2.0."""
    said("systemd-analyze", "security", "--offline=true", "--threshold=20", FOLDER / "oncegate.service")


def test_the_units_are_valid(tmp_path: Path) -> None:
    """With a program in the place that they name; systemd looks for it."""
    program = tmp_path / "oncegate"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in ("oncegate.service", "oncegate.socket"):
        (tmp_path / name).write_text((FOLDER / name).read_text().replace("/opt/oncegate/bin/oncegate", str(program)))
    assert said("systemd-analyze", "verify", "--man=no", *sorted(tmp_path.glob("oncegate.*"))) == ""


class Traced(Proxy):
    """A proxy whose system calls are written to a file, and those of all its processes."""

    @property
    def trace(self) -> Path:
        return self.folder / "calls"

    def _spawn(self) -> None:
        command = ["strace", "-f", "-qq", "-o", str(self.trace), sys.executable, "-m", "oncegate", "serve"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=self._env, stderr=log, stdout=log, cwd=self.folder)


@pytest.mark.timeout(180)
async def test_a_proxy_needs_nothing_that_the_unit_forbids(upstream: RawUpstream, tmp_path: Path) -> None:
    """No system call that its filter refuses, no memory to write and execute, in a life with all that can happen."""
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "all"\npath = "/**"\n')
    settings = {"WORKERS": 2, "RULES_FILE": rules, "DRAIN_S": 5, "SPOOL_DIR": tmp_path}
    proxy = Traced(upstream.url, "embedded", tmp_path, settings)
    proxy.start()
    # strace passes no signal on.
    supervisor = int(Path(f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children").read_text().split()[0])
    try:
        for key, body in (("small", b"x"), ("spooled", bytes(3 << 20)), ("small", b"x")):
            await ask(proxy.port, request(key=key, body=body))
        assert proxy.admin("/metrics")[0] == 200
        for number, line in ((signal.SIGHUP, '"event": "reloaded"'), (signal.SIGUSR2, "workers replaced")):
            before = proxy.log().count(line)
            os.kill(supervisor, number)
            deadline = time.monotonic() + 60
            while proxy.log().count(line) == before:
                assert time.monotonic() < deadline, proxy.log()
                time.sleep(0.05)
    finally:
        os.kill(supervisor, signal.SIGTERM)
        proxy.process.wait(60)
    calls = re.findall(r"^\d+ +([a-z_0-9]+)\(", proxy.trace.read_text(), re.MULTILINE)
    assert {"execve", "epoll_wait", "sendto"} & set(calls)
    assert set(calls) - filtered() == set()
    assert re.findall(r"PROT_WRITE\|PROT_EXEC|mprotect\([^)]*PROT_EXEC", proxy.trace.read_text()) == []
