"""A client that does not wait: it sends a request, gets an address, and comes for the response when it likes.

    python -m config.clients.later http://127.0.0.1:8080/v1/reports report-7 '{"month": 11}'

Run it again with the same key, also after it was killed: it asks what became of the key, and goes on from there. The
request is executed once.
"""

import http.client
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

# A wait of the client between two looks is at least as long as the proxy asks for, and at most so long.
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class Answer:
    """What came: `headers` by their lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def pause_s(self) -> float:
        return min(float(self.headers.get("retry-after", 1)), LONGEST_PAUSE_S)


def send(method: str, url: str, headers: dict[str, str], body: bytes | None = None) -> Answer:
    """Send one request. Raises OSError and HTTPException where nothing whole came back."""
    place = urlsplit(url)
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = kind(place.netloc, timeout=30)
    try:
        connection.request(method, place.path + (f"?{place.query}" if place.query else ""), body, headers)
        response = connection.getresponse()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    finally:
        connection.close()


def begin(url: str, key: str, credential: str, body: bytes) -> Answer:
    """Send the request. A 202 names the address of its response; any other answer is the response itself."""
    headers = {"Idempotency-Key": key, "Authorization": credential, "Content-Type": "application/json"}
    return send("POST", url, headers | {"Prefer": "respond-async"}, body)


def collect(address: str) -> Answer:
    """Return the response, once it is there. Whoever has the address needs no credential."""
    while (answer := send("GET", address, {})).status == 202:
        time.sleep(answer.pause_s)
    return answer


def ask(url: str, key: str, credential: str) -> dict[str, Any]:
    """Return what became of a key, without sending its request: the document, or the problem `key-absent`."""
    target = urlsplit(url)._replace(scheme="", netloc="").geturl()
    headers = {"Idempotency-Key": key, "Authorization": credential, "Oncegate-Target": target}
    answer = send("GET", urljoin(url, "/.oncegate/keys"), headers)
    document: dict[str, Any] = json.loads(answer.body)
    return document


def main() -> int:
    url, key, body = sys.argv[1:4]
    credential = os.environ.get("API_CREDENTIAL", "Bearer nobody")
    print("before:", ask(url, key, credential).get("state", "refused"), flush=True)
    answer = begin(url, key, credential, body.encode())
    if answer.status == 202:
        print("accepted:", answer.headers["location"].rpartition("/")[0], flush=True)
        answer = collect(urljoin(url, answer.headers["location"]))
    print(answer.status, answer.headers.get("oncegate-status", "-"), answer.body.decode(errors="replace"), flush=True)
    return 0 if answer.status < 400 else 1


if __name__ == "__main__":
    sys.exit(main())
