"""The wheel: built from a clean copy, installed in a fresh environment beside proxy.py, used in an empty folder."""

import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

from oncegate import __version__
from oncegate.commands.init import CASES, GENERAL
from tests.parts import answering, ask, request, tracked, until

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "proxy/oncegate"
# One worker builds once.
pytestmark = pytest.mark.xdist_group("wheel")


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed; nothing of this tree or of its environment's settings is in reach."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=outside(**env), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def outside(**env: str) -> dict[str, str]:
    """Return the environment variables of somebody who has no checkout."""
    ours = ("ONCEGATE_", "PYTHON")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | env


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a clean copy in which an older build has left its files."""
    copy = tmp_path_factory.mktemp("copy")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for stale in ("build/lib/oncegate/stale.py", "build/lib/proxy/__init__.py", "build/lib/proxy/app.py"):
        (copy / stale).parent.mkdir(parents=True, exist_ok=True)
        (copy / stale).touch()
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", "dist", ".")
    run(*pip, cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and proxy.py in it. It borrows the other packages from the running one."""
    folder = tmp_path_factory.mktemp("home")
    venv.create(folder)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout[:-1])
    other = distribution("proxy.py")
    for file in other.files or []:
        if ".." not in file.parts:
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), packages / file)
    # Written last: pip must not find this tree's own installation through it.
    borrowed = [path for path in sys.path if path.endswith("site-packages") or path in site.getsitepackages()]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    return folder


# What is in it ...


def test_carries_the_package(wheel: Path) -> None:
    """Every module, script and example is in it, and of the older build nothing."""
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("oncegate/")}
    ours = {name.removeprefix("proxy/") for name in tracked() if name.startswith("proxy/oncegate/")}
    assert carried == ours
    assert {
        "oncegate/store/redis/lua/claim.lua",
        "oncegate/store/postgres/migrations/0001.sql",
        "oncegate/examples/general/oncegate.env",
        "oncegate/adaptation/page.html",
        "oncegate/admin/pages/templates/base.html",
        "oncegate/admin/pages/static/oncegate.css",
    } <= carried


def test_takes_one_name(wheel: Path) -> None:
    """At its top level are the package and what describes it; the licence is there."""
    names = zipfile.ZipFile(wheel).namelist()
    info = f"oncegate-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"oncegate", info}
    assert f"{info}/licenses/LICENSE" in names


def test_describes_itself(wheel: Path) -> None:
    """Its metadata has what an index shows, and the version of the package."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith("/METADATA"))
        lines = file.read(name).decode().splitlines()
    assert f"Version: {__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert "Author: The oncegate authors" in lines
    assert "Description-Content-Type: text/markdown" in lines
    assert any(line.startswith("Classifier: ") for line in lines)


# What it does, installed ...


def test_the_command(home: Path, tmp_path: Path) -> None:
    """It runs from any folder, under both of its names, and the code is the wheel's."""
    for command in ([home / "bin/oncegate"], [home / "bin/python", "-m", "oncegate"]):
        assert run(*command, "--version", cwd=tmp_path).stdout == f"oncegate {__version__}\n"
        checked = run(*command, "check", cwd=tmp_path, ONCEGATE_UPSTREAM="http://api.test")
        assert "ONCEGATE_UPSTREAM = http://api.test" in checked.stdout
    where = run(home / "bin/python", "-c", "import oncegate; print(oncegate.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(home)
    assert list(tmp_path.iterdir()) == []


PROXY_PY = """
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="proxy")
command.load()()
"""


def test_beside_proxy_py(home: Path, tmp_path: Path) -> None:
    """proxy.py's own command still works."""
    said = run(home / "bin/python", "-c", PROXY_PY, "--version", cwd=tmp_path).stdout
    assert said.strip() == distribution("proxy.py").version


FIRST = {
    GENERAL: request(),
    "payments": request(),
    "payments-postgres": request(),
    "webhooks": request("POST", "/webhooks/standard", None, b"{}", "webhook-id: evt_1"),
    "consumers": request(
        *("POST", "/kafka/orders", None, b"{}"), "Kafka-Topic: orders", "Kafka-Partition: 0", "Kafka-Offset: 7"
    ),
    "llm": request("POST", "/v1/chat/completions"),
    "agents": request(
        *("POST", "/a2a", None, b'{"id": 1, "method": "message/send", "params": {"message": {"messageId": "m"}}}'),
        "Content-Type: application/json",
    ),
    "double-click": request(
        *("POST", "/orders", None, b"item=7"), "Content-Type: application/x-www-form-urlencoded", "Cookie: s=1"
    ),
}


class Shell:
    """A shell in a folder, in which `oncegate` is the wheel's; ends with everything that it started."""

    def __init__(self, folder: Path, home: Path) -> None:
        self._folder, self._path = folder, f"{home / 'bin'}:{os.environ['PATH']}"
        self._running: subprocess.Popen[bytes] | None = None

    def env(self) -> dict[str, str]:
        anywhere = {"ONCEGATE_LISTEN": "127.0.0.1:0", "ONCEGATE_ADMIN_LISTEN": "127.0.0.1:0"}
        return outside(PATH=self._path, **anywhere)

    def start(self, commands: str) -> Path:
        """Start commands, and return the file that what they say goes to."""
        log = self._folder / "log"
        with log.open("wb") as file:
            self._running = subprocess.Popen(
                ["sh", "-c", commands],
                cwd=self._folder,
                env=self.env(),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return log

    def close(self) -> None:
        if self._running is not None:
            os.killpg(self._running.pid, signal.SIGTERM)
            self._running.wait(30)


@pytest.fixture
def shell(home: Path, tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path, home)
    yield shell
    shell.close()


def served_port(log: Path) -> int | None:
    """Return the public port, as soon as the proxy says that it serves."""
    found = re.search(r'^{.*"event": ?"serving".*}$', log.read_text(), re.MULTILINE)
    return int(json.loads(found[0])["public"].rpartition(":")[2]) if found else None


@pytest.mark.parametrize("case", [GENERAL, *CASES])
async def test_init(case: str, home: Path, tmp_path: Path, shell: Shell, upstream) -> None:
    """In an empty folder: init, the command that it prints next, and a request that is sent twice executes once."""
    folder = tmp_path
    arguments = [] if case == GENERAL else [case]
    printed = run(home / "bin/oncegate", "init", *arguments, cwd=folder).stdout
    assert sorted(path.name for path in folder.iterdir()) == ["oncegate.env", "rules.toml"]
    # The one thing that a person has to change is the address of the API.
    settings = folder / "oncegate.env"
    settings.write_text(re.sub(r"(?m)^(ONCEGATE_UPSTREAM=).*$", rf"\g<1>{upstream.url}", settings.read_text()))
    log = shell.start("\n".join(re.findall(r"^  (.+)$", printed, re.MULTILINE)))
    await until(lambda: served_port(log) is not None, 30)
    port = served_port(log)
    assert port is not None
    assert "ONCEGATE_RULES_FILE = rules.toml" in log.read_text()
    if case == "agents":
        result = b'{"jsonrpc": "2.0", "id": 1, "result": {}}'
        fields = b"Content-Type: application/json\r\nContent-Length: %d" % len(result)
        upstream.script = answering(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\n" + result)
    for word in (b"executed", b"replayed"):
        answer = await ask(port, FIRST[case])
        assert (answer.status, answer.header("oncegate-status")) == (200, word)
    assert len(upstream.received) == 1


@pytest.mark.parametrize("there", ["rules.toml", "oncegate.env"])
def test_init_overwrites_nothing(home: Path, tmp_path: Path, there: str) -> None:
    """With one of its files there, nothing is written, and the exit code is 2."""
    (tmp_path / there).write_text("mine")
    refused = subprocess.run(
        [home / "bin/oncegate", "init", "payments"], cwd=tmp_path, env=outside(), capture_output=True, text=True
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"{there} exists already")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(there, "mine")]
