"""The settings: one field for each variable, with its type, its default and its description, in `groups/`.

The descriptions are the reference page. `loading.load_settings` reads the environment and reports all problems at once,
without repeating a secret; no other module reads the environment.
"""

from pydantic_settings import BaseSettings, SettingsConfigDict

from oncegate.settings.groups.access import AccessSettings
from oncegate.settings.groups.browsers import BrowserSettings
from oncegate.settings.groups.clients import ClientSettings
from oncegate.settings.groups.keys import KeySettings
from oncegate.settings.groups.operation import OperationSettings
from oncegate.settings.groups.own_path import OwnPathSettings
from oncegate.settings.groups.postgres import PostgresSettings
from oncegate.settings.groups.store import StoreSettings
from oncegate.settings.groups.upstreams import UpstreamSettings

PREFIX = "ONCEGATE_"
ENV_FILE = ".env"
# Settings that <NAME>_FILE can hold as well.
SECRETS = ("secret", "store_url", "store_password", "migrate_url")


# Pydantic takes the fields of the last base first.
class Settings(
    AccessSettings,
    BrowserSettings,
    OperationSettings,
    UpstreamSettings,
    PostgresSettings,
    OwnPathSettings,
    StoreSettings,
    KeySettings,
    ClientSettings,
    BaseSettings,
):
    """The operator's choices."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        # Compose files pass "${NAME:-}" for an unset variable.
        env_ignore_empty=True,
        # Lists are comma lists, not JSON.
        enable_decoding=False,
        # A .env serves other programs, too. `load_settings` reports unknown names under our own prefix.
        extra="ignore",
        frozen=True,
        # Without this, an error message would repeat an invalid secret.
        hide_input_in_errors=True,
        # An infinite time would fail only when a timer uses it.
        allow_inf_nan=False,
    )
