#!/usr/bin/env bash
# Varnish 7.1.1 asks for a retry in five seconds after the API has executed the request.
#
# Seen: a POST goes through Varnish to an API that executes it. The API closes before it answers, or answers after
# `first_byte_timeout`, or sends `103 Early Hints` before its complete 200. In all three cases the client gets
# `503 Service Unavailable` with `Retry-After: 5`. The request was executed once. In the third case, the API's own answer
# was complete and correct, and Varnish threw it away.
#
# Why: Varnish makes this page itself (`vcl_backend_error` of its built-in configuration), and uses one status and one header
# for all failures of a fetch. A backend where nobody listens gives the same page as one that has finished the work. This
# version takes every 1xx for the final response and refuses it.
#
# Why it matters: 503 with `Retry-After` reads as "nothing happened, come back". Many clients and job queues retry exactly
# this pair, and the second attempt executes the operation again. Here it means "the outcome is unknown". A program that
# frees an idempotency key on a 503 must not do so behind Varnish. The script needs Debian 12 on amd64 or arm64, and gcc.
#
# The output that was seen:
#
#     varnishd (varnish-7.1.1 revision 7cee1c581bead20e88d101ab3d72afb29f14d87a)
#     /whole: executed 1 time(s), the client got 200, Retry-After: None
#     /nobody: executed 0 time(s), the client got 503, Retry-After: 5
#     /cut: executed 1 time(s), the client got 503, Retry-After: 5
#     /late: executed 1 time(s), the client got 503, Retry-After: 5
#     /early-hints: executed 1 time(s), the client got 503, Retry-After: 5
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
command -v gcc >/dev/null || { echo "Varnish compiles its configuration: install gcc" >&2; exit 2; }
mkdir "$work/debs"
(cd "$work/debs" && apt-get download -qq -o APT::Sandbox::User=root varnish=7.1.1-2+deb12u1 libjemalloc2=5.3.0-1)
for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/root"; done

cat >"$work/finding.py" <<'PYTHON'
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

work = Path(sys.argv[1])
arrived: list[str] = []


class Api(BaseHTTPRequestHandler):
    """Executes each request. What becomes of the answer depends on the path."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        arrived.append(self.path)
        self.close_connection = True
        if self.path == "/cut":
            return
        if self.path == "/late":
            time.sleep(2)
        if self.path == "/early-hints":
            self.send_response_only(103)
            self.send_header("Link", "</style.css>; rel=preload")
            self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", "2")
        with suppress(OSError):  # Varnish no longer waits for the late answer
            self.end_headers()
            self.wfile.write(b"ok")

    def log_message(self, *_):
        pass


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


def post(port, path):
    """How often the request arrives, and what the client gets."""
    arrived.clear()
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    client.request("POST", path, b"amount=2000")
    answer = client.getresponse()
    client.close()
    return len(arrived), answer.status, answer.headers["Retry-After"]


api = ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
port = free_port()
(work / "default.vcl").write_text(f"""
vcl 4.1;
backend default {{ .host = "127.0.0.1"; .port = "{api.server_port}"; .first_byte_timeout = 1s; }}
backend nobody {{ .host = "127.0.0.1"; .port = "{free_port()}"; }}
sub vcl_recv {{ if (req.url == "/nobody") {{ set req.backend_hint = nobody; }} }}
""")
binary = work / "root/usr/sbin/varnishd"
libraries = next(work.glob("root/usr/lib/*/libjemalloc.so.2")).parent
environment = os.environ | {"LD_LIBRARY_PATH": str(libraries)}
command = [binary, "-F", "-j", "none", "-n", work / "state", "-a", f"127.0.0.1:{port}", "-f", work / "default.vcl"]
with (work / "output").open("wb") as output:
    varnish = subprocess.Popen([*command, "-s", "malloc,16m"], stdout=output, stderr=output, env=environment)
try:
    wait_for(port)
    seen = {path: post(port, path) for path in ("/whole", "/nobody", "/cut", "/late", "/early-hints")}
finally:
    varnish.terminate()
    varnish.wait(20)

print(subprocess.run([binary, "-V"], capture_output=True, text=True, env=environment).stderr.splitlines()[0])
for path, (count, status, retry_after) in seen.items():
    print(f"{path}: executed {count} time(s), the client got {status}, Retry-After: {retry_after}")
expected = {"/whole": (1, 200, None), "/nobody": (0, 503, "5")}
expected |= dict.fromkeys(("/cut", "/late", "/early-hints"), (1, 503, "5"))
sys.exit(None if seen == expected else f"changed: expected {expected}")
PYTHON
python3 "$work/finding.py" "$work"
