"""The fields of the table `[rule.reconcile]`: how each is written, and which values it refuses.

`table.py` checks how they fit together.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from oncegate.decision import Verdict
from oncegate.keys.documents import parse_pointer
from oncegate.keys.notes import parse_note
from oncegate.keys.sources import Segment, Source, parse_source
from oncegate.probing.credentials import read_credentials
from oncegate.probing.plan import FORM, JSON, KEY, Entry, Pointer
from oncegate.probing.verdicts import says_nothing

MOST_KEPT, MOST_AUDITED, MOST_ENTRIES, MOST_S = 8, 8, 32, 31_536_000
VERDICTS = {verdict.value: verdict for verdict in Verdict}

# Takes a value as TOML has it and returns it as a plan has it. Raises ValueError with what it must be.
Check = Callable[[Any], Any]


def checked(table: Mapping[str, Any], checks: Mapping[str, Check], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the valid fields of a table as values, and add what is wrong with the others to `problems`."""
    for name, value in table.items():
        if name not in checks:
            problems.append(f"{name} is unknown; did you mean {get_close_matches(name, checks, 1, 0)[0]}?")
            continue
        try:
            yield name, checks[name](value)
        except ValueError as error:
            problems.append(f"{name} {error}")


def text_of(value: Any) -> str:
    """Check a text."""
    if not isinstance(value, str):
        raise ValueError("must be a text in quotes")
    return value


def members_of(value: Any, most: int) -> list[Any]:
    """Check a list."""
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"must be a list of at most {most} members, such as [...]")
    return value


def _number(least: float, most: float, unit: str = " of seconds") -> Check:
    def check(value: Any) -> float:
        # In Python True is a number, and comparisons with a NaN are false.
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(f"must be a number{unit} from {least:g} to {most:g}")
        return float(value)

    return check


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100:
        raise ValueError("must be a whole number from 1 to 100")
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _method(value: Any) -> str:
    method = text_of(value).upper()
    # CONNECT would open a tunnel, and TRACE returns credentials (RFC 9110, sections 9.3.6 and 9.3.8).
    if not re.fullmatch(r"[A-Z]{1,32}", method) or method in ("CONNECT", "TRACE"):
        raise ValueError("must be a method such as GET")
    return method


def _content_type(value: Any) -> str:
    if value not in (JSON, FORM):
        raise ValueError(f"must be {JSON} or {FORM}: in no other are values escaped")
    return str(value)


def _keep(value: Any) -> tuple[tuple[str, Source | None], ...]:
    names = [text_of(name) for name in members_of(value, MOST_KEPT)]
    if len(set(names)) < len(names):
        raise ValueError("has the same member twice")
    return tuple((name, _kept(name)) for name in names)


def _kept(name: str) -> Source | None:
    if name == KEY:
        return None
    source = parse_source(name) if name.startswith("path:") else parse_note(name)
    if "{" in name or "}" in name or (not isinstance(source.kind, Segment) and not name.startswith(("/", "header:"))):
        raise ValueError("has members key, path:N, header:Name and /pointer without braces")
    return source


def pointer(value: Any) -> Pointer:
    """Check a JSON pointer."""
    return text_of(value), parse_pointer(value)


def _pointers(value: Any) -> tuple[Pointer, ...]:
    return tuple(pointer(one) for one in members_of(value, MOST_AUDITED))


def _credentials(value: Any) -> tuple[tuple[str, str], ...]:
    try:
        return read_credentials(text_of(value))
    except ValueError as error:
        raise ValueError(f"{value} {error}" if isinstance(value, str) else str(error)) from None


def _entries(value: Any) -> tuple[Entry, ...]:
    return tuple(map(_entry, members_of(value, MOST_ENTRIES)))


def _entry(value: Any) -> Entry:
    if not isinstance(value, dict) or "status" not in value:
        raise ValueError('must be a list of tables with a status, such as [{ status = "200" }]')
    problems: list[str] = []
    values = dict(checked(value, _ENTRY, problems))
    if problems:
        raise ValueError("; ".join(problems))
    return Entry(**values)


def _status(value: Any) -> str:
    status = str(value).lower() if isinstance(value, str | int) else ""
    if not re.fullmatch(r"[24](?:[0-9]{2}|xx)", status):
        raise ValueError("must be a status of 2xx or 4xx: no other says anything of the operation")
    if status.isdigit() and says_nothing(int(status)):
        raise ValueError(f"{status} says nothing of the operation")
    return status


def _when(value: Any) -> tuple[tuple[Pointer, tuple[str, ...]], ...]:
    if not isinstance(value, dict) or not value:
        raise ValueError('must be a table of pointers and texts, such as { "/status" = "paid" }')
    return tuple((pointer(name), _texts(some)) for name, some in value.items())


def _texts(value: Any) -> tuple[str, ...]:
    some = value if isinstance(value, list) else [value]
    if not some or not all(isinstance(one, str | int) for one in some):
        raise ValueError("has neither a text, a whole number, true or false, nor a list of those")
    # In Python True is a number.
    return tuple(str(one).lower() if isinstance(one, bool) else str(one) for one in some)


def _empty(value: Any) -> tuple[Pointer, ...]:
    return _pointers(value if isinstance(value, list) else [value])


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


_ENTRY: Mapping[str, Check] = {"status": _status, "when": _when, "empty": _empty}
FIELDS: Mapping[str, Check] = {
    "url": text_of,
    "method": _method,
    "safe": _switch,
    "body": text_of,
    "content_type": _content_type,
    "keep": _keep,
    "credentials_file": _credentials,
    "reference": _table,
    **dict.fromkeys(VERDICTS, _entries),
    "absent_after_s": _number(0.1, MOST_S),
    "absent_before_s": _number(0.1, MOST_S),
    "absent_agree": _count,
    "reconcile_for_s": _number(1, MOST_S),
    "first_after_s": _number(0.1, 86_400),
    "most_s": _number(0.1, 86_400),
    "rate_per_s": _number(0.1, 1000, ""),
    "timeout_s": _number(0.1, 60),
    "audit": _pointers,
    "answers": _table,
}
