"""The admin listener without a proxy, for tests of its pages and of who may see them."""

import asyncio
import re
import ssl
from pathlib import Path
from typing import Any

from structlog.testing import CapturingLogger

from oncegate.admin import app
from oncegate.admin.pages.routes import Pages
from oncegate.admin.parts import AdminParts, at_once
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.serving import AdminListener, serve_admin
from oncegate.observe.metrics import GAUGES, Metrics
from oncegate.observe.reconciling import ReconcilingCounts
from oncegate.rules.loading import load_rules
from oncegate.settings.addresses import Address
from oncegate.settings.settings import Settings
from tests.parts import Answer, RawClient, request

VIEW, OPERATE = "view-" + "v" * 32, "operate-" + "o" * 32
FORM = "Content-Type: application/x-www-form-urlencoded"


def admin_parts(settings: dict[str, Any] | None = None, **parts: Any) -> AdminParts:
    """Return parts that have little to show; `settings` and `parts` replace some."""
    chosen = {"upstream": "http://127.0.0.1:9", "admin_listen": Address("127.0.0.1", 0)} | (settings or {})
    made = Settings(**chosen)
    ours: dict[str, Any] = {
        "settings": made,
        "store_url": "",
        "log": CapturingLogger(),
        "metrics": at_once(lambda: Metrics("0", {name: lambda: 0.0 for name in GAUGES})),
        "not_ready_reasons": at_once(list),
        "notices": at_once(list),
        "rules": lambda: load_rules(made),
        "reconciling": ReconcilingCounts(),
    }
    return AdminParts(**ours | parts)


def tokens_file(folder: Path, *lines: str) -> Path:
    """Write a file of tokens that only its owner can read."""
    file = folder / "tokens"
    file.write_text("\n".join(lines or (f"view vera {VIEW}", f"operate olga {OPERATE}")))
    file.chmod(0o600)
    return file


class Seat:
    """An open admin listener with two routes of a test: `/form` shows who asks, `/change` changes something."""

    def __init__(self, listener: AdminListener, parts: AdminParts, settings: dict[str, Any]) -> None:
        self.listener, self.log, self.settings = listener, parts.log, settings
        self.port = listener.address.port
        # Who changed something.
        self.changes: list[str] = []

    @classmethod
    async def open(cls, monkeypatch: Any, **settings: Any) -> "Seat":
        made: list[Seat] = []

        async def form(_: Any, visitor: Visitor) -> Any:
            return app.web.Response(text=f"{visitor.name} {visitor.role.name} {visitor.form_token}")

        async def change(_: Any, visitor: Visitor) -> Any:
            made[0].changes.append(visitor.name)
            return app.web.Response(text="changed")

        async def defect(_: Any, _visitor: Visitor) -> Any:
            raise ValueError("secret of a handler")

        routes = [
            Route("GET", "/form", Role.VIEW, form),
            Route("POST", "/change", Role.OPERATE, change),
            Route("GET", "/defect", Role.VIEW, defect),
        ]

        def pages(parts: AdminParts) -> Pages:
            made = Pages(parts)
            made.routes += routes
            return made

        monkeypatch.setattr(app, "Pages", pages)
        parts = admin_parts(settings)
        made.append(cls(await serve_admin(parts), parts, settings))
        return made[0]

    async def ask(self, raw: bytes, peer: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Answer | None:
        """Send one request, from an address of loopback, and return the answer, None for none."""
        client = await RawClient.open(
            self.port, local_addr=(peer, 0), ssl=tls, server_hostname="localhost" if tls else None
        )
        try:
            client.writer.write(raw)
            async with asyncio.timeout(30):
                # A connection ends after its response.
                return _answer(await client.reader.read())
        except OSError:
            return None
        finally:
            client.writer.close()

    async def get(self, path: str, *fields: str, host: str = "localhost", **options: Any) -> Answer:
        answer = await self.ask(request("GET", path, None, b"", *fields, host=host), **options)
        assert answer is not None
        return answer

    async def post(self, path: str, body: str, *fields: str, host: str = "localhost", **options: Any) -> Answer:
        kind = () if any(field.lower().startswith("content-type") for field in fields) else (FORM,)
        answer = await self.ask(request("POST", path, None, body.encode(), *kind, *fields, host=host), **options)
        assert answer is not None
        return answer

    async def log_in(self, token: str = OPERATE) -> tuple[str, str]:
        """Log in as a browser does, and return its cookie field and the form token of the session."""
        answer = await self.post("/login", f"token={token}", "Origin: http://localhost")
        assert answer.status == 303, answer.body
        cookie = "Cookie: " + (answer.header("set-cookie") or b"").decode().partition(";")[0]
        return cookie, await self.form_token(cookie)

    async def form_token(self, *fields: str, **options: Any) -> str:
        """Return the form token that a page has for a visitor."""
        found = re.search(r"[0-9a-f]{64}$", (await self.get("/form", *fields, **options)).body.decode())
        assert found
        return found[0]

    def defects(self) -> list[Any]:
        """Return the lines of the log at level error."""
        return [call for call in self.log.calls if call.method_name == "error"]

    async def close(self) -> None:
        await self.listener.close()


def _answer(raw: bytes) -> Answer | None:
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head:
        return None
    line, *lines = head.split(b"\r\n")
    _, status, reason = line.split(b" ", 2)
    headers = [(name, value.strip()) for name, _, value in (one.partition(b":") for one in lines)]
    return Answer(int(status), reason, headers, body, complete=True)
