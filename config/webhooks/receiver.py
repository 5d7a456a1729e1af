"""The service behind: checks a delivery's signature, does its work once, and acknowledges it.

    SECRET=whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw python -m config.webhooks.receiver events.db 9000

Deliveries may come twice even so: what was sent and lost is handed on again. So the work and the event's id are
written in one transaction, and an id that is there already is acknowledged without doing anything.
"""

import base64
import hashlib
import hmac
import json
import os
import sqlite3
import sys
import time
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOLERANCE_S = 300  # of a signature's time: each delivery is signed anew
TABLE = "CREATE TABLE IF NOT EXISTS events (id TEXT PRIMARY KEY, body BLOB, handled REAL)"


def signed(secret: str, headers: Message, body: bytes) -> bool:
    """Return whether a delivery comes from who has the secret: Standard Webhooks, of the bytes as they came."""
    stamp = headers.get("webhook-timestamp", "")
    if not stamp.isdecimal() or abs(time.time() - int(stamp)) > TOLERANCE_S:
        return False
    content = f"{headers.get('webhook-id', '')}.{stamp}.".encode() + body
    mac = hmac.digest(base64.b64decode(secret.removeprefix("whsec_")), content, hashlib.sha256)
    expected = "v1," + base64.b64encode(mac).decode()
    return any(hmac.compare_digest(expected, one) for one in headers.get("webhook-signature", "").split())


def handle(path: str, event_id: str, body: bytes) -> None:
    """Do an event's work and remember its id, both or neither."""
    rows = sqlite3.connect(path, timeout=10, isolation_level=None)
    try:
        rows.execute("BEGIN IMMEDIATE")
        fresh = rows.execute("INSERT OR IGNORE INTO events VALUES (?, ?, ?)", (event_id, body, time.time())).rowcount
        if fresh:
            time.sleep(float(json.loads(body).get("takes_s", 0)))  # the work; in the same transaction
        rows.execute("COMMIT")
    finally:
        rows.close()


class Receiver(BaseHTTPRequestHandler):
    """One delivery: 204 once it is done, 401 for a wrong signature, 500 for work that failed; both free the id."""

    protocol_version = "HTTP/1.1"
    secret = database = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        print(f"{self.headers.get('webhook-id')} came", flush=True)
        if not signed(self.secret, self.headers, body):
            return self._answer(401)
        try:
            handle(self.database, self.headers["webhook-id"], body)
        except (sqlite3.Error, ValueError):
            return self._answer(500)  # not done: let it come again
        return self._answer(204)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def main() -> None:
    Receiver.secret, Receiver.database = os.environ["SECRET"], sys.argv[1]
    sqlite3.connect(Receiver.database).execute(TABLE).connection.close()
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Receiver) as server:
        print(f"listening on {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
