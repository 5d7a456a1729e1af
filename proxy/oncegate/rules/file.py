"""The rules file as it is written: its tables, and the line on which each field stands, for messages."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES = ("rule", "upstream")
MOST_BYTES = 4_194_304

_HEADER = re.compile(r"\s*\[\[?\s*[\"']?(?P<table>[\w-]+)[\"']?\s*(?:\.\s*(?P<below>[^\]]+?)\s*)?\]\]?")
_FIELD = re.compile(r"\s*[\"']?(?P<name>[\w-]+)[\"']?\s*(?:\.[^=]*)?=")


class FileError(Exception):
    """The file cannot be read as TOML with the tables it should have; each line says where and why."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        super().__init__("\n".join(errors))


@dataclass(frozen=True, slots=True)
class Table:
    """One [[rule]] or [[upstream]] as written. `lines` has the line of each field, and its own under ""."""

    kind: str
    number: int  # from 1
    fields: dict[str, Any]
    lines: dict[str, int]

    @property
    def label(self) -> str:
        name = self.fields.get("name")
        return f'{self.kind} "{name}"' if isinstance(name, str) and name.isprintable() else f"{self.kind} {self.number}"

    def complaint(self, file: Path, field: str, reason: str) -> str:
        """Return what is wrong, with file, line and rule."""
        where = f"{file}:{self.lines.get(field, self.lines.get('', 1))}"
        return f"{where}: {self.label}: {field + ': ' if field else ''}{reason}"


def read(file: Path) -> list[Table]:
    """Return all tables of a rules file, in order. Raises FileError."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise FileError([f"{file}: cannot be read: {error.strerror}"]) from None
    if len(content) > MOST_BYTES:
        raise FileError([f"{file}: is over {MOST_BYTES} bytes"])
    try:
        text = content.decode()
        document = tomllib.loads(text)
    except UnicodeDecodeError:
        raise FileError([f"{file}: is not UTF-8 text"]) from None
    except tomllib.TOMLDecodeError as error:
        raise FileError([_not_toml(file, str(error), text.count("\n") + 1)]) from None
    except RecursionError:
        raise FileError([f"{file}: is nested too deep"]) from None
    return _tables(file, document, _lines(text))


def _not_toml(file: Path, reason: str, last_line: int) -> str:
    place = re.search(r" \(at line (\d+), column (\d+)\)", reason)
    if place is None:
        return f"{file}:{last_line}: is not TOML: {reason}"
    return f"{file}:{place[1]}: is not TOML: {reason.replace(place[0], f' (column {place[2]})')}"


def _tables(file: Path, document: dict[str, Any], lines: dict[tuple[str, int], dict[str, int]]) -> list[Table]:
    errors = []
    tables = []
    for kind, found in document.items():
        first = lines.get((kind, 1), {}).get("", lines.get(("", 0), {}).get(kind, 1))
        if kind not in TABLES:
            errors.append(f"{file}:{first}: {kind} is unknown; the file consists of [[rule]] and [[upstream]] tables")
        elif not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            errors.append(f"{file}:{first}: {kind} must be written as [[{kind}]]")
        else:
            places = ((number, lines.get((kind, number), {"": first})) for number in range(1, len(found) + 1))
            tables += [Table(kind, number, one, place) for one, (number, place) in zip(found, places, strict=True)]
    if errors:
        raise FileError(errors)
    return tables


def _lines(text: str) -> dict[tuple[str, int], dict[str, int]]:
    """Return, for each table (kind, number), the line of its header under "" and of its fields."""
    found: dict[tuple[str, int], dict[str, int]] = {}
    counts = dict.fromkeys(TABLES, 0)
    current = found.setdefault(("", 0), {})
    below = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            kind, below = header["table"], header["below"] or ""
            if not below:
                counts[kind] = counts.get(kind, 0) + 1
                current = found.setdefault((kind, counts[kind]), {"": number})
            else:
                current.setdefault(below, number)
        elif (field := _FIELD.match(line)) and not below:
            current.setdefault(field["name"], number)
    return found
