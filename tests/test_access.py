"""Who may see and change what on the admin listener: tokens, sessions, proxies that authenticate, certificates."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from oncegate.admin import attempts
from oncegate.admin.access import Access
from oncegate.admin.attempts import Attempts
from oncegate.admin.origins import is_local
from oncegate.admin.roles import Refused
from oncegate.admin.serving import serve_admin
from oncegate.admin.tokens import load_tokens
from oncegate.settings.addresses import Address
from oncegate.settings.errors import SettingsError
from tests.admin_parts import OPERATE, VIEW, Seat, admin_parts, tokens_file
from tests.parts import request

Open = Callable[..., Awaitable[Seat]]


@pytest.fixture
async def seat(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    opened: list[Seat] = []

    async def open_seat(**settings: Any) -> Seat:
        opened.append(await Seat.open(monkeypatch, **settings))
        return opened[-1]

    yield open_seat
    for one in opened:
        await one.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tokens_file(tmp_path)


# Tokens ...


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the file has no token"),
        ("\n# nothing yet\n", "the file has no token"),
        (f"admin ana {VIEW}", "line 1 is not ROLE NAME TOKEN"),
        (f"view {VIEW}", "line 1 is not ROLE NAME TOKEN"),
        (f"view ana {VIEW} {OPERATE}", "line 1 is not ROLE NAME TOKEN"),
        ("view ana " + "x" * 15, "line 1 has a token of under 16 characters"),
        (f"view ana {VIEW}\n\noperate ana {VIEW}", "line 3 has the token of line 1"),
        ('view ana "aaaaaaaaaaaaaaaaaa"', "line 1 has a token with characters that no bearer token has"),
        (f"view a,b {VIEW}", "line 1 has a name"),
        (f"view loopback {VIEW}", "line 1 has a name"),
    ],
)
def test_a_tokens_file_with_a_mistake_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    """The sentence names the setting and the line, and no token."""
    with pytest.raises(SettingsError) as refused:
        load_tokens(tokens_file(tmp_path, text))
    (error,) = refused.value.errors
    assert error.startswith(f"ONCEGATE_ADMIN_TOKENS_FILE: {reason}")
    assert VIEW not in error


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    """Each line with a mistake has its sentence."""
    with pytest.raises(SettingsError) as refused:
        load_tokens(tokens_file(tmp_path, "view ana short", "nonsense", f"view ben {VIEW}"))
    assert [error.partition("has")[0].partition("is not")[0] for error in refused.value.errors] == [
        "ONCEGATE_ADMIN_TOKENS_FILE: line 1 ",
        "ONCEGATE_ADMIN_TOKENS_FILE: line 2 ",
    ]


def test_a_tokens_file_that_everybody_can_read_is_refused(file: Path) -> None:
    """Anybody on the machine would have every role."""
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="everybody on this machine can read the file"):
        load_tokens(file)
    file.chmod(0o640)
    assert len(load_tokens(file)) == 2


def test_a_tokens_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Also where it went after the settings were read."""
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        load_tokens(tmp_path / "none")


async def test_a_bad_tokens_file_stops_the_start(tmp_path: Path) -> None:
    """The listener does not open."""
    with pytest.raises(SettingsError):
        await serve_admin(admin_parts({"admin_tokens_file": tokens_file(tmp_path, "view ana short")}))


async def test_a_bearer_has_its_role(seat: Open, file: Path) -> None:
    """A tool sends its token with each request, under any Host, and needs no form token to change something."""
    served = await seat(admin_tokens_file=file)
    for token, shown in ((VIEW, b"vera VIEW "), (OPERATE, b"olga OPERATE ")):
        answer = await served.get("/form", f"Authorization: Bearer {token}", host="oncegate.internal")
        assert (answer.status, answer.body) == (200, shown)
    assert (await served.post("/change", "", f"authorization: bearer {OPERATE}")).status == 200
    assert served.changes == ["olga"]


async def test_a_visitor_without_a_role_is_asked_for_a_token(seat: Open, file: Path) -> None:
    """A browser is led to the login, and after it to where it wanted to go; a tool gets 401."""
    served = await seat(admin_tokens_file=file)
    asked = await served.get("/form", "Accept: text/html", host="oncegate.internal")
    assert (asked.status, asked.header("location")) == (303, b"/login?next=%2Fform")
    shown = await served.get("/login?next=%2Fform", host="oncegate.internal")
    assert b'name="next" value="/form"' in shown.body
    done = await served.post("/login", f"token={VIEW}&next=%2Fform", "Origin: http://localhost")
    assert (done.status, done.header("location")) == (303, b"/form")
    tool = await served.get("/form", host="oncegate.internal")
    assert (tool.status, tool.header("www-authenticate")) == (401, b"Bearer")


# Sessions ...


async def test_a_login_begins_a_session(seat: Open, file: Path) -> None:
    """The cookie is out of a script's reach, goes to this listener alone, and ends; the log says who came."""
    served = await seat(admin_tokens_file=file, admin_session_s=60)
    answer = await served.post("/login", f"token={OPERATE}", "Origin: http://localhost")
    cookie = (answer.header("set-cookie") or b"").decode()
    assert cookie.startswith("oncegate_session=")
    assert {"HttpOnly", "SameSite=Strict", "Max-Age=60", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    (call,) = served.log.calls
    assert (call.method_name, call.args) == ("info", ("admin login",))
    assert call.kwargs == {"user": "olga", "role": "operate", "client": "127.0.0.1"}


async def test_a_session_over_tls_is_secure(seat: Open, file: Path) -> None:
    """A proxy in front may end the TLS: the browser's Origin says that it came over TLS."""
    served = await seat(admin_tokens_file=file)
    answer = await served.post("/login", f"token={OPERATE}", "Origin: https://localhost")
    cookie = (answer.header("set-cookie") or b"").decode()
    assert cookie.startswith("__Host-oncegate_session=")
    assert "Secure" in cookie.split("; ")
    shown = await served.get("/form", f"Cookie: {cookie.partition(';')[0]}")
    assert shown.body.startswith(b"olga OPERATE")


async def test_a_session_changes_something_with_its_form(seat: Open, file: Path) -> None:
    """The form token of its own page is enough, also with what browsers say of the page."""
    served = await seat(admin_tokens_file=file)
    cookie, form = await served.log_in()
    for fields in ((), ("Origin: http://localhost",), ("Sec-Fetch-Site: same-origin", "Origin: http://localhost")):
        assert (await served.post("/change", f"form_token={form}", cookie, *fields)).status == 200
    assert served.changes == ["olga"] * 3


async def test_a_link_of_another_site_finds_the_session(seat: Open, file: Path) -> None:
    """A browser keeps a strict cookie from it: it is led to ask again from a page of ours, and then with the cookie or
    to the login. With the cookie, as of a neighbour on the same host, and without tokens, there is no detour."""
    served = await seat(admin_tokens_file=file)
    link = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document", "Accept: text/html")
    led = await served.get('/form?a="><b>&x=1', *link, host="o.test")
    place = b'content="0; url=/form?a=&quot;&gt;&lt;b&gt;&amp;x=1"'
    assert (led.status, place in led.body, b"olga" in led.body) == (200, True, False)
    cookie, _ = await served.log_in()
    again = ("Sec-Fetch-Site: same-origin", *link[1:])
    assert (await served.get("/form", *again, cookie, host="o.test")).body.startswith(b"olga ")
    assert (await served.get("/form", *again, host="o.test")).status == 303
    neighbour = ("Sec-Fetch-Site: same-site", *link[1:])
    assert (await served.get("/form", *neighbour, cookie, host="o.test")).body.startswith(b"olga ")
    other = await seat()
    assert (await other.get("/form", *link)).body.startswith(b"loopback ")


async def test_a_session_outlives_a_restart(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Another process with the same tokens knows the session, and its forms."""
    first = await Seat.open(monkeypatch, admin_tokens_file=file)
    cookie, form = await first.log_in()
    await first.close()
    second = await Seat.open(monkeypatch, admin_tokens_file=file)
    answer = await second.post("/change", f"form_token={form}", cookie)
    await second.close()
    assert (answer.status, second.changes) == (200, ["olga"])


# Other ways ...


async def test_a_proxy_names_the_user(seat: Open) -> None:
    """The user's highest role counts, and its forms work; what else the proxy adds does not matter."""
    served = await seat(
        admin_user_header="X-Forwarded-Email",
        admin_user_proxies="127.0.0.2",
        admin_users="view:*@example.com,operate:Ana@example.com",
    )
    ana = ("X-Forwarded-Email: ana@EXAMPLE.com", "X-Forwarded-For: 10.0.0.7", "Authorization: Basic YTpi")
    shown = await served.get("/form", *ana, host="admin.example.com", peer="127.0.0.2")
    assert shown.body.startswith(b"ana@EXAMPLE.com OPERATE ")
    form = await served.form_token(*ana, peer="127.0.0.2")
    assert (await served.post("/change", f"form_token={form}", *ana, peer="127.0.0.2")).status == 200
    ben = await served.get("/form", "X-Forwarded-Email: ben@example.com", peer="127.0.0.2")
    assert ben.body.startswith(b"ben@example.com VIEW ")


async def test_replicas_accept_each_other_s_forms(seat: Open) -> None:
    """With the same secret, also those of users that a proxy names."""
    names = {"admin_user_header": "X-User", "admin_user_proxies": "127.0.0.2", "admin_users": "operate:ana"}
    forms = []
    for secret in ("s" * 32, "s" * 32, "t" * 32):
        served = await seat(**names, secret=secret)
        forms.append(await served.form_token("X-User: ana", peer="127.0.0.2"))
    assert forms[0] == forms[1] != forms[2]


async def test_a_defect_is_logged_and_told(seat: Open) -> None:
    """A handler that fails answers like every other, and says nothing of itself to the visitor."""
    served = await seat()
    answer = await served.get("/defect")
    assert (answer.status, b"secret" in answer.body, answer.header("x-frame-options")) == (500, False, b"DENY")
    (call,) = served.log.calls
    assert (call.args, call.kwargs["route"]) == (("admin request failed",), "/defect")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def files_of(authority: trustme.CA, folder: Path) -> dict[str, Any]:
    """Return the settings of a listener whose certificate, and its clients', come from an authority."""
    served = authority.issue_cert("localhost")
    cert, key, ca = folder / "cert.pem", folder / "key.pem", folder / "ca.pem"
    served.cert_chain_pems[0].write_to_path(cert)
    served.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    return {"admin_tls_cert_file": cert, "admin_tls_key_file": key, "admin_tls_ca_file": ca}


def client_of(authority: trustme.CA, *names: str, common_name: str | None = None) -> ssl.SSLContext:
    """Return the TLS side of a client that has a certificate of these names, none without names."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if names or common_name:
        authority.issue_cert(*names, common_name=common_name).configure_cert(context)
    return context


async def test_a_certificate_names_its_owner(seat: Open, tmp_path: Path, authority: trustme.CA) -> None:
    """By its common name or another of its names. Probes have no certificate."""
    served = await seat(**files_of(authority, tmp_path), admin_users="operate:ana@example.com,view:scraper")
    for client, shown in (
        (client_of(authority, "ana@example.com"), b"ana@example.com OPERATE "),
        (client_of(authority, "x.test", common_name="scraper"), b"scraper VIEW "),
    ):
        assert (await served.get("/form", host="admin.test", tls=client)).body.startswith(shown)
    assert (await served.get("/healthz", tls=client_of(authority))).status == 200


async def test_certificates_are_read_again(seat: Open, tmp_path: Path, authority: trustme.CA) -> None:
    """With tokens and all, or nothing: from a reload on, the new authority's certificates count, and its own is shown;
    those of the old one do not, also where a client resumes its TLS session."""
    tokens = tokens_file(tmp_path)
    served = await seat(**files_of(authority, tmp_path), admin_users="operate:ana", admin_tokens_file=tokens)
    settings = admin_parts(served.settings).settings
    old = client_of(authority, "ana")
    assert (await served.get("/form", tls=old)).body.startswith(b"ana ")
    new_authority = trustme.CA()
    files_of(new_authority, tmp_path)
    tokens.write_text("nonsense")
    with pytest.raises(SettingsError, match="line 1 is not"):
        served.listener.prepare(settings)
    assert (await served.get("/form", tls=old)).body.startswith(b"ana ")
    tokens.write_text(f"view new {VIEW}")
    served.listener.prepare(settings)()
    assert (await served.get("/form", tls=client_of(new_authority, "ana"))).body.startswith(b"ana ")
    with pytest.raises(ssl.SSLError):
        await served.get("/form", tls=old)
    mixed = client_of(new_authority)
    authority.issue_cert("ana").configure_cert(mixed)
    assert await served.ask(request("GET", "/form", None, b"", host="localhost"), tls=mixed) is None
    answer = await served.get("/form", f"Authorization: Bearer {VIEW}", tls=client_of(new_authority))
    assert answer.body.startswith(b"new VIEW")


@pytest.mark.parametrize("name", ["admin_tls_cert_file", "admin_tls_ca_file"])
async def test_a_bad_certificate_stops_the_start(tmp_path: Path, authority: trustme.CA, name: str) -> None:
    """The sentence names the setting."""
    settings = files_of(authority, tmp_path)
    settings[name].write_text("nonsense")
    with pytest.raises(SettingsError, match=f"ONCEGATE_{name.upper()}: cannot be used"):
        await serve_admin(admin_parts(settings | {"admin_users": "view:*"}))


@pytest.mark.parametrize(
    ("peer", "host", "local"),
    [
        ("127.0.0.1", "localhost:8081", True),
        ("127.9.9.9", "127.0.0.1", True),
        ("::1", "[::1]:8081", True),
        ("::ffff:127.0.0.1", "localhost", True),
        ("127.0.0.1", "ops.test", True),
        ("127.0.0.1", "ops.test:99", True),
        ("127.0.0.1", "front.test:99", True),
        ("127.0.0.1", "front.test:98", False),
        ("127.0.0.1", "evil.test", False),
        ("10.0.0.7", "localhost", False),
        ("::ffff:10.0.0.7", "localhost", False),
        ("fe80::1%eth0", "localhost", False),
        ("10.0.0.7", "ops.test", False),
    ],
)
def test_who_is_on_the_machine(peer: str, host: str, local: bool) -> None:
    """A loopback address and a name of this machine together; `ops.test` and `front.test:99` are configured."""

    assert is_local(asked_from(peer, Host=host), ("ops.test", "front.test:99")) is local


def asked_from(peer: str, **fields: str) -> web.Request:
    """Return a request that came from an address."""

    class Transport:
        @staticmethod
        def get_extra_info(name: str) -> tuple[str, int] | None:
            return (peer, 9) if name == "peername" else None

    return make_mocked_request("GET", "/", headers=fields, transport=Transport())


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({}, 403, "Set ONCEGATE_ADMIN_TOKENS_FILE"),
        ({"admin_tokens_file": "file"}, 401, "send a token"),
        (
            {"admin_user_header": "X-User", "admin_user_proxies": "10.1.0.0/16", "admin_users": "view:ana"},
            403,
            "A role",
        ),
    ],
)
async def test_another_machine_is_told_what_is_missing(
    file: Path, settings: dict[str, Any], status: int, said: str
) -> None:
    """Under any name, also `localhost`: the sentence has the setting that would give a role."""
    chosen = {name: file if value == "file" else value for name, value in settings.items()}
    made = admin_parts(chosen).settings
    access = Access(made, load_tokens(made.admin_tokens_file), None)
    for host in ("localhost", "127.0.0.1:8081", "oncegate.internal"):
        with pytest.raises(Refused, match=said) as refused:
            await access.visitor(asked_from("10.0.0.7", Host=host))
        assert refused.value.status == status


async def test_a_listener_of_both_families_knows_the_machine(seat: Open) -> None:
    """It sees a client of IPv4 inside IPv6."""
    served = await seat(admin_listen=Address("::", 0))
    assert (await served.get("/form")).body.startswith(b"loopback ")
    assert (await served.get("/form", host="evil.test")).status == 403


# Guesses ...


def test_each_wrong_token_makes_its_address_wait_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to two seconds and for a minute, and no other address; what is remembered is bounded."""
    now = 100.0
    monkeypatch.setattr(attempts.time, "monotonic", lambda: now)
    slowed = Attempts()
    waits = []
    for _ in range(6):
        waits.append(slowed.delay_s("10.0.0.7"))
        slowed.note_wrong("10.0.0.7")
    assert waits == [0, 0.25, 0.5, 1, 2, 2]
    assert slowed.delay_s("10.0.0.8") == 0
    now += 61
    assert slowed.delay_s("10.0.0.7") == 0
    assert slowed.note_wrong("10.0.0.7") == 1
    for number in range(attempts.MOST_ADDRESSES):
        slowed.note_wrong(str(number))
    assert slowed.delay_s("10.0.0.7") == 0


async def test_guesses_do_not_lock_anybody_out(seat: Open, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right token works after many wrong ones, from the same address and at once from another; the log has ever
    fewer lines, none with a token."""
    monkeypatch.setattr(attempts, "FIRST_S", 0.05)
    served = await seat(admin_tokens_file=file)
    for _ in range(3):
        assert (await served.get("/form", "Authorization: Bearer guess-of-a-stranger")).status == 401
    assert (await served.get("/form", f"Authorization: Bearer {VIEW}", peer="127.0.0.9")).status == 200
    assert (await served.get("/form", f"Authorization: Bearer {VIEW}")).status == 200
    assert [call.kwargs["attempts"] for call in served.log.calls] == [1, 2]
    assert "guess-of-a-stranger" not in repr(served.log.calls)
