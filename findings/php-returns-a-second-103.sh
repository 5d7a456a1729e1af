#!/usr/bin/env bash
# PHP 8.2.36 skips one interim response, returns a second one as the response, and puts the real head into the body.
#
# Seen: `file_get_contents` asks a server that sends `103 Early Hints` and then a complete `200 OK` with five bytes. With one
# 103 before it, the script gets the 200 and its body. With two, it gets the status 103, and a body that begins with the
# text `HTTP/1.1 200 OK`. That is with `ignore_errors`, which clients of APIs set to read the body of an error. Without it
# the call fails: "HTTP request failed! HTTP/1.1 103 Early Hints", though the server has sent a complete 200.
#
# Why: the HTTP wrapper of PHP's streams reads past one interim response before it looks at the status, and not past the
# next. RFC 8297 (section 2) and RFC 9110 (section 15.2) allow a server to send several.
#
# Why it matters: a test with one early hint passes. In front of an API that hints twice, or behind a proxy that says `102
# (Processing)` every few seconds, a program reads a success as "status 103" and stores HTTP headers as its data, or takes
# an executed POST for a failed one and sends it again. The script needs Debian 12 on amd64 or arm64.
#
# The output that was seen:
#
#     PHP 8.2.36
#     1 x 103, then 200: status 200, body "hello"
#     2 x 103, then 200: status 103, body "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
#     3 x 102, then 200: status 102, body "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/debs"
(cd "$work/debs" && apt-get download -qq -o APT::Sandbox::User=root \
    php8.2-cli=8.2.36-1~deb12u1 libargon2-1 libsodium23 libmagic1 libedit2 libxml2)
for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/root"; done
libraries=$(echo "$work"/root/usr/lib/*-linux-gnu)

cat >"$work/ask.php" <<'PHP'
<?php
$context = stream_context_create(["http" => ["timeout" => 5, "protocol_version" => 1.1, "ignore_errors" => true]]);
$body = file_get_contents($argv[1], false, $context);
echo json_encode([(int) explode(" ", $http_response_header[0])[1], $body]);
PHP

cat >"$work/finding.py" <<'PYTHON'
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

work, libraries = Path(sys.argv[1]), sys.argv[2]
FINAL = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
HEADS = {102: b"HTTP/1.1 102 Processing\r\n\r\n", 103: b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"}
php = [str(work / "root/usr/bin/php8.2"), "-n"]
environment = {**os.environ, "LD_LIBRARY_PATH": libraries}


def serve_once(server: socket.socket, before: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(4096)
        connection.sendall(before + FINAL)


def asked(count: int, status: int) -> list:
    """Return the status and the body that PHP makes of a response behind interim ones."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve_once, args=(server, HEADS[status] * count), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        done = subprocess.run([*php, str(work / "ask.php"), url], env=environment, capture_output=True, timeout=20)
    found = json.loads(done.stdout)
    print(f"{count} x {status}, then 200: status {found[0]}, body {json.dumps(found[1])}")
    return found


version = subprocess.run([*php, "-r", "echo PHP_VERSION;"], env=environment, capture_output=True, text=True, timeout=20)
print("PHP", version.stdout)
final = FINAL.decode()
as_seen = [
    asked(1, 103) == [200, "hello"],
    asked(2, 103) == [103, final],
    asked(3, 102) == [102, HEADS[102].decode() + final],
]
if not all(as_seen):
    sys.exit("this is not what was seen")
PYTHON
python3 "$work/finding.py" "$work" "$libraries"
