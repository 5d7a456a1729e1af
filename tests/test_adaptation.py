"""What one requester gets of a response: the fields of origin, the addresses and the cookies."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncegate.adaptation.adaptation import NOTHING, Adaptation, Requester
from oncegate.adaptation.addresses import Addresses, outer_prefix, own_authorities
from oncegate.adaptation.blocks import read_block, with_members, write_block
from oncegate.adaptation.cookies import REPLAYED_MS, Cookies, names_a_person
from oncegate.adaptation.cors import EXPOSED, Cors, DecidedBy
from oncegate.adaptation.origins import Origins, origin_of
from oncegate.adaptation.preflight import Asked, Preflight, read_preflight
from oncegate.messages.request_head import RequestHead
from oncegate.rules.policy import Policy

SHOP, OTHER, UNLISTED = b"https://shop.example", b"https://pay.shop.example", b"https://shop.example.evil.test"
LISTED = Origins(("https://shop.example", "https://*.shop.example"))
CORS = Cors(LISTED, key_headers=(b"Idempotency-Key",))
EXPOSE = b"Access-Control-Expose-Headers: " + b", ".join(EXPOSED) + b"\r\n"
VARY = b"Vary: Origin\r\n"


def allow(origin: bytes) -> bytes:
    return b"Access-Control-Allow-Origin: " + origin + b"\r\n"


# Blocks ...


@pytest.mark.parametrize("block", [b"", b"A: b\r\n", b"a:b: c\r\nA: \xff\r\nEmpty: \r\n"])
def test_a_block_keeps_names_values_and_order(block):
    """Reading and writing changes nothing but blanks around values."""
    assert write_block(read_block(block)) == block.replace(b"a:b", b"a: b")


@pytest.mark.parametrize(
    ("block", "merged"),
    [
        (b"", b"Vary: Origin\r\n"),
        (b"vary: Accept\r\n", b"vary: Accept, Origin\r\n"),
        (b"Vary: origin\r\n", b"Vary: origin\r\n"),
        (b"Vary: Accept\r\nVary: Accept-Encoding,  ORIGIN\r\n", b"Vary: Accept\r\nVary: Accept-Encoding,  ORIGIN\r\n"),
        (b"Vary: \r\n", b"Vary: \r\nVary: Origin\r\n"),
    ],
)
def test_members_are_merged_into_a_list(block, merged):
    """A member is added once, to the line that is there."""
    assert write_block(with_members(read_block(block), b"Vary", (b"Origin",))) == merged


# Origins ...


@pytest.mark.parametrize(
    ("texts", "origin", "listed"),
    [
        (("https://shop.example",), b"https://shop.example", True),
        (("https://shop.example",), b"http://shop.example", False),
        (("https://shop.example",), b"https://shop.example:8443", False),
        (("https://shop.example",), b"https://shop.example.evil.test", False),
        (("https://shop.example",), b"https://evilshop.example", False),
        (("https://shop.example",), b"HTTPS://shop.example", False),
        (("https://shop.example",), b"https://shop.example/", False),
        (("https://shop.example",), b"https://shop.example, https://evil.test", False),
        (("http://localhost:3000",), b"http://localhost:3000", True),
        (("http://localhost:3000",), b"http://localhost:30000", False),
        (("http://[::1]:3000",), b"http://[::1]:3000", True),
        (("https://*.shop.example",), b"https://pay.shop.example", True),
        (("https://*.shop.example",), b"https://a.b.shop.example", True),
        (("https://*.shop.example",), b"https://shop.example", False),
        (("https://*.shop.example",), b"https://.shop.example", False),
        (("https://*.shop.example",), b"https://evilshop.example", False),
        (("https://*.shop.example",), b"https://evil.test/.shop.example", False),
        (("https://*.shop.example",), b"https://evil.test:1.shop.example", False),
        (("https://*.shop.example",), b"https://user@pay.shop.example", False),
        (("https://*.shop.example",), b"https://pay.shop.example:444", False),
        (("https://*.shop.example:444",), b"https://pay.shop.example:444", True),
        (("https://*.shop.example",), b"http://pay.shop.example", False),
        (("*",), b"https://any.test", True),
        (("*",), b"capacitor://localhost", True),
        (("*",), b"null", False),
        (("*",), b"", False),
        ((), b"https://shop.example", False),
    ],
)
def test_an_origin_is_listed_as_a_whole(texts, origin, listed):
    """A wildcard stands for whole labels, and nothing else of an origin may differ. `null` is never listed."""
    assert (origin in Origins(texts)) is listed


@pytest.mark.parametrize(
    ("lines", "origin"), [((), b""), ((b" https://a.test ",), b"https://a.test"), ((b"https://a.test",) * 2, b"")]
)
def test_one_origin_counts(lines, origin):
    """A request with two of them has none."""
    assert origin_of({b"origin": [*lines]} if lines else {}) == origin


# Which page may read ...


@pytest.mark.parametrize(
    ("decided_by", "block", "origin", "expected"),
    [
        # An API without CORS code.
        ("auto", b"", SHOP, allow(SHOP) + EXPOSE + VARY),
        ("oncegate", b"", SHOP, allow(SHOP) + EXPOSE + VARY),
        ("api", b"", SHOP, VARY),
        ("auto", b"", UNLISTED, VARY),
        ("auto", b"", b"null", VARY),
        ("auto", b"", b"", VARY),
        ("auto", b"Vary: Accept\r\n", SHOP, b"Vary: Accept, Origin\r\n" + allow(SHOP) + EXPOSE),
        ("auto", b"Vary: *\r\n", SHOP, b"Vary: *\r\n" + allow(SHOP) + EXPOSE),
        # One that grants.
        ("auto", allow(SHOP) + VARY, SHOP, allow(SHOP) + VARY + EXPOSE),
        ("api", allow(SHOP) + VARY, SHOP, allow(SHOP) + VARY + EXPOSE),
        ("auto", allow(b"*"), SHOP, allow(b"*") + EXPOSE + VARY),
        ("auto", allow(UNLISTED), UNLISTED, allow(UNLISTED) + VARY),
        ("auto", allow(SHOP) + b"Access-Control-Expose-Headers: X-Id, link\r\n", SHOP, allow(SHOP)
         + b"Access-Control-Expose-Headers: X-Id, link, "
         + b", ".join(name for name in EXPOSED if name != b"Link") + b"\r\n" + VARY),
        # One that refuses: by another origin, by a Vary alone, by the rest of its CORS fields.
        ("auto", allow(b"https://only.test"), SHOP, allow(b"https://only.test") + VARY),
        ("oncegate", allow(b"https://only.test"), SHOP, allow(b"https://only.test") + VARY),
        ("auto", VARY, SHOP, VARY),
        ("auto", b"access-control-allow-credentials: true\r\n", SHOP,
         b"access-control-allow-credentials: true\r\n" + VARY),
    ],
)  # fmt: skip
def test_the_api_s_word_about_a_page_counts(decided_by, block, origin, expected):
    """What the API granted stays, what it refused is not granted; where it says nothing, the list counts."""
    cors = Cors(LISTED, decided_by=DecidedBy(decided_by))
    assert Requester(Adaptation(cors), origin).forwarded(block) == expected


@pytest.mark.parametrize(
    ("cors", "block", "origin", "expected"),
    [
        # Without a list a grant is the same page's alone.
        (None, allow(SHOP), SHOP, allow(SHOP)),
        (None, allow(SHOP) + VARY, OTHER, VARY),
        (None, allow(SHOP) + b"Access-Control-Allow-Credentials: true\r\n", b"", b""),
        (None, allow(b"*"), OTHER, allow(b"*")),
        (None, allow(b"null"), b"null", b""),
        (None, allow(SHOP) + allow(SHOP), SHOP, b""),
        # With one, it is whoever's that is listed.
        (CORS, allow(SHOP) + VARY, OTHER, VARY + allow(OTHER) + EXPOSE),
        (CORS, allow(UNLISTED), SHOP, allow(SHOP) + EXPOSE + VARY),
        (CORS, allow(UNLISTED), UNLISTED, allow(UNLISTED) + VARY),
        (CORS, allow(SHOP), UNLISTED, VARY),
        (CORS, allow(SHOP), b"null", VARY),
        (CORS, allow(b"null"), b"null", VARY),
        (CORS, allow(b"*"), OTHER, allow(b"*") + EXPOSE + VARY),
        (CORS, b"", OTHER, allow(OTHER) + EXPOSE + VARY),
        (CORS, b"", b"", VARY),
        # The original's page was refused, or its CORS code had no page to grant it to.
        (CORS, VARY, SHOP, VARY),
        (Cors(LISTED, decided_by=DecidedBy.API), b"", SHOP, VARY),
        (Cors(LISTED, decided_by=DecidedBy.API), allow(SHOP), OTHER, allow(OTHER) + EXPOSE + VARY),
        (Cors(LISTED, credentials=True), allow(SHOP) + b"Access-Control-Allow-Credentials: true\r\n", OTHER,
         allow(OTHER) + b"Access-Control-Allow-Credentials: true\r\n" + EXPOSE + VARY),
        (CORS, allow(SHOP) + b"Access-Control-Allow-Credentials: true\r\n", OTHER, allow(OTHER) + EXPOSE + VARY),
    ],
)  # fmt: skip
def test_a_replay_is_granted_to_the_page_that_asks_now(cors, block, origin, expected):
    """The grant of the page that sent the original is nobody else's, and `null` is no page."""
    assert Requester(Adaptation(cors), origin).replayed(block, 0) == expected


FIELDS = ("Location: https://up.test/", "Set-Cookie: a=b", "Content-Type: text/plain", "X-Variant: vary")


@pytest.mark.parametrize("origin", [SHOP, UNLISTED, b""])
@pytest.mark.parametrize("field", ["", *FIELDS])
def test_what_is_only_added_is_what_the_rules_say(origin, field, monkeypatch):
    """A response without any such field takes a shorter way, to the same fields."""
    block = f"A: b\r\n{field}\r\n".encode().replace(b"\r\n\r\n", b"\r\n")
    one = Requester(Adaptation(CORS, addresses=Addresses("https", frozenset(("up.test:443",)))), origin)
    short = one.forwarded(block), one.replayed(block, 0)
    monkeypatch.setattr("oncegate.adaptation.adaptation._says_nothing", lambda _: False)
    assert short == (one.forwarded(block), one.replayed(block, 0))


@pytest.mark.parametrize(
    ("cors", "origin", "expected"),
    [
        (None, SHOP, b""),
        (CORS, SHOP, allow(SHOP) + EXPOSE + VARY),
        (CORS, UNLISTED, VARY),
        (CORS, b"", VARY),
        (Cors(LISTED, credentials=True), OTHER,
         allow(OTHER) + b"Access-Control-Allow-Credentials: true\r\n" + EXPOSE + VARY),
        (Cors(Origins(("*",))), UNLISTED, allow(b"*") + EXPOSE + VARY),
        (Cors(Origins(("*",))), b"null", VARY),
    ],
)  # fmt: skip
def test_own_answers_are_granted_by_the_list(cors, origin, expected):
    """An answer of oncegate's own can be read by the pages that the operator listed."""
    assert Requester(Adaptation(cors), origin).own_fields() == expected


# Preflights ...


def preflight_head(**fields: bytes) -> RequestHead:
    """Return the head of a preflight with these Access-Control-Request- fields."""
    pairs = [
        (b"Origin", SHOP),
        *((b"Access-Control-Request-" + name.encode(), value) for name, value in fields.items()),
    ]
    return RequestHead("OPTIONS", b"/", False, b"api.test", pairs, {name.lower(): [value] for name, value in pairs})


@pytest.mark.parametrize(
    ("head", "asked"),
    [
        (preflight_head(Method=b"POST"), Asked(SHOP, b"POST", ())),
        (preflight_head(Method=b"POST", Headers=b"a, ,B ,c\x80,d e"), Asked(SHOP, b"POST", (b"a", b"B"))),
        (preflight_head(), None),
        (preflight_head(Method=b"GE T"), None),
        (preflight_head(Method=b"POST")._replace(method="GET"), None),
        (preflight_head(Method=b"POST")._replace(fields={b"access-control-request-method": [b"POST"]}), None),
    ],
)
def test_a_preflight_names_origin_and_method(head, asked):
    """Any other OPTIONS is none, and what is no field name is not repeated."""
    assert read_preflight(head) == asked


def preflight(*cors: Cors, method: bytes = b"POST", headers: tuple[bytes, ...] = (b"content-type",)) -> Preflight:
    return Preflight(Asked(SHOP, method, headers), cors or (CORS,))


def test_a_preflight_is_granted_by_oncegate():
    """The page may send what it asked for, what oncegate reads, and what continues a stream or a download."""
    assert preflight(headers=(b"content-type", b"prefer")).granted(600) == (
        allow(SHOP)
        + b"Access-Control-Allow-Methods: GET, HEAD, POST, PUT, PATCH, DELETE\r\n"
        + b"Access-Control-Allow-Headers: content-type, prefer, Idempotency-Key, Last-Event-ID, Range\r\n"
        + b"Access-Control-Max-Age: 600\r\n"
        + b"Vary: Origin, Access-Control-Request-Method, Access-Control-Request-Headers\r\n"
    )
    other = preflight(Cors(Origins(("*",)), key_headers=(b"X-Key",)), method=b"QUERY").granted(0)
    assert allow(b"*") in other
    assert b"DELETE, QUERY\r\n" in other
    assert b", X-Key, " in other


@pytest.mark.parametrize(
    ("decided_by", "status", "block", "is_open"),
    [
        # No CORS code: whatever the API makes of OPTIONS.
        ("auto", 404, b"", True),
        ("auto", 405, b"Allow: POST\r\n", True),
        ("auto", 401, b"", True),
        ("auto", 200, b"Allow: GET, OPTIONS\r\n", True),
        ("auto", 204, b"Allow: GET, OPTIONS\r\n", True),
        ("api", 404, b"", False),
        # It grants by itself.
        ("auto", 204, allow(SHOP), False),
        ("auto", 200, allow(b"*"), False),
        # It grants on every response, and does not know preflights.
        ("auto", 405, allow(b"*"), True),
        ("auto", 403, allow(b"*"), False),
        # It refuses, with a sign of it or in silence.
        ("auto", 200, allow(b"https://only.test"), False),
        ("auto", 400, VARY, False),
        ("auto", 200, b"access-control-max-age: 600\r\n", False),
        ("auto", 403, b"", False),
        ("auto", 204, b"", False),
    ],
)
def test_the_api_s_response_may_leave_a_preflight_open(decided_by, status, block, is_open):
    """Its own grant and its own refusal stand."""
    one = preflight(Cors(LISTED, decided_by=DecidedBy(decided_by)))
    assert one.is_open(status, block) is is_open


def test_what_oncegate_needs_is_added_to_the_api_s_grant():
    """Not to its refusal."""
    granted = preflight().forwarded(allow(SHOP) + b"Access-Control-Allow-Headers: content-type, Prefer\r\n")
    assert b"Access-Control-Allow-Headers: content-type, Prefer, Idempotency-Key, Last-Event-ID, Range\r\n" in granted
    assert b"Vary: Origin, Access-Control-Request-Method" in granted
    assert b"Allow-Headers" not in preflight().forwarded(allow(OTHER))


# Addresses ...

UP = Addresses("http", own_authorities(("up.test:9000", "api.shop.example"), "http"), b"/api")
ROOT = Addresses("https", own_authorities(("up.test",), "https"))


@pytest.mark.parametrize(
    ("addresses", "url", "shown"),
    [
        (UP, b"http://up.test:9000/api/orders/7?x=%2F#part", b"/orders/7?x=%2F#part"),
        (UP, b"HTTP://UP.test.:9000/api", b"/"),
        (UP, b"http://up.test:9000/api?x", b"/?x"),
        (UP, b"//up.test:9000/api/a", b"/a"),
        (UP, b"http://api.shop.example/api/a", b"/a"),
        (UP, b"http://api.shop.example:80/api/a", b"/a"),
        (ROOT, b"https://up.test", b"/"),
        (ROOT, b"https://up.test:443/a", b"/a"),
        (ROOT, b"https://up.test?x", b"/?x"),
        # Another server, or a place of this one to which oncegate does not lead.
        (UP, b"https://up.test:9000/api/a", None),
        (UP, b"http://up.test/api/a", None),
        (UP, b"http://up.test:9001/api/a", None),
        (UP, b"http://sub.up.test:9000/api/a", None),
        (UP, b"http://up.test:9000.evil.test/api/a", None),
        (UP, b"http://user@up.test:9000/api/a", None),
        (UP, b"http://up.test:9000/apis/a", None),
        (UP, b"http://up.test:9000/other", None),
        (UP, b"http://up.test:9000/api/../other", None),
        (UP, b"http://up.test:9000", None),
        (UP, b"http://up.test:9000\\/api/a", None),
        (UP, b"http://up.test:9000/api/a b", None),
        (UP, b"http:/up.test:9000/api/a", None),
        (UP, b"ftp://up.test:9000/api/a", None),
        (UP, b"http://up.test:x/api/a", None),
        (UP, b"/api/a", None),
        (UP, b"a", None),
        (UP, b"", None),
        # No reader may take the path for a host.
        (ROOT, b"https://up.test//evil.test/a", b"/.//evil.test/a"),
        (ROOT, b"https://up.test/\\evil.test", b"/./\\evil.test"),
        (UP, b"http://up.test:9000/api//evil.test", b"/.//evil.test"),
    ],
)
def test_the_upstream_s_own_address_becomes_a_path(addresses, url, shown):
    """Scheme, host, port and prefix have to be the upstream's; every other URL stays as it is."""
    assert addresses.shown(url, b"") == (url if shown is None else shown)


@given(rest=st.binary(max_size=12), outer=st.sampled_from((b"", b"/shop")))
def test_no_path_leads_to_another_host(rest, outer):
    """Whatever the API puts behind its own address, it stays as it is or becomes a path of this host."""
    url = b"https://up.test/" + rest
    shown = ROOT.shown(url, outer)
    assert shown == url or re.fullmatch(rb"/(?![/\\])[^\x00-\x20\x7f]*", shown)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (b"https://up.test/a", b"/shop/a"),
        (b"https://up.test", b"/shop/"),
        (b"https://up.test//a", b"/shop//a"),
        # The API knows the prefix.
        (b"https://up.test/shop/a", b"/shop/a"),
        (b"https://up.test/shopping", b"/shop/shopping"),
        (b"https://other.test/a", b"https://other.test/a"),
    ],
)
def test_what_a_proxy_in_front_took_off_comes_back(url, shown):
    """The client needs the prefix that X-Forwarded-Prefix names."""
    assert ROOT.shown(url, b"/shop") == shown


@pytest.mark.parametrize(
    ("lines", "prefix"),
    [
        ([], b""),
        ([b"/shop"], b"/shop"),
        ([b"/shop/"], b"/shop"),
        ([b"/outer, /inner"], b"/outer/inner"),
        ([b"/outer", b"/inner/"], b"/outer/inner"),
        ([b"/"], b""),
        ([b"shop"], b""),
        ([b"//evil.test"], b""),
        ([b"/\\evil.test"], b""),
        ([b"/a/../b"], b""),
        ([b"https://evil.test"], b""),
        ([b"/a?b"], b""),
    ],
)
def test_a_prefix_is_a_path(lines, prefix):
    """Anything else counts as none."""
    assert outer_prefix({b"x-forwarded-prefix": lines} if lines else {}) == prefix


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"5; url=https://up.test/a", b"5; url=/a"),
        (b"0;URL='https://up.test/a'", b"0;URL='/a'"),
        (b'1.5 , url = "https://up.test"', b'1.5 , url = "/"'),
        (b"5", b"5"),
        (b"5; url=https://other.test/a", b"5; url=https://other.test/a"),
        (b"5; url='https://up.test/a", b"5; url='https://up.test/a"),
    ],
)
def test_a_refresh_names_an_address_too(value, shown):
    """The URL in it is rewritten like any other."""
    assert ROOT.refreshed(value, b"") == shown


def test_each_requester_gets_its_own_address():
    """The same stored fields: with a prefix, without one, and where a policy rewrites nothing."""
    block = b"Location: https://up.test/a\r\ncontent-location: https://up.test/b\r\nLink: <https://up.test/c>\r\n"
    shown = b"Location: /a\r\ncontent-location: /b\r\nLink: <https://up.test/c>\r\n"
    rewriting = Adaptation(addresses=ROOT)
    assert Requester(rewriting).forwarded(block) == Requester(rewriting).replayed(block, 0) == shown
    assert Requester(rewriting, outer=b"/shop").replayed(block, 0).startswith(b"Location: /shop/a\r\n")
    assert Requester(NOTHING).replayed(block, 0) == block


# Cookies ...


@pytest.mark.parametrize(
    ("cookies", "value", "shown"),
    [
        (Cookies("drop"), b"a=b; Domain=up.test; Path=/x; Secure", b"a=b; Path=/x; Secure"),
        (Cookies("shop.example"), b"a=b;domain = .up.test", b"a=b; Domain=shop.example"),
        (Cookies("shop.example"), b"a=b; Path=/", b"a=b; Path=/"),
        (Cookies("drop"), b"domain=b; HttpOnly", b"domain=b; HttpOnly"),
        (Cookies(rewrites_path=True, prefix=b"/api"), b"a=b; Path=/api/x; Domain=d", b"a=b; Path=/x; Domain=d"),
        (Cookies(rewrites_path=True, prefix=b"/api"), b"a=b; path=/api", b"a=b; Path=/"),
        (Cookies(rewrites_path=True, prefix=b"/api"), b"a=b; Path=/apis", b"a=b; Path=/apis"),
        (Cookies(rewrites_path=True), b"__Host-a=b; Path=/; Secure", b"__Host-a=b; Path=/; Secure"),
        (Cookies(rewrites_path=True), b"a=b", b"a=b"),
        (Cookies(rewrites_path=True), b"a=b; Path", b"a=b; Path"),
    ],
)
def test_cookies_get_another_path_and_domain(cookies, value, shown):
    """On request, and nothing else of them changes."""
    assert cookies.shown(value, b"") == shown


@pytest.mark.parametrize(
    ("path", "shown"), [(b"/", b"/shop"), (b"/api/x", b"/shop/x"), (b"/shop/x", b"/shop/x"), (b"/api", b"/shop")]
)
def test_a_cookie_is_valid_below_the_outer_prefix(path, shown):
    """Where a proxy in front took a prefix off, the browser's path has it."""
    cookies = Cookies(rewrites_path=True, prefix=b"/api")
    assert cookies.shown(b"a=b; Path=" + path, b"/shop") == b"a=b; Path=" + shown


def test_a_replay_repeats_cookies_for_a_minute():
    """Only where the policy says so; the stored ones of another policy stay in the store."""
    block = b"Set-Cookie: a=b\r\nX: y\r\nset-cookie: c=d\r\n"
    keeping = Requester(Adaptation(replays_cookies=True))
    assert keeping.replayed(block, REPLAYED_MS) == block
    assert keeping.replayed(block, REPLAYED_MS + 1) == b"X: y\r\n"
    assert Requester(NOTHING).replayed(block, 0) == b"X: y\r\n"


def test_who_names_nobody_shares_no_cookies():
    """A cookie or a credential names a person; accounts and empty fields do not."""
    assert names_a_person({b"cookie": [b"session=1"]})
    assert names_a_person({b"authorization": [b"Bearer a"]})
    assert not names_a_person({b"stripe-account": [b"acct_1"], b"cookie": [b""], b"authorization": [b""]})


# What it costs where nothing is adapted ...


def test_a_policy_adapts_nothing_by_itself():
    """A policy acts on no further field unless somebody chose it, and passes executed responses on as they are."""
    assert Policy.__dataclass_fields__["adaptation"].default is NOTHING
    assert NOTHING.acted_on == frozenset()
    assert not NOTHING.adapts_all
    assert not NOTHING.adapts_replay(b"Content-Type: text/plain\r\nDate: x\r\n")


@pytest.mark.parametrize("line", [b"LOCATION: /a", b"access-control-allow-origin: a", b"Set-Cookie: a", b"Refresh: 1"])
def test_what_a_replay_may_change_is_looked_at(line):
    """Every field that depends on the requester is found, however it is written."""
    assert NOTHING.adapts_replay(b"A: b\r\n" + line + b"\r\n")
    assert Adaptation(CORS).adapts_replay(b"")
    assert Adaptation(CORS).acted_on == {b"origin"}
