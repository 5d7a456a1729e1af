#!/usr/bin/env bash
# asyncio (Python 3.11.7) and uvloop 0.23.0 throw a complete, decrypted response away if a TLS alert comes right behind it.
#
# Seen: a TLS server executes a POST, writes its complete `201 Created`, and then ends the connection with a fatal alert. If
# the alert arrives a moment later, every client gets the 201. If both arrive in one read, a blocking socket still gets the
# 201 first. asyncio and uvloop raise the error of the alert, and the program never sees a byte of the response.
#
# Why: asyncio decrypts in a loop until nothing is left, and hands the data over after the loop. The error leaves the loop
# with the data that was already decrypted. uvloop shows the same. The TLS records are in order and correct.
#
# Why it matters: the client holds the proof that the operation was executed, and reports a broken connection. A retry
# executes it again. The loss depends on timing: a test on a slow link passes, and a fast network or a busy client loses
# responses. The script needs the command openssl for a certificate.
#
# The output that was seen:
#
#     Python 3.11.7, uvloop 0.23.0, OpenSSL 3.0.19 27 Jan 2026
#     alert 0.3 seconds later: blocking socket: 201, asyncio: 201, uvloop: 201
#     alert in the same read: blocking socket: 201, asyncio: SSLError, uvloop: SSLError
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: uvloop==0.23.0
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost \
    -addext subjectAltName=DNS:localhost -keyout "$work/key.pem" -out "$work/certificate.pem" 2>/dev/null

cat >"$work/finding.py" <<'PYTHON'
import asyncio
import platform
import socket
import ssl
import sys
import threading
import time
from contextlib import suppress

import uvloop

work = sys.argv[1]
REQUEST = b"POST /charge HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
RESPONSE = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok"
# A record that nobody can decrypt. The server's own TLS library answers it with a fatal alert.
BROKEN = b"\x17\x03\x03\x00\x20" + bytes(32)
server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server_context.load_cert_chain(f"{work}/certificate.pem", f"{work}/key.pem")
client_context = ssl.create_default_context(cafile=f"{work}/certificate.pem")


def serve(listener, pause):
    """For each connection: the response, a pause, and a fatal alert. Without a pause both leave in one write."""
    for _ in range(3):
        connection, _ = listener.accept()
        with connection, suppress(ConnectionError):
            connection.settimeout(10)
            arriving, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = server_context.wrap_bio(arriving, leaving, server_side=True)
            for step in (tls.do_handshake, lambda tls=tls: tls.read(len(REQUEST))):
                for _ in range(10):
                    try:
                        step()
                        break
                    except ssl.SSLWantReadError:
                        connection.sendall(leaving.read())
                        arriving.write(connection.recv(65536))
            tls.write(RESPONSE)
            if pause:
                connection.sendall(leaving.read())
                time.sleep(pause)
            arriving.write(BROKEN)
            with suppress(ssl.SSLError):
                tls.read(1)
            connection.sendall(leaving.read())
            connection.recv(65536)  # until the client closes


def blocking(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        with client_context.wrap_socket(plain, server_hostname="localhost") as tls:
            tls.sendall(REQUEST)
            return tls.recv(65536)


class Client(asyncio.Protocol):
    """Sends the request, and keeps all that the event loop hands over until it says that the connection is lost."""

    def __init__(self):
        self.received = b""
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        transport.write(REQUEST)

    def data_received(self, data):
        self.received += data

    def connection_lost(self, error):
        self.lost.set_result(error)


async def protocol(port):
    loop = asyncio.get_running_loop()
    options = {"ssl": client_context, "server_hostname": "localhost"}
    transport, client = await loop.create_connection(Client, "127.0.0.1", port, **options)
    try:
        error = await asyncio.wait_for(client.lost, 10)
    finally:
        transport.abort()
    if not client.received and error:
        raise error
    return client.received


CLIENTS = {
    "blocking socket": blocking,
    "asyncio": lambda port: asyncio.run(protocol(port)),
    "uvloop": lambda port: uvloop.run(protocol(port)),
}


def outcomes(pause):
    """What each client gets: the status of the response, or the name of the error."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener, pause), daemon=True).start()
        seen = {}
        for name, client in CLIENTS.items():
            try:
                seen[name] = client(listener.getsockname()[1]).split()[1].decode()
            except (OSError, EOFError, TimeoutError) as error:
                seen[name] = type(error).__name__
        return seen


seen = {"alert 0.3 seconds later": outcomes(0.3), "alert in the same read": outcomes(0)}
print(f"Python {platform.python_version()}, uvloop {uvloop.__version__}, {ssl.OPENSSL_VERSION}")
for case, answers in seen.items():
    print(f"{case}: {', '.join(f'{name}: {answer}' for name, answer in answers.items())}")
expected = {
    "alert 0.3 seconds later": dict.fromkeys(CLIENTS, "201"),
    "alert in the same read": {"blocking socket": "201", "asyncio": "SSLError", "uvloop": "SSLError"},
}
sys.exit(None if seen == expected else f"changed: expected {expected}")
PYTHON
"$work/venv/bin/python" "$work/finding.py" "$work"
