"""Reads the settings from the environment, `.env` and files, and shows them."""

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from oncegate.settings.addresses import Origin, masked
from oncegate.settings.contradictions import CONTRADICTIONS
from oncegate.settings.settings import ENV_FILE, PREFIX, SECRETS, Settings, SettingsError
from oncegate.settings.wording import _number, _variable, worded

# What Kubernetes and Docker inject for a service called oncegate.
_INJECTED = re.compile(
    r"ONCEGATE_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)"
)

# What a person reads where a default is none, depends on the machine, or does not exist.
_WORDS = {
    "upstream": "required",
    "hosts": "any",
    "upstream_ca_file": "system",
    "data_dir": "`./.oncegate`",
    "secret": "empty",
    "spool_dir": "the temporary folder",
}


def load() -> Settings:
    """Return the settings in effect; SettingsError names every problem at once."""
    variables = _variables()
    contents, problems = _secrets_from_files(variables)
    settings, invalid = _validate(contents)
    problems += [*_unknown(variables), *invalid.values(), *_contradictions(settings, invalid)]
    if problems:
        raise SettingsError(problems)
    return settings


def describe(settings: Settings) -> str:
    """Return what is in effect, one `NAME = value` a line, secrets masked."""
    return "\n".join(f"{_variable(name)} = {_text(name, value)}" for name, value in settings)


def table() -> str:
    """Return the README's table of settings."""
    rows = [
        f"| `{_variable(name)}` | {_default(name, field.default)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows, ""])


def _default(name: str, value: object) -> str:
    return _WORDS.get(name) or ("none" if _is_none(value) else f"`{_text(name, value)}`")


def _variables() -> dict[str, str]:
    """Return what is set under the prefix: a real variable wins over the file, an empty one is not set."""
    try:
        found = [*dotenv_values(ENV_FILE, encoding="utf-8").items(), *os.environ.items()]
    except (OSError, UnicodeDecodeError):
        raise SettingsError([f"{ENV_FILE}: cannot be read as UTF-8 text"]) from None
    return {name.upper(): value for name, value in found if value and name.upper().startswith(PREFIX)}


def _secrets_from_files(variables: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the secrets whose <NAME>_FILE is set, and what is wrong with those files."""
    contents: dict[str, Any] = {}
    problems = []
    for name in SECRETS:
        variable = _variable(name)
        if (path := variables.get(f"{variable}_FILE")) is None:
            continue
        if variable in variables:
            problems.append(f"{variable}_FILE: contradicts {variable}, which is set too")
        try:
            contents[name] = _content(path)
        except ValueError as error:
            problems.append(f"{variable}_FILE: {error}")
    return contents, problems


def _content(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("cannot be read as UTF-8 text") from None
    if not text:
        raise ValueError("the file is empty")
    return text


def _unknown(variables: Iterable[str]) -> list[str]:
    known = [_variable(name) for name in Settings.model_fields] + [f"{_variable(name)}_FILE" for name in SECRETS]
    unknown = sorted(name for name in set(variables).difference(known) if not _INJECTED.fullmatch(name))
    return [f"{name}: is unknown; did you mean {get_close_matches(name, known, 1, 0)[0]}?" for name in unknown]


def _validate(contents: dict[str, Any]) -> tuple[Settings, dict[str, str]]:
    """Return the settings and what is wrong with single ones; stand-ins for those let the rest be compared."""
    try:
        return Settings(**contents), {}
    except ValidationError as error:
        invalid = {str(detail["loc"][0]): _complaint(detail) for detail in error.errors(include_input=False)}
    return Settings(**contents | {name: _stand_in(name) for name in invalid}), invalid


def _stand_in(name: str) -> Any:
    if name == "upstream":
        return Origin("http", "upstream.invalid", 80)
    return Settings.model_fields[name].get_default(call_default_factory=True)


def _complaint(detail: ErrorDetails) -> str:
    return f"{_variable(str(detail['loc'][0]))}: {worded(detail)}"


def _contradictions(settings: Settings, invalid: Iterable[str]) -> list[str]:
    return [
        f"{_variable(first)}: {text} {_variable(second)}"
        for first, text, second, contradict in CONTRADICTIONS
        if {first, second}.isdisjoint(invalid) and contradict(getattr(settings, first), getattr(settings, second))
    ]


def _is_none(value: object) -> bool:
    return value is None or value == ()


def _text(name: str, value: object) -> str:
    """Return a value as a person writes it, without what is secret in it."""
    if _is_none(value):
        return _WORDS.get(name, "none")
    if isinstance(value, SecretStr):
        text = value.get_secret_value()
        return masked(text) if name == "store_url" else "set" if text else "empty"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else _number(value)
