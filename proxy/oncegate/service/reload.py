"""A reload, at SIGHUP: what files say is read again, checked as a whole, and then taken over as a whole.

Each part that follows files has a function that reads and checks, and returns what takes the result over. Nothing is
taken over before all of them have succeeded, so that a file with a mistake changes nothing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from oncegate.observe import logs
from oncegate.settings.errors import SettingsError
from oncegate.settings.files import digest_of
from oncegate.settings.loading import reload_settings
from oncegate.settings.settings import Settings
from oncegate.settings.wording import variable_name

CHANGED_MEANWHILE = "files changed while they were read; send SIGHUP again"

TakeOver = Callable[[], None]
# Reads and checks what these settings name. Raises SettingsError and OSError, and has changed nothing then.
Prepare = Callable[[Settings], TakeOver | Awaitable[TakeOver]]


class Reload:
    """The reloads of one process. `parts`: what follows files, in the order in which they are taken over.

    `files`: the digest of each file that was taken over last, by its setting. `is_quiet`: another process logs which
    settings need a restart.
    """

    def __init__(self, settings: Settings, parts: Sequence[Prepare], log: Any, *, is_quiet: bool = False) -> None:
        self.settings, self._parts, self._log, self._is_quiet = settings, list(parts), log, is_quiet
        self.files = digests(settings)
        # Unix times; the start counts as a reload. 0: none failed.
        self.succeeded_s, self.failed_s = time.time(), 0.0
        self._is_wanted = self._is_ended = False
        self._task: asyncio.Task[None] | None = None
        # Entered around each reload.
        self.announced: Callable[[], AbstractContextManager[None]] = nullcontext

    def add(self, part: Prepare) -> None:
        """Let one more part follow its files."""
        self._parts.append(part)

    def end(self) -> None:
        """Reload no more: the process is about to end."""
        self._is_ended = True

    def __call__(self) -> None:
        """Reload soon: at once, or again after the reload that is under way."""
        if self._is_ended:
            self._log.info("nothing to reload")
            return
        self._is_wanted = True
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            while self._is_wanted and not self._is_ended:
                self._is_wanted = False
                with self.announced():
                    await self._reload()
        finally:
            self._task = None

    async def _reload(self) -> None:
        before = digests(self.settings)
        try:
            settings, restarts = reload_settings(self.settings)
            take_overs = await self._prepared(settings)
        except SettingsError as error:
            return self._refused(error.errors)
        if digests(self.settings) != before:
            return self._refused([CHANGED_MEANWHILE])
        self.settings, self.files, self.succeeded_s = settings, before, time.time()
        logs.set_level(settings.log_level)
        for take_over in take_overs:
            take_over()
        for name in () if self._is_quiet else restarts:
            self._log.warning("changed setting needs a restart", setting=name)
        return None

    async def _prepared(self, settings: Settings) -> list[TakeOver]:
        """Return what takes each part over. Raises SettingsError with the problems of all of them."""
        prepared: list[TakeOver] = []
        problems: list[str] = []
        for part in self._parts:
            try:
                take_over = part(settings)
                prepared.append(await take_over if isinstance(take_over, Awaitable) else take_over)
            except SettingsError as error:
                problems += error.errors
            except OSError as error:  # What OpenSSL makes of a certificate.
                problems.append(str(error))
        if problems:
            raise SettingsError(problems)
        return prepared

    def _refused(self, reasons: Iterable[str]) -> None:
        self.failed_s = time.time()
        self._log.error("reload refused, nothing changed", reasons=list(reasons))


def digests(settings: Settings) -> dict[str, str]:
    """Return the digest of each file that a reload reads again, by the variable that names it."""
    files = {name: [value] for name, value in settings if isinstance(value, Path) and value.is_file()}
    if settings.pages_dir is not None:
        files["pages_dir"] = sorted(settings.pages_dir.glob("*.html"))
    return {variable_name(name): digest_of(paths) for name, paths in files.items()}
