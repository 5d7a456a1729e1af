"""What an older build does with records that have the fields of this one, as JSON: run under that build, on a server.

`python -m tests.older.newer_fields URL SOCKET`. It prints for each kind what it did by verb, and what it did with the
same record without these fields. Each has a request id, as every record of this build has.
"""

import ast
import asyncio
import json
import sys
from hashlib import blake2b

from redis import Redis

from tests.older import fixture
from tests.older.records import KINDS, key_of

# While its response comes. The others are numbered fields: its claim replaced another, and the request id.
RUNNING = [(b"head", "H" * 100), (b"readers_until", "9999999999999")]
REPLACED, REQUEST_ID = r"\x0c\x00\x00", r"\x08\x00\x01x"
# What is kept for an open key alone.
FIRST, VALUES = r"\x0e\x00\x08" + r"\x00" * 7 + "1", r"\x0d\x00\x0b" + '{"key":"k"}'
# Where `meta` has its flags.
FLAGS, RECONCILED = 97, 16


def as_reconciled(key: bytes, field: tuple[bytes, str]) -> tuple[bytes, str]:
    """Return a field of a record, the response of a complete one with the flag that says where it came from."""
    name, written = field
    meta = ast.literal_eval(f"b'{written}'") if name == b"meta" else b""
    if meta[:1] not in (b"\x01", b"\x02"):
        return field
    flagged = meta[:FLAGS] + bytes([meta[FLAGS] | RECONCILED]) + meta[FLAGS + 1 : -8]
    return name, fixture.escaped(flagged + blake2b(flagged, key=key, digest_size=8).digest())


async def outcomes(url: str, path: str) -> dict[str, list[dict[str, str]]]:
    plain = fixture.stored_records()
    found: dict[str, list[dict[str, str]]] = {}
    kept = REPLACED + FIRST + VALUES
    with Redis(unix_socket_path=path) as client:
        for kind in KINDS:
            name, fields = plain[kind.name]
            has_chunks = kind.name == "in flight, half stored"
            key = key_of(kind.name, kind.tenant)
            newer = [as_reconciled(key, field) for field in fields]
            newer += [(b"more", kept + REQUEST_ID), *(RUNNING if has_chunks else [])]
            found[kind.name] = []
            for one in (newer, [*fields, (b"more", REQUEST_ID)]):
                records = {**plain, kind.name: (name, one)}
                fixture.stored_records = lambda records=records: records  # type: ignore[misc]
                client.flushdb()
                found[kind.name].append(await fixture.outcomes(url, client, kind))
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(outcomes(*sys.argv[1:]))))
