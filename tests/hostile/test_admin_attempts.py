"""T27: strangers, web pages and viewers at the admin listener. Each attempt fails, and changes nothing."""

import asyncio
import random
import re
import ssl
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from itsdangerous import TimestampSigner

from oncegate.admin import attempts, serving, sessions
from oncegate.admin.tokens import load_tokens
from tests.admin_parts import FORM, OPERATE, VIEW, Seat, tokens_file
from tests.parts import RawClient, read_answer, request, until
from tests.test_access import client_of, files_of

WS = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
CROSS_SITE = (
    "Origin: https://evil.test",
    "Sec-Fetch-Site: cross-site",
    "Sec-Fetch-Mode: cors",
    "Sec-Fetch-Dest: empty",
)


@pytest.fixture
async def seat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Seat]:
    """A listener with two tokens, and with a proxy at 127.0.0.2 that names users."""
    opened = await Seat.open(
        monkeypatch,
        admin_tokens_file=tokens_file(tmp_path),
        admin_user_header="X-Forwarded-Email",
        admin_user_proxies="127.0.0.2",
        admin_users="operate:ana@example.com,view:*@view.example.com",
    )
    yield opened
    assert (opened.changes, opened.defects()) == ([], [])
    await opened.close()


@pytest.fixture
async def closed(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Seat]:
    """A listener without any setting."""
    opened = await Seat.open(monkeypatch)
    yield opened
    assert (opened.changes, opened.defects()) == ([], [])
    await opened.close()


# Hosts: a web page reaches a loopback address under a name of its own ...


@pytest.mark.parametrize(
    "host",
    [
        *("evil.test", "evil.test:8081", "localhost.evil.test", "127.0.0.1.evil.test", "127.0.0.1.nip.io"),
        *("localhost.", "0.0.0.0:8081", "[::]:8081", "127.1", "2130706433", "0x7f000001", "017700000001"),
        *(
            "127.0.0.1@evil.test",
            "evil.test@127.0.0.1",
            "localhost:8081:80",
            "localhost, evil.test",
            "",
            "[::ffff:10.0.0.7]",
        ),
        *("localhost evil.test", "localhost/evil", "10.0.0.7", "xn--lcalhost-x8a", "localhost#", "localhost:99999"),
    ],
)
async def test_another_name_of_the_machine(closed: Seat, host: str) -> None:
    """DNS rebinding: nobody reads a page under a name that is not the machine's own."""
    assert (await closed.get("/form", host=host)).status in (400, 403)


async def test_two_hosts(closed: Seat) -> None:
    """The second could be the one that a proxy in front has read."""
    for hosts in (("localhost", "evil.test"), ("evil.test", "localhost"), ("localhost", "localhost")):
        answer = await closed.get("/form", f"Host: {hosts[1]}", host=hosts[0])
        assert answer.status == 400


@pytest.mark.parametrize(
    "target", ["http://localhost/form", "http://evil.test/form", "//localhost/form", "localhost:80"]
)
async def test_a_target_that_is_no_path(closed: Seat, target: str) -> None:
    """The host of a target counts nothing, and makes nothing local."""
    for host in ("evil.test", "localhost"):
        assert (await closed.get(target, host=host)).status in (400, 403, 404)


async def test_no_host(closed: Seat) -> None:
    """Whoever names no host is not known to have come under a name of the machine."""
    for version in ("1.0", "1.1"):
        answer = await closed.ask(f"GET /form HTTP/{version}\r\n\r\n".encode())
        assert answer is not None
        assert answer.status == 400


@pytest.mark.parametrize(
    "field",
    [
        *(
            "X-Forwarded-For: 127.0.0.1",
            "Forwarded: for=127.0.0.1;host=localhost",
            "X-Real-IP: 127.0.0.1",
            "Via: 1.1 x",
        ),
        *("X-Forwarded-User: ana", "X-Envoy-Attempt-Count: 1", "X-Original-URL: /", "CF-Connecting-IP: ::1"),
        *("X-Forwarded-Host: localhost", "X-Forwarded-Proto: https", "x-forwarded-for: ::1"),
    ],
)
async def test_a_request_that_was_passed_on(closed: Seat, field: str) -> None:
    """A proxy on the machine makes nobody local, whatever address it or its client writes."""
    assert (await closed.get("/form", field)).status == 403
    assert (await closed.get("/form", field, host="evil.test")).status == 403


async def test_without_tokens_the_answer_names_the_setting(closed: Seat) -> None:
    """Whoever sets the listener up reads what is missing; probes and scrapes work all the same."""
    answer = await closed.get("/form", "X-Forwarded-For: 10.0.0.7")
    assert (answer.status, b"ONCEGATE_ADMIN_TOKENS_FILE" in answer.body) == (403, True)
    assert (await closed.get("/healthz", "X-Forwarded-For: 10.0.0.7", host="10.0.0.7")).status == 200


async def test_nobody_is_local_where_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that hides who asks makes everybody local: a setting for those who have one."""
    seat = await Seat.open(monkeypatch, admin_local_view=False)
    assert (await seat.get("/form")).status == 403
    assert (await seat.get("/healthz")).status == 200
    await seat.close()


async def test_a_local_visitor_changes_nothing(closed: Seat) -> None:
    """Whoever is on the machine reads alone, also with the form token of its page."""
    form = await closed.form_token()
    answer = await closed.post("/change", f"form_token={form}")
    assert (answer.status, answer.body) == (403, b"This needs the role operate; you have view.\n")


# Cookies ...


def forged(folder: Path, *, key: bytes = b"", role: str = OPERATE, seconds_ago: int = 0) -> str:
    """Return the cookie of a session, as one who does not have all of it would write it."""
    token = load_tokens(folder / "tokens").find(role)
    assert token is not None

    class Then(TimestampSigner):
        def get_timestamp(self) -> int:
            return super().get_timestamp() - seconds_ago

    signer = Then(key or token.session_key, salt="session", key_derivation="hmac", digest_method=sessions.sha256)
    return signer.sign(f"{token.id}.{'0' * 32}").decode()


@pytest.mark.parametrize(
    "name", ["another key", "expired", "the token itself", "empty", "no signature", "a byte changed", "the future"]
)
async def test_a_cookie_that_is_not_ours(seat: Seat, tmp_path: Path, name: str) -> None:
    """Its visitor is whoever it is without a cookie."""
    good = forged(tmp_path)
    cookie = {
        "another key": forged(tmp_path, key=b"another key of thirty-two bytes."),
        "expired": forged(tmp_path, seconds_ago=28_900),
        "the token itself": OPERATE,
        "empty": "",
        "no signature": good.rpartition(".")[0],
        "a byte changed": good[:20] + ("1" if good[20] == "0" else "0") + good[21:],
        "the future": forged(tmp_path, seconds_ago=-3600),
    }[name]
    assert (await seat.get("/form", f"Cookie: oncegate_session={good}", host="o.test")).status == 200
    assert (await seat.get("/form", f"Cookie: oncegate_session={cookie}", host="o.test")).status == 401


async def test_the_cookie_of_another_role(seat: Seat, tmp_path: Path) -> None:
    """A viewer's session is no operator's, also with the operator's name for its token in it."""
    cookie, form = await seat.log_in(VIEW)
    assert (await seat.post("/change", f"form_token={form}", cookie)).status == 403
    operator = forged(tmp_path).partition(".")[0]
    changed = re.sub(r"=[0-9a-f]{16}", f"={operator}", cookie)
    assert (await seat.get("/form", changed, host="o.test")).status == 401


async def test_a_session_ends_with_its_token(seat: Seat, tmp_path: Path) -> None:
    """Whoever is taken out of the file is out at once; others stay."""
    cookie, form = await seat.log_in()
    other, _ = await seat.log_in(VIEW)
    seat.listener.access.follow(load_tokens(tokens_file(tmp_path, f"view vera {VIEW}")))
    assert (await seat.post("/change", f"form_token={form}", cookie)).status == 403
    assert (await seat.get("/form", cookie, host="o.test")).status == 401
    assert (await seat.get("/form", other, host="o.test")).status == 200
    assert (await seat.get("/form", f"Authorization: Bearer {OPERATE}")).status == 401


async def test_a_copy_of_a_cookie_after_the_logout(seat: Seat) -> None:
    """Logging out ends the session itself, and takes the cookie from the browser."""
    cookie, form = await seat.log_in()
    answer = await seat.post("/logout", f"form_token={form}", cookie)
    assert (answer.status, answer.header("location")) == (303, b"/login")
    assert [b"Max-Age=0" in value for name, value in answer.headers if name.lower() == b"set-cookie"] == [True, True]
    assert (await seat.get("/form", cookie, host="o.test")).status == 401


async def test_two_cookies(seat: Seat, tmp_path: Path) -> None:
    """A neighbour on the same host can set a cookie beside ours: neither counts."""
    cookie, _ = await seat.log_in()
    twice = f"{cookie}; oncegate_session={forged(tmp_path, role=VIEW)}"
    assert (await seat.get("/form", twice, host="o.test")).status == 401
    assert (await seat.get("/form", cookie, "Cookie: oncegate_session=x", host="o.test")).status == 401


async def test_a_login_takes_no_cookie_of_the_browser(seat: Seat) -> None:
    """Session fixation: each login begins a session of its own."""
    first, _ = await seat.log_in()
    answer = await seat.post("/login", f"token={OPERATE}", first, "Origin: http://localhost")
    given = (answer.header("set-cookie") or b"").decode().partition(";")[0]
    assert given not in ("", first.removeprefix("Cookie: "))


# Forms ...


@pytest.mark.parametrize(
    ("body", "fields", "status"),
    [
        ("", (), 403),
        ("form_token=", (), 403),
        ("form_token={form}&form_token={form}", (), 403),
        ("form_token={other}", (), 403),
        ("form_token={local}", (), 403),
        ("FORM_TOKEN={form}", (), 403),
        ("", ("X-CSRF-Token: {form}", "form_token: {form}"), 403),
        ('{{"form_token": "{form}"}}', ("Content-Type: application/json",), 415),
        ("form_token={form}", ("Content-Type: text/plain",), 415),
        ("form_token={form}", ("Content-Type: multipart/form-data; boundary=x",), 415),
        ("form_token={form}", ("Content-Type:",), 415),
        ("form_token={form}", ("Origin: http://evil.test",), 403),
        ("form_token={form}", ("Origin: http://localhost:3000",), 403),
        ("form_token={form}", ("Origin: null",), 403),
        ("form_token={form}", ("Origin: null", "Sec-Fetch-Site: same-origin"), 403),
        ("form_token={form}", ("Origin: http://localhost", "Origin: http://evil.test"), 403),
        ("form_token={form}", ("Origin: http://localhost", "Sec-Fetch-Site: cross-site"), 403),
        ("form_token={form}", ("Sec-Fetch-Site: same-site",), 403),
        ("form_token={form}", ("Sec-Fetch-Site: none-of-ours",), 403),
        (
            "form_token={form}",
            ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"),
            403,
        ),
    ],
)
async def test_a_form_of_another_page(seat: Seat, body: str, fields: tuple[str, ...], status: int) -> None:
    """CSRF: a change needs the form token of this session, and no other page says that it sent it."""
    cookie, form = await seat.log_in()
    _, other = await seat.log_in()
    words = {"form": form, "other": other, "local": await seat.form_token()}
    answer = await seat.post("/change", body.format(**words), cookie, *(field.format(**words) for field in fields))
    assert answer.status == status


async def test_a_form_token_in_the_target(seat: Seat) -> None:
    """A target is in logs and histories: nothing in it counts."""
    cookie, form = await seat.log_in()
    assert (await seat.post(f"/change?form_token={form}", "", cookie)).status == 403


# Methods and targets ...


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "post", "CONNECT", "X"]
)
async def test_another_method_changes_nothing(seat: Seat, method: str) -> None:
    """A change is a POST alone, whatever other fields say."""
    cookie, form = await seat.log_in()
    overrides = ("X-HTTP-Method-Override: POST", "X-HTTP-Method: POST", "X-Method-Override: POST")
    raw = request(method, f"/change?_method=POST&form_token={form}", None, b"", cookie, *overrides, host="localhost")
    answer = await seat.ask(raw)
    assert answer is None or answer.status in (400, 404, 405)


@pytest.mark.parametrize(
    "target",
    [
        *(
            "//change",
            "/%2e/change",
            "/./change",
            "/x/../change",
            "/x/%2e%2e/change",
            "/change/",
            "/change%2f",
            "/%63hange",
        ),
        *(
            "/CHANGE",
            "/change;a=b",
            "/change%00",
            "/change%20",
            "\\change",
            "/healthz/../change",
            "/healthz%2f..%2fchange",
        ),
        *(
            "/metrics/../change",
            "/static/../change",
            "/static/%2e%2e/change",
            "/login/../change",
            "/change#",
            "*",
            "/change%0d%0a",
        ),
    ],
)
async def test_another_spelling_of_a_path(seat: Seat, target: str) -> None:
    """Whatever a path becomes, the route that it leads to asks for its role."""
    answer = await seat.ask(request("POST", target, None, b"", "Content-Length: 0", host="o.test"))
    assert answer is None or answer.status in (400, 401, 403, 404, 405)


@pytest.mark.parametrize(
    "name",
    ["../templates/base.html", "..%2ftemplates%2fbase.html", "%2e%2e/routes.py", "..%5croutes.py", "", ".", "a.css%00"],
)
async def test_a_file_that_is_no_asset(closed: Seat, name: str) -> None:
    """The pages' files are those in their folder, by their exact names."""
    assert (await closed.get(f"/static/{name}")).status in (400, 404)


# Tokens of tools ...


@pytest.mark.parametrize(
    "field",
    [
        *(
            "Authorization: Basic {token}",
            "Authorization: Token {token}",
            "Authorization: {token}",
            "Authorization: Bearer",
        ),
        *(
            "Authorization: Bearer ",
            "Authorization: Bearer {token} x",
            "Authorization: Bearer {token}x",
            "Authorization:",
        ),
        *("Authorization: Bearer {prefix}", "Authorization: Bearer, {token}", "Authorization: Bearer {upper}"),
        *(
            "X-Api-Key: {token}",
            "Proxy-Authorization: Bearer {token}",
            "Authorization: Bearer \xff\xfe",
            "X-Authorization: {token}",
        ),
        "Authorization: Bearer {token}\r\nAuthorization: Bearer {token}",
    ],
)
async def test_a_token_that_is_none(seat: Seat, field: str) -> None:
    """One field, one scheme, and the whole of a token."""
    text = field.format(token=OPERATE, prefix=OPERATE[:-1], upper=OPERATE.upper())
    assert (await seat.post("/change", "", *text.split("\r\n"), host="o.test")).status == 401


@pytest.mark.parametrize("target", ["/change?access_token={}", "/change?token={}", "/change?authorization=Bearer%20{}"])
async def test_a_token_in_the_target(seat: Seat, target: str) -> None:
    """A target is in logs and histories: no token is read from it."""
    assert (await seat.post(target.format(OPERATE), f"access_token={OPERATE}", host="o.test")).status == 401


async def test_a_viewer_s_token(seat: Seat) -> None:
    """A token has its own role, also beside the cookie of a higher one."""
    cookie, form = await seat.log_in()
    answer = await seat.post("/change", f"form_token={form}", cookie, f"Authorization: Bearer {VIEW}")
    assert answer.status == 403


async def test_a_wrong_token_beside_a_session(seat: Seat) -> None:
    """What a client says last of itself is not passed over."""
    cookie, form = await seat.log_in()
    answer = await seat.post("/change", f"form_token={form}", cookie, "Authorization: Bearer nobody-knows-this-one")
    assert answer.status == 401


# Users that a proxy names ...


@pytest.mark.parametrize(
    ("peer", "fields"),
    [
        ("127.0.0.1", ["ana@example.com"]),
        ("127.0.0.3", ["ana@example.com"]),
        ("127.0.0.1", [""]),
        ("127.0.0.2", ["ana@example.com", "ana@example.com"]),
        ("127.0.0.2", ["eve@evil.test", "ana@example.com"]),
        ("127.0.0.2", ["eve@evil.test"]),
        ("127.0.0.2", ["eve@evil.test, ana@example.com"]),
        ("127.0.0.2", ["\xff\xfe@view.example.com"]),
        ("127.0.0.2", ["ana\t@view.example.com"]),
        ("127.0.0.2", ["ana@example.com.evil.test"]),
        ("127.0.0.2", ["view.example.com"]),
        ("127.0.0.2", ["*@view.example.com "[:1]]),
        ("127.0.0.2", [""]),
        ("127.0.0.2", []),
    ],
)
async def test_a_user_that_nobody_vouches_for(seat: Seat, peer: str, fields: list[str]) -> None:
    """The header is refused from elsewhere, not passed over, also where the machine itself may read."""
    answer = await seat.get("/form", *(f"X-Forwarded-Email: {user}" for user in fields), peer=peer)
    assert answer.status == (401 if not fields else 403)


async def test_a_user_without_the_role(seat: Seat) -> None:
    """A viewer of the proxy changes nothing, and an operator not without the form of its page."""
    ben, ana = "X-Forwarded-Email: ben@view.example.com", "X-Forwarded-Email: ana@example.com"
    form = await seat.form_token(ben, peer="127.0.0.2")
    assert (await seat.post("/change", f"form_token={form}", ben, peer="127.0.0.2")).status == 403
    assert (await seat.post("/change", f"form_token={form}", ana, peer="127.0.0.2")).status == 403
    assert (await seat.post("/change", "", ana, *CROSS_SITE, peer="127.0.0.2")).status == 403


async def test_an_underscore_is_no_hyphen(seat: Seat) -> None:
    """Programs behind CGI take both for one name; this listener does not."""
    assert (await seat.get("/form", "X_Forwarded_Email: ana@example.com", peer="127.0.0.2")).status == 401


# Certificates ...


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def expired(authority: trustme.CA) -> ssl.SSLContext:
    context, gone = client_of(authority), datetime.now(UTC) - timedelta(days=1)
    authority.issue_cert("ana@example.com", not_before=gone - timedelta(days=9), not_after=gone).configure_cert(context)
    return context


def of_another_authority(authority: trustme.CA) -> ssl.SSLContext:
    context = client_of(authority)
    trustme.CA().issue_cert("ana@example.com").configure_cert(context)
    return context


@pytest.mark.parametrize("client", [expired, of_another_authority])
async def test_a_certificate_that_nobody_vouches_for(monkeypatch, tmp_path, authority, client) -> None:
    """The handshake fails."""
    seat = await Seat.open(monkeypatch, **files_of(authority, tmp_path), admin_users="operate:ana@example.com")
    try:
        answer = await seat.ask(request("GET", "/form", None, b"", host="o.test"), tls=client(authority))
    except OSError:
        answer = None
    assert answer is None
    await seat.close()


async def test_a_certificate_without_a_role(monkeypatch, tmp_path, authority) -> None:
    """A certificate of the authority alone gives no role; neither does none, nor a connection without TLS."""
    seat = await Seat.open(monkeypatch, **files_of(authority, tmp_path), admin_users="operate:ana@example.com")
    for client in (
        client_of(authority, "eve@example.com"),
        client_of(authority, "ana.example.com"),
        client_of(authority),
    ):
        assert (await seat.get("/form", host="o.test", tls=client)).status == 403
    assert await seat.ask(request("GET", "/healthz", None, b"")) is None
    await seat.close()


async def test_a_certificate_is_no_form(monkeypatch, tmp_path, authority) -> None:
    """A browser presents it for every page: a change needs the form all the same."""
    seat = await Seat.open(monkeypatch, **files_of(authority, tmp_path), admin_users="operate:ana@example.com")
    ana = client_of(authority, "ana@example.com")
    assert (await seat.post("/change", "", tls=ana)).status == 403
    form = await seat.form_token(tls=ana)
    assert (await seat.post("/change", f"form_token={form}", *CROSS_SITE, tls=ana)).status == 403
    assert seat.changes == []
    await seat.close()


# Sizes, slowness, framing ...


@pytest.mark.parametrize(
    "raw",
    [
        request("GET", "/form", None, b"", "X: " + "x" * 9000, host="localhost"),
        request("GET", "/form", None, b"", *(f"X-{number}: 1" for number in range(200)), host="localhost"),
        request("GET", "/form?" + "x" * 9000, None, b"", host="localhost"),
        request("POST", "/change", None, b"", "Content-Length: 5", "Transfer-Encoding: chunked", host="localhost"),
        request("POST", "/change", None, b"", "Content-Length: 5", "Content-Length: 6", host="localhost"),
        request("GET", "/form", None, b"", "X: 1\r\n folded", "Bad Name: 1", host="localhost"),
        b"GET /form HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
    ],
    ids=["field", "fields", "target", "two framings", "two lengths", "names", "version", "TLS"],
)
async def test_a_head_that_is_too_much(closed: Seat, raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused before anybody looks who sent it, and writes no line into the log."""
    answer = await closed.ask(raw)
    assert answer is None or answer.status == 400
    assert caplog.records == []


async def test_a_body_that_is_too_much(seat: Seat) -> None:
    """Of a stranger at the login 4 KiB are read, of an operator's form 1 MiB; with and without a length."""
    cookie, form = await seat.log_in()
    assert (await seat.post("/login", "token=" + "x" * 5000)).status == 413
    chunk = b"1388\r\n" + b"x" * 5000 + b"\r\n0\r\n\r\n"
    kind = "Content-Type: application/x-www-form-urlencoded"
    raw = request("POST", "/login", None, b"", kind, "Transfer-Encoding: chunked", host="localhost") + chunk
    answer = await seat.ask(raw)
    assert answer is not None
    assert answer.status == 413
    assert (await seat.post("/change", f"form_token={form}&a=" + "x" * (1 << 20), cookie)).status == 413


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"token=\xff\xfe&form_token=\xff", ""),
        (b"\x00\xff" * 20, ""),
        (b"token=a", "; charset=nobody-knows"),
        (b"token=\xff\xff", "; charset=utf-16"),
        (b"token=%ff%fe%00&form_token=%80", ""),
        (b"token=%&form_token=%zz&=&&", ""),
        (b"&" * 3000, ""),
    ],
)
async def test_a_form_of_no_text(seat: Seat, body: bytes, kind: str) -> None:
    """It is refused like any other, and is no defect."""
    cookie, _ = await seat.log_in()
    for path in ("/login", "/change"):
        raw = request("POST", path, None, body, f"Content-Type: application/x-www-form-urlencoded{kind}", cookie)
        answer = await seat.ask(raw)
        assert answer is not None
        assert answer.status in (400, 401, 403, 413)


@pytest.mark.parametrize("expectation", ["100-continue", "\xff\xfe", "200-ok", "", "100-continue, x"])
async def test_an_expectation(seat: Seat, expectation: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a client expects is met or refused, without a line in the log, and changes nothing of who may."""
    answer = await seat.ask(request("POST", "/change", None, b"a=b", FORM, f"Expect: {expectation}", host="o.test"))
    assert answer is not None
    assert answer.status == (100 if expectation == "100-continue" else 401 if not expectation else 417)
    assert answer.status != 100 or answer.body.startswith(b"HTTP/1.1 401 ")
    assert caplog.records == []


async def test_requests_at_random(
    seat: Seat, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fields and bodies of every kind in any order, with a session and without: no change and no defect."""
    cookie, form = await seat.log_in()
    chosen = random.Random(27)
    monkeypatch.setattr(attempts, "FIRST_S", 0.0)
    names = [
        "Origin",
        "Authorization",
        "Cookie",
        "Sec-Fetch-Site",
        "X-Forwarded-Email",
        "Accept",
        "Range",
        "Host",
        "Expect",
    ]
    values = [
        "",
        "null",
        "http://[",
        "[::1",
        "\xff\xfe",
        "%",
        "Bearer ",
        "Basic eA==",
        "oncegate_session=.",
        "a; oncegate_session=;=",
    ]
    values += [
        "same-origin",
        "cross-site",
        "ana@example.com",
        "b@view.example.com",
        "text/html",
        "bytes=0-1",
        "http://localhost",
    ]
    bodies = [
        "",
        "form_token=%",
        "a=b&&&=",
        "\xff\x00",
        f"form_token={form}&form_token=",
        f"next=//x&form_token={form[:-1]}",
    ]
    for _ in range(150):
        fields = [f"{chosen.choice(names)}: {chosen.choice(values)}" for _ in range(chosen.randrange(4))]
        fields += [cookie] if chosen.random() < 0.7 else []
        target = chosen.choice(["/form", "/change", "/login?next=%ff", "/logout", "/login"])
        body = chosen.choice(bodies).encode("latin-1")
        raw = request(chosen.choice(["GET", "POST"]), target, None, body, FORM, *fields, host="localhost")
        answer = await seat.ask(raw, peer=chosen.choice(["127.0.0.1", "127.0.0.2"]))
        assert answer is None or answer.status < 500
    assert caplog.records == []


async def test_a_second_request_behind_the_first(seat: Seat) -> None:
    """A connection serves one request: one that hides behind another is not looked at."""
    cookie, form = await seat.log_in()
    client = await RawClient.open(seat.port)
    first = request("GET", "/healthz", None, b"", host="localhost")
    body = f"form_token={form}".encode()
    kind = "Content-Type: application/x-www-form-urlencoded"
    client.writer.write(first + request("POST", "/change", None, body, kind, cookie, host="localhost"))
    answer = await read_answer(client.reader)
    assert answer is not None
    assert (answer.status, await client.reader.read()) == (200, b"")
    client.writer.close()


async def test_one_address_with_too_many_connections(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses its oldest ones; others are served."""
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 5)
    quiet = await RawClient.open(seat.port, local_addr=("127.0.0.9", 0))
    many = [await RawClient.open(seat.port) for _ in range(9)]
    assert await many[0].reader.read() == b""
    await until(lambda: len(seat.listener.connections) <= 5)
    answer = await quiet.ask(request("GET", "/healthz", None, b""))
    assert answer is not None
    assert answer.status == 200
    for client in (*many, quiet):
        client.writer.close()


async def test_one_address_with_too_many_handshakes(monkeypatch, tmp_path, authority) -> None:
    """TLS connections that say nothing count as well: their address loses them, others are served."""
    seat = await Seat.open(monkeypatch, **files_of(authority, tmp_path), admin_users="operate:ana@example.com")
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 5)
    many = [await RawClient.open(seat.port) for _ in range(9)]
    # The first are cut off long before their handshake would end.
    for client in many[:4]:
        assert await client.reader.read() == b""
    for client in many[4:]:
        assert not client.reader.at_eof()
    for _ in range(3):
        ana = client_of(authority, "ana@example.com")
        assert (await seat.get("/form", host="o.test", tls=ana, peer="127.0.0.9")).status == 200
    for client in many:
        client.writer.close()
    await seat.close()


# What a browser does for other pages ...


@pytest.mark.parametrize("target", ["/form", "/", "/login"])
async def test_what_another_page_may_not_see(seat: Seat, target: str) -> None:
    """Its fetch and its frame are refused, no field lets it read, and nothing is kept; a link may lead here."""
    cookie, _ = await seat.log_in()
    fetch = await seat.get(target, cookie, *CROSS_SITE)
    framed = await seat.get(target, cookie, "Sec-Fetch-Site: same-origin", "Sec-Fetch-Dest: iframe")
    neighbour = await seat.get(target, cookie, "Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: no-cors")
    linked = await seat.get(
        target, cookie, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"
    )
    assert [fetch.status, framed.status, neighbour.status, linked.status] == [403, 403, 403, 200]
    for answer in (fetch, framed, linked):
        assert answer.header("access-control-allow-origin") is None
        assert answer.header("x-frame-options") == b"DENY"
        assert b"frame-ancestors 'none'" in (answer.header("content-security-policy") or b"")
        assert answer.header("cross-origin-resource-policy") == b"same-origin"
        assert answer.header("cache-control") == b"no-store"


async def test_a_preflight(seat: Seat) -> None:
    """No method and no header is granted to another page."""
    raw = request("OPTIONS", "/change", None, b"", *CROSS_SITE, "Access-Control-Request-Method: POST", host="localhost")
    answer = await seat.ask(raw)
    assert answer is not None
    assert answer.status == 405
    assert [name for name, _ in answer.headers if name.lower().startswith(b"access-control")] == []


@pytest.mark.parametrize(
    "fields", [WS, ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAAA")]
)
async def test_another_protocol(seat: Seat, fields: tuple[str, ...]) -> None:
    """A connection stays HTTP."""
    answer = await seat.get("/form", *fields, host="o.test")
    assert answer.status in (400, 401)


# The login ...


@pytest.mark.parametrize(
    "following",
    [
        *(
            "//evil.test",
            "https://evil.test/",
            "/\\evil.test",
            "\\\\evil.test",
            "/%0d%0aSet-Cookie:%20a=b",
            "javascript:alert(1)",
        ),
        *(
            "/%2f%2fevil.test",
            "/x//evil.test",
            "evil.test",
            "/?next=//evil.test",
            "/@evil.test",
            "%09//evil.test",
            "/logout",
        ),
    ],
)
async def test_a_login_that_leads_elsewhere(seat: Seat, following: str) -> None:
    """After a login, a browser stays with this listener; the form shows no other place either."""
    answer = await seat.post("/login", f"token={OPERATE}&next={following}", "Origin: http://localhost")
    assert (answer.status, answer.header("location")) == (303, b"/")
    assert b"evil" not in (await seat.get(f"/login?next={following}".replace("\\", "%5c"))).body


async def test_a_login_of_another_page(seat: Seat) -> None:
    """It could make a browser work under a stranger's name."""
    for fields in (CROSS_SITE, ("Origin: https://evil.test",), ("Origin: null",), ("Sec-Fetch-Site: same-site",)):
        answer = await seat.post("/login", f"token={OPERATE}", *fields)
        assert (answer.status, answer.header("set-cookie")) == (403, None)


async def test_a_login_without_tokens(closed: Seat) -> None:
    """There is nothing to log in with, and an empty token is none."""
    assert (await closed.get("/login")).status == 403
    assert (await closed.post("/login", "token=")).status == 403


async def test_a_wrong_token_at_the_login(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form comes again, without the token and without a cookie; the next try waits, whether right or wrong."""
    monkeypatch.setattr(attempts, "FIRST_S", 0.05)
    wrong = "wrong-token-<b>0123456789"
    answer = await seat.post("/login", f"token={wrong}")
    assert (answer.status, answer.header("set-cookie"), wrong.encode() in answer.body) == (401, None, False)
    began = time.monotonic()
    await asyncio.gather(*(seat.post("/login", f"token={wrong}") for _ in range(4)))
    assert time.monotonic() - began >= 0.05
    assert (await seat.post("/login", "token=")).status == 401


async def test_nothing_secret_is_said(seat: Seat) -> None:
    """Neither tokens nor cookies nor form tokens are in the log, in an answer to a stranger, or in a location."""
    cookie, form = await seat.log_in()
    await seat.post("/change", "form_token=guess", cookie)
    lost = await seat.get("/form?token=" + OPERATE, "Accept: text/html", host="o.test")
    said = repr(seat.log.calls) + repr(lost.headers) + repr(lost.body)
    assert [secret for secret in (OPERATE, VIEW, form, cookie.partition("=")[2]) if secret in said] == []
