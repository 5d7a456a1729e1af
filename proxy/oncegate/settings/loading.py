"""Loads the settings from the environment, from `.env` and from files, and describes them."""

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from oncegate.settings.addresses import Origin
from oncegate.settings.contradictions import contradictions_in
from oncegate.settings.errors import SettingsError
from oncegate.settings.files import MAX_SECRET_BYTES, read_env_file, read_text
from oncegate.settings.groups.postgres import POSTGRES_DEFAULTS
from oncegate.settings.settings import ENV_FILE, PREFIX, SECRETS, Settings
from oncegate.settings.store_url import masked, servers_in
from oncegate.settings.wording import complaint, number_text, variable_name

# Variables that Kubernetes and Docker set for a service with the name oncegate.
_INJECTED = re.compile(
    r"ONCEGATE_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)"
)

# What a reload takes over; the files that other settings name are read again by whoever uses them.
CREDENTIALS = ("store_url", "store_password")
RELOADED = ("log_level", *CREDENTIALS)
# Settings of other commands.
NOT_FOR_PROXIES = ("migrate_url",)

# What the table shows where a default is none, depends on the machine, or does not exist.
_SHOWN = {
    "upstream": "required",
    "hosts": "any",
    "upstream_ca_file": "system",
    "data_dir": "`./.oncegate`",
    "secret": "empty",
    "migrate_url": "`ONCEGATE_STORE_URL`",
    "spool_dir": "the temporary folder",
}


def load_settings(unused: Iterable[str] = ()) -> Settings:
    """Return the settings in effect. Raises SettingsError with all problems.

    `unused`: settings that the caller does not use. They need not be set, and may contradict others.
    """
    variables, problems = _variables()
    contents, of_files = _secrets_from_files(variables)
    given = {name: variables[variable_name(name)] for name in Settings.model_fields if variable_name(name) in variables}
    settings, invalid = _validate({name: _substitute(name) for name in unused} | given | contents)
    problems += [*of_files, *_unknown(variables), *invalid.values(), *_contradictions(settings, {*invalid, *unused})]
    if problems:
        raise SettingsError(problems)
    return settings


def reload_settings(current: Settings) -> tuple[Settings, list[str]]:
    """Return the settings after a reload, and the variables whose new values need a restart. Raises SettingsError.

    A process keeps every setting that is not in RELOADED, and the servers of the store.
    """
    found = load_settings()
    urls = [servers_in(one.store_url.get_secret_value()) for one in (current, found)]
    names = RELOADED if urls[0] == urls[1] else [name for name in RELOADED if name not in CREDENTIALS]
    after = current.model_copy(update={name: getattr(found, name) for name in names})
    changed = [name for name in Settings.model_fields if getattr(after, name) != getattr(found, name)]
    return after, [variable_name(name) for name in changed if name not in NOT_FOR_PROXIES]


def describe(settings: Settings) -> str:
    """Return the settings as lines of `NAME = value`, without secrets."""
    return "\n".join(f"{variable_name(name)} = {_text(name, value)}" for name, value in settings)


def table(names: Iterable[str] = tuple(Settings.model_fields)) -> str:
    """Return the reference table of these settings, as Markdown."""
    fields = Settings.model_fields
    rows = [
        f"| `{variable_name(name)}` | {_default(name, fields[name].default)} | {fields[name].description} |"
        for name in names
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows, ""])


def _default(name: str, value: object) -> str:
    shown = _SHOWN.get(name) or ("none" if _is_none(value) else f"`{_text(name, value)}`")
    return f"{shown}; in PostgreSQL `{_text(name, POSTGRES_DEFAULTS[name])}`" if name in POSTGRES_DEFAULTS else shown


def _variables() -> tuple[dict[str, str], list[str]]:
    """Return the variables with our prefix, and the problems of `.env`.

    The environment overrides `.env`; an empty variable counts as unset.
    """
    of_file, problems = read_env_file(ENV_FILE, PREFIX)
    variables = [*of_file, *os.environ.items()]
    # A name may be in any case.
    return {name.upper(): value for name, value in variables if value and name.upper().startswith(PREFIX)}, problems


def _secrets_from_files(variables: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the secrets whose <NAME>_FILE is set, and the problems with those files."""
    contents: dict[str, Any] = {}
    problems = []
    for name in SECRETS:
        variable = variable_name(name)
        if (path := variables.get(f"{variable}_FILE")) is None:
            continue
        if variable in variables:
            problems.append(f"{variable}_FILE: contradicts {variable}, which is also set")
        try:
            contents[name] = _content(path)
        except ValueError as error:
            problems.append(f"{variable}_FILE: {error}")
    return contents, problems


def _content(path: str) -> str:
    # Editors and `echo` write a line end, which is not part of the secret.
    text = read_text(path, MAX_SECRET_BYTES).rstrip("\r\n")
    # An empty file is a mount that failed: as ONCEGATE_SECRET it would switch the keyed digests off.
    if not text:
        raise ValueError("the file is empty")
    return text


def _unknown(variables: Iterable[str]) -> list[str]:
    known = [variable_name(name) for name in Settings.model_fields] + [
        f"{variable_name(name)}_FILE" for name in SECRETS
    ]
    unknown = sorted(name for name in set(variables).difference(known) if not _INJECTED.fullmatch(name))
    # With a cutoff of 0 there always is a nearest name.
    return [f"{name}: is unknown; did you mean {get_close_matches(name, known, 1, 0)[0]}?" for name in unknown]


def _validate(given: dict[str, Any]) -> tuple[Settings, dict[str, str]]:
    """Return the settings, and the problem of each invalid one by its name.

    An invalid setting has a valid substitute, so that contradictions among the others are reported as well.
    """
    try:
        return Settings(**given), {}
    except ValidationError as error:
        invalid = {str(detail["loc"][0]): _problem(detail) for detail in error.errors(include_input=False)}
    return Settings(**given | {name: _substitute(name) for name in invalid}), invalid


def _substitute(name: str) -> Any:
    if name == "upstream":
        return Origin("http", "upstream.invalid", 80)
    return Settings.model_fields[name].get_default(call_default_factory=True)


def _problem(detail: ErrorDetails) -> str:
    return f"{variable_name(str(detail['loc'][0]))}: {complaint(detail)}"


def _contradictions(settings: Settings, invalid: Iterable[str]) -> list[str]:
    return [
        f"{variable_name(row.first)}: {row.complaint} {variable_name(row.second)}"
        for row in contradictions_in(settings, Settings.model_fields)
        if {row.first, row.second}.isdisjoint(invalid)
    ]


def _is_none(value: object) -> bool:
    return value is None or value in ((), "")


def _text(name: str, value: object) -> str:
    """Return a value as an operator writes it, without secrets."""
    if _is_none(value):
        return _SHOWN.get(name, "none")
    if isinstance(value, SecretStr):
        text = value.get_secret_value()
        return "empty" if not text else masked(text) if name.endswith("_url") else "set"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else number_text(value)
