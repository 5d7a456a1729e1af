"""The table of docs/reference/clients.md: each client, unchanged, where its answer does not come.

A client is a process that makes the same call in each scenario, through a proxy of its own with the preset that its
user would choose. What is seen is compared with the page; `WRITE_CLIENTS=1 make test-real ARGS="-k clients"` writes it.
"""

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.conftest import Valkey
from tests.real.clients import page
from tests.real.clients.clients import CLIENTS, WORKERS, Client
from tests.real.clients.run import SCENARIOS, Cell, bench
from tests.real.parts import INSTALLED

pytestmark = [INSTALLED, pytest.mark.timeout(900)]
# Clients at once: most of the time all of them wait.
AT_ONCE = 4
ITS_ANSWER = "its answer"


class Seen(NamedTuple):
    """What was seen of one client, by scenario."""

    version: str
    cells: dict[str, Cell]


@pytest.fixture(scope="module")
def seen(
    request: pytest.FixtureRequest, zygote, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Client, Seen]]:
    """All clients of the tests that were selected, run side by side."""
    asked = {item.callspec.params["client"]: None for item in request.session.items if "seen" in item.fixturenames}
    store, limit = Valkey(), asyncio.Semaphore(AT_ONCE)

    async def one(client: Client) -> Seen:
        folder = tmp_path_factory.mktemp("client")
        async with limit, asyncio.timeout(600), bench(client, zygote, store, folder) as (at_bench, version):
            return Seen(version, {name: await SCENARIOS[name](at_bench) for name in scenarios_of(client)})

    async def all_of_them() -> list[Seen | BaseException]:
        found = await asyncio.gather(*map(one, asked), return_exceptions=True)
        await asyncio.sleep(0.2)  # connections that were aborted are closed a turn of the loop later
        return found

    found = dict(zip(asked, asyncio.run(all_of_them()), strict=True))
    yield found  # type: ignore[misc]
    store.close()


def scenarios_of(client: Client) -> list[str]:
    return [name for name in SCENARIOS if name != "worker killed" or client.group == WORKERS]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"{client.label}-{client.sends}")
def test_a_client_gets_its_answer_from_one_execution(seen, client):
    """With a key or a mark there is one execution, and whoever can call again has its answer in the end."""
    found = seen[client]
    if isinstance(found, BaseException):
        raise found
    name = f"{client.label}, {client.sends}"
    # The lock files do not pin what Debian has.
    version = found.version if client.language != "Debian" else "Debian's"
    page.show(client.group, name, version, f"`{client.preset}`", *map(str, found.cells.values()))
    protected = {name: cell for name, cell in found.cells.items() if client.sends != "no key"}
    # A prompt whose outcome is unknown is sent again by the presets for LLMs, and never by `payments`.
    unknown = protected.pop("proxy killed", None)
    assert unknown is None or unknown.executions <= (1 if client.preset == "payments" else 2)
    assert {cell.executions for cell in protected.values()} <= {1}
    if client.key or client.group == WORKERS:
        assert [name for name, cell in protected.items() if not cell.seen.endswith(ITS_ANSWER)] == []


@pytest.mark.parametrize("group", sorted({client.group for client in CLIENTS}))
def test_the_page_has_these_clients_alone(group):
    """A client that is no longer run has no row."""
    run = [f"{one.label}, {one.sends}" for one in CLIENTS if one.group == group]
    assert sorted(page.names(group)) == sorted(run)
