"""What an older build does with records that have the fields of this one, as JSON: run under that build, on a server.

`python -m tests.older.newer_fields URL SOCKET`. It prints for each kind what it did by verb, and what it did with the
same record without these fields. Each has a request id, as every record of this build has.
"""

import asyncio
import json
import sys

from redis import Redis

from tests.older import fixture
from tests.older.records import KINDS

# While its response comes. The other two are numbered fields: its claim replaced another, and the request id.
RUNNING = [(b"head", "H" * 100), (b"readers_until", "9999999999999")]
REPLACED, REQUEST_ID = r"\x0c\x00\x00", r"\x08\x00\x01x"


async def outcomes(url: str, path: str) -> dict[str, list[dict[str, str]]]:
    plain = fixture.stored_records()
    found: dict[str, list[dict[str, str]]] = {}
    with Redis(unix_socket_path=path) as client:
        for kind in KINDS:
            name, fields = plain[kind.name]
            has_chunks = kind.name == "in flight, half stored"
            newer = [*fields, (b"more", REPLACED + REQUEST_ID), *(RUNNING if has_chunks else [])]
            found[kind.name] = []
            for one in (newer, [*fields, (b"more", REQUEST_ID)]):
                records = {**plain, kind.name: (name, one)}
                fixture.stored_records = lambda records=records: records  # type: ignore[misc]
                client.flushdb()
                found[kind.name].append(await fixture.outcomes(url, client, kind))
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(outcomes(*sys.argv[1:]))))
