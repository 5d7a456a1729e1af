"""The numbered files of SQL, cut into statements. Pure.

A file is plain SQL that psql runs as well. Each of its statements can run again: a run may be killed after any of them,
and the next one starts with the first of the same file. `SELECT ... \\gexec` runs each row that it returns as a
statement, as in psql: CREATE INDEX CONCURRENTLY takes one partition at a time.
"""

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import NamedTuple

# What has a semicolon inside, or a quote: comments, strings, quoted names, bodies of functions.
_OPAQUE = r"""--[^\n]*|/\*.*?\*/|'[^']*'|"[^"]*"|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$"""
_TOKEN = re.compile(rf"(?P<end>;|\\gexec\b)|{_OPAQUE}|[^;\\'\"$/-]+|.", re.DOTALL)
_BEFORE = re.compile(r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*", re.DOTALL)
_NAME = re.compile(r"(\d{4})\.sql")


class Statement(NamedTuple):
    """One statement. `generates`: its rows are the statements to run."""

    text: str
    generates: bool = False


class Migration(NamedTuple):
    """One file. `version` is the schema's version after it."""

    version: int
    text: str

    @property
    def statements(self) -> list[Statement]:
        """The statements of the file, in order."""
        return list(cut(self.text))


@cache
def migrations() -> tuple[Migration, ...]:
    """Return the files of this release, in order."""
    found = [(match, file) for file in files(__package__).iterdir() if (match := _NAME.fullmatch(file.name))]
    return tuple(sorted(Migration(int(match[1]), file.read_text("utf-8")) for match, file in found))


def newest_version() -> int:
    """Return the version of the schema that this release is made for."""
    return migrations()[-1].version


def cut(text: str) -> Iterator[Statement]:
    """Yield the statements of a text. Raises ValueError for a last one without an end."""
    start = 0
    for token in _TOKEN.finditer(text):
        if token["end"]:
            yield Statement(_without_comments(text[start : token.start()]), generates=token["end"] != ";")
            start = token.end()
    if rest := _without_comments(text[start:]):
        raise ValueError(f"a statement has no end: {rest[:60]}")


def _without_comments(text: str) -> str:
    """Return a text without the comments before its first word."""
    return _BEFORE.sub("", text, count=1).rstrip()


def schema_complaint(version: int) -> str | None:
    """Return why this release cannot work with a schema of this version (0: there is none), or None if it can.

    A release works with its own schema and with the ones before and after: a migration leaves the functions of the
    version before it in place, so the proxies can be replaced before it or after it.
    """
    ours = newest_version()
    if version == 0:
        return "the schema has no tables of oncegate that this role may use; run `oncegate migrate`"
    if version < ours - 1:
        return f"the schema has version {version}, and this release needs {ours}; run `oncegate migrate`"
    if version > ours + 1:
        return f"the schema has version {version}, and this release knows up to {ours}; run a newer release"
    return None


def as_script(schema: str, lock_timeout_ms: int) -> str:
    """Return a script for psql that brings a schema from any version to the newest."""
    parts = [
        "\\set ON_ERROR_STOP on",
        f"SET lock_timeout = {lock_timeout_ms};",
        f"{create_schema(schema)};",
        f"SET search_path = {quoted(schema)};",
    ]
    for migration in migrations():
        parts += [f"-- version {migration.version} ...", migration.text.strip(), f"{note_version(migration.version)};"]
    return "\n".join(parts)


def quoted(name: str) -> str:
    """Return the name of a schema, role or table as SQL has it."""
    return '"{}"'.format(name.replace('"', '""'))


def create_schema(schema: str) -> str:
    """Return the statement that makes the schema."""
    return f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}"


def note_version(version: int) -> str:
    """Return the statement that notes that the schema has this version now."""
    return f"INSERT INTO schema_version (version) VALUES ({version}) ON CONFLICT DO NOTHING"
