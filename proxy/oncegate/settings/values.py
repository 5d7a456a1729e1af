"""The types of settings: a range or a parser for each kind of value."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from oncegate.settings.addresses import Address, Origin, parse_address, parse_origin
from oncegate.settings.cores import usable
from oncegate.settings.files import read_file
from oncegate.settings.names import parse_list

# A longer time is a mistaken unit, and comes near the limit of Redis's expiry.
TEN_YEARS_S = 315_360_000
DAY_MS = 86_400_000
MEBIBYTE = 1 << 20
PIBIBYTE = 1 << 50
MILLION = 1_000_000
MAX_WORKERS = 1024


def from_text(parse: Callable[[str], object]) -> BeforeValidator:
    """Return a validator that parses text from the environment; a default is a value already and stays."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def list_of(parse: Callable[[str], object]) -> BeforeValidator:
    """Return a validator that parses each member of a comma list, to a tuple."""
    return from_text(lambda text: tuple(parse(member) for member in parse_list(text)))


def _readable(text: str) -> Path:
    # Read once now: a missing permission stops the start, rather than the first connection.
    read_file(text)
    return Path(text)


def parse_workers(text: str) -> object:
    """Return the number of usable cores for `auto`, other text as it is."""
    if text.strip().lower() == "auto":
        return min(usable(), MAX_WORKERS)
    if not text.strip().isdecimal():
        raise ValueError("must be a whole number, or auto")
    return text


def temporary_folder() -> Path:
    """Return the system's folder for temporary files."""
    try:
        return Path(tempfile.gettempdir())
    # A read-only container may have none. The check for a writable folder then reports the setting by its name.
    except FileNotFoundError:
        return Path("/tmp")


ListenAddress = Annotated[Address, from_text(parse_address)]
BaseUrl = Annotated[Origin, from_text(parse_origin)]
OptionalUrl = Annotated[Origin | None, from_text(parse_origin)]
ReadableFile = Annotated[Path | None, from_text(_readable)]
Seconds = Annotated[float, Field(gt=0, le=TEN_YEARS_S)]
# 0 for ever.
SecondsOrForever = Annotated[float, Field(ge=0, le=TEN_YEARS_S)]
SecondsOrZero = Annotated[float, Field(ge=0, le=TEN_YEARS_S)]
Bytes = Annotated[int, Field(ge=1, le=PIBIBYTE)]
# 0 for no limit.
BytesOrNone = Annotated[int, Field(ge=0, le=PIBIBYTE)]
Count = Annotated[int, Field(ge=1, le=MILLION)]
