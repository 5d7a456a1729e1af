"""A store that an older build left: this build reads, decides, replays, settles and sweeps as that one did.

`tests/older/store.txt` has a record of each kind, `tests/older/outcomes.txt` what the older build did with it.
"""

import json
import os
import subprocess
import sys

import pytest

from oncegate.store.redis.store import RedisStore
from oncegate.store.store import Store
from tests.older.build import unpack_older_build
from tests.older.fixture import expected_outcomes, outcomes, stored_records
from tests.older.records import KINDS, VERBS, Kind
from tests.parts import ROOT


def test_every_kind_and_every_verb_is_there() -> None:
    """Whoever adds one writes the files anew: `python -m tests.older`."""
    kinds = [kind.name for kind in KINDS]
    assert list(stored_records()) == list(expected_outcomes()) == kinds
    assert all(set(found) == {"as it is", *VERBS} for found in expected_outcomes().values())


def packs(store: Store) -> None:
    assert isinstance(store, RedisStore)
    store.layout.force(packed=True)


def writes_hashes(_store: Store) -> None:
    """Leave it as it is."""


@pytest.mark.parametrize("writes", [writes_hashes, packs])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
async def test_a_record_of_an_older_build(empty_server, kind: Kind, writes) -> None:
    with empty_server.client() as client:
        found = await outcomes(empty_server.url, client, kind, writes)
    expected = expected_outcomes()[kind.name]
    # That build's append extended the lease. Now renewals alone do, so that only its reply is the same.
    replies = [outcome.pop("append").partition(" -> ")[0] for outcome in (found, expected)]
    assert replies[0] == replies[1]
    if kind.name == "released":
        # The same decision once more, which says now what became of it.
        expected["free"] = "released, unchanged"
    if kind.name == "lapsed, retry":
        # A key in flight has no mode in the index: those of dead owners all count.
        expected["sweep"] = expected["sweep"].replace("0 unknown", "1 unknown")
    assert found == expected


def test_an_older_build_on_records_of_this_one(empty_server, tmp_path) -> None:
    """Head, readers, the mark of a claim that replaced another, what is kept for an open key, and the flag of a
    response that the API was asked for, change nothing of what it tells, decides and frees.

    It never settles a response that came in chunks to this build: it counts their fields otherwise.
    """
    sources = unpack_older_build(tmp_path)
    command = [sys.executable, "-m", "tests.older.newer_fields", empty_server.url, empty_server.socket]
    env = {**os.environ, "PYTHONPATH": f"{sources}:{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    for kind, (newer, plain) in json.loads(done.stdout).items():
        assert newer == plain, kind
