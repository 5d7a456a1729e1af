"""What identifies a tenant: the header fields that oncegate knows, cookies, and the order in which they count."""

from dataclasses import replace

import pytest

from oncegate.keys.digests import Digests, Scope, UnstableScope
from oncegate.keys.extraction import scope_fields
from oncegate.keys.sources import Cookie, parse_scope_source
from oncegate.keys.tenants import TenantFields
from oncegate.messages.fields import HOP_BY_HOP, by_name
from oncegate.messages.request_head import EXECUTION, FENCE, FORWARDING, RequestHead
from oncegate.rules.identity import scope_of, shows_credential
from oncegate.rules.resolution import _scope as rule_scope
from oncegate.rules.resolution import policy_of
from oncegate.settings.credentials import ACCOUNTS, CREDENTIALS, expanded, parse_scope
from oncegate.settings.names import parse_key_header, parse_scope_header
from oncegate.settings.settings import Settings

POLICY = policy_of(Settings(upstream="http://127.0.0.1:9"))  # type: ignore[arg-type]
DIGESTS = Digests(b"")
NAMED = [
    *("api-key", "x-goog-api-key", "apikey", "X-Api-Key", "X-Auth-Token", "X-Access-Token", "PRIVATE-TOKEN"),
    *("Ocp-Apim-Subscription-Key", "X-Shopify-Access-Token", "X-Amz-Security-Token", "Authorization"),
]
CHOOSING = ["Stripe-Account", "Stripe-Context", "OpenAI-Project", "OpenAI-Organization", "X-Account"]


def scope(*lines: str, policy=POLICY) -> Scope:
    """Return the scope of a request with these lines in its head."""
    pairs = [(name.encode(), value.encode()) for name, _, value in (line.partition(": ") for line in lines)]
    found = scope_of(policy, DIGESTS, RequestHead("POST", b"/", False, b"api.test", pairs, by_name(pairs)))
    assert isinstance(found, Scope)
    return found


@pytest.mark.parametrize("name", [*NAMED, *CREDENTIALS])
def test_each_known_credential_tells_clients_apart(name):
    """Another value is another tenant, in any spelling of the name; a cookie beside it does not count."""
    first = scope(f"{name}: Bearer a")
    assert not first.without_credential
    assert first != scope(f"{name}: Bearer b")
    assert first != scope()
    assert first == scope(f"{name.upper()}: Bearer a") == scope("Cookie: visits=1", f"{name}: Bearer a")


@pytest.mark.parametrize("name", [*CHOOSING, *ACCOUNTS])
def test_each_account_of_a_credential_is_a_tenant(name):
    """A header that chooses the account counts beside the credential. It is none: without one, the cookie counts."""
    credential = "Authorization: Bearer a"
    tenants = [
        scope(credential),
        scope(credential, f"{name}: acct_1"),
        scope(credential, f"{name}: acct_2"),
        scope(f"{name}: acct_1"),
        scope(f"{name}: acct_1", "Cookie: session=1"),
        scope(f"{name}: acct_1", "Cookie: session=2"),
    ]
    assert len({one.tenant for one in tenants}) == len(tenants)
    assert not any(one.without_credential for one in tenants)
    assert scope(f"{name}: acct_1", credential) == scope(credential, f"{name}: acct_1", "Cookie: visits=1")


def test_the_order_of_the_fields_does_not_matter():
    lines = ["Authorization: Bearer a", "Stripe-Account: 1", "x-goog-api-key: 2", "Api-Key: 3"]
    assert len({scope(*lines[at:], *lines[:at]) for at in range(len(lines))}) == 1


@pytest.mark.parametrize("lines", [(), ("User-Agent: a",), ("X-Account: ",), ("Authorization: ",), ("Cookie: ",)])
def test_who_carries_none_of_them_is_counted(lines):
    assert scope(*lines).without_credential


def test_an_operator_may_say_that_an_account_is_enough():
    """Where the scope names accounts alone, they count as credentials: the Cookie field does only without them."""
    for names in ((b"x-account",), (b"x-account", b"stripe-account")):
        tenant = TenantFields(names)
        fields = {b"x-account": [b"1"], b"cookie": [b"visits=1"]}
        assert tenant.counted(fields) == [b"x-account"]
    assert TenantFields((b"x-account",)).counted({b"cookie": [b"visits=1"]}) == [b"cookie"]
    named = TenantFields((b"cookie:session",))
    assert named.counted({b"cookie": [b"visits=1; session=2"], b"cookie:session": [b"2"]}) == [b"cookie:session"]
    # Where the cookie that is named is absent, all of it is safer than none.
    assert named.counted({b"cookie": [b"visits=1"]}) == [b"cookie"]
    assert TenantFields(()).counted({b"cookie": [b"visits=1"]}) == []


@pytest.mark.parametrize("named", [b"x-account", b"cookie:session", b"x-shop"])
def test_a_request_without_what_the_scope_names_is_nobody_elses(named):
    """Users whose requests lack it are told apart by all that is known to identify one."""
    tenant = TenantFields((named,))
    without = {b"authorization": [b"Bearer a"], b"stripe-account": [b"1"], b"cookie": [b"visits=1"], b"accept": [b"*"]}
    assert tenant.counted(without) == [b"cookie", b"authorization", b"stripe-account"]
    assert tenant.counted({**without, named: [b"n"]}) == [named]
    alike = [DIGESTS.scope(b"default", {b"authorization": [f"Bearer {who}".encode()]}, tenant) for who in "aab"]
    assert (alike[0] == alike[1], alike[0] == alike[2]) == (True, False)
    assert isinstance(DIGESTS.scope(b"default", {b"authorization": [b"AWS4-HMAC-SHA256 x"]}, tenant), UnstableScope)


# Cookies ...


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ([b"session=4711"], b"4711"),
        ([b"_ga=1; session=4711; flash=x"], b"4711"),
        ([b"_ga=2;session=4711 "], b"4711"),
        ([b"_ga=2;\tsession = 4711"], b"4711"),
        ([b"_ga=1", b"session=4711"], b"4711"),
        ([b"session=a=b"], b"a=b"),
        ([b'session="4711"'], b'"4711"'),
        ([b"session=1; session=2"], b"1; 2"),
        ([b"session=2", b"session=1"], b"2; 1"),
        ([b"session=; session="], None),
        ([b"session="], None),
        ([b"session"], None),
        ([b"Session=1; session2=2; xsession=3"], None),
        ([b"a=1,session=2"], None),
        ([b""], None),
        ([], None),
    ],
)
def test_one_cookie_is_a_source_of_a_scope(lines, value):
    """`cookie:NAME` has all values of one cookie, whatever other cookies do."""
    source = parse_scope_source("cookie:session")
    assert source.kind == Cookie(b"session")
    fields = {b"cookie": lines} if lines else {}
    found = scope_fields([source], RequestHead("POST", b"/", False, b"", [], fields))
    assert isinstance(found, dict)
    assert found.get(b"cookie:session") == (None if value is None else [value])


# Which fields can be a key or a scope ...

NEITHER = [
    *("Via", "Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Anything", "X-Real-IP"),
    *("Idempotency-Fence", "Content-Type", "Content-Encoding", "Content-Length", "Content-Range", "Date", "Expect"),
    *("Connection", "Keep-Alive", "TE", "Trailer", "Transfer-Encoding", "Upgrade", "Proxy-Authorization"),
    *("traceparent", "tracestate", "baggage", "b3", "X-B3-TraceId", "X-Amzn-Trace-Id", "X-Cloud-Trace-Context"),
    *("User-Agent", "Accept", "Accept-Encoding", "If-Match", "If-None-Match", "Range", "Cache-Control", "Prefer"),
    *("Origin", "Referer", "Sec-Fetch-Site", "X-Stainless-Retry-Count", "Oncegate-Status", "Max-Forwards"),
]


@pytest.mark.parametrize("name", NEITHER)
@pytest.mark.parametrize("spelled", [str, str.lower, str.upper])
def test_what_can_be_neither_key_nor_scope(name, spelled):
    """Fields of this hop, of forwarding, of the message and of a trace are refused, in any case."""
    with pytest.raises(ValueError, match="can carry a key"):
        parse_key_header(spelled(name))
    with pytest.raises(ValueError, match="say whose request it is"):
        parse_scope_header(spelled(name))


def test_whatever_the_proxy_writes_is_refused():
    """No field that oncegate drops or writes anew can be a key or a scope."""
    for name in HOP_BY_HOP | FORWARDING | {FENCE, EXECUTION}:
        for parse in (parse_key_header, parse_scope_header):
            with pytest.raises(ValueError, match="must "):
                parse(name.decode())


@pytest.mark.parametrize("name", ["Authorization", "Cookie", "Host", "X-Forwarded-User", "X-Forwarded-Email"])
def test_what_can_be_a_scope_alone(name):
    assert parse_scope_header(name) == name
    with pytest.raises(ValueError, match="can carry a key"):
        parse_key_header(name)


@pytest.mark.parametrize("name", ["Idempotency-Key", "X-Request-Id", "X-Correlation-ID", "Request-Id"])
def test_what_can_be_a_key_alone(name):
    """These differ from request to request, so that as a scope they would make each retry another tenant's."""
    assert parse_key_header(name) == name
    with pytest.raises(ValueError, match="say whose request it is"):
        parse_scope_header(name)


def test_all_known_fields_can_be_a_scope():
    for name in (*CREDENTIALS, *ACCOUNTS):
        assert parse_scope(name) == name
    assert parse_scope("Known") == "known"
    assert expanded(["X-Mine", "known", "Authorization"]) == ("X-Mine", *CREDENTIALS, *ACCOUNTS)


SECRET, SHARED = True, False
SCOPES = {
    # Scope of the rule; lines of the request; whether they show a credential.
    "known": [
        (["Authorization: Bearer a"], SECRET),
        (["X-Api-Key: a", "Stripe-Account: b"], SECRET),
        (["Authorization: "], SHARED),
        ([], SHARED),
        (["X-Account: a"], SHARED),
        (["Cookie: language=en"], SHARED),
        (["X-Account: a", "Cookie: session=1"], SHARED),
    ],
    "header:X-Account": [(["X-Account: a"], SHARED), (["Authorization: Bearer a"], SECRET)],
    "header:X-Session": [(["X-Session: a"], SECRET)],
    "header:Host": [([], SHARED)],
    "header:Cookie": [(["Cookie: session=1"], SECRET)],
    "cookie:session": [(["Cookie: session=1"], SECRET), (["Cookie: language=en"], SHARED)],
    "path:1": [([], SHARED)],
    "": [(["Authorization: Bearer a"], SHARED)],
}


@pytest.mark.parametrize("scope", SCOPES)
def test_whoever_shows_no_secret_may_share_the_scope_with_others(scope):
    """Accounts, hosts and parts of a target are known to many, and so is a cookie that nobody chose for a scope."""
    sources = [parse_scope_source(scope)] if ":" in scope else []
    fields = {} if scope == "known" else rule_scope(sources)
    policy = replace(POLICY, **fields)
    for lines, is_secret in SCOPES[scope]:
        pairs = [(name.encode(), value.encode()) for name, _, value in (line.partition(": ") for line in lines)]
        pairs.append((b"Host", b"api.test"))
        head = RequestHead("POST", b"/a", False, b"api.test", pairs, by_name(pairs))
        assert shows_credential(policy, head) is is_secret, lines
