"""What the commands on a store share: the open store, the operator's name, exit codes and their error."""

import os
import pwd
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from enum import IntEnum

from oncegate.server.embedded import socket_url
from oncegate.settings.errors import SettingsError
from oncegate.settings.postgres_url import is_postgres
from oncegate.settings.settings import Settings
from oncegate.store.opening import open_store, postgres_options
from oncegate.store.record_view import StoreError
from oncegate.store.store import Store, StoreConfig

TIMEOUT_MS = 5000


class KeysExit(IntEnum):
    """The exit code of an `oncegate keys` command."""

    DONE = 0
    # Nothing was changed, or the store did not confirm the change.
    NOT_DONE = 1
    USAGE_ERROR = 2


class CommandError(Exception):
    """Why a command stops without a change. The text is for the operator, `code` for the shell."""

    def __init__(self, text: str, code: KeysExit = KeysExit.NOT_DONE) -> None:
        super().__init__(text)
        self.code = code


def usage_error(text: str) -> CommandError:
    """Return the error for arguments that make no sense."""
    return CommandError(text, KeysExit.USAGE_ERROR)


@asynccontextmanager
async def opened_store(settings: Settings, actor: str) -> AsyncIterator[Store]:
    """Open the store for the time of a block. Raises CommandError if it is not reachable, or fails in the block.

    `actor`: who the audit trail says acted.
    """
    url = settings.store_url.get_secret_value()
    config = StoreConfig(
        url=socket_url(settings.data_dir) if url == "embedded" else url,
        timeout_ms=TIMEOUT_MS,
        patience_s=TIMEOUT_MS / 1000,
        # Nothing goes on after a command.
        background=lambda work: work.close(),
        durability=settings.durability if is_postgres(url) else "memory",
        postgres=replace(postgres_options(settings), actor=actor.encode("utf-8", "replace")),
    )
    try:
        store = open_store(config)
    except SettingsError as error:
        raise CommandError(str(error)) from error
    store.start()
    try:
        if not await store.wait_up(TIMEOUT_MS / 1000):
            reason = store.not_ready_reason() or "the store is not reachable"
            raise CommandError(f"{reason}{_embedded_hint(settings)}")
        yield store
    except StoreError as error:
        # The store's own checks name what helps, such as a migration; the error of a server does not.
        reason = store.not_ready_reason() or "the store"
        raise CommandError(f"{reason}: {error}") from error
    finally:
        await store.close()


def _embedded_hint(settings: Settings) -> str:
    """Return where the embedded store is looked for, as it runs only while its proxy does; empty for another store."""
    if settings.store_url.get_secret_value() != "embedded":
        return ""
    folder = settings.data_dir.absolute()
    return f"; the embedded store in {folder} runs while `oncegate serve` does, with the same ONCEGATE_DATA_DIR"


def operator_name() -> str:
    """Return the name of who runs this command: `root`, or `alice as root` behind sudo."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        # A container may run as a user id without a name.
        name = str(os.getuid())
    sudo_user = os.environ.get("SUDO_USER")
    return f"{sudo_user} as {name}" if sudo_user else name
