"""What connections to the store authenticate with, as a reload finds it: credentials, and certificates for TLS."""

from typing import Any

from oncegate.service.reload import TakeOver
from oncegate.settings.errors import SettingsError
from oncegate.settings.files import digest_of
from oncegate.settings.postgres_url import files_of, is_postgres
from oncegate.settings.settings import Settings
from oncegate.store.opening import login_of
from oncegate.store.store import LoginRefused, Store, StoreLogin


class FollowedLogin:
    """The login of an open store, which follows the settings and their files. `log`: a logger of structlog."""

    def __init__(self, store: Store, settings: Settings, log: Any) -> None:
        self._store, self._log = store, log
        self._version = _version(login_of(settings))

    async def prepare(self, settings: Settings) -> TakeOver:
        """Try the login at the store, if it is another one; what is returned uses it for new connections.

        Raises SettingsError where the store refuses it, and OSError for files that cannot be used.
        """
        login = login_of(settings)
        if (version := _version(login)) == self._version:
            return lambda: None
        try:
            follow = await self._store.prepare_login(login)
        except LoginRefused as error:
            raise SettingsError([f"ONCEGATE_STORE_URL: the store refuses its new credentials: {error}"]) from None

        def take_over() -> None:
            follow()
            self._version = version
            self._log.info("store credentials replaced")

        return take_over


def _version(login: StoreLogin) -> tuple[str, str]:
    """Return what differs for another login: the URL, and a digest of the files."""
    files = files_of(login.url).values() if is_postgres(login.url) else filter(None, login[1:])
    return login.url, digest_of(files)
