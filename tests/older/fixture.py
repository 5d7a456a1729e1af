"""The store that an older build left, and what it did with each record, as text: `store.txt` and `outcomes.txt`.

Run `python -m tests.older` to write them again. This module runs under the older build, too.
"""

import ast
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from redis import Redis

from oncegate.store.record_name import store_key
from oncegate.store.store import Store
from tests.older.records import KINDS, VERBS, Kind, facts, key_of, make, opened

STORE, OUTCOMES = (Path(__file__).with_name(name) for name in ("store.txt", "outcomes.txt"))
# Fields with a time of the store's clock that has to be near. They are written as ms from now.
TIMES = (b"lease", b"until")

# What there is before a verb.
AS_IT_IS = "as it is"

# How a record is written: its expiry in ms from now, and its fields.
Saved = tuple[int, dict[bytes, bytes]]


def now_ms(client: Redis) -> int:
    seconds, micros = client.time()
    return int(seconds) * 1000 + int(micros) // 1000


def name_of(kind: Kind) -> bytes:
    return store_key(key_of(kind.name, kind.tenant))


# As text ...


def as_text(kind: Kind, client: Redis) -> str:
    """Return a record as it is in the store."""
    now, lines = now_ms(client), [f"[{kind.name}]", f"key {name_of(kind).decode()}"]
    lines.append(f"expires now+{round(client.pttl(name_of(kind)), -4)}")
    for field, value in client.hgetall(name_of(kind)).items():
        near = field in TIMES and value != b"0"
        written = f"now{round(int(value) - now, -3):+d}" if near else escaped(value)
        lines.append(f"{field.decode()} {written}")
    return "\n".join(lines) + "\n"


def escaped(value: bytes) -> str:
    """Return bytes as they stand in a literal."""
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in value)


def read(text: str) -> dict[str, tuple[bytes, list[tuple[bytes, str]]]]:
    """Return the records of `store.txt` by their kind: name in the store, and fields as they are written."""
    found = {}
    for part in text.split("\n[")[1:]:
        title, key, *lines = part.strip().split("\n")
        fields = [line.partition(" ") for line in lines]
        name = key.removeprefix("key ").encode()
        found[title.removesuffix("]")] = name, [(field.encode(), value) for field, _, value in fields]
    return found


def load(client: Redis, name: bytes, fields: list[tuple[bytes, str]]) -> None:
    """Put a record into a store, as the older build had left it now."""
    now = now_ms(client)
    values: dict[bytes, bytes | int] = {}
    for field, written in fields:
        is_time = field in (*TIMES, b"expires") and written.startswith("now")
        values[field] = now + int(written[3:]) if is_time else ast.literal_eval(f"b'{written}'")
    client.delete(name)
    expires = values.pop(b"expires")
    client.hset(name, mapping=values)  # type: ignore[arg-type]
    client.pexpireat(name, expires)  # type: ignore[arg-type]


def stored_records() -> dict[str, tuple[bytes, list[tuple[bytes, str]]]]:
    return read(STORE.read_text())


def grouped(found: dict[str, str]) -> list[str]:
    """Return outcomes as lines, each with all verbs that have it."""
    verbs: dict[str, list[str]] = {}
    for verb, outcome in found.items():
        verbs.setdefault(outcome, []).append(verb)
    return [f"{'; '.join(those)} = {outcome}" for outcome, those in verbs.items()]


def expected_outcomes() -> dict[str, dict[str, str]]:
    """Return what the older build did, by the kind of the record and by the verb."""
    found: dict[str, dict[str, str]] = {}
    for part in OUTCOMES.read_text().split("\n[")[1:]:
        title, *lines = part.strip().split("\n")
        each = [line.split(" = ", 1) for line in lines]
        found[title.removesuffix("]")] = {verb: outcome for verbs, outcome in each for verb in verbs.split("; ")}
    return found


# What a build does with them ...


async def outcomes(
    url: str, client: Redis, kind: Kind, prepare: Callable[[Store], None] = lambda _: None
) -> dict[str, str]:
    """Return what this build does with a record of the older one, by verb. `prepare` is called with the store."""
    name, fields = stored_records()[kind.name]
    found = {}
    async with opened(url) as store:
        prepare(store)
        load(client, name, fields)
        found[AS_IT_IS] = await facts(store, client, kind)
        for verb, act in VERBS.items():
            client.flushdb()
            load(client, name, fields)
            done = await act(store, kind)
            after = await facts(store, client, kind)
            found[verb] = f"{done}, unchanged" if after == found[AS_IT_IS] else f"{done} -> {after}"
    return found


async def write(url: str, path: str) -> None:
    """Write both files. Only the older build is to be asked."""
    about = "# Written by `python -m tests.older`: "
    with Redis(unix_socket_path=path) as client:
        async with opened(url) as store:
            for kind in KINDS:
                await make(store, client, kind)
        records = "\n".join(as_text(kind, client) for kind in KINDS)
        STORE.write_text(f"{about}every kind of record, as the older build leaves it. Times are ms.\n\n{records}")
        lines = [f"{about}what the older build does with each record, and what there is then.\n"]
        for kind in KINDS:
            client.flushdb()
            found = await outcomes(url, client, kind)
            lines += [f"[{kind.name}]", *grouped(found), ""]
        OUTCOMES.write_text("\n".join(lines))


if __name__ == "__main__":
    asyncio.run(write(*sys.argv[1:]))
