"""Starts proxies by forking one process that has everything imported: 30 ms each instead of 600.

Reads lines of JSON, {"env": ..., "folder": ..., "log": ...}, and answers each with the proxy's process id. What the
proxy does from there on, to its exit, is what `oncegate serve` does.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import oncegate.server.serve  # what `serve` imports when it runs
from oncegate.commands import cli, demo
from oncegate.observe import logs
from tests.parts import Proxy, until

__all__ = ["Forked", "Zygote", "demo", "logs", "oncegate"]


class Zygote:
    """The process that is forked. `sources`: of another build, to import it from."""

    def __init__(self, sources: Path | None = None) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
        if sources:
            env["PYTHONPATH"] = str(sources)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )

    def fork(self, env: dict[str, str], folder: Path, log: Path) -> "Child":
        assert self.process.stdin
        assert self.process.stdout
        order = {"env": env, "folder": str(folder), "log": str(log)}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        return Child(int(self.process.stdout.readline()), code_of(log))

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Child:
    """What of a Popen a Proxy uses; the process that reaps it leaves its exit code in a file."""

    def __init__(self, pid: int, code: Path) -> None:
        self.pid, self.returncode = pid, None
        self._code = code

    def poll(self) -> int | None:
        if self.returncode is None and self._code.exists():
            self.returncode = int(self._code.read_text())
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, "the proxy did not end in time"
            time.sleep(0.002)
        return code


class Forked(Proxy):
    """A proxy that is a fork of a zygote."""

    def __init__(
        self, zygote: Zygote, upstream: str, store_url: str, folder: Path, settings: dict[str, object]
    ) -> None:
        super().__init__(upstream, store_url, folder, settings)
        self._zygote = zygote

    async def begin(self) -> None:
        """Start it and wait until it serves, while others do the same."""
        self._begin()
        await until(self.serves, 60)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it ended, and was reaped already
            super().signal(number)

    def _spawn(self) -> None:
        self.process = self._zygote.fork(self._env, self.folder, self._log)  # type: ignore[assignment]


def written_layout() -> dict[str, object]:
    """Return the setting by which a proxy of this build keeps its records in one layout all through a test.

    `TEST_RECORD_LAYOUT=packed make ...` runs the same tests with packed records.
    """
    return {"RECORD_LAYOUT": os.environ.get("TEST_RECORD_LAYOUT", "hash")}


@contextmanager
def standing_proxy(
    zygote: Zygote,
    store_url: str,
    folder: Path,
    settings: dict[str, object] | None = None,
    *,
    rules: str = "",
    path: str = "",
) -> Iterator[Proxy]:
    """A started proxy for all tests of a module; `standing_upstream` serves its upstream."""
    settings = written_layout() | (settings or {})
    if rules:
        (folder / "rules.toml").write_text(rules)
        settings["RULES_FILE"] = "rules.toml"
    with socket.create_server(("127.0.0.1", 0)) as sock:
        proxy = Forked(zygote, f"http://127.0.0.1:{sock.getsockname()[1]}{path}", store_url, folder, settings)
        proxy.upstream_socket = sock
        proxy.start()
        yield proxy
        proxy.close()


def code_of(log: Path) -> Path:
    return log.with_suffix(".code")


def keep(order: dict[str, object]) -> None:
    """Fork the proxy, say its process id, and leave its exit code in a file that comes whole: minus what killed it."""
    if not (pid := os.fork()):
        serve(order)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    code = code_of(Path(str(order["log"])))
    code.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
    code.with_suffix(".part").rename(code)
    os._exit(0)


def serve(order: dict[str, object]) -> None:
    """Become the proxy."""
    os.environ.clear()
    os.environ.update(order["env"])  # type: ignore[call-overload]
    os.chdir(str(order["folder"]))
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, number)
    sys.exit(cli.main(["serve"]))


def main() -> None:
    """Fork for each order, until there are no more."""
    gc.collect()
    gc.freeze()  # so that not every one of them looks through the same
    for line in sys.stdin:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not os.fork():
            keep(json.loads(line))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the keepers are reaped by the kernel


if __name__ == "__main__":
    main()
