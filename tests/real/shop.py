"""A shop with forms: an application that executes whatever comes, and counts it."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

FORM = """<!DOCTYPE html><title>Form</title>
<form method="post" action="{path}" enctype="{kind}">{token}<input name="item" value="7">{file}
<button id="buy">Buy</button></form>
<script>
// As analytics does: another value for each click.
document.querySelector("form").addEventListener("submit", () => {{ document.cookie = "_ga=" + Math.random(); }});
</script><h1>Form</h1>"""
KINDS = {"form": "application/x-www-form-urlencoded", "multipart": "multipart/form-data"}


@dataclass
class Shop:
    """The shop's state. `orders` has the body of each execution; `delay_s` is how long one takes;
    `breaks_off`: it gets no answer. `grants`: the
    origins that its own CORS code grants, None without such code."""

    url: str = ""
    delay_s: float = 0.0
    breaks_off: bool = False
    grants: set[str] | None = None
    orders: list[bytes] = field(default_factory=list)
    fields: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Shop]:
    """Run a shop in a thread of this process."""
    shop = Shop()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"shop": shop}))
    shop.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield shop
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """The proxy resets connections that it closes."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shop: Shop
    numbers = itertools.count(1)

    def do_GET(self) -> None:
        """The form: `/checkout` has a token in it, any other path has none. `?kind=multipart` sends it with a file."""
        target = urlsplit(self.path)
        if target.path == "/favicon.ico":
            self._answer(404, "")
            return
        kind = parse_qs(target.query).get("kind", ["form"])[0]
        token = f'<input type="hidden" name="token" value="{uuid4()}">' if target.path == "/checkout" else ""
        file = '<input type="file" name="picture">' if kind == "multipart" else ""
        page = FORM.format(path=target.path, kind=KINDS[kind], token=token, file=file)
        # A new analytics cookie with each page, for browsers without scripts.
        cookies = [f"_ga={next(self.numbers)}; Path=/"]
        if "session=" not in self.headers.get("Cookie", ""):
            cookies.append("session=4711; Path=/; HttpOnly")
        self._answer(200, page, cookies)

    def do_POST(self) -> None:
        """An order. The answer sets a flash cookie, as frameworks do."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.shop.orders.append(body)
        self.shop.fields.append(dict(self.headers.items()))
        number = len(self.shop.orders)
        time.sleep(self.shop.delay_s)
        if self.shop.breaks_off:
            self.close_connection = True
            return
        self._answer(200, f"<!DOCTYPE html><title>Order</title><h1>Order {number}</h1>", [f"flash={number}; Path=/"])

    def do_OPTIONS(self) -> None:
        """A preflight, for a shop with CORS code."""
        self._answer(405 if self.shop.grants is None else 200, "")

    def _answer(self, status: int, page: str, cookies: Any = ()) -> None:
        data = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-cache")
        if self.shop.grants is not None:
            self.send_header("Vary", "Origin")
            if (origin := self.headers.get("Origin", "")) in self.shop.grants:
                self.send_header("Access-Control-Allow-Origin", origin)
                self.send_header("Access-Control-Allow-Headers", "content-type")
        for cookie in cookies:
            self.send_header("Set-Cookie", cookie)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
