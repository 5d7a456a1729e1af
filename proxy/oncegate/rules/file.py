"""Reads a rules file: its tables, and the line of each field for messages.

`tomllib` does not report lines, so that a second, line-wise pass looks for them. It may miss a field that is
written in an unusual way; the message then has the line of the table.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oncegate.settings.files import read_text

TABLES = ("rule", "upstream")

# `[[rule]]`, or `[rule.headers]` with `headers` as the nested table.
_HEADER = re.compile(r"\s*\[\[?\s*[\"']?(?P<table>[\w-]+)[\"']?\s*(?:\.\s*(?P<nested>[^\]]+?)\s*)?\]\]?")
# A dotted name, such as `headers.User-Agent`, belongs to the field before its first dot.
_FIELD = re.compile(r"\s*[\"']?(?P<name>[\w-]+)[\"']?\s*(?:\.[^=]*)?=")


class FileError(Exception):
    """The file is not TOML with [[rule]] and [[upstream]] tables. Each of `errors` has the place and the reason."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        super().__init__("\n".join(errors))


@dataclass(frozen=True, slots=True)
class Table:
    """One [[rule]] or [[upstream]] as written.

    `number`: its place among the tables of its kind, from 1. `lines`: the line of each field, and that of the table
    itself under the name "".
    """

    kind: str
    number: int
    fields: dict[str, Any]
    lines: dict[str, int]

    @property
    def label(self) -> str:
        """The table's name for messages: `rule "orders"`, or `rule 2` without a usable name."""
        name = self.fields.get("name")
        return f'{self.kind} "{name}"' if isinstance(name, str) and name.isprintable() else f"{self.kind} {self.number}"

    def complaint(self, file: Path, field: str, reason: str) -> str:
        """Return the message for a problem: file, line, table, field and `reason`. `field` is empty for the table."""
        place = f"{file}:{self.lines.get(field, self.lines.get('', 1))}"
        return f"{place}: {self.label}: {field + ': ' if field else ''}{reason}"


def read_tables(file: Path) -> list[Table]:
    """Return all tables of a rules file, the rules and the upstreams each in their order. Raises FileError."""
    try:
        text = read_text(file)
    except ValueError as error:
        raise FileError([f"{file}: {error}"]) from None
    # A writer may be about to fill it, or a mount failed. Without its rules, requests would get other keys.
    if not text.strip():
        raise FileError([f"{file}: is empty; to serve without rules, unset ONCEGATE_RULES_FILE"])
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FileError([_not_toml(file, str(error), text.count("\n") + 1)]) from None
    # tomllib parses nested arrays and tables by recursion.
    except RecursionError:
        raise FileError([f"{file}: is nested too deeply"]) from None
    return _tables(file, document, _lines(text))


def _not_toml(file: Path, reason: str, last_line: int) -> str:
    place = re.search(r" \(at line (\d+), column (\d+)\)", reason)
    if place is None:
        return f"{file}:{last_line}: is not TOML: {reason}"
    return f"{file}:{place[1]}: is not TOML: {reason.replace(place[0], f' (column {place[2]})')}"


def _tables(file: Path, document: dict[str, Any], lines: dict[tuple[str, int], dict[str, int]]) -> list[Table]:
    errors = []
    tables = []
    for kind, content in document.items():
        first = lines.get((kind, 1), {}).get("", lines.get(("", 0), {}).get(kind, 1))
        if kind not in TABLES:
            errors.append(f"{file}:{first}: {kind} is unknown; a rules file has [[rule]] and [[upstream]] tables only")
        elif not isinstance(content, list) or not all(isinstance(table, dict) for table in content):
            errors.append(f"{file}:{first}: {kind} must be written as [[{kind}]]")
        else:
            tables += [
                Table(kind, number, fields, lines.get((kind, number), {"": first}))
                for number, fields in enumerate(content, 1)
            ]
    if errors:
        raise FileError(errors)
    return tables


def _lines(text: str) -> dict[tuple[str, int], dict[str, int]]:
    """Return the lines of each table (kind, number): that of its header under "", and those of its fields.

    Fields outside of all tables are under ("", 0).
    """
    lines: dict[tuple[str, int], dict[str, int]] = {}
    counts = dict.fromkeys(TABLES, 0)
    current = lines.setdefault(("", 0), {})
    nested = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            kind, nested = header["table"], header["nested"] or ""
            if not nested:
                counts[kind] = counts.get(kind, 0) + 1
                current = lines.setdefault((kind, counts[kind]), {"": number})
            else:
                current.setdefault(nested, number)
        elif (field := _FIELD.match(line)) and not nested:
            # `headers.A` and `headers.B` are one field: the first of its lines counts.
            current.setdefault(field["name"], number)
    return lines
