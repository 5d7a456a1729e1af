"""The admin pages behind a real nginx that asks somebody else who logged in, as it does with oauth2-proxy.

Who answers is a stand-in: oauth2-proxy is no package of Debian's.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.ports import free_port
from tests.parts import Answer, Proxy, RawUpstream, ask, request
from tests.real.parts import INSTALLED
from tests.real.test_gateways import running

pytestmark = INSTALLED
# As docs/how-to/who-may.md has it. The first server stands in for oauth2-proxy: a cookie names the user.
NGINX = """
daemon off;
user root;
error_log stderr;
pid {folder}/pid;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
    uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
    server {{
        listen 127.0.0.1:{auth};
        if ($cookie_session = "") {{ return 401; }}
        add_header X-Auth-Request-Email $cookie_session always;
        location / {{ return 202; }}
    }}
    server {{
        listen 127.0.0.1:{port};
        location = /oauth2/auth {{
            internal;
            proxy_pass http://127.0.0.1:{auth};
            proxy_pass_request_body off;
            proxy_set_header Content-Length "";
        }}
        location / {{
            auth_request /oauth2/auth;
            auth_request_set $email $upstream_http_x_auth_request_email;
            proxy_set_header X-Forwarded-Email $email;
            proxy_set_header Host $http_host;
            proxy_bind 127.0.0.2;
            proxy_pass http://127.0.0.1:{admin};
        }}
    }}
}}
"""
FORGED = "X-Forwarded-Email: ana@example.com"


@pytest.fixture
def gate(proxies, valkey, upstream: RawUpstream) -> Proxy:
    users = "operate:ana@example.com,view:*@view.example.com"
    named = {"ADMIN_USER_HEADER": "X-Forwarded-Email", "ADMIN_USER_PROXIES": "127.0.0.2", "ADMIN_USERS": users}
    proxy: Proxy = proxies(upstream, valkey.url, **named)
    return proxy


@pytest.fixture
def nginx(gate: Proxy, tmp_path: Path) -> Iterator[int]:
    """The port of the nginx in front."""
    (folder := tmp_path / "nginx").mkdir()
    port = free_port()
    text = NGINX.format(folder=folder, auth=free_port(), port=port, admin=gate.admin_port)
    (folder / "nginx.conf").write_text(text)
    with running(["nginx", "-c", str(folder / "nginx.conf")], port, folder):
        yield port


async def told(
    port: int, user: str, *fields: str, method: str = "GET", path: str = "/unknown", body: str = ""
) -> Answer:
    """Ask as somebody who logged in; `user` empty for nobody."""
    session = [f"Cookie: session={user}"] if user else []
    raw = request(method, path, None, body.encode(), *session, *fields, host=f"127.0.0.1:{port}")
    return await ask(port, raw)


async def test_who_logged_in(gate: Proxy, nginx: int) -> None:
    """Each user has the role of its name, whatever field a client sends; nobody else gets past nginx, or around it."""
    assert (await told(nginx, "", FORGED)).status == 401
    for user, role in (("ana@example.com", "operate"), ("eve@view.example.com", "view")):
        answer = await told(nginx, user, FORGED)
        assert answer.status == 200
        assert f"{user}, {role}".encode() in re.sub(rb"<[^>]*>", b"", answer.body)
    assert (await told(nginx, "eve@example.com", FORGED)).status == 403
    assert (await told(gate.admin_port, "ana@example.com", FORGED)).status == 403


async def test_a_form_behind_nginx(gate: Proxy, nginx: int) -> None:
    """The page's own form is taken under the origin that the browser knows; one of another page is not."""
    page = (await told(nginx, "ana@example.com", path="/key")).body.decode()
    (token,) = set(re.findall(r'name="form_token" value="([0-9a-f]+)"', page))
    kind, body = "Content-Type: application/x-www-form-urlencoded", f"form_token={token}&pasted=nothing-like-it"
    for origin, status in ((f"http://127.0.0.1:{nginx}", 404), ("http://evil.test", 403), ("null", 403)):
        fields = kind, f"Origin: {origin}"
        answer = await told(nginx, "ana@example.com", *fields, method="POST", path="/key", body=body)
        assert answer.status == status, answer.body
