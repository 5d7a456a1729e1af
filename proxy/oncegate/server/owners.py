"""The owners of claims in an embedded store: each process that claims holds a file lock of its own while it lives.

The kernel releases the lock when the process has ended, in whatever way, and not before (flock(2)). An owner whose lock
is free can therefore be known to be dead: also where a supervisor was killed and its workers still drain, where a
process is only suspended, and where a process id was given again. Proxies that connect to the store from outside hold
no lock here: nothing is known of them, and their keys keep their lease.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

from oncegate.store.record_view import StoreError
from oncegate.store.redis.orphans import mark_orphans


class Owners:
    """The owners of claims in the embedded store at `url`, which is the path of its socket in the data folder.

    `log(event, **fields)` writes to the operator's log.
    """

    def __init__(self, url: str, log: Callable[..., None]) -> None:
        self.url, self._log = url, log
        self._folder = Path(unquote(url.removeprefix("unix://"))).parent / "owners"
        self._own: tuple[int, Path] | None = None

    def register(self, token_prefix: bytes) -> None:
        """Hold the lock of an owner from now on. Without it, an owner that dies leaves its keys to their lease."""
        file = self._folder / token_prefix.hex()
        try:
            self._own = self._lock_new(file), file
        except OSError as error:
            self._log("owner not registered", reason=str(error))

    def unregister(self) -> None:
        """Forget the owner that was registered: it has nothing in flight, and claims nothing more."""
        if self._own is not None:
            lock, file = self._own
            file.unlink(missing_ok=True)
            os.close(lock)
            self._own = None

    def _lock_new(self, file: Path) -> int:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        while True:
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Between these two lines the file could be taken for a dead owner's, and be removed.
            if os.fstat(lock).st_nlink:
                return lock
            os.close(lock)

    async def mark_orphans(self) -> None:
        """Mark the keys unknown that dead owners left in flight. A store that fails leaves them to their lease."""
        with contextlib.ExitStack() as locks:
            try:
                dead = dict(self._dead(locks))
                count = await mark_orphans(self.url, dead) if dead else 0
            except (OSError, StoreError) as error:
                self._log("keys of a killed proxy keep their lease", reason=str(error))
                return
            for file in dead.values():
                file.unlink(missing_ok=True)
        if count:
            self._log("keys of a killed proxy are unknown", keys=count)

    def _dead(self, locks: contextlib.ExitStack) -> Iterator[tuple[bytes, Path]]:
        """Yield the dead owners and their files. `locks` holds the locks, so that nobody else finds them meanwhile."""
        for file in self._folder.iterdir() if self._folder.is_dir() else ():
            lock = os.open(file, os.O_RDWR | os.O_CLOEXEC)
            locks.callback(os.close, lock)
            with contextlib.suppress(BlockingIOError, ValueError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield bytes.fromhex(file.name), file
